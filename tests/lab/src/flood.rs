//! A guest that sends as fast as it can: any IPv4 packets, from any source.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result};
use etherparse::{IpFragOffset, IpNumber, Ipv4Header, PacketBuilder};
use fence_common::wire::{DEFAULT_GROUP_V4, DEFAULT_PORT};
use nix::libc;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::lab::Guest;
use crate::worker::Worker;

pub mod igmp;

/// Packets on their way. Dropping it ends them.
#[derive(Debug)]
pub struct Flood {
    sent: Arc<AtomicU64>,
    sender: Worker,
}

/// How often the packets are sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rounds {
    /// Each of them once.
    One,
    /// All of them, over and over.
    Endless,
}

impl Flood {
    /// Begins to send whole IPv4 packets out of a guest.
    pub fn start(guest: &Guest, packets: Vec<Vec<u8>>, rounds: Rounds) -> Result<Self> {
        match rounds {
            Rounds::One => Self::of(guest, packets.into_iter()),
            Rounds::Endless => {
                let packets: Vec<Arc<[u8]>> = packets.into_iter().map(Arc::from).collect();
                Self::of(guest, (0..packets.len()).cycle().filter_map(move |number| packets.get(number).cloned()))
            }
        }
    }

    /// The same with packets that are made on the way, until there are no more.
    pub fn of<P: AsRef<[u8]>>(guest: &Guest, packets: impl Iterator<Item = P> + Send + 'static) -> Result<Self> {
        let address = guest.v4;
        let socket = guest.space().in_network(|| {
            // The packet has its header, source included. The kernel fills in the header's
            // checksum.
            let socket = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(libc::IPPROTO_RAW)))?;
            socket.set_multicast_if_v4(&address)?;
            Ok(socket)
        })?;
        let sent = Arc::new(AtomicU64::new(0));
        let sender = Worker::start({
            let sent = Arc::clone(&sent);
            move |stop| {
                for packet in packets {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    let packet = packet.as_ref();
                    match socket.send_to(packet, &destination(packet)?) {
                        Ok(_) => {
                            sent.fetch_add(1, Ordering::Relaxed);
                        }
                        // The device's queue is full: as fast as it can, that is.
                        Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {}
                        Err(error) => return Err(error).context("flooding"),
                    }
                }
                Ok(())
            }
        });
        Ok(Self { sent, sender })
    }

    /// How many packets were sent so far.
    #[must_use]
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Ends it. How many packets were sent.
    pub fn stop(mut self) -> Result<u64> {
        self.sender.stop()?;
        Ok(self.sent())
    }

    /// Waits until all packets of one round are sent. How many that were.
    pub fn wait(&mut self) -> Result<u64> {
        self.sender.wait()?;
        Ok(self.sent())
    }
}

/// Where a packet is to go: what its header says, of which the kernel makes the Ethernet address.
fn destination(packet: &[u8]) -> Result<SockAddr> {
    let [a, b, c, d] = *packet.get(16..).and_then(<[u8]>::first_chunk).context("no IPv4 packet")?;
    Ok(SocketAddr::from((Ipv4Addr::new(a, b, c, d), 0)).into())
}

/// A UDP datagram to the group and port, from anywhere.
pub fn datagram(source: Ipv4Addr, payload: &[u8]) -> Result<Vec<u8>> {
    let mut packet = Vec::new();
    PacketBuilder::ipv4(source.octets(), DEFAULT_GROUP_V4, 2)
        .udp(40_000, DEFAULT_PORT)
        .write(&mut packet, payload)
        .context("a datagram")?;
    Ok(packet)
}

/// A fragment to the group, the first or a later one, of a packet that never becomes whole.
pub fn fragment(source: Ipv4Addr, identification: u16, first: bool, payload: &[u8]) -> Result<Vec<u8>> {
    let length = u16::try_from(payload.len()).context("a fragment")?;
    let mut header =
        Ipv4Header::new(length, 2, IpNumber::UDP, source.octets(), DEFAULT_GROUP_V4).context("a fragment")?;
    header.identification = identification;
    header.dont_fragment = false;
    header.more_fragments = first;
    header.fragment_offset = IpFragOffset::try_new(if first { 0 } else { 100 }).context("an offset")?;
    let mut packet = Vec::new();
    header.write(&mut packet).context("a fragment")?;
    packet.extend_from_slice(payload);
    Ok(packet)
}

/// The IPv4 address of a source that is none of the lab's, the `n`th of 65,536.
#[must_use]
pub fn elsewhere(n: u16) -> IpAddr {
    let [high, low] = n.to_be_bytes();
    Ipv4Addr::new(10, 77, high, low).into()
}
