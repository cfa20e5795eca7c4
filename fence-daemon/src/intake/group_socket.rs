//! A UDP socket that is bound to a multicast group: made, bound, taken over, and a member of the
//! group on interfaces.

use std::io;
use std::net::{IpAddr, SocketAddr, SocketAddrV6};
use std::num::NonZeroU32;

use fence_net::interface::Interface;
use nix::libc;
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::{Ipv4PacketInfo, Ipv6RecvPacketInfo, ReceiveTimestampns};
use socket2::{Domain, InterfaceIndexOrAddress, Protocol, SockAddr, Socket, Type};
use tokio::net::UdpSocket;

/// Why the socket cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Somebody else has the port.
    #[error(
        "UDP port {0} is taken for {1}: is fence_virtd, or another fence-daemon, running? (`systemctl disable --now fence_virtd`)"
    )]
    PortTaken(u16, IpAddr),
    /// The administrator's: a link-local group is another group on each link.
    #[error(
        "{0} is another group on each network: name the one that is meant with `interface` in the multicast section"
    )]
    NoInterface(IpAddr),
    /// The kernel refuses the membership.
    #[error("cannot join {group} on {interface}: {error}{}", remedy(*group, error))]
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

/// The remedy for a membership that the kernel refuses.
pub(super) fn remedy(group: IpAddr, error: &io::Error) -> &'static str {
    match (group, error.raw_os_error()) {
        (IpAddr::V4(_), Some(libc::ENOBUFS)) => {
            " (too many memberships: raise them with `sysctl net.ipv4.igmp_max_memberships=100`, or name one `interface`)"
        }
        (IpAddr::V6(_), Some(libc::ENOMEM | libc::ENOBUFS)) => {
            " (too many memberships: raise `sysctl net.core.optmem_max`, or name one `interface`)"
        }
        (IpAddr::V6(_), Some(libc::EINVAL | libc::ENODEV)) => {
            " (is IPv6 switched on there, and the MTU at least 1280?)"
        }
        (IpAddr::V4(_), Some(libc::ENODEV)) => " (is it gone, or its MTU smaller than 68?)",
        _ => "",
    }
}

/// Whether a group has interface-local or link-local scope.
pub(super) fn is_of_the_link(group: IpAddr) -> bool {
    matches!(group, IpAddr::V6(group) if matches!(group.segments()[0] & 0xf, 1 | 2))
}

/// What a socket is bound to besides the group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Binding {
    /// Nothing: it hears wherever it joins the group.
    Free,
    /// To the link that a link-local group belongs to.
    ToTheLink,
    /// To an interface, so that others can hear the same group on theirs.
    ToTheInterface,
}

/// A socket that is bound to the group, and as `binding` says to the interface with this index.
pub(super) fn bound(group: IpAddr, port: u16, index: u32, binding: Binding) -> Result<UdpSocket, SocketError> {
    let address = match group {
        IpAddr::V6(group) => SocketAddrV6::new(group, port, 0, index).into(),
        IpAddr::V4(_) => SocketAddr::new(group, port),
    };
    let kernel = |what| move |error| SocketError::Kernel { what, address, error };
    let domain = Domain::for_address(address);
    let socket = Socket::new(domain, Type::DGRAM, Some(Protocol::UDP)).map_err(kernel("open"))?;
    socket.set_nonblocking(true).map_err(kernel("prepare"))?;
    // A datagram's age counts from its arrival, not from our read.
    setsockopt(&socket, ReceiveTimestampns, &true).map_err(io::Error::from).map_err(kernel("prepare"))?;
    match group {
        IpAddr::V4(_) => socket.set_multicast_all_v4(false),
        IpAddr::V6(_) => socket.set_only_v6(true).and_then(|()| socket.set_multicast_all_v6(false)),
    }
    .map_err(kernel("narrow"))?;
    // The callback leaves by the interface that the datagram came by.
    match group {
        IpAddr::V4(_) => setsockopt(&socket, Ipv4PacketInfo, &true),
        IpAddr::V6(_) => setsockopt(&socket, Ipv6RecvPacketInfo, &true),
    }
    .map_err(io::Error::from)
    .map_err(kernel("prepare"))?;
    if binding == Binding::ToTheInterface {
        bind_to(&socket, group, index).map_err(kernel("bind"))?;
    }
    // No SO_REUSEADDR on purpose: two servers on one port would both answer.
    socket.bind(&SockAddr::from(address)).map_err(|error| {
        if error.kind() == io::ErrorKind::AddrInUse {
            SocketError::PortTaken(port, group)
        } else {
            SocketError::Kernel { what: "bind", address, error }
        }
    })?;
    UdpSocket::from_std(socket.into()).map_err(kernel("watch"))
}

pub(super) fn bind_to(socket: &Socket, group: IpAddr, index: u32) -> io::Result<()> {
    let index = NonZeroU32::new(index);
    match group {
        IpAddr::V4(_) => socket.bind_device_by_index_v4(index),
        IpAddr::V6(_) => socket.bind_device_by_index_v6(index),
    }
}

/// Looks whether another socket of this group can be bound to an interface.
///
/// # Errors
/// It cannot.
pub fn probe(group: IpAddr, port: u16, interface: &Interface) -> Result<(), SocketError> {
    let binding = if is_of_the_link(group) { Binding::ToTheLink } else { Binding::ToTheInterface };
    bound(group, port, interface.index, binding).map(drop)
}

/// An earlier daemon's socket. It is bound and prepared already.
pub(super) fn taken_over(kept: Socket, group: IpAddr, port: u16) -> Result<UdpSocket, SocketError> {
    let failed = |error| SocketError::Kernel { what: "take over", address: SocketAddr::new(group, port), error };
    kept.set_nonblocking(true).map_err(failed)?;
    kept.set_cloexec(true).map_err(failed)?;
    UdpSocket::from_std(kept.into()).map_err(failed)
}

pub(super) fn join(socket: &Socket, group: IpAddr, index: u32) -> io::Result<()> {
    match group {
        IpAddr::V4(group) => socket.join_multicast_v4_n(&group, &InterfaceIndexOrAddress::Index(index)),
        IpAddr::V6(group) => socket.join_multicast_v6(&group, index),
    }
}

/// Joins where an earlier daemon may have joined already. That may have been on an interface which
/// had this number.
pub(super) fn join_again(socket: &Socket, group: IpAddr, index: u32) -> io::Result<()> {
    match join(socket, group, index) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            leave(socket, group, index).and_then(|()| join(socket, group, index))
        }
        result => result,
    }
}

pub(super) fn leave(socket: &Socket, group: IpAddr, index: u32) -> io::Result<()> {
    match group {
        IpAddr::V4(group) => socket.leave_multicast_v4_n(&group, &InterfaceIndexOrAddress::Index(index)),
        IpAddr::V6(group) => socket.leave_multicast_v6(&group, index),
    }
}
