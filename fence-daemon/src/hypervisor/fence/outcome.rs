//! What came of an order, for the client and for the log.

use std::fmt;
use std::sync::Arc;

use fence_common::wire::Reply;

use super::Unproven;
use crate::clock::Moment;
use crate::hypervisor::known::Identity;
use crate::hypervisor::libvirt::{CallError, State};

/// What came of an order.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The client's reply.
    pub reply: Reply,
    /// Since when the domain is known to be off; of [`Detail::Reset`], whose process lives on, when
    /// libvirt told that it was reset. Only with a successful off or reboot.
    pub proven_off: Option<Moment>,
    /// Why, for people.
    pub detail: Detail,
    /// The domain that was meant, if one was found.
    pub domain: Option<Identity>,
}

/// Why an order came out as it did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Detail {
    /// The operation is not about a domain.
    NotAboutADomain,
    /// Every URI positively says that there is no such domain.
    Unknown,
    /// No URI knows the domain, but this URI could not say.
    Doubt {
        /// The URI.
        uri: Arc<str>,
        /// Why it could not say.
        error: CallError,
    },
    /// This URI does not answer, and its last word is that the domain is active there.
    LastActive {
        /// The URI.
        uri: Arc<str>,
        /// Why it does not answer.
        error: CallError,
    },
    /// Active, as asked by `status`.
    Active(State),
    /// Off, as asked by `status`.
    ShutOff,
    /// `on`: it was active already.
    AlreadyActive(State),
    /// `on`: it was off and is active now.
    Started(State),
    /// `on`: libvirt started it without an error, but it is not active.
    NotActive,
    /// `off`, `reboot`: it was off already.
    AlreadyOff,
    /// `off`, `reboot`: this daemon has seen it die here before the order, with no migration under
    /// way.
    SeenDead,
    /// `off`: it was off after a reboot, whose pending restart is cancelled.
    RestartCancelled,
    /// `reboot`: it was off after another reboot, whose restart goes on.
    RestartPending,
    /// `off`: it was active and is proven off.
    Destroyed {
        /// What it was before.
        was: State,
    },
    /// `reboot`: it was active, is proven off, and is being started again.
    Rebooting {
        /// What it was before.
        was: State,
    },
    /// `reboot`: it was reset. Its process lives on.
    Reset,
    /// `reboot`: it was proven off and has been started again.
    Rebooted,
    /// `reboot`: it was proven off, and has not been started again in time.
    NotStartedAgain,
    /// It is off here because it moved to another host. Its state there is not known.
    MovedAway,
    /// `status`: it is on its way to or from another host.
    Migrating,
    /// It was there and then vanished before anything was done.
    Vanished,
    /// `off`, `reboot`: it was active, and is not proven off.
    NotProvenOff {
        /// What it was before.
        was: State,
        /// Why there is no proof.
        why: Unproven,
    },
    /// A call to a URI that knows the domain failed.
    Failed {
        /// The URI.
        uri: Arc<str>,
        /// Why.
        error: CallError,
    },
    /// `off`, `reboot`: the client is this domain, which is being fenced itself, or was after it
    /// had asked.
    Condemned(String),
    /// An earlier request for the same domain is not done yet.
    Occupied,
    /// The time for an answer is over. A call that was sent to libvirt stays in force.
    Late,
    /// A bug: the work ended without a result.
    Broken,
}

impl fmt::Display for Detail {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotAboutADomain => f.write_str("the operation is not about a domain"),
            Self::Unknown => f.write_str("no such domain"),
            Self::Doubt { uri, error } => write!(f, "not found, but {uri} could not say: {error}"),
            Self::LastActive { uri, error } => {
                write!(f, "it ran at {uri} by the last word from there, and now there is no answer: {error}")
            }
            Self::Active(state) => write!(f, "{state}"),
            Self::ShutOff => f.write_str("shut off"),
            Self::AlreadyActive(state) => write!(f, "already on ({state})"),
            Self::Started(state) => write!(f, "was off, started ({state})"),
            Self::NotActive => f.write_str("started, but it is not running"),
            Self::AlreadyOff => f.write_str("already off"),
            Self::SeenDead => f.write_str("already off, it has died here"),
            Self::RestartCancelled => f.write_str("already off, pending restart cancelled"),
            Self::RestartPending => f.write_str("already off, its restart is under way"),
            Self::Destroyed { was } => write!(f, "was {was}, destroyed"),
            Self::Rebooting { was } => write!(f, "was {was}, destroyed, starting again"),
            Self::Reset => f.write_str("reset"),
            Self::Rebooted => f.write_str("destroyed and started again"),
            Self::NotStartedAgain => f.write_str("destroyed, but not started again in time; the daemon goes on trying"),
            Self::MovedAway => f.write_str("it has moved to another host, its state there is not known"),
            Self::Migrating => f.write_str("it is being migrated, the other host has to say"),
            Self::Vanished => f.write_str("the domain vanished before anything was done"),
            Self::NotProvenOff { was, why } => write!(f, "was {was}, not proven off: {why}"),
            Self::Failed { uri, error } => write!(f, "{uri}: {error}"),
            Self::Condemned(client) => {
                let client = client.escape_debug();
                write!(f, "nothing was done: the client is {client}, which is being fenced itself (a fence race)")
            }
            Self::Occupied => f.write_str("an earlier request for this domain is not done yet"),
            Self::Late => f.write_str("no result in time; a call that was sent to libvirt stays in force"),
            Self::Broken => f.write_str("the work ended without a result; this is a bug"),
        }
    }
}

impl Outcome {
    /// Whether the domain's guest ran on this host and is dead now: it was killed or reset, was
    /// seen to die, or waits for the restart that follows its kill.
    #[must_use]
    pub fn has_died(&self) -> bool {
        let dead = matches!(
            self.detail,
            Detail::Destroyed { .. }
                | Detail::Rebooting { .. }
                | Detail::Reset
                | Detail::Rebooted
                | Detail::SeenDead
                | Detail::RestartCancelled
                | Detail::RestartPending
        );
        dead && self.reply == Reply::Success
    }

    /// Whether a failed `off` or `reboot` may have killed the domain all the same: what was begun
    /// is not proven, or goes on.
    #[must_use]
    pub fn may_have_killed(&self) -> bool {
        let is_unproven = matches!(&self.detail, Detail::NotProvenOff { why, .. } if *why != Unproven::Migrating);
        let is_lost = matches!(&self.detail, Detail::Failed { error: CallError::Lost(_) | CallError::Overdue, .. });
        let goes_on = matches!(self.detail, Detail::NotStartedAgain | Detail::Late | Detail::Broken);
        (is_unproven || is_lost || goes_on) && self.reply == Reply::Failure
    }

    /// A failure, for `detail`.
    pub(crate) fn failure(detail: Detail) -> Self {
        Self { reply: Reply::Failure, proven_off: None, detail, domain: None }
    }

    /// A reply about the domain's state as it was found.
    pub(super) fn found(reply: Reply, detail: Detail) -> Self {
        Self { reply, proven_off: None, detail, domain: None }
    }

    /// Off is proven since `at`, or the domain was reset then.
    pub(super) fn off(at: Moment, detail: Detail) -> Self {
        Self { reply: Reply::Success, proven_off: Some(at), detail, domain: None }
    }

    /// The same about a certain domain.
    pub(super) fn about(self, domain: Identity) -> Self {
        Self { domain: Some(domain), ..self }
    }
}
