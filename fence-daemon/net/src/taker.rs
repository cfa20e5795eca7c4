//! Finds who takes an interface's frames before this host's IP stack. Such an interface receives no
//! request.

use std::fmt;

use netlink_packet_route::link::InfoKind;

use crate::interface::Interface;
use crate::link::{self, Link};

/// How many devices on top of each other are followed. Nobody builds more.
const DEPTH_MAX: usize = 8;

/// Who takes an interface's frames.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Taker {
    /// The device that the interface is a port of, then the one above it, and so on.
    Masters(Vec<Master>),
    /// The guest that has opened the interface, a macvtap.
    Guest {
        /// The interface below the macvtap, if it is in this network namespace.
        lower: Option<String>,
    },
}

/// A device with ports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Master {
    /// Its kind, as in `ip -d link`: `bridge`, `bond`, `team`, `openvswitch`.
    pub kind: String,
    /// Its name.
    pub name: String,
}

impl Taker {
    /// Who takes the frames of this interface. `None` if nobody does, or the kernel does not say.
    #[must_use]
    pub fn of(interface: &Interface) -> Option<Self> {
        among(&link::all().ok()?, interface.index)
    }

    /// What to configure instead.
    #[must_use]
    pub fn help(&self) -> String {
        let instead = |name: &str| format!("write `interface = \"{name}\";` in the multicast section");
        match self {
            Self::Masters(masters) => match masters.last() {
                Some(Master { kind, .. }) if kind == OPEN_VSWITCH => {
                    "name the internal port of its bridge (`ovs-vsctl list-br` names bridges)".to_owned()
                }
                Some(Master { name, .. }) => format!("no request is heard on a port: {}", instead(name)),
                None => String::new(),
            },
            Self::Guest { .. } => {
                "a guest on a macvtap does not reach the host through the device below: give guests and host a bridge, \
                 and name that one by `interface`"
                    .to_owned()
            }
        }
    }

    /// The end of a sentence that begins with the interface's name.
    fn role(&self) -> String {
        match self {
            Self::Masters(masters) => {
                let of = |Master { kind, name }: &Master| format!("a port of the {kind} {name}");
                masters.iter().map(of).collect::<Vec<_>>().join(", which is ")
            }
            Self::Guest { lower: Some(lower) } => format!("a guest's macvtap on {lower}"),
            Self::Guest { lower: None } => "a guest's macvtap".to_owned(),
        }
    }
}

/// Reads as the end of "the interface is ...".
impl fmt::Display for Taker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.role())
    }
}

const OPEN_VSWITCH: &str = "openvswitch";

fn among(links: &[Link], index: u32) -> Option<Taker> {
    let find = |index: u32| links.iter().find(|link| link.index == index);
    let this = find(index)?;
    if matches!(this.kind, Some(InfoKind::MacVtap | InfoKind::IpVtap)) {
        return Some(Taker::Guest { lower: this.lower.and_then(find).map(|lower| lower.name.clone()) });
    }
    let mut masters = Vec::new();
    let mut next = this.master.and_then(find);
    while let Some(master) = next.filter(|_| masters.len() < DEPTH_MAX) {
        // A VRF only chooses routes: its ports keep their own IP.
        if matches!(master.kind, Some(InfoKind::Vrf)) {
            break;
        }
        let kind = master.kind.as_ref().map_or_else(|| "device".to_owned(), ToString::to_string);
        masters.push(Master { kind, name: master.name.clone() });
        next = master.master.and_then(find);
    }
    (!masters.is_empty()).then_some(Taker::Masters(masters))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(index: u32, name: &str, kind: Option<InfoKind>, master: Option<u32>) -> Link {
        Link { index, name: name.to_owned(), kind, master, ..Link::default() }
    }

    #[test]
    fn the_device_that_gets_the_frames_is_named() {
        let links = [
            link(1, "lo", None, None),
            link(2, "eth0", None, Some(3)),
            link(3, "bond0", Some(InfoKind::Bond), Some(4)),
            link(4, "br0", Some(InfoKind::Bridge), None),
            link(5, "eth1", None, Some(6)),
            link(6, "red", Some(InfoKind::Vrf), None),
            link(7, "eth2", None, Some(8)),
            link(8, "ovs-system", Some(InfoKind::Other("openvswitch".to_owned())), None),
            link(9, "eth3", None, Some(99)),
            link(10, "eth4", None, Some(11)),
            link(11, "team0", Some(InfoKind::Team), None),
        ];
        let said = |index| among(&links, index).map(|taker| (taker.to_string(), taker.help()));
        let (bond, help) = said(2).unwrap();
        assert_eq!(bond, "a port of the bond bond0, which is a port of the bridge br0");
        assert!(help.contains("`interface = \"br0\";`"), "{help}");
        assert_eq!(said(3).unwrap().0, "a port of the bridge br0");
        assert_eq!(said(10).unwrap().0, "a port of the team team0");
        let (open, help) = said(7).unwrap();
        assert!(open.contains("openvswitch ovs-system") && help.contains("ovs-vsctl"), "{open}: {help}");
        // An interface of its own, a bridge, a VRF's port, a port of a missing device, a missing
        // interface.
        for index in [1, 4, 5, 9, 77] {
            assert_eq!(said(index), None, "{index}");
        }
    }

    #[test]
    fn a_macvtap_is_a_guests() {
        let tap = Link { lower: Some(2), ..link(3, "macvtap0", Some(InfoKind::MacVtap), None) };
        let own = Link { lower: Some(2), ..link(4, "macvlan0", Some(InfoKind::MacVlan), None) };
        let links = [link(2, "eth0", None, None), tap, own];
        assert_eq!(among(&links, 3).unwrap().to_string(), "a guest's macvtap on eth0");
        assert_eq!(among(&links, 4), None, "a macvlan is the host's own");
    }

    #[test]
    fn devices_in_a_circle_end() {
        let links = [link(1, "a", None, Some(2)), link(2, "b", Some(InfoKind::Bridge), Some(1))];
        assert!(among(&links, 1).is_some());
    }
}
