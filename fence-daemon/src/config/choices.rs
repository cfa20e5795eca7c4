//! The keys that stock servers do not have: how domains are killed and rebooted, and how the daemon holds its own under stress.

use std::path::{Path, PathBuf};

use super::error::Mistake;
use super::raw::clip;
use super::resolved::{on_or_off, read};
use super::survey::{Findings, Surveyed};
use crate::hypervisor::{Kill, Options, RebootMethod, RebootReply};
use crate::process::{Priority, Stress};

/// Where is kept what must outlive the process, but not the host's next boot.
pub const STATE_DIRECTORY: &str = "/run/fence-xdp";

impl Kill {
    const ALL: [Self; 2] = [Self::Direct, Self::Libvirt];

    /// As in the configuration file.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Libvirt => "libvirt",
        }
    }
}

impl RebootMethod {
    const ALL: [Self; 2] = [Self::Cycle, Self::Reset];

    /// As in the configuration file.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Cycle => "cycle",
            Self::Reset => "reset",
        }
    }
}

impl RebootReply {
    const ALL: [Self; 2] = [Self::Off, Self::On];

    /// As in the configuration file.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::On => "on",
        }
    }
}

impl Priority {
    const ALL: [Self; 3] = [Self::High, Self::Realtime, Self::Normal];

    /// As in the configuration file.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Normal => "normal",
            Self::High => "high",
            Self::Realtime => "realtime",
        }
    }
}

/// How the daemon holds its own, from section `fence_virtd`.
pub(super) fn stress(global: &Surveyed<'_>, findings: &mut Findings<'_>) -> Stress {
    let default = Stress::default();
    Stress {
        lock_memory: switch(global, "lock_memory", default.lock_memory, findings),
        priority: choice(global, "priority", &Priority::ALL, Priority::name, findings),
        oom_protect: switch(global, "oom_protect", default.oom_protect, findings),
    }
}

/// How domains are killed and rebooted, from section `libvirt`, and where that is written down, from `fence_virtd`.
pub(super) fn options(global: &Surveyed<'_>, libvirt: &Surveyed<'_>, findings: &mut Findings<'_>) -> Options {
    let state = read(global.get("state_directory"), PathBuf::from(STATE_DIRECTORY), findings, |text| {
        let path = Path::new(text);
        if path.is_absolute() { Ok(path.to_owned()) } else { Err(Mistake::RelativePath(clip(text))) }
    });
    Options {
        kill: choice(libvirt, "kill", &Kill::ALL, Kill::name, findings),
        reboot_method: choice(libvirt, "reboot_method", &RebootMethod::ALL, RebootMethod::name, findings),
        reboot_reply: choice(libvirt, "reboot_reply", &RebootReply::ALL, RebootReply::name, findings),
        state: Some(state),
    }
}

fn switch(section: &Surveyed<'_>, key: &'static str, default: bool, findings: &mut Findings<'_>) -> bool {
    read(section.get(key), default, findings, |text| {
        on_or_off(text).ok_or_else(|| Mistake::Switch { key, value: clip(text) })
    })
}

/// One of several words, the first of which is not necessarily the default; the case does not matter.
fn choice<T: Copy + Default>(
    section: &Surveyed<'_>,
    key: &'static str,
    all: &[T],
    name: fn(T) -> &'static str,
    findings: &mut Findings<'_>,
) -> T {
    read(section.get(key), T::default(), findings, |text| {
        let found = all.iter().copied().find(|choice| name(*choice).eq_ignore_ascii_case(text));
        found.ok_or_else(|| Mistake::Choice { key, value: clip(text), known: all.iter().copied().map(name).collect() })
    })
}
