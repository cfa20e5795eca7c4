//! A client of our own: it signs like a stock one, and then does what the test wants.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use fence_common::hash::HashKind;
use fence_common::key::Key;
use fence_common::wire::{
    DEFAULT_GROUP_V4, DEFAULT_GROUP_V6, DEFAULT_PORT, DOMAIN_LEN, FAMILY_V4, FAMILY_V6, HASH_LEN, Op, Request,
};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use socket2::{Domain, Socket, Type};
use zerocopy::{FromZeros, IntoBytes};

use crate::client::Family;
use crate::lab::{Guest, Space};
use crate::process::readable;

/// Requests of one test process differ in this, so that none is another's duplicate.
static SEQNO: AtomicU32 = AtomicU32::new(1);
/// The limit for a conversation's next bytes on a loaded machine: longer than stock clients wait.
const TALK_LIMIT: Duration = Duration::from_secs(40);

/// A client with its sockets in a guest.
#[derive(Debug)]
pub struct Peer {
    key: Key,
    listener: TcpListener,
    udp: UdpSocket,
    group: SocketAddr,
    address: IpAddr,
    /// The digest of its datagrams.
    hash: HashKind,
    /// The digest of its callbacks.
    auth: HashKind,
}

impl Peer {
    /// A client in `guest` that listens on a TCP port of its own and sends to the default group.
    pub fn new(guest: &Guest, key: &[u8], family: Family) -> Result<Self> {
        let address = match family {
            Family::V4 => guest.v4.into(),
            Family::V6 => guest.v6.into(),
        };
        Self::at(guest.space(), address, key)
    }

    /// A client in `space` at `address`, which must be one of its own.
    pub fn at(space: &Space, address: IpAddr, key: &[u8]) -> Result<Self> {
        let key = Key::new(key)?;
        let group: IpAddr = match address {
            IpAddr::V4(_) => DEFAULT_GROUP_V4.into(),
            IpAddr::V6(_) => DEFAULT_GROUP_V6.into(),
        };
        space.in_network(|| {
            let listener = TcpListener::bind((address, 0))?;
            listener.set_nonblocking(true)?;
            let udp = Socket::new(if address.is_ipv4() { Domain::IPV4 } else { Domain::IPV6 }, Type::DGRAM, None)?;
            match address {
                IpAddr::V4(v4) => {
                    udp.set_multicast_if_v4(&v4)?;
                    udp.set_multicast_ttl_v4(2)?;
                }
                IpAddr::V6(_) => {
                    udp.set_multicast_if_v6(nix::net::if_::if_nametoindex("eth0")?)?;
                    udp.set_multicast_hops_v6(2)?;
                }
            }
            udp.bind(&SocketAddr::new(address, 0).into())?;
            let (group, hash, auth) = (SocketAddr::new(group, DEFAULT_PORT), HashKind::Sha256, HashKind::Sha256);
            Ok(Self { key, listener, udp: udp.into(), group, address, hash, auth })
        })
    }

    /// With other digests than SHA-256: `hash` for datagrams, `auth` for callbacks.
    #[must_use]
    pub fn with_digests(self, hash: HashKind, auth: HashKind) -> Self {
        Self { hash, auth, ..self }
    }

    /// The address that it asks to be called back at.
    #[must_use]
    pub fn address(&self) -> IpAddr {
        self.address
    }

    /// The TCP port that it asks to be called back at.
    pub fn port(&self) -> Result<u16> {
        Ok(self.listener.local_addr()?.port())
    }

    /// A request like a stock client's, not signed yet.
    pub fn request(&self, op: Op, domain: &str) -> Result<Request> {
        let mut request = Request::new_zeroed();
        request.op = op.to_wire();
        if domain.len() >= DOMAIN_LEN {
            bail!("{domain} is too long for a request");
        }
        request.domain[..domain.len()].copy_from_slice(domain.as_bytes());
        request.port = self.port()?.into();
        request.seqno = SEQNO.fetch_add(1, Ordering::Relaxed).into();
        set_address(&mut request, self.address);
        Ok(request)
    }

    /// The client's key.
    #[must_use]
    pub fn key(&self) -> &Key {
        &self.key
    }

    /// Signs a request and sends it. Its random bytes are new, like those of each stock datagram.
    pub fn send(&self, request: Request) -> Result<()> {
        self.send_bytes(self.sign(request)?.as_bytes())
    }

    /// What [`Peer::send`] would send.
    pub fn sign(&self, mut request: Request) -> Result<Request> {
        request.random = random()?;
        self.key.sign(self.hash, &mut request);
        Ok(request)
    }

    /// Sends any bytes to the group.
    pub fn send_bytes(&self, payload: &[u8]) -> Result<()> {
        self.udp.send_to(payload, self.group).context("sending to the group")?;
        Ok(())
    }

    /// Sends any bytes to the group at another port.
    pub fn send_bytes_to_port(&self, payload: &[u8], port: u16) -> Result<()> {
        let group = SocketAddr::new(self.group.ip(), port);
        self.udp.send_to(payload, group).with_context(|| format!("sending to {group}"))?;
        Ok(())
    }

    /// Sends any bytes to one host.
    pub fn send_bytes_to(&self, payload: &[u8], host: IpAddr) -> Result<()> {
        self.udp.send_to(payload, (host, DEFAULT_PORT)).with_context(|| format!("sending to {host}"))?;
        Ok(())
    }

    /// Waits for a callback. `None` means that none came within `limit`.
    pub fn called_back(&self, limit: Duration) -> Result<Option<CallBack>> {
        let deadline = Instant::now() + limit;
        loop {
            match self.listener.accept() {
                Ok((stream, _)) => {
                    stream.set_nonblocking(false)?;
                    stream.set_nodelay(true)?;
                    stream.set_read_timeout(Some(TALK_LIMIT))?;
                    stream.set_write_timeout(Some(TALK_LIMIT))?;
                    return Ok(Some(CallBack { stream, key: self.key.clone(), auth: self.auth }));
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Err(error).context("accepting the callback"),
            }
            // The callback itself wakes this client, so that no sleep of ours is measured.
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || !readable(&self.listener, left)? {
                return Ok(None);
            }
        }
    }

    /// Connects by tcp to `host`, as `fence_virt -T` does, and sends nothing yet.
    pub fn connect(&self, space: &Space, host: SocketAddr) -> Result<CallBack> {
        space.in_network(|| self.connect_here(host))
    }

    /// As [`Self::connect`], in the network that the calling thread is in.
    pub fn connect_here(&self, host: SocketAddr) -> Result<CallBack> {
        let stream = TcpStream::connect_timeout(&host, TALK_LIMIT)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(TALK_LIMIT))?;
        stream.set_write_timeout(Some(TALK_LIMIT))?;
        Ok(CallBack { stream, key: self.key.clone(), auth: HashKind::Sha256 })
    }

    /// A request as it is sent by tcp: without a callback address, and not signed yet.
    pub fn stream_request(&self, op: Op, domain: &str) -> Result<Request> {
        let request = self.request(op, domain)?;
        Ok(Request { addr_len: 0, address: [0; 28], port: 0.into(), family: 0.into(), ..request })
    }

    /// Sends a signed request every 2 s, as stock clients do, and waits for its callback.
    pub fn ask(&self, op: Op, domain: &str) -> Result<CallBack> {
        let request = self.request(op, domain)?;
        let deadline = Instant::now() + TALK_LIMIT;
        while Instant::now() < deadline {
            self.send(request)?;
            if let Some(call) = self.called_back(Duration::from_secs(2))? {
                return Ok(call);
            }
        }
        bail!("no callback to {:?} of {domain} within {TALK_LIMIT:?}", op)
    }
}

/// Puts a callback address and its family into a request.
pub fn set_address(request: &mut Request, address: IpAddr) {
    request.address = [0; 28];
    match address {
        IpAddr::V4(v4) => {
            request.address[..4].copy_from_slice(&v4.octets());
            (request.addr_len, request.family) = (4, FAMILY_V4.into());
        }
        IpAddr::V6(v6) => {
            request.address[..16].copy_from_slice(&v6.octets());
            (request.addr_len, request.family) = (16, FAMILY_V6.into());
        }
    }
}

/// An unused address of the guests' network.
pub const NOBODY: Ipv4Addr = Ipv4Addr::new(192, 168, 122, 250);

/// Random bytes.
fn random<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes)?;
    Ok(bytes)
}

/// The connection that a server opened to us.
#[derive(Debug)]
pub struct CallBack {
    stream: TcpStream,
    key: Key,
    auth: HashKind,
}

impl CallBack {
    /// Writes bytes.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.stream.write_all(bytes).context("writing to the callback")
    }

    /// Reads exactly 64 bytes: a response or a challenge.
    pub fn read_block(&mut self) -> Result<[u8; HASH_LEN]> {
        let mut block = [0; HASH_LEN];
        self.stream.read_exact(&mut block).context("reading from the callback")?;
        Ok(block)
    }

    /// Challenges the server and checks its response.
    pub fn challenge(&mut self) -> Result<()> {
        let challenge: [u8; HASH_LEN] = random()?;
        self.write(&challenge)?;
        if self.read_block()? != self.key.digest(self.auth, &[&challenge]) {
            bail!("the server's response is wrong");
        }
        Ok(())
    }

    /// Responds correctly to the server's challenge.
    pub fn respond(&mut self) -> Result<()> {
        let challenge = self.read_block()?;
        let response = self.key.digest(self.auth, &[&challenge]);
        self.write(&response)
    }

    /// The byte that ends the conversation; `None` if the server hung up without one.
    ///
    /// # Errors
    /// The server does neither in time.
    pub fn reply(&mut self) -> Result<Option<u8>> {
        let mut byte = [0];
        match self.stream.read(&mut byte) {
            Ok(0) => Ok(None),
            Ok(_) => Ok(Some(byte[0])),
            Err(error) if error.kind() == ErrorKind::ConnectionReset => Ok(None),
            // With a time limit, the kernel does not resume an interrupted call by itself.
            Err(error) if error.kind() == ErrorKind::Interrupted => self.reply(),
            Err(error) => Err(error).context("waiting for the reply"),
        }
    }

    /// Says that we say nothing more; reading goes on.
    pub fn stop_writing(&self) -> Result<()> {
        self.stream.shutdown(Shutdown::Write).context("closing our half of the callback")
    }

    /// Whether the server has not closed the connection yet.
    pub fn is_open(&self) -> Result<bool> {
        // `PollFlags` has no name for it.
        let hung_up = PollFlags::from_bits_retain(nix::libc::POLLRDHUP);
        let mut fds = [PollFd::new(self.stream.as_fd(), hung_up)];
        poll(&mut fds, PollTimeout::ZERO).context("looking whether the server has hung up")?;
        Ok(fds[0].revents().unwrap_or(PollFlags::empty()).is_empty())
    }

    /// All that the server still says until it closes the connection.
    ///
    /// # Errors
    /// It does not close it in time.
    pub fn rest(&mut self) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        match self.stream.read_to_end(&mut bytes) {
            Err(error) if error.kind() != ErrorKind::ConnectionReset => {
                Err(error).context("waiting for the end of the callback")
            }
            Ok(_) | Err(_) => Ok(bytes),
        }
    }

    /// The whole conversation, as a stock client leads it.
    pub fn converse(&mut self) -> Result<u8> {
        self.challenge()?;
        self.respond()?;
        self.reply()?.context("the server hung up without a reply")
    }
}
