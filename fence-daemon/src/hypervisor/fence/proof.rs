//! What came of powering a domain off, and the check of libvirt's word by this host.
//!
//! The proof itself is elsewhere: [`kill`](super::kill) kills a domain's own process and waits for
//! its death, and [`host`](crate::hypervisor::process::host) clears away the rest.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::timeout_at;
use zeroize::Zeroizing;

use crate::clock::Moment;
use crate::hypervisor::deadline::Deadline;
use crate::hypervisor::known::{Identity, Uri};
use crate::hypervisor::libvirt::{CallError, LibvirtError, State};
use crate::hypervisor::process::{Cleared, Driver, Host, Job, Left, Look, Victim};

/// How long after the deadline the processes that this host finds may take to die. The answer must
/// still be in time.
const CLEAR: Duration = Duration::from_secs(3);

/// What is needed to start a domain again.
pub(crate) enum Source {
    /// Its persistent definition.
    Definition,
    /// A transient domain's XML, taken while it ran. It may hold passwords: never logged, wiped
    /// after use.
    Xml(Zeroizing<String>),
    /// Nothing: why.
    Nothing(CallError),
}

impl Source {
    /// The XML, if that is what it is.
    pub(super) fn xml(&self) -> Option<&str> {
        match self {
            Self::Xml(xml) => Some(xml.as_str()),
            Self::Definition | Self::Nothing(_) => None,
        }
    }
}

/// What came of powering a domain off.
pub(crate) enum Off {
    /// It was off already, at this moment.
    Already(Moment),
    /// It was active and is proven off since this moment. `source`: what a restart needs.
    Proven { was: State, at: Moment, source: Source },
    /// Off here, but only because it moved to another host.
    MovedAway,
    /// libvirt does not know it (any more).
    Gone,
    /// Not off, or not known to be off.
    Unproven { was: State, why: Unproven },
}

/// Why a destroyed domain does not count as off.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unproven {
    /// It still is, or is again, in this state; with destroy's own error.
    Active(State, Option<LibvirtError>),
    /// It vanished, but not provably by our hand: it may run on another host now.
    Vanished(Option<LibvirtError>),
    /// It moved to another host while we were at it.
    MovedAway,
    /// The state could not be asked.
    Unknown(CallError),
    /// libvirt has lost it, and its process does not die.
    Orphan,
    /// On this host something of it lives, or that is not known.
    Left(Left),
    /// It is on its way to or from another host, and cannot be held back. Nothing was done to it.
    Migrating,
}

impl fmt::Display for Unproven {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Active(state, None) => write!(f, "destroyed, but it is {state}"),
            Self::Active(state, Some(error)) => write!(f, "still {state}: {error}"),
            Self::Vanished(None) => f.write_str("it vanished, perhaps to another host"),
            Self::Vanished(Some(error)) => write!(f, "it vanished, perhaps to another host: {error}"),
            Self::MovedAway => f.write_str("it moved to another host meanwhile"),
            Self::Unknown(error) => write!(f, "its state cannot be asked: {error}"),
            Self::Migrating => f.write_str("it is being migrated, and the migration cannot be ended: nothing was done"),
            Self::Orphan => f.write_str("libvirt does not know that it runs, and its process does not die"),
            Self::Left(left) => write!(f, "{left}"),
        }
    }
}

/// Puts an order's "off" before this host: it passes only if nothing of the domain lives here. What
/// libvirt has lost is killed. The "off" of a URI without a local driver passes unchecked: its
/// domains are no processes of this host. `had_orphans`: this order has killed some of that before.
/// `look`: a scan of this host that was made while libvirt was asked.
pub(super) async fn confirm(
    host: &Host,
    uri: &Uri,
    domain: &Identity,
    said: Result<Off, CallError>,
    look: Option<&Look>,
    had_orphans: bool,
    deadline: &Deadline,
) -> Result<Off, CallError> {
    let was = match &said {
        Ok(Off::Proven { was, .. }) => *was,
        Ok(Off::Already(_) | Off::Gone) => State::RUNNING,
        Ok(Off::MovedAway | Off::Unproven { .. }) | Err(_) => return said,
    };
    let Some(whom) = uri.table.whom(domain.uuid, &domain.name) else { return said };
    // It may be on its way here since that was said.
    if matches!(Job::on_record(whom.driver, &whom.name), Job::Leaving | Job::Arriving) {
        return Ok(Off::Unproven { was, why: Unproven::Migrating });
    }
    // Only a domain that nothing was done to. What was killed is looked for afterwards.
    let look = look.filter(|_| matches!(said, Ok(Off::Already(_))));
    Ok(match (host.clear(&whom, None, look, deadline, deadline.by() + CLEAR).await, said?) {
        (Err(left), _) => Off::Unproven { was, why: Unproven::Left(left) },
        // A domain that libvirt has lost can be started again only from a definition.
        (Ok(Cleared { at, killed }), Off::Already(_) | Off::Gone) if had_orphans || !killed.is_empty() => {
            Off::Proven { was, at, source: Source::Definition }
        }
        (Ok(Cleared { at, .. }), Off::Already(_)) => Off::Already(at),
        (Ok(Cleared { at, .. }), Off::Proven { source, .. }) => Off::Proven { was, at, source },
        (Ok(_), said) => said,
    })
}

/// A container's first process, held before libvirt destroys the container, for [`after_death`].
pub(super) fn first_process(uri: &Uri, domain: &Identity) -> Option<Arc<Victim>> {
    uri.table.driver.filter(|driver| *driver == Driver::Lxc)?;
    let known = uri.table.instance(domain.uuid).and_then(|instance| instance.living().cloned());
    known.or_else(|| Victim::open(Driver::Lxc, &domain.name, domain.uuid).ok().map(Arc::new))
}

/// An "off" passes only after the death of the container's first process. libvirt calls a container
/// off whose control group is empty. The kernel takes a process's memory and control group before
/// its death, so no scan sees whose it is.
pub(super) async fn after_death(
    said: Result<Off, CallError>,
    first: Option<&Victim>,
    deadline: &Deadline,
) -> Result<Off, CallError> {
    let was = match &said {
        Ok(Off::Proven { was, .. }) => *was,
        Ok(Off::Already(_)) => State::RUNNING,
        Ok(Off::Gone | Off::MovedAway | Off::Unproven { .. }) | Err(_) => return said,
    };
    let Some(first) = first else { return said };
    if !matches!(timeout_at(deadline.by() + CLEAR, first.death()).await, Ok(Ok(()))) {
        return Ok(Off::Unproven { was, why: Unproven::Left(Left::Undead(vec![first.pid()])) });
    }
    said.map(|off| match off {
        Off::Proven { was, source, .. } => Off::Proven { was, at: Moment::now(), source },
        Off::Already(_) => Off::Already(Moment::now()),
        off @ (Off::Gone | Off::MovedAway | Off::Unproven { .. }) => off,
    })
}
