//! The model's world: clients, the wire, the daemon, its disk, libvirt and one domain. Also all
//! that happens outside the daemon.

use super::intake::{Datagram, Sender};
use super::order::{Order, Plan};
use super::{Flaw, Scenario};
use fence_common::ledger::{Claim, Denial, Ledger, NoClaim, RequestId, Ticket};
use fence_common::replay_cache::ReplayCache;
use fence_common::wire::Op;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// A client with its one request.
pub(super) type Who = usize;
/// Where a client is answered, by the listener that hears it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Endpoint {
    /// A callback address and port: who listens there takes the connection.
    Callback(u8),
    /// The client's own connection, by tcp or vsock.
    Stream(u8),
    /// A domain's serial line, without a key: who reads there takes the answer.
    Line(u8),
}
/// A request that the daemon serves.
pub(super) type Number = u8;

/// One step of the clock, in nanoseconds. It is longer than a datagram may wait. Two are longer
/// than a claim is remembered.
const TICK: u64 = 6_000_000_000;

/// What a client does.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asks {
    pub(super) op: Op,
    /// The endpoints where it listens, one datagram for each.
    pub(super) endpoints: &'static [Endpoint],
    /// The client whose endpoint it takes over: it begins after that one is over.
    pub(super) follows: Option<Who>,
    /// The client whose endpoint it shares: it begins after that one was called back, or is over.
    pub(super) beside: Option<Who>,
    /// It accepts every callback, and retries after a lost connection. No stock client does.
    pub(super) insists: bool,
    /// The client whose request it copies: it has the key and has heard that request.
    pub(super) copies: Option<Who>,
    /// The groups deny its request.
    pub(super) denied: bool,
}

/// A client's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Client {
    Unborn,
    /// It listens and sends.
    Asking {
        sent_again: u8,
    },
    /// It was called back, and accepts no other callback.
    Talking(Number),
    /// It has its answer, or has lost the connection.
    Done,
    /// It was killed or has given up.
    Gone,
}

impl Client {
    pub(super) fn talks(&self) -> bool {
        matches!(self, Self::Talking(_))
    }
}

/// The result of an order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Outcome {
    pub(super) success: bool,
    /// The instance of the domain that the order was about.
    pub(super) instance: u8,
}

/// A request's state: the steps of the daemon's `pipeline.rs`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Step {
    /// The callback is under way.
    Calling(Ticket),
    /// A client has accepted the connection.
    Connected(Ticket, Who),
    /// The peer has authenticated at this time.
    Talking(Ticket, Who, u64),
    /// All that had arrived by then was read.
    Read(Ticket, Who, u64),
    Claimed(Claim, Who),
    Refused(Denial, Who),
    Acting(Claim, Who),
    /// Only with a flaw: it acts without a claim.
    Unclaimed(Ticket, Who, u64),
    Ended(Claim, Who, Outcome),
    /// All that had arrived by then was read.
    ReadAgain(Claim, Who, Outcome),
}

/// A request that is served.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Task {
    pub(super) who: Who,
    pub(super) endpoint: Endpoint,
    pub(super) listener: u8,
    /// An attacker without the key has sent it over a connection of its own.
    pub(super) is_repeated: bool,
    pub(super) step: Step,
}

/// The daemon's memory. A crash empties it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Daemon {
    /// One for all listeners. Only with a flaw there are more.
    ledgers: BTreeMap<u8, Ledger>,
    /// Likewise.
    replay_caches: BTreeMap<u8, ReplayCache>,
    pub(super) tasks: BTreeMap<Number, Task>,
    pub(super) next: Number,
    pub(super) orders: Vec<Order>,
    /// The holder of the domain's lock.
    pub(super) lock: Option<Number>,
    pub(super) pending: Option<Plan>,
}

impl Daemon {
    pub(super) fn ledger(&mut self, scenario: &Scenario, listener: u8) -> &mut Ledger {
        self.ledgers.entry(if scenario.works(Flaw::LedgerPerListener) { 0 } else { listener }).or_default()
    }

    pub(super) fn replay_cache(&mut self, scenario: &Scenario, listener: u8) -> &mut ReplayCache {
        self.replay_caches.entry(if scenario.works(Flaw::ReplayCachePerListener) { 0 } else { listener }).or_default()
    }

    /// Whether a request of this listener was superseded before its claim.
    pub(super) fn is_superseded(&self, listener: u8, ticket: &Ticket) -> bool {
        let ledger = self.ledgers.get(&listener).or_else(|| self.ledgers.get(&0));
        ledger.is_some_and(|ledger| ledger.is_moot(ticket) == Some(NoClaim::Superseded))
    }
}

/// The domain's process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Life {
    Alive,
    /// Killed, but still in the kernel.
    Dying,
    Dead,
}

/// How much of each trouble is still to come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Left {
    pub(super) crashes: u8,
    pub(super) faults: u8,
    pub(super) ticks: u8,
    pub(super) replays: u8,
    /// Datagrams that have their time but cannot be read yet.
    pub(super) late: u8,
}

impl Left {
    /// No trouble.
    pub(super) const NONE: Self = Self { crashes: 0, faults: 0, ticks: 0, replays: 0, late: 0 };
}

/// What the properties are about.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Observed {
    /// How often the execution of each request began.
    pub(super) acted: BTreeMap<Who, u8>,
    /// The instances that each request has killed.
    pub(super) killed: BTreeMap<Who, BTreeSet<u8>>,
    pub(super) replies: BTreeMap<Who, u8>,
    pub(super) successes: BTreeSet<Who>,
    pub(super) false_success: bool,
    pub(super) anothers_answer: bool,
    pub(super) anothers_word: bool,
    /// A client that waits got no answer although the daemon lived.
    pub(super) dropped: bool,
    /// The daemon started the domain after an off that is newer than every request to start it.
    pub(super) risen: bool,
    /// An off has succeeded, and nothing newer has begun.
    pub(super) kept_off: bool,
    /// A reboot has killed the domain. It is not started yet, nor its failure reported.
    pub(super) owed: bool,
    pub(super) started: bool,
    pub(super) inherited: bool,
    pub(super) superseded: bool,
    pub(super) gave_up: bool,
}

/// The whole state.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct World {
    pub(super) now: u8,
    /// Tells times of one tick apart. It grows with each authentication, and with each datagram if
    /// datagrams may be read in another order.
    pub(super) moment: u8,
    pub(super) clients: Vec<Client>,
    /// Arrived (with its time) but not read.
    pub(super) queue: VecDeque<(Datagram, u64)>,
    /// Arrived (with its time) but not readable yet. It may become readable before the next reply.
    pub(super) late: Option<(Datagram, u64)>,
    /// All datagrams ever sent: everybody on the segment has heard them.
    pub(super) heard: BTreeSet<Datagram>,
    /// Those that the daemon has read too, if that makes a difference.
    pub(super) taken: BTreeSet<Datagram>,
    pub(super) daemon: Option<Daemon>,
    /// The file of claims.
    pub(super) claims: Vec<RequestId>,
    /// The replay cache's file, while there is no daemon.
    pub(super) written: BTreeMap<u8, ReplayCache>,
    /// The record of a restart: the instance to be killed.
    pub(super) record: Option<u8>,
    pub(super) instance: u8,
    pub(super) life: Life,
    /// libvirt's destroy beside a kill, and the request that it belongs to.
    pub(super) destroy: Option<(Who, Number)>,
    pub(super) left: Left,
    pub(super) observed: Observed,
}

/// One event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Act {
    /// A client begins to listen and sends its datagrams.
    Begin(Who),
    SendAgain(Who, Endpoint),
    Die(Who),
    /// An attacker without the key repeats a datagram.
    Replay(Datagram),
    Tick,
    /// The last datagram cannot be read yet.
    Delay,
    /// It becomes readable.
    Surface,
    /// The daemon reads a datagram from its socket.
    Take,
    Connect(Number),
    Authenticate(Number),
    /// A newer request of the same endpoint ends the callback.
    Overtaken(Number),
    Read(Number),
    Claim(Number),
    Note(Number),
    /// An order's next step.
    Order(Number, How),
    /// The client's time is over: it is answered with failure, and the order goes on.
    Late(Number),
    ReadAgain(Number),
    Reply(Number),
    /// libvirt's destroy takes effect.
    Destroyed,
    Dies,
    Restart(How),
    Crash,
    Start,
}

/// The result of a libvirt call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum How {
    Well,
    /// An error, without an effect.
    Fails,
    /// An error, but with its effect.
    FailsLate,
}

impl World {
    pub(super) fn first(scenario: &Scenario) -> Self {
        Self {
            now: 0,
            moment: 0,
            clients: scenario.clients.iter().map(|_| Client::Unborn).collect(),
            queue: VecDeque::new(),
            late: None,
            heard: BTreeSet::new(),
            taken: BTreeSet::new(),
            daemon: Some(Daemon::default()),
            claims: Vec::new(),
            written: BTreeMap::new(),
            record: None,
            instance: 1,
            life: Life::Alive,
            destroy: None,
            left: scenario.troubles,
            observed: Observed::default(),
        }
    }

    pub(super) fn nanos(&self) -> u64 {
        1 + u64::from(self.now) * TICK + u64::from(self.moment)
    }

    /// The events that can happen outside the daemon.
    pub(super) fn outside(&self, scenario: &Scenario, acts: &mut Vec<Act>) {
        for (who, asks) in scenario.clients.iter().enumerate() {
            match self.clients[who] {
                Client::Unborn => {
                    let over = |before: Who| matches!(self.clients[before], Client::Done | Client::Gone);
                    let is_free = |endpoint: Who| over(endpoint) || self.clients[endpoint].talks();
                    if asks.follows.is_none_or(over) && asks.beside.is_none_or(is_free) {
                        acts.push(Act::Begin(who));
                    }
                }
                Client::Asking { sent_again } if sent_again < scenario.sends_again => {
                    let repeats = |endpoint: &Endpoint| asks.insists || matches!(endpoint, Endpoint::Callback(_));
                    let endpoints = asks.endpoints.iter().copied().filter(repeats);
                    acts.extend(endpoints.map(|endpoint| Act::SendAgain(who, endpoint)));
                }
                Client::Asking { .. } | Client::Talking(_) | Client::Done | Client::Gone => {}
            }
            let waits = matches!(self.clients[who], Client::Asking { .. } | Client::Talking(_));
            // Without a successor its death changes nothing that a lost connection does not.
            if waits && scenario.clients.iter().any(|other| [other.follows, other.beside].contains(&Some(who))) {
                acts.push(Act::Die(who));
            }
        }
        if self.left.replays > 0 && self.daemon.is_some() {
            let known = if scenario.repeats_lost { &self.heard } else { &self.taken };
            // All listeners share their memory, so the choice of one matters only with a flaw.
            let senders: &[Sender] = if scenario.works(Flaw::ReplayCachePerListener) {
                &[Sender::Attacker]
            } else {
                &[Sender::Attacker, Sender::AttackerElsewhere]
            };
            for &datagram in known.iter().filter(|datagram| !matches!(datagram.endpoint, Endpoint::Line(_))) {
                acts.extend(senders.iter().map(|&by| Act::Replay(Datagram { by, ..datagram })));
            }
        }
        if self.left.ticks > 0 {
            acts.push(Act::Tick);
        }
        if self.late.is_some() {
            acts.push(Act::Surface);
        } else if self.left.late > 0 && !self.queue.is_empty() {
            acts.push(Act::Delay);
        }
        if self.life == Life::Dying {
            acts.push(Act::Dies);
        }
        if self.destroy.is_some() {
            acts.push(Act::Destroyed);
        }
        match &self.daemon {
            Some(_) if self.left.crashes > 0 => acts.push(Act::Crash),
            Some(_) => {}
            None => acts.push(Act::Start),
        }
    }

    /// Carries out such an event.
    pub(super) fn happen_outside(&mut self, scenario: &Scenario, act: Act) {
        match act {
            Act::Begin(who) => {
                self.clients[who] = Client::Asking { sent_again: 0 };
                for &endpoint in scenario.clients[who].endpoints {
                    self.send(scenario, Datagram { who, endpoint, copy: 0, sent: self.now, by: Sender::Client });
                }
            }
            Act::SendAgain(who, endpoint) => {
                let Client::Asking { sent_again } = self.clients[who] else { return };
                let copy = sent_again + 1;
                self.clients[who] = Client::Asking { sent_again: copy };
                self.send(scenario, Datagram { who, endpoint, copy, sent: self.now, by: Sender::Client });
            }
            Act::Die(who) => self.clients[who] = Client::Gone,
            Act::Replay(datagram) => {
                self.left.replays -= 1;
                self.send(scenario, Datagram { sent: self.now, ..datagram });
            }
            Act::Tick => {
                self.left.ticks -= 1;
                self.now += 1;
            }
            Act::Delay => {
                self.left.late -= 1;
                self.late = self.queue.pop_back();
            }
            Act::Surface => self.queue.extend(self.late.take()),
            Act::Dies => self.life = Life::Dead,
            Act::Destroyed => {
                if let Some((who, number)) = self.destroy.take() {
                    if self.life == Life::Alive {
                        self.observed.killed.entry(who).or_default().insert(self.instance);
                    }
                    self.life = Life::Dead;
                    self.unlock(number);
                }
            }
            Act::Crash => self.crash(scenario),
            Act::Start => self.start(scenario),
            // The daemon's own steps.
            Act::Take | Act::Connect(_) | Act::Authenticate(_) | Act::Overtaken(_) | Act::Read(_) | Act::Claim(_) => {}
            Act::Note(_) | Act::Order(..) | Act::Late(_) | Act::ReadAgain(_) | Act::Reply(_) | Act::Restart(_) => {}
        }
    }

    /// SIGKILL: memory, connections and unread datagrams are lost; the files stay. libvirt's
    /// destroy has taken effect before, or never does: libvirtd drops the calls of a closed
    /// connection.
    fn crash(&mut self, scenario: &Scenario) {
        self.left.crashes -= 1;
        // Each datagram is written to the file before anything is done about it.
        self.written = self.daemon.take().map(|daemon| daemon.replay_caches).unwrap_or_default();
        self.queue.clear();
        self.late = None;
        self.destroy = None;
        for (client, asks) in self.clients.iter_mut().zip(scenario.clients) {
            let is_connected = asks.endpoints.iter().any(|endpoint| matches!(endpoint, Endpoint::Stream(_)));
            if client.talks() || (is_connected && matches!(client, Client::Asking { .. })) {
                *client = if asks.insists { Client::Asking { sent_again: 0 } } else { Client::Done };
            }
        }
    }

    /// The next daemon. It reads the files before it hears anything.
    fn start(&mut self, scenario: &Scenario) {
        let mut daemon = Daemon::default();
        let written = core::mem::take(&mut self.written);
        if scenario.works(Flaw::NoReplayCacheFile) {
            daemon.replay_caches = written;
        }
        if scenario.works(Flaw::NoClaimsFile) {
            for id in &self.claims {
                daemon.ledger(scenario, 0).remember(self.nanos(), *id);
            }
        }
        daemon.pending = self.record.map(|instance| Plan { instance, inherited: true, attempts: 0, started: false });
        self.observed.inherited |= daemon.pending.is_some();
        self.daemon = Some(daemon);
    }

    /// Closes a request's connection without an answer. Before the claim the peer may be another
    /// client than the requester, if another one asks there.
    pub(super) fn hang_up(&mut self, scenario: &Scenario, number: Number, task: &Task, peer: Who, claimed: bool) {
        if self.clients[peer] == Client::Talking(number) {
            self.clients[peer] = Client::Done;
            let others = scenario.clients.iter().zip(&self.clients).filter(|(asks, _)| asks.beside == Some(peer));
            let in_doubt = !claimed && others.into_iter().any(|(_, other)| *other != Client::Unborn);
            let waits = !scenario.clients[peer].insists && !scenario.clients[peer].denied;
            self.observed.dropped |= task.who == peer && waits && !in_doubt;
        }
    }
}
