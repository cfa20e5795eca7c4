//! Asks the kernel over rtnetlink: the [links](link) of this network namespace, its
//! [neighbours](neighbour), and its [routing decisions](route); and the links and
//! [addresses](address) at the other end of a veth.
//!
//! Only the needed attributes of each message are decoded. netlink-packet-route can decode whole
//! messages. But then one odd link of the host fails the whole answer: a name that is not UTF-8, or
//! an attribute that another kernel sends in another length.

pub mod address;
pub mod interface;
pub mod link;
pub mod neighbour;
pub mod route;
pub mod taker;
pub mod way_out;

use std::io;

use netlink_packet_core::{
    NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkDeserializable, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};
use nix::libc;

/// Longer than any datagram of an answer. The kernel fills up to 32 KiB of it with messages.
const DATAGRAM_MAX: usize = 64 * 1024;

/// How often a dump is tried, if the kernel's tables change each time meanwhile.
const ATTEMPTS: usize = 5;

/// Everything that the kernel has of a kind, in its order.
fn dump<T: NetlinkDeserializable>(request: &RouteNetlinkMessage) -> io::Result<Vec<T>> {
    let mut answer = ask(NLM_F_REQUEST | NLM_F_DUMP, request.clone());
    for _ in 1..ATTEMPTS {
        if !answer.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::Interrupted) {
            break;
        }
        answer = ask(NLM_F_REQUEST | NLM_F_DUMP, request.clone());
    }
    answer
}

fn ask<T: NetlinkDeserializable>(flags: u16, request: RouteNetlinkMessage) -> io::Result<Vec<T>> {
    // Else the kernel ignores which namespace's addresses are asked for.
    let strict = matches!(request, RouteNetlinkMessage::GetAddress(_));
    let mut request = NetlinkMessage::from(request);
    request.header.flags = flags;
    request.finalize();
    let mut bytes = vec![0; request.buffer_len()];
    request.serialize(&mut bytes);

    let socket = Socket::new(NETLINK_ROUTE)?;
    if strict {
        socket.set_netlink_get_strict_chk(true)?;
    }
    // A connected socket receives from the kernel only.
    socket.connect(&SocketAddr::new(0, 0))?;
    socket.send(&bytes, 0)?;
    let mut found = Vec::new();
    let mut datagram = Vec::with_capacity(DATAGRAM_MAX);
    loop {
        datagram.clear();
        let len = socket.recv(&mut datagram, libc::MSG_TRUNC)?;
        if len > datagram.len() {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "an answer of the kernel is too long"));
        }
        if collect(&datagram, &mut found)? {
            return Ok(found);
        }
    }
}

/// Collects the messages of a datagram. Returns whether the answer ends there.
fn collect<T: NetlinkDeserializable>(mut datagram: &[u8], found: &mut Vec<T>) -> io::Result<bool> {
    while !datagram.is_empty() {
        let message = NetlinkMessage::<T>::deserialize(datagram)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        if message.header.flags & NLM_F_DUMP_INTR != 0 {
            // Something changed between two datagrams: the dump may be incomplete.
            return Err(io::ErrorKind::Interrupted.into());
        }
        match message.payload {
            NetlinkPayload::InnerMessage(one) => found.push(one),
            NetlinkPayload::Done(done) if done.code == 0 => return Ok(true),
            NetlinkPayload::Done(done) => return Err(io::Error::from_raw_os_error(done.code.wrapping_neg())),
            NetlinkPayload::Error(error) if error.code.is_none() => return Ok(true),
            NetlinkPayload::Error(error) => return Err(error.to_io()),
            NetlinkPayload::Noop => {}
            NetlinkPayload::Overrun(_) | _ => return Err(io::Error::from_raw_os_error(libc::ENOBUFS)),
        }
        let len = usize::try_from(message.header.length).map_err(io::Error::other)?;
        datagram = datagram.get(len.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(false)
}
