//! One host's part in the group of hosts: which of them runs a domain, who fences it, and when it
//! counts as off everywhere.
//!
//! A state machine without sockets and clock. corosync's closed process group brings messages in
//! one total order, membership and quorum. [`Hosts`] takes them as inputs, and its [`Output`]s say
//! what to send and to do. `docs/design/cluster-backend.md` has the rules and their reasons.
//!
//! * `message`: the bytes, signed with the shared key.
//! * `election`: which host calls a client back: the first [`Message::Claim`] in the total order.
//! * `coordinator`: the host that has the client. It asks all hosts, and judges their words.
//! * `duty`: every host's part in a question: look, act once, say.
//! * `races`: two guests that fence each other from two hosts.
//! * `records`: what each host said last, and whether it is proven fenced.
//!
//! # Once
//!
//! A host acts at most once per [`RequestId`](crate::ledger::RequestId), whichever daemon asks: the
//! coordinator may die, and the next one asks with the same request.
//!
//! # The coordinator's own domain
//!
//! A host that coordinates an `off`, and runs the domain, looks and acts at once, in parallel with
//! its question. Its act needs no consent of others: the client is authorized, and each host acts
//! once. The answer still waits for all hosts. A `reboot` waits until the host hears its own word,
//! since only the first of two hosts that run a domain starts it again.

mod answer;
mod codec;
mod coordinator;
mod duty;
mod election;
mod inputs;
mod message;
mod outputs;
mod races;
mod records;
mod sign;
mod testimony;

use alloc::collections::{BTreeMap, BTreeSet, VecDeque};
use alloc::string::{String, ToString as _};
use alloc::vec::Vec;
use core::fmt;
use core::time::Duration;

use uuid::Uuid;

pub use self::answer::{GroupAnswer, HostList, HostNames, NoAnswer};
pub use self::inputs::{
    ActEnd, BOOT, ConfiguredHost, GuestAddress, HostDomain, HostsOptions, HostsRule, Incarnation, LocalState, Look,
    Member, NodeId, Question, STAYS_OFF,
};
pub use self::message::{Envelope, HEADER_LEN, MAGIC, MESSAGE_MAX, Message, NoMessage, QuestionId, VERSION, Word};
pub use self::outputs::{GroupNote, GroupOrder, GroupView, HostView, Output};
pub use self::sign::{SIGNATURE_LEN, signature};

use self::duty::Duties;
use self::election::Elections;
use self::records::Records;
use self::testimony::Asked;
use crate::keys::Keys;

/// How often the daemon is asked for the proof that a host is fenced.
const FENCING_EVERY: u64 = 1_000_000_000;

/// How many incarnations of daemons are remembered, so that no message of theirs counts twice.
const INCARNATIONS_MAX: usize = 4096;

/// A member that is there.
#[derive(Clone, Debug, Default)]
struct Presence {
    /// The epoch of its joining.
    since: u64,
    incarnation: Option<Incarnation>,
    trouble: Option<NoMessage>,
}

/// The state machine. `now` is nanoseconds on any clock that never runs backwards.
pub struct Hosts {
    me: Member,
    incarnation: Incarnation,
    keys: Keys,
    options: HostsOptions,
    counter: u64,
    next: u64,
    is_quorate: bool,
    /// The hosts that corosync sees, with or without our daemon.
    ring: BTreeSet<NodeId>,
    /// Since when each of corosync's rings was seen.
    rings_since: Option<u64>,
    configured: BTreeMap<NodeId, String>,
    members: BTreeMap<Member, Presence>,
    /// The last counter of each incarnation, and when it was heard.
    counters: BTreeMap<Incarnation, (u64, u64)>,
    records: Records,
    /// How many messages were delivered: a place in the total order.
    position: u64,
    /// How often the members changed, or messages were lost.
    epoch: u64,
    /// This host's domains as the other hosts heard of them last.
    told: Option<BTreeMap<Uuid, HostDomain>>,
    domains: BTreeMap<Uuid, HostDomain>,
    addresses: Vec<GuestAddress>,
    asked: BTreeMap<u64, Asked>,
    duties: Duties,
    elections: Elections,
    outputs: VecDeque<Output>,
}

impl fmt::Debug for Hosts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hosts")
            .field("me", &self.me)
            .field("is_quorate", &self.is_quorate)
            .field("members", &self.members)
            .field("asked", &self.asked)
            .field("duties", &self.duties)
            .finish_non_exhaustive()
    }
}

impl Hosts {
    /// A daemon that has not joined the group yet. `incarnation` must be random: it tells this life
    /// of the daemon from all others.
    #[must_use]
    pub fn new(me: Member, incarnation: Incarnation, keys: Keys, options: HostsOptions) -> Self {
        Self {
            me,
            incarnation,
            keys,
            options,
            counter: 0,
            next: 0,
            is_quorate: false,
            ring: BTreeSet::new(),
            rings_since: None,
            configured: BTreeMap::new(),
            members: BTreeMap::new(),
            counters: BTreeMap::new(),
            records: Records::default(),
            position: 0,
            epoch: 0,
            told: None,
            domains: BTreeMap::new(),
            addresses: Vec::new(),
            asked: BTreeMap::new(),
            duties: Duties::default(),
            elections: Elections::default(),
            outputs: VecDeque::new(),
        }
    }

    /// The next thing to do. Call it after each input until there is none.
    pub fn poll(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// When to call [`Hosts::tick`], at the latest.
    #[must_use]
    pub fn wake(&self) -> Option<u64> {
        let questions = self.asked.values().map(Asked::wake).min();
        [questions, self.duties.wake(), self.elections.wake()].into_iter().flatten().min()
    }

    /// Time has passed.
    pub fn tick(&mut self, now: u64) {
        self.duties.expire(now);
        self.go_on(now);
        self.elections.expire(now);
        self.judge_all(now);
    }

    /// The accepted keys have changed. The first one signs.
    pub fn set_keys(&mut self, keys: Keys) {
        self.keys = keys;
    }

    /// The hosts of corosync's node list. A host that was removed counts in open questions still.
    pub fn configured(&mut self, now: u64, hosts: impl IntoIterator<Item = ConfiguredHost>) {
        self.configured = hosts.into_iter().map(|host| (host.node, host.name)).collect();
        self.judge_all(now);
    }

    /// Whether this host has quorum, and the hosts of corosync's ring. Call it for each ring: a
    /// host that has been in one since it was fenced is not dead.
    pub fn quorum(&mut self, now: u64, is_quorate: bool, ring: &[NodeId]) {
        self.is_quorate = is_quorate;
        self.ring = ring.iter().copied().collect();
        self.rings_since.get_or_insert(now);
        for &node in ring {
            self.records.in_ring(now, node);
        }
        self.judge_all(now);
    }

    /// The members of the group now, this daemon included once it has joined.
    pub fn membership(&mut self, now: u64, members: &[Member]) {
        let left: Vec<_> = self.members.keys().filter(|member| !members.contains(member)).copied().collect();
        let joined: Vec<_> = members.iter().filter(|member| !self.members.contains_key(member)).copied().collect();
        if left.is_empty() && joined.is_empty() {
            return;
        }
        self.epoch += 1;
        for member in left {
            let incarnation = self.members.remove(&member).and_then(|one| one.incarnation);
            self.duties.races.left(now, member, incarnation);
            self.outputs.push_back(Output::Note(GroupNote::Left(member)));
        }
        for &member in &joined {
            self.members.insert(member, Presence { since: self.epoch, ..Presence::default() });
            self.records.heard(now, member.node);
            self.outputs.push_back(Output::Note(GroupNote::Joined(member)));
        }
        if !self.is_joined() {
            return self.alone(now, &NoAnswer::NotJoined);
        }
        if !joined.is_empty() {
            self.hello(false, true);
        }
        self.take_over(now);
        self.go_on(now);
        self.judge_all(now);
    }

    /// corosync is down, or this daemon is not in the group any more.
    pub fn disconnected(&mut self, now: u64) {
        self.epoch += 1;
        self.members.clear();
        self.ring.clear();
        self.rings_since = None;
        self.is_quorate = false;
        self.alone(now, &NoAnswer::NotJoined);
    }

    /// This daemon stood still, and the driver has dropped what had waited for it meanwhile.
    pub fn stalled(&mut self, now: u64) {
        self.epoch += 1;
        self.alone(now, &NoAnswer::Stalled);
        if self.is_joined() {
            self.hello(true, true);
        }
    }

    /// Ends everything that needs an unbroken order of messages.
    fn alone(&mut self, now: u64, reason: &NoAnswer) {
        self.told = None;
        let open: Vec<_> = self.asked.keys().copied().collect();
        for question in open {
            self.answer(question, GroupAnswer::Failure(reason.clone()));
        }
        self.duties.forget();
        for request in self.elections.forget(now, self.me) {
            self.outputs.push_back(Output::CallBack { request, is_certain: false });
        }
    }

    /// A message was delivered in the total order; this daemon's own are, too.
    ///
    /// `sent_after` is a moment before it was sent, by this host's clock. A question's time runs
    /// from then on. `None` if that is unknown: then a question is too old.
    pub fn message(&mut self, now: u64, from: Member, sent_after: Option<u64>, bytes: &[u8]) {
        self.position += 1;
        let Some(presence) = self.members.get_mut(&from) else { return };
        let envelope = match Envelope::open(bytes, from, &self.keys) {
            Ok(envelope) => envelope,
            Err(trouble) => {
                if presence.trouble != Some(trouble) {
                    presence.trouble = Some(trouble);
                    self.outputs.push_back(Output::Note(GroupNote::Foreign(from, trouble)));
                }
                return self.judge_all(now);
            }
        };
        let Envelope { incarnation, counter, message, .. } = envelope;
        if *presence.incarnation.get_or_insert(incarnation) != incarnation {
            return;
        }
        let (last, heard) = self.counters.entry(incarnation).or_default();
        if *last >= counter {
            return;
        }
        (*last, *heard) = (counter, now);
        presence.trouble = None;
        self.records.heard(now, from.node);
        self.forget_incarnations();
        match message {
            Message::Hello { wants_all, is_complete, domains } => {
                let present: Vec<_> = self.pids(from.node).collect();
                self.records.told(now, from, is_complete, domains, &present);
                if wants_all && from != self.me {
                    self.hello(false, true);
                }
            }
            Message::Claim { request, takes_over } => self.claimed(now, from, request, takes_over),
            Message::Over { request, reached } => self.over(now, from, request, reached),
            Message::Ask { .. } => self.asked_by(now, from, incarnation, sent_after.unwrap_or_default(), message),
            Message::Say { to, round, word, changes, uuid, name } => {
                self.duties.races.said(now, (from, incarnation), to, &word, (uuid, name.as_deref()));
                self.said_to_run(from, &word, uuid, name.as_deref());
                self.said_to_all(now, from, to, &word);
                self.go_on(now);
                if to.incarnation == self.incarnation {
                    self.said_to_me(from, to.number, round, word, changes, uuid, name);
                }
            }
            Message::Start { number, round, starter, uuid, name } => {
                self.start(now, QuestionId { incarnation, number }, round, starter, uuid, name);
            }
            Message::Ready { to } => self.ready(now, from, to),
            Message::Addresses { guests } => self.records.addresses(now, from, guests),
            Message::Answered { request } => {
                self.duties.races.over(&request);
                self.go_on(now);
            }
        }
        self.judge_all(now);
    }

    /// Forgets the incarnations that were heard longest ago, if there are too many.
    fn forget_incarnations(&mut self) {
        if self.counters.len() > INCARNATIONS_MAX
            && let Some((&oldest, _)) = self.counters.iter().min_by_key(|(_, (_, heard))| *heard)
        {
            self.counters.remove(&oldest);
        }
    }

    /// All domains of this host, as they are now. Call it on each change.
    pub fn domains(&mut self, domains: impl IntoIterator<Item = HostDomain>) {
        self.domains = domains.into_iter().map(|domain| (domain.uuid, domain)).collect();
        if self.is_joined() {
            self.hello(false, false);
        }
    }

    /// The Ethernet addresses of all machines that run on this host. Call it on each change.
    pub fn addresses(&mut self, guests: Vec<GuestAddress>) {
        self.addresses = guests;
        if self.is_joined() {
            self.send(Message::Addresses { guests: self.addresses.clone() });
        }
    }

    /// Tells of this host's domains: of all, or of those that have changed.
    fn hello(&mut self, wants_all: bool, tells_all: bool) {
        let told = self.told.replace(self.domains.clone()).filter(|_| !tells_all);
        let is_complete = told.is_none();
        let told = told.unwrap_or_default();
        let changed = self.domains.values().filter(|domain| told.get(&domain.uuid) != Some(domain)).cloned();
        let gone = told.values().filter(|domain| !self.domains.contains_key(&domain.uuid));
        let gone = gone.map(|domain| HostDomain { state: message::GONE, ..domain.clone() });
        let domains: Vec<_> = changed.chain(gone).collect();
        if is_complete || !domains.is_empty() {
            self.send(Message::Hello { wants_all, is_complete, domains });
        }
        if tells_all && !self.addresses.is_empty() {
            self.send(Message::Addresses { guests: self.addresses.clone() });
        }
    }

    /// Whether this daemon is in the group.
    #[must_use]
    pub fn is_joined(&self) -> bool {
        self.members.contains_key(&self.me)
    }

    /// Whether each configured host has a daemon here that is understood, with quorum.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.is_joined()
            && self.is_quorate
            && self.members.values().all(|one| one.incarnation.is_some() && one.trouble.is_none())
            && self.configured.keys().all(|node| self.is_present(*node))
    }

    /// Whether a rule holds: always, except in tests.
    #[cfg(feature = "model")]
    fn holds(&self, rule: HostsRule) -> bool {
        self.options.dangerous_broken != Some(rule)
    }

    /// Whether a rule holds: always.
    #[cfg(not(feature = "model"))]
    #[expect(clippy::unused_self, reason = "a test's variant needs it")]
    const fn holds(&self, _rule: HostsRule) -> bool {
        true
    }

    fn is_present(&self, node: NodeId) -> bool {
        self.members.keys().any(|member| member.node == node)
    }

    fn pids(&self, node: NodeId) -> impl Iterator<Item = u32> + '_ {
        self.members.keys().filter(move |member| member.node == node).map(|member| member.pid)
    }

    /// A host's name for people.
    fn name(&self, node: NodeId) -> String {
        self.configured.get(&node).cloned().unwrap_or_else(|| node.to_string())
    }

    fn names(&self, nodes: impl IntoIterator<Item = NodeId>) -> HostNames {
        let nodes: BTreeSet<_> = nodes.into_iter().collect();
        HostNames(nodes.into_iter().map(|node| self.name(node)).collect())
    }

    /// A number that was not used before.
    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    fn send(&mut self, message: Message) {
        self.counter += 1;
        let envelope = Envelope { from: self.me, incarnation: self.incarnation, counter: self.counter, message };
        if let Some(key) = self.keys.first() {
            self.outputs.push_back(Output::Send(envelope.seal(key)));
        }
    }
}

/// A duration in nanoseconds.
fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
