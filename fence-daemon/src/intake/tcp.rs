//! The tcp listener: opens the port, and accepts the connections of clients.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use fence_common::sync::lock;
use fence_common::verdict::Counters;
use fence_config::{Listener, Tcp};
use fence_net::interface::Interface;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use tokio::net::TcpListener;
use tokio::time::sleep;
use tracing::{error, info, warn};

use super::arrivals::{Arrivals, Feed};
use super::connections::Accepted;
use super::judge::Judge;
use crate::clock::Moment;
use crate::observe::limit::LogLimit;
use crate::observe::requests::Via;

/// Connections that the kernel accepts before the daemon does.
const BACKLOG: i32 = 1024;

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
    connections: Arc<Accepted>,
    /// `None` until the first attempt.
    heard: Mutex<Option<Result<(), NoPort>>>,
    complaints: LogLimit,
}

impl Intake {
    /// Begins to listen, for the queue. If that is not possible now, it is tried again until it is.
    /// Must be called within a tokio runtime.
    #[must_use]
    pub fn start(settings: Tcp, judge: Judge, arrivals: &mut Arrivals) -> Arc<Self> {
        let complaints = LogLimit::new(1, Duration::from_secs(60));
        let connections = Accepted::new(Via::Tcp, settings.hash, judge);
        let intake = Arc::new(Self { settings, connections, heard: Mutex::default(), complaints });
        // Here, so that the port is open when the daemon says that it is ready.
        let first = intake.bind();
        arrivals.listen(|feed| Arc::clone(&intake).listen(first, feed));
        intake
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
        self.connections.counters()
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
            let label = Listener::Tcp(self.settings.clone()).label();
            let (address, interface) = (self.place(), self.settings.interface.as_deref().unwrap_or("any"));
            match &heard {
                Ok(()) => info!(%address, %interface, "{label}: clients can connect"),
                Err(refusal) => error!(%address, %interface, "{label}: no client can connect: {refusal}; trying again"),
            }
            *known = Some(heard);
        }
        bound
    }

    async fn listen(self: Arc<Self>, mut bound: Option<Bound>, feed: Feed) {
        loop {
            match bound.take() {
                Some(bound) => tokio::select! {
                    () = self.accept(&bound.listener, &feed) => {}
                    () = bound.stale() => {}
                },
                None => sleep(AGAIN).await,
            }
            bound = self.bind();
        }
    }

    async fn accept(&self, listener: &TcpListener, feed: &Feed) {
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
            // Without the option small messages are only slower.
            let _ = stream.set_nodelay(true);
            // A socket of both families shows IPv4 peers as mapped addresses.
            let peer = match peer.ip().to_canonical() {
                IpAddr::V4(ip) => SocketAddr::from((ip, peer.port())),
                IpAddr::V6(_) => peer,
            };
            self.connections.take(Box::new(stream), peer.into(), feed);
        }
    }
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
