//! Why the kernel program is not loaded or not attached, and whose fault that is.

use std::io;
use std::sync::Arc;

use aya::EbpfError;
use aya::maps::MapError;
use aya::programs::ProgramError;
use fence_common::boundary::ABI_VERSION;
use rustix::thread::{CapabilitySet, capabilities};

use super::AttachedMode;
use super::interface::{Occupant, Sharer, Vlans};

/// Why no kernel program filters the datagrams. No error is fatal: the socket serves without it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Ours, or a kernel that lacks something: the object or its maps could not be created.
    #[error("the kernel program's object cannot be loaded")]
    Object(#[source] Box<EbpfError>),
    /// The administrator's: the daemon was started without the right to use BPF.
    #[error(
        "BPF is not permitted here: it takes CAP_BPF and CAP_NET_ADMIN, and no container or security module that refuses it"
    )]
    NotPermitted(#[source] io::Error),
    /// Ours: the object is not the one that belongs to this daemon.
    #[error("the object has no {0}: it is not this daemon's kernel program")]
    Missing(&'static str),
    /// Ours: the object was built with another version of the boundary.
    #[error(
        "the kernel program speaks version {0} of the boundary, this daemon version {ABI_VERSION}: install both from one build"
    )]
    Abi(u32),
    /// A map refused to be read or written.
    #[error("the map {name} cannot be used")]
    Map {
        /// Which map.
        name: &'static str,
        /// What the kernel said.
        #[source]
        source: Box<MapError>,
    },
    /// Ours, or the kernel's: the verifier rejects the program.
    #[error("the kernel refuses the program: {reason}")]
    Refused {
        /// The last line of the verifier's log. The whole log goes to the debug messages.
        reason: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A form of the program was refused when all were loaded.
    #[error(transparent)]
    Earlier(Arc<Error>),
    /// The program cannot be used.
    #[error("the kernel program cannot be used")]
    Program(#[source] Box<ProgramError>),
    /// The administrator's: no such interface.
    #[error("there is no interface {interface:?}")]
    NoInterface {
        /// Its name as configured.
        interface: String,
    },
    /// The administrator's: another XDP program is on the interface.
    #[error("interface {interface} already has an XDP program: {occupant}")]
    Occupied {
        /// The interface's name.
        interface: String,
        /// Who is there.
        occupant: Occupant,
    },
    /// The administrator's choice of an interface: others need the frames that the program takes.
    #[error("what comes by interface {interface} is also for {sharer}")]
    Shared {
        /// The interface's name.
        interface: String,
        /// Who else gets it.
        sharer: Sharer,
    },
    /// The administrator's choice of XDP where there are VLANs.
    #[error("XDP cannot tell the VLANs of interface {interface} apart ({vlans})")]
    Vlans {
        /// The interface's name.
        interface: String,
        /// Why there are VLANs.
        vlans: Vlans,
    },
    /// The kernel refuses the attachment.
    #[error("the program cannot be attached to interface {interface} ({mode})")]
    Attach {
        /// The interface's name.
        interface: String,
        /// The mode that was refused last.
        mode: AttachedMode,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// The error that names the missing right, if the kernel's `EPERM` is among this one's causes.
pub(super) fn not_permitted(error: &(dyn std::error::Error + 'static)) -> Option<Error> {
    let mut causes = std::iter::successors(Some(error), |cause| cause.source());
    let denied = causes.any(|cause| {
        cause.downcast_ref::<io::Error>().is_some_and(|error| error.raw_os_error() == Some(nix::libc::EPERM))
    });
    denied.then(|| Error::NotPermitted(io::Error::from_raw_os_error(nix::libc::EPERM)))
}

/// Why the kernel refuses to load the program.
pub(super) fn refused(error: ProgramError) -> Error {
    if let ProgramError::LoadError { io_error, verifier_log } = error {
        return refused_by(io_error, &verifier_log.to_string(), may_reckon_with_pointers());
    }
    not_permitted(&error).unwrap_or_else(|| Error::Program(Box::new(error)))
}

/// Why the program was not loaded. The verifier's log may have thousands of lines; the last ones
/// say what it rejects.
fn refused_by(io_error: io::Error, log: &str, privileged: bool) -> Error {
    let reason = last_words(log);
    // Without CAP_PERFMON the kernel forbids pointer arithmetic and more. It answers EACCES, as it
    // does for any other rejection.
    if io_error.raw_os_error() == Some(nix::libc::EPERM) || !privileged {
        return Error::NotPermitted(io_error);
    }
    tracing::debug!("the verifier says: {log}");
    Error::Refused { reason, source: io_error }
}

/// Whether the verifier trusts this process with kernel pointers (CAP_PERFMON). `true` if the
/// kernel does not tell.
fn may_reckon_with_pointers() -> bool {
    let enough = CapabilitySet::PERFMON | CapabilitySet::SYS_ADMIN;
    capabilities(None).map_or(true, |ours| ours.effective.intersects(enough))
}

/// The last line of a verifier's log that is not statistics.
fn last_words(log: &str) -> String {
    let statistics = ["processed ", "verification time ", "stack depth "];
    let mut lines = log.lines().map(str::trim).rev();
    let line = lines.find(|line| !line.is_empty() && !statistics.iter().any(|start| line.starts_with(start)));
    line.unwrap_or("it does not say why").chars().take(200).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_verifiers_last_words_are_one_line_without_statistics() {
        let log = "0: R1=ctx()\n; a line of source\nR8 invalid mem access 'scalar'\nverification time 71 usec\nstack depth 16+0\nprocessed 137 insns (limit 1000000)\n\n";
        assert_eq!(last_words(log), "R8 invalid mem access 'scalar'");
        assert_eq!(last_words("processed 1 insns"), "it does not say why");
        assert_eq!(last_words(&"x".repeat(1000)).len(), 200);
    }

    #[test]
    fn a_missing_right_differs_from_other_refusals() {
        let refused = |errno, log, privileged| refused_by(io::Error::from_raw_os_error(errno), log, privileged);
        let (eperm, eacces) = (nix::libc::EPERM, nix::libc::EACCES);
        assert!(matches!(refused(eperm, "", true), Error::NotPermitted(_)));
        let log = "R8 pointer arithmetic with it prohibited for !root\nprocessed 137 insns";
        assert!(matches!(refused(eacces, log, false), Error::NotPermitted(_)));
        assert!(matches!(refused(eacces, "R8 is bad", true), Error::Refused { reason, .. } if reason == "R8 is bad"));
    }
}
