//! The tcp listener: one port for an address, several for a host name, or the sockets that systemd
//! has opened.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use fence_common::sync::lock;
use fence_common::verdict::Counters;
use fence_config::{Listener, Tcp, TcpAddress};
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{sleep, timeout};
use tracing::{error, info, warn};

use super::arrivals::{Feed, Inlet};
use super::connections::ClientConnections;
use super::judge::Judge;
use super::lookup::{self, Lookup, NoAddresses};
use super::passed::Passed;
use super::port::{self, At, ListeningPort, NoPort};
use crate::observe::requests::Via;

/// How long the start waits for the addresses of a name, which it asked for some time before.
const SOON: Duration = Duration::from_millis(200);

/// How long to wait before a name is looked up again that had no address, or one that this host
/// does not have. It doubles each time.
const AGAIN: Duration = Duration::from_secs(1);

/// How long that becomes at most.
const AGAIN_MAX: Duration = Duration::from_secs(30);

/// A listener whose name is being looked up, if it has one.
#[derive(Debug)]
pub struct Prepared {
    settings: Tcp,
    lookup: Option<Lookup>,
}

impl Prepared {
    /// Begins to look up the listener's name.
    #[must_use]
    pub fn new(settings: Tcp) -> Self {
        let lookup = begin(&settings);
        Self { settings, lookup }
    }
}

/// Looks whether a listener that is to come can have its port. Names are looked up later.
///
/// # Errors
/// It cannot.
pub fn probe(settings: &Tcp) -> Result<(), NoPort> {
    let TcpAddress::Ip(ip) = settings.address else { return Ok(()) };
    let (address, interface) = (SocketAddr::new(ip, settings.port), settings.interface.clone());
    port::probe(&At::Tcp { address, interface, only_v6: false })
}

fn begin(settings: &Tcp) -> Option<Lookup> {
    match &settings.address {
        TcpAddress::Name { name, is_v4 } => Some(lookup::begin(name, settings.port, *is_v4)),
        TcpAddress::Ip(_) | TcpAddress::Systemd => None,
    }
}

/// The listener, to be looked at.
#[derive(Debug)]
pub struct TcpIntake {
    settings: Tcp,
    label: String,
    connections: Arc<ClientConnections>,
    ports: Mutex<Vec<Arc<ListeningPort>>>,
    /// Why its name has no addresses.
    nameless: Mutex<Option<NoAddresses>>,
}

impl TcpIntake {
    /// Begins to listen, for the queue. If that is not possible now, it is tried again until it is.
    /// `passed` has the sockets of systemd. Whenever `reloads` changes, a name is looked up again.
    /// Must be called within a tokio runtime.
    pub async fn start(
        prepared: Prepared,
        judge: Judge,
        passed: &mut Passed,
        reloads: watch::Receiver<()>,
        inlet: &mut Inlet,
    ) -> Arc<Self> {
        let Prepared { settings, lookup } = prepared;
        let connections = ClientConnections::new(Via::Tcp, settings.hash, judge);
        let label = Listener::Tcp(settings.clone()).label();
        let (ports, nameless) = (Mutex::default(), Mutex::default());
        let intake = Arc::new(Self { settings, label, connections, ports, nameless });
        match (&intake.settings.address, lookup) {
            (TcpAddress::Ip(ip), _) => {
                // Here, so that the port is open when the daemon says that it is ready.
                let port = intake.port(SocketAddr::new(*ip, intake.settings.port), false);
                let (opened, connections) = (port.open(), Arc::clone(&intake.connections));
                inlet.listen(|feed| port.serve(opened, connections, feed));
            }
            (TcpAddress::Systemd, _) => {
                for (port, opened) in passed.tcp(&Listener::Tcp(intake.settings.clone())) {
                    lock(&intake.ports).push(Arc::clone(&port));
                    if let Some(opened) = opened {
                        let connections = Arc::clone(&intake.connections);
                        inlet.listen(|feed| port.serve(Some(opened), connections, feed));
                    }
                }
            }
            (TcpAddress::Name { name, .. }, Some(mut lookup)) => {
                let first = timeout(SOON, lookup::found(&mut lookup, name)).await.ok();
                let feed = inlet.feed();
                let mut named =
                    Named { intake: Arc::clone(&intake), feed, tasks: JoinSet::new(), open: BTreeMap::new() };
                let under_way = match first {
                    Some(found) => {
                        named.settle(found);
                        None
                    }
                    None => Some(lookup),
                };
                inlet.listen(|_| named.follow(under_way, reloads));
            }
            (TcpAddress::Name { .. }, None) => {}
        }
        intake
    }

    /// Where clients connect to.
    #[must_use]
    pub fn settings(&self) -> &Tcp {
        &self.settings
    }

    /// Its address as the configuration names it, and its port.
    #[must_use]
    pub fn place(&self) -> (String, u16) {
        let of_systemd = || {
            let ports = lock(&self.ports);
            let found = ports.iter().find_map(|port| match port.at() {
                At::Tcp { address, .. } => Some((address.ip().to_string(), address.port())),
                At::Vsock(_) => None,
            });
            found.unwrap_or_else(|| ("systemd".to_owned(), 0))
        };
        match &self.settings.address {
            TcpAddress::Systemd => of_systemd(),
            TcpAddress::Ip(_) | TcpAddress::Name { .. } => (self.settings.address.to_string(), self.settings.port),
        }
    }

    /// Whether clients can connect, and what is in their way.
    #[must_use]
    pub fn status(&self) -> (bool, String) {
        let ports: Vec<_> = lock(&self.ports).iter().map(|port| (port.at().to_string(), port.status())).collect();
        let hears = ports.iter().any(|(_, (hears, _))| *hears);
        if let (TcpAddress::Ip(_), [(_, (_, status))]) = (&self.settings.address, ports.as_slice()) {
            return (hears, status.clone());
        }
        let nameless = lock(&self.nameless).as_ref().map(ToString::to_string);
        let open: Vec<_> = ports.iter().filter(|(_, (hears, _))| *hears).map(|(at, _)| at.as_str()).collect();
        let listening = (!open.is_empty()).then(|| format!("listening at {}", open.join(", ")));
        let refused = ports.iter().filter(|(_, (hears, _))| !hears).map(|(_, (_, status))| status.clone());
        let all: Vec<_> = listening.into_iter().chain(nameless).chain(refused).collect();
        (hears, if all.is_empty() { "starting".to_owned() } else { all.join("; ") })
    }

    /// The requests so far, by verdict.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.connections.counters()
    }

    /// A port of the listener. `only_v6` as in [`At::Tcp`].
    fn port(&self, address: SocketAddr, only_v6: bool) -> Arc<ListeningPort> {
        let interface = self.settings.interface.clone();
        let port = ListeningPort::new(self.label.clone(), At::Tcp { address, interface, only_v6 });
        lock(&self.ports).push(Arc::clone(&port));
        port
    }
}

/// A listener with the addresses of a name.
struct Named {
    intake: Arc<TcpIntake>,
    feed: Feed,
    tasks: JoinSet<()>,
    open: BTreeMap<SocketAddr, AbortHandle>,
}

impl Named {
    /// Looks the name up again at each reload, and with patience while something is missing.
    async fn follow(mut self, mut under_way: Option<Lookup>, mut reloads: watch::Receiver<()>) {
        let TcpAddress::Name { name, .. } = self.intake.settings.address.clone() else { return };
        let mut pause = AGAIN;
        loop {
            if let Some(mut lookup) = under_way.take() {
                let found = lookup::found(&mut lookup, &name).await;
                self.settle(found);
            }
            if self.is_complete() {
                pause = AGAIN;
                if reloads.changed().await.is_err() {
                    // Never: the daemon has the other end as long as this runs.
                    return std::future::pending().await;
                }
            } else {
                tokio::select! {
                    Ok(()) = reloads.changed() => pause = AGAIN,
                    () = sleep(pause) => pause = pause.saturating_mul(2).min(AGAIN_MAX),
                }
            }
            under_way = begin(&self.intake.settings);
        }
    }

    /// Whether the name has addresses, and each of them is open.
    fn is_complete(&self) -> bool {
        let ports = lock(&self.intake.ports);
        lock(&self.intake.nameless).is_none() && !ports.is_empty() && ports.iter().all(|port| port.status().0)
    }

    /// Opens what is new, and closes what the name does not mean any more. A name without an answer
    /// changes nothing.
    fn settle(&mut self, found: Result<Vec<SocketAddr>, NoAddresses>) {
        let (intake, label) = (&self.intake, &self.intake.label);
        let mut nameless = lock(&intake.nameless);
        let addresses = match found {
            Ok(addresses) => {
                *nameless = None;
                addresses
            }
            Err(error) => {
                if nameless.as_ref() != Some(&error) {
                    let remains =
                        if self.open.is_empty() { "no client can connect" } else { "its last addresses stay" };
                    error!("{label}: {error}; {remains}; trying again");
                }
                *nameless = Some(error);
                return;
            }
        };
        drop(nameless);
        let gone: Vec<_> = self.open.keys().copied().filter(|address| !addresses.contains(address)).collect();
        for address in gone {
            if let Some(task) = self.open.remove(&address) {
                // Its connections go on.
                task.abort();
                info!(%address, "{label}: closed, since the name does not mean it any more");
            }
            lock(&intake.ports).retain(|port| !matches!(port.at(), At::Tcp { address: own, .. } if *own == address));
        }
        let fresh: Vec<_> = addresses.iter().copied().filter(|address| !self.open.contains_key(address)).collect();
        if !fresh.is_empty() && lookup::are_of_this_host_only(&addresses) {
            let name = &intake.settings.address;
            warn!(
                "{label}: only this host itself can connect, and no guest: {name} has no other address than {}",
                fresh[0].ip()
            );
        }
        for address in fresh {
            // IPv4 is left to the name's IPv4 addresses.
            let port = intake.port(address, true);
            let opened = port.open();
            let task = self.tasks.spawn(port.serve(opened, Arc::clone(&intake.connections), self.feed.clone()));
            self.open.insert(address, task);
        }
    }
}
