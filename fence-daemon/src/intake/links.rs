//! Watches links (network interfaces) that come, go and change, through the kernel's messages.
//!
//! A message only says *that* something changed; the current state is asked afresh. A message is
//! about the past: its interface may be gone again when it is read.
//!
//! One thing cannot be asked afterwards: whether an interface was deleted, if another one has its
//! index by now. So a deletion always counts, whatever exists afterwards.

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

use netlink_packet_core::{
    DecodeError, Emitable as _, NetlinkDeserializable, NetlinkHeader, NetlinkMessage, NetlinkPayload, NlasIterator,
    parse_u32,
};
use netlink_packet_route::AddressFamily;
use netlink_packet_route::link::LinkHeader;
use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_ROUTE;
use nix::libc;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// How often the interfaces are listed if the kernel sends no messages.
const LOOK_AGAIN: Duration = Duration::from_secs(2);

/// Longer than any message about a link. The rest of a longer one is lost, and the loss is noticed.
const MESSAGE_MAX: usize = 64 * 1024;

/// At most this many messages make up one set of changes: endless new interfaces must not delay the
/// look.
const MESSAGES_MAX: usize = 4096;

/// Below these MTUs the kernel takes IPv4 and IPv6 off an interface, and the memberships with them.
const MTU_MIN_V4: u32 = 68;
const MTU_MIN_V6: u32 = 1280;

/// What has changed since the last time.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Messages were lost: anything may have happened.
    pub everything: bool,
    /// The indices of interfaces that were deleted, left this network namespace or otherwise lost
    /// their memberships. Another interface may have such an index now.
    pub gone: BTreeSet<u32>,
    /// The indices of interfaces that changed, or that a changed link lies on top of.
    pub touched: BTreeSet<u32>,
}

impl Changes {
    /// Nothing is known to be as it was.
    #[must_use]
    pub fn everything() -> Self {
        Self { everything: true, ..Self::default() }
    }

    /// Whether the interface that had this index is gone.
    #[must_use]
    pub fn ended(&self, index: u32) -> bool {
        self.everything || self.gone.contains(&index)
    }

    /// Whether there is a reason to look at this interface again.
    #[must_use]
    pub fn concern(&self, index: u32) -> bool {
        self.ended(index) || self.touched.contains(&index)
    }
}

/// The kernel's messages about links.
#[derive(Debug)]
pub struct Links(LinkSource);

#[derive(Debug)]
enum LinkSource {
    Kernel {
        socket: AsyncFd<Netlink>,
        mtu_min: u32,
        buffer: Vec<u8>,
    },
    /// Without messages the interfaces are listed regularly. An interface that is replaced by one
    /// with the same index in between goes unnoticed.
    Clock,
}

impl Links {
    /// Listens from now on: [`Links::next`] returns what changes after this call. `group` chooses
    /// the family whose addresses count. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// The kernel gives no such socket; [`Links::by_looking`] works without.
    pub fn open(group: IpAddr) -> io::Result<Self> {
        let (addresses, mtu_min) = match group {
            IpAddr::V4(_) => (libc::RTNLGRP_IPV4_IFADDR, MTU_MIN_V4),
            IpAddr::V6(_) => (libc::RTNLGRP_IPV6_IFADDR, MTU_MIN_V6),
        };
        // A multicast router shares the frames of an interface, in either family.
        let told = [libc::RTNLGRP_LINK, addresses, libc::RTNLGRP_IPV4_NETCONF, libc::RTNLGRP_IPV6_NETCONF];
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.set_non_blocking(true)?;
        socket.bind_auto()?;
        for group in told {
            socket.add_membership(group)?;
        }
        // SAFETY: needed because tokio has no safe way to watch a descriptor of a foreign type.
        // Sound because the socket owns its descriptor, which stays open and the same until the
        // socket is dropped, and the `AsyncFd` owns the socket.
        let socket = unsafe { AsyncFd::register_with_interest(Netlink(socket), Interest::READABLE) }?;
        Ok(Self(LinkSource::Kernel { socket, mtu_min, buffer: Vec::with_capacity(MESSAGE_MAX) }))
    }

    /// Without the kernel's messages: returns at regular intervals.
    #[must_use]
    pub fn by_looking() -> Self {
        Self(LinkSource::Clock)
    }

    /// Waits until something has changed, and returns all changes. Dropping the future loses
    /// nothing.
    pub async fn next(&mut self) -> Changes {
        let LinkSource::Kernel { socket, mtu_min, buffer } = &mut self.0 else {
            tokio::time::sleep(LOOK_AGAIN).await;
            return Changes::default();
        };
        loop {
            let Ok(mut guard) = socket.readable_mut().await else {
                // The runtime is going down.
                return std::future::pending().await;
            };
            let mut changes = Changes::default();
            let mut heard = false;
            for _ in 0..MESSAGES_MAX {
                buffer.clear();
                match guard.get_inner().0.recv_from(buffer, libc::MSG_TRUNC) {
                    Ok((len, sender)) => {
                        heard = true;
                        // Only messages from the kernel itself count.
                        if sender.port_number() == 0 {
                            let whole = len <= buffer.len() && note(buffer, *mtu_min, &mut changes).is_ok();
                            changes.everything |= !whole;
                        }
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        guard.clear_ready();
                        break;
                    }
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    // ENOBUFS: the kernel had more to say than the buffer holds.
                    Err(error) => {
                        tracing::debug!("messages about links were lost: {error}");
                        (heard, changes.everything) = (true, true);
                    }
                }
            }
            if heard {
                return changes;
            }
        }
    }
}

/// Adds what a datagram of the kernel's says.
fn note(mut datagram: &[u8], mtu_min: u32, changes: &mut Changes) -> Result<(), DecodeError> {
    while !datagram.is_empty() {
        let message = NetlinkMessage::<Notice>::deserialize(datagram)?;
        match message.payload {
            NetlinkPayload::InnerMessage(Notice::Link { index, lower, mtu, gone }) => {
                changes.touched.insert(index);
                changes.touched.extend(lower);
                if gone || mtu.is_some_and(|mtu| mtu < mtu_min) {
                    changes.gone.insert(index);
                }
            }
            NetlinkPayload::InnerMessage(Notice::Settings { index }) => {
                changes.touched.insert(index);
            }
            NetlinkPayload::InnerMessage(Notice::Other) | NetlinkPayload::Noop => {}
            // The kernel sends nothing else unasked.
            NetlinkPayload::Done(_) | NetlinkPayload::Error(_) | NetlinkPayload::Overrun(_) | _ => {
                changes.everything = true;
            }
        }
        let len = usize::try_from(message.header.length).map_err(|_| "a length beyond all bounds")?;
        datagram = datagram.get(len.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(())
}

/// As much of a message as counts here.
#[derive(Debug)]
enum Notice {
    Link {
        index: u32,
        lower: Option<u32>,
        mtu: Option<u32>,
        gone: bool,
    },
    /// How an interface forwards.
    Settings {
        index: u32,
    },
    Other,
}

impl NetlinkDeserializable for Notice {
    type Error = DecodeError;

    fn deserialize(header: &NetlinkHeader, payload: &[u8]) -> Result<Self, DecodeError> {
        // From <linux/netconf.h>: one byte for the family, padded; then attributes.
        const NETCONFA_IFINDEX: u16 = 1;
        const NETCONF_HEAD: usize = 4;
        match header.message_type {
            libc::RTM_NEWLINK | libc::RTM_DELLINK => {}
            libc::RTM_NEWNETCONF => {
                for attribute in NlasIterator::new(payload.get(NETCONF_HEAD..).unwrap_or_default()) {
                    let attribute = attribute?;
                    if attribute.kind() == NETCONFA_IFINDEX {
                        return Ok(Self::Settings { index: parse_u32(attribute.value())? });
                    }
                }
                return Ok(Self::Other);
            }
            _ => return Ok(Self::Other),
        }
        let head = LinkHeader::parse(payload)?;
        // A bridge sends the same message when a port leaves it: the interface still exists.
        let gone = header.message_type == libc::RTM_DELLINK && head.interface_family == AddressFamily::Unspec;
        let (mut lower, mut mtu) = (None, None);
        for attribute in NlasIterator::new(payload.get(head.buffer_len()..).unwrap_or_default()) {
            let attribute = attribute?;
            match attribute.kind() {
                libc::IFLA_LINK => lower = Some(parse_u32(attribute.value())?),
                libc::IFLA_MTU => mtu = Some(parse_u32(attribute.value())?),
                _ => {}
            }
        }
        Ok(Self::Link { index: head.index, lower, mtu, gone })
    }
}

/// The socket, with a debug output.
struct Netlink(Socket);

impl AsRawFd for Netlink {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl std::fmt::Debug for Netlink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Netlink").field(&self.as_raw_fd()).finish()
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroI32;

    use netlink_packet_core::ErrorMessage;
    use netlink_packet_route::RouteNetlinkMessage;
    use netlink_packet_route::address::AddressMessage;
    use netlink_packet_route::link::{LinkAttribute, LinkMessage};

    use super::*;

    fn bytes(payload: NetlinkPayload<RouteNetlinkMessage>) -> Vec<u8> {
        let mut message = NetlinkMessage::new(NetlinkHeader::default(), payload);
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        bytes
    }

    fn link(index: u32, attributes: Vec<LinkAttribute>) -> LinkMessage {
        let mut link = LinkMessage::default();
        link.header.index = index;
        link.attributes = attributes;
        link
    }

    fn new(index: u32, attributes: Vec<LinkAttribute>) -> Vec<u8> {
        bytes(NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(link(index, attributes))))
    }

    fn deleted(link: LinkMessage) -> Vec<u8> {
        bytes(NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelLink(link)))
    }

    fn changes(datagram: &[u8]) -> Changes {
        let mut changes = Changes::default();
        note(datagram, MTU_MIN_V4, &mut changes).unwrap();
        changes
    }

    fn set<const N: usize>(numbers: [u32; N]) -> BTreeSet<u32> {
        numbers.into()
    }

    #[test]
    fn a_deletion_counts_even_where_the_number_is_there_again() {
        let name = |name: &str| vec![LinkAttribute::IfName(name.to_owned())];
        let recreated = [new(5, name("virbr0")), deleted(link(5, vec![])), new(5, name("virbr0"))].concat();
        let changes = changes(&recreated);
        assert_eq!((changes.gone.clone(), changes.touched.clone(), changes.everything), (set([5]), set([5]), false));
        assert!(changes.ended(5) && changes.concern(5) && !changes.concern(6));
    }

    #[test]
    fn a_port_that_leaves_its_bridge_is_not_gone() {
        let mut port = link(5, vec![]);
        port.header.interface_family = AddressFamily::Bridge;
        let changes = changes(&deleted(port));
        assert_eq!((changes.gone, changes.touched), (set([]), set([5])));
    }

    #[test]
    fn a_link_on_top_concerns_the_one_below() {
        assert_eq!(changes(&new(9, vec![LinkAttribute::Link(5)])).touched, set([5, 9]));
    }

    #[test]
    fn an_mtu_that_is_too_small_takes_the_memberships() {
        assert_eq!(changes(&new(5, vec![LinkAttribute::Mtu(67)])).gone, set([5]));
        assert_eq!(changes(&new(5, vec![LinkAttribute::Mtu(68)])).gone, set([]));
    }

    #[test]
    fn an_address_is_a_reason_to_look_and_an_error_one_to_look_at_everything() {
        let address = RouteNetlinkMessage::NewAddress(AddressMessage::default());
        assert_eq!(changes(&bytes(NetlinkPayload::InnerMessage(address))), Changes::default());
        let mut error = ErrorMessage::default();
        error.code = NonZeroI32::new(-libc::EPERM);
        assert_eq!(changes(&bytes(NetlinkPayload::Error(error))), Changes::everything());
        assert_eq!(changes(&bytes(NetlinkPayload::Overrun(vec![]))), Changes::everything());
        assert!(Changes::everything().concern(7));
    }

    #[test]
    fn a_truncated_message_is_an_error_and_never_a_panic() {
        let full = [new(5, vec![LinkAttribute::Mtu(1500)]), deleted(link(6, vec![]))].concat();
        for len in 1..full.len() {
            let _ = note(&full[..len], MTU_MIN_V4, &mut Changes::default());
        }
        assert!(note(&full[..full.len() - 1], MTU_MIN_V4, &mut Changes::default()).is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn without_messages_the_interfaces_are_listed_regularly() {
        let mut links = Links::by_looking();
        let before = tokio::time::Instant::now();
        assert_eq!((links.next().await, links.next().await), (Changes::default(), Changes::default()));
        assert_eq!(before.elapsed(), 2 * LOOK_AGAIN);
    }

    #[tokio::test]
    async fn the_kernel_can_be_listened_to() {
        let mut links = Links::open(IpAddr::from([225, 0, 0, 12])).unwrap();
        // Whatever changes on this machine meanwhile, the call does not block and does not fail.
        let _ = tokio::time::timeout(Duration::from_millis(50), links.next()).await;
    }
}
