//! A datagram as the kernel hands it over at the request socket.

use std::io::{self, IoSliceMut};
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use fence_common::wire::REQUEST_LEN;
use nix::libc;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg};
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_gettime};

use crate::clock::Moment;

/// A datagram as it was received.
pub(super) struct Datagram {
    /// One byte more than a request has, so that a longer datagram shows.
    pub(super) bytes: [u8; REQUEST_LEN + 1],
    pub(super) len: usize,
    pub(super) source: IpAddr,
    /// The index of the interface that it arrived on; 0 if the kernel does not say.
    pub(super) interface: u32,
    pub(super) arrived: Moment,
}

/// Receives a datagram that is there already.
pub(super) fn receive(socket: &impl AsFd) -> io::Result<Datagram> {
    let mut bytes = [0; REQUEST_LEN + 1];
    let mut control = nix::cmsg_space!(TimeSpec, libc::in_pktinfo, libc::in6_pktinfo);
    let (len, source, stamp, interface) = {
        let mut into = [IoSliceMut::new(&mut bytes)];
        let fd = socket.as_fd().as_raw_fd();
        let message = recvmsg::<SockaddrStorage>(fd, &mut into, Some(&mut control), MsgFlags::MSG_DONTWAIT)?;
        let (mut stamp, mut interface) = (None, 0);
        for control in message.cmsgs()? {
            if let ControlMessageOwned::ScmTimestampns(when) = control {
                stamp = Some(when);
            } else if let ControlMessageOwned::Ipv4PacketInfo(info) = control {
                interface = u32::try_from(info.ipi_ifindex).unwrap_or(0);
            } else if let ControlMessageOwned::Ipv6PacketInfo(info) = control {
                interface = info.ipi6_ifindex;
            }
        }
        (message.bytes, message.address, stamp, interface)
    };
    let v4 = source.and_then(|source| Some(IpAddr::V4(source.as_sockaddr_in()?.ip())));
    let source = v4.or_else(|| Some(IpAddr::V6(source?.as_sockaddr_in6()?.ip())));
    let source = source.ok_or_else(|| io::Error::other("a datagram from no IP address"))?;
    Ok(Datagram { bytes, len, source, interface, arrived: Moment::now().before(age(stamp)) })
}

/// How long ago the kernel stamped a datagram. The kernel stamps wall-clock time. If that clock was
/// set back since, the datagram counts as new.
fn age(stamp: Option<TimeSpec>) -> Duration {
    let now = clock_gettime(ClockId::CLOCK_REALTIME).ok();
    let age = now.zip(stamp).map(|(now, stamp)| now - stamp);
    age.filter(|age| age.tv_sec() >= 0).map_or(Duration::ZERO, Duration::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_was_set_back_makes_nothing_old() {
        let now = clock_gettime(ClockId::CLOCK_REALTIME).unwrap();
        assert_eq!(age(Some(now + TimeSpec::new(3600, 0))), Duration::ZERO);
        assert!(age(Some(now - TimeSpec::new(3600, 0))) >= Duration::from_secs(3600));
        assert_eq!(age(None), Duration::ZERO);
    }
}
