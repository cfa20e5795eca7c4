//! Keeps the daemon responsive when the host is short of memory and time, which is when guests are
//! fenced.
//!
//! None of this is a condition for serving. A setting that the kernel refuses is logged once, and
//! the daemon goes on without it.

use std::ffi::{CStr, OsStr};
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use nix::errno::Errno;
use nix::sys::mman::{MlockAllFlags, mlockall};
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};
use rustix::fs::{Mode, OFlags};
use rustix::process::{getpriority_process, setpriority_process};
use rustix::thread::{CapabilitySet, capabilities};

use fence_config::{Priority, Stress};

/// Milder than the -1000 of sshd and systemd: if this daemon itself eats the memory, the kernel
/// must be able to end it.
const OOM_SCORE: &str = "-900";

/// The strongest of the ordinary priorities.
const NICE: i32 = -20;

/// The weakest real-time priority: corosync and the kernel's own threads come first.
const REALTIME: i32 = 1;

/// What an unprotected process has.
const OOM_UNPROTECTED: &str = "0";

/// This process in `/proc`, for reads and writes of its OOM score.
const OOM_SCORE_FILE: &CStr = c"/proc/self/oom_score_adj";

/// Asks the kernel for the configured settings only. Returns the refused ones with their remedies,
/// for the log.
///
/// Call it before other threads start: they inherit the settings. Children of the process do not.
#[must_use]
pub fn apply(stress: Stress) -> Vec<String> {
    let mut refused = Vec::new();
    let mut ask = |what: &str, ask: &dyn Fn() -> io::Result<()>, remedy: &str| {
        if let Err(error) = ask() {
            refused.push(format!("cannot {what}: {error} ({remedy})"));
        }
    };
    match stress.priority {
        Priority::Normal => ask(
            "give up the priority that the systemd unit gives",
            &ordinary,
            "set `Nice=0` in a drop-in of the unit, as `fence-daemon drop-in` prints it",
        ),
        Priority::High => ask(
            "raise the priority",
            &high,
            "it takes CAP_SYS_NICE, or `Nice=-20` in the systemd unit; `priority = \"normal\";` in section fence_virtd asks for none",
        ),
        Priority::Realtime => ask(
            "get a real-time priority",
            &realtime,
            "it takes CAP_SYS_NICE, and a cgroup with real-time time, and under the systemd unit what `fence-daemon drop-in` prints; `priority = \"high\";` in section fence_virtd does with less",
        ),
    }
    if stress.oom_protect {
        ask(
            "be spared when memory runs out",
            &protect_from_oom,
            "it takes CAP_SYS_RESOURCE; `oom_protect = \"no\";` in section fence_virtd asks for none",
        );
    } else {
        ask(
            "give up the protection that the systemd unit gives when memory runs out",
            &unprotect_from_oom,
            "set `OOMScoreAdjust=0` in a drop-in of the unit",
        );
    }
    if stress != NOTHING {
        ask("keep children from inheriting this", &spare_children, "the ssh of a remote URI has it too");
    }
    refused
}

/// A daemon that competes as any process does.
const NOTHING: Stress = Stress { lock_memory: false, priority: Priority::Normal, oom_protect: false };

/// The unit's `Nice` has set it already, and left no right to set it again.
fn high() -> io::Result<()> {
    if getpriority_process(None)? == NICE { Ok(()) } else { Ok(setpriority_process(None, NICE)?) }
}

/// Undoes the unit's `Nice`, which every daemon gets. Another value is somebody's choice and stays.
fn ordinary() -> io::Result<()> {
    if getpriority_process(None)? == NICE { Ok(setpriority_process(None, 0)?) } else { Ok(()) }
}

/// The unit's `OOMScoreAdjust` has set it already, and systemd has removed the right to set it
/// again.
fn protect_from_oom() -> io::Result<()> {
    if oom_score()? == OOM_SCORE { Ok(()) } else { fs::write(oom_score_path(), OOM_SCORE) }
}

/// Undoes the unit's `OOMScoreAdjust`, which every daemon gets. Another score is somebody's choice
/// and stays.
fn unprotect_from_oom() -> io::Result<()> {
    if oom_score()? == OOM_SCORE { fs::write(oom_score_path(), OOM_UNPROTECTED) } else { Ok(()) }
}

fn oom_score() -> io::Result<String> {
    Ok(fs::read_to_string(oom_score_path())?.trim_end().to_owned())
}

fn oom_score_path() -> &'static Path {
    Path::new(OsStr::from_bytes(OOM_SCORE_FILE.to_bytes()))
}

/// Makes every child of this process start as an ordinary one.
///
/// libvirt's client library forks an `ssh` for each connection to a remote host. Those must neither
/// outlive the host's other processes nor come before them. (The kernel's `SCHED_RESET_ON_FORK`
/// would take the priority from the daemon's own threads too. Memory locks are never inherited.)
fn spare_children() -> io::Result<()> {
    // SAFETY: needed because only the C library can run code in a child that a library forks. Sound
    // because `in_child` is a function without state that lives as long as the program. It makes
    // system calls only, as a child of a process with several threads must.
    let status = unsafe { nix::libc::pthread_atfork(None, None, Some(in_child)) };
    if status == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(status)) }
}

/// Runs in each child before the call to `fork` returns there. It cannot report a failure.
///
/// All calls are thin wrappers of system calls: they take no lock and allocate nothing, as a child
/// of a process with several threads requires.
extern "C" fn in_child() {
    let _ = set_scheduler(nix::libc::SCHED_OTHER, 0);
    let _ = setpriority_process(None, 0);
    if let Ok(file) = rustix::fs::open(OOM_SCORE_FILE, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty()) {
        let _ = rustix::io::write(&file, OOM_UNPROTECTED.as_bytes());
    }
}

/// Locks the pages that are in memory now, and further ones once they are used. Untouched pages are
/// not loaded, such as most of the stacks of all threads.
///
/// # Errors
/// The kernel does not permit it: a text for the log, with the remedy.
pub fn lock_memory() -> Result<(), String> {
    lock_pages().map_err(|error| {
        format!(
            "cannot lock memory: {error} (it takes CAP_IPC_LOCK or a higher `ulimit -l`; `lock_memory = \"no\";` in section \
             fence_virtd asks for none)"
        )
    })
}

fn lock_pages() -> io::Result<()> {
    // Under a limit the lock could succeed now, and a later allocation could fail because of it.
    // CAP_IPC_LOCK lifts the limit.
    let limit_counts = !capabilities(None)?.effective.contains(CapabilitySet::IPC_LOCK);
    if limit_counts && getrlimit(Resource::RLIMIT_MEMLOCK)?.0 != RLIM_INFINITY {
        return Err(Errno::EPERM.into());
    }
    let on_fault = MlockAllFlags::from_bits_retain(nix::libc::MCL_ONFAULT);
    Ok(mlockall(MlockAllFlags::MCL_CURRENT | MlockAllFlags::MCL_FUTURE | on_fault)?)
}

/// Round robin among real-time threads. Threads that start later inherit it from this one.
fn realtime() -> io::Result<()> {
    set_scheduler(nix::libc::SCHED_RR, REALTIME)
}

/// Sets the calling thread's scheduling policy, and its priority among real-time threads (0 for
/// other policies).
fn set_scheduler(policy: i32, priority: i32) -> io::Result<()> {
    let parameters = nix::libc::sched_param { sched_priority: priority };
    // SAFETY: needed because no wrapper here has the call. Sound because it reads one structure
    // that lives until it returns, and concerns this thread alone.
    let status = unsafe { nix::libc::sched_setscheduler(0, policy, &raw const parameters) };
    Ok(Errno::result(status).map(drop)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_that_are_off_ask_the_kernel_for_nothing() {
        let nothing = Stress { lock_memory: false, priority: Priority::Normal, oom_protect: false };
        assert_eq!(apply(nothing), Vec::<String>::new());
    }
}
