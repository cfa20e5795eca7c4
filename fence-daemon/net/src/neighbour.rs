//! The neighbour tables (ARP and IPv6): which hardware address an IP address of a local segment
//! has.

use std::io;
use std::net::{IpAddr, SocketAddr};

use netlink_packet_core::{DecodeError, Emitable as _, NetlinkDeserializable, NetlinkHeader, NlasIterator};
use netlink_packet_route::neighbour::{NeighbourHeader, NeighbourMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use nix::libc;

/// An Ethernet address.
pub type Mac = [u8; 6];

/// An entry of a neighbour table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Neighbour {
    /// The index of its link.
    link: u32,
    ip: Option<IpAddr>,
    /// Its hardware address. `None` while the kernel looks for it, or if it found none.
    mac: Option<Mac>,
}

/// The Ethernet addresses of an IP address on the link with this index, or on any link if it is 0.
/// Usually there is one; none if the address is on no local segment; several if it is on several.
///
/// # Errors
/// The kernel does not answer.
pub fn macs_of(address: SocketAddr, link: u32) -> io::Result<Vec<Mac>> {
    let ip = address.ip().to_canonical();
    let mut request = NeighbourMessage::default();
    request.header.family = if ip.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let all: Vec<Neighbour> = super::dump(&RouteNetlinkMessage::GetNeighbour(request))?;
    let link = match address {
        SocketAddr::V6(address) if address.scope_id() != 0 => Some(address.scope_id()),
        SocketAddr::V4(_) | SocketAddr::V6(_) => Some(link).filter(|link| *link != 0),
    };
    let is_it = |found: &Neighbour| found.ip == Some(ip) && link.is_none_or(|link| link == found.link);
    Ok(all.iter().filter(|found| is_it(found)).filter_map(|found| found.mac).collect())
}

impl NetlinkDeserializable for Neighbour {
    type Error = DecodeError;

    fn deserialize(header: &NetlinkHeader, payload: &[u8]) -> Result<Self, DecodeError> {
        if header.message_type != libc::RTM_NEWNEIGH {
            return Err("not the description of a neighbour".into());
        }
        let head = NeighbourHeader::parse(payload)?;
        let mut found = Self { link: head.ifindex, ..Self::default() };
        for attribute in NlasIterator::new(payload.get(head.buffer_len()..).unwrap_or_default()) {
            let attribute = attribute?;
            let value = attribute.value();
            match attribute.kind() {
                libc::NDA_DST => {
                    let v4 = || <[u8; 4]>::try_from(value).map(IpAddr::from);
                    found.ip = v4().or_else(|_| <[u8; 16]>::try_from(value).map(IpAddr::from)).ok();
                }
                // Other kinds of networks have longer addresses.
                libc::NDA_LLADDR => found.mac = value.try_into().ok(),
                _ => {}
            }
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddrV6;

    use netlink_packet_core::{DefaultNla, NetlinkMessage, NetlinkPayload};
    use netlink_packet_route::neighbour::{NeighbourAddress, NeighbourAttribute};

    use super::*;

    fn bytes(attributes: Vec<NeighbourAttribute>) -> Vec<u8> {
        let mut neighbour = NeighbourMessage::default();
        neighbour.header.ifindex = 4;
        neighbour.attributes = attributes;
        let payload = NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewNeighbour(neighbour));
        let mut message = NetlinkMessage::new(NetlinkHeader::default(), payload);
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        bytes
    }

    fn decoded(attributes: Vec<NeighbourAttribute>) -> Neighbour {
        let mut found = Vec::new();
        super::super::collect(&bytes(attributes), &mut found).unwrap();
        found.pop().unwrap()
    }

    #[test]
    fn a_neighbour_is_read_from_among_other_attributes() {
        use NeighbourAttribute::{Destination, LinkLayerAddress, Other};
        let (mac, v4, v6) = ([2, 0, 0, 0, 0, 1], "192.0.2.1", "2001:db8::1");
        let read = |ip: &str| {
            let destination = match ip.parse().unwrap() {
                IpAddr::V4(ip) => NeighbourAddress::Inet(ip),
                IpAddr::V6(ip) => NeighbourAddress::Inet6(ip),
            };
            let odd = Other(DefaultNla::new(libc::NDA_CACHEINFO, vec![1]));
            decoded(vec![odd, Destination(destination), LinkLayerAddress(mac.to_vec())])
        };
        for ip in [v4, v6] {
            assert_eq!(read(ip), Neighbour { link: 4, ip: ip.parse().ok(), mac: Some(mac) });
        }
        let looked_for = decoded(vec![Destination(NeighbourAddress::Inet([192, 0, 2, 1].into()))]);
        assert_eq!(looked_for.mac, None);
        let infiniband = decoded(vec![LinkLayerAddress(vec![1; 20])]);
        assert_eq!(infiniband.mac, None);
        // A message that is cut anywhere is an error, and never a panic.
        let full = bytes(vec![LinkLayerAddress(mac.to_vec())]);
        for len in 1..full.len() {
            assert!(super::super::collect::<Neighbour>(&full[..len], &mut Vec::new()).is_err(), "{len}");
        }
    }

    #[test]
    fn the_kernel_is_asked() {
        let nowhere = SocketAddrV6::new("fe80::1".parse().unwrap(), 1229, 0, i32::MAX.unsigned_abs());
        for nobody in ["203.0.113.77:1229".parse().unwrap(), "[2001:db8::77]:1229".parse().unwrap(), nowhere.into()] {
            assert_eq!(macs_of(nobody, 0).unwrap(), Vec::<Mac>::new());
        }
    }
}
