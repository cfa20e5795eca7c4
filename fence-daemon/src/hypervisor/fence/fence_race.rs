//! Fence races. In a split-brain both nodes fence each other at the same moment. Both have the key,
//! both are answered within milliseconds, and so both would die. At most one may.
//!
//! A server that serves one request after the other spares the first node: the second one is dead
//! when its turn comes. This daemon serves requests at once, so it does the same by a rule. A
//! request of a guest that is being fenced waits for the end of that fence. If the fence succeeds,
//! the request is not carried out: its client is dead. If it fails, the request is carried out.
//!
//! A client whose domain the hypervisor vouches for is known by that. Any other is found by its
//! Ethernet address. The neighbour of its callback address, to which a
//! connection has just been made, is compared with the network interfaces of the domain that is
//! being fenced. A client that cannot be found so (a relayed request, an interface that the
//! domain's XML does not have) is served, and so is one whose Ethernet address several machines
//! have.

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use fence_common::caller::{Address, Caller};
use fence_common::sync::lock;
use fence_net::neighbour::{self, Mac};
use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};
use uuid::Uuid;

use crate::clock::Moment;

/// How long after its arrival a request may still be carried out. For so long after a fence the
/// requests of its victim are recognised.
const KEEP: Duration = Duration::from_secs(30);

/// The client behind a request.
#[derive(Clone, Copy, Debug)]
pub struct Requester {
    /// Its end of the conversation.
    pub caller: Caller,
    /// The domain that it runs in, where the hypervisor vouches for it.
    pub domain: Option<Uuid>,
    /// The number of the interface that it is called back by. 0: the routing table decides.
    pub interface: u32,
    /// When its request arrived.
    pub arrived: Moment,
}

impl Requester {
    /// The callback's address and interface, if nothing but those tells who it is.
    fn unknown_at(self) -> Option<(SocketAddr, u32)> {
        match (self.caller, self.domain) {
            (Caller::Ip(address), None) => Some((address, self.interface)),
            (Caller::Ip(_) | Caller::Vsock { .. } | Caller::Line { .. }, _) => None,
        }
    }
}

/// A domain that is about to be fenced.
#[derive(Clone, Debug)]
pub(crate) struct Fenced {
    pub(crate) uuid: Uuid,
    pub(crate) name: String,
    /// The Ethernet addresses of its network interfaces.
    pub(crate) macs: Arc<[Mac]>,
}

/// A fence that is under way, or was a moment ago.
#[derive(Debug)]
struct Fence {
    number: u64,
    domain: Fenced,
    /// The client that has asked for it.
    by: Option<Address>,
    /// When it was over. `None`: it is under way.
    over: Option<Moment>,
}

/// Why a request must not be carried out, with the name of the requester's own domain.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    /// The requester is being fenced. The request waits for the end of that: [`FenceRaces::over`].
    Dying(Dying),
    /// The requester was fenced after it had asked.
    Dead(String),
}

/// A requester that is being fenced.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Dying {
    number: u64,
    pub(crate) name: String,
}

/// The fences under way, and those of a moment ago.
pub(crate) struct FenceRaces {
    fences: Mutex<Fences>,
    /// Told when a fence is over.
    news: watch::Sender<()>,
    neighbours: fn(SocketAddr, u32) -> io::Result<Vec<Mac>>,
}

#[derive(Default)]
struct Fences {
    next: u64,
    list: Vec<Fence>,
}

impl Default for FenceRaces {
    fn default() -> Self {
        Self::with_neighbours(neighbour::macs_of)
    }
}

impl FenceRaces {
    pub(crate) fn with_neighbours(neighbours: fn(SocketAddr, u32) -> io::Result<Vec<Mac>>) -> Self {
        Self { fences: Mutex::default(), news: watch::Sender::default(), neighbours }
    }

    /// Enters the victims right before they are killed. The caller holds their locks. `running`
    /// tells which domains with an Ethernet address run.
    ///
    /// # Errors
    /// The requester is being fenced, or was after it had asked.
    pub(crate) fn enter(
        self: &Arc<Self>,
        requester: Option<Requester>,
        victims: Vec<Fenced>,
        running: impl Fn(Mac) -> Vec<Uuid>,
    ) -> Result<Fencing, Refused> {
        let mut known = None;
        loop {
            let mut fences = self.fences();
            let now = Moment::now();
            fences.list.retain(|fence| fence.over.is_none_or(|over| now.since(over) < KEEP));
            let suspects = requester.map(|requester| fences.of(requester)).unwrap_or_default();
            let ip = requester.and_then(Requester::unknown_at);
            let macs = match (ip, suspects.is_empty(), known.take()) {
                (None, ..) | (_, true, _) => Vec::new(),
                (Some(_), false, Some(macs)) => macs,
                (Some((caller, interface)), false, None) => {
                    // Without the lock, so the fences have to be looked at once more.
                    drop(fences);
                    known = Some((self.neighbours)(caller, interface).unwrap_or_else(|error| {
                        tracing::warn!(%caller, %error, "the neighbour tables cannot be read: the client is not checked for a fence race");
                        Vec::new()
                    }));
                    continue;
                }
            };
            let vouched = requester.and_then(|requester| requester.domain);
            let is_it = |suspect: &&Suspect| {
                vouched == Some(suspect.domain.uuid) || suspect.domain.macs.iter().any(|mac| macs.contains(mac))
            };
            let found = suspects.iter().filter(is_it).min_by_key(|suspect| suspect.dying.is_some());
            if let Some(Suspect { domain, dying }) = found
                && let mut others = macs.iter().flat_map(|mac| running(*mac))
                && others.all(|uuid| suspects.iter().any(|suspect| suspect.domain.uuid == uuid))
            {
                let name = domain.name.clone();
                return Err(match *dying {
                    Some(number) => Refused::Dying(Dying { number, name }),
                    None => Refused::Dead(name),
                });
            }
            let first = fences.next;
            let by = requester.map(|requester| requester.caller.address());
            for domain in victims {
                let number = fences.next;
                fences.next += 1;
                fences.list.push(Fence { number, domain, by, over: None });
            }
            let numbers = first..fences.next;
            return Ok(Fencing { races: Arc::clone(self), numbers, over: None });
        }
    }

    /// The Ethernet addresses of a requester, unless the hypervisor vouches for its domain.
    pub(crate) fn macs_of(&self, requester: Requester) -> Vec<Mac> {
        let Some((caller, interface)) = requester.unknown_at() else { return Vec::new() };
        (self.neighbours)(caller, interface).unwrap_or_else(|error| {
            tracing::warn!(%caller, %error, "the neighbour tables cannot be read: the client's domain is not known");
            Vec::new()
        })
    }

    /// The domain of a recent fence that this requester runs in, or ran: the one that the
    /// hypervisor vouches for, or the only one with one of its Ethernet addresses.
    pub(crate) fn victim_of(&self, requester: Requester, macs: &[Mac]) -> Option<Fenced> {
        let (fences, now) = (self.fences(), Moment::now());
        let is_it = |fence: &&Fence| match requester.domain {
            Some(domain) => fence.domain.uuid == domain,
            None => fence.domain.macs.iter().any(|mac| macs.contains(mac)),
        };
        let is_recent = |fence: &&Fence| fence.over.is_none_or(|over| now.since(over) < KEEP);
        let mut found = fences.list.iter().filter(is_recent).filter(is_it).map(|fence| &fence.domain);
        let first = found.next()?;
        found.all(|other| other.uuid == first.uuid).then(|| first.clone())
    }

    /// Waits until the fence of a requester is over, however it ends. `false`: it is not by `by`.
    /// The caller holds no domain's lock: that fence may need it.
    pub(crate) async fn over(&self, requester: &Dying, by: Instant) -> bool {
        let mut news = self.news.subscribe();
        let lasts = || self.fences().list.iter().any(|fence| fence.number == requester.number && fence.over.is_none());
        // An error means that the sender is gone, and it is ours.
        while lasts() && matches!(timeout_at(by, news.changed()).await, Ok(Ok(()))) {}
        !lasts()
    }

    fn fences(&self) -> MutexGuard<'_, Fences> {
        lock(&self.fences)
    }
}

/// A domain that may be the requester.
struct Suspect {
    domain: Fenced,
    /// The number of its fence, while that is under way.
    dying: Option<u64>,
}

impl Fences {
    /// The domains that may be the requester, and were alive when it asked. A client that fenced a
    /// domain is never taken for that domain.
    fn of(&self, requester: Requester) -> Vec<Suspect> {
        let may_be = |fence: &&Fence| {
            let may_be_known = match requester.domain {
                Some(domain) => fence.domain.uuid == domain,
                None => !fence.domain.macs.is_empty(),
            };
            may_be_known
                && fence.by.is_none_or(|by| by != requester.caller.address())
                && fence.over.is_none_or(|over| requester.arrived < over)
        };
        let suspect = |fence: &Fence| Suspect {
            domain: fence.domain.clone(),
            dying: fence.over.is_none().then_some(fence.number),
        };
        self.list.iter().filter(may_be).map(suspect).collect()
    }
}

/// Domains that are being fenced. Dropping it forgets them, unless the fence has
/// [killed](Fencing::killed).
#[must_use]
pub(crate) struct Fencing {
    races: Arc<FenceRaces>,
    numbers: std::ops::Range<u64>,
    over: Option<Moment>,
}

impl Fencing {
    /// The domains were dead at this moment, or may have been. Their requests from before it are
    /// not carried out; later ones are another life's.
    pub(crate) fn killed(mut self, at: Moment) {
        self.over = Some(at);
    }
}

impl Drop for Fencing {
    fn drop(&mut self) {
        let mut fences = self.races.fences();
        match self.over {
            None => fences.list.retain(|fence| !self.numbers.contains(&fence.number)),
            Some(_) => {
                let ours = fences.list.iter_mut().filter(|fence| self.numbers.contains(&fence.number));
                ours.for_each(|fence| fence.over = self.over);
            }
        }
        drop(fences);
        self.races.news.send_replace(());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The neighbours of these tests: 192.0.2.N has the Ethernet address that ends with N.
    fn neighbours(caller: SocketAddr, _: u32) -> io::Result<Vec<Mac>> {
        let SocketAddr::V4(caller) = caller else { return Err(io::ErrorKind::Unsupported.into()) };
        Ok(vec![mac(caller.ip().octets()[3])])
    }

    fn mac(number: u8) -> Mac {
        [0x52, 0x54, 0, 0, 0, number]
    }

    fn guest(number: u8) -> Fenced {
        Fenced {
            uuid: Uuid::from_u128(number.into()),
            name: format!("node{number}"),
            macs: [mac(9), mac(number)].into(),
        }
    }

    fn asks(number: u8, arrived: Moment) -> Option<Requester> {
        Some(by_ip(SocketAddr::from(([192, 0, 2, number], 1229)), arrived))
    }

    fn by_ip(caller: SocketAddr, arrived: Moment) -> Requester {
        Requester { caller: caller.into(), domain: None, interface: 0, arrived }
    }

    /// A client whose domain is known, and whose callback address would name nobody.
    fn vouched(number: u8, arrived: Moment) -> Option<Requester> {
        let caller = Caller::Vsock { cid: number.into(), port: 1025 };
        Some(Requester { caller, domain: Some(guest(number).uuid), interface: 0, arrived })
    }

    /// One machine for each Ethernet address.
    fn one(mac: Mac) -> Vec<Uuid> {
        vec![guest(mac[5]).uuid]
    }

    fn races() -> Arc<FenceRaces> {
        Arc::new(FenceRaces::with_neighbours(neighbours))
    }

    #[test]
    fn the_first_of_two_in_a_fence_race_survives() {
        let (races, now) = (races(), Moment::now());
        let first = races.enter(asks(1, now), vec![guest(2)], one).ok().unwrap();
        let dying = Dying { number: 0, name: "node2".to_owned() };
        assert_eq!(races.enter(asks(2, now), vec![guest(1)], one).err().unwrap(), Refused::Dying(dying));
        // Nobody else is meant, nor is the first, whatever else it wants.
        assert!(races.enter(asks(3, now), vec![guest(4)], one).is_ok());
        assert!(races.enter(asks(1, now), vec![guest(3)], one).is_ok());
        // It died after it had asked; what it asks in its next life counts.
        let dead = now.plus(Duration::from_millis(5));
        first.killed(dead);
        let dead_now = Refused::Dead("node2".to_owned());
        assert_eq!(races.enter(asks(2, now), vec![guest(1)], one).err().unwrap(), dead_now);
        assert!(races.enter(asks(2, dead), vec![guest(1)], one).is_ok());
    }

    #[test]
    fn a_client_that_the_hypervisor_vouches_for_is_known_without_a_network() {
        let (races, now) = (races(), Moment::now());
        let bare = |number| Fenced { macs: [].into(), ..guest(number) };
        let _first = races.enter(vouched(1, now), vec![bare(2)], one).ok().unwrap();
        let dying = Dying { number: 0, name: "node2".to_owned() };
        assert_eq!(races.enter(vouched(2, now), vec![bare(1)], one).err().unwrap(), Refused::Dying(dying));
        assert!(races.enter(vouched(3, now), vec![bare(4)], one).is_ok());
        // The number alone names nobody.
        let unknown = Requester { domain: None, ..vouched(2, now).unwrap() };
        assert!(races.enter(Some(unknown), vec![bare(5)], one).is_ok());
    }

    #[test]
    fn a_requester_is_known_beyond_its_death() {
        let (races, now) = (races(), Moment::now());
        let known = |requester: Option<Requester>| {
            let requester = requester.unwrap();
            races.victim_of(requester, &races.macs_of(requester)).map(|domain| domain.name)
        };
        assert_eq!(known(asks(2, now)), None);
        let bare = Fenced { macs: [].into(), ..guest(3) };
        races.enter(None, vec![guest(2), bare], one).ok().unwrap().killed(now);
        assert_eq!(known(asks(2, now)).as_deref(), Some("node2"));
        assert_eq!(known(vouched(3, now)).as_deref(), Some("node3"));
        assert_eq!(known(asks(3, now)), None, "it has no address");
        assert_eq!(known(asks(9, now)).as_deref(), Some("node2"), "the only one");
        // An address that two machines had names neither.
        races.enter(None, vec![guest(4)], one).ok().unwrap().killed(now.before(KEEP / 2));
        assert_eq!(known(asks(9, now)), None);
        assert_eq!(known(asks(4, now)).as_deref(), Some("node4"));
        races.enter(None, vec![guest(5)], one).ok().unwrap().killed(now.before(KEEP));
        assert_eq!(known(asks(5, now)), None, "long ago");
    }

    #[test]
    fn only_a_client_that_nobody_vouches_for_has_addresses() {
        let (races, now) = (races(), Moment::now());
        assert_eq!(races.macs_of(asks(1, now).unwrap()), [mac(1)]);
        assert_eq!(races.macs_of(vouched(2, now).unwrap()), [[0; 6]; 0]);
    }

    #[test]
    fn a_fence_that_failed_takes_nobodys_word() {
        let (races, now) = (races(), Moment::now());
        drop(races.enter(asks(1, now), vec![guest(2)], one).ok().unwrap());
        assert!(races.enter(asks(2, now), vec![guest(1)], one).is_ok());
    }

    #[test]
    fn a_fence_of_long_ago_is_forgotten() {
        let (races, now) = (races(), Moment::now());
        races.enter(asks(1, now), vec![guest(2)], one).ok().unwrap().killed(now.before(KEEP));
        assert!(races.enter(asks(2, now.before(2 * KEEP)), vec![guest(1)], one).is_ok());
        assert_eq!(races.fences().list.len(), 0);
    }

    #[test]
    fn an_unidentified_client_is_believed() {
        let (races, now) = (races(), Moment::now());
        let fenced = |victim| races.enter(asks(1, now), vec![victim], one).ok().unwrap();
        let fencing = fenced(guest(2));
        // Two machines have the address, and the other one lives.
        let two = |mac: Mac| vec![guest(mac[5]).uuid, Uuid::from_u128(77)];
        assert!(races.enter(asks(2, now), vec![guest(1)], two).is_ok());
        // Of no address that is known, or none at all.
        assert!(races.enter(asks(8, now), vec![guest(3)], one).is_ok());
        assert!(races.enter(None, vec![guest(3)], one).is_ok());
        let nowhere = Some(by_ip("[2001:db8::2]:1229".parse().unwrap(), now));
        assert!(races.enter(nowhere, vec![guest(3)], one).is_ok());
        drop(fencing);
        let _fencing = fenced(Fenced { macs: [].into(), ..guest(2) });
        assert!(races.enter(asks(2, now), vec![guest(1)], one).is_ok());
    }

    #[test]
    fn a_guest_may_fence_itself_and_goes_on_asking() {
        let (races, now) = (races(), Moment::now());
        let _fencing = races.enter(asks(1, now), vec![guest(1)], one).ok().unwrap();
        assert!(races.enter(asks(1, now), vec![guest(2)], one).is_ok());
    }
}
