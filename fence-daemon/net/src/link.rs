//! The links (network interfaces) of this network namespace.

use std::ffi::CStr;
use std::io;

use netlink_packet_core::{
    DecodeError, DefaultNla, Emitable as _, NLM_F_ACK, NLM_F_REQUEST, NetlinkDeserializable, NetlinkHeader,
    NlasIterator, Parseable as _, parse_i32, parse_u8, parse_u32,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{
    InfoKind, LinkAttribute, LinkExtentMask, LinkFlags, LinkHeader, LinkMessage, LinkXdp,
};
use nix::libc;

/// From <linux/if_link.h>: the attribute of a request for another namespace's links, also in the
/// answer.
const IFLA_TARGET_NETNSID: u16 = 46;
/// From the same file: the attributes of a link of kind "tun".
const IFLA_TUN_TYPE: u16 = 3;
const IFLA_TUN_VNET_HDR: u16 = 5;

/// A link of this network namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Link {
    /// The kernel's index of it.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Whether it is up.
    pub up: bool,
    /// Its kind. The kernel names none for hardware.
    pub kind: Option<InfoKind>,
    /// The index of the link below it, or of a veth's other end, if that link is in this namespace.
    pub lower: Option<u32>,
    /// The same link, if it is in another namespace.
    pub elsewhere: Option<Elsewhere>,
    /// The index of the bridge or bond that it is a port of.
    pub master: Option<u32>,
    /// The ID of an XDP program on it.
    pub xdp_program: Option<u32>,
    /// Whether it is a bridge that keeps VLANs apart.
    pub vlan_filtering: bool,
    /// What only a tap has.
    pub tap: Option<Tap>,
    /// The ID of its network namespace, if the request named one.
    pub namespace: Option<i32>,
}

/// A link in another network namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Elsewhere {
    /// The kernel's ID of the namespace; negative if it has none.
    pub namespace: i32,
    /// The kernel's index of the link there.
    pub index: u32,
}

/// A tap: its frames come from the process that holds it open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tap {
    /// Whether a process holds it open.
    pub held: bool,
    /// Whether its frames have a header for offloads, which hypervisors ask for and VPNs do not.
    pub offloads: bool,
}

/// The link with this index.
///
/// # Errors
/// There is none, or the kernel does not answer.
pub fn one(index: u32) -> io::Result<Link> {
    // The acknowledgement marks the end of the answer.
    super::ask(NLM_F_REQUEST | NLM_F_ACK, request(index, None))?.pop().ok_or_else(|| io::ErrorKind::NotFound.into())
}

/// All links, in the kernel's order.
///
/// # Errors
/// The kernel does not answer.
pub fn all() -> io::Result<Vec<Link>> {
    super::dump(&request(0, None))
}

/// All links of another network namespace, by the kernel's ID of it. Needs `CAP_NET_ADMIN` there.
///
/// # Errors
/// The kernel does not answer, forbids it, or is too old to know of such requests.
pub fn all_in(namespace: i32) -> io::Result<Vec<Link>> {
    let links: Vec<Link> = super::dump(&request(0, Some(namespace)))?;
    // An old kernel answers with this namespace's links.
    if links.iter().any(|link| link.namespace != Some(namespace)) {
        return Err(io::ErrorKind::Unsupported.into());
    }
    Ok(links)
}

fn request(index: u32, namespace: Option<i32>) -> RouteNetlinkMessage {
    let mut link = LinkMessage::default();
    link.header.index = index;
    link.attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
    let target = |id: i32| LinkAttribute::Other(DefaultNla::new(IFLA_TARGET_NETNSID, id.to_ne_bytes().to_vec()));
    link.attributes.extend(namespace.map(target));
    RouteNetlinkMessage::GetLink(link)
}

impl NetlinkDeserializable for Link {
    type Error = DecodeError;

    fn deserialize(header: &NetlinkHeader, payload: &[u8]) -> Result<Self, DecodeError> {
        if header.message_type != libc::RTM_NEWLINK {
            return Err("not the description of a link".into());
        }
        let head = LinkHeader::parse(payload)?;
        let mut link = Self { index: head.index, up: head.flags.contains(LinkFlags::Up), ..Self::default() };
        let (mut lower_is_in, mut carrier) = (None, false);
        for attribute in NlasIterator::new(payload.get(head.buffer_len()..).unwrap_or_default()) {
            let attribute = attribute?;
            let value = attribute.value();
            match attribute.kind() {
                libc::IFLA_IFNAME => {
                    let name = CStr::from_bytes_until_nul(value).map_err(|_| "a name without NUL")?;
                    link.name = name.to_string_lossy().into_owned();
                }
                libc::IFLA_LINK => link.lower = Some(parse_u32(value)?),
                libc::IFLA_LINK_NETNSID => lower_is_in = Some(parse_i32(value)?),
                libc::IFLA_CARRIER => carrier = parse_u8(value)? != 0,
                IFLA_TARGET_NETNSID => link.namespace = Some(parse_i32(value)?),
                libc::IFLA_MASTER => link.master = Some(parse_u32(value)?),
                libc::IFLA_LINKINFO => {
                    for info in NlasIterator::new(value) {
                        let info = info?;
                        match info.kind() {
                            libc::IFLA_INFO_KIND => link.kind = Some(InfoKind::parse(&info)?),
                            // The kernel sends the kind first.
                            libc::IFLA_INFO_DATA if link.kind == Some(InfoKind::Tun) => link.tap = tap(info.value())?,
                            libc::IFLA_INFO_DATA if link.kind == Some(InfoKind::Bridge) => {
                                link.vlan_filtering = filters_vlans(info.value())?;
                            }
                            _ => {}
                        }
                    }
                }
                libc::IFLA_XDP => {
                    for xdp in NlasIterator::new(value) {
                        // `ProgId` stands for a single program, the others stand for one of
                        // several.
                        if let LinkXdp::ProgId(id)
                        | LinkXdp::DrvProgId(id)
                        | LinkXdp::SkbProgId(id)
                        | LinkXdp::HwProgId(id) = LinkXdp::parse(&xdp?)?
                        {
                            link.xdp_program.get_or_insert(id);
                        }
                    }
                }
                _ => {}
            }
        }
        if let Some(namespace) = lower_is_in {
            // The index belongs to another namespace and means another link here.
            link.elsewhere = link.lower.take().map(|index| Elsewhere { namespace, index });
        }
        if let Some(tap) = &mut link.tap {
            // Its carrier comes and goes with the process.
            tap.held = carrier;
        }
        Ok(link)
    }
}

/// Reads what a link of kind "tun" has. `None` for one without Ethernet.
fn tap(attributes: &[u8]) -> Result<Option<Tap>, DecodeError> {
    let (mut is_tap, mut tap) = (false, Tap { held: true, offloads: false });
    for attribute in NlasIterator::new(attributes) {
        let attribute = attribute?;
        let value = attribute.value();
        match attribute.kind() {
            IFLA_TUN_TYPE => is_tap = i32::from(parse_u8(value)?) == libc::IFF_TAP,
            IFLA_TUN_VNET_HDR => tap.offloads = parse_u8(value)? != 0,
            _ => {}
        }
    }
    Ok(is_tap.then_some(tap))
}

/// Whether these attributes of a bridge say that it keeps VLANs apart.
fn filters_vlans(data: &[u8]) -> Result<bool, DecodeError> {
    // From <linux/if_link.h>.
    const IFLA_BR_VLAN_FILTERING: u16 = 7;
    for attribute in NlasIterator::new(data) {
        let attribute = attribute?;
        if attribute.kind() == IFLA_BR_VLAN_FILTERING {
            return Ok(parse_u8(attribute.value())? != 0);
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroI32;

    use netlink_packet_core::{
        DefaultNla, DoneMessage, ErrorMessage, NLM_F_DUMP_INTR, NLM_F_MULTIPART, NetlinkMessage, NetlinkPayload,
    };
    use netlink_packet_route::link::{InfoBridge, InfoData, InfoTun, LinkInfo, XdpAttached};

    use super::super::collect;
    use super::*;

    fn bytes(payload: NetlinkPayload<RouteNetlinkMessage>, flags: u16) -> Vec<u8> {
        let mut header = NetlinkHeader::default();
        header.flags = flags;
        let mut message = NetlinkMessage::new(header, payload);
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        bytes
    }

    fn message(index: u32, attributes: Vec<LinkAttribute>) -> Vec<u8> {
        let mut link = LinkMessage::default();
        link.header.index = index;
        link.attributes = attributes;
        bytes(NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(link)), NLM_F_MULTIPART)
    }

    fn links(datagram: &[u8]) -> io::Result<Vec<Link>> {
        let mut links = Vec::new();
        collect(datagram, &mut links)?;
        Ok(links)
    }

    fn decoded(attributes: Vec<LinkAttribute>) -> Link {
        links(&message(4, attributes)).unwrap().pop().unwrap()
    }

    #[test]
    fn a_link_is_read_from_among_other_attributes() {
        use LinkAttribute::{Controller, IfName, Link as Lower, LinkInfo as Info, Mtu, Xdp};
        let attributes = vec![
            IfName("top0".to_owned()),
            Mtu(1500),
            Lower(7),
            Controller(8),
            Info(vec![LinkInfo::Kind(InfoKind::Vlan), LinkInfo::Other(DefaultNla::new(99, vec![1]))]),
            Xdp(vec![LinkXdp::Attached(XdpAttached::Driver), LinkXdp::ProgId(77)]),
        ];
        let link = Link {
            index: 4,
            name: "top0".to_owned(),
            up: false,
            kind: Some(InfoKind::Vlan),
            lower: Some(7),
            master: Some(8),
            xdp_program: Some(77),
            ..Link::default()
        };
        assert_eq!(decoded(attributes.clone()), link);
        // A message that is cut anywhere is an error, never a panic, and never a link with fewer
        // attributes.
        let full = message(4, attributes);
        for len in 1..full.len() {
            let mut cut = full[..len].to_vec();
            assert!(links(&cut).is_err(), "{len}");
            if let Some(field) = cut.get_mut(..4) {
                field.copy_from_slice(&u32::try_from(len).unwrap().to_ne_bytes());
                let _ = links(&cut);
            }
        }
    }

    #[test]
    fn a_bridge_says_whether_it_keeps_vlans_apart() {
        let filters = |kind, filters| {
            let data = InfoData::Bridge(vec![InfoBridge::AgeingTime(30_000), InfoBridge::VlanFiltering(filters)]);
            decoded(vec![LinkAttribute::LinkInfo(vec![LinkInfo::Kind(kind), LinkInfo::Data(data)])]).vlan_filtering
        };
        assert!(filters(InfoKind::Bridge, true) && !filters(InfoKind::Bridge, false));
        // The same number means something else elsewhere.
        assert!(!filters(InfoKind::Vxlan, true));
    }

    #[test]
    fn a_lower_link_in_another_namespace_is_none_of_ours() {
        let link = |more: Vec<LinkAttribute>| decoded([vec![LinkAttribute::Link(7)], more].concat());
        let (here, there) = (link(vec![]), link(vec![LinkAttribute::LinkNetNsId(3)]));
        assert_eq!((here.lower, here.elsewhere), (Some(7), None));
        assert_eq!((there.lower, there.elsewhere), (None, Some(Elsewhere { namespace: 3, index: 7 })));
    }

    #[test]
    fn a_tap_says_whether_it_is_held_and_has_offloads() {
        let of = |carrier, kind: i32, offloads| {
            let byte = |attribute, value| InfoTun::Other(DefaultNla::new(attribute, vec![value]));
            let about = vec![byte(IFLA_TUN_TYPE, u8::try_from(kind).unwrap()), byte(IFLA_TUN_VNET_HDR, offloads)];
            let info = vec![LinkInfo::Kind(InfoKind::Tun), LinkInfo::Data(InfoData::Tun(about))];
            decoded(vec![LinkAttribute::LinkInfo(info), LinkAttribute::Carrier(carrier)]).tap
        };
        assert_eq!(of(1, libc::IFF_TAP, 1), Some(Tap { held: true, offloads: true }));
        assert_eq!(of(0, libc::IFF_TAP, 0), Some(Tap { held: false, offloads: false }));
        assert_eq!(of(1, libc::IFF_TUN, 1), None);
    }

    #[test]
    fn one_of_several_programs_is_as_good_as_another() {
        let program = |xdp| decoded(vec![LinkAttribute::Xdp(xdp)]).xdp_program;
        let several = vec![LinkXdp::Attached(XdpAttached::Multiple), LinkXdp::SkbProgId(5), LinkXdp::HwProgId(6)];
        assert_eq!(program(several), Some(5));
        assert_eq!(program(vec![LinkXdp::Attached(XdpAttached::None)]), None);
    }

    #[test]
    fn unused_attributes_cannot_fail() {
        let odd = vec![
            LinkAttribute::Other(DefaultNla::new(libc::IFLA_IFNAME, b"\xff0\0".to_vec())),
            LinkAttribute::Other(DefaultNla::new(libc::IFLA_MTU, vec![1])),
        ];
        assert!(NetlinkMessage::<RouteNetlinkMessage>::deserialize(&message(4, odd.clone())).is_err());
        assert_eq!(decoded(odd).name, "\u{fffd}0");
    }

    #[test]
    fn a_datagram_holds_several_messages_and_perhaps_the_end() {
        let name = |name: &str| vec![LinkAttribute::IfName(name.to_owned())];
        let run = [message(1, name("lo")), message(2, name("eth0"))].concat();
        let mut links: Vec<Link> = Vec::new();
        assert!(!collect(&run, &mut links).unwrap(), "there is more to come");
        let done = bytes(NetlinkPayload::Done(DoneMessage::default()), NLM_F_MULTIPART);
        assert!(collect(&[message(3, vec![]), done, message(9, vec![])].concat(), &mut links).unwrap());
        assert_eq!(links.iter().map(|link| link.index).collect::<Vec<_>>(), [1, 2, 3]);
    }

    #[test]
    fn an_error_of_the_kernel_is_an_error() {
        let refusal = |code| {
            let mut message = ErrorMessage::default();
            message.code = NonZeroI32::new(code);
            bytes(NetlinkPayload::Error(message), 0)
        };
        let late = [message(1, vec![]), refusal(-libc::EPERM)].concat();
        assert_eq!(links(&late).unwrap_err().raw_os_error(), Some(libc::EPERM));
        assert_eq!(links(&refusal(0)).unwrap(), [], "an acknowledgement");
        let mut done = DoneMessage::default();
        done.code = -libc::ENOMEM;
        let done = bytes(NetlinkPayload::Done(done), NLM_F_MULTIPART);
        assert_eq!(links(&done).unwrap_err().raw_os_error(), Some(libc::ENOMEM));
        assert!(links(&bytes(NetlinkPayload::Overrun(vec![]), 0)).is_err());
        // Incomplete, and something that nobody asked for.
        let interrupted = bytes(NetlinkPayload::Done(DoneMessage::default()), NLM_F_MULTIPART | NLM_F_DUMP_INTR);
        assert_eq!(links(&interrupted).unwrap_err().kind(), io::ErrorKind::Interrupted);
        let other = bytes(NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelLink(LinkMessage::default())), 0);
        assert_eq!(links(&other).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }

    #[test]
    fn the_kernel_is_asked() {
        let lo = one(1).unwrap();
        assert_eq!((lo.index, lo.name.as_str(), lo.xdp_program), (1, "lo", None));
        assert!(all().unwrap().contains(&lo));
        let vanished = one(i32::MAX.unsigned_abs()).unwrap_err();
        assert_eq!(vanished.raw_os_error(), Some(libc::ENODEV));
    }
}
