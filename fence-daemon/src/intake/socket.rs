//! The UDP socket that is always open: for requests from this host itself, for what the kernel program passes because it is
//! not sure, and for everything where no program can be attached.
//!
//! It is bound to the group's address, so unicast to the port never reaches it, and it hears the group only on the interfaces
//! that it has joined it on. That membership is also what makes a snooping bridge deliver the group here at all.

use std::io::{self, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV6};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use fence_common::admit::{Refusal, Rules, admit};
use fence_common::hash::HashKind;
use fence_common::key::Key;
use fence_common::verdict::{Counters, Verdict};
use fence_common::wire::{REQUEST_LEN, Request};
use nix::sys::socket::sockopt::ReceiveTimestampns;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, setsockopt};
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_gettime};
use socket2::{Domain, InterfaceIndexOrAddress, Protocol, SockAddr, Socket, Type};
use tokio::io::Interest;
use tokio::net::UdpSocket;
use zerocopy::FromBytes;

use super::interface::Interface;
use super::{Verified, Via};
use crate::clock::Moment;
use crate::observe::limit::LogLimit;

/// How long to wait after the socket itself failed (an interface that went down, say) before it is asked again.
const AFTER_ERROR: Duration = Duration::from_millis(100);

/// More datagrams than the socket's buffer holds: the kernel counts at least 512 bytes for each, of 208 KiB unless an administrator
/// made it larger. Who reads that many has read all that was there when he began, however many come meanwhile.
const QUEUE_MAX: usize = 4096;

/// Why the socket cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Somebody else has the port.
    #[error(
        "UDP port {0} is taken for {1}: is fence_virtd, or another fence-daemon, running? (`systemctl disable --now fence_virtd`)"
    )]
    PortTaken(u16, IpAddr),
    /// The kernel refuses the membership.
    #[error("cannot join {group} on {interface}: {error}")]
    Join {
        /// The group's address.
        group: IpAddr,
        /// The interface's name.
        interface: String,
        /// What the kernel says.
        error: io::Error,
    },
    /// Anything else.
    #[error("cannot {what} the request socket for {address}: {error}")]
    Kernel {
        /// What was tried.
        what: &'static str,
        /// Group and port.
        address: SocketAddr,
        /// What the kernel says.
        error: io::Error,
    },
}

/// The socket, and what it takes a datagram to be accepted.
#[derive(Debug)]
pub struct RequestSocket {
    socket: UdpSocket,
    rules: Rules,
    key: Option<Key>,
    ifindex: u32,
    counters: Mutex<Counters>,
    complaints: LogLimit,
}

impl RequestSocket {
    /// Opens the socket and joins `group` on each of `interfaces`. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// See [`SocketError`]. A membership that fails on one of several interfaces is a failure: half a listener is none.
    pub fn open(
        group: IpAddr,
        port: u16,
        interfaces: &[Interface],
        rules: Rules,
        key: Option<Key>,
    ) -> Result<Self, SocketError> {
        // Where there is one interface it is the one a link-local caller is on; with several the kernel cannot be told.
        let ifindex = if let [only] = interfaces { only.index } else { 0 };
        let address = match group {
            // A group of the link's scope is one group on each link.
            IpAddr::V6(group) if matches!(group.segments()[0] & 0xf, 1 | 2) => {
                SocketAddrV6::new(group, port, 0, ifindex).into()
            }
            IpAddr::V4(_) | IpAddr::V6(_) => SocketAddr::new(group, port),
        };
        let kernel = |what| move |error| SocketError::Kernel { what, address, error };
        let domain = Domain::for_address(address);
        let socket = Socket::new(domain, Type::DGRAM, Some(Protocol::UDP)).map_err(kernel("open"))?;
        socket.set_nonblocking(true).map_err(kernel("prepare"))?;
        // A datagram that waited here is as old as it is, not as new as our reading of it.
        setsockopt(&socket, ReceiveTimestampns, &true).map_err(io::Error::from).map_err(kernel("prepare"))?;
        match group {
            IpAddr::V4(_) => socket.set_multicast_all_v4(false),
            IpAddr::V6(_) => socket.set_only_v6(true).and_then(|()| socket.set_multicast_all_v6(false)),
        }
        .map_err(kernel("narrow"))?;
        // No SO_REUSEADDR on purpose: two servers on one port would both answer.
        socket.bind(&SockAddr::from(address)).map_err(|error| {
            if error.kind() == io::ErrorKind::AddrInUse {
                SocketError::PortTaken(port, group)
            } else {
                SocketError::Kernel { what: "bind", address, error }
            }
        })?;
        for interface in interfaces {
            join(&socket, group, interface.index).map_err(|error| SocketError::Join {
                group,
                interface: interface.name.clone(),
                error,
            })?;
        }
        let socket = UdpSocket::from_std(socket.into()).map_err(kernel("watch"))?;
        let complaints = LogLimit::new(1, Duration::from_secs(60));
        Ok(Self { socket, rules, key, ifindex, counters: Mutex::default(), complaints })
    }

    /// The next request that holds. Whatever else arrives is counted and forgotten, without a word.
    /// Dropping the future loses no datagram.
    pub async fn next(&self) -> Verified {
        loop {
            match self.socket.async_io(Interest::READABLE, || receive(&self.socket)).await {
                Ok(datagram) => {
                    if let Some(verified) = self.take(&datagram) {
                        return verified;
                    }
                }
                Err(error) => {
                    if let Some(held_back) = self.complaints.allow(Moment::now()) {
                        tracing::warn!(held_back, "the request socket: {error}");
                    }
                    tokio::time::sleep(AFTER_ERROR).await;
                }
            }
        }
    }

    /// Hands each request that is there already to `each`, whether or not the runtime has noticed it yet.
    pub fn take_waiting(&self, mut each: impl FnMut(Verified)) {
        for _ in 0..QUEUE_MAX {
            let Ok(datagram) = receive(&self.socket) else { return };
            if let Some(verified) = self.take(&datagram) {
                each(verified);
            }
        }
    }

    /// Counts a datagram, and makes a request of it if it is one.
    fn take(&self, datagram: &Datagram) -> Option<Verified> {
        let judged = self.judge(datagram.bytes.get(..datagram.len).unwrap_or_default(), datagram.source);
        let verdict = match &judged {
            Ok(_) => Verdict::Delivered,
            Err(refusal) => Verdict::from(*refusal),
        };
        self.counters.lock().unwrap_or_else(PoisonError::into_inner).count(verdict);
        judged
            .ok()
            .and_then(|request| Verified::new(&request, self.ifindex, Via::Socket, datagram.arrived))
            // The network stack drops what claims from outside to come from a loopback address.
            .filter(|request| request.may_be_called(datagram.source.is_loopback()))
    }

    /// What arrived here so far, by what became of it.
    #[must_use]
    pub fn counters(&self) -> Counters {
        *self.counters.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn judge(&self, datagram: &[u8], source: IpAddr) -> Result<Request, Refusal> {
        let request = Request::read_from_bytes(datagram).map_err(|_| Refusal::Length)?;
        match admit(&request, &source.into(), &self.rules)? {
            HashKind::None => Ok(request),
            HashKind::Sha1 | HashKind::Sha256 | HashKind::Sha512 => match &self.key {
                Some(key) if key.verify(&request) => Ok(request),
                Some(_) | None => Err(Refusal::Digest),
            },
        }
    }
}

/// A datagram as it was received.
struct Datagram {
    /// One byte more than a request has, so that a longer datagram shows.
    bytes: [u8; REQUEST_LEN + 1],
    len: usize,
    source: IpAddr,
    arrived: Moment,
}

/// Receives a datagram that is there already.
fn receive(socket: &impl AsFd) -> io::Result<Datagram> {
    let mut bytes = [0; REQUEST_LEN + 1];
    let mut control = nix::cmsg_space!(TimeSpec);
    let (len, source, stamp) = {
        let mut into = [IoSliceMut::new(&mut bytes)];
        let fd = socket.as_fd().as_raw_fd();
        let message = recvmsg::<SockaddrStorage>(fd, &mut into, Some(&mut control), MsgFlags::MSG_DONTWAIT)?;
        let stamp = message.cmsgs()?.find_map(|control| {
            if let ControlMessageOwned::ScmTimestampns(stamp) = control { Some(stamp) } else { None }
        });
        (message.bytes, message.address, stamp)
    };
    let v4 = source.and_then(|source| Some(IpAddr::V4(source.as_sockaddr_in()?.ip())));
    let source = v4.or_else(|| Some(IpAddr::V6(source?.as_sockaddr_in6()?.ip())));
    let source = source.ok_or_else(|| io::Error::other("a datagram from no IP address"))?;
    Ok(Datagram { bytes, len, source, arrived: Moment::now().before(age(stamp)) })
}

/// How long ago the kernel stamped a datagram. Its stamps are of the wall clock, which may have been set since: then it is new.
fn age(stamp: Option<TimeSpec>) -> Duration {
    let now = clock_gettime(ClockId::CLOCK_REALTIME).ok();
    let age = now.zip(stamp).map(|(now, stamp)| now - stamp);
    age.filter(|age| age.tv_sec() >= 0).map_or(Duration::ZERO, Duration::from)
}

fn join(socket: &Socket, group: IpAddr, ifindex: u32) -> io::Result<()> {
    match group {
        IpAddr::V4(group) if ifindex != 0 => {
            socket.join_multicast_v4_n(&group, &InterfaceIndexOrAddress::Index(ifindex))
        }
        IpAddr::V4(group) => socket.join_multicast_v4(&group, &Ipv4Addr::UNSPECIFIED),
        IpAddr::V6(group) => socket.join_multicast_v6(&group, ifindex),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::intake::interface;
    use fence_common::wire::{FAMILY_V4, Op};
    use zerocopy::{FromZeros, IntoBytes};

    const GROUP: IpAddr = IpAddr::V4(Ipv4Addr::new(239, 255, 77, 12));

    fn key() -> Key {
        Key::new(b"a key").unwrap()
    }

    fn open(port: u16) -> Result<RequestSocket, SocketError> {
        let rules = Rules { min_hash: HashKind::Sha256, strict_source: true };
        RequestSocket::open(GROUP, port, &[interface::named("lo").unwrap()], rules, Some(key()))
    }

    fn request() -> Request {
        let mut request = Request::new_zeroed();
        request.op = Op::Status.to_wire();
        request.domain[..5].copy_from_slice(b"node1");
        request.address[..4].copy_from_slice(&[127, 0, 0, 1]);
        request.port = 1229.into();
        request.family = FAMILY_V4.into();
        key().sign(HashKind::Sha256, &mut request);
        request
    }

    /// Sends through the loopback to `to`, from 127.0.0.1.
    fn send(bytes: &[u8], to: impl Into<SocketAddr>) {
        let sender = Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::UDP)).unwrap();
        sender.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
        sender.set_multicast_if_v4(&Ipv4Addr::LOCALHOST).unwrap();
        sender.send_to(bytes, &to.into().into()).unwrap();
    }

    #[tokio::test]
    async fn takes_what_holds_counts_the_rest_and_hears_no_unicast() {
        let socket = open(11_229).unwrap();
        let to = SocketAddr::new(GROUP, 11_229);
        let good = request();
        send(good.as_bytes(), ([127, 0, 0, 1], 11_229));
        send(&good.as_bytes()[1..], to);
        send(&[good.as_bytes(), &[0]].concat(), to);
        send(Request { hash: [7; 64], ..good }.as_bytes(), to);
        send(Request { port: 0.into(), ..good }.as_bytes(), to);
        send(good.as_bytes(), to);
        let verified = tokio::time::timeout(Duration::from_secs(10), socket.next()).await.unwrap();
        assert_eq!((verified.op(), verified.via()), (Op::Status, Via::Socket));
        assert_eq!(verified.caller(), SocketAddr::from(([127, 0, 0, 1], 1229)));
        let expected = Counters { delivered: 1, drop_length: 2, drop_digest: 1, drop_port: 1, ..Counters::default() };
        assert_eq!(socket.counters(), expected);
    }

    #[tokio::test]
    async fn a_group_of_the_link_can_be_had() {
        let rules = Rules { min_hash: HashKind::Sha256, strict_source: true };
        for group in ["ff02::fe1:ce", "ff05::fe1:ce"] {
            let lo = interface::named("lo").unwrap();
            RequestSocket::open(group.parse().unwrap(), 11_232, &[lo], rules, Some(key())).unwrap();
        }
    }

    #[tokio::test]
    async fn what_waited_is_as_old_as_it_is() {
        let socket = open(11_231).unwrap();
        let waited = Duration::from_millis(100);
        let mut ages = Vec::new();
        // The kernel begins to stamp a moment after the first socket on the machine has asked for it.
        while ages.last().is_none_or(|age| *age < waited) && ages.len() < 50 {
            send(request().as_bytes(), SocketAddr::new(GROUP, 11_231));
            std::thread::sleep(waited);
            let verified = tokio::time::timeout(Duration::from_secs(10), socket.next()).await.unwrap();
            ages.push(verified.verified().since(verified.arrived()));
        }
        let age = *ages.last().unwrap();
        assert!(age >= waited && age < Duration::from_secs(10), "{ages:?}");
    }

    #[test]
    fn a_clock_that_was_set_back_makes_nothing_old() {
        let now = clock_gettime(ClockId::CLOCK_REALTIME).unwrap();
        assert_eq!(age(Some(now + TimeSpec::new(3600, 0))), Duration::ZERO);
        assert!(age(Some(now - TimeSpec::new(3600, 0))) >= Duration::from_secs(3600));
        assert_eq!(age(None), Duration::ZERO);
    }

    #[tokio::test]
    async fn a_taken_port_is_said_to_be_taken() {
        let _first = open(11_230).unwrap();
        let error = open(11_230).unwrap_err();
        assert!(matches!(error, SocketError::PortTaken(11_230, _)), "{error}");
        assert!(error.to_string().contains("fence_virtd"));
    }
}
