//! What comes to the daemon: datagrams, their times, and their way into the ledger.

use core::net::SocketAddr;

use super::world::{Endpoint, Step, Task, Who, World};
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
}

/// The address of an endpoint.
fn address(endpoint: Endpoint) -> SocketAddr {
    SocketAddr::from(([192, 168, 122, endpoint], 1229))
}

/// Only with a flaw: an address that no other client shares.
fn nobody_elses(who: Who, endpoint: Endpoint) -> SocketAddr {
    SocketAddr::new(address(endpoint).ip(), u16::try_from(who).unwrap())
}

impl Datagram {
    fn request(self, op: Op) -> Request {
        let mut request = Request::new_zeroed();
        request.op = op.to_wire();
        request.domain[..2].copy_from_slice(b"vm");
        request.seqno = u32::try_from(self.who).unwrap().into();
        request.hash_kind = HashKind::Sha256.to_wire();
        // Stands for a digest: it tells this datagram from all others.
        request.hash[..3].copy_from_slice(&[u8::try_from(self.who).unwrap(), self.endpoint, self.copy]);
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
        self.heard.insert(datagram);
        if scenario.troubles.late > 0 && scenario.works(Flaw::OutdatedIsServed) {
            self.moment += 1;
        }
        // Nobody listens while there is no daemon.
        if self.daemon.is_some() {
            let arrived = self.nanos();
            self.queue.push_back((datagram, arrived));
        }
    }

    /// Reads a datagram: the beginning of `pipeline.rs`.
    pub(super) fn take_in(&mut self, scenario: &Scenario) {
        let (now, nanos) = (self.now, self.nanos());
        let (Some((datagram, arrived)), Some(daemon)) = (self.queue.pop_front(), &mut self.daemon) else { return };
        if !scenario.repeats_lost {
            self.taken.insert(datagram);
        }
        let Datagram { who, endpoint, sent, .. } = datagram;
        let op = scenario.clients[who].op;
        let caller =
            if scenario.works(Flaw::NothingSupersedes) { address(endpoint) } else { nobody_elses(who, endpoint) };
        let id = Datagram { who: scenario.clients[who].copies.unwrap_or(who), ..datagram }.id(op);
        let is_new = daemon.replay_cache.is_new(datagram.datagram_id(op), 0, u64::MAX);
        if !is_new && scenario.works(Flaw::NoReplayCache) {
            return;
        }
        if now - sent > BEGIN_WITHIN {
            if scenario.works(Flaw::OldDoesNotSupersede) {
                daemon.ledger.reject(id, caller, arrived);
            }
            return;
        }
        let arrival = daemon.ledger.arrive(nanos, id, caller, arrived);
        if let Arrival::Serve(ticket) = arrival {
            let number = daemon.next;
            daemon.next += 1;
            daemon.tasks.insert(number, Task { who, endpoint, step: Step::Calling(ticket) });
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
        Datagram { who, endpoint: 0, copy: 0, sent: 0 }.id(scenario.clients[who].op)
    }
}
