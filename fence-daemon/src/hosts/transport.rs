//! What the daemons of several hosts speak through: a group with one total order of messages.
//!
//! [`super::corosync`] is the real one. Tests use one in memory.

use std::fmt;
use std::time::Duration;

use crate::clock::Moment;

/// One daemon of the group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Member {
    /// The node id of its host.
    pub node: u32,
    /// Its process, as its host numbers it.
    pub pid: u32,
}

impl fmt::Display for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "node {} process {}", self.node, self.pid)
    }
}

/// A host of the configured node list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostNode {
    /// Its node id.
    pub node: u32,
    /// Its name, which is also Pacemaker's name for it.
    pub name: Option<String>,
    /// Its first address.
    pub address: Option<String>,
}

impl fmt::Display for HostNode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name.as_ref().or(self.address.as_ref()) {
            Some(name) => write!(f, "{name} (node {})", self.node),
            None => write!(f, "node {}", self.node),
        }
    }
}

/// Why a member is in the group no more. No reason is a proof that its host is dead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Departure {
    /// It left.
    Itself,
    /// Its process ended, or its connection to corosync.
    ProcessEnded,
    /// Its host left the membership, or is cut off.
    HostLost,
    /// A reason that this version does not know.
    Other(u32),
}

impl fmt::Display for Departure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Itself => f.write_str("it left"),
            Self::ProcessEnded => f.write_str("its process or connection ended"),
            Self::HostLost => f.write_str("its host is lost or cut off"),
            Self::Other(reason) => write!(f, "reason {reason}"),
        }
    }
}

/// A software version: three numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Software(pub [u16; 3]);

impl Software {
    /// This program's.
    pub const OURS: Self = Self([
        number(env!("CARGO_PKG_VERSION_MAJOR")),
        number(env!("CARGO_PKG_VERSION_MINOR")),
        number(env!("CARGO_PKG_VERSION_PATCH")),
    ]);
}

const fn number(digits: &str) -> u16 {
    match u16::from_str_radix(digits, 10) {
        Ok(number) => number,
        Err(_) => 0,
    }
}

impl fmt::Display for Software {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self([major, minor, patch]) = self;
        write!(f, "{major}.{minor}.{patch}")
    }
}

/// How far another host's clock is ahead of ours, in milliseconds: the least and the most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClockGap {
    least: i64,
    most: i64,
}

impl ClockGap {
    /// A clock showed `theirs` when a message was sent. The message came when ours showed `ours`,
    /// both in milliseconds. It is no older than `age`.
    #[must_use]
    pub fn new(theirs: u64, ours: u64, age: Duration) -> Self {
        let millis = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
        let least = millis(theirs).saturating_sub(millis(ours));
        Self { least, most: least.saturating_add(i64::try_from(age.as_millis()).unwrap_or(i64::MAX)) }
    }

    /// How far it is ahead at least, or behind if negative. 0 if the clocks may be the same.
    #[must_use]
    pub fn ahead_ms(self) -> i64 {
        self.least.max(self.most.min(0))
    }
}

/// What a daemon tells of its host about each second. It is not signed: people read it, and no
/// decision rests on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vitals {
    /// Its version.
    pub software: Software,
    /// Its clock; `None` if nobody knows how old its word is.
    pub clock: Option<ClockGap>,
}

/// What happens in the group. Members and messages come in the group's one order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// This daemon joined. [`Event::Configured`], [`Event::Quorum`] and
    /// [`Event::Members`] come next. Nothing from before the join holds.
    Joined(Member),
    /// The connection is lost, and why: no members, no quorum, no messages until
    /// [`Event::Joined`].
    Lost(String),
    /// The hosts of the configured node list. An empty list means that it cannot be read or is
    /// incomplete: nobody then knows all hosts.
    Configured(Vec<HostNode>),
    /// A ring of corosync, which each change of hosts forms anew. No ring is left out.
    Quorum {
        /// Whether it has quorum. Without a quorum provider it never has.
        quorate: bool,
        /// The node ids of its hosts, with or without a daemon of ours.
        ring: Vec<u32>,
    },
    /// The members now, and those that left since the last time.
    Members {
        /// All of them; this daemon as well.
        all: Vec<Member>,
        /// The others that left, and why.
        left: Vec<(Member, Departure)>,
    },
    /// A message, also one's own.
    Message {
        /// The sender by corosync's word.
        from: Member,
        /// The message was sent at this moment or later, by this host's clock. `None`: nobody
        /// knows. A deadline of the sender counts from here.
        sent_after: Option<Moment>,
        /// What it sent.
        bytes: Vec<u8>,
    },
    /// A member's sign of life, about each second. Another host's has its vitals.
    Alive(Member, Option<Vitals>),
    /// This daemon, corosync or the network stood still so long. Messages around this event may
    /// have waited: their `sent_after` has it in account.
    Stalled(Duration),
    /// The members of `fence_virtd`'s group, whenever they change.
    Stock(Vec<Member>),
}

/// Why a message was not sent. It may have been sent all the same, except if it is too long.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SendError {
    /// The group cannot be reached.
    #[error("this host is not connected to the other hosts")]
    NotJoined,
    /// The group took no message until the deadline.
    #[error("the other hosts could not be asked in time")]
    Late,
    /// The message is longer than [`LONGEST`].
    #[error("the message is too long for the group")]
    TooLong,
}

/// The length of the longest message in bytes. corosync takes 1 MiB with its own headers.
pub const LONGEST: usize = 1_000_000;

/// A way to the group. Clones send to the same one, in the order of the calls.
pub trait Transport: Clone + Send + Sync + 'static {
    /// Sends to all members, this daemon as well, unless that fails until `by`. A success means
    /// that the message is on its way: it has arrived when it comes back.
    ///
    /// # Errors
    /// [`SendError`].
    fn send(&self, bytes: Vec<u8>, by: Moment) -> impl Future<Output = Result<(), SendError>> + Send;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clocks_differ_by_what_the_age_of_a_message_cannot_explain() {
        let gap = |theirs, ours, age| ClockGap::new(theirs, ours, Duration::from_millis(age)).ahead_ms();
        assert_eq!(gap(10_000, 10_000, 0), 0);
        // A second old, or a second behind: nobody knows.
        assert_eq!(gap(9_000, 10_000, 1_000), 0);
        assert_eq!(gap(9_000, 10_000, 400), -600);
        assert_eq!(gap(13_000, 10_000, 1_500), 3_000);
        assert_eq!(gap(u64::MAX, 0, u64::MAX), i64::MAX);
        assert_eq!(Software::OURS.to_string(), env!("CARGO_PKG_VERSION"));
    }
}
