//! `-c` with answers from a pipe or from options: what is asked, what is written, what stays.

use std::path::Path;

use fence_config::Groups;

use crate::program::{Dir, Run, mode, parse, run};

/// What Debian's package installs, in shape and content.
const DEBIAN: &str = "fence_virtd {\n\tlistener = \"multicast\";\n\tbackend = \"libvirt\";\n}\n\nlisteners {\n\tmulticast {\n\t\t\
    key_file = \"/etc/fence_virt.key\";\n\t\taddress = \"225.0.0.12\";\n\t\t# Needed on Fedora systems\n\t\t\
    interface = \"virbr0\";\n\t}\n}\n\nbackends {\n\tlibvirt { \n\t\turi = \"qemu:///system\";\n\t}\n}\n\n";

/// Answers to all questions about a file that is there; the key file is the one that is given.
fn answers(key: &Path) -> String {
    format!(
        "/usr/lib64/fence-virt\nmulticast\n239.1.2.3\n1230\nvirbr1\n{}\nlibvirt\ntest:///default\ny\n",
        key.display()
    )
}

pub(crate) fn done(run: &Run) {
    assert_eq!((run.code, run.stderr.as_str()), (Some(0), ""), "{}", run.stdout);
}

pub(crate) fn file(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap()
}

#[test]
fn answers_that_are_piped_in_make_a_file() {
    let dir = Dir::new();
    let (conf, key) = (dir.path("conf"), dir.write("key", "x"));
    done(&run(&["-c"], &conf, &format!("y\n{}", answers(&key))));
    assert_eq!(mode(&conf), 0o600);
    let (config, warnings) = parse(&file(&conf));
    assert!(warnings.is_empty(), "{}", warnings.render(false));
    let multicast = config.multicast().unwrap();
    assert_eq!((multicast.group.to_string().as_str(), multicast.port), ("239.1.2.3", 1230));
    assert_eq!((multicast.interface.as_deref(), &multicast.key_file), (Some("virbr1"), &key));
    assert_eq!(config.uris, ["test:///default"]);
    assert!(file(&conf).contains("\tmodule_path = \"/usr/lib64/fence-virt\";\n"));
    assert!(file(&conf).contains("\t\tfamily = \"ipv4\";\n"), "stock servers infer no family");
    assert_eq!(dir.contents().into_keys().collect::<Vec<_>>(), ["conf", "key"], "no backup of nothing");
}

#[test]
fn empty_answers_keep_what_the_file_says() {
    let dir = Dir::new();
    let conf = dir.write("conf", DEBIAN);
    let run = run(&["-c"], &conf, "\n\n\n\n\n\n\n\ny\n\n");
    done(&run);
    let (old, new) = (parse(DEBIAN).0, parse(&file(&conf)).0);
    assert_eq!(old, new);
    for default in [
        "[multicast]: ",
        "[225.0.0.12]: ",
        "[1229]: ",
        "[virbr0]: ",
        "[/etc/fence_virt.key]: ",
        "[libvirt]: ",
        "[qemu:///system]: ",
    ] {
        assert!(run.stdout.contains(default), "{default}: {}", run.stdout);
    }
    // The file that is shown is the one that is written, and the old one is kept with its comments.
    let (_, shown) = run.stdout.split_once("=== Begin Configuration ===\n").unwrap();
    assert_eq!(shown.split_once("=== End Configuration ===\n").unwrap().0, file(&conf));
    assert_eq!((file(&dir.path("conf.bak")).as_str(), mode(&dir.path("conf.bak"))), (DEBIAN, 0o600));
    assert!(run.stdout.contains(&format!("Replace {} with the above [y/N]? ", conf.display())));
}

#[test]
fn questions_come_in_the_order_of_stock_servers() {
    let dir = Dir::new();
    let conf = dir.write("conf", DEBIAN);
    let said = run(&["-c"], &conf, "\n\n\n\n\n\n\n\nn\n").stdout;
    let labels = [
        "Module search path [",
        "Listener module [",
        "Address [",
        "Multicast IP Port [",
        "Interface [",
        "Key File [",
        "Backend module [",
        "URI [",
        "Replace ",
    ];
    let places: Vec<_> =
        labels.iter().map(|label| said.find(label).unwrap_or_else(|| panic!("{label}: {said}"))).collect();
    assert!(places.is_sorted(), "{places:?}: {said}");
    assert_eq!(said.matches("]: ").count() + said.matches("]? ").count(), labels.len(), "no further question: {said}");
}

#[test]
fn a_no_leaves_the_file_as_it_is() {
    let dir = Dir::new();
    let conf = dir.write("conf", DEBIAN);
    for answer in ["n\n", "\n", "no thanks\n"] {
        let run = run(&["-c"], &conf, &format!("\n\n239.9.9.9\n\n\n\n\n\n{answer}"));
        assert_eq!((run.code, run.stderr.as_str()), (Some(1), "fence-daemon: nothing was written\n"), "{}", run.stdout);
        assert_eq!(file(&conf), DEBIAN);
    }
    let none = dir.path("none");
    assert_eq!(run(&["-c"], &none, "n\n").code, Some(1));
    assert_eq!(dir.contents().into_keys().collect::<Vec<_>>(), ["conf"]);
}

#[test]
fn settings_without_a_question_stay() {
    let dir = Dir::new();
    let old = "FENCE_VIRTD { listener = \"multicast\"; backend = \"libvirt\"; debug = \"3\"; }\n\
        listeners { tcp { address = \"1.2.3.4\"; } Multicast { HASH = \"sha1\"; auth = \"sha512\"; zork = \"1\"; attach = \"off\"; interface = \"virbr0\"; } }\n\
        backends { cpg { name_mode = \"uuid\"; } libvirt { uri = \"qemu:///system\"; uri1 = \"lxc:///\"; } }\n\
        groups { group = \"b\" { ip = \"192.168.122.12\"; uuid = \"n1\"; uuid = \"n2\"; } }\n\
        extra { a = \"b\"; }\n";
    let conf = dir.write("conf", old);
    let key = dir.write("key", "x");
    done(&run(&["-c"], &conf, &format!("\n\nff05::3:1\n\nnone\n{}\n\nqemu:///session\ny\n", key.display())));
    let new = file(&conf);
    let (config, _) = parse(&new);
    assert_eq!(
        (config.debug, config.multicast().unwrap().hash.name(), config.multicast().unwrap().auth.name()),
        (3, "sha1", "sha512")
    );
    assert_eq!(
        (config.multicast().unwrap().attach.name(), config.multicast().unwrap().interface.as_deref()),
        ("off", None)
    );
    assert_eq!(config.multicast().unwrap().group.to_string(), "ff05::3:1");
    assert_eq!(config.uris, ["qemu:///session", "lxc:///"]);
    assert!(matches!(config.groups, Groups::Only(groups) if groups[0].uuids == ["n1", "n2"]));
    for kept in
        ["tcp {", "address = \"1.2.3.4\";", "zork = \"1\";", "name_mode = \"uuid\";", "extra {", "family = \"ipv6\";"]
    {
        assert!(new.contains(kept), "{kept}: {new}");
    }
    assert!(!new.contains("interface"), "no interface is no key: {new}");
}

/// The URIs are those of the chosen backend, and what has no question stays.
#[test]
fn the_cluster_backend_is_kept_with_its_section() {
    let dir = Dir::new();
    let old = "fence_virtd { listener = \"multicast\"; backend = \"cpg\"; }\n\
        backends { libvirt { uri = \"lxc:///\"; } cpg { uri = \"qemu:///system\"; uri1 = \"qemu:///session\"; \
        name_mode = \"uuid\"; unfenced_hosts = \"fail\"; } }\n";
    let (conf, key) = (dir.write("conf", old), dir.write("key", "x"));
    let arguments = ["-c", "--yes", "--key-file", key.to_str().unwrap()];
    done(&run(&arguments, &conf, ""));
    let new = file(&conf);
    let (config, _) = parse(&new);
    assert_eq!((config.backend.name(), config.uris.len()), ("cpg", 2), "{new}");
    for kept in ["name_mode = \"uuid\";", "unfenced_hosts = \"fail\";", "uri = \"lxc:///\";"] {
        assert!(new.contains(kept), "{kept}: {new}");
    }
    let with_uri = [&arguments[..], &["--uri", "test:///default"]].concat();
    done(&run(&with_uri, &conf, ""));
    let (config, _) = parse(&file(&conf));
    assert_eq!((config.backend.name(), config.uris), ("cpg", vec!["test:///default".to_owned()]));
}

#[test]
fn a_bad_answer_is_asked_again_with_the_reason() {
    let dir = Dir::new();
    let (conf, key) = (dir.path("conf"), dir.write("key", "x"));
    let answers = format!(
        "y\n\nvmchannel\nnonsense\nmulticast\n192.168.122.1\nabc\n225.0.0.12\n0\n70000\nabc\n1229\na/b\nvirbr0\nkey\na\"b\n{}\nnull\nlibvirt\ny\nqemu:///system\ny\n",
        key.display()
    );
    let run = run(&["-c"], &conf, &answers);
    done(&run);
    for reason in [
        "the listener \"vmchannel\" is not supported yet",
        "there is no listener \"nonsense\"",
        "192.168.122.1 is not a multicast address",
        "\"abc\" is no IP address",
        "\"0\" is no port number",
        "\"70000\" is no port number",
        "\"a/b\" cannot be the name of a network interface",
        "key is not a whole path",
        "the file has no way to write a double quote",
        "the backend \"null\" is not supported yet",
        "\"y\" is no URI",
    ] {
        assert!(run.stdout.contains(&format!("Not taken: {reason}")), "{reason}: {}", run.stdout);
    }
    assert_eq!(parse(&file(&conf)).0.multicast().unwrap().key_file, key);
    // Nonsense without an end comes to one.
    let endless = run_endless(&dir.path("other"));
    assert_eq!(endless.code, Some(1));
    assert!(endless.stderr.contains("nothing was written"), "{}", endless.stderr);
}

fn run_endless(conf: &Path) -> Run {
    run(&["-c"], conf, &format!("y\n\n{}", "nonsense\n".repeat(1000)))
}

#[test]
fn options_answer_without_questions() {
    let dir = Dir::new();
    let (conf, key) = (dir.path("conf"), dir.path("etc/fence.key"));
    let key_text = key.display().to_string();
    let arguments = [
        "-c",
        "--yes",
        "--create-key",
        "--interface",
        "virbr0",
        "--port",
        "1230",
        "--family",
        "ipv6",
        "--key-file",
        &key_text,
        "--uri",
        "qemu:///system",
        "--uri",
        "lxc:///",
        "--hash",
        "sha512",
        "--auth",
        "sha1",
    ];
    let first = run(&arguments, &conf, "");
    done(&first);
    assert!(!first.stdout.contains(" [") && !first.stdout.contains("]: "), "{}", first.stdout);
    let (config, _) = parse(&file(&conf));
    assert_eq!(config.multicast().unwrap().group.to_string(), "ff05::3:1");
    assert_eq!(
        (
            config.multicast().unwrap().hash.name(),
            config.multicast().unwrap().auth.name(),
            config.multicast().unwrap().port
        ),
        ("sha512", "sha1", 1230)
    );
    assert_eq!(config.uris, ["qemu:///system", "lxc:///"]);
    assert_eq!((std::fs::read(&key).unwrap().len(), mode(&key)), (4096, 0o600));

    // Again: nothing to do, and the key is not recreated.
    let made = std::fs::read(&key).unwrap();
    let again = run(&arguments, &conf, "");
    done(&again);
    assert!(again.stdout.contains("has this content already"), "{}", again.stdout);
    assert!(!dir.path("conf.bak").exists() && std::fs::read(&key).unwrap() == made);

    // Over an old file only what is given changes; the family decides which address can stay.
    done(&run(&["-c", "--yes", "--family", "ipv4", "--uri", "test:///default"], &conf, ""));
    let (config, _) = parse(&file(&conf));
    assert_eq!(
        (config.multicast().unwrap().group.to_string().as_str(), config.multicast().unwrap().port),
        ("225.0.0.12", 1230)
    );
    assert_eq!(
        (config.uris.as_slice(), config.multicast().unwrap().hash.name()),
        (&["test:///default".to_owned()][..], "sha512")
    );
    // Without --yes what is given is not asked, but the file is shown, and nothing happens without
    // a yes.
    let asked = run(&["-c", "--interface", "none", "--address", "239.0.0.1"], &conf, "\n\n\n\n\n\nn\n");
    assert_eq!(asked.code, Some(1), "{}", asked.stdout);
    assert!(
        !asked.stdout.contains("Interface [") && asked.stdout.contains("address = \"239.0.0.1\""),
        "{}",
        asked.stdout
    );
    assert!(asked.stdout.contains("Replace "), "{}", asked.stdout);
}

#[test]
fn bad_options_are_usage_errors() {
    let dir = Dir::new();
    let conf = dir.path("conf");
    for (option, value, why) in [
        ("--port", "70000", "no port number"),
        ("--address", "10.0.0.1", "not a multicast address"),
        ("--family", "ipx", "not an address family"),
        ("--interface", "a b", "cannot be the name of a network interface"),
        ("--hash", "md5", "unknown value"),
        ("--auth", "md5", "unknown value"),
        ("--uri", "y", "no URI"),
        ("--key-file", "/a\"b", "double quote"),
    ] {
        for more in [&["--yes"][..], &[]] {
            let run = run(&[&["-c", option, value], more].concat(), &conf, "y\n");
            assert_eq!(run.code, Some(255), "{option}: {}", run.stdout);
            assert!(
                run.stderr.starts_with(&format!("fence-daemon: {option}: ")) && run.stderr.contains(why),
                "{}",
                run.stderr
            );
        }
    }
    let both = run(&["-c", "--yes", "--family", "ipv6", "--address", "225.0.0.12"], &conf, "");
    assert_eq!(both.code, Some(255), "{}", both.stdout);
    assert!(dir.contents().is_empty());
}

#[test]
fn a_file_that_the_daemon_would_refuse_is_not_written() {
    let dir = Dir::new();
    // Groups are not asked for; who lost them over a typing error would permit everything.
    for (old, place) in [
        (format!("{DEBIAN}groups {{ group {{ ip = \"1.2.3\"; uuid = \"x\"; }} }}\n"), "\"1.2.3\""),
        (format!("{DEBIAN}groups {{ }}\n"), "has no group"),
        (DEBIAN.replace("address", "hash = \"md5\"; address"), "md5"),
    ] {
        let conf = dir.write("conf", &old);
        for (arguments, answers) in [(&["-c"][..], "\n\n\n\n\n\n\n\ny\n"), (&["-c", "--yes"], "")] {
            let run = run(arguments, &conf, answers);
            assert_eq!(run.code, Some(255), "{}", run.stdout);
            assert!(run.stderr.contains("nothing was written") && run.stderr.contains(place), "{}", run.stderr);
        }
        assert_eq!(file(&conf), old);
    }
    // What is asked can be mended by the answer, but not silently.
    let conf = dir.write("conf", &DEBIAN.replace("address", "family = \"ipv6\"; address"));
    let silent = run(&["-c", "--yes"], &conf, "");
    assert_eq!(silent.code, Some(255), "{}", silent.stdout);
    assert!(silent.stderr.contains("not an address of the configured family"), "{}", silent.stderr);
    let conf = dir.write("conf", &DEBIAN.replace("\"multicast\"", "\"multicats\"").replace("225.0.0.12", "10.0.0.1"));
    let silent = run(&["-c", "--yes"], &conf, "");
    assert_eq!(silent.code, Some(255), "{}", silent.stdout);
    assert!(silent.stderr.contains("multicats"), "{}", silent.stderr);
    let mended = run(&["-c"], &conf, "\n\n\n\n\n\n\n\ny\n\n");
    done(&mended);
    assert!(mended.stdout.contains("value is invalid"), "{}", mended.stdout);
    parse(&file(&conf));
    assert_eq!(dir.contents().into_keys().collect::<Vec<_>>(), ["conf", "conf.bak"]);
}

#[test]
fn a_file_with_mistakes_is_replaced_only_on_confirmation() {
    let dir = Dir::new();
    let broken = "fence_virtd { listener = multicast; }\n";
    let (conf, key) = (dir.write("conf", broken), dir.write("key", "x"));
    let silent = run(&["-c", "--yes"], &conf, "");
    assert_eq!(silent.code, Some(255), "{}", silent.stdout);
    assert!(silent.stderr.contains("conf:1:26") && silent.stderr.contains("nothing was written"), "{}", silent.stderr);
    let declined = run(&["-c"], &conf, "n\n");
    assert_eq!(declined.code, Some(1));
    assert!(declined.stdout.contains("conf:1:26"), "{}", declined.stdout);
    assert_eq!(file(&conf), broken);
    done(&run(&["-c"], &conf, &format!("y\n{}", answers(&key))));
    parse(&file(&conf));
    assert_eq!(file(&dir.path("conf.bak")), broken);
}

#[test]
fn a_backup_never_takes_the_place_of_another_one() {
    let dir = Dir::new();
    let (conf, key) = (dir.write("conf", DEBIAN), dir.write("key", "x"));
    for port in ["1", "2", "3"] {
        done(&run(&["-c", "--yes", "--port", port, "--key-file", key.to_str().unwrap()], &conf, ""));
    }
    assert_eq!(file(&dir.path("conf.bak")), DEBIAN, "the one with the comments");
    for (name, port) in [("conf.bak.1", 1), ("conf.bak.2", 2), ("conf", 3)] {
        assert_eq!(parse(&file(&dir.path(name))).0.multicast().unwrap().port, port, "{name}");
    }
}
