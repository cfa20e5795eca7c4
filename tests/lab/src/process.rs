//! Processes of a lab. Dropping the value that stands for a process ends it, by its own handle and
//! never by name.
//!
//! They need no death signal. They live in the lab's PID namespace, which the kernel kills with its
//! first process. That one ends when the lab's owner ends, even by SIGKILL ([`crate::lab`]).

use std::io::{BufRead, BufReader, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::board::Board;
use crate::lab::Space;

/// How long SIGSTOP may take.
const STANDS_STILL: Duration = Duration::from_secs(10);

/// What a program that has ended left behind.
#[derive(Clone, Debug)]
pub struct Finished {
    /// Exit code; `None` where a signal ended it.
    pub code: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
    /// From start to end.
    pub elapsed: Duration,
}

impl Finished {
    /// Itself, if the exit code is 0.
    ///
    /// # Errors
    /// The exit code is another: with what the program printed.
    pub fn success(self) -> Result<Self> {
        match self.code {
            Some(0) => Ok(self),
            code => bail!("exit code {code:?}, printed: {}{}", self.stdout, self.stderr),
        }
    }

    /// All that it has printed. fence-virt prints its errors to standard output, and from 4.17 on
    /// to standard error.
    #[must_use]
    pub fn said(&self) -> String {
        format!("{}{}", self.stdout, self.stderr)
    }
}

/// A running program, with what it has printed so far. Dropping it kills it and waits for it.
#[derive(Debug)]
pub struct Process {
    child: Child,
    pidfd: OwnedFd,
    started: Instant,
    ended: Option<(ExitStatus, Duration)>,
    stdout: Printed,
    stderr: Printed,
    readers: Vec<JoinHandle<()>>,
}

/// The lines of one stream, as they come.
#[derive(Clone, Debug, Default)]
pub struct Printed(Board<Vec<String>>);

impl Printed {
    /// All lines so far.
    #[must_use]
    pub fn lines(&self) -> Vec<String> {
        self.0.lock().clone()
    }

    /// All lines so far as one text.
    #[must_use]
    pub fn text(&self) -> String {
        self.0.lock().iter().map(|line| format!("{line}\n")).collect()
    }

    /// Waits for the first line from number `from` on (counted from 0) for which `wanted` returns a
    /// value. `None` means timeout.
    pub fn wait_for<T>(&self, from: usize, limit: Duration, wanted: impl Fn(&str) -> Option<T>) -> Option<T> {
        self.0.wait(limit, |lines| lines.iter().skip(from).find_map(|line| wanted(line)))
    }
}

/// Copies a stream line by line until its end. Bytes that are not UTF-8 are replaced.
fn collect(stream: impl Read + Send + 'static, into: Printed) -> JoinHandle<()> {
    std::thread::spawn(move || {
        let mut reader = BufReader::new(stream);
        let mut line = Vec::new();
        while reader.read_until(b'\n', &mut line).is_ok_and(|count| count > 0) {
            into.0.change(|lines| lines.push(String::from_utf8_lossy(&line).trim_end_matches('\n').to_owned()));
            line.clear();
        }
    })
}

/// Whether a pidfd's process has ended, waiting for it at most `limit`.
pub fn wait_pidfd(pidfd: impl AsFd, limit: Duration) -> Result<bool> {
    readable(pidfd, limit)
}

/// Whether a descriptor is readable, waiting for it at most `limit`.
pub fn readable(descriptor: impl AsFd, limit: Duration) -> Result<bool> {
    let deadline = Instant::now() + limit;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).map_err(|_| anyhow!("time limit too long"))?;
        match poll(&mut [PollFd::new(&descriptor, PollFlags::IN)], Some(&timeout)) {
            Ok(0) => return Ok(false),
            Ok(_) => return Ok(true),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error).context("waiting for a descriptor"),
        }
    }
}

impl Process {
    /// Starts a program in a space of a lab, with nothing on its standard input.
    pub fn start(space: &Space, command: &mut Command) -> Result<Self> {
        // The process gets its own process group. Ctrl-C reaches the lab's owner, which then ends
        // all in order.
        command.process_group(0).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let started = Instant::now();
        let mut child = space.spawn(command)?;
        let pid = i32::try_from(child.id()).ok().and_then(rustix::process::Pid::from_raw);
        let pid = pid.context("a process without a number")?;
        let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).context("pidfd_open")?;
        let (stdout, stderr) = (Printed::default(), Printed::default());
        let mut readers = Vec::new();
        readers.extend(child.stdout.take().map(|stream| collect(stream, stdout.clone())));
        readers.extend(child.stderr.take().map(|stream| collect(stream, stderr.clone())));
        Ok(Self { child, pidfd, started, ended: None, stdout, stderr, readers })
    }

    /// The process number, as the host counts.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// How long it has been computing since it was started.
    pub fn processor_time(&self) -> Result<Duration> {
        let path = format!("/proc/{}/stat", self.id());
        let stat = std::fs::read_to_string(&path).with_context(|| path.clone())?;
        // After the name, which may hold anything: state, ten other fields, user and system time in
        // 1/100 s.
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
        let ticks = |index: usize| fields.get(index).and_then(|field| field.parse::<u64>().ok());
        let (user, system) = ticks(11).zip(ticks(12)).with_context(|| stat.clone())?;
        Ok(Duration::from_millis(10 * (user + system)))
    }

    /// What came on standard output.
    #[must_use]
    pub fn stdout(&self) -> &Printed {
        &self.stdout
    }

    /// What came on standard error.
    #[must_use]
    pub fn stderr(&self) -> &Printed {
        &self.stderr
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> Result<bool> {
        if self.ended.is_none()
            && let Some(status) = self.child.try_wait()?
        {
            self.ended = Some((status, self.started.elapsed()));
        }
        Ok(self.ended.is_none())
    }

    /// Sends a signal. After SIGSTOP the process stands still.
    pub fn signal(&mut self, signal: Signal) -> Result<()> {
        if !self.is_running()? {
            bail!("the process has ended already");
        }
        // `is_running` has not reaped it, so the number is still its own.
        send(Pid::from_raw(i32::try_from(self.child.id())?), signal)
    }

    /// Whether it ends within `limit`. What it printed is collected by [`Self::finish`].
    pub fn ends_within(&self, limit: Duration) -> Result<bool> {
        wait_pidfd(&self.pidfd, limit)
    }

    /// Waits for its end and collects what it printed.
    ///
    /// # Errors
    /// It has not ended within `limit` (it is killed then); the error has what it printed.
    pub fn finish(mut self, limit: Duration) -> Result<Finished> {
        if !wait_pidfd(&self.pidfd, limit)? {
            self.end();
            bail!("still running after {limit:?}, printed: {}{}", self.stdout.text(), self.stderr.text());
        }
        let elapsed = self.started.elapsed();
        let status = self.child.wait()?;
        let (status, elapsed) = *self.ended.get_or_insert((status, elapsed));
        self.join_readers();
        let (stdout, stderr) = (self.stdout.text(), self.stderr.text());
        Ok(Finished { code: status.code(), stdout, stderr, elapsed })
    }

    /// Waits for the streams' ends, but not for a descendant that holds them open longer.
    fn join_readers(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(2);
        for reader in self.readers.drain(..) {
            while !reader.is_finished() && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }

    /// Kills it and waits for its end.
    fn end(&mut self) {
        if self.ended.is_none() {
            // A failure means that the process has ended already.
            let _ = self.child.kill();
            if let Ok(status) = self.child.wait() {
                self.ended = Some((status, self.started.elapsed()));
            }
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.end();
    }
}

/// Runs a program to its end in a space of a lab, at most for `limit`. An exit code other than 0 is
/// no error here: see [`Finished::success`].
pub fn run(space: &Space, command: &mut Command, limit: Duration) -> Result<Finished> {
    let process = Process::start(space, command)?;
    process.finish(limit).with_context(|| format!("running {:?}", command.get_program()))
}

/// Sends a signal to a process that is not reaped yet. Returns from SIGSTOP when the process stands
/// still: until then some of its threads go on, and would take what a test sends next.
pub(crate) fn send(pid: Pid, signal: Signal) -> Result<()> {
    kill(pid, signal).context("sending a signal")?;
    if signal != Signal::SIGSTOP {
        return Ok(());
    }
    poll_until("a process to stand still", STANDS_STILL, || {
        let mut tasks = std::fs::read_dir(format!("/proc/{pid}/task"))?;
        // A thread that has ended meanwhile does nothing any more.
        let stat = |task: std::fs::DirEntry| std::fs::read_to_string(task.path().join("stat")).unwrap_or_default();
        let stands =
            |stat: String| [") T ", ") Z ", ") X "].iter().any(|state| stat.contains(state)) || stat.is_empty();
        let all = tasks.try_fold(true, |all, task| anyhow::Ok(all && stands(stat(task?))))?;
        Ok(all.then_some(()))
    })
}

/// Asks `question` again and again until it answers, at most for `limit`.
///
/// # Errors
/// No answer within the time, or the question failed. The error says what was waited for.
pub fn poll_until<T>(what: &str, limit: Duration, mut question: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(answer) = question().with_context(|| format!("waiting for {what}"))? {
            return Ok(answer);
        }
        if Instant::now() > deadline {
            bail!("waited {limit:?} in vain for {what}");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}
