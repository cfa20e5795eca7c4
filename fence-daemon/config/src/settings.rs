//! What an administrator can choose that stock servers do not have: how domains are killed and
//! rebooted, and how the daemon holds its own under stress.

use std::path::PathBuf;
use std::time::Duration;

/// How domains are powered off.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Kill {
    /// By killing the domain's own process where it is one of this host's, else as
    /// [`Kill::Libvirt`].
    #[default]
    Direct,
    /// By libvirt's destroy alone, as stock servers do.
    Libvirt,
}

/// How domains are rebooted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RebootMethod {
    /// Powered off and started again.
    #[default]
    Cycle,
    /// Reset, if the driver can and says that it was done; else as [`RebootMethod::Cycle`].
    Reset,
}

/// When a reboot is answered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RebootReply {
    /// When the domain is proven off: it can do no more harm.
    #[default]
    Off,
    /// When it has been started again.
    On,
}

/// What an administrator can choose.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// How domains are powered off.
    pub kill: Kill,
    /// How they are rebooted.
    pub reboot_method: RebootMethod,
    /// When a reboot is answered.
    pub reboot_reply: RebootReply,
    /// For how long they stay off in between, at least. A reset has no pause.
    pub reboot_pause: Duration,
    /// Where restarts that are still to be done are written down; nowhere if `None`.
    pub state: Option<PathBuf>,
}

/// The longest pause that can be chosen: of corosync's timeouts twice the longest that are in use.
pub const PAUSE_MAX: Duration = Duration::from_secs(60);

/// The longest one where a reboot is answered when the domain runs again: what is left of the time
/// for an order is for kill and start.
pub const PAUSE_MAX_ANSWERED: Duration = Duration::from_secs(10);

/// How the daemon's threads compete for processors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Priority {
    /// As any process.
    Normal,
    /// Before any ordinary process (nice -20). A flood of requests can still not starve the host.
    #[default]
    High,
    /// Before all ordinary processes, whatever they do (`SCHED_RR`, the lowest of the real-time
    /// priorities). For hosts where guests may use up all processors, and with the kernel program
    /// in the way of floods.
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
