//! Connections that clients make to this host, whatever they lead over: a client connects, sends
//! its request, and waits for its answer on the same connection.
//!
//! Anybody can connect, so a connection gets one second and one of a few places until its request
//! is there. When the places are used up, the machine with the most of them loses its oldest one.
//! An honest client has one, and needs it for a round trip only. So silent peers delay nobody.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use fence_common::admit::admit_stream;
use fence_common::caller::{Address, Caller, Vouched};
use fence_common::hash::HashKind;
use fence_common::sync::lock;
use fence_common::verdict::{Counters, Verdict};
use fence_common::wire::{REQUEST_LEN, Request};
use tokio::io::AsyncReadExt;
use tokio::sync::Notify;
use tokio::time::timeout;
use tracing::debug;
use zerocopy::FromBytes;

use super::arrivals::Feed;
use super::judge::Judge;
use super::request::{Incoming, Stream, Verified};
use crate::clock::Moment;
use crate::observe::requests::Via;

/// How long a client may take for its request, as with fence_virtd. Stock clients send it at once.
const REQUEST_WITHIN: Duration = Duration::from_secs(1);

/// How many connections may wait for their request at once. A file descriptor each; to displace an
/// honest client takes this many machines within a round trip.
const WAITING_MAX: usize = 512;

/// How many of them may come from one machine. As many requests of one machine are served at once.
const WAITING_MAX_PER_SOURCE: usize = 64;

type VoucherAnswer = Pin<Box<dyn Future<Output = Option<Vouched>> + Send>>;

/// Knows which domain has an address now. Intake itself never asks libvirt.
pub struct Voucher(Box<dyn Fn(Address) -> VoucherAnswer + Send + Sync>);

impl Voucher {
    /// Asks by `ask`, which answers `None` in every doubt.
    pub fn new<A: Future<Output = Option<Vouched>> + Send + 'static>(
        ask: impl Fn(Address) -> A + Send + Sync + 'static,
    ) -> Self {
        Self(Box::new(move |address| Box::pin(ask(address))))
    }

    async fn domain_of(&self, address: Address) -> Option<Vouched> {
        (self.0)(address).await
    }
}

impl fmt::Debug for Voucher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Voucher")
    }
}

/// The connections of one listener.
#[derive(Debug)]
pub(super) struct ClientConnections {
    via: Via,
    /// The weakest digest that a request may carry.
    hash: HashKind,
    judge: Judge,
    voucher: Option<Voucher>,
    counters: Mutex<Counters>,
    waiting: Mutex<Unread>,
}

impl ClientConnections {
    pub(super) fn new(via: Via, hash: HashKind, judge: Judge) -> Arc<Self> {
        let (counters, waiting) = (Mutex::default(), Mutex::default());
        Arc::new(Self { via, hash, judge, voucher: None, counters, waiting })
    }

    /// Connections of machines whose domains `voucher` knows.
    pub(super) fn vouched(via: Via, hash: HashKind, judge: Judge, voucher: Voucher) -> Arc<Self> {
        let (counters, waiting) = (Mutex::default(), Mutex::default());
        Arc::new(Self { via, hash, judge, voucher: Some(voucher), counters, waiting })
    }

    /// The requests so far, by verdict.
    pub(super) fn counters(&self) -> Counters {
        *lock(&self.counters)
    }

    /// Takes in a connection that was accepted a moment ago. Returns at once.
    pub(super) fn take(self: &Arc<Self>, stream: Stream, caller: Caller, feed: &Feed) {
        let (arrived, place) = (Moment::now(), self.enter(caller.address()));
        let (connections, feed) = (Arc::clone(self), feed.clone());
        tokio::spawn(async move {
            if let Some(incoming) = connections.receive(stream, caller, arrived, &place).await {
                // The place counts until the request is handed over.
                let _ = feed.send(incoming).await;
            }
            connections.leave(&place);
        });
    }

    /// Reads a request and judges it. Whatever is wrong is counted, and ends the connection.
    async fn receive(&self, mut stream: Stream, caller: Caller, arrived: Moment, place: &Place) -> Option<Incoming> {
        let mut bytes = [0; REQUEST_LEN];
        let read = tokio::select! {
            biased;
            read = timeout(REQUEST_WITHIN, stream.read_exact(&mut bytes)) => matches!(read, Ok(Ok(_))),
            () = place.displaced.notified() => false,
        };
        let judged = if read { self.judge(&bytes, caller, arrived).await } else { Err(Verdict::Length) };
        let verdict = judged.as_ref().map_or_else(|verdict| *verdict, |_| Verdict::Delivered);
        lock(&self.counters).count(verdict);
        self.judge.note_rejection(&caller.address().sender(), verdict, arrived);
        match judged {
            Ok(request) => Some(Incoming::connected(request, stream)),
            Err(verdict) => {
                debug!(%caller, ?verdict, "{}: closed without an answer", self.via);
                None
            }
        }
    }

    async fn judge(&self, bytes: &[u8; REQUEST_LEN], caller: Caller, arrived: Moment) -> Result<Verified, Verdict> {
        let request = Request::read_from_bytes(bytes).map_err(|_| Verdict::Length)?;
        admit_stream(&request, self.hash)?;
        let (address, sender) = (caller.address(), caller.address().sender());
        let (key, owner) = match self.voucher {
            None => self.judge.judge(&request, &sender, Some(address))?,
            Some(_) => self.judge.judge_unnamed(&request, &sender)?,
        };
        // libvirt is asked for no request with a wrong digest.
        let domain = match &self.voucher {
            None => None,
            Some(voucher) => voucher.domain_of(address).await.map(Arc::new),
        };
        let verified = Verified::connected(&request, key, caller, self.via, arrived).ok_or(Verdict::Op)?;
        let verified = verified.signed_for(owner).sent_by(sender).vouched_for(domain).came_to(self.judge.origin());
        // A key that is not valid for this client counts as a wrong key.
        if self.judge.may_ask(owner, &verified.who()) { Ok(verified) } else { Err(Verdict::Digest) }
    }

    /// Enters a connection without a request. Another one may have to go.
    fn enter(&self, source: Address) -> Place {
        let mut waiting = lock(&self.waiting);
        let too_many = if waiting.count_of(source) >= WAITING_MAX_PER_SOURCE {
            Some(source)
        } else if waiting.list.len() >= WAITING_MAX {
            waiting.busiest()
        } else {
            None
        };
        if let Some(displaced) = too_many.and_then(|source| waiting.take_oldest_of(source)) {
            displaced.notify_one();
        }
        let displaced = Arc::new(Notify::new());
        let number = waiting.add(source, Arc::clone(&displaced));
        Place { number, displaced }
    }

    fn leave(&self, place: &Place) {
        lock(&self.waiting).take(place.number);
    }
}

/// The connections without a request, in the order of their arrival.
#[derive(Debug, Default)]
struct Unread {
    next: u64,
    list: BTreeMap<u64, (Address, Arc<Notify>)>,
    /// Their numbers by machine. None is empty. Who floods the list must not make it slow.
    of: BTreeMap<Address, BTreeSet<u64>>,
}

impl Unread {
    fn add(&mut self, source: Address, displaced: Arc<Notify>) -> u64 {
        let number = self.next;
        self.next = self.next.wrapping_add(1);
        self.list.insert(number, (source, displaced));
        self.of.entry(source).or_default().insert(number);
        number
    }

    fn take(&mut self, number: u64) -> Option<Arc<Notify>> {
        let (source, displaced) = self.list.remove(&number)?;
        if let Some(own) = self.of.get_mut(&source) {
            own.remove(&number);
            if own.is_empty() {
                self.of.remove(&source);
            }
        }
        Some(displaced)
    }

    fn count_of(&self, source: Address) -> usize {
        self.of.get(&source).map_or(0, BTreeSet::len)
    }

    fn take_oldest_of(&mut self, source: Address) -> Option<Arc<Notify>> {
        let oldest = self.of.get(&source).and_then(BTreeSet::first).copied()?;
        self.take(oldest)
    }

    /// The machine with the most connections; of several the one that has waited longest.
    fn busiest(&self) -> Option<Address> {
        let rank = |own: &BTreeSet<u64>| (own.len(), Reverse(own.first().copied()));
        self.of.iter().max_by_key(|(_, own)| rank(own)).map(|(source, _)| *source)
    }
}

/// A connection in that list.
#[derive(Debug)]
struct Place {
    number: u64,
    displaced: Arc<Notify>,
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use fence_common::key::Key;
    use fence_common::keys::{GroupKey, KeyOwner};
    use fence_common::wire::Op;
    use fence_config::{Group, Groups};
    use tokio::io::AsyncWriteExt;
    use tokio::net::UnixStream;
    use uuid::Uuid;
    use zerocopy::{FromZeros, IntoBytes};

    use super::super::keyring::Keyring;
    use super::*;

    /// Whether the place is still its connection's.
    fn is_kept(connections: &ClientConnections, place: &Place) -> bool {
        lock(&connections.waiting).list.contains_key(&place.number)
    }

    #[tokio::test]
    async fn a_connection_too_many_costs_the_oldest_one_its_place() {
        let intake = ClientConnections::new(Via::Tcp, HashKind::Sha256, Judge::new(Keyring::new(None)));
        let source = |number: usize| Address::Cid(u32::try_from(number).unwrap());
        // Of one source: the oldest of that source.
        let other = intake.enter(source(1));
        let own: Vec<_> = (0..=WAITING_MAX_PER_SOURCE).map(|_| intake.enter(source(2))).collect();
        own[0].displaced.notified().await;
        assert!(
            is_kept(&intake, &other) && !is_kept(&intake, &own[0]) && own[1..].iter().all(|own| is_kept(&intake, own))
        );
        own.iter().for_each(|own| intake.leave(own));
        // Of all sources: the oldest of the one with the most.
        let two = [intake.enter(source(3)), intake.enter(source(3))];
        let all: Vec<_> = (3..WAITING_MAX).map(|number| intake.enter(source(100 + number))).collect();
        let one_more = intake.enter(source(4));
        two[0].displaced.notified().await;
        let rest = [&other, &two[1], &one_more];
        assert!(!is_kept(&intake, &two[0]) && rest.into_iter().chain(&all).all(|place| is_kept(&intake, place)));
        // If all have one, the oldest of all.
        let last = intake.enter(source(5));
        other.displaced.notified().await;
        assert!(!is_kept(&intake, &other) && [&two[1], &one_more].into_iter().chain(&all).all(|p| is_kept(&intake, p)));
        [&two[1], &one_more, &last].into_iter().chain(&all).for_each(|place| intake.leave(place));
        assert!(lock(&intake.waiting).list.is_empty() && lock(&intake.waiting).of.is_empty());
    }

    const UUID: Uuid = Uuid::from_u128(1);

    fn domain() -> Option<Vouched> {
        Some(Vouched { name: "node1".to_owned(), uuid: UUID })
    }

    fn key(text: &str) -> Key {
        Key::new(text.as_bytes()).unwrap()
    }

    fn signed(by: &str) -> Request {
        let mut request = Request::new_zeroed();
        (request.op, request.seqno) = (Op::Off.to_wire(), 7.into());
        request.domain[..6].copy_from_slice(b"victim");
        key(by).sign(HashKind::Sha256, &mut request);
        request
    }

    /// What becomes of a request of CID 7, of which libvirt says this; and how often it is asked.
    async fn over_vsock(groups: Groups, request: Request, domain: Option<Vouched>) -> (Option<Incoming>, usize) {
        let asked = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&asked);
        let voucher = Voucher::new(move |address| {
            assert_eq!(address, Address::Cid(7));
            counted.fetch_add(1, Ordering::Relaxed);
            std::future::ready(domain.clone())
        });
        let keys = Keyring::new(Some(key("the listener's key").into()));
        keys.set_groups(vec![GroupKey { owner: KeyOwner(1), key: Arc::new(key("of node1's group")) }]);
        let judge = Judge::new(keys).grouped(groups);
        let accepted = ClientConnections::vouched(Via::Vsock, HashKind::Sha256, judge, voucher);
        let (mut client, ours) = UnixStream::pair().unwrap();
        let (feed, mut queue) = tokio::sync::mpsc::channel(1);
        accepted.take(Box::new(ours), Caller::Vsock { cid: 7, port: 1025 }, &feed);
        drop(feed);
        client.write_all(request.as_bytes()).await.unwrap();
        let incoming = queue.recv().await;
        (incoming, asked.load(Ordering::Relaxed))
    }

    #[tokio::test]
    async fn a_client_over_vsock_is_the_domain_that_libvirt_names() {
        let (incoming, asked) = over_vsock(Groups::Everyone, signed("the listener's key"), domain()).await;
        let request = incoming.as_ref().unwrap().request();
        assert_eq!((request.who().to_string(), request.via(), asked), ("node1 (CID 7)".to_owned(), Via::Vsock, 1));
        assert_eq!(request.who().domain, domain().as_ref());
        assert!(request.is_connected());
        let (incoming, _) = over_vsock(Groups::Everyone, signed("the listener's key"), None).await;
        assert_eq!(incoming.unwrap().request().who().to_string(), "CID 7");
        let (incoming, asked) = over_vsock(Groups::Everyone, signed("another key"), domain()).await;
        assert!(incoming.is_none() && asked == 0, "libvirt was asked for a request with a wrong digest");
    }

    #[tokio::test]
    async fn a_groups_key_counts_for_the_domain_that_libvirt_names() {
        let group = Group {
            from: vec!["node1".to_owned()],
            uuids: vec!["victim".to_owned()],
            owner: KeyOwner(1),
            ..Group::default()
        };
        let other = Some(Vouched { name: "node2".to_owned(), uuid: Uuid::from_u128(2) });
        for (by, domain, counts) in [
            ("of node1's group", domain(), true),
            ("of node1's group", other.clone(), false),
            ("of node1's group", None, false),
            ("the listener's key", domain(), false),
            ("the listener's key", other, true),
        ] {
            let (incoming, _) = over_vsock(Groups::Only(vec![group.clone()]), signed(by), domain.clone()).await;
            assert_eq!(incoming.is_some(), counts, "{by}, {domain:?}");
        }
    }
}
