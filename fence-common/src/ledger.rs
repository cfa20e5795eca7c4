//! Which requests are being served, were claimed, were answered, or were overtaken: the promise "once" as a state machine.
//!
//! The life of a request: it *arrives* (every copy, address and retransmission of it), it is called back, and when the peer
//! has authenticated it is *claimed*. Only one of its copies ever gets the claim, and only the holder of a claim may act.
//! A claimed request is remembered until 10 s after its answer (as stock servers do), so late copies change nothing. A
//! request whose call-back failed is forgotten at once, so that the client's next address or retransmission gets its turn.
//!
//! A newer request from the same call-back address and port *supersedes* the older one: whoever listens there now is asking
//! something else, and would take the old answer for its own.

use alloc::collections::{BTreeMap, BTreeSet, VecDeque};
use core::net::{IpAddr, SocketAddr};
use core::time::Duration;

use crate::wire::{DOMAIN_LEN, Op, Request};

/// How long an answered request is remembered, as with stock servers.
pub const REMEMBER: Duration = Duration::from_secs(10);

/// How many claims are kept at once. When they are used up new ones are refused rather than old ones forgotten.
pub const CLAIMS_MAX: usize = 16_384;

/// The length of a [`RequestId`] as bytes.
pub const ID_LEN: usize = 1 + 4 + DOMAIN_LEN;

/// What makes two datagrams copies of one request, as stock servers see it: operation, seqno and domain (any case).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[cfg_attr(test, derive(Hash))]
pub struct RequestId {
    op: u8,
    seqno: u32,
    domain: [u8; DOMAIN_LEN],
}

impl RequestId {
    /// The identity of a request. Bytes after the domain's NUL do not count.
    #[must_use]
    pub fn of(op: Op, request: &Request) -> Self {
        let mut domain = [0; DOMAIN_LEN];
        let text = request.domain_text().unwrap_or(&request.domain);
        domain[..text.len()].copy_from_slice(text);
        domain.make_ascii_lowercase();
        Self { op: op.to_wire(), seqno: request.seqno.get(), domain }
    }

    /// The identity as bytes, to be kept beyond the process's life.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; ID_LEN] {
        let mut bytes = [0; ID_LEN];
        bytes[0] = self.op;
        bytes[1..5].copy_from_slice(&self.seqno.to_le_bytes());
        bytes[5..].copy_from_slice(&self.domain);
        bytes
    }

    /// The identity that [`RequestId::to_bytes`] made these bytes of.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; ID_LEN]) -> Self {
        let [op, a, b, c, d, domain @ ..] = *bytes;
        Self { op, seqno: u32::from_le_bytes([a, b, c, d]), domain }
    }
}

/// A request on its way to authentication. Give it back by [`Ledger::claim`] or [`Ledger::forget`].
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
#[cfg_attr(test, derive(Clone, Hash))]
#[must_use]
pub struct Ticket(u64);

/// The right to act on a request, once. Give it back by [`Ledger::answered`].
#[derive(Debug, PartialEq, Eq)]
#[cfg_attr(test, derive(Clone, Hash))]
#[must_use]
pub struct Claim(u64);

/// What becomes of a datagram that arrived.
#[derive(Debug, PartialEq, Eq)]
#[must_use]
pub enum Arrival {
    /// New: call back.
    Serve(Ticket),
    /// A copy of a request that is claimed or was answered a moment ago, or the same copy is being called back already.
    Duplicate,
}

/// Why a request may not be acted upon. It is closed without an answer, except where [`NoClaim::Full`] says otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoClaim {
    /// Another copy of it was faster.
    #[error("another copy of the request was served")]
    Taken,
    /// The same address and port has asked something newer.
    #[error("a newer request came from the same call-back address and port")]
    Superseded,
    /// Too many claims are remembered. The peer must be told that its request failed.
    #[error("too many requests in a short time: {CLAIMS_MAX} are remembered already")]
    Full,
}

#[derive(Debug)]
#[cfg_attr(test, derive(Clone, PartialEq, Eq, Hash))]
struct Serving {
    id: RequestId,
    caller: SocketAddr,
}

impl core::fmt::Debug for RequestId {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "op {} seqno {} domain {}", self.op, self.seqno, self.domain.trim_ascii_end().escape_ascii())
    }
}

/// The book of requests. `now` is nanoseconds on any clock that never runs backwards.
#[derive(Debug, Default)]
#[cfg_attr(test, derive(Clone, PartialEq, Eq, Hash))]
pub struct Ledger {
    next: u64,
    serving: BTreeMap<u64, Serving>,
    /// The newest ticket of each call-back address and port; any other of the same place is superseded.
    newest: BTreeMap<SocketAddr, u64>,
    /// What is claimed or was answered a moment ago.
    claims: BTreeSet<RequestId>,
    /// Answered claims and when to forget them, soonest first (the clock never runs backwards).
    expiring: VecDeque<(u64, RequestId)>,
}

impl Ledger {
    /// A verified datagram arrived that asks to be called back at `caller`.
    pub fn arrive(&mut self, now: u64, id: RequestId, caller: SocketAddr) -> Arrival {
        self.expire(now);
        if self.claims.contains(&id) {
            return Arrival::Duplicate;
        }
        let newest = self.newest.get(&caller).and_then(|number| self.serving.get(number));
        if newest.is_some_and(|serving| serving.id == id) {
            return Arrival::Duplicate;
        }
        let number = self.next;
        self.next += 1;
        self.serving.insert(number, Serving { id, caller });
        self.newest.insert(caller, number);
        Arrival::Serve(Ticket(number))
    }

    /// A verified datagram arrived for which there is no room. What was asked before from its place is superseded by it all the same:
    /// whoever asked that is not there any more.
    pub fn turn_away(&mut self, id: RequestId, caller: SocketAddr) {
        let newest = self.newest.get(&caller).and_then(|number| self.serving.get(number));
        if newest.is_some_and(|serving| serving.id != id) {
            self.newest.remove(&caller);
        }
    }

    /// Why a request can get no claim any more, if so: its call-back is of no use then.
    #[must_use]
    pub fn is_moot(&self, ticket: &Ticket) -> Option<NoClaim> {
        match self.serving.get(&ticket.0) {
            Some(_) if self.superseded(ticket.0) => Some(NoClaim::Superseded),
            Some(serving) => self.claims.contains(&serving.id).then_some(NoClaim::Taken),
            None => Some(NoClaim::Superseded),
        }
    }

    /// Whether something newer was asked from the same address and port, after the claim.
    #[must_use]
    pub fn is_claim_superseded(&self, claim: &Claim) -> bool {
        self.superseded(claim.0)
    }

    /// Whether another copy of the request is being served: then what becomes of this one decides nothing.
    #[must_use]
    pub fn has_copies(&self, ticket: &Ticket) -> bool {
        let copied = |id| self.serving.iter().any(|(number, other)| *number != ticket.0 && other.id == id);
        self.serving.get(&ticket.0).is_some_and(|serving| copied(serving.id))
    }

    /// The peer has authenticated: take the right to act, *before* acting.
    ///
    /// # Errors
    /// When somebody else has it or the request was overtaken. The ticket is used up either way.
    pub fn claim(&mut self, now: u64, ticket: Ticket) -> Result<Claim, NoClaim> {
        self.expire(now);
        let number = ticket.0;
        let outcome = match (self.is_moot(&ticket), self.serving.get(&number)) {
            (Some(reason), _) => Err(reason),
            (None, None) => Err(NoClaim::Superseded),
            (None, Some(_)) if self.claims.len() >= CLAIMS_MAX => Err(NoClaim::Full),
            (None, Some(serving)) => Ok(serving.id),
        };
        match outcome {
            Ok(id) => {
                self.claims.insert(id);
                Ok(Claim(number))
            }
            Err(reason) => {
                self.remove(number);
                Err(reason)
            }
        }
    }

    /// The call-back failed: nothing happened, and the next copy gets its turn.
    pub fn forget(&mut self, ticket: Ticket) {
        self.remove(ticket.0);
    }

    /// The claimed request is over, answered or abandoned. It is remembered for [`REMEMBER`] from `now`.
    pub fn answered(&mut self, now: u64, claim: Claim) {
        if let Some(serving) = self.remove(claim.0) {
            let remember = u64::try_from(REMEMBER.as_nanos()).unwrap_or(u64::MAX);
            self.expiring.push_back((now.saturating_add(remember), serving.id));
        }
    }

    /// A request was claimed by another daemon, which is gone: it is as good as answered at `now`.
    pub fn remember(&mut self, now: u64, id: RequestId) {
        if self.claims.len() < CLAIMS_MAX && self.claims.insert(id) {
            let remember = u64::try_from(REMEMBER.as_nanos()).unwrap_or(u64::MAX);
            self.expiring.push_back((now.saturating_add(remember), id));
        }
    }

    /// How many requests are being served, claimed or not.
    #[must_use]
    pub fn serving(&self) -> usize {
        self.serving.len()
    }

    /// How many of them ask to be called back at `ip`.
    #[must_use]
    pub fn serving_at(&self, ip: IpAddr) -> usize {
        self.serving.values().filter(|serving| serving.caller.ip() == ip).count()
    }

    fn superseded(&self, number: u64) -> bool {
        self.serving.get(&number).is_none_or(|serving| self.newest.get(&serving.caller) != Some(&number))
    }

    fn remove(&mut self, number: u64) -> Option<Serving> {
        let serving = self.serving.remove(&number)?;
        // Only if it is the newest itself: older ones of the same place stay superseded for good.
        if self.newest.get(&serving.caller) == Some(&number) {
            self.newest.remove(&serving.caller);
        }
        Some(serving)
    }

    fn expire(&mut self, now: u64) {
        while let Some((_, id)) = self.expiring.pop_front_if(|(until, _)| *until <= now) {
            self.claims.remove(&id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use zerocopy::FromZeros;

    const SECOND: u64 = 1_000_000_000;

    fn id(seqno: u32) -> RequestId {
        named(seqno, b"node1")
    }

    fn named(seqno: u32, domain: &[u8]) -> RequestId {
        let mut request = Request::new_zeroed();
        request.seqno = seqno.into();
        request.domain[..domain.len()].copy_from_slice(domain);
        RequestId::of(Op::Off, &request)
    }

    fn caller(n: u8) -> SocketAddr {
        SocketAddr::from(([192, 168, 122, n], 1229))
    }

    fn serve(ledger: &mut Ledger, now: u64, id: RequestId, caller: SocketAddr) -> Ticket {
        match ledger.arrive(now, id, caller) {
            Arrival::Serve(ticket) => ticket,
            Arrival::Duplicate => panic!("{id:?} from {caller} is no duplicate"),
        }
    }

    #[test]
    fn an_identity_survives_as_bytes_and_what_another_daemon_claimed_is_a_duplicate() {
        let mut ledger = Ledger::default();
        let kept = RequestId::from_bytes(&id(0x0102_0304).to_bytes());
        assert_eq!(kept, id(0x0102_0304));
        ledger.remember(0, kept);
        let caller = SocketAddr::from(([192, 0, 2, 1], 1229));
        assert_eq!(ledger.arrive(SECOND, id(0x0102_0304), caller), Arrival::Duplicate);
        assert!(matches!(ledger.arrive(SECOND, id(5), caller), Arrival::Serve(_)));
        assert!(matches!(ledger.arrive(11 * SECOND, id(0x0102_0304), caller), Arrival::Serve(_)));
    }

    #[test]
    fn the_identity_ignores_case_and_what_follows_the_nul() {
        assert_eq!(named(1, b"NODE1\0junk"), named(1, b"node1"));
        assert_ne!(named(1, b"node1"), named(1, b"node2"));
        assert_ne!(named(1, b"node1"), named(2, b"node1"));
    }

    #[test]
    fn copies_over_two_addresses_act_once() {
        let mut ledger = Ledger::default();
        let first = serve(&mut ledger, 0, id(1), caller(11));
        assert_eq!(ledger.arrive(0, id(1), caller(11)), Arrival::Duplicate);
        let second = serve(&mut ledger, 0, id(1), caller(12));
        assert!(ledger.has_copies(&first) && ledger.has_copies(&second));
        let claim = ledger.claim(0, second).unwrap();
        assert_eq!(ledger.claim(0, first), Err(NoClaim::Taken));
        assert_eq!(ledger.arrive(0, id(1), caller(13)), Arrival::Duplicate);
        ledger.answered(5 * SECOND, claim);
        assert_eq!(ledger.arrive(14 * SECOND, id(1), caller(11)), Arrival::Duplicate);
        let _ = serve(&mut ledger, 15 * SECOND, id(1), caller(11));
    }

    #[test]
    fn a_slow_action_is_not_forgotten_while_it_lasts() {
        let mut ledger = Ledger::default();
        let ticket = serve(&mut ledger, 0, id(1), caller(11));
        let _claim = ledger.claim(0, ticket).unwrap();
        assert_eq!(ledger.arrive(1000 * SECOND, id(1), caller(11)), Arrival::Duplicate);
    }

    #[test]
    fn a_failed_call_back_gives_the_next_copy_its_turn() {
        let mut ledger = Ledger::default();
        let ticket = serve(&mut ledger, 0, id(1), caller(11));
        ledger.forget(ticket);
        let _ = serve(&mut ledger, 0, id(1), caller(11));
    }

    #[test]
    fn a_newer_question_from_the_same_place_supersedes() {
        let mut ledger = Ledger::default();
        let old = serve(&mut ledger, 0, id(1), caller(11));
        let elsewhere = serve(&mut ledger, 0, id(1), caller(12));
        let new = serve(&mut ledger, 0, id(2), caller(11));
        assert!(!ledger.has_copies(&new));
        assert_eq!([&old, &new, &elsewhere].map(|t| ledger.is_moot(t)), [Some(NoClaim::Superseded), None, None]);
        assert_eq!((ledger.serving_at(caller(11).ip()), ledger.serving_at(caller(12).ip())), (2, 1));
        assert_eq!(ledger.claim(0, old), Err(NoClaim::Superseded));
        let copy = serve(&mut ledger, 0, id(1), caller(13));
        assert!(ledger.claim(0, elsewhere).is_ok());
        assert_eq!(ledger.is_moot(&copy), Some(NoClaim::Taken));
    }

    #[test]
    fn a_newer_question_that_is_turned_away_supersedes_too() {
        let mut ledger = Ledger::default();
        let old = serve(&mut ledger, 0, id(1), caller(11));
        ledger.turn_away(id(1), caller(11));
        ledger.turn_away(id(2), caller(12));
        assert_eq!(ledger.is_moot(&old), None, "a copy, and somebody elsewhere");
        ledger.turn_away(id(2), caller(11));
        assert_eq!(ledger.is_moot(&old), Some(NoClaim::Superseded));
        ledger.forget(old);
        let _ = serve(&mut ledger, 0, id(1), caller(11));
    }

    #[test]
    fn a_claimed_request_can_be_superseded_and_stays_claimed() {
        let mut ledger = Ledger::default();
        let ticket = serve(&mut ledger, 0, id(1), caller(11));
        let claim = ledger.claim(0, ticket).unwrap();
        let _new = serve(&mut ledger, 0, id(2), caller(11));
        assert!(ledger.is_claim_superseded(&claim));
        ledger.answered(0, claim);
        assert_eq!(ledger.arrive(SECOND, id(1), caller(11)), Arrival::Duplicate);
    }

    #[test]
    fn when_full_new_claims_are_refused_and_none_is_forgotten() {
        let mut ledger = Ledger::default();
        for n in 0..u32::try_from(CLAIMS_MAX).unwrap() {
            let ticket = serve(&mut ledger, 0, id(n), SocketAddr::from((n.to_be_bytes(), 1)));
            let claim = ledger.claim(0, ticket).unwrap();
            ledger.answered(0, claim);
        }
        let ticket = serve(&mut ledger, 0, id(u32::MAX), caller(11));
        assert_eq!(ledger.claim(0, ticket), Err(NoClaim::Full));
        assert_eq!(ledger.arrive(0, id(0), caller(11)), Arrival::Duplicate);
        let ticket = serve(&mut ledger, 11 * SECOND, id(u32::MAX), caller(11));
        assert!(ledger.claim(11 * SECOND, ticket).is_ok());
    }

    #[derive(Clone, Debug)]
    enum Event {
        Arrive(u32, u8),
        Claim(usize),
        Forget(usize),
        Answer(usize),
        Sleep(u64),
    }

    fn event() -> impl Strategy<Value = Event> {
        prop_oneof![
            4 => (0..3u32, 0..3u8).prop_map(|(seqno, at)| Event::Arrive(seqno, at)),
            3 => any::<usize>().prop_map(Event::Claim),
            1 => any::<usize>().prop_map(Event::Forget),
            2 => any::<usize>().prop_map(Event::Answer),
            1 => (0..6u64).prop_map(|seconds| Event::Sleep(seconds * SECOND)),
        ]
    }

    proptest! {
        /// Whatever comes in whatever order: a request is claimed at most once in any 10 s after its answer, never while an
        /// older claim of it is open, and a superseded one never.
        #[test]
        fn at_most_one_claim(events in proptest::collection::vec(event(), 0..80)) {
            let mut ledger = Ledger::default();
            let mut now = 0;
            let mut tickets: std::vec::Vec<(Ticket, u32, u8)> = std::vec::Vec::new();
            let mut claims: std::vec::Vec<(Claim, u32)> = std::vec::Vec::new();
            let mut newest: [Option<u32>; 3] = [None; 3];
            let mut answered_at: [Option<u64>; 3] = [None; 3];
            for event in events {
                match event {
                    Event::Arrive(seqno, at) => if let Arrival::Serve(ticket) = ledger.arrive(now, id(seqno), caller(at)) {
                        tickets.push((ticket, seqno, at));
                        newest[at as usize] = Some(seqno);
                    },
                    Event::Claim(n) if !tickets.is_empty() => {
                        let (ticket, seqno, at) = tickets.swap_remove(n % tickets.len());
                        if let Ok(claim) = ledger.claim(now, ticket) {
                            prop_assert!(!claims.iter().any(|(_, open)| *open == seqno), "claimed twice at once");
                            prop_assert!(answered_at[seqno as usize].is_none_or(|then| now >= then + 10 * SECOND));
                            prop_assert_eq!(newest[at as usize], Some(seqno), "superseded");
                            claims.push((claim, seqno));
                        }
                    }
                    Event::Forget(n) if !tickets.is_empty() => ledger.forget(tickets.swap_remove(n % tickets.len()).0),
                    Event::Answer(n) if !claims.is_empty() => {
                        let (claim, seqno) = claims.swap_remove(n % claims.len());
                        ledger.answered(now, claim);
                        answered_at[seqno as usize] = Some(now);
                    }
                    Event::Sleep(time) => now += time,
                    Event::Claim(_) | Event::Forget(_) | Event::Answer(_) => {}
                }
                prop_assert_eq!(ledger.serving(), tickets.len() + claims.len());
            }
        }
    }
}
