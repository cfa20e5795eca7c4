//! The vsock listener: accepts the connections of virtual machines to this host, without any
//! network. The kernel says which machine has connected, and libvirt which domain that is.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as PlainStream;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use fence_common::caller::Caller;
use fence_common::sync::lock;
use fence_common::verdict::Counters;
use fence_config::{Listener, Vsock};
use nix::errno::Errno;
use socket2::{Domain, SockAddr, Socket, Type};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::UnixStream;
use tokio::time::sleep;
use tracing::{error, info, warn};

use super::arrivals::{Arrivals, Feed};
use super::connections::{Accepted, Voucher};
use super::judge::Judge;
use crate::clock::Moment;
use crate::observe::limit::LogLimit;
use crate::observe::requests::Via;

/// Connections that the kernel accepts before the daemon does. fence_virtd has room for one, and
/// resets the others.
const BACKLOG: i32 = 128;

/// How often the listener tries to open its port.
const AGAIN: Duration = Duration::from_secs(1);

/// How long to wait after the kernel refuses to accept a connection: no file is left, say.
const AFTER_ERROR: Duration = Duration::from_millis(100);

/// Why nobody can connect.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
enum NoVsock {
    #[error("vsock port {0} is taken (is fence_virtd running?)")]
    PortTaken(u16),
    #[error("this host has no vsock (`modprobe vhost_vsock`)")]
    Absent,
    #[error("{0}")]
    Kernel(String),
}

/// The listener, to be looked at.
#[derive(Debug)]
pub struct VsockIntake {
    settings: Vsock,
    accepted: Arc<Accepted>,
    /// `None` until the first attempt.
    heard: Mutex<Option<Result<(), NoVsock>>>,
    complaints: LogLimit,
}

impl VsockIntake {
    /// Begins to listen, for the queue. If that is not possible now, it is tried again until it is.
    /// `voucher` knows the domains. Must be called within a tokio runtime.
    #[must_use]
    pub fn start(settings: Vsock, judge: Judge, voucher: Voucher, arrivals: &mut Arrivals) -> Arc<Self> {
        let complaints = LogLimit::new(1, Duration::from_secs(60));
        let accepted = Accepted::vouched(Via::Vsock, settings.hash, judge, voucher);
        let intake = Arc::new(Self { settings, accepted, heard: Mutex::default(), complaints });
        // Here, so that the port is open when the daemon says that it is ready.
        let first = intake.bind();
        arrivals.listen(|feed| Arc::clone(&intake).listen(first, feed));
        intake
    }

    /// Where clients connect to.
    #[must_use]
    pub fn settings(&self) -> &Vsock {
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
        self.accepted.counters()
    }

    /// Opens the port, and logs the outcome if it is another one than before.
    fn bind(&self) -> Option<AsyncFd<Socket>> {
        let port = self.settings.port;
        let (socket, heard) = match open(port) {
            Ok(socket) => (Some(socket), Ok(())),
            Err(error) => (None, Err(refusal(port, &error))),
        };
        let mut known = lock(&self.heard);
        if known.as_ref() != Some(&heard) {
            let label = Listener::Vsock(self.settings.clone()).label();
            match &heard {
                Ok(()) => info!(port, "{label}: clients can connect"),
                Err(refusal) => error!(port, "{label}: no client can connect: {refusal}; trying again"),
            }
            *known = Some(heard);
        }
        socket
    }

    async fn listen(self: Arc<Self>, mut socket: Option<AsyncFd<Socket>>, feed: Feed) {
        loop {
            match socket {
                Some(socket) => self.accept(&socket, &feed).await,
                None => {
                    sleep(AGAIN).await;
                    socket = self.bind();
                }
            }
        }
    }

    async fn accept(&self, listener: &AsyncFd<Socket>, feed: &Feed) -> ! {
        loop {
            let accepted = listener.async_io(Interest::READABLE, Socket::accept).await;
            match accepted.and_then(|(socket, peer)| connected(socket, &peer)) {
                Ok((stream, caller)) => self.accepted.take(Box::new(stream), caller, feed),
                Err(error) => {
                    if let Some(held_back) = self.complaints.allow(Moment::now()) {
                        warn!(held_back, "vsock: a connection cannot be accepted: {error}");
                    }
                    sleep(AFTER_ERROR).await;
                }
            }
        }
    }
}

/// The port, for every machine that has a way to this host.
fn open(port: u16) -> io::Result<AsyncFd<Socket>> {
    let socket = Socket::new(Domain::VSOCK, Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    socket.bind(&SockAddr::vsock(nix::libc::VMADDR_CID_ANY, port.into()))?;
    socket.listen(BACKLOG)?;
    // SAFETY: tokio has no safe way to await a foreign socket. `Socket` owns its descriptor, gives
    // out the same one every time, and lives as long as the registration.
    Ok(unsafe { AsyncFd::register(socket) }?)
}

fn refusal(port: u16, error: &io::Error) -> NoVsock {
    match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::EADDRINUSE) => NoVsock::PortTaken(port),
        Some(Errno::EAFNOSUPPORT | Errno::ENODEV | Errno::EADDRNOTAVAIL) => NoVsock::Absent,
        _ => NoVsock::Kernel(error.to_string()),
    }
}

/// The stream of an accepted connection, and who is at its other end.
fn connected(socket: Socket, peer: &SockAddr) -> io::Result<(UnixStream, Caller)> {
    let (cid, port) = peer.as_vsock_address().ok_or_else(|| io::Error::other("its peer has no vsock address"))?;
    socket.set_nonblocking(true)?;
    // tokio has no type for vsock. A connected stream is read and written alike in every family.
    let stream = UnixStream::from_std(PlainStream::from(OwnedFd::from(socket)))?;
    Ok((stream, Caller::Vsock { cid, port }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_reason_why_nobody_can_connect_has_its_remedy() {
        let said = |errno: Errno| refusal(1229, &io::Error::from(errno)).to_string();
        assert!(said(Errno::EADDRINUSE).contains("port 1229 is taken"));
        for absent in [Errno::EAFNOSUPPORT, Errno::ENODEV] {
            assert!(said(absent).contains("modprobe vhost_vsock"), "{absent}");
        }
        assert!(said(Errno::EACCES).contains("ermission"));
    }

    #[tokio::test]
    async fn a_peer_is_known_by_its_number_and_by_nothing_else() {
        let pair = || Socket::from(OwnedFd::from(PlainStream::pair().unwrap().0));
        let (_, caller) = connected(pair(), &SockAddr::vsock(7, 1025)).unwrap();
        assert_eq!(caller, Caller::Vsock { cid: 7, port: 1025 });
        let elsewhere = std::net::SocketAddr::from(([192, 0, 2, 7], 1025));
        assert!(connected(pair(), &elsewhere.into()).is_err());
    }
}
