//! A port that clients connect to, of whichever family: opens it, opens it again when it must, and
//! accepts connections. The log tells each change once.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as PlainStream;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use fence_common::caller::Caller;
use fence_common::sync::lock;
use fence_net::interface::Interface;
use nix::errno::Errno;
use nix::libc::VMADDR_CID_ANY;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::{TcpStream, UnixStream};
use tokio::time::sleep;
use tracing::{error, info, warn};

use super::arrivals::Feed;
use super::connections::ClientConnections;
use super::request::Stream;
use crate::clock::Moment;
use crate::observe::limit::LogLimit;

/// Connections that the kernel accepts before the daemon does. Linux caps it at `somaxconn`.
const BACKLOG: i32 = 1024;

/// How often a port is tried that cannot be opened: its address or interface may come, and another
/// program may go.
const AGAIN: Duration = Duration::from_secs(1);

/// How long to wait after the kernel refuses to accept a connection: no file is left, say.
const AFTER_ERROR: Duration = Duration::from_millis(100);

/// What a port is bound to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum At {
    /// A TCP port.
    Tcp {
        /// The local address, maybe unspecified.
        address: SocketAddr,
        /// The interface that clients must connect through, if it matters.
        interface: Option<String>,
        /// Whether a socket at `::` leaves IPv4 to others.
        only_v6: bool,
    },
    /// A vsock port, for every machine that has a way to this host.
    Vsock(u16),
}

/// Why nobody can connect.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[allow(missing_docs, reason = "each says its own text")]
pub enum NoPort {
    #[error("TCP port {0} is taken (is fence_virtd running, or fence_xvm on this host?)")]
    TcpTaken(u16),
    #[error("vsock port {0} is taken (is fence_virtd running?)")]
    VsockTaken(u16),
    #[error("port {0} takes CAP_NET_BIND_SERVICE (under systemd: `systemctl daemon-reload`, and a restart)")]
    Privileged(u16),
    #[error("{0} is no address of this host now")]
    NoAddress(IpAddr),
    #[error("there is no interface {0} now")]
    NoInterface(String),
    #[error("this host has no vsock (`modprobe vhost_vsock`), or the unit keeps it away (`systemctl daemon-reload`)")]
    NoVsock,
    #[error("systemd passes no socket called {0} (its unit needs `FileDescriptorName={0}`, and must be started)")]
    NotPassed(String),
    #[error("the socket called {name} that systemd passes {what}")]
    Unfit { name: String, what: &'static str },
    #[error("{0}")]
    Kernel(String),
}

/// A port, to be looked at.
#[derive(Debug)]
pub(super) struct ListeningPort {
    /// Its listener, for the log.
    label: String,
    at: At,
    /// `None` until the first attempt.
    heard: Mutex<Option<Result<(), NoPort>>>,
    complaints: LogLimit,
}

/// An open port, and the interface that it is bound to.
#[derive(Debug)]
pub(super) struct OpenPort {
    socket: AsyncFd<Socket>,
    interface: Option<Interface>,
}

impl fmt::Display for At {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { address, interface: None, .. } => write!(f, "{address}"),
            Self::Tcp { address, interface: Some(interface), .. } => write!(f, "{address} on {interface}"),
            Self::Vsock(port) => write!(f, "vsock port {port}"),
        }
    }
}

impl ListeningPort {
    /// A port that is not open yet.
    pub(super) fn new(label: String, at: At) -> Arc<Self> {
        let complaints = LogLimit::new(1, Duration::from_secs(60));
        Arc::new(Self { label, at, heard: Mutex::default(), complaints })
    }

    /// What it is bound to.
    pub(super) fn at(&self) -> &At {
        &self.at
    }

    /// Whether clients can connect, and if not, why.
    pub(super) fn status(&self) -> (bool, String) {
        match &*lock(&self.heard) {
            None => (false, "starting".to_owned()),
            Some(Ok(())) => (true, "listening".to_owned()),
            Some(Err(refusal)) => (false, refusal.to_string()),
        }
    }

    /// Opens it, and logs the outcome if it is another one than before. Must be called within a
    /// tokio runtime.
    pub(super) fn open(&self) -> Option<OpenPort> {
        let (opened, heard) = match OpenPort::new(&self.at) {
            Ok(opened) => (Some(opened), Ok(())),
            Err(refusal) => (None, Err(refusal)),
        };
        self.note(heard);
        opened
    }

    /// Takes a socket that systemd has opened there.
    pub(super) fn take(&self, socket: Socket) -> Option<OpenPort> {
        let opened = socket.set_nonblocking(true).and_then(|()| OpenPort::of(socket, None));
        self.note(opened.as_ref().map(drop).map_err(|error| NoPort::Kernel(error.to_string())));
        opened.ok()
    }

    /// Says why nobody can connect, which nothing changes any more.
    pub(super) fn refuse(&self, refusal: NoPort) {
        error!("{}: no client can connect: {refusal}", self.label);
        *lock(&self.heard) = Some(Err(refusal));
    }

    fn note(&self, heard: Result<(), NoPort>) {
        let mut known = lock(&self.heard);
        if known.as_ref() != Some(&heard) {
            let (label, at) = (&self.label, &self.at);
            match &heard {
                Ok(()) => info!(%at, "{label}: clients can connect"),
                Err(refusal) => error!(%at, "{label}: no client can connect: {refusal}; trying again"),
            }
            *known = Some(heard);
        }
    }

    /// Accepts connections, and opens the port again whenever it must. `opened` is what is open
    /// already.
    pub(super) async fn serve(
        self: Arc<Self>,
        mut opened: Option<OpenPort>,
        connections: Arc<ClientConnections>,
        feed: Feed,
    ) {
        loop {
            match opened.take() {
                Some(opened) => tokio::select! {
                    () = self.accept(&opened, &connections, &feed) => {}
                    () = opened.stale() => {}
                },
                None => sleep(AGAIN).await,
            }
            opened = self.open();
        }
    }

    async fn accept(&self, opened: &OpenPort, connections: &Arc<ClientConnections>, feed: &Feed) {
        loop {
            let accepted = opened.socket.async_io(Interest::READABLE, Socket::accept).await;
            match accepted.and_then(|(socket, peer)| connected(socket, &peer)) {
                Ok((stream, caller)) => connections.take(stream, caller, feed),
                Err(error) => {
                    if let Some(held_back) = self.complaints.allow(Moment::now()) {
                        warn!(held_back, "{}: a connection cannot be accepted: {error}", self.label);
                    }
                    sleep(AFTER_ERROR).await;
                }
            }
        }
    }
}

/// Looks whether a port can be opened. It is closed again.
///
/// # Errors
/// It cannot.
pub(super) fn probe(at: &At) -> Result<(), NoPort> {
    let bound = match at {
        At::Tcp { address, interface, only_v6 } => {
            let interface = named(interface.as_deref())?;
            bound_tcp(*address, interface.as_ref(), *only_v6)
        }
        At::Vsock(port) => bound_vsock(*port),
    };
    bound.map(drop).map_err(|error| refusal(at, &error))
}

fn named(interface: Option<&str>) -> Result<Option<Interface>, NoPort> {
    let named = |name: &str| Interface::named(name).ok_or_else(|| NoPort::NoInterface(name.to_owned()));
    interface.map(named).transpose()
}

impl OpenPort {
    fn new(at: &At) -> Result<Self, NoPort> {
        let opened = match at {
            At::Tcp { address, interface, only_v6 } => {
                let interface = named(interface.as_deref())?;
                tcp(*address, interface.as_ref(), *only_v6).and_then(|socket| Self::of(socket, interface))
            }
            At::Vsock(port) => vsock(*port).and_then(|socket| Self::of(socket, None)),
        };
        opened.map_err(|error| refusal(at, &error))
    }

    /// A listening socket.
    fn of(socket: Socket, interface: Option<Interface>) -> io::Result<Self> {
        // SAFETY: tokio has no safe way to await a foreign socket. `Socket` owns its descriptor,
        // gives out the same one every time, and lives as long as the registration.
        let socket = unsafe { AsyncFd::register(socket) }?;
        Ok(Self { socket, interface })
    }

    /// Returns when the interface is another one than it was.
    async fn stale(&self) {
        let Some(interface) = &self.interface else { return std::future::pending().await };
        while Interface::named(&interface.name).as_ref() == Some(interface) {
            sleep(AGAIN).await;
        }
    }
}

fn tcp(address: SocketAddr, interface: Option<&Interface>, only_v6: bool) -> io::Result<Socket> {
    let socket = bound_tcp(address, interface, only_v6)?;
    socket.listen(BACKLOG)?;
    Ok(socket)
}

fn bound_tcp(address: SocketAddr, interface: Option<&Interface>, only_v6: bool) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_nonblocking(true)?;
    // ClientConnections of an earlier daemon may still be closing. Two listeners at one port remain
    // impossible.
    socket.set_reuse_address(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(only_v6)?;
    }
    socket.bind_device(interface.map(|interface| interface.name.as_bytes()))?;
    socket.bind(&SockAddr::from(address))?;
    Ok(socket)
}

fn vsock(port: u16) -> io::Result<Socket> {
    let socket = bound_vsock(port)?;
    socket.listen(BACKLOG)?;
    Ok(socket)
}

fn bound_vsock(port: u16) -> io::Result<Socket> {
    let socket = Socket::new(Domain::VSOCK, Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    socket.bind(&SockAddr::vsock(VMADDR_CID_ANY, port.into()))?;
    Ok(socket)
}

fn refusal(at: &At, error: &io::Error) -> NoPort {
    match (at, error.raw_os_error().map(Errno::from_raw)) {
        (At::Tcp { address, .. }, Some(Errno::EADDRINUSE)) => NoPort::TcpTaken(address.port()),
        (At::Tcp { address, .. }, Some(Errno::EADDRNOTAVAIL)) => NoPort::NoAddress(address.ip()),
        (At::Tcp { address, .. }, Some(Errno::EACCES)) => NoPort::Privileged(address.port()),
        (At::Vsock(port), Some(Errno::EADDRINUSE)) => NoPort::VsockTaken(*port),
        (At::Vsock(_), Some(Errno::EAFNOSUPPORT | Errno::ENODEV | Errno::EADDRNOTAVAIL)) => NoPort::NoVsock,
        _ => NoPort::Kernel(error.to_string()),
    }
}

/// The stream of an accepted connection, and who is at its other end.
fn connected(socket: Socket, peer: &SockAddr) -> io::Result<(Stream, Caller)> {
    socket.set_nonblocking(true)?;
    if let Some(peer) = peer.as_socket() {
        // Without the option small messages are only slower.
        let _ = socket.set_tcp_nodelay(true);
        let stream = TcpStream::from_std(socket.into())?;
        // A socket of both families shows IPv4 peers as mapped addresses.
        let peer = match peer.ip().to_canonical() {
            IpAddr::V4(ip) => SocketAddr::from((ip, peer.port())),
            IpAddr::V6(_) => peer,
        };
        return Ok((Box::new(stream), peer.into()));
    }
    let (cid, port) = peer.as_vsock_address().ok_or_else(|| io::Error::other("its peer has no known address"))?;
    // tokio has no type for vsock. A connected stream is read and written alike in every family.
    let stream = UnixStream::from_std(PlainStream::from(OwnedFd::from(socket)))?;
    Ok((Box::new(stream), Caller::Vsock { cid, port }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_reason_why_nobody_can_connect_has_its_remedy() {
        let said = |at: &At, errno: Errno| refusal(at, &io::Error::from(errno)).to_string();
        let vsock = At::Vsock(1229);
        assert!(said(&vsock, Errno::EADDRINUSE).contains("vsock port 1229 is taken"));
        for absent in [Errno::EAFNOSUPPORT, Errno::ENODEV] {
            assert!(said(&vsock, absent).contains("modprobe vhost_vsock"), "{absent}");
        }
        let tcp = At::Tcp { address: ([192, 0, 2, 1], 7).into(), interface: None, only_v6: false };
        assert!(said(&tcp, Errno::EADDRINUSE).contains("TCP port 7 is taken"));
        assert_eq!(said(&tcp, Errno::EADDRNOTAVAIL), "192.0.2.1 is no address of this host now");
        assert!(said(&tcp, Errno::EACCES).contains("port 7 takes CAP_NET_BIND_SERVICE"));
        assert!(said(&vsock, Errno::EACCES).contains("ermission"));
    }

    #[tokio::test]
    async fn a_vsock_peer_is_known_by_its_number_and_by_nothing_else() {
        let pair = || Socket::from(OwnedFd::from(PlainStream::pair().unwrap().0));
        let (_, caller) = connected(pair(), &SockAddr::vsock(7, 1025)).unwrap();
        assert_eq!(caller, Caller::Vsock { cid: 7, port: 1025 });
        assert!(connected(pair(), &SockAddr::unix("/x").unwrap()).is_err());
    }

    #[tokio::test]
    async fn an_ipv4_peer_of_a_socket_of_both_families_is_known_by_its_own_address() {
        let pair = || Socket::from(OwnedFd::from(PlainStream::pair().unwrap().0));
        let mapped: SocketAddr = "[::ffff:192.0.2.7]:1025".parse().unwrap();
        let (_, caller) = connected(pair(), &mapped.into()).unwrap();
        assert_eq!(caller, SocketAddr::from(([192, 0, 2, 7], 1025)).into());
    }
}
