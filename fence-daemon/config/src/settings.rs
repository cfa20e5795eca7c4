//! The settings that fence_virtd does not have: who else answers, how domains are killed and
//! rebooted, and how the daemon competes for memory and processors.

use std::path::PathBuf;
use std::time::Duration;

use strum::{IntoStaticStr, VariantArray};

/// Whether no other hypervisor hears the requests. A domain that is off is then answered for at
/// once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, IntoStaticStr, VariantArray)]
#[strum(serialize_all = "lowercase")]
pub enum Alone {
    /// As far as the kernel knows: the interface leads to guests of this host only.
    #[default]
    Auto,
    /// None does, wherever the interface leads.
    Yes,
    /// Others may.
    No,
}

/// How domains are powered off.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, IntoStaticStr, VariantArray)]
#[strum(serialize_all = "lowercase")]
pub enum Kill {
    /// Kills the domain's process if it runs on this host; otherwise as [`Kill::Libvirt`].
    #[default]
    Direct,
    /// Uses libvirt's destroy only, as fence_virtd does.
    Libvirt,
}

/// How domains are rebooted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, IntoStaticStr, VariantArray)]
#[strum(serialize_all = "lowercase")]
pub enum RebootMethod {
    /// Powers the domain off and starts it again.
    #[default]
    Cycle,
    /// Resets the domain, if the driver can and confirms it; otherwise as [`RebootMethod::Cycle`].
    Reset,
}

/// When a reboot is answered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, IntoStaticStr, VariantArray)]
#[strum(serialize_all = "lowercase")]
pub enum RebootReply {
    /// When the domain is proven off: it can do no more harm.
    #[default]
    Off,
    /// When the domain runs again.
    On,
}

/// How domains are fenced.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// How domains are powered off.
    pub kill: Kill,
    /// How domains are rebooted.
    pub reboot_method: RebootMethod,
    /// When a reboot is answered.
    pub reboot_reply: RebootReply,
    /// How long a rebooted domain stays off, at least. A reset has no pause.
    pub reboot_pause: Duration,
    /// The directory of pending restarts; `None` if they are not recorded.
    pub state: Option<PathBuf>,
}

/// The longest pause: twice the longest of corosync's usual timeouts.
pub const PAUSE_MAX: Duration = Duration::from_secs(60);

/// The longest pause if a reboot is answered when the domain runs again. The rest of an order's
/// time is for the kill and the start.
pub const PAUSE_MAX_ANSWERED: Duration = Duration::from_secs(10);

/// How the daemon's threads compete for processors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, IntoStaticStr, VariantArray)]
#[strum(serialize_all = "lowercase")]
pub enum Priority {
    /// As any process.
    Normal,
    /// Before ordinary processes (nice -20). A flood of requests cannot starve the host.
    #[default]
    High,
    /// Before all ordinary processes (`SCHED_RR`, the lowest real-time priority). For hosts where
    /// guests may use up all processors. The kernel program must then stop floods.
    Realtime,
}

/// What the daemon asks of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stress {
    /// Whether the daemon's pages are locked in memory.
    pub lock_memory: bool,
    /// How the daemon's threads compete for processors.
    pub priority: Priority,
    /// Whether the kernel kills other processes first when memory runs out.
    pub oom_protect: bool,
}

impl Default for Stress {
    fn default() -> Self {
        Self { lock_memory: true, priority: Priority::default(), oom_protect: true }
    }
}
