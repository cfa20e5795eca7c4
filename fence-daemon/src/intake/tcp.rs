//! The tcp listener: a client connects, sends its request, and waits for its answer on the same
//! connection.
//!
//! Anybody can connect, so a connection gets one second and one of a few places until its request
//! is there. When the places are used up, the oldest connection loses its place: an honest client
//! sends its request with the connection, and needs it for a round trip only. So silent peers
//! delay nobody.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use fence_common::admit::admit_stream;
use fence_common::rate_limit::Sender;
use fence_common::sync::lock;
use fence_common::verdict::{Counters, Verdict};
use fence_common::wire::{REQUEST_LEN, Request};
use fence_config::Tcp;
use fence_net::interface::Interface;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use tracing::{debug, error, info, warn};
use zerocopy::FromBytes;

use super::judge::Judge;
use super::request::{Incoming, Verified};
use crate::clock::Moment;
use crate::observe::limit::LogLimit;

/// How long a client may take for its request, as with fence_virtd. Stock clients send it at once.
const REQUEST_WITHIN: Duration = Duration::from_secs(1);

/// How many connections may wait for their request at once. A file descriptor each; an attacker
/// needs this many within a round trip to displace an honest client.
const WAITING_MAX: usize = 512;

/// How many of them may come from one address. As many requests of one address are served at once.
const WAITING_MAX_PER_SOURCE: usize = 64;

/// Connections that the kernel accepts before the daemon does.
const BACKLOG: i32 = 1024;

/// How many verified requests wait for the reader. It takes each within microseconds.
const QUEUE: usize = 64;

/// How often the listener looks whether a missing address or interface is there.
const AGAIN: Duration = Duration::from_secs(1);

/// How long to wait after the kernel refuses to accept a connection: no file is left, say.
const AFTER_ERROR: Duration = Duration::from_millis(100);

/// Why nobody can connect.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
enum NoPort {
    #[error("TCP port {0} is taken (is fence_virtd running, or fence_xvm on this host?)")]
    PortTaken(u16),
    #[error("{0} is no address of this host now")]
    NoAddress(IpAddr),
    #[error("there is no interface {0} now")]
    NoInterface(String),
    #[error("{0}")]
    Kernel(String),
}

/// The listener, to be looked at.
#[derive(Debug)]
pub struct Intake {
    settings: Tcp,
    judge: Judge,
    /// `None` until the first attempt.
    heard: Mutex<Option<Result<(), NoPort>>>,
    counters: Mutex<Counters>,
    waiting: Mutex<Unread>,
    complaints: LogLimit,
}

/// The listener's task. Dropping it closes the port.
#[derive(Debug)]
pub struct Arrivals {
    queue: mpsc::Receiver<Incoming>,
    task: JoinHandle<()>,
}

impl Arrivals {
    /// The next verified request. Dropping the future loses none.
    pub async fn next(&mut self) -> Incoming {
        match self.queue.recv().await {
            Some(incoming) => incoming,
            None => std::future::pending().await,
        }
    }
}

impl Drop for Arrivals {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Intake {
    /// Begins to listen. If that is not possible now, it is tried again until it is. Must be called
    /// within a tokio runtime.
    #[must_use]
    pub fn start(settings: Tcp, judge: Judge) -> (Arc<Self>, Arrivals) {
        let complaints = LogLimit::new(1, Duration::from_secs(60));
        let (heard, counters, waiting) = (Mutex::default(), Mutex::default(), Mutex::default());
        let intake = Arc::new(Self { settings, judge, heard, counters, waiting, complaints });
        let (send, queue) = mpsc::channel(QUEUE);
        // Here, so that the port is open when the daemon says that it is ready.
        let first = intake.bind();
        let task = tokio::spawn(Arc::clone(&intake).listen(first, send));
        (intake, Arrivals { queue, task })
    }

    /// Where clients connect to.
    #[must_use]
    pub fn settings(&self) -> &Tcp {
        &self.settings
    }

    /// Whether clients can connect, and if not, why.
    #[must_use]
    pub fn status(&self) -> (bool, String) {
        match &*lock(&self.heard) {
            None => (false, "starting".to_owned()),
            Some(Ok(())) => (true, "listening".to_owned()),
            Some(Err(refusal)) => (false, refusal.to_string()),
        }
    }

    /// The requests so far, by verdict.
    #[must_use]
    pub fn counters(&self) -> Counters {
        *lock(&self.counters)
    }

    fn place(&self) -> SocketAddr {
        SocketAddr::new(self.settings.address, self.settings.port)
    }

    /// Opens the port, and logs the outcome if it is another one than before.
    fn bind(&self) -> Option<Bound> {
        let outcome = Bound::new(&self.settings);
        let (bound, heard) = match outcome {
            Ok(bound) => (Some(bound), Ok(())),
            Err(refusal) => (None, Err(refusal)),
        };
        let mut known = lock(&self.heard);
        if known.as_ref() != Some(&heard) {
            let (address, interface) = (self.place(), self.settings.interface.as_deref().unwrap_or("any"));
            match &heard {
                Ok(()) => info!(%address, %interface, "tcp: clients can connect"),
                Err(refusal) => error!(%address, %interface, "tcp: no client can connect: {refusal}; trying again"),
            }
            *known = Some(heard);
        }
        bound
    }

    async fn listen(self: Arc<Self>, mut bound: Option<Bound>, send: mpsc::Sender<Incoming>) {
        loop {
            match bound.take() {
                Some(bound) => tokio::select! {
                    () = self.accept(&bound.listener, &send) => {}
                    () = bound.stale() => {}
                },
                None => sleep(AGAIN).await,
            }
            bound = self.bind();
        }
    }

    async fn accept(self: &Arc<Self>, listener: &TcpListener, send: &mpsc::Sender<Incoming>) {
        loop {
            let (stream, peer) = match listener.accept().await {
                Ok(accepted) => accepted,
                Err(error) => {
                    if let Some(held_back) = self.complaints.allow(Moment::now()) {
                        warn!(held_back, "tcp: a connection cannot be accepted: {error}");
                    }
                    sleep(AFTER_ERROR).await;
                    continue;
                }
            };
            let (arrived, place) = (Moment::now(), self.enter(peer.ip().to_canonical()));
            let (intake, send) = (Arc::clone(self), send.clone());
            tokio::spawn(async move {
                if let Some(incoming) = intake.receive(stream, peer, arrived, &place).await {
                    // The place counts until the request is handed over.
                    let _ = send.send(incoming).await;
                }
                intake.leave(&place);
            });
        }
    }

    /// Reads a request and judges it. Whatever is wrong is counted, and ends the connection.
    async fn receive(
        &self,
        mut stream: TcpStream,
        peer: SocketAddr,
        arrived: Moment,
        place: &Place,
    ) -> Option<Incoming> {
        // Without the option small messages are only slower.
        let _ = stream.set_nodelay(true);
        let mut bytes = [0; REQUEST_LEN];
        let read = tokio::select! {
            biased;
            read = timeout(REQUEST_WITHIN, stream.read_exact(&mut bytes)) => matches!(read, Ok(Ok(_))),
            () = place.displaced.notified() => false,
        };
        let source = peer.ip().to_canonical();
        let judged = if read { self.judge(&bytes, peer, arrived) } else { Err(Verdict::Length) };
        let verdict = judged.as_ref().map_or_else(|verdict| *verdict, |_| Verdict::Delivered);
        lock(&self.counters).count(verdict);
        self.judge.note_rejection(source, verdict, arrived);
        match judged {
            Ok(request) => Some(Incoming::connected(request, stream)),
            Err(verdict) => {
                debug!(%peer, ?verdict, "tcp: closed without an answer");
                None
            }
        }
    }

    fn judge(&self, bytes: &[u8; REQUEST_LEN], peer: SocketAddr, arrived: Moment) -> Result<Verified, Verdict> {
        let source = peer.ip().to_canonical();
        let request = Request::read_from_bytes(bytes).map_err(|_| Verdict::Length)?;
        admit_stream(&request, self.settings.hash)?;
        let (key, owner) = self.judge.judge(&request, source, Some(source))?;
        let verified = Verified::over_tcp(&request, key, peer, arrived).ok_or(Verdict::Op)?;
        Ok(verified.signed_for(owner).sent_by(Sender::new(&source.into(), [0; 6])))
    }

    /// Enters a connection without a request. Another one may have to go.
    fn enter(&self, source: IpAddr) -> Place {
        let mut waiting = lock(&self.waiting);
        let of_source = |waiting: &Unread| {
            let own = waiting.list.iter().filter(|(_, (other, _))| *other == source);
            own.map(|(number, _)| *number).collect::<Vec<_>>()
        };
        let oldest = match of_source(&waiting) {
            own if own.len() >= WAITING_MAX_PER_SOURCE => own.first().copied(),
            _ if waiting.list.len() >= WAITING_MAX => waiting.list.keys().next().copied(),
            _ => None,
        };
        if let Some((_, displaced)) = oldest.and_then(|number| waiting.list.remove(&number)) {
            displaced.notify_one();
        }
        let (number, displaced) = (waiting.next, Arc::new(Notify::new()));
        waiting.next = waiting.next.wrapping_add(1);
        waiting.list.insert(number, (source, Arc::clone(&displaced)));
        Place { number, displaced }
    }

    fn leave(&self, place: &Place) {
        lock(&self.waiting).list.remove(&place.number);
    }
}

/// The connections without a request, in the order of their arrival.
#[derive(Debug, Default)]
struct Unread {
    next: u64,
    list: BTreeMap<u64, (IpAddr, Arc<Notify>)>,
}

/// A connection in that list.
#[derive(Debug)]
struct Place {
    number: u64,
    displaced: Arc<Notify>,
}

/// An open port, and the interface that it is bound to.
#[derive(Debug)]
struct Bound {
    listener: TcpListener,
    interface: Option<Interface>,
}

impl Bound {
    fn new(settings: &Tcp) -> Result<Self, NoPort> {
        let kernel = |error: io::Error| {
            if error.kind() == io::ErrorKind::AddrInUse {
                NoPort::PortTaken(settings.port)
            } else if error.kind() == io::ErrorKind::AddrNotAvailable {
                NoPort::NoAddress(settings.address)
            } else {
                NoPort::Kernel(error.to_string())
            }
        };
        let interface = settings
            .interface
            .as_deref()
            .map(|name| Interface::named(name).ok_or_else(|| NoPort::NoInterface(name.to_owned())));
        let (interface, address) = (interface.transpose()?, SocketAddr::new(settings.address, settings.port));
        let open = || {
            let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
            socket.set_nonblocking(true)?;
            // Connections of an earlier daemon may still be closing. Two listeners at one port
            // remain impossible.
            socket.set_reuse_address(true)?;
            if address.is_ipv6() {
                socket.set_only_v6(false)?;
            }
            socket.bind_device(interface.as_ref().map(|interface| interface.name.as_bytes()))?;
            socket.bind(&SockAddr::from(address))?;
            socket.listen(BACKLOG)?;
            TcpListener::from_std(socket.into())
        };
        Ok(Self { listener: open().map_err(kernel)?, interface })
    }

    /// Returns when the interface is another one than it was.
    async fn stale(&self) {
        let Some(interface) = &self.interface else { return std::future::pending().await };
        while Interface::named(&interface.name).as_ref() == Some(interface) {
            sleep(AGAIN).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use fence_common::hash::HashKind;

    use super::*;

    fn intake() -> Intake {
        let address = Ipv4Addr::LOCALHOST.into();
        let settings = Tcp { interface: None, address, port: 1, hash: HashKind::Sha256 };
        let (heard, counters, waiting) = (Mutex::default(), Mutex::default(), Mutex::default());
        let complaints = LogLimit::new(1, Duration::from_secs(60));
        Intake {
            settings,
            judge: Judge::new(super::super::keyring::Keyring::new(None)),
            heard,
            counters,
            waiting,
            complaints,
        }
    }

    /// Whether the place is still its connection's.
    fn is_kept(intake: &Intake, place: &Place) -> bool {
        lock(&intake.waiting).list.contains_key(&place.number)
    }

    #[tokio::test]
    async fn a_connection_too_many_costs_the_oldest_one_its_place() {
        let intake = intake();
        let source = |number: usize| IpAddr::from(u32::try_from(number).unwrap().to_be_bytes());
        // Of one source: the oldest of that source.
        let other = intake.enter(source(1));
        let own: Vec<_> = (0..=WAITING_MAX_PER_SOURCE).map(|_| intake.enter(source(2))).collect();
        own[0].displaced.notified().await;
        assert!(
            is_kept(&intake, &other) && !is_kept(&intake, &own[0]) && own[1..].iter().all(|own| is_kept(&intake, own))
        );
        own.iter().for_each(|own| intake.leave(own));
        // Of all sources: the oldest of all.
        let all: Vec<_> = (0..WAITING_MAX).map(|number| intake.enter(source(100 + number))).collect();
        other.displaced.notified().await;
        assert!(!is_kept(&intake, &other) && all.iter().all(|place| is_kept(&intake, place)));
        all.iter().for_each(|place| intake.leave(place));
        assert!(lock(&intake.waiting).list.is_empty());
    }
}
