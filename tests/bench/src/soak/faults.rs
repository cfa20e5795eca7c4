//! What is done to daemons and libvirtds, and in which order.

use std::fmt;

use fastrand::Rng;

/// A kind of fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum FaultKind {
    DaemonKill,
    DaemonStop,
    LibvirtdKill,
    LibvirtdStop,
    LibvirtdHang,
    Reload,
    BrokenReload,
    Key,
    Flood,
}

impl FaultKind {
    /// All of them.
    pub(super) const ALL: [Self; 9] = [
        Self::DaemonKill,
        Self::DaemonStop,
        Self::LibvirtdKill,
        Self::LibvirtdStop,
        Self::LibvirtdHang,
        Self::Reload,
        Self::BrokenReload,
        Self::Key,
        Self::Flood,
    ];

    /// Whether the daemon is away meanwhile.
    pub(super) fn is_of_daemon(self) -> bool {
        matches!(self, Self::DaemonKill | Self::DaemonStop)
    }

    /// Whether libvirtd is away or hangs meanwhile.
    pub(super) fn is_of_libvirt(self) -> bool {
        matches!(self, Self::LibvirtdKill | Self::LibvirtdStop | Self::LibvirtdHang)
    }
}

impl fmt::Display for FaultKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::DaemonKill => "daemon: SIGKILL, and a new one",
            Self::DaemonStop => "daemon: SIGTERM, and a new one",
            Self::LibvirtdKill => "libvirtd: SIGKILL, and a new one",
            Self::LibvirtdStop => "libvirtd: SIGTERM, and a new one",
            Self::LibvirtdHang => "libvirtd: SIGSTOP, later SIGCONT",
            Self::Reload => "reload: limits, groups, `kill`",
            Self::BrokenReload => "reload of a broken file, refused",
            Self::Key => "reload: a key comes, or goes",
            Self::Flood => "flood of bad requests",
        })
    }
}

/// A fault at a hypervisor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Fault {
    pub(super) kind: FaultKind,
    pub(super) host: usize,
}

/// What comes at each round. The daemon of the second hypervisor lives on, so that its memory
/// tells. Floods have a thread of their own.
const ROUND: [Fault; 13] = {
    const fn at(host: usize, kind: FaultKind) -> Fault {
        Fault { kind, host }
    }
    [
        at(0, FaultKind::DaemonKill),
        at(0, FaultKind::DaemonStop),
        at(0, FaultKind::LibvirtdKill),
        at(0, FaultKind::LibvirtdHang),
        at(0, FaultKind::Reload),
        at(0, FaultKind::Key),
        at(1, FaultKind::LibvirtdKill),
        at(1, FaultKind::LibvirtdStop),
        at(1, FaultKind::LibvirtdHang),
        at(1, FaultKind::Reload),
        at(1, FaultKind::BrokenReload),
        at(1, FaultKind::Key),
        at(1, FaultKind::Key),
    ]
};

/// The faults in their order, without an end: each round in another one.
pub(super) struct Faults {
    rng: Rng,
    left: Vec<Fault>,
}

impl Faults {
    pub(super) fn new(rng: Rng) -> Self {
        Self { rng, left: Vec::new() }
    }

    pub(super) fn next(&mut self) -> Option<Fault> {
        if self.left.is_empty() {
            self.left = ROUND.to_vec();
            self.rng.shuffle(&mut self.left);
        }
        self.left.pop()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_repeats_the_faults_and_each_kind_has_its_turn_in_a_round() {
        let of = |seed| {
            let mut faults = Faults::new(Rng::with_seed(seed));
            (0..2 * ROUND.len()).filter_map(|_| faults.next()).collect::<Vec<_>>()
        };
        assert_eq!(of(7), of(7));
        assert_ne!(of(7), of(8));
        for round in of(7).chunks(ROUND.len()) {
            for kind in FaultKind::ALL.into_iter().filter(|kind| *kind != FaultKind::Flood) {
                assert!(round.iter().any(|fault| fault.kind == kind), "{kind}: {round:?}");
            }
            assert!(!round.iter().any(|fault| fault.host == 1 && fault.kind.is_of_daemon()), "{round:?}");
        }
    }
}
