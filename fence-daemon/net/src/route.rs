//! The kernel's routing decision for an IP address. Nothing is sent.

use std::io;
use std::net::IpAddr;

use netlink_packet_core::{
    DecodeError, Emitable as _, NLM_F_ACK, NLM_F_REQUEST, NetlinkDeserializable, NetlinkHeader, NlasIterator, parse_u32,
};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteType};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use nix::libc;

/// A routing decision.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Route {
    /// The kind of route: unicast, local and so on.
    kind: RouteType,
    /// The index of the link that packets leave by, if any.
    link: Option<u32>,
}

/// Whether an IP address belongs to this host.
///
/// # Errors
/// The kernel does not answer.
pub fn is_local(ip: IpAddr) -> io::Result<bool> {
    match decision(ip, None) {
        Ok(route) => Ok(route.kind == RouteType::Local),
        Err(error) if is_unreachable(&error) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Whether a route leads to an IP address of another host over the link with this index. A link
/// that is gone leads nowhere.
///
/// # Errors
/// The kernel does not answer.
pub fn leads_over(ip: IpAddr, link: u32) -> io::Result<bool> {
    match decision(ip, Some(link)) {
        Ok(route) => Ok(route.kind == RouteType::Unicast && route.link.is_none_or(|found| found == link)),
        Err(error) if is_unreachable(&error) => Ok(false),
        Err(error) => Err(error),
    }
}

fn is_unreachable(error: &io::Error) -> bool {
    let unreachable = [libc::ENETUNREACH, libc::EHOSTUNREACH, libc::ENODEV, libc::EACCES, libc::EINVAL, libc::EAGAIN];
    error.raw_os_error().is_some_and(|code| unreachable.contains(&code))
}

fn decision(ip: IpAddr, link: Option<u32>) -> io::Result<Route> {
    let mut request = RouteMessage::default();
    request.header.destination_prefix_length = if ip.is_ipv4() { 32 } else { 128 };
    request.header.address_family = if ip.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    request.attributes.push(RouteAttribute::Destination(match ip {
        IpAddr::V4(ip) => RouteAddress::Inet(ip),
        IpAddr::V6(ip) => RouteAddress::Inet6(ip),
    }));
    if let Some(link) = link {
        request.attributes.push(RouteAttribute::Oif(link));
        if ip.is_ipv4() {
            // Otherwise IPv4 takes every address for a neighbour on a link without a route to it.
            request.header.flags |= RouteFlags::FibMatch;
        }
    }
    let answer = super::ask(NLM_F_REQUEST | NLM_F_ACK, RouteNetlinkMessage::GetRoute(request))?.pop();
    answer.ok_or_else(|| io::ErrorKind::NotFound.into())
}

impl NetlinkDeserializable for Route {
    type Error = DecodeError;

    fn deserialize(header: &NetlinkHeader, payload: &[u8]) -> Result<Self, DecodeError> {
        if header.message_type != libc::RTM_NEWROUTE {
            return Err("not the description of a route".into());
        }
        let head = RouteHeader::parse(payload)?;
        let mut route = Self { kind: head.kind, link: None };
        for attribute in NlasIterator::new(payload.get(head.buffer_len()..).unwrap_or_default()) {
            let attribute = attribute?;
            if attribute.kind() == libc::RTA_OIF {
                route.link = Some(parse_u32(attribute.value())?);
            }
        }
        Ok(route)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_knows_its_own_addresses() {
        for ip in ["127.0.0.1", "127.255.255.1", "::1"] {
            assert!(is_local(ip.parse().unwrap()).unwrap(), "{ip}");
        }
        for ip in ["192.0.2.1", "2001:db8::1"] {
            assert!(!is_local(ip.parse().unwrap()).unwrap(), "{ip}");
        }
    }

    #[test]
    fn a_link_without_route_or_gone_leads_nowhere() {
        for ip in ["192.0.2.1", "2001:db8::1", "fe80::1"] {
            for link in [1, i32::MAX.unsigned_abs()] {
                assert!(!leads_over(ip.parse().unwrap(), link).unwrap(), "{ip} over {link}");
            }
        }
        // The host's own addresses belong to no other host.
        assert!(!leads_over("127.0.0.1".parse().unwrap(), 1).unwrap());
    }
}
