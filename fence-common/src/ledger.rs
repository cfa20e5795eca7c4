//! The ledger of requests that are served, claimed, answered or superseded: the promise "once" as a
//! state machine.
//!
//! The life of a request: it *arrives*, as often as it is copied, retransmitted or sent by another
//! address. It is called back. When the peer has authenticated, the request is *claimed*. Only one
//! of its copies gets the claim, and only the holder of a claim may act.
//!
//! The ledger remembers a claim until 10 s after its answer, as stock servers do, so late copies
//! change nothing. A request whose callback failed is forgotten at once. So the client's next
//! address or retransmission is served.
//!
//! A request that changes nothing (`list`, `status`) may be answered more than once. Each callback
//! address has a claim of its own there. So a holder of the key cannot have another client's
//! request go unanswered by a copy of it.
//!
//! # Two clients at one endpoint
//!
//! All clients of a guest are called back at the same address and port, by the same interface:
//! their *endpoint*. None says who it is, so a connection reaches whichever client listens at that
//! moment. A client must not get another one's answer. A client that waits for its answer should
//! not lose it to another one beside it.
//!
//! Known of stock clients (seen on Debian's 4.12.1; a test runs several at once):
//!
//! * A client listens first and then sends its datagrams. It takes one connection, stops listening,
//!   and only then speaks. After that it sends nothing.
//! * Another client can listen from then on. Until it can, it retries every 2 s and sends nothing.
//!
//! So as long as it is unknown whom a connection has reached, a newer request of its endpoint
//! *supersedes* it: the client that listens there now asks for something else. A peer that has
//! authenticated has spoken. So if its own request is another one than the one called back for,
//! that request has arrived. At worst it waits in ring or socket. The daemon reads those, and then
//! claims the request. *A claim closes the entry*: what arrives after the authentication is another
//! client's, which gets another connection. It takes nothing from the peer that is connected.
//!
//! # What is read late
//!
//! A datagram gets its time before it can be read: the kernel program's record may be incomplete,
//! or the stack has not delivered it to the socket yet. So what had arrived before the
//! authentication supersedes even after the claim, whenever it is read. The reply therefore waits
//! for another look.
//!
//! What is read before the claim supersedes whatever its time says, since setting the clock can
//! make times at the socket wrong. So of two clients the first one is abandoned if the second one's
//! request comes in the millisecond between connection and claim.
//!
//! By the argument above the peer's first word would be the end of that time. The round trip up to
//! the end of the authentication covers a datagram that another queue of the guest's network card
//! has held back. With `auth = "none"` the peer need not speak, so its time of sending is unknown.
//! Then the entry stays open until the reply.
//!
//! A request is *outdated* if a request of its endpoint that arrived later was read before it.
//! (Ring and socket have no common order.) Its client is gone, so it is not served. It supersedes
//! all the same, as the times may be wrong; a client that still listens asks again.
//!
//! Copies by other addresses have other endpoints and so other entries; one of them gets the claim.
//! A request that is rejected, for want of room say, supersedes like any other. A replay stops at
//! the replay cache and supersedes nothing. A daemon that dies takes its connections along.

use alloc::collections::btree_map::Entry;
use alloc::collections::{BTreeMap, VecDeque};
use core::net::SocketAddr;
use core::time::Duration;

use crate::caller::{Address, Caller};
use crate::wire::{DOMAIN_LEN, Op, Request};

/// How long an answered request is remembered, as by stock servers.
pub const REMEMBER: Duration = Duration::from_secs(10);

/// Most claims that are kept at once. When all are used, new ones are rejected and no old one is
/// forgotten.
pub const CLAIMS_MAX: usize = 16_384;

/// How many claims one address can have when half of them are used up. The other half is for those
/// with fewer: a holder of the key with a few addresses cannot have the others rejected.
pub const CLAIMS_SHARE: usize = 64;

/// The length of a [`RequestId`] in bytes.
pub const ID_LEN: usize = 1 + 4 + DOMAIN_LEN;

/// The identity of a request: operation, seqno and domain in any case, as stock servers compare
/// them. Two datagrams with the same identity are copies of one request.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[cfg_attr(feature = "model", derive(Hash))]
pub struct RequestId {
    op: u8,
    seqno: u32,
    domain: [u8; DOMAIN_LEN],
}

impl RequestId {
    /// The identity of a request. Bytes behind the domain's NUL do not count.
    #[must_use]
    pub fn of(op: Op, request: &Request) -> Self {
        let mut domain = [0; DOMAIN_LEN];
        let text = request.domain_text().unwrap_or(&request.domain);
        domain[..text.len()].copy_from_slice(text);
        domain.make_ascii_lowercase();
        Self { op: op.to_wire(), seqno: request.seqno.get(), domain }
    }

    /// The identity as bytes, to be kept beyond the process.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; ID_LEN] {
        let mut bytes = [0; ID_LEN];
        bytes[0] = self.op;
        bytes[1..5].copy_from_slice(&self.seqno.to_le_bytes());
        bytes[5..].copy_from_slice(&self.domain);
        bytes
    }

    /// The identity from the bytes of [`RequestId::to_bytes`].
    #[must_use]
    pub fn from_bytes(bytes: &[u8; ID_LEN]) -> Self {
        let [op, a, b, c, d, domain @ ..] = *bytes;
        Self { op, seqno: u32::from_le_bytes([a, b, c, d]), domain }
    }
}

/// A request before its authentication. Return it by [`Ledger::claim`], [`Ledger::deny`] or
/// [`Ledger::forget`].
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
#[cfg_attr(feature = "model", derive(Clone, Hash))]
#[must_use]
pub struct Ticket(u64);

/// The right to act on a request, once. Return it by [`Ledger::answered`].
#[derive(Debug, PartialEq, Eq)]
#[cfg_attr(feature = "model", derive(Clone, Hash))]
#[must_use]
pub struct Claim(u64);

/// The right to tell a peer, once, that its request is denied. It takes nothing from other copies
/// of the request. Return it by [`Ledger::close_denial`].
#[derive(Debug, PartialEq, Eq)]
#[cfg_attr(feature = "model", derive(Clone, Hash))]
#[must_use]
pub struct Denial(u64);

/// Where a client is answered: its address and port, and the interface by which a callback leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Endpoint {
    /// The address and port.
    pub caller: Caller,
    /// The interface's index. 0: the routing table decides when connecting.
    pub interface: u32,
    /// Whether the client waits on a connection that it has made itself. No callback reaches it
    /// there.
    pub is_connected: bool,
}

impl Endpoint {
    /// Whether connections to both may reach the same listener. Networks on different interfaces
    /// may use the same addresses; index 0 may be any of them.
    #[must_use]
    pub fn overlaps(&self, other: &Self) -> bool {
        self.caller == other.caller
            && self.is_connected == other.is_connected
            && (self.interface == other.interface || self.interface == 0 || other.interface == 0)
    }
}

impl From<SocketAddr> for Endpoint {
    fn from(address: SocketAddr) -> Self {
        Self { caller: address.into(), interface: 0, is_connected: false }
    }
}

/// What a claim excludes: the request itself, or one that changes nothing at one address or on one
/// connection. Stock clients number by the clock's microseconds, so two may ask with one number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[cfg_attr(feature = "model", derive(Hash))]
struct Claimed {
    id: RequestId,
    at: Option<(Address, Option<Caller>)>,
}

impl Claimed {
    fn of(id: RequestId, endpoint: &Endpoint) -> Self {
        let acts = Op::from_wire(id.op).is_none_or(Op::changes_power);
        let connection = endpoint.is_connected.then_some(endpoint.caller);
        Self { id, at: (!acts).then(|| (endpoint.caller.address(), connection)) }
    }
}

/// What follows from a datagram that arrived.
#[derive(Debug, PartialEq, Eq)]
#[must_use]
pub enum Arrival {
    /// A new request: call back.
    Serve(Ticket),
    /// A copy of a request that is claimed or was answered recently, or one that is being called
    /// back already.
    Duplicate,
    /// A later request of the same endpoint was read before it: its client is gone.
    Outdated,
}

/// Why a request must not act. It is closed without an answer, except with [`NoClaim::Full`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoClaim {
    /// Another copy of it has the claim.
    #[error("another copy of the request was served")]
    Taken,
    /// The same endpoint has sent a newer request.
    #[error("a newer request came from the same callback address and port")]
    Superseded,
    /// Too many claims are remembered. The peer receives a failure.
    #[error("too many requests in a short time are remembered already")]
    Full,
}

#[derive(Debug)]
#[cfg_attr(feature = "model", derive(Clone, PartialEq, Eq, Hash))]
struct Serving {
    id: RequestId,
    endpoint: Endpoint,
    /// When its newest copy arrived.
    arrived: u64,
    superseded: bool,
    /// Once claimed: what arrives after this time does not supersede it.
    closed: Option<u64>,
}

impl Serving {
    fn claimed(&self) -> Claimed {
        Claimed::of(self.id, &self.endpoint)
    }

    /// Whether this is another request of the same endpoint.
    fn is_another(&self, id: &RequestId, endpoint: &Endpoint) -> bool {
        self.endpoint.overlaps(endpoint) && self.id != *id
    }
}

impl core::fmt::Debug for RequestId {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let domain = self.domain.split(|byte| *byte == 0).next().unwrap_or_default();
        write!(f, "op {} seqno {} domain {}", self.op, self.seqno, domain.escape_ascii())
    }
}

/// The ledger. `now` is nanoseconds on any clock that never runs backwards.
#[derive(Debug, Default)]
#[cfg_attr(feature = "model", derive(Clone, PartialEq, Eq, Hash))]
pub struct Ledger {
    next: u64,
    serving: BTreeMap<u64, Serving>,
    /// The requests that are claimed or were answered recently, and their callback addresses. Of
    /// what an earlier daemon claimed the address is unknown.
    claims: BTreeMap<Claimed, Option<Address>>,
    /// How many of them each callback address has.
    shares: BTreeMap<Address, usize>,
    /// Answered claims and when to forget them, soonest first.
    expiring: VecDeque<(u64, Claimed)>,
}

impl Ledger {
    /// Enters a verified datagram that arrived at `arrived` and asks to be called back at
    /// `endpoint`.
    pub fn arrive(&mut self, now: u64, id: RequestId, endpoint: impl Into<Endpoint>, arrived: u64) -> Arrival {
        let endpoint = endpoint.into();
        self.expire(now);
        if self.claims.contains_key(&Claimed::of(id, &endpoint)) {
            return Arrival::Duplicate;
        }
        let mut there = self.serving.values_mut().filter(|other| other.endpoint.overlaps(&endpoint));
        if let Some(same) = there.find(|other| other.id == id && !other.superseded) {
            same.arrived = same.arrived.max(arrived);
            return Arrival::Duplicate;
        }
        self.supersede(&id, &endpoint, arrived);
        if self.serving.values().any(|other| other.is_another(&id, &endpoint) && other.arrived > arrived) {
            return Arrival::Outdated;
        }
        let number = self.next;
        self.next += 1;
        self.serving.insert(number, Serving { id, endpoint, arrived, superseded: false, closed: None });
        Arrival::Serve(Ticket(number))
    }

    /// Rejects a verified datagram for which there is no room. It supersedes older requests of its
    /// endpoint all the same: their client is gone.
    pub fn reject(&mut self, id: RequestId, endpoint: impl Into<Endpoint>, arrived: u64) {
        let endpoint = endpoint.into();
        let there = |other: &Serving| other.endpoint.overlaps(&endpoint) && other.id == id && !other.superseded;
        if !self.claims.contains_key(&Claimed::of(id, &endpoint)) && !self.serving.values().any(there) {
            self.supersede(&id, &endpoint, arrived);
        }
    }

    /// Why the request can get no claim any more, if so. Then its callback is of no use.
    #[must_use]
    pub fn is_moot(&self, ticket: &Ticket) -> Option<NoClaim> {
        match self.serving.get(&ticket.0) {
            Some(serving) if serving.superseded => Some(NoClaim::Superseded),
            Some(serving) => self.claims.contains_key(&serving.claimed()).then_some(NoClaim::Taken),
            None => Some(NoClaim::Superseded),
        }
    }

    /// Whether the claim's peer may have sent another request: one that had arrived before the
    /// authentication and was read after the claim.
    #[must_use]
    pub fn is_claim_superseded(&self, claim: &Claim) -> bool {
        self.serving.get(&claim.0).is_none_or(|serving| serving.superseded)
    }

    /// As [`is_claim_superseded`](Self::is_claim_superseded), of a denied peer.
    #[must_use]
    pub fn is_denial_superseded(&self, refusal: &Denial) -> bool {
        self.serving.get(&refusal.0).is_none_or(|serving| serving.superseded)
    }

    /// Whether another copy of the request is being served, or was answered recently. Then the fate
    /// of this one decides nothing.
    #[must_use]
    pub fn has_duplicates(&self, ticket: &Ticket) -> bool {
        let Some(Serving { id, .. }) = self.serving.get(&ticket.0) else { return false };
        let copied = self.serving.iter().any(|(number, other)| *number != ticket.0 && other.id == *id);
        let first = Claimed { id: *id, at: None };
        copied || self.claims.range(first..).next().is_some_and(|(claimed, _)| claimed.id == *id)
    }

    /// Takes the right to act, *before* acting: the peer has authenticated, and what had arrived by
    /// then was read. `asked` is the time by which the peer had sent all that it asks, `None` if
    /// unknown.
    ///
    /// # Errors
    /// If another copy has the claim, the request was superseded, or there is no room. The ticket
    /// is used up either way.
    pub fn claim(&mut self, now: u64, ticket: Ticket, asked: Option<u64>) -> Result<Claim, NoClaim> {
        self.expire(now);
        let number = ticket.0;
        let outcome = match (self.is_moot(&ticket), self.serving.get_mut(&number)) {
            (Some(reason), _) => Err(reason),
            (None, None) => Err(NoClaim::Superseded),
            (None, Some(serving)) => {
                let caller = serving.endpoint.caller.address();
                let own = self.shares.get(&caller).copied().unwrap_or(0);
                if self.claims.len() >= CLAIMS_MAX || self.claims.len() >= CLAIMS_MAX / 2 && own >= CLAIMS_SHARE {
                    Err(NoClaim::Full)
                } else {
                    serving.closed = asked;
                    Ok((serving.claimed(), caller))
                }
            }
        };
        match outcome {
            Ok((claimed, caller)) => {
                self.claims.insert(claimed, Some(caller));
                *self.shares.entry(caller).or_default() += 1;
                Ok(Claim(number))
            }
            Err(reason) => {
                self.serving.remove(&number);
                Err(reason)
            }
        }
    }

    /// Denies the request of an authenticated peer. It takes no claim, so another peer's copy of
    /// the request is still served. `asked` is as in [`claim`](Self::claim).
    ///
    /// # Errors
    /// If the request was superseded or another copy of it claimed. Then the peer gets no answer.
    /// The ticket is used up either way.
    pub fn deny(&mut self, ticket: Ticket, asked: Option<u64>) -> Result<Denial, NoClaim> {
        let number = ticket.0;
        match (self.is_moot(&ticket), self.serving.get_mut(&number)) {
            (None, Some(serving)) => {
                serving.closed = asked;
                Ok(Denial(number))
            }
            (reason, _) => {
                self.serving.remove(&number);
                Err(reason.unwrap_or(NoClaim::Superseded))
            }
        }
    }

    /// The denied peer was answered, or could not be. Forgets the request.
    pub fn close_denial(&mut self, refusal: Denial) {
        self.serving.remove(&refusal.0);
    }

    /// The callback failed and nothing happened. The next copy is served.
    pub fn forget(&mut self, ticket: Ticket) {
        self.serving.remove(&ticket.0);
    }

    /// The claimed request is over, answered or abandoned. Remembers it for [`REMEMBER`] from
    /// `now`.
    pub fn answered(&mut self, now: u64, claim: Claim) {
        if let Some(serving) = self.serving.remove(&claim.0) {
            self.expire_later(now, serving.claimed());
        }
    }

    /// Enters a claim of an earlier daemon, as if answered at `now`.
    pub fn remember(&mut self, now: u64, id: RequestId) {
        let claimed = Claimed { id, at: None };
        if self.claims.len() < CLAIMS_MAX && !self.claims.contains_key(&claimed) {
            self.claims.insert(claimed, None);
            self.expire_later(now, claimed);
        }
    }

    fn expire_later(&mut self, now: u64, claimed: Claimed) {
        let remember = u64::try_from(REMEMBER.as_nanos()).unwrap_or(u64::MAX);
        self.expiring.push_back((now.saturating_add(remember), claimed));
    }

    /// How many requests are being served, claimed or not.
    #[must_use]
    pub fn serving(&self) -> usize {
        self.serving.len()
    }

    /// How many of them are of this machine. Its connections and callbacks count apart: a holder of
    /// the key can ask for callbacks at any address.
    #[must_use]
    pub fn serving_at(&self, endpoint: &Endpoint) -> usize {
        let its = |it: &Endpoint| (it.caller.address(), it.is_connected);
        self.serving.values().filter(|serving| its(&serving.endpoint) == its(endpoint)).count()
    }

    /// Supersedes other requests of `endpoint`, since its client has sent `id` at `arrived`. A
    /// request whose peer is known by then stays.
    fn supersede(&mut self, id: &RequestId, endpoint: &Endpoint, arrived: u64) {
        for other in self.serving.values_mut().filter(|other| other.is_another(id, endpoint)) {
            other.superseded |= other.closed.is_none_or(|closed| arrived <= closed);
        }
    }

    fn expire(&mut self, now: u64) {
        while let Some((_, claimed)) = self.expiring.pop_front_if(|(until, _)| *until <= now) {
            if let Some(caller) = self.claims.remove(&claimed).flatten()
                && let Entry::Occupied(mut share) = self.shares.entry(caller)
            {
                *share.get_mut() -= 1;
                if *share.get() == 0 {
                    share.remove();
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::format;

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

    #[test]
    fn an_identity_is_printed_without_the_nuls_behind_its_domain() {
        assert_eq!(format!("{:?}", id(7)), "op 1 seqno 7 domain node1");
        let full = [b'\n'; DOMAIN_LEN - 1];
        assert_eq!(format!("{:?}", named(7, &full)), format!("op 1 seqno 7 domain {}", "\\n".repeat(DOMAIN_LEN - 1)));
    }

    fn caller(n: u8) -> SocketAddr {
        SocketAddr::from(([192, 168, 122, n], 1229))
    }

    fn serve(ledger: &mut Ledger, now: u64, id: RequestId, caller: SocketAddr) -> Ticket {
        match ledger.arrive(now, id, caller, now) {
            Arrival::Serve(ticket) => ticket,
            other @ (Arrival::Duplicate | Arrival::Outdated) => panic!("{id:?} from {caller} is {other:?}"),
        }
    }

    #[test]
    fn the_same_address_on_another_interface_is_another_client() {
        let mut ledger = Ledger::default();
        let endpoint = |interface| Endpoint { interface, ..caller(1).into() };
        let Arrival::Serve(first) = ledger.arrive(0, id(1), endpoint(5), 0) else { panic!("new") };
        let Arrival::Serve(second) = ledger.arrive(1, id(2), endpoint(6), 1) else { panic!("another endpoint") };
        assert_eq!(ledger.is_moot(&first), None, "nobody else's request supersedes it");
        // The routing table decides, so the callback may reach either.
        let Arrival::Serve(routed) = ledger.arrive(2, id(3), endpoint(0), 2) else { panic!("new") };
        assert_eq!(ledger.is_moot(&first), Some(NoClaim::Superseded));
        assert_eq!(ledger.is_moot(&second), Some(NoClaim::Superseded));
        let Arrival::Serve(_) = ledger.arrive(3, id(4), endpoint(5), 3) else { panic!("new") };
        assert_eq!(ledger.is_moot(&routed), Some(NoClaim::Superseded));
    }

    /// A holder of the key can ask for a callback at any address and port, so also at those of
    /// another client's connection.
    #[test]
    fn a_callback_to_the_address_of_a_connection_takes_nothing_from_it() {
        let mut ledger = Ledger::default();
        let at = |is_connected| Endpoint { is_connected, ..caller(1).into() };
        let Arrival::Serve(connected) = ledger.arrive(0, id(1), at(true), 0) else { panic!("new") };
        let Arrival::Serve(called) = ledger.arrive(1, id(2), at(false), 1) else { panic!("new") };
        assert_eq!((ledger.is_moot(&connected), ledger.is_moot(&called)), (None, None));
        assert_eq!((ledger.serving_at(&at(true)), ledger.serving_at(&at(false))), (1, 1));
        ledger.reject(id(3), at(false), 2);
        assert_eq!((ledger.is_moot(&connected), ledger.is_moot(&called)), (None, Some(NoClaim::Superseded)));
        // The same port again is the same client's next connection.
        let Arrival::Serve(_) = ledger.arrive(3, id(4), at(true), 3) else { panic!("new") };
        assert_eq!(ledger.is_moot(&connected), Some(NoClaim::Superseded));
    }

    #[test]
    fn an_identity_survives_as_bytes_and_what_another_daemon_claimed_is_a_duplicate() {
        let mut ledger = Ledger::default();
        let kept = RequestId::from_bytes(&id(0x0102_0304).to_bytes());
        assert_eq!(kept, id(0x0102_0304));
        ledger.remember(0, kept);
        let caller = SocketAddr::from(([192, 0, 2, 1], 1229));
        assert_eq!(ledger.arrive(SECOND, id(0x0102_0304), caller, SECOND), Arrival::Duplicate);
        assert!(matches!(ledger.arrive(SECOND, id(5), caller, SECOND), Arrival::Serve(_)));
        assert!(matches!(ledger.arrive(11 * SECOND, id(0x0102_0304), caller, 11 * SECOND), Arrival::Serve(_)));
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
        assert_eq!(ledger.arrive(0, id(1), caller(11), 0), Arrival::Duplicate);
        let second = serve(&mut ledger, 0, id(1), caller(12));
        assert!(ledger.has_duplicates(&first) && ledger.has_duplicates(&second));
        let claim = ledger.claim(0, second, Some(0)).unwrap();
        assert_eq!(ledger.claim(0, first, Some(0)), Err(NoClaim::Taken));
        assert_eq!(ledger.arrive(0, id(1), caller(13), 0), Arrival::Duplicate);
        ledger.answered(5 * SECOND, claim);
        assert_eq!(ledger.arrive(14 * SECOND, id(1), caller(11), 14 * SECOND), Arrival::Duplicate);
        let _ = serve(&mut ledger, 15 * SECOND, id(1), caller(11));
    }

    #[test]
    fn a_copy_elsewhere_takes_no_answer_from_what_changes_nothing() {
        let mut ledger = Ledger::default();
        let status = RequestId::of(Op::Status, &Request::new_zeroed());
        let copy = serve(&mut ledger, 0, status, caller(66));
        let claim = ledger.claim(0, copy, Some(0)).unwrap();
        let victim = serve(&mut ledger, 0, status, caller(11));
        assert!(ledger.has_duplicates(&victim));
        ledger.answered(0, claim);
        assert!(ledger.has_duplicates(&victim), "its failure is no news");
        let claim = ledger.claim(0, victim, Some(0)).unwrap();
        ledger.answered(SECOND, claim);
        for n in [11, 66] {
            assert_eq!(ledger.arrive(2 * SECOND, status, caller(n), 2 * SECOND), Arrival::Duplicate);
        }
    }

    #[test]
    fn two_connections_that_ask_the_same_are_two_clients() {
        let mut ledger = Ledger::default();
        let on = |port: u16| Endpoint { is_connected: true, ..SocketAddr::from(([192, 0, 2, 1], port)).into() };
        let mut claims = |op: Op| {
            let id = RequestId::of(op, &Request::new_zeroed());
            let Arrival::Serve(first) = ledger.arrive(0, id, on(1), 0) else { panic!("it is new") };
            let _ = ledger.claim(0, first, Some(0)).unwrap();
            match ledger.arrive(0, id, on(2), 0) {
                Arrival::Serve(second) => ledger.claim(0, second, Some(0)).is_ok(),
                Arrival::Duplicate | Arrival::Outdated => false,
            }
        };
        assert!(claims(Op::Status) && claims(Op::HostList) && claims(Op::DevStatus));
        assert!(!claims(Op::Off) && !claims(Op::On) && !claims(Op::Reboot), "one request acts once");
    }

    #[test]
    fn a_slow_action_is_not_forgotten_while_it_lasts() {
        let mut ledger = Ledger::default();
        let ticket = serve(&mut ledger, 0, id(1), caller(11));
        let _claim = ledger.claim(0, ticket, Some(0)).unwrap();
        assert_eq!(ledger.arrive(1000 * SECOND, id(1), caller(11), 1000 * SECOND), Arrival::Duplicate);
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
        assert!(!ledger.has_duplicates(&new));
        assert_eq!([&old, &new, &elsewhere].map(|t| ledger.is_moot(t)), [Some(NoClaim::Superseded), None, None]);
        assert_eq!((ledger.serving_at(&caller(11).into()), ledger.serving_at(&caller(12).into())), (2, 1));
        assert_eq!(ledger.claim(0, old, Some(0)), Err(NoClaim::Superseded));
        let copy = serve(&mut ledger, 0, id(1), caller(13));
        assert!(ledger.claim(0, elsewhere, Some(0)).is_ok());
        assert_eq!(ledger.is_moot(&copy), Some(NoClaim::Taken));
    }

    #[test]
    fn a_newer_question_that_is_turned_away_supersedes_too() {
        let mut ledger = Ledger::default();
        let old = serve(&mut ledger, 0, id(1), caller(11));
        ledger.reject(id(1), caller(11), 0);
        ledger.reject(id(2), caller(12), 0);
        assert_eq!(ledger.is_moot(&old), None, "a copy, and somebody elsewhere");
        ledger.reject(id(2), caller(11), 0);
        assert_eq!(ledger.is_moot(&old), Some(NoClaim::Superseded));
        ledger.forget(old);
        let _ = serve(&mut ledger, 0, id(1), caller(11));
    }

    #[test]
    fn a_second_client_takes_nothing_from_an_authenticated_one() {
        let mut ledger = Ledger::default();
        let ticket = serve(&mut ledger, 0, id(1), caller(11));
        let claim = ledger.claim(SECOND, ticket, Some(SECOND)).unwrap();
        let beside = serve(&mut ledger, SECOND + 1, id(2), caller(11));
        ledger.reject(id(3), caller(11), SECOND + 1);
        assert!(!ledger.is_claim_superseded(&claim));
        assert_eq!(ledger.is_moot(&beside), Some(NoClaim::Superseded), "by the third");
        ledger.answered(2 * SECOND, claim);
        assert_eq!(ledger.arrive(2 * SECOND, id(1), caller(11), 2 * SECOND), Arrival::Duplicate);
    }

    #[test]
    fn a_request_before_the_authentication_supersedes_after_the_claim() {
        let at_the_end = |ledger: &mut Ledger| ledger.arrive(2 * SECOND, id(2), caller(11), SECOND);
        let turned_away = |ledger: &mut Ledger| {
            ledger.reject(id(2), caller(11), SECOND);
            Arrival::Duplicate
        };
        for newer in [&at_the_end as &dyn Fn(&mut Ledger) -> Arrival, &turned_away] {
            let mut ledger = Ledger::default();
            let ticket = serve(&mut ledger, 0, id(1), caller(11));
            let claim = ledger.claim(SECOND, ticket, Some(SECOND)).unwrap();
            let elsewhere = ledger.arrive(2 * SECOND, id(2), caller(12), SECOND);
            assert!(!ledger.is_claim_superseded(&claim) && matches!(elsewhere, Arrival::Serve(_)));
            let _ = newer(&mut ledger);
            assert!(ledger.is_claim_superseded(&claim));
        }
    }

    #[test]
    fn a_request_read_before_the_claim_supersedes_whatever_its_time() {
        let mut ledger = Ledger::default();
        let ticket = serve(&mut ledger, 0, id(1), caller(11));
        let _ = serve(&mut ledger, 2 * SECOND, id(2), caller(11));
        assert_eq!(ledger.claim(2 * SECOND, ticket, Some(SECOND)), Err(NoClaim::Superseded));
    }

    #[test]
    fn a_peer_that_need_not_speak_is_overtaken_until_its_answer() {
        let mut ledger = Ledger::default();
        let ticket = serve(&mut ledger, 0, id(1), caller(11));
        let claim = ledger.claim(SECOND, ticket, None).unwrap();
        let _ = serve(&mut ledger, 5 * SECOND, id(2), caller(11));
        assert!(ledger.is_claim_superseded(&claim));
    }

    #[test]
    fn an_outdated_request_is_not_served() {
        let mut ledger = Ledger::default();
        let newer = serve(&mut ledger, 2 * SECOND, id(2), caller(11));
        assert_eq!(ledger.arrive(2 * SECOND, id(1), caller(11), SECOND), Arrival::Outdated);
        assert_eq!(ledger.is_moot(&newer), Some(NoClaim::Superseded), "times may be wrong");
        ledger.forget(newer);
        // A copy renews the time.
        let asking = serve(&mut ledger, 2 * SECOND, id(3), caller(11));
        assert_eq!(ledger.arrive(4 * SECOND, id(3), caller(11), 4 * SECOND), Arrival::Duplicate);
        assert_eq!(ledger.arrive(4 * SECOND, id(4), caller(11), 3 * SECOND), Arrival::Outdated);
        ledger.forget(asking);
    }

    #[test]
    fn a_full_ledger_rejects_new_claims_and_forgets_none() {
        let mut ledger = Ledger::default();
        for n in 0..u32::try_from(CLAIMS_MAX).unwrap() {
            let ticket = serve(&mut ledger, 0, id(n), SocketAddr::from((n.to_be_bytes(), 1)));
            let claim = ledger.claim(0, ticket, Some(0)).unwrap();
            ledger.answered(0, claim);
        }
        let ticket = serve(&mut ledger, 0, id(u32::MAX), caller(11));
        assert_eq!(ledger.claim(0, ticket, Some(0)), Err(NoClaim::Full));
        assert_eq!(ledger.arrive(0, id(0), caller(11), 0), Arrival::Duplicate);
        let ticket = serve(&mut ledger, 11 * SECOND, id(u32::MAX), caller(11));
        assert!(ledger.claim(11 * SECOND, ticket, Some(11 * SECOND)).is_ok());
    }

    #[test]
    fn one_address_cannot_take_the_second_half_of_the_claims() {
        let mut ledger = Ledger::default();
        let mut next = 0;
        let mut take = |ledger: &mut Ledger, now: u64, of: u8| {
            next += 1;
            let ticket = serve(ledger, now, id(next), caller(of));
            ledger.claim(now, ticket, Some(now)).map(|claim| ledger.answered(now, claim))
        };
        // As long as there is room it is everybody's.
        for n in 0..CLAIMS_MAX / 2 {
            assert_eq!(take(&mut ledger, 0, u8::try_from(n % 17).unwrap()), Ok(()));
        }
        for greedy in 0..17 {
            assert_eq!(take(&mut ledger, 0, greedy), Err(NoClaim::Full));
        }
        for other in 17..50 {
            for _ in 0..CLAIMS_SHARE {
                assert_eq!(take(&mut ledger, 0, other), Ok(()));
            }
            assert_eq!(take(&mut ledger, 0, other), Err(NoClaim::Full));
        }
        let later = 11 * SECOND;
        for of in 0..50 {
            assert_eq!(take(&mut ledger, later, of), Ok(()));
        }
        assert_eq!((ledger.shares.len(), ledger.shares.values().sum()), (50, ledger.claims.len()));
    }

    #[derive(Clone, Debug)]
    enum LedgerStep {
        /// The request, its endpoint, and how long it waited before it was read.
        Arrive(u32, u8, u64),
        /// The ticket, and how long ago its peer has authenticated; `None` if it need not.
        Claim(usize, Option<u64>),
        Forget(usize),
        Answer(usize),
        Sleep(u64),
    }

    fn event() -> impl Strategy<Value = LedgerStep> {
        let waited = || (0..3u64).prop_map(|seconds| seconds * SECOND);
        prop_oneof![
            4 => (0..4u32, 0..3u8, waited()).prop_map(|(seqno, at, waited)| LedgerStep::Arrive(seqno, at, waited)),
            3 => (any::<usize>(), proptest::option::weighted(0.8, waited())).prop_map(|(n, ago)| LedgerStep::Claim(n, ago)),
            1 => any::<usize>().prop_map(LedgerStep::Forget),
            2 => any::<usize>().prop_map(LedgerStep::Answer),
            1 => (0..6u64).prop_map(|seconds| LedgerStep::Sleep(seconds * SECOND)),
        ]
    }

    /// A request that was read and is no copy.
    #[derive(Clone, Copy)]
    struct Heard {
        seqno: u32,
        at: u8,
        arrived: u64,
    }

    proptest! {
        /// In any order of events: a request is claimed at most once in any 10 s after its answer,
        /// never while an older claim of it is open, and never when superseded. An open claim is
        /// superseded by exactly what its peer may have asked.
        #[test]
        fn at_most_one_claim(events in proptest::collection::vec(event(), 0..80)) {
            let mut ledger = Ledger::default();
            let mut now = 10 * SECOND;
            let mut heard: std::vec::Vec<Heard> = std::vec::Vec::new();
            // With the number of arrivals when each was served or claimed.
            let mut tickets: std::vec::Vec<(Ticket, usize)> = std::vec::Vec::new();
            let mut claims: std::vec::Vec<(Claim, usize, usize, Option<u64>)> = std::vec::Vec::new();
            let mut answered_at: [Option<u64>; 4] = [None; 4];
            for event in events {
                match event {
                    LedgerStep::Arrive(seqno, at, waited) => {
                        let arrived = now - waited;
                        let arrival = ledger.arrive(now, id(seqno), caller(at), arrived);
                        if arrival != Arrival::Duplicate {
                            heard.push(Heard { seqno, at, arrived });
                        }
                        if let Arrival::Serve(ticket) = arrival {
                            let open = tickets.iter().map(|(_, which)| &heard[*which]);
                            let outdated = |other: &Heard| other.at == at && other.seqno != seqno && other.arrived > arrived;
                            prop_assert!(!open.into_iter().any(outdated), "served, and nobody waits for it");
                            tickets.push((ticket, heard.len() - 1));
                        }
                    }
                    LedgerStep::Claim(n, ago) if !tickets.is_empty() => {
                        let (ticket, which) = tickets.swap_remove(n % tickets.len());
                        let (Heard { seqno, at, .. }, asked) = (heard[which], ago.map(|ago| now - ago));
                        let superseded = heard[which..].iter().any(|other| other.at == at && other.seqno != seqno);
                        match ledger.claim(now, ticket, asked) {
                            Ok(claim) => {
                                prop_assert!(!claims.iter().any(|(_, open, ..)| heard[*open].seqno == seqno), "claimed twice at once");
                                prop_assert!(answered_at[seqno as usize].is_none_or(|then| now >= then + 10 * SECOND));
                                prop_assert!(!superseded);
                                claims.push((claim, which, heard.len(), asked));
                            }
                            Err(reason) => prop_assert_eq!(reason == NoClaim::Superseded, superseded),
                        }
                    }
                    LedgerStep::Forget(n) if !tickets.is_empty() => ledger.forget(tickets.swap_remove(n % tickets.len()).0),
                    LedgerStep::Answer(n) if !claims.is_empty() => {
                        let (claim, which, from, asked) = claims.swap_remove(n % claims.len());
                        let Heard { seqno, at, .. } = heard[which];
                        let concerns = |other: &Heard| {
                            other.at == at && other.seqno != seqno && asked.is_none_or(|asked| other.arrived <= asked)
                        };
                        prop_assert_eq!(ledger.is_claim_superseded(&claim), heard[from..].iter().any(concerns));
                        ledger.answered(now, claim);
                        answered_at[seqno as usize] = Some(now);
                    }
                    LedgerStep::Sleep(time) => now += time,
                    LedgerStep::Claim(..) | LedgerStep::Forget(_) | LedgerStep::Answer(_) => {}
                }
                prop_assert_eq!(ledger.serving(), tickets.len() + claims.len());
                prop_assert_eq!(ledger.shares.values().sum::<usize>(), ledger.claims.len());
            }
        }
    }
}
