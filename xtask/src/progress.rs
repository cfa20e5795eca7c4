//! The output of a working task: lines about its progress, with times, and its commands' output.
//!
//! All of it goes to standard error, in order with cargo's output. Standard output is for results.

use std::io::{self, BufRead as _, BufReader};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};

/// Prints one line about the task's progress or findings.
pub(crate) fn say(line: impl AsRef<str>) {
    eprintln!("==> {}", line.as_ref());
}

/// The destination of a command's standard error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Errors {
    /// Followed line by line, in order with standard output.
    Merged,
    /// The same as ours.
    Inherited,
}

/// Runs a command to its end and passes every line of its output to `each`, without the newline.
///
/// # Errors
/// The command cannot be started.
pub(crate) fn follow(mut command: Command, errors: Errors, mut each: impl FnMut(&[u8])) -> anyhow::Result<ExitStatus> {
    let typed = line(&command);
    let (reader, writer) = io::pipe().context("no pipe for a command's output")?;
    if errors == Errors::Merged {
        command.stderr(writer.try_clone().context("no pipe for a command's output")?);
    }
    let mut child =
        command.stdin(Stdio::null()).stdout(writer).spawn().with_context(|| format!("cannot start {typed}"))?;
    // The command holds a writing end of the pipe; only the child may hold one.
    drop(command);

    let (sender, lines) = mpsc::channel();
    thread::spawn(move || {
        for line in BufReader::new(reader).split(b'\n').map_while(Result::ok) {
            if sender.send(line).is_err() {
                break;
            }
        }
    });
    // A process that the command leaves behind may keep the pipe open for ever. So the command's
    // exit counts, not the end of the pipe.
    loop {
        let status = child.try_wait().with_context(|| format!("cannot wait for {typed}"))?;
        let pause = Instant::now() + Duration::from_secs(1);
        while Instant::now() < pause {
            match lines.recv_timeout(Duration::from_millis(100)) {
                Ok(line) => each(&line),
                Err(RecvTimeoutError::Timeout) => break,
                Err(RecvTimeoutError::Disconnected) => {
                    return child.wait().with_context(|| format!("cannot wait for {typed}"));
                }
            }
        }
        if let Some(status) = status {
            return Ok(status);
        }
    }
}

/// Runs a command whose output is shown (cargo shows its own progress).
///
/// # Errors
/// The command cannot be started or fails.
pub(crate) fn shown(title: &str, command: Command) -> anyhow::Result<()> {
    Running::start(title, command)?.finish()
}

/// A command that was started, and whose output is shown.
#[derive(Debug)]
pub(crate) struct Running {
    title: String,
    typed: String,
    started: Instant,
    child: Child,
}

impl Running {
    /// Starts it.
    ///
    /// # Errors
    /// The command cannot be started.
    pub(crate) fn start(title: &str, mut command: Command) -> anyhow::Result<Self> {
        let (typed, started) = (line(&command), Instant::now());
        say(title);
        let child = command.stdin(Stdio::null()).spawn().with_context(|| format!("cannot start {typed}"))?;
        Ok(Self { title: title.to_owned(), typed, started, child })
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// The command fails.
    pub(crate) fn finish(mut self) -> anyhow::Result<()> {
        let status = self.child.wait().with_context(|| format!("cannot wait for {}", self.typed))?;
        conclude(&self.title, &self.typed, status, self.started)
    }
}

/// The command as an administrator would type it, without its environment.
pub(crate) fn line(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

fn conclude(title: &str, command: &str, status: ExitStatus, started: Instant) -> anyhow::Result<()> {
    let seconds = started.elapsed().as_secs_f64();
    if !status.success() {
        say(format!("{title}: FAILED after {seconds:.1} s"));
        bail!("`{command}` failed ({status})");
    }
    say(format!("{title}: done in {seconds:.1} s"));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn a_failing_command_is_an_error_that_names_it() {
        let error = shown("trying", shell("exit 3")).unwrap_err().to_string();
        assert!(error.contains("exit 3") && error.contains("exit status: 3"), "{error}");
    }

    #[test]
    fn every_line_of_a_long_output_arrives() {
        let mut lines = 0;
        let status = follow(shell("seq 100000; seq 10 >&2"), Errors::Merged, |_| lines += 1).unwrap();
        assert!(status.success());
        assert_eq!(lines, 100_010);
    }

    #[test]
    fn a_command_that_leaves_a_child_running_does_not_block() {
        let started = Instant::now();
        let script = "(for i in $(seq 200); do sleep 0.1; echo still; done) & echo left";
        follow(shell(script), Errors::Merged, |_| {}).unwrap();
        assert!(started.elapsed() < Duration::from_secs(10));
    }

    #[test]
    fn a_missing_program_is_an_error_that_names_it() {
        let error = format!("{:#}", shown("trying", Command::new("no-such-program-here")).unwrap_err());
        assert!(error.contains("no-such-program-here"), "{error}");
    }
}
