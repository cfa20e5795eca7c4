//! What comes to the daemon: datagrams, their times, and their way into the ledger. A request over
//! a connection or a line counts as a datagram, too.

use core::net::SocketAddr;

use super::world::{Client, Endpoint, Step, Task, Who, World};
use super::{Flaw, Scenario};
use fence_common::hash::HashKind;
use fence_common::ledger::{Arrival, RequestId};
use fence_common::replay_cache::DatagramId;
use fence_common::wire::{Op, Request};
use zerocopy::FromZeros;

/// The age up to which a datagram is served, in ticks.
const BEGIN_WITHIN: u8 = 0;

/// A datagram on the segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Datagram {
    pub(super) who: Who,
    pub(super) endpoint: Endpoint,
    /// Each retransmission has random bytes of its own.
    pub(super) copy: u8,
    pub(super) sent: u8,
    pub(super) by: Sender,
}

/// Who sends a datagram, and to which listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Sender {
    Client,
    /// It has no key and repeats what it has heard.
    Attacker,
    /// It does so at another listener that takes the same bytes: another network's, or vsock beside
    /// tcp.
    AttackerElsewhere,
}

impl Datagram {
    /// The listener that reads it.
    fn listener(self) -> u8 {
        let first = match self.endpoint {
            Endpoint::Callback(_) => 0,
            Endpoint::Stream(_) => 1,
            Endpoint::Line(_) => 2,
        };
        first + if self.by == Sender::AttackerElsewhere { 3 } else { 0 }
    }

    /// The address that the ledger knows its client by. Each connection has its own.
    fn address(self) -> SocketAddr {
        match (self.endpoint, self.by) {
            (Endpoint::Callback(n), _) => ([192, 168, 122, n], 1229).into(),
            (Endpoint::Stream(n), Sender::Client) => ([192, 168, 122, n], 40_000 + u16::from(self.copy)).into(),
            (Endpoint::Stream(n), _) => ([192, 168, 123, n], 40_000 + u16::from(self.copy)).into(),
            (Endpoint::Line(n), _) => ([192, 168, 124, n], 0).into(),
        }
    }

    /// A digit for each endpoint.
    fn place(self) -> u8 {
        match self.endpoint {
            Endpoint::Callback(n) => n,
            Endpoint::Stream(n) => 100 + n,
            Endpoint::Line(n) => 200 + n,
        }
    }

    fn request(self, op: Op) -> Request {
        let mut request = Request::new_zeroed();
        request.op = op.to_wire();
        request.domain[..2].copy_from_slice(b"vm");
        request.seqno = u32::try_from(self.who).unwrap().into();
        request.hash_kind = HashKind::Sha256.to_wire();
        // Stands for a digest: it tells this datagram from all others.
        request.hash[..3].copy_from_slice(&[u8::try_from(self.who).unwrap(), self.place(), self.copy]);
        request
    }

    fn datagram_id(self, op: Op) -> DatagramId {
        *DatagramId::of(&self.request(op)).unwrap()
    }

    fn id(self, op: Op) -> RequestId {
        RequestId::of(op, &self.request(op))
    }
}

impl World {
    pub(super) fn send(&mut self, scenario: &Scenario, datagram: Datagram) {
        self.heard.insert(Datagram { by: Sender::Client, ..datagram });
        if scenario.troubles.late > 0 && scenario.works(Flaw::OutdatedIsServed) {
            self.moment += 1;
        }
        // Nobody listens while there is no daemon.
        if self.daemon.is_some() {
            let arrived = self.nanos();
            self.queue.push_back((datagram, arrived));
        } else {
            self.close(scenario, datagram);
        }
    }

    /// A connection ends without an answer, before its client was examined. A datagram has none.
    fn close(&mut self, scenario: &Scenario, datagram: Datagram) {
        let Datagram { who, endpoint, by, .. } = datagram;
        let is_the_clients = matches!(endpoint, Endpoint::Stream(_)) && by == Sender::Client;
        if is_the_clients && !scenario.clients[who].insists && matches!(self.clients[who], Client::Asking { .. }) {
            self.clients[who] = Client::Done;
        }
    }

    /// Reads a datagram: the beginning of `pipeline.rs`.
    pub(super) fn take_in(&mut self, scenario: &Scenario) {
        let (now, nanos) = (self.now, self.nanos());
        let (Some((datagram, arrived)), Some(daemon)) = (self.queue.pop_front(), &mut self.daemon) else { return };
        if !scenario.repeats_lost {
            self.taken.insert(Datagram { by: Sender::Client, ..datagram });
        }
        let (Datagram { who, endpoint, sent, by, .. }, listener) = (datagram, datagram.listener());
        let op = scenario.clients[who].op;
        // Only with a flaw: a port that no other client shares.
        let own = |at: SocketAddr| SocketAddr::new(at.ip(), u16::try_from(who).unwrap());
        let caller = Some(datagram.address()).filter(|_| scenario.works(Flaw::NothingSupersedes));
        let caller = caller.unwrap_or_else(|| own(datagram.address()));
        let id = Datagram { who: scenario.clients[who].copies.unwrap_or(who), ..datagram }.id(op);
        let is_new = match endpoint {
            // Nobody else can send by a domain's line, so a line has no replays.
            Endpoint::Line(_) => true,
            Endpoint::Stream(_) if !scenario.works(Flaw::StreamSkipsReplayCache) => true,
            Endpoint::Callback(_) | Endpoint::Stream(_) => {
                daemon.replay_cache(scenario, listener).is_new(datagram.datagram_id(op), 0, u64::MAX)
            }
        };
        if !is_new && scenario.works(Flaw::NoReplayCache) {
            return self.close(scenario, datagram);
        }
        if now - sent > BEGIN_WITHIN {
            if scenario.works(Flaw::OldDoesNotSupersede) {
                daemon.ledger(scenario, listener).reject(id, caller, arrived);
            }
            return self.close(scenario, datagram);
        }
        let arrival = daemon.ledger(scenario, listener).arrive(nanos, id, caller, arrived);
        let Arrival::Serve(ticket) = arrival else { return self.close(scenario, datagram) };
        let number = daemon.next;
        daemon.next += 1;
        // The line itself says which domain asks.
        let step =
            if let Endpoint::Line(_) = endpoint { Step::Talking(ticket, who, nanos) } else { Step::Calling(ticket) };
        let is_repeated = by != Sender::Client && matches!(endpoint, Endpoint::Stream(_));
        daemon.tasks.insert(number, Task { who, endpoint, listener, is_repeated, step });
        if matches!(endpoint, Endpoint::Line(_)) && scenario.has_shared_endpoints() {
            self.moment += 1;
        }
    }

    /// Reads all that waits: `intake/backlog.rs`.
    pub(super) fn take_in_all(&mut self, scenario: &Scenario) {
        while self.daemon.is_some() && !self.queue.is_empty() {
            self.take_in(scenario);
        }
    }

    /// The identity of a client's request.
    pub(super) fn id(scenario: &Scenario, who: Who) -> RequestId {
        Datagram { who, endpoint: Endpoint::Callback(0), copy: 0, sent: 0, by: Sender::Client }
            .id(scenario.clients[who].op)
    }
}
