//! The IP addresses of another network namespace.

use std::collections::BTreeSet;
use std::io;

use netlink_packet_core::{DecodeError, Emitable as _, NetlinkDeserializable, NetlinkHeader, NlasIterator, parse_i32};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{AddressAttribute, AddressHeader, AddressMessage, AddressScope};
use nix::libc;

/// From <linux/if_addr.h>: the attribute of a request for another namespace's addresses, also in
/// the answer.
const IFA_TARGET_NETNSID: u16 = 10;

/// An IP address of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Address {
    link: u32,
    /// Whether it is valid beyond its link.
    global: bool,
    namespace: Option<i32>,
}

/// The indices of the links that have an IP address beyond a link-local one, in another network
/// namespace, by the kernel's ID of it. Needs `CAP_NET_ADMIN` there.
///
/// # Errors
/// The kernel does not answer, forbids it, or is too old to know of such requests.
pub fn links_with_one(namespace: i32) -> io::Result<BTreeSet<u32>> {
    let mut request = AddressMessage::default();
    request.attributes.push(AddressAttribute::TargetNetNsId(namespace));
    let addresses: Vec<Address> = super::dump(&RouteNetlinkMessage::GetAddress(request))?;
    // An old kernel answers with this namespace's addresses.
    if addresses.iter().any(|address| address.namespace != Some(namespace)) {
        return Err(io::ErrorKind::Unsupported.into());
    }
    Ok(addresses.iter().filter(|address| address.global).map(|address| address.link).collect())
}

impl NetlinkDeserializable for Address {
    type Error = DecodeError;

    fn deserialize(header: &NetlinkHeader, payload: &[u8]) -> Result<Self, DecodeError> {
        if header.message_type != libc::RTM_NEWADDR {
            return Err("not the description of an address".into());
        }
        let head = AddressHeader::parse(payload)?;
        let global = matches!(head.scope, AddressScope::Universe | AddressScope::Site);
        let mut address = Self { link: head.index, global, namespace: None };
        for attribute in NlasIterator::new(payload.get(head.buffer_len()..).unwrap_or_default()) {
            let attribute = attribute?;
            if attribute.kind() == IFA_TARGET_NETNSID {
                address.namespace = Some(parse_i32(attribute.value())?);
            }
        }
        Ok(address)
    }
}
