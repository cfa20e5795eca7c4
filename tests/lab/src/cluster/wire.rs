//! Packets about fences on the lab's network: requests and replies, captured by a packet socket.

use std::io::{ErrorKind, Read as _};
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsFd, BorrowedFd};

use anyhow::{Context, Result};
use etherparse::{NetSlice, SlicedPacket, TransportSlice};
use fence_common::wire::{DEFAULT_PORT, Op, Request};
use socket2::{Domain, Protocol, SockFilter, Socket, Type};
use zerocopy::FromBytes as _;

use crate::lab::{HYPERVISOR_V4, Space};

/// Every protocol, on every interface, in both directions; the kernel wants it in network order.
const EVERYTHING: u16 = 0x0003;

/// A classic BPF filter for UDP and TCP to the fencing port. Other traffic cannot fill the socket.
/// It begins at the IP header.
const TO_OUR_PORT: [SockFilter; 8] = [
    SockFilter::new(0x30, 0, 0, 9),                   // the protocol
    SockFilter::new(0x15, 1, 0, 17),                  // UDP: to the port
    SockFilter::new(0x15, 0, 3, 6),                   // neither it nor TCP: no
    SockFilter::new(0xb1, 0, 0, 0),                   // behind the IP header
    SockFilter::new(0x48, 0, 0, 2),                   // the destination port
    SockFilter::new(0x15, 1, 0, DEFAULT_PORT as u32), // ours: yes
    SockFilter::new(0x06, 0, 0, 0),                   // no
    SockFilter::new(0x06, 0, 0, 0xffff),              // yes, all of it
];

/// A packet about a fence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Packet {
    /// A request; its client sends it again and again, with the same number.
    Request {
        /// The requester.
        by: Ipv4Addr,
        /// For what.
        op: Op,
        /// Of which domain.
        domain: String,
        /// The client's number for it.
        number: u32,
    },
    /// The byte that ends a conversation.
    Reply {
        /// Who had asked.
        to: Ipv4Addr,
        /// The reply byte.
        byte: u8,
        /// The server's port, which identifies the conversation.
        port: u16,
    },
}

/// A socket that sees the packets of a place.
#[derive(Debug)]
pub struct Tap(Socket);

impl Tap {
    /// Opens it.
    pub fn open(space: &Space) -> Result<Self> {
        let socket = space.in_network(|| {
            let protocol = Protocol::from(i32::from(EVERYTHING.to_be()));
            Socket::new(Domain::PACKET, Type::DGRAM, Some(protocol)).context("a packet socket")
        })?;
        socket.attach_filter(&TO_OUR_PORT).context("the packet socket's filter")?;
        socket.set_nonblocking(true)?;
        Ok(Self(socket))
    }

    /// The next packet about a fence. One packet appears once for each interface that it passes.
    pub fn next(&self) -> Result<Option<Packet>> {
        let mut buffer = [0; 2048];
        loop {
            match (&self.0).read(&mut buffer) {
                Ok(length) => {
                    let packet = buffer.get(..length).and_then(parse);
                    if packet.is_some() {
                        return Ok(packet);
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
                // An interface went away.
                Err(error) if error.raw_os_error() == Some(nix::errno::Errno::ENETDOWN as i32) => {}
                Err(error) => return Err(error).context("a packet socket"),
            }
        }
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn parse(bytes: &[u8]) -> Option<Packet> {
    let packet = SlicedPacket::from_ip(bytes).ok()?;
    let Some(NetSlice::Ipv4(ip)) = packet.net else { return None };
    let (transport, header) = (packet.transport?, ip.header());
    if let TransportSlice::Udp(udp) = &transport
        && udp.destination_port() == DEFAULT_PORT
    {
        let request = Request::ref_from_bytes(udp.payload()).ok()?;
        let Some(IpAddr::V4(by)) = request.callback_ip() else { return None };
        let domain = String::from_utf8_lossy(request.domain_text()?).into_owned();
        return Some(Packet::Request { by, op: request.op()?, domain, number: request.seqno.get() });
    }
    if let TransportSlice::Tcp(tcp) = &transport
        && tcp.destination_port() == DEFAULT_PORT
        && header.source_addr() == HYPERVISOR_V4
    {
        let [byte] = *tcp.payload() else { return None };
        return Some(Packet::Reply { to: header.destination_addr(), byte, port: tcp.source_port() });
    }
    None
}
