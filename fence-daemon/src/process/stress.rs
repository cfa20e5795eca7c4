//! Being served when the host is short of memory and time, which is when guests are fenced.
//!
//! Nothing here is a condition for serving: what is not permitted is said once, and the daemon goes on without.

use std::fs;
use std::io;

use nix::errno::Errno;
use nix::sys::mman::{MlockAllFlags, mlockall};
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};
use rustix::process::setpriority_process;
use rustix::thread::{CapabilitySet, capabilities};

/// How the daemon's threads compete for processors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Priority {
    /// As any process.
    Normal,
    /// Before any ordinary process (nice -20). A flood of requests can still not starve the host.
    #[default]
    High,
    /// Before all ordinary processes, whatever they do (`SCHED_RR`, the lowest of the real-time priorities). For hosts where guests may use
    /// up all processors, and with the kernel program in the way of floods.
    Realtime,
}

/// What is to be asked of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stress {
    /// Keep the daemon's pages in memory.
    pub lock_memory: bool,
    /// How its threads compete.
    pub priority: Priority,
    /// Have other processes killed first when memory runs out.
    pub oom_protect: bool,
}

impl Default for Stress {
    fn default() -> Self {
        Self { lock_memory: true, priority: Priority::default(), oom_protect: true }
    }
}

/// Below sshd's and systemd's own -1000: should this daemon ever be what eats the memory, the kernel must be able to end it.
const OOM_SCORE: &str = "-900";

/// The strongest of the ordinary priorities.
const NICE: i32 = -20;

/// The weakest of the real-time priorities: corosync and the kernel's own threads come first.
const REALTIME: i32 = 1;

impl Stress {
    /// Asks the kernel for all of it; to be called before other threads are started, which then have it too. Returns what was refused and how
    /// that can be mended, to be logged.
    #[must_use]
    pub fn apply(self) -> Vec<String> {
        let mut refused = Vec::new();
        let mut ask = |wanted: bool, what: &str, ask: &dyn Fn() -> io::Result<()>, remedy: &str| {
            if let (true, Err(error)) = (wanted, ask().map_or_else(Err, Ok)) {
                refused.push(format!("cannot {what}: {error} ({remedy})"));
            }
        };
        ask(
            self.lock_memory,
            "lock memory",
            &lock_memory,
            "it takes CAP_IPC_LOCK or a higher `ulimit -l`; `lock_memory = \"no\";` in section fence_virtd asks for none",
        );
        ask(
            self.priority == Priority::High,
            "raise the priority",
            &|| Ok(setpriority_process(None, NICE)?),
            "it takes CAP_SYS_NICE; `priority = \"normal\";` in section fence_virtd asks for none",
        );
        ask(
            self.priority == Priority::Realtime,
            "get a real-time priority",
            &realtime,
            "it takes CAP_SYS_NICE, and a cgroup with real-time time; `priority = \"high\";` in section fence_virtd does with less",
        );
        ask(
            self.oom_protect,
            "be spared when memory runs out",
            &|| fs::write("/proc/self/oom_score_adj", OOM_SCORE),
            "it takes CAP_SYS_RESOURCE; `oom_protect = \"no\";` in section fence_virtd asks for none",
        );
        refused
    }
}

/// Pages stay once they were used. (All at once would be the stacks of all threads too, of which hardly anything is ever used.)
pub(super) fn lock_memory() -> io::Result<()> {
    // Under a limit it could succeed now, and some later allocation fail for it. CAP_IPC_LOCK lifts the limit.
    let limit_counts = !capabilities(None)?.effective.contains(CapabilitySet::IPC_LOCK);
    if limit_counts && getrlimit(Resource::RLIMIT_MEMLOCK)?.0 != RLIM_INFINITY {
        return Err(Errno::EPERM.into());
    }
    let on_fault = MlockAllFlags::from_bits_retain(nix::libc::MCL_ONFAULT);
    Ok(mlockall(MlockAllFlags::MCL_CURRENT | MlockAllFlags::MCL_FUTURE | on_fault)?)
}

/// Round robin among real-time threads. Threads that are started later have it from this one.
fn realtime() -> io::Result<()> {
    let parameters = nix::libc::sched_param { sched_priority: REALTIME };
    // SAFETY: needed because no wrapper here has the call. Sound because it reads one structure that lives until it returns, and is about
    // this thread alone.
    let status = unsafe { nix::libc::sched_setscheduler(0, nix::libc::SCHED_RR, &raw const parameters) };
    Ok(Errno::result(status).map(drop)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_is_not_asked_for_is_done_or_refused() {
        let nothing = Stress { lock_memory: false, priority: Priority::Normal, oom_protect: false };
        assert_eq!(nothing.apply(), Vec::<String>::new());
    }
}
