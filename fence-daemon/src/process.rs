//! The daemon as a process: goes into the background, protects the key, and announces that it is
//! up.
//!
//! The order in `main`: command line and configuration (errors go to the terminal), [`harden`],
//! [`daemonise`] unless in the foreground, the [PID file](crate::state::pid_file), logging, then
//! key, sockets and threads, and last [`Readiness::announce`].

mod pages;
mod rights;
mod stress;

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::time::Duration;

use fence_common::exit::EXIT_START;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigHandler, SigSet, Signal, signal};
use nix::sys::stat::{Mode, umask};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid};
pub use pages::settle;
pub use rights::{Loader, give_up};
pub use stress::{apply as withstand, lock_memory};

use crate::observe::relay::flush;
use crate::systemd;

/// How long the last log lines may take at the end.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// For how many open files there is room from the start: more than requests, domains and held files
/// of processes take. It costs 8 bytes for each.
const ROOM_FOR_FILES: u64 = 8192;

/// Why the process could not be prepared.
#[derive(Debug, thiserror::Error)]
#[error("cannot {step}: {error}")]
pub struct ProcessError {
    step: &'static str,
    #[source]
    error: io::Error,
}

/// For `map_err`: adds the attempted step to a system call's error.
fn failed<E: Into<io::Error>>(step: &'static str) -> impl FnOnce(E) -> ProcessError {
    move |error| ProcessError { step, error: error.into() }
}

/// Keeps the key out of core dumps and away from other processes, and sets known defaults.
///
/// New files are for the owner only (umask 077), and `open_files` files can be open. No signal is
/// blocked, a closed connection is an error and not a signal, and children can be waited for.
///
/// # Errors
/// A system call failed; none is expected to.
pub fn harden(open_files: u64) -> Result<(), ProcessError> {
    nix::sys::prctl::set_dumpable(false).map_err(failed("forbid core dumps"))?;
    setrlimit(Resource::RLIMIT_CORE, 0, 0).map_err(failed("forbid core files"))?;
    // Each request that is served is a connection. The usual limit of 1024 exists for the sake of
    // `select`.
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).map_err(failed("ask for the limit of open files"))?;
    if soft < open_files {
        setrlimit(Resource::RLIMIT_NOFILE, open_files.min(hard), hard)
            .map_err(failed("raise the limit of open files"))?;
    }
    umask(Mode::S_IRWXG | Mode::S_IRWXO);
    SigSet::empty().thread_set_mask().map_err(failed("unblock signals"))?;
    for (which, handler) in [(Signal::SIGPIPE, SigHandler::SigIgn), (Signal::SIGCHLD, SigHandler::SigDfl)] {
        // SAFETY: needed because dispositions are inherited and no safe wrapper sets them. Sound
        // because it installs no handler function, only the kernel's own behaviours; nothing runs
        // in signal context because of this call.
        unsafe { signal(which, handler) }.map_err(failed("reset signals"))?;
    }
    Ok(())
}

/// Makes room in the kernel's table of open files, while this is the only thread.
///
/// The table grows as files are opened. With several threads each growth waits until no processor
/// can be using the old table, which takes some 10 ms: in the midst of the first storm, or of the
/// first look at many processes. The table never shrinks, but a `fork` copies no more of it than is
/// used. So it is to be called after [`daemonise`].
///
/// # Errors
/// A system call failed. Then the table grows as it must.
pub fn make_room_for_files() -> Result<(), ProcessError> {
    let what = "make room for open files";
    let (most, _) = getrlimit(Resource::RLIMIT_NOFILE).map_err(failed(what))?;
    let last = i32::try_from(most.min(ROOM_FOR_FILES).saturating_sub(1)).unwrap_or(0);
    let null = File::open("/dev/null").map_err(failed(what))?;
    drop(rustix::io::fcntl_dupfd_cloexec(&null, last).map_err(failed(what))?);
    Ok(())
}

/// Ends the process at once, without the exit handlers of libraries.
///
/// libvirt's client crashes in its exit handlers if one of our threads is still inside libvirt.
/// Such a thread may be connecting, or waiting for a hypervisor that does not answer.
pub fn leave(code: u8) -> ! {
    flush(LAST_WORDS);
    // SAFETY: needed because the standard library's `exit` runs the exit handlers of libraries.
    // Sound because it takes a number and does not return; no buffered output of ours is lost.
    unsafe { nix::libc::_exit(i32::from(code)) }
}

/// The duty to report to the daemon's starter that it is up.
///
/// It may be dropped without an announcement: a waiting parent then waits for the daemon's end and
/// takes over its exit code.
#[derive(Debug)]
#[must_use = "the process that started the daemon waits for the announcement"]
pub struct Readiness {
    /// The pipe to the waiting parent, and the replacement for standard error.
    parent: Option<(io::PipeWriter, OwnedFd)>,
    announced: bool,
}

impl Readiness {
    /// In the foreground nobody but systemd waits.
    pub fn foreground() -> Self {
        Self { parent: None, announced: false }
    }

    /// Prints on the terminal what the start waits for. In the foreground the log has told it.
    pub fn tell(&self, what: &str) {
        if self.parent.is_some() {
            // Nobody may be there to read it.
            let _ = writeln!(io::stderr(), "fence-daemon: {what}");
        }
    }

    /// Tells systemd and a waiting parent, if any, that the daemon is up. In the background this
    /// also takes standard error off the terminal, so later messages belong into the log. A second
    /// call does nothing.
    ///
    /// # Errors
    /// Standard error could not be redirected. A missing listener is no error.
    pub fn announce(&mut self) -> Result<(), ProcessError> {
        if std::mem::replace(&mut self.announced, true) {
            return Ok(());
        }
        systemd::notify_ready();
        if let Some((mut pipe, null)) = self.parent.take() {
            rustix::stdio::dup2_stderr(null).map_err(failed("redirect standard error"))?;
            // A parent that was killed meanwhile doesn't matter.
            let _ = pipe.write_all(b"1");
        }
        Ok(())
    }
}

/// Goes into the background as stock servers do: a new session, `/` as working directory, nothing
/// on standard input and output. Returns in the daemon only.
///
/// The original process waits until [`Readiness::announce`] and exits with 0. If the daemon ends
/// before, it exits with the daemon's code. Until then standard error still leads to the terminal,
/// for the reason.
///
/// # Errors
/// Other threads run already (they would be missing in the daemon), or a system call failed.
pub fn daemonise() -> Result<Readiness, ProcessError> {
    let alone = std::fs::read_dir("/proc/self/task").map_err(failed("count threads in /proc"))?.count() == 1;
    if !alone {
        return Err(failed("go into the background")(io::Error::other("other threads run already")));
    }
    close_inherited().map_err(failed("list open files in /proc"))?;
    let null = OpenOptions::new().read(true).write(true).open("/dev/null").map_err(failed("open /dev/null"))?;
    let (mut reader, writer) = io::pipe().map_err(failed("make a pipe"))?;
    // What is buffered would be written twice.
    let _ = io::stdout().flush();

    // SAFETY: needed because there is no other way into the background. Sound because this is the
    // only thread (counted above, and no other thread could start one meanwhile). So the child has
    // everything that the parent had, and no missing thread holds a lock.
    let child = match unsafe { nix::unistd::fork() }.map_err(failed("fork"))? {
        ForkResult::Child => None,
        ForkResult::Parent { child } => Some(child),
    };
    if let Some(child) = child {
        drop(writer);
        let up = matches!(reader.read(&mut [0]), Ok(1));
        std::process::exit(if up { 0 } else { code_of(child) });
    }
    drop(reader);
    nix::unistd::setsid().map_err(failed("start a session"))?;
    nix::unistd::chdir("/").map_err(failed("change to the root directory"))?;
    rustix::stdio::dup2_stdin(&null).map_err(failed("redirect standard input"))?;
    rustix::stdio::dup2_stdout(&null).map_err(failed("redirect standard output"))?;
    Ok(Readiness { parent: Some((writer, null.into())), announced: false })
}

/// Closes inherited files: a pipe that a daemon keeps makes its reader wait for ever.
fn close_inherited() -> io::Result<()> {
    let open: Vec<i32> = std::fs::read_dir("/proc/self/fd")?
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|fd| *fd > 2)
        .collect();
    for fd in open {
        // No file of ours is among them: configuration and key are read and closed, and no other
        // thread could open anything. The list's own descriptor is closed already, which is the
        // only error here.
        let _ = nix::unistd::close(fd);
    }
    Ok(())
}

/// The exit code of a daemon that ended before it was up.
fn code_of(child: Pid) -> i32 {
    loop {
        return match waitpid(child, None) {
            Err(nix::errno::Errno::EINTR) => continue,
            Ok(WaitStatus::Exited(_, code)) => code,
            Ok(WaitStatus::Signaled(_, signal, _)) => {
                let _ = writeln!(io::stderr(), "fence-daemon: ended by {signal} before it was up");
                i32::from(EXIT_START)
            }
            _ => i32::from(EXIT_START),
        };
    }
}
