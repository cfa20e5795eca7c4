//! Finds where a bridge leads beyond the guests of this host. A multicast request goes there too,
//! to hypervisors that this host does not know of.
//!
//! Only what is known to be a guest's is harmless. Every other port and device leads out.

use std::cell::OnceCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;

use netlink_packet_route::link::InfoKind;

use crate::address;
use crate::link::{self, Elsewhere, Link, Tap};

/// What leads beyond the guests of this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WayOut {
    /// The name of the link that leads out.
    pub link: String,
    /// Why it counts as such.
    pub why: String,
    /// Whether it may end without a message to this network namespace.
    pub unwatched: bool,
}

impl WayOut {
    fn new(link: &Link, why: impl Into<String>) -> Self {
        Self { link: link.name.clone(), why: why.into(), unwatched: false }
    }
}

impl fmt::Display for WayOut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.link, self.why)
    }
}

/// The ways out of the bridge with this index. Nobody but guests of this host is on it if there are
/// none.
///
/// # Errors
/// There is no such link, or the kernel does not answer.
pub fn of(index: u32) -> io::Result<Vec<WayOut>> {
    let links = Links::new(link::all()?);
    let bridge = links.by_index.get(&index).ok_or(io::ErrorKind::NotFound)?;
    let mut ways = among(&links, bridge, Namespace::ask);
    if routes_multicast(&bridge.name) {
        ways.push(WayOut::new(bridge, "this host routes multicast from it"));
    }
    Ok(ways)
}

/// Whether this host routes multicast from the interface of this name to other networks.
#[must_use]
pub fn routes_multicast(interface: &str) -> bool {
    ["ipv4", "ipv6"].iter().any(|version| {
        let file = format!("/proc/sys/net/{version}/conf/{interface}/mc_forwarding");
        std::fs::read_to_string(file).is_ok_and(|text| text.trim() != "0")
    })
}

/// The links of a network namespace.
struct Links {
    by_index: BTreeMap<u32, Link>,
    /// By the index of a link, one that is on top of it.
    on_top: BTreeMap<u32, u32>,
}

impl Links {
    fn new(links: Vec<Link>) -> Self {
        let on_top = links.iter().filter_map(|link| Some((link.lower?, link.index))).collect();
        Self { by_index: links.into_iter().map(|link| (link.index, link)).collect(), on_top }
    }

    fn name(&self, index: u32) -> String {
        self.by_index.get(&index).map_or_else(|| format!("interface {index}"), |link| link.name.clone())
    }

    /// Which device, if any, gets the frames of a link besides the IP stack and the bridge that it
    /// may be a port of.
    fn shared(&self, link: &Link, bridge: Option<u32>) -> Option<String> {
        // A VRF only chooses routes.
        let is_vrf = |index| self.by_index.get(&index).is_some_and(|link| link.kind == Some(InfoKind::Vrf));
        match (link.master, self.on_top.get(&link.index)) {
            (Some(master), _) if bridge != Some(master) && !is_vrf(master) => {
                Some(format!("a port of {}", self.name(master)))
            }
            (_, Some(upper)) => Some(format!("{} is on top of it", self.name(*upper))),
            (_, None) => None,
        }
    }
}

/// Another network namespace, with the other ends of veths.
struct Namespace {
    links: Links,
    /// The indices of links with an IP address.
    addressed: BTreeSet<u32>,
}

impl Namespace {
    fn ask(id: i32) -> io::Result<Self> {
        Ok(Self { links: Links::new(link::all_in(id)?), addressed: address::links_with_one(id)? })
    }
}

fn among(links: &Links, bridge: &Link, ask: impl Fn(i32) -> io::Result<Namespace>) -> Vec<WayOut> {
    if bridge.kind != Some(InfoKind::Bridge) {
        return vec![WayOut::new(bridge, "it is no bridge")];
    }
    let mut namespaces = BTreeMap::new();
    let mut leads_out = |port: &Link| match (&port.kind, port.tap, port.elsewhere) {
        (Some(InfoKind::Tun), Some(tap), _) => (!is_guests(tap, &port.name)).then(|| "a tap of no guest".to_owned()),
        (Some(InfoKind::Veth), _, Some(there)) => {
            let asked: &OnceCell<_> = namespaces.entry(there.namespace).or_default();
            beyond(asked.get_or_init(|| ask(there.namespace).ok()).as_ref(), there)
        }
        (Some(kind), ..) => Some(format!("a {kind}")),
        (None, ..) => Some("hardware".to_owned()),
    };
    let mut ways: Vec<_> = links.shared(bridge, None).map(|why| WayOut::new(bridge, why)).into_iter().collect();
    for port in links.by_index.values().filter(|link| link.master == Some(bridge.index)) {
        if let Some(why) = leads_out(port).or_else(|| links.shared(port, Some(bridge.index))) {
            ways.push(WayOut { unwatched: port.elsewhere.is_some(), ..WayOut::new(port, why) });
        }
    }
    ways
}

/// Whether a tap is a guest's. VPNs have taps too, and put them into bridges.
fn is_guests(tap: Tap, name: &str) -> bool {
    // libvirt reserves such names, and a machine with an emulated card has no offloads.
    let is_libvirts = name.strip_prefix("vnet").is_some_and(|number| number.parse::<u32>().is_ok());
    !tap.held || tap.offloads || is_libvirts
}

/// Why the other end of a veth may lead on. It ends there if a namespace's own IP stack has it.
fn beyond(namespace: Option<&Namespace>, there: Elsewhere) -> Option<String> {
    let known = namespace.and_then(|namespace| Some((namespace, namespace.links.by_index.get(&there.index)?)));
    let Some((namespace, end)) = known else { return Some("its other end cannot be seen".to_owned()) };
    if let Some(why) = namespace.links.shared(end, None) {
        return Some(format!("its other end: {why}"));
    }
    (!namespace.addressed.contains(&end.index)).then(|| "its other end has no address".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const BRIDGE: u32 = 1;
    const PORT: u32 = 5;

    fn link(index: u32, name: &str, kind: Option<InfoKind>) -> Link {
        Link { index, name: name.to_owned(), kind, ..Link::default() }
    }

    fn bridge() -> Link {
        link(BRIDGE, "virbr0", Some(InfoKind::Bridge))
    }

    fn port(kind: Option<InfoKind>) -> Link {
        Link { master: Some(BRIDGE), ..link(PORT, "port", kind) }
    }

    fn unseen(_: i32) -> io::Result<Namespace> {
        Err(io::ErrorKind::PermissionDenied.into())
    }

    /// The reason why a bridge with these other links leads out.
    fn of(others: impl IntoIterator<Item = Link>) -> Option<String> {
        said(&[bridge()].into_iter().chain(others).collect::<Vec<_>>(), unseen)
    }

    fn said(links: &[Link], ask: impl Fn(i32) -> io::Result<Namespace>) -> Option<String> {
        among(&Links::new(links.to_vec()), &links[0], ask).first().map(ToString::to_string)
    }

    #[test]
    fn only_what_is_known_to_be_harmless_leads_nowhere() {
        assert_eq!(of([]), None);
        assert_eq!(of([link(9, "eth0", None)]), None, "it is no port");
        let other = |name: &str| Some(InfoKind::Other(name.to_owned()));
        for (kind, why) in [
            (None, "hardware"),
            (Some(InfoKind::Vxlan), "a vxlan"),
            (Some(InfoKind::Vlan), "a vlan"),
            (Some(InfoKind::Bond), "a bond"),
            (Some(InfoKind::Team), "a team"),
            (Some(InfoKind::Dummy), "a dummy"),
            (Some(InfoKind::GreTap), "a gretap"),
            (Some(InfoKind::MacVtap), "a macvtap"),
            (other("new"), "a new"),
            // Both ends in this namespace, or a tap without what the kernel says of taps.
            (Some(InfoKind::Veth), "a veth"),
            (Some(InfoKind::Tun), "a tun"),
        ] {
            assert_eq!(of([port(kind)]), Some(format!("port ({why})")));
        }
        let lone = link(BRIDGE, "eth0", None);
        assert_eq!(said(&[lone], unseen).as_deref(), Some("eth0 (it is no bridge)"));
    }

    #[test]
    fn a_bridge_that_others_share_leads_out() {
        let upper = |lower, kind| Link { lower: Some(lower), ..link(9, "upper0", Some(kind)) };
        for kind in [InfoKind::Vlan, InfoKind::MacVlan, InfoKind::MacVtap, InfoKind::IpVlan, InfoKind::Vxlan] {
            assert_eq!(of([upper(BRIDGE, kind)]).as_deref(), Some("virbr0 (upper0 is on top of it)"));
        }
        assert_eq!(of([upper(77, InfoKind::Vlan)]), None);
        let above = |kind| {
            let bridge = Link { master: Some(8), ..bridge() };
            said(&[bridge, link(8, "above0", Some(kind))], unseen)
        };
        assert_eq!(above(InfoKind::Bond).as_deref(), Some("virbr0 (a port of above0)"));
        assert_eq!(above(InfoKind::Vrf), None);
        let tap = Link { tap: Some(Tap { held: true, offloads: true }), ..port(Some(InfoKind::Tun)) };
        assert_eq!(of([tap.clone()]), None);
        assert_eq!(of([tap, upper(PORT, InfoKind::Vlan)]).as_deref(), Some("port (upper0 is on top of it)"));
    }

    #[test]
    fn a_vpns_tap_leads_out_and_a_guests_does_not() {
        let leads_out = |name: &str, held, offloads| {
            let tap = Link { name: name.to_owned(), tap: Some(Tap { held, offloads }), ..port(Some(InfoKind::Tun)) };
            of([tap]).is_some()
        };
        assert!(leads_out("tap0", true, false) && leads_out("vnet", true, false) && leads_out("vnetx1", true, false));
        assert!(!leads_out("tap0", true, true) && !leads_out("vnet12", true, false));
        assert!(!leads_out("virbr0-nic", false, false), "nobody holds it");
    }

    /// A veth leads nowhere only if the IP stack of a namespace that can be seen has its other end.
    #[test]
    fn a_veth_is_followed_to_its_other_end() {
        let there = Elsewhere { namespace: 3, index: 7 };
        let veth = Link { elsewhere: Some(there), ..port(Some(InfoKind::Veth)) };
        let seen = |links: &[Link], addressed: &[u32]| {
            said(&[bridge(), veth.clone()], |id| {
                assert_eq!(id, 3);
                Ok(Namespace { links: Links::new(links.to_vec()), addressed: addressed.iter().copied().collect() })
            })
        };
        let end = link(7, "eth0", Some(InfoKind::Veth));
        assert_eq!(seen(std::slice::from_ref(&end), &[7]), None);
        assert_eq!(seen(std::slice::from_ref(&end), &[8]).as_deref(), Some("port (its other end has no address)"));
        let plugged = Link { master: Some(2), ..end.clone() };
        let other_bridge = link(2, "br0", Some(InfoKind::Bridge));
        let why = Some("port (its other end: a port of br0)");
        assert_eq!(seen(&[plugged, other_bridge], &[7]).as_deref(), why);
        let upper = Link { lower: Some(7), ..link(9, "mac0", Some(InfoKind::MacVlan)) };
        let why = Some("port (its other end: mac0 is on top of it)");
        assert_eq!(seen(&[end, upper], &[7]).as_deref(), why);
        let unseen_end = Some("port (its other end cannot be seen)");
        assert_eq!(seen(&[], &[7]).as_deref(), unseen_end);
        assert_eq!(of([veth.clone()]).as_deref(), unseen_end);
    }

    #[test]
    fn the_kernel_is_asked() {
        let lo = super::of(1).unwrap();
        assert!(lo.iter().any(|way| way.to_string() == "lo (it is no bridge)"), "{lo:?}");
        assert!(super::of(i32::MAX.unsigned_abs()).is_err());
        // No namespace has this ID.
        assert!(Namespace::ask(i32::MAX).is_err());
    }
}
