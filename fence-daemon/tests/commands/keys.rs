//! `keygen`, and the key that `-c` offers to make.

use std::process::Command;

use crate::program::{Dir, PROGRAM, Run, feed, mode, run};

fn conf(dir: &Dir, key: &str) -> std::path::PathBuf {
    let text = format!(
        "fence_virtd {{ listener = \"multicast\"; backend = \"libvirt\"; }}\nlisteners {{ multicast {{ key_file = \"{}\"; }} }}\n",
        dir.path(key).display()
    );
    dir.write("conf", &text)
}

fn keygen(arguments: &[&str]) -> Run {
    feed(Command::new(PROGRAM).arg("keygen").args(arguments), "")
}

#[test]
fn the_configured_key_is_made() {
    let dir = Dir::new();
    let made = run(&["keygen"], &conf(&dir, "fence.key"), "");
    assert_eq!((made.code, made.stderr.as_str()), (Some(0), ""));
    let key = dir.path("fence.key");
    assert_eq!((std::fs::read(&key).unwrap().len(), mode(&key)), (4096, 0o600));
    assert!(
        made.stdout.contains(&format!("scp -p {} root@GUEST:/etc/cluster/fence_xvm.key", key.display())),
        "{}",
        made.stdout
    );
    assert_eq!(dir.contents().into_keys().collect::<Vec<_>>(), ["conf", "fence.key"]);
}

#[test]
fn a_key_that_is_there_goes_only_by_force() {
    let dir = Dir::new();
    let key = dir.write("key", "in use");
    let path = key.to_str().unwrap();
    let refused = keygen(&[path]);
    assert_eq!((refused.code, std::fs::read(&key).unwrap().as_slice()), (Some(1), &b"in use"[..]));
    assert!(refused.stderr.contains("--force"), "{}", refused.stderr);
    assert_eq!(keygen(&[path, "--force"]).code, Some(0));
    assert_eq!((std::fs::read(&key).unwrap().len(), mode(&key), dir.contents().len()), (4096, 0o600, 1));
}

#[test]
fn a_missing_directory_is_reported_or_made() {
    let dir = Dir::new();
    let key = dir.path("etc/cluster/fence_xvm.key");
    let refused = keygen(&[key.to_str().unwrap()]);
    assert_eq!(refused.code, Some(1));
    assert!(refused.stderr.contains("--parents") && dir.contents().is_empty(), "{}", refused.stderr);
    assert_eq!(keygen(&[key.to_str().unwrap(), "--parents"]).code, Some(0));
    assert_eq!(std::fs::read(&key).unwrap().len(), 4096);
}

#[test]
fn without_a_configuration_that_names_it_no_key_is_made() {
    let dir = Dir::new();
    for file in [dir.write("broken", "fence_virtd { listener = multicast; }"), dir.path("none")] {
        let refused = run(&["keygen"], &file, "");
        assert_eq!(refused.code, Some(255), "{}", refused.stdout);
        assert!(refused.stderr.contains("no key was created"), "{}", refused.stderr);
    }
    assert_eq!(dir.contents().len(), 1);
}

#[test]
fn configuring_offers_the_key_that_is_missing() {
    const ANSWERS: &str = "\n\n\n\n\n\n\n\ny\n";
    let dir = Dir::new();
    let (conf, key) = (conf(&dir, "new/fence.key"), dir.path("new/fence.key"));
    for answer in ["", "n\n"] {
        let no = run(&["-c"], &conf, &format!("{ANSWERS}{answer}"));
        assert_eq!((no.code, key.exists()), (Some(0), false), "{}{}", no.stdout, no.stderr);
        assert!(no.stdout.contains("does not start without"), "{}", no.stdout);
    }
    let yes = run(&["-c"], &conf, &format!("{ANSWERS}y\n"));
    assert_eq!((yes.code, std::fs::read(&key).unwrap().len(), mode(&key)), (Some(0), 4096, 0o600), "{}", yes.stderr);
    // One that is there is not asked about, and an option does not change it.
    let made = std::fs::read(&key).unwrap();
    let there = run(&["-c", "--create-key"], &conf, ANSWERS);
    assert_eq!(there.code, Some(0));
    assert!(!there.stdout.contains("does not exist"), "{}", there.stdout);
    assert_eq!(std::fs::read(&key).unwrap(), made);
}

#[test]
fn a_key_that_cannot_be_made_is_an_error_after_the_configuration() {
    let dir = Dir::new();
    dir.write("file", "");
    let conf = conf(&dir, "file/fence.key");
    let refused = run(&["-c", "--yes", "--create-key", "--port", "7"], &conf, "");
    assert_eq!(refused.code, Some(1), "{}", refused.stderr);
    assert!(refused.stderr.contains("the configuration is written, but its key is not: "), "{}", refused.stderr);
    assert!(std::fs::read_to_string(&conf).unwrap().contains("port = \"7\";"));
}
