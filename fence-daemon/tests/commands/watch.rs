//! `status` and `top` at a real terminal. The daemon is one that says what the documentation's
//! example says.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::program::{Dir, PROGRAM, feed};
use crate::session::Session;

const EXAMPLE: &str = include_str!("../../../docs/reference/status.example.json");
/// Makes the test that is run again panic in its terminal.
const PANIC: &str = "FENCE_TEST_PANIC";

/// What answers on the control socket.
struct Daemon {
    stop: Arc<AtomicBool>,
    socket: PathBuf,
    task: Option<JoinHandle<()>>,
}

impl Daemon {
    /// One with this process number, whose counter of wrong digests grows with each answer.
    fn start(dir: &Dir, pid: u32) -> Self {
        let socket = dir.path("control.sock");
        let _ = std::fs::remove_file(&socket);
        let listener = UnixListener::bind(&socket).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let task = std::thread::spawn(move || {
            let mut report: serde_json::Value = serde_json::from_str(EXAMPLE).unwrap();
            report["daemon"]["pid"] = pid.into();
            for second in 0_u64.. {
                let (mut stream, _) = listener.accept().unwrap();
                if stopped.load(Ordering::Relaxed) {
                    return;
                }
                report["daemon"]["uptime_ms"] = (446_400_000 + 1000 * second).into();
                report["kernel"]["counters"]["drop_digest"] = (90_214 + 777 * second).into();
                let mut question = String::new();
                BufReader::new(&stream).read_line(&mut question).unwrap();
                assert_eq!(question, "status\n");
                let _ = stream.write_all(format!("{report}\n").as_bytes());
            }
        });
        Self { stop, socket, task: Some(task) }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = UnixStream::connect(&self.socket);
        let ended = self.task.take().map(JoinHandle::join);
        assert!(std::thread::panicking() || matches!(ended, Some(Ok(()))));
        let _ = std::fs::remove_file(&self.socket);
    }
}

fn config(dir: &Dir) -> PathBuf {
    let state = dir.path("").to_string_lossy().trim_end_matches('/').to_owned();
    let text =
        format!("fence_virtd {{ listener = \"multicast\"; backend = \"libvirt\"; state_directory = \"{state}\"; }}\n");
    dir.write("conf", &text)
}

fn start(conf: &Path, command: &str, environment: &[(&str, &str)]) -> Session {
    Session::start(&[PROGRAM, "-f", &conf.to_string_lossy(), command], environment)
}

#[test]
fn the_page_fits_the_terminal_and_has_colours_if_they_are_wanted() {
    let dir = Dir::new();
    let (conf, _daemon) = (config(&dir), Daemon::start(&dir, 1847));
    for (environment, colours, unicode) in
        [(&[][..], true, true), (&[("NO_COLOR", "1")], false, true), (&[("TERM", "dumb"), ("LANG", "C")], false, false)]
    {
        let (code, page) = start(&conf, "status", environment).end();
        assert_eq!(code, Some(1), "the example is of a degraded daemon: {page}");
        assert_eq!(page.contains("\x1b[1;31mdegraded\x1b[0m"), colours, "{environment:?}: {page}");
        assert_eq!(page.contains('\x1b'), colours);
        assert_eq!((page.contains('█'), page.contains('…')), (unicode, unicode), "{page}");
        if !colours {
            let widest = page.lines().map(|line| line.trim_end().chars().count()).max();
            assert!(widest <= Some(100) && widest > Some(90), "{widest:?}: {page}");
        }
    }
    // In a pipe nothing is cut.
    let page = feed(Command::new(PROGRAM).arg("status").arg("-f").arg(&conf), "");
    assert_eq!(page.code, Some(1));
    assert!(page.stdout.lines().any(|line| line.len() > 150) && !page.stdout.contains('\x1b'), "{}", page.stdout);
    let json = feed(Command::new(PROGRAM).args(["status", "--json"]).arg("-f").arg(&conf), "");
    let json: serde_json::Value = serde_json::from_str(&json.stdout).unwrap();
    assert_eq!(json["daemon"]["pid"], 1847);
}

#[test]
fn top_draws_follows_and_leaves_the_terminal_as_it_was() {
    for (quit, code) in [("q", 0), ("\x1b", 0), ("\x03", 0)] {
        let dir = Dir::new();
        let (conf, daemon) = (config(&dir), Daemon::start(&dir, 1847));
        let mut session = start(&conf, "top", &[]);
        let before = session.wait_for("degraded");
        assert!(before.contains("\x1b[?1049h"), "not on a screen of its own: {before:?}");
        session.wait_for("1847");
        assert!(!session.is_as_it_was(), "what is typed would be shown");
        // A second later there is a rate.
        session.wait_for("777");
        // The daemon goes, and another one comes.
        drop(daemon);
        session.wait_for("no answer");
        let _daemon = Daemon::start(&dir, 2222);
        session.wait_for("2222");
        session.enter(quit);
        let after = session.wait_for("\x1b[?1049l");
        assert!(!after.contains("panicked"));
        session.wait_for("exit code ");
        assert!(session.is_as_it_was(), "{quit:?}");
        assert_eq!(session.wait_for("."), code.to_string());
    }
}

/// The one child of the session's shell that is the program.
fn pid_of(conf: &Path) -> String {
    let deadline = Instant::now() + Duration::from_secs(60);
    while Instant::now() < deadline {
        for process in std::fs::read_dir("/proc").unwrap().flatten() {
            let line = std::fs::read(process.path().join("cmdline")).unwrap_or_default();
            let words: Vec<_> = line.split(|byte| *byte == 0).collect();
            let conf = conf.as_os_str().as_encoded_bytes();
            if words.first().is_some_and(|word| *word == PROGRAM.as_bytes()) && words.contains(&conf) {
                return process.file_name().into_string().unwrap();
            }
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    panic!("it does not run");
}

#[test]
fn top_restores_the_terminal_at_a_signal() {
    for signal in ["TERM", "HUP"] {
        let dir = Dir::new();
        let (conf, _daemon) = (config(&dir), Daemon::start(&dir, 1847));
        let mut session = start(&conf, "top", &[]);
        session.wait_for("degraded");
        let killed = Command::new("kill").args(["-s", signal, &pid_of(&conf)]).status().unwrap();
        assert!(killed.success());
        session.wait_for("\x1b[?1049l");
        session.wait_for("exit code ");
        assert!(session.is_as_it_was(), "{signal}");
        assert_eq!(session.wait_for("."), "0");
    }
}

/// This test runs itself again at a terminal, and panics there.
#[test]
fn a_panic_leaves_the_terminal_as_it_was() {
    if std::env::var_os(PANIC).is_some() {
        let _ = fence_client::top::with_terminal(|_| panic!("on purpose"));
        return;
    }
    let this = std::env::current_exe().unwrap();
    let name = "watch::a_panic_leaves_the_terminal_as_it_was";
    let mut session = Session::start(
        &[&this.to_string_lossy(), "--exact", name, "--nocapture"],
        &[(PANIC, "1"), ("RUST_BACKTRACE", "0")],
    );
    session.wait_for("\x1b[?1049h");
    session.wait_for("\x1b[?1049l");
    // Said where it can be read, not on the screen that is gone.
    session.wait_for("on purpose");
    session.wait_for("exit code ");
    assert!(session.is_as_it_was());
}

#[test]
fn top_without_a_terminal_says_so() {
    let dir = Dir::new();
    let run = feed(Command::new(PROGRAM).arg("top").arg("-f").arg(config(&dir)), "");
    assert_eq!((run.code, run.stdout.as_str()), (Some(255), ""));
    assert!(run.stderr.contains("top wants a terminal"), "{}", run.stderr);
}

#[test]
fn a_missing_daemon_is_reported_with_a_remedy() {
    let dir = Dir::new();
    let run = feed(Command::new(PROGRAM).arg("status").arg("-f").arg(config(&dir)), "");
    assert_eq!((run.code, run.stdout.as_str()), (Some(3), ""));
    for words in ["no daemon answers", "systemctl status", "control.sock"] {
        assert!(run.stderr.contains(words), "{}", run.stderr);
    }
    // Wrong usage is what it is with every command.
    assert_eq!(feed(Command::new(PROGRAM).args(["status", "-F"]), "").code, Some(255));
}
