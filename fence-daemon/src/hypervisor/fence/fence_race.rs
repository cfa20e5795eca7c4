//! Two guests that have each other fenced at the same moment, as the halves of a cluster that lose each other do. Both have the key, both
//! are answered within milliseconds, and so both would die. A server that serves one after the other spares the first: the other one is dead when
//! its turn comes. Here the same holds for requests that are served at once: what a guest asks for waits while it is being fenced itself. It is not
//! done if that fence succeeds, for then there is nobody who wants it any more, and done if it fails, for then there is.
//!
//! Who asks is found by its Ethernet address: the neighbour of the call-back address, to which a connection has just been made, is
//! compared with the network interfaces of the domain that is being fenced. A guest that is not found like that (a relayed request, an
//! interface that the domain's XML does not have) is believed, as is one whose Ethernet address several machines have.

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use fence_net::neighbour::{self, Mac};
use roxmltree::{Document, Node};
use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};
use uuid::Uuid;

use crate::clock::Moment;

/// How long after its arrival a request may still be carried out: for so long after a fence its victim's requests are looked out for.
const KEEP: Duration = Duration::from_secs(30);

/// Who asked for something.
#[derive(Clone, Copy, Debug)]
pub struct Asker {
    /// Its call-back address.
    pub caller: SocketAddr,
    /// The number of the interface that it is called back by; 0 where the routing table decides.
    pub interface: u32,
    /// When its request arrived.
    pub arrived: Moment,
}

/// A domain that is about to be fenced.
#[derive(Clone, Debug)]
pub(crate) struct Aimed {
    pub(crate) uuid: Uuid,
    pub(crate) name: String,
    /// Of its network interfaces.
    pub(crate) macs: Arc<[Mac]>,
}

/// One that is being fenced, or was.
#[derive(Debug)]
struct Doom {
    number: u64,
    domain: Aimed,
    /// Who has it fenced.
    by: Option<SocketAddr>,
    /// When it was over; `None` while it is under way.
    over: Option<Moment>,
}

/// Why nothing may be done for an asker, with the name of its own domain.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    /// It is being fenced itself: what comes of that has to be waited for, see [`Duels::over`].
    Dying(Doomed),
    /// It was fenced after it had asked.
    Dead(String),
}

/// An asker that is being fenced.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Doomed {
    number: u64,
    pub(crate) name: String,
}

/// Those that are being fenced, and who was a moment ago.
pub(crate) struct Duels {
    dooms: Mutex<Dooms>,
    /// Told when a fence is over.
    news: watch::Sender<()>,
    neighbours: fn(SocketAddr, u32) -> io::Result<Vec<Mac>>,
}

#[derive(Default)]
struct Dooms {
    next: u64,
    list: Vec<Doom>,
}

impl Default for Duels {
    fn default() -> Self {
        Self::with_neighbours(neighbour::macs_of)
    }
}

impl Duels {
    pub(crate) fn with_neighbours(neighbours: fn(SocketAddr, u32) -> io::Result<Vec<Mac>>) -> Self {
        Self { dooms: Mutex::default(), news: watch::Sender::default(), neighbours }
    }

    /// To be asked right before the victims are killed, by no more than one at a time for any of them.
    /// `running` tells which domains with this Ethernet address run.
    ///
    /// # Errors
    /// The asker is being fenced, or was after it had asked. Nothing may be done for it then.
    pub(crate) fn aim(
        self: &Arc<Self>,
        asker: Option<Asker>,
        victims: Vec<Aimed>,
        running: impl Fn(Mac) -> Vec<Uuid>,
    ) -> Result<Aim, Refused> {
        let mut known = None;
        loop {
            let mut dooms = self.dooms();
            let now = Moment::now();
            dooms.list.retain(|doom| doom.over.is_none_or(|over| now.since(over) < KEEP));
            let suspects = asker.map(|asker| dooms.of(asker)).unwrap_or_default();
            let macs = match (asker, suspects.is_empty(), known.take()) {
                (None, ..) | (_, true, _) => Vec::new(),
                (Some(_), false, Some(macs)) => macs,
                (Some(asker), false, None) => {
                    // Not with the lock held, so that it may have to be looked once more.
                    drop(dooms);
                    known = Some((self.neighbours)(asker.caller, asker.interface).unwrap_or_else(|error| {
                        tracing::warn!(caller = %asker.caller, %error, "the neighbour tables cannot be read: whoever asks is believed to live");
                        Vec::new()
                    }));
                    continue;
                }
            };
            let is_it = |suspect: &&Suspect| suspect.domain.macs.iter().any(|mac| macs.contains(mac));
            let condemned = suspects.iter().filter(is_it).min_by_key(|suspect| suspect.dying.is_some());
            if let Some(Suspect { domain, dying }) = condemned
                && macs
                    .iter()
                    .flat_map(|mac| running(*mac))
                    .all(|uuid| suspects.iter().any(|suspect| suspect.domain.uuid == uuid))
            {
                let name = domain.name.clone();
                return Err(match *dying {
                    Some(number) => Refused::Dying(Doomed { number, name }),
                    None => Refused::Dead(name),
                });
            }
            let first = dooms.next;
            let by = asker.map(|asker| asker.caller);
            for domain in victims {
                let number = dooms.next;
                dooms.next += 1;
                dooms.list.push(Doom { number, domain, by, over: None });
            }
            let numbers = first..dooms.next;
            return Ok(Aim { duels: Arc::clone(self), numbers, over: None });
        }
    }

    /// Waits until the fence of an asker is over, however it ends. To be done without any domain's lock: its victim's own may be needed for it.
    /// `false`: it is not by `by`.
    pub(crate) async fn over(&self, asker: &Doomed, by: Instant) -> bool {
        let mut news = self.news.subscribe();
        let lasts = || self.dooms().list.iter().any(|doom| doom.number == asker.number && doom.over.is_none());
        while lasts() {
            // An error means that the sender is gone, and it is ours.
            if !matches!(timeout_at(by, news.changed()).await, Ok(Ok(()))) {
                return false;
            }
        }
        true
    }

    fn dooms(&self) -> MutexGuard<'_, Dooms> {
        self.dooms.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One that may be the asker.
struct Suspect {
    domain: Aimed,
    /// The number of its fence, while that is under way.
    dying: Option<u64>,
}

impl Dooms {
    /// Those that may be the asker itself, and were alive when it asked. What somebody has fenced himself is not he.
    fn of(&self, asker: Asker) -> Vec<Suspect> {
        let may_be = |doom: &&Doom| {
            doom.by.is_none_or(|by| by.ip() != asker.caller.ip())
                && !doom.domain.macs.is_empty()
                && doom.over.is_none_or(|over| asker.arrived < over)
        };
        let suspect =
            |doom: &Doom| Suspect { domain: doom.domain.clone(), dying: doom.over.is_none().then_some(doom.number) };
        self.list.iter().filter(may_be).map(suspect).collect()
    }
}

/// Domains that are being fenced. They are forgotten when it is dropped, if the fence has not [succeeded](Aim::succeeded).
#[must_use]
pub(crate) struct Aim {
    duels: Arc<Duels>,
    numbers: std::ops::Range<u64>,
    over: Option<Moment>,
}

impl Aim {
    /// They were off at this moment: what they asked for before it is not done, and what they ask for after it is another life's.
    pub(crate) fn succeeded(mut self, at: Moment) {
        self.over = Some(at);
    }
}

impl Drop for Aim {
    fn drop(&mut self) {
        let mut dooms = self.duels.dooms();
        match self.over {
            None => dooms.list.retain(|doom| !self.numbers.contains(&doom.number)),
            Some(_) => {
                let ours = dooms.list.iter_mut().filter(|doom| self.numbers.contains(&doom.number));
                ours.for_each(|doom| doom.over = self.over);
            }
        }
        drop(dooms);
        self.duels.news.send_replace(());
    }
}

/// The Ethernet addresses of a domain's network interfaces, from its XML.
pub(crate) fn macs(xml: &str) -> Result<Arc<[Mac]>, roxmltree::Error> {
    let document = Document::parse(xml)?;
    // Metadata may hold anything, so the whole way counts.
    let way = ["mac", "interface", "devices", "domain"];
    let is_ours = |node: &Node<'_, '_>| node.ancestors().map(|at| at.tag_name().name()).eq(way.into_iter().chain([""]));
    let found = document.descendants().filter(is_ours).filter_map(|mac| mac_of(mac.attribute("address")?));
    Ok(found.collect())
}

fn mac_of(text: &str) -> Option<Mac> {
    let bytes: Option<Vec<_>> = text.split(':').map(|byte| u8::from_str_radix(byte, 16).ok()).collect();
    bytes?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The neighbours of these tests: who calls from 192.0.2.N has the Ethernet address that ends with N.
    fn neighbours(caller: SocketAddr, _: u32) -> io::Result<Vec<Mac>> {
        let SocketAddr::V4(caller) = caller else { return Err(io::ErrorKind::Unsupported.into()) };
        Ok(vec![mac(caller.ip().octets()[3])])
    }

    fn mac(number: u8) -> Mac {
        [0x52, 0x54, 0, 0, 0, number]
    }

    fn guest(number: u8) -> Aimed {
        Aimed {
            uuid: Uuid::from_u128(number.into()),
            name: format!("node{number}"),
            macs: [mac(9), mac(number)].into(),
        }
    }

    fn asks(number: u8, arrived: Moment) -> Option<Asker> {
        Some(Asker { caller: SocketAddr::from(([192, 0, 2, number], 1229)), interface: 0, arrived })
    }

    /// One machine for each Ethernet address.
    fn one(mac: Mac) -> Vec<Uuid> {
        vec![guest(mac[5]).uuid]
    }

    fn duels() -> Arc<Duels> {
        Arc::new(Duels::with_neighbours(neighbours))
    }

    #[test]
    fn of_two_that_shoot_each_other_the_first_lives() {
        let (duels, now) = (duels(), Moment::now());
        let first = duels.aim(asks(1, now), vec![guest(2)], one).ok().unwrap();
        let doomed = Doomed { number: 0, name: "node2".to_owned() };
        assert_eq!(duels.aim(asks(2, now), vec![guest(1)], one).err().unwrap(), Refused::Dying(doomed));
        // Nobody else is meant, nor is the first, whatever else it wants.
        assert!(duels.aim(asks(3, now), vec![guest(4)], one).is_ok());
        assert!(duels.aim(asks(1, now), vec![guest(3)], one).is_ok());
        // It died after it had asked; what it asks in its next life counts.
        let dead = now.plus(Duration::from_millis(5));
        first.succeeded(dead);
        let dead_now = Refused::Dead("node2".to_owned());
        assert_eq!(duels.aim(asks(2, now), vec![guest(1)], one).err().unwrap(), dead_now);
        assert!(duels.aim(asks(2, dead), vec![guest(1)], one).is_ok());
    }

    #[test]
    fn a_fence_that_failed_takes_nobodys_word() {
        let (duels, now) = (duels(), Moment::now());
        drop(duels.aim(asks(1, now), vec![guest(2)], one).ok().unwrap());
        assert!(duels.aim(asks(2, now), vec![guest(1)], one).is_ok());
    }

    #[test]
    fn a_fence_of_long_ago_is_forgotten() {
        let (duels, now) = (duels(), Moment::now());
        duels.aim(asks(1, now), vec![guest(2)], one).ok().unwrap().succeeded(now.before(KEEP));
        assert!(duels.aim(asks(2, now.before(2 * KEEP)), vec![guest(1)], one).is_ok());
        assert_eq!(duels.dooms().list.len(), 0);
    }

    #[test]
    fn whoever_cannot_be_told_is_believed() {
        let (duels, now) = (duels(), Moment::now());
        let fenced = |victim| duels.aim(asks(1, now), vec![victim], one).ok().unwrap();
        let aim = fenced(guest(2));
        // Two machines have the address, and the other one lives.
        let two = |mac: Mac| vec![guest(mac[5]).uuid, Uuid::from_u128(77)];
        assert!(duels.aim(asks(2, now), vec![guest(1)], two).is_ok());
        // Of no address that is known, or none at all.
        assert!(duels.aim(asks(8, now), vec![guest(3)], one).is_ok());
        assert!(duels.aim(None, vec![guest(3)], one).is_ok());
        let nowhere = Some(Asker { caller: "[2001:db8::2]:1229".parse().unwrap(), interface: 0, arrived: now });
        assert!(duels.aim(nowhere, vec![guest(3)], one).is_ok());
        drop(aim);
        let _aim = fenced(Aimed { macs: [].into(), ..guest(2) });
        assert!(duels.aim(asks(2, now), vec![guest(1)], one).is_ok());
    }

    #[test]
    fn a_guest_may_fence_itself_and_goes_on_asking() {
        let (duels, now) = (duels(), Moment::now());
        let _aim = duels.aim(asks(1, now), vec![guest(1)], one).ok().unwrap();
        assert!(duels.aim(asks(1, now), vec![guest(2)], one).is_ok());
    }

    #[test]
    fn the_addresses_of_a_domain_are_read_from_its_xml() {
        let xml = "<?xml version='1.0'?><domain type='kvm' id='3'><metadata><interface><mac address='02:00:00:00:00:99'/>\
                   </interface></metadata><name>&lt;a&gt;</name><devices><disk/><interface type='network'>\
                   <mac address='52:54:00:0a:BC:01'/><source network='default'/></interface><interface type='bridge'/>\
                   <interface type='bridge'><mac address='nonsense'/></interface><interface type='user'>\
                   <mac address='52:54:00:00:00:02'/></interface></devices></domain>";
        assert_eq!(*macs(xml).unwrap(), [[0x52, 0x54, 0, 0x0a, 0xbc, 1], mac(2)]);
        assert!(macs("<domain><devices>").is_err());
        for odd in ["", "52:54:00:00:00", "52:54:00:00:00:00:00", "52:54:00:00:00:1ff"] {
            assert_eq!(mac_of(odd), None, "{odd}");
        }
    }
}
