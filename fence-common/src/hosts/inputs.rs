//! What the group hears of: hosts, domains, questions, and what this host has found and done.

use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;
use core::time::Duration;

use uuid::Uuid;

use super::message::GONE;
use crate::caller::Vouched;
use crate::domain_state;
use crate::ledger::RequestId;
use crate::target::Target;
use crate::wire::Op;

/// How long a fencing counts as proof that ends with the host switched on, as a reboot does. A host
/// takes longer until its domains can run again.
pub const BOOT: Duration = Duration::from_secs(5);

/// How long a fencing counts as proof that leaves the host off, while no ring of corosync has it.
pub const STAYS_OFF: Duration = Duration::from_secs(3600);

/// A host's number in corosync's node list.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(pub u32);

/// A member of the group, as corosync names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Member {
    /// Its host.
    pub node: NodeId,
    /// The daemon's process ID there.
    pub pid: u32,
}

/// One life of a daemon: random bytes from its start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Incarnation(pub [u8; 16]);

/// A host of corosync's node list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfiguredHost {
    /// Its number.
    pub node: NodeId,
    /// Its name, for people.
    pub name: String,
}

/// A domain as a host tells of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostDomain {
    /// Its UUID.
    pub uuid: Uuid,
    /// Its name. Only the first 255 bytes are sent.
    pub name: String,
    /// libvirt's number for its state ([`domain_state`]).
    pub state: u8,
}

impl HostDomain {
    /// Whether it has a process there. Every doubt counts as yes.
    #[must_use]
    pub fn runs(&self) -> bool {
        self.state != domain_state::SHUT_OFF && self.state != GONE
    }
}

/// The Ethernet address of a machine that runs on a host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestAddress {
    /// The address.
    pub mac: [u8; 6],
    /// The machine.
    pub guest: Vouched,
}

/// A rule of the group. The simulation breaks each on purpose, and sees that it is missed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostsRule {
    /// Every member that is there must speak.
    AllSpeak,
    /// A configured host that is not there must be proven fenced.
    AbsentFenced,
    /// The hosts are asked until two rounds say the same.
    TwoRounds,
    /// A doubt is a failure.
    DoubtFails,
    /// The owner's proof is waited for.
    ProofAwaited,
    /// A host acts once per request.
    ActsOnce,
    /// A fencing that ends with a reboot counts for some seconds only.
    BootLimited,
    /// A fencing proves nothing of a host that was heard since.
    HeardRefutes,
    /// A fencing proves nothing of a host that corosync has seen since.
    RingRefutes,
    /// A host that was left off counts as dead for long only if each ring since was seen.
    RingsSeen,
    /// A host that was left off counts as dead for long only if the history has just said so.
    HistoryFresh,
    /// Of two orders to start a domain the first one counts.
    FirstStart,
    /// No start begins if the members have changed since the question.
    SameMembers,
    /// Of two hosts that run the domain of a reboot only the first one starts it again.
    FirstReboot,
    /// A host that has missed the first round of a reboot cannot know which host is the first one.
    WholeReboot,
    /// The order of a client that is being fenced waits for the end of that fence.
    VictimWaits,
    /// A fence has not ended while a host may still act on it.
    SilentMayAct,
    /// A victim that was killed without a proof is no client either.
    KilledIsDead,
    /// A client is known by its address also after its death.
    DeadAreKnown,
    /// What a look saw before a start does not count after it.
    StartHidesLook,
    /// Only a daemon that is there answers for another one of its host.
    PresentCovers,
    /// A copy that is on its way in by migration does not run here.
    ArrivalsWait,
    /// An act that has killed nothing proves nothing, nor does one on what may be such a copy.
    GoneIsNoProof,
    /// What this host does before it hears its own question comes before all that it hears later.
    BegunFirst,
    /// Without quorum nobody acts.
    Quorum,
}

/// What differs between groups.
#[derive(Clone, Copy, Debug)]
pub struct HostsOptions {
    /// Whether the daemon can find out that a host was fenced. If not, a question that needs that
    /// proof fails at once.
    pub has_fencing: bool,
    /// See [`BOOT`].
    pub boot: Duration,
    /// See [`STAYS_OFF`].
    pub stays_off: Duration,
    /// A rule that does not hold.
    #[cfg(feature = "model")]
    pub dangerous_broken: Option<HostsRule>,
}

impl Default for HostsOptions {
    fn default() -> Self {
        Self {
            has_fencing: false,
            boot: BOOT,
            stays_off: STAYS_OFF,
            #[cfg(feature = "model")]
            dangerous_broken: None,
        }
    }
}

/// A question of this host to all, on behalf of an authorized client.
#[derive(Clone, Debug)]
pub struct Question {
    /// The client's request.
    pub request: RequestId,
    /// Its operation.
    pub op: Op,
    /// The domain. `None` for operations without one.
    pub target: Option<Target>,
    /// The domain of this host that the client runs in, if it is known.
    pub client: Option<Vouched>,
    /// The client's Ethernet addresses, where its domain is not known here. Those of another host's
    /// machine tell it.
    pub macs: Vec<[u8; 6]>,
    /// How long ago the client asked.
    pub age: Duration,
    /// How long the client waits for the answer.
    pub left: Duration,
}

/// What a domain is to this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LocalState {
    /// It runs here, is being started here, or this host owes it a restart after a reboot.
    RunsHere,
    /// It is on its way in by migration. As long as that lasts it runs on another host: the
    /// migration may fail, and nothing here proves its death.
    Arriving,
    /// It is active here, and nobody can tell whether it is still on its way in. This host may kill
    /// what there is. That proves nothing: its source may go on with it.
    MayBeArriving,
    /// It is defined here, and does not run here.
    DefinedHere,
    /// It is not known here.
    NotHere,
    /// This host does not know, and why: libvirt is silent, an orphan, a migration that
    /// does not end.
    CannotTell(String),
}

/// What this host finds when it looks for a domain.
#[derive(Clone, Debug)]
pub struct Look {
    /// What the domain is to this host.
    pub state: LocalState,
    /// Its UUID, if it is known here.
    pub uuid: Option<Uuid>,
    /// Its name, if it is known here.
    pub name: Option<String>,
    /// How often the domain has appeared here, by a start or a migration. The start that a reboot
    /// of our own owes does not count. Too many are safe, too few are not.
    pub changes: u64,
}

/// How an act ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ActEnd {
    /// Nothing of the domain lives on this host, and nothing has left it alive. A reboot by reset
    /// ends so, too: its guest is dead, and its process lives on.
    ProvenOff,
    /// Nothing of the domain lives on this host, and nothing of it has died here by the act: it may
    /// live where it came from, or where it went. The word of all hosts decides.
    Gone,
    /// It was started.
    Done,
    /// It failed, and nothing was done to the domain.
    Failed(String),
    /// It failed, and the domain may be dead: it was killed, or may have been, without a proof.
    Unproven(String),
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "node {}", self.0)
    }
}
