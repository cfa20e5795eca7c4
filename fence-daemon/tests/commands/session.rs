//! A pseudo-terminal with a program on it and somebody who types.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use nix::pty::{Winsize, openpty};
use nix::sys::termios::{LocalFlags, SetArg, tcgetattr, tcsetattr};

const LIMIT: Duration = Duration::from_secs(60);

/// What a terminal of this size looks like: 24 lines of 100 characters.
const SIZE: Winsize = Winsize { ws_row: 24, ws_col: 100, ws_xpixel: 0, ws_ypixel: 0 };

/// A program with a terminal of its own.
pub(crate) struct Session {
    child: Child,
    keyboard: File,
    screen: Receiver<Vec<u8>>,
    seen: String,
}

impl Session {
    /// Starts a program with these arguments. Its exit code is written to the screen in the end.
    pub(crate) fn start(program: &[&str], environment: &[(&str, &str)]) -> Self {
        let pty = openpty(Some(&SIZE), None).unwrap();
        let (master, slave) = (File::from(pty.master), File::from(pty.slave));
        // Or Ctrl-C throws away what is on its way to the screen, and sometimes what is said about
        // it.
        let mut settings = tcgetattr(&slave).unwrap();
        settings.local_flags |= LocalFlags::NOFLSH;
        tcsetattr(&slave, SetArg::TCSANOW, &settings).unwrap();
        // setsid makes the terminal the controlling one: without that Ctrl-C would be a letter. The
        // shell keeps the session after the program's end: with the session's first process goes
        // what nobody has read from the screen yet.
        let script = "trap : INT QUIT; \"$@\"; echo \"exit code $?.\"; read -r end";
        let mut command = Command::new("setsid");
        command.args(["--ctty", "--wait", "sh", "-c", script, "sh"]).args(program);
        for variable in ["RUST_LOG", "NO_COLOR", "LC_ALL", "LC_CTYPE"] {
            command.env_remove(variable);
        }
        command.env("TERM", "xterm").env("LANG", "C.UTF-8").envs(environment.iter().copied());
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
    pub(crate) fn wait_for(&mut self, text: &str) -> String {
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

    pub(crate) fn enter(&mut self, keys: &str) {
        self.keyboard.write_all(keys.as_bytes()).unwrap();
    }

    /// Whether the terminal takes lines and shows what is typed, as it did at first.
    pub(crate) fn is_as_it_was(&self) -> bool {
        let settings = tcgetattr(self.keyboard.as_fd()).unwrap();
        settings.local_flags.contains(LocalFlags::ICANON | LocalFlags::ECHO | LocalFlags::ISIG)
    }

    /// Waits for its end: the exit code, and what was still said.
    pub(crate) fn end(mut self) -> (Option<i32>, String) {
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
