//! What the model is made of: clients, the wire, the daemon, its disk, libvirt and one domain; and what happens outside the daemon.

use super::Scenario;
use super::intake::Datagram;
use super::order::{Order, Plan};
use crate::ledger::{Claim, Denial, Ledger, RequestId, Ticket};
use crate::replay_cache::ReplayCache;
use crate::wire::Op;
use alloc::collections::{BTreeMap, BTreeSet, VecDeque};
use alloc::vec::Vec;

/// A client, and the one request that it makes.
pub(super) type Who = usize;
/// A call-back address and port.
pub(super) type Endpoint = u8;
/// A request that the daemon serves.
pub(super) type Number = u8;

/// What the clock goes on by at a time: longer than a datagram may wait, and two of them longer than a claim is remembered.
const TICK: u64 = 6_000_000_000;

/// What a client does with its life.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asks {
    pub(super) op: Op,
    /// Where it listens; a datagram names each of them.
    pub(super) endpoints: &'static [Endpoint],
    /// Whose endpoint it takes: it begins when that one is over.
    pub(super) follows: Option<Who>,
    /// Whose endpoint it shares: it begins when that one has taken its call-back, or is over.
    pub(super) beside: Option<Who>,
    /// It takes every call-back, and asks on when a connection is lost: no stock client does.
    pub(super) insists: bool,
    /// Whose request it sends as its own: it has the key, and has heard that request.
    pub(super) copies: Option<Who>,
    /// The groups deny what it asks.
    pub(super) denied: bool,
}

/// Where a client is in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Client {
    Unborn,
    /// Listens and sends.
    Asking {
        sent_again: u8,
    },
    /// Has taken a call-back: it takes no other.
    Talking(Number),
    /// Has its answer, or has lost the connection.
    Done,
    /// Was killed or has given up.
    Gone,
}

impl Client {
    pub(super) fn talks(&self) -> bool {
        matches!(self, Self::Talking(_))
    }
}

/// What an order came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Outcome {
    pub(super) success: bool,
    /// The instance that the order was about.
    pub(super) instance: u8,
}

/// How far a request is: the steps of the daemon's `pipeline.rs`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Step {
    /// It is being called back.
    Calling(Ticket),
    /// Somebody has taken the connection.
    Connected(Ticket, Who),
    /// The peer has authenticated, at this time.
    Talking(Ticket, Who, u64),
    /// What had arrived by then was taken in.
    Read(Ticket, Who, u64),
    Claimed(Claim, Who),
    Refused(Denial, Who),
    Acting(Claim, Who),
    /// Only where the model is broken: it acts and has no claim.
    Unclaimed(Ticket, Who, u64),
    Ended(Claim, Who, Outcome),
    /// What had arrived by then was taken in.
    ReadAgain(Claim, Who, Outcome),
}

/// A request that is served.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Task {
    pub(super) who: Who,
    pub(super) endpoint: Endpoint,
    pub(super) step: Step,
}

/// The daemon's memory: a crash empties it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Daemon {
    pub(super) ledger: Ledger,
    pub(super) replay_cache: ReplayCache,
    pub(super) tasks: BTreeMap<Number, Task>,
    pub(super) next: Number,
    pub(super) orders: Vec<Order>,
    /// Who holds the domain's lock.
    pub(super) lock: Option<Number>,
    pub(super) pending: Option<Plan>,
}

/// The domain's process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Life {
    Alive,
    /// Killed, and the kernel has not done with it.
    Dying,
    Dead,
}

/// What there is of each trouble still to come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Left {
    pub(super) crashes: u8,
    pub(super) faults: u8,
    pub(super) ticks: u8,
    pub(super) replays: u8,
    /// Datagrams that have their time and cannot be read yet.
    pub(super) late: u8,
}

impl Left {
    /// No trouble.
    pub(super) const NONE: Self = Self { crashes: 0, faults: 0, ticks: 0, replays: 0, late: 0 };
}

/// What the properties are about.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Observed {
    /// How often each request was begun to be carried out.
    pub(super) acted: BTreeMap<Who, u8>,
    /// Which instances each request has killed.
    pub(super) killed: BTreeMap<Who, BTreeSet<u8>>,
    pub(super) replies: BTreeMap<Who, u8>,
    pub(super) successes: BTreeSet<Who>,
    pub(super) false_success: bool,
    pub(super) anothers_answer: bool,
    pub(super) anothers_word: bool,
    /// Somebody who waits was left without an answer, and the daemon lived.
    pub(super) dropped: bool,
    /// The domain was started by us after an off that is newer than all that would want it.
    pub(super) risen: bool,
    /// An off has gone through, and nothing newer has begun.
    pub(super) kept_off: bool,
    /// A reboot has killed, and the domain was not started yet, nor its failure told.
    pub(super) owed: bool,
    pub(super) started: bool,
    pub(super) inherited: bool,
    pub(super) superseded: bool,
    pub(super) gave_up: bool,
}

/// Everything.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct World {
    pub(super) now: u8,
    /// What tells times of one tick apart: it goes on with each authentication, and with each datagram where they may be read in another order.
    pub(super) moment: u8,
    pub(super) clients: Vec<Client>,
    /// Arrived, when, and not read.
    pub(super) queue: VecDeque<(Datagram, u64)>,
    /// Arrived, when, and cannot be read yet. It can be before the next reply.
    pub(super) late: Option<(Datagram, u64)>,
    /// All that was ever sent: everybody on the segment has heard it.
    pub(super) heard: BTreeSet<Datagram>,
    /// Those of them that the daemon has heard, too, where that makes a difference.
    pub(super) taken: BTreeSet<Datagram>,
    pub(super) daemon: Option<Daemon>,
    /// The file of claims.
    pub(super) claims: Vec<RequestId>,
    /// The file of datagrams, while there is no daemon.
    pub(super) written: ReplayCache,
    /// The record of a restart: the instance that was to be killed.
    pub(super) record: Option<u8>,
    pub(super) instance: u8,
    pub(super) life: Life,
    /// libvirt's destroy beside a kill, for whose request.
    pub(super) destroy: Option<(Who, Number)>,
    pub(super) left: Left,
    pub(super) observed: Observed,
}

/// One thing that happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Act {
    /// A client begins to listen and sends its datagrams.
    Begin(Who),
    SendAgain(Who, Endpoint),
    Die(Who),
    /// Somebody without the key sends what was heard.
    Replay(Datagram),
    Tick,
    /// The datagram that came last cannot be read yet.
    Delay,
    /// It can.
    Surface,
    /// The daemon takes a datagram from its socket.
    Take,
    Connect(Number),
    Authenticate(Number),
    /// The call-back ends because something newer came from its endpoint.
    Overtaken(Number),
    Read(Number),
    Claim(Number),
    Note(Number),
    /// The order's next step.
    Order(Number, How),
    /// The client is told of a failure, as its time is over; the order goes on.
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

/// What libvirt makes of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum How {
    Well,
    /// An error, and nothing was done.
    Fails,
    /// An error, and it was done.
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
            written: ReplayCache::default(),
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

    /// What can happen outside the daemon.
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
                    acts.extend(asks.endpoints.iter().map(|&endpoint| Act::SendAgain(who, endpoint)));
                }
                Client::Asking { .. } | Client::Talking(_) | Client::Done | Client::Gone => {}
            }
            let waits = matches!(self.clients[who], Client::Asking { .. } | Client::Talking(_));
            // Where nobody comes after it, its death changes nothing that a lost connection does not.
            if waits && scenario.clients.iter().any(|other| [other.follows, other.beside].contains(&Some(who))) {
                acts.push(Act::Die(who));
            }
        }
        if self.left.replays > 0 && self.daemon.is_some() {
            let known = if scenario.repeats_lost { &self.heard } else { &self.taken };
            acts.extend(known.iter().map(|&datagram| Act::Replay(datagram)));
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

    /// Lets it happen.
    pub(super) fn happen_outside(&mut self, scenario: &Scenario, act: Act) {
        match act {
            Act::Begin(who) => {
                self.clients[who] = Client::Asking { sent_again: 0 };
                for &endpoint in scenario.clients[who].endpoints {
                    self.send(scenario, Datagram { who, endpoint, copy: 0, sent: self.now });
                }
            }
            Act::SendAgain(who, endpoint) => {
                let Client::Asking { sent_again } = self.clients[who] else { return };
                let copy = sent_again + 1;
                self.clients[who] = Client::Asking { sent_again: copy };
                self.send(scenario, Datagram { who, endpoint, copy, sent: self.now });
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
            // The daemon's own.
            Act::Take | Act::Connect(_) | Act::Authenticate(_) | Act::Overtaken(_) | Act::Read(_) | Act::Claim(_) => {}
            Act::Note(_) | Act::Order(..) | Act::Late(_) | Act::ReadAgain(_) | Act::Reply(_) | Act::Restart(_) => {}
        }
    }

    /// SIGKILL: memory, connections and what was not read are gone; the files stay. libvirt's destroy has taken effect before, or never
    /// does: libvirtd forgets the calls of whoever hangs up.
    fn crash(&mut self, scenario: &Scenario) {
        self.left.crashes -= 1;
        // Each datagram is written down before anything is done about it.
        self.written = self.daemon.take().map(|daemon| daemon.replay_cache).unwrap_or_default();
        self.queue.clear();
        self.late = None;
        self.destroy = None;
        for (client, asks) in self.clients.iter_mut().zip(scenario.clients) {
            if client.talks() {
                *client = if asks.insists { Client::Asking { sent_again: 0 } } else { Client::Done };
            }
        }
    }

    /// The next daemon: it reads the files before it hears anything.
    fn start(&mut self, scenario: &Scenario) {
        let mut daemon = Daemon::default();
        let written = core::mem::take(&mut self.written);
        if scenario.works(super::Flaw::NoReplayCacheFile) {
            daemon.replay_cache = written;
        }
        if scenario.works(super::Flaw::NoClaimsFile) {
            for id in &self.claims {
                daemon.ledger.remember(self.nanos(), *id);
            }
        }
        daemon.pending = self.record.map(|instance| Plan { instance, inherited: true, attempts: 0, started: false });
        self.observed.inherited |= daemon.pending.is_some();
        self.daemon = Some(daemon);
    }

    /// The connection of a request is closed without an answer. Whoever has it was perhaps not the one who had asked, where it was not
    /// claimed and somebody else asks there.
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
