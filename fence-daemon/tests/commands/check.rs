//! `check-config`, `-l`, and exit codes.

use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use fence_config::cases::{PATH, cases};

use crate::program::{Dir, PROGRAM, Run, feed, parse, run};

fn conf(dir: &Dir, key: &str, more: &str) -> std::path::PathBuf {
    let text = format!(
        "fence_virtd {{ listener = \"multicast\"; backend = \"libvirt\"; }}\n\
         listeners {{ multicast {{ key_file = \"{}\"; interface = \"lo\"; }} }}\n{more}\n",
        dir.path(key).display()
    );
    dir.write("conf", &text)
}

fn plain(arguments: &[&str]) -> Run {
    feed(Command::new(PROGRAM).args(arguments), "")
}

#[test]
fn check_config_prints_the_effective_values() {
    let dir = Dir::new();
    dir.write("key", "s3cret-bytes, of a line");
    let conf = conf(&dir, "key", "groups { group { ip = \"192.168.122.11\"; uuid = \"node1\"; } }");
    let before = dir.contents();
    let checked = run(&["check-config"], &conf, "");
    assert_eq!((checked.code, checked.stderr.as_str()), (Some(0), ""), "{}", checked.stdout);
    assert_eq!(parse(&checked.stdout).0, parse(&std::fs::read_to_string(&conf).unwrap()).0);
    assert!(checked.stdout.contains("hash = \"sha256\";  # default"), "{}", checked.stdout);
    assert!(checked.stdout.contains("23 bytes") && !checked.stdout.contains("s3cret"), "{}", checked.stdout);
    // And it can be checked again.
    let again = run(&["check-config"], &dir.write("again", &checked.stdout), "");
    assert_eq!(again.code, Some(0));
    assert_eq!(again.stdout, checked.stdout.replace("  # default", ""));
    std::fs::remove_file(dir.path("again")).unwrap();
    assert_eq!(dir.contents(), before, "it changes nothing");
}

#[test]
fn doubts_are_reported_with_their_places_and_are_no_failure() {
    let dir = Dir::new();
    std::fs::set_permissions(dir.write("key", "x"), PermissionsExt::from_mode(0o644)).unwrap();
    let conf = conf(&dir, "key", "zork = \"1\";");
    let text = std::fs::read_to_string(&conf).unwrap();
    let text = text.replace("interface = \"lo\"", "interface = \"lo\"; interface = \"no-such-if\"");
    let conf = dir.write("conf", &text);
    let checked = run(&["check-config"], &conf, "");
    assert_eq!(checked.code, Some(0), "{}", checked.stderr);
    for doubt in ["conf:3:1", "zork", "no-such-if", "waits for it", "mode 0644", "overruled", "1 byte:", "can guess it"]
    {
        assert!(checked.stderr.contains(doubt), "{doubt}: {}", checked.stderr);
    }
    assert!(!checked.stderr.contains('\x1b') && !checked.stdout.contains("zork"), "{}", checked.stderr);
}

/// What the doctor says of a key, and what is said here, is the same.
#[test]
fn keys_that_can_be_guessed_are_reported_whatever_is_asked() {
    let dir = Dir::new();
    let conf = conf(&dir, "key", "");
    for (key, words) in [("12345", "5 bytes"), ("zero", "not random"), ("passwordpassword", "not random")] {
        dir.write("key", &if key == "zero" { "\0".repeat(4096) } else { key.to_owned() });
        for command in [&["check-config"][..], &["doctor"]] {
            let said = run(command, &conf, "");
            let said = said.stdout + &said.stderr;
            // The doctor breaks its lines.
            let said = said.split_whitespace().collect::<Vec<_>>().join(" ");
            assert!(said.contains(words) && said.contains("can guess it"), "{command:?} of {key}: {said}");
            assert!(said.contains("fence-daemon keygen --force "), "{command:?} of {key}: {said}");
            assert!(!said.contains("12345") && !said.contains("passwordpassword"), "{said}");
        }
    }
}

#[test]
fn two_sections_of_a_name_are_reported_with_both_places() {
    let dir = Dir::new();
    dir.write("key", "a line of text that is a key");
    let conf = conf(&dir, "key", "listeners { multicast { interface = \"virbr1\"; } }");
    for command in [&["check-config"][..], &["-F"]] {
        let told = run(command, &conf, "");
        assert_eq!(told.code, Some(255), "{command:?}: {}", told.stderr);
        for words in ["conf:3:1", "`listeners` is here again", "on line 2", "put both into one"] {
            assert!(told.stderr.contains(words), "{words}: {}", told.stderr);
        }
    }
}

#[test]
fn entries_of_groups_that_no_domain_has_are_named() {
    let dir = Dir::new();
    dir.write("key", "a key that is long enough, and no word twice in it: 4711");
    let groups = |uri| {
        format!(
            "backends {{ libvirt {{ uri = \"{uri}\"; }} }} \
             groups {{ group = \"web\" {{ ip = \"192.168.122.11\"; uuid = \"TEST\"; uuid = \"tset\"; }} }}"
        )
    };
    // libvirt's test driver has one domain, `test`.
    let checked = run(&["check-config"], &conf(&dir, "key", &groups("test:///default")), "");
    assert_eq!(checked.code, Some(0), "{}", checked.stderr);
    assert!(checked.stderr.contains("no domain is called `tset`, which the group `web`"), "{}", checked.stderr);
    assert!(!checked.stderr.contains("TEST"), "{}", checked.stderr);
    let silent = run(&["check-config"], &conf(&dir, "key", &groups("qemu:///no-such-path")), "");
    assert_eq!((silent.code, silent.stderr.as_str()), (Some(0), ""), "nothing is known of its domains");
}

#[test]
fn mistakes_are_reported_with_their_places() {
    let dir = Dir::new();
    let conf = dir.path("conf");
    for case in cases().filter(|case| case.says.starts_with("error: ")) {
        std::fs::write(&conf, case.bytes()).unwrap();
        let checked = run(&["check-config"], &conf, "");
        assert_eq!((checked.code, checked.stdout.as_str()), (Some(255), ""), "{}", case.title);
        let expected = case.says.replace(PATH, conf.to_str().unwrap());
        assert_eq!(checked.stderr.trim_end(), expected, "{}", case.title);
    }
    let missing = run(&["check-config"], &dir.path("none"), "");
    assert_eq!((missing.code, missing.stdout.as_str()), (Some(255), ""));
}

#[test]
fn a_key_that_the_daemon_cannot_use_is_its_failure() {
    let dir = Dir::new();
    let conf = conf(&dir, "key", "");
    for (make, why) in [(None, "does not exist"), (Some(""), "is empty")] {
        if let Some(bytes) = make {
            dir.write("key", bytes);
        }
        let checked = run(&["check-config"], &conf, "");
        assert_eq!(checked.code, Some(255), "{}", checked.stderr);
        assert!(checked.stderr.contains(why) && checked.stderr.contains("exit status 255"), "{}", checked.stderr);
        assert!(checked.stdout.contains("key_file"), "its findings are printed all the same: {}", checked.stdout);
        // What it foretells is what happens.
        let daemon = run(&["-F", "-p", dir.path("pid").to_str().unwrap()], &conf, "");
        assert_eq!(daemon.code, Some(255), "{}", daemon.stderr);
    }
    // Where nothing is signed none is needed.
    std::fs::remove_file(dir.path("key")).unwrap();
    let text =
        std::fs::read_to_string(&conf).unwrap().replace("interface", "hash = \"none\"; auth = \"none\"; interface");
    assert_eq!(run(&["check-config"], &dir.write("conf", &text), "").code, Some(0));
}

#[test]
fn the_list_is_for_scripts_and_needs_no_configuration() {
    let dir = Dir::new();
    for line in [&["-l"][..], &["--list"], &["-F", "-l", "-d9"]] {
        let listed = run(line, &dir.path("none"), "");
        let version = env!("CARGO_PKG_VERSION");
        let expected = format!(
            "Available backends:\n    libvirt {version}\n    cpg {version}\nAvailable listeners:\n    multicast {version}\n    tcp {version}\n    vsock {version}\n    serial {version}\n"
        );
        assert_eq!((listed.code, listed.stdout, listed.stderr), (Some(0), expected, String::new()));
    }
}

#[test]
fn exit_codes() {
    let dir = Dir::new();
    let broken = dir.write("conf", "x");
    for (arguments, code) in [
        (&["-h"][..], 0),
        (&["-V"], 0),
        (&["check-config", "-h"], 0),
        (&["-Z"], 255),
        (&["--yes"], 255),
        (&["nonsense"], 255),
        (&["-F", "check-config"], 255),
        (&["-F", "-f", broken.to_str().unwrap()], 255),
        (&["-f", broken.to_str().unwrap()], 255),
        (&["-F", "-f", dir.path("none").to_str().unwrap()], 255),
    ] {
        let run = plain(arguments);
        assert_eq!(run.code, Some(code), "{arguments:?}: {}{}", run.stdout, run.stderr);
        let (said, silent) = if code == 0 { (run.stdout, run.stderr) } else { (run.stderr, run.stdout) };
        assert!(!said.is_empty() && silent.is_empty(), "{arguments:?}: {said}{silent}");
    }
}

#[test]
fn a_reader_that_goes_is_no_failure_and_a_full_disk_is_one() {
    let dir = Dir::new();
    dir.write("key", "x");
    let conf = conf(&dir, "key", "");
    for (script, code) in
        [("\"$0\" check-config -f \"$1\" >/dev/full", 1), ("\"$0\" -l >/dev/full", 1), ("\"$0\" -l >&-", 0)]
    {
        let run = feed(Command::new("sh").args(["-c", script, PROGRAM]).arg(&conf), "");
        assert_eq!(run.code, Some(code), "{script}: {}", run.stderr);
        assert!(!run.stderr.contains("panicked"), "{}", run.stderr);
    }
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let status = Command::new(PROGRAM).arg("check-config").arg("-f").arg(&conf).stdout(writer).status().unwrap();
    assert_eq!(status.code(), Some(0));
}
