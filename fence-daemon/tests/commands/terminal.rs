//! `-c` at a real terminal, with somebody who types.

use std::path::Path;

use crate::program::{Dir, PROGRAM, parse};
use crate::session::Session;

fn start(conf: &Path) -> Session {
    Session::start(&[PROGRAM, "-c", "-f", &conf.to_string_lossy()], &[])
}

#[test]
fn somebody_answers_every_question() {
    let dir = Dir::new();
    let (conf, key) = (dir.path("conf"), dir.path("fence.key"));
    let mut session = start(&conf);
    let key_text = format!("{}\n", key.display());
    for (question, answer) in [
        ("Start from scratch [y/N]? ", "y\n"),
        ("Module search path [none]: ", "\n"),
        ("Listener module [multicast]: ", "\n"),
        ("Multicast IP Address [225.0.0.12]: ", "ff05::3:1\n"),
        ("Multicast IP Port [1229]: ", "abc\n"),
        ("Not taken: \"abc\" is no port number", ""),
        // The terminal's own editing: a letter that is taken back.
        ("Multicast IP Port [1229]: ", "123x\x7f0\n"),
        ("Interface [none]: ", "virbr0\n"),
        ("Key File [/etc/cluster/fence_xvm.key]: ", &key_text),
        ("Backend module [libvirt]: ", "\n"),
        ("Libvirt URI [qemu:///system]: ", "\n"),
        ("=== End Configuration ===", ""),
        ("with the above [y/N]? ", "y\n"),
        ("4096 random bytes [y/N]? ", "y\n"),
    ] {
        session.wait_for(question);
        session.enter(answer);
    }
    let (code, said) = session.end();
    assert_eq!(code, Some(0), "{said}");
    let (config, _) = parse(&std::fs::read_to_string(&conf).unwrap());
    assert_eq!(
        (config.multicast().unwrap().port, config.multicast().unwrap().interface.as_deref()),
        (1230, Some("virbr0"))
    );
    assert_eq!(
        (config.multicast().unwrap().group.to_string().as_str(), config.multicast().unwrap().key_file.clone()),
        ("ff05::3:1", key.clone())
    );
    assert_eq!(std::fs::read(&key).unwrap().len(), 4096);
}

#[test]
fn ctrl_c_and_ctrl_d_leave_everything_as_it_was() {
    for (keys, why) in
        [("\x03", "interrupted (SIGINT): nothing was written"), ("\x04", "the input ended"), ("\x1c", "SIGQUIT")]
    {
        let dir = Dir::new();
        let old = "fence_virtd { listener = \"multicast\"; backend = \"libvirt\"; }\n";
        let conf = dir.write("conf", old);
        for questions in [1, 4, 9] {
            let mut session = start(&conf);
            for _ in 1..questions {
                session.wait_for("]: ");
                session.enter("\n");
            }
            session.wait_for(if questions == 9 { "]? " } else { "]: " });
            session.enter(keys);
            let (code, said) = session.end();
            assert_eq!(code, Some(1), "{said}");
            assert!(said.contains(why) && said.contains("nothing was written"), "{why}: {said}");
            assert_eq!(dir.contents().into_iter().collect::<Vec<_>>(), [("conf".to_owned(), old.as_bytes().to_vec())]);
        }
    }
}
