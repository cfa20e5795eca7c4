//! `-c` at a real terminal: a pseudo-terminal with somebody who types.

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use nix::pty::openpty;
use nix::sys::termios::{LocalFlags, SetArg, tcgetattr, tcsetattr};

use crate::program::{Dir, PROGRAM, parse};

const LIMIT: Duration = Duration::from_secs(60);

/// The program with a terminal of its own.
struct Session {
    child: Child,
    keyboard: File,
    screen: Receiver<Vec<u8>>,
    seen: String,
}

impl Session {
    fn start(conf: &Path) -> Self {
        let pty = openpty(None, None).unwrap();
        let (master, slave) = (File::from(pty.master), File::from(pty.slave));
        // Or Ctrl-C throws away what is on its way to the screen, and sometimes what is said about it.
        let mut settings = tcgetattr(&slave).unwrap();
        settings.local_flags |= LocalFlags::NOFLSH;
        tcsetattr(&slave, SetArg::TCSANOW, &settings).unwrap();
        // setsid makes the terminal the controlling one: without that Ctrl-C would be a letter. The shell keeps the session after
        // the program's end: with the session's first process goes what nobody has read from the screen yet.
        let script = "trap : INT QUIT; \"$0\" -c -f \"$1\"; echo \"exit code $?.\"; read -r end";
        let mut command = Command::new("setsid");
        command.args(["--ctty", "--wait", "sh", "-c", script, PROGRAM]).arg(conf).env_remove("RUST_LOG");
        let end = || Stdio::from(slave.try_clone().unwrap());
        let child = command.stdin(end()).stdout(end()).stderr(end()).spawn().unwrap();
        // What is left open here would keep the screen from ending.
        drop(command);
        drop(slave);
        let (into, screen) = channel();
        let mut output = master.try_clone().unwrap();
        std::thread::spawn(move || {
            let mut some = [0; 4096];
            // A terminal that nobody has any more is an error, not an end.
            while let Ok(count @ 1..) = output.read(&mut some) {
                if into.send(some[..count].to_vec()).is_err() {
                    break;
                }
            }
        });
        Self { child, keyboard: master, screen, seen: String::new() }
    }

    /// Waits until this is on the screen, and returns what came before it.
    fn wait_for(&mut self, text: &str) -> String {
        let deadline = Instant::now() + LIMIT;
        loop {
            if let Some(at) = self.seen.find(text) {
                let before = self.seen.drain(..at + text.len()).collect::<String>();
                return before[..at].to_owned();
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let more = self.screen.recv_timeout(left).unwrap_or_else(|_| panic!("no {text:?}: {}", self.seen));
            self.seen.push_str(&String::from_utf8_lossy(&more));
        }
    }

    fn enter(&mut self, keys: &str) {
        self.keyboard.write_all(keys.as_bytes()).unwrap();
    }

    /// Waits for its end: the exit code, and what was still said.
    fn end(mut self) -> (Option<i32>, String) {
        let before = self.wait_for("exit code ");
        let code = self.wait_for(".").parse().ok();
        self.enter("\n");
        self.child.wait().unwrap();
        (code, before)
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn somebody_answers_every_question() {
    let dir = Dir::new();
    let (conf, key) = (dir.path("conf"), dir.path("fence.key"));
    let mut session = Session::start(&conf);
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
    assert_eq!((config.multicast.port, config.multicast.interface.as_deref()), (1230, Some("virbr0")));
    assert_eq!((config.multicast.group.to_string().as_str(), config.multicast.key_file), ("ff05::3:1", key.clone()));
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
            let mut session = Session::start(&conf);
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
