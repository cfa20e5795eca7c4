//! A process that is held by a pidfd.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{
    Pid, PidfdFlags, PidfdGetfdFlags, Signal, pidfd_getfd, pidfd_open, pidfd_send_signal, test_kill_process,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// A process and its pidfd. While the pidfd is open, it cannot come to mean another process.
#[derive(Debug)]
pub(crate) struct Process {
    pid: Pid,
    pidfd: OwnedFd,
}

impl Process {
    /// Opens a pidfd. The caller then looks at what the process is, and after that finds it alive.
    /// In that order it has looked at the process that the pidfd holds.
    ///
    /// # Errors
    /// The process has ended (`ESRCH`), or cannot be held.
    pub(crate) fn open(pid: i32) -> io::Result<Self> {
        // Number 1 is the init of the system, or of a container that we run in, and no machine.
        let pid = if pid > 1 { Pid::from_raw(pid) } else { None };
        let pid = pid.ok_or_else(|| io::Error::other("it is no machine's process number"))?;
        Ok(Self { pid, pidfd: pidfd_open(pid, PidfdFlags::empty())? })
    }

    /// The process number, for people.
    pub(crate) fn pid(&self) -> i32 {
        self.pid.as_raw_nonzero().get()
    }

    /// Whether every thread is dead. For a container's first process: every process in there, too.
    pub(crate) fn is_dead(&self) -> bool {
        let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
        let now = rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 };
        // An error is no proof of anything.
        matches!(poll(&mut fds, Some(&now)), Ok(1)) && fds[0].revents().contains(PollFlags::IN)
    }

    /// Sends SIGKILL. A process that is dead already is no error: the caller waits for the proof.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(crate) fn kill(&self) -> io::Result<()> {
        match pidfd_send_signal(&self.pidfd, Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// A copy of one of its open files.
    ///
    /// # Errors
    /// The kernel does not permit it, or there is no such file.
    pub(super) fn copy(&self, number: i32) -> io::Result<OwnedFd> {
        Ok(pidfd_getfd(&self.pidfd, number, PidfdGetfdFlags::empty())?)
    }

    /// Whether its parent has waited for it. It is dead then.
    pub(super) fn is_gone(&self) -> bool {
        test_kill_process(self.pid) == Err(rustix::io::Errno::SRCH)
    }

    /// Waits until it is dead.
    ///
    /// # Errors
    /// The pidfd cannot be watched.
    pub(crate) async fn death(&self) -> io::Result<()> {
        // One system call instead of six.
        if self.is_dead() {
            return Ok(());
        }
        // Two tasks cannot watch one descriptor, so each gets its own.
        let own = self.pidfd.try_clone()?;
        // SAFETY: needed because a pidfd tells a death by becoming readable, and tokio wants the
        // promise that the descriptor stays open and the same. Sound because the watch owns the
        // descriptor: nobody else has it, and `OwnedFd` neither replaces nor closes it early.
        let pidfd = unsafe { AsyncFd::register_with_interest(own, Interest::READABLE) }?;
        loop {
            let mut ready = pidfd.readable().await?;
            // Readiness may be spurious: the proof is what the kernel says now.
            if self.is_dead() {
                return Ok(());
            }
            ready.clear_ready();
        }
    }

    /// Its number and program, for people.
    pub(crate) fn describe(&self) -> String {
        describe(self.pid())
    }
}

/// A process's number and program, for people. Reads nothing that could wait for the process.
pub(super) fn describe(pid: i32) -> String {
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    format!("{pid} ({})", name.trim().escape_debug())
}
