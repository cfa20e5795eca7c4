//! What comes to the daemon: datagrams, their times, and their way into the ledger.

use core::net::SocketAddr;

use super::world::{Place, State, Step, Task, Who};
use super::{Flaw, Scenario};
use crate::hash::HashKind;
use crate::ledger::{Arrival, RequestId};
use crate::replay::Mark;
use crate::wire::{Op, Request};
use zerocopy::FromZeros;

/// How old a datagram may be when it is read, in ticks.
const BEGIN_WITHIN: u8 = 0;

/// A datagram on the segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Datagram {
    pub(super) who: Who,
    pub(super) place: Place,
    /// Each retransmission has random bytes of its own.
    pub(super) copy: u8,
    pub(super) sent: u8,
}

/// The address of a place.
fn address(place: Place) -> SocketAddr {
    SocketAddr::from(([192, 168, 122, place], 1229))
}

/// Only where the model is broken: as if nobody else were there.
fn nobody_elses(who: Who, place: Place) -> SocketAddr {
    SocketAddr::new(address(place).ip(), u16::try_from(who).unwrap())
}

impl Datagram {
    fn request(self, op: Op) -> Request {
        let mut request = Request::new_zeroed();
        request.op = op.to_wire();
        request.domain[..2].copy_from_slice(b"vm");
        request.seqno = u32::try_from(self.who).unwrap().into();
        request.hash_kind = HashKind::Sha256.to_wire();
        // As good as a digest: it tells this datagram from all others.
        request.hash[..3].copy_from_slice(&[u8::try_from(self.who).unwrap(), self.place, self.copy]);
        request
    }

    fn mark(self, op: Op) -> Mark {
        *Mark::of(&self.request(op)).unwrap()
    }

    fn id(self, op: Op) -> RequestId {
        RequestId::of(op, &self.request(op))
    }
}

impl State {
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

    /// A datagram is taken in: the beginning of `pipeline.rs`.
    pub(super) fn take_in(&mut self, scenario: &Scenario) {
        let (now, nanos) = (self.now, self.nanos());
        let (Some((datagram, arrived)), Some(daemon)) = (self.queue.pop_front(), &mut self.daemon) else { return };
        if !scenario.repeats_lost {
            self.taken.insert(datagram);
        }
        let Datagram { who, place, sent, .. } = datagram;
        let op = scenario.clients[who].op;
        let caller = if scenario.works(Flaw::NothingSupersedes) { address(place) } else { nobody_elses(who, place) };
        let id = Datagram { who: scenario.clients[who].copies.unwrap_or(who), ..datagram }.id(op);
        let is_new = daemon.replays.is_new(datagram.mark(op), 0, u64::MAX);
        if !is_new && scenario.works(Flaw::NoReplayMemory) {
            return;
        }
        if now - sent > BEGIN_WITHIN {
            if scenario.works(Flaw::OldDoesNotSupersede) {
                daemon.ledger.turn_away(id, caller, arrived);
            }
            return;
        }
        let arrival = daemon.ledger.arrive(nanos, id, caller, arrived);
        if let Arrival::Serve(ticket) = arrival {
            let number = daemon.next;
            daemon.next += 1;
            daemon.tasks.insert(number, Task { who, place, step: Step::Calling(ticket) });
        }
    }

    /// All that waits is taken in: `intake/backlog.rs`.
    pub(super) fn take_in_all(&mut self, scenario: &Scenario) {
        while self.daemon.is_some() && !self.queue.is_empty() {
            self.take_in(scenario);
        }
    }

    /// The identity of a client's request.
    pub(super) fn id(scenario: &Scenario, who: Who) -> RequestId {
        Datagram { who, place: 0, copy: 0, sent: 0 }.id(scenario.clients[who].op)
    }
}
