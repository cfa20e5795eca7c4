//! An interface and the program on it: attaches by bpf_link, and finds out who else is there.

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};

use aya::programs::loaded_programs;
use fence_net::interface::Interface;
use fence_net::link::{self, Link};
use fence_net::way_out;
use netlink_packet_route::link::InfoKind;
use nix::libc;

use super::AttachedMode;

/// Creates the link that attaches the program to the interface. Closing the descriptor detaches it.
///
/// This does not use aya's `attach`. On `EINVAL` that one silently falls back to netlink, which
/// replaces another program and stays attached after a crash.
pub(super) fn link(program: BorrowedFd<'_>, interface: u32, mode: AttachedMode) -> io::Result<OwnedFd> {
    // From <linux/bpf.h> and <linux/if_link.h>.
    const BPF_LINK_CREATE: libc::c_long = 28;
    const BPF_XDP: u32 = 37;
    const XDP_FLAGS_SKB_MODE: u32 = 1 << 1;
    const XDP_FLAGS_DRV_MODE: u32 = 1 << 2;
    const BPF_TCX_INGRESS: u32 = 46;
    const BPF_F_BEFORE: u32 = 1 << 3;

    /// The head of `union bpf_attr`'s `link_create`. The kernel takes what follows as zero.
    #[repr(C)]
    struct LinkCreate {
        program: u32,
        interface: u32,
        attach_type: u32,
        flags: u32,
    }
    let (attach_type, flags) = match mode {
        AttachedMode::Native => (BPF_XDP, XDP_FLAGS_DRV_MODE),
        AttachedMode::Generic => (BPF_XDP, XDP_FLAGS_SKB_MODE),
        // First in the chain, as XDP is: otherwise another program could drop or take our requests
        // unseen. The others still get everything that is not ours.
        AttachedMode::Tcx => (BPF_TCX_INGRESS, BPF_F_BEFORE),
    };
    let program = u32::try_from(program.as_raw_fd()).map_err(io::Error::other)?;
    let attributes = LinkCreate { program, interface, attach_type, flags };
    // SAFETY: needed because neither libc nor nix has bpf(2). The kernel reads `size` bytes from
    // the pointer during the call and writes none. They are those of a live struct without padding,
    // and the length is its own.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, BPF_LINK_CREATE, &raw const attributes, size_of::<LinkCreate>()) };
    let fd = RawFd::try_from(result).map_err(io::Error::other)?;
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call succeeded, so this is a new descriptor that nobody else knows or closes.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The index of the interface that a link still attaches its program to. `None` if the interface
/// was deleted or somebody detached the program.
pub(super) fn attached_to(link: BorrowedFd<'_>) -> io::Result<Option<u32>> {
    // From <linux/bpf.h>.
    const BPF_OBJ_GET_INFO_BY_FD: libc::c_long = 15;

    /// `union bpf_attr`'s `info`.
    #[repr(C)]
    struct GetInfo {
        fd: u32,
        info_len: u32,
        info: u64,
    }
    /// The head of `struct bpf_link_info`, up to the first field of an XDP link's or a tcx link's
    /// part. That part begins at a multiple of 8.
    #[repr(C)]
    #[derive(Default)]
    struct LinkInfo {
        kind: u32,
        id: u32,
        program: u32,
        unused: u32,
        interface: u32,
        more: u32,
    }
    let mut info = LinkInfo::default();
    let attributes = GetInfo {
        fd: u32::try_from(link.as_raw_fd()).map_err(io::Error::other)?,
        info_len: u32::try_from(size_of::<LinkInfo>()).map_err(io::Error::other)?,
        info: (&raw mut info).expose_provenance() as u64,
    };
    let size = size_of::<GetInfo>();
    // SAFETY: needed because neither libc nor nix has bpf(2). During the call the kernel reads
    // `size` bytes from the pointer, which are those of a live struct without padding. It writes at
    // most `info_len` bytes to `info`, which is a live struct of that length in which any bytes are
    // values.
    let result = unsafe { libc::syscall(libc::SYS_bpf, BPF_OBJ_GET_INFO_BY_FD, &raw const attributes, size) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(Some(info.interface).filter(|interface| *interface != 0))
}

/// Whether the kernel refused because another program is on the interface, in this mode (`EBUSY`)
/// or in another (`EEXIST`).
pub(super) fn is_occupied(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EBUSY | libc::EEXIST))
}

/// The XDP program on an interface, as far as it can be found out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Occupant {
    /// The program's number in the kernel.
    pub id: Option<u32>,
    /// The program's name, 15 characters at most.
    pub name: Option<String>,
}

impl Occupant {
    /// Who is on the interface now.
    pub(super) fn of(interface: u32) -> Self {
        let id = link::one(interface).ok().and_then(|link| link.xdp_program);
        let name = id.and_then(|id| {
            loaded_programs()
                .filter_map(Result::ok)
                .find(|program| program.id() == id)
                .and_then(|program| program.name_as_str().map(str::to_owned))
        });
        Self { id, name }
    }
}

impl Occupant {
    /// The program on the interface of this name. `None` if there is no program or no such
    /// interface.
    #[must_use]
    pub fn on(interface: &str) -> Option<Self> {
        let index = Interface::named(interface)?.index;
        Some(Self::of(index)).filter(|occupant| occupant.id.is_some())
    }
}

impl fmt::Display for Occupant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.name, self.id) {
            (Some(name), Some(id)) => write!(f, "{name} (id {id})"),
            (None, Some(id)) => write!(f, "id {id}"),
            (_, None) => f.write_str("unknown (see `bpftool net show`)"),
        }
    }
}

/// Who else needs the frames of an interface and would miss those that the program takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Sharer {
    /// A device on top of the interface: a macvlan or the like. A VLAN's is none: see [`Vlans`].
    Device(String),
    /// The bridge or bond that the interface is a port of.
    Master(String),
    /// The networks to which the host routes multicast.
    Routing,
}

/// Why frames of several VLANs may come by an interface.
///
/// tc sees a frame's tag. XDP does not where the tag is already out of the frame: on a bridge, and
/// with many network cards.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Vlans {
    /// The interface is a bridge that keeps VLANs apart.
    Filtering,
    /// A VLAN's device is on top of the interface. It would miss the requests that XDP takes out.
    Device(String),
}

impl Vlans {
    /// The ways that remain, the best one first.
    pub(super) fn leave(vlans: Option<&Self>, ways: &[AttachedMode]) -> Vec<AttachedMode> {
        let (tcx, xdp): (Vec<_>, Vec<_>) = ways.iter().partition(|way| **way == AttachedMode::Tcx);
        match vlans {
            None => ways.to_vec(),
            Some(Self::Filtering) => [tcx, xdp].concat(),
            Some(Self::Device(_)) => tcx,
        }
    }
}

impl fmt::Display for Vlans {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Filtering => f.write_str("its vlan_filtering is on"),
            Self::Device(name) => write!(f, "{name} is on top of it"),
        }
    }
}

/// What matters about an interface for attaching a program.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Surroundings {
    /// It is hardware with its own driver. The kernel names the kind of all other interfaces.
    pub(super) hardware: bool,
    pub(super) bridge: bool,
    pub(super) vlans: Option<Vlans>,
    pub(super) sharer: Option<Sharer>,
}

impl Surroundings {
    /// As they are now. What comes later goes unnoticed.
    pub(super) fn of(interface: &str, index: u32) -> io::Result<Self> {
        // The kernel lists its settings below the interface's own name, even if it has alternative
        // names.
        let own = Interface::meant_by(interface).map(|meant| meant.name);
        let interface = own.as_deref().unwrap_or(interface);
        let around = Self::among(&link::all()?, index);
        Ok(if way_out::routes_multicast(interface) { Self { sharer: Some(Sharer::Routing), ..around } } else { around })
    }

    /// The surroundings of the link with number `index`.
    fn among(links: &[Link], index: u32) -> Self {
        let own = links.iter().find(|link| link.index == index);
        let port_of = own.and_then(|link| link.master).map(|master| {
            let known = links.iter().find(|link| link.index == master);
            Sharer::Master(known.map_or_else(|| format!("interface {master}"), |master| master.name.clone()))
        });
        let on_top = |kinds: &[InfoKind]| {
            let is_one =
                |link: &&Link| link.lower == Some(index) && link.kind.as_ref().is_some_and(|kind| kinds.contains(kind));
            links.iter().find(is_one).map(|link| link.name.clone())
        };
        let others = [InfoKind::MacVlan, InfoKind::MacVtap, InfoKind::IpVlan, InfoKind::IpVtap];
        Self {
            hardware: own.is_some_and(|link| link.kind.is_none()),
            bridge: own.is_some_and(|link| link.kind == Some(InfoKind::Bridge)),
            vlans: (on_top(&[InfoKind::Vlan]).map(Vlans::Device))
                .or_else(|| own.filter(|link| link.vlan_filtering).map(|_| Vlans::Filtering)),
            sharer: port_of.or_else(|| on_top(&others).map(Sharer::Device)),
        }
    }
}

impl fmt::Display for Sharer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Device(name) => write!(f, "{name}, a device on top of it"),
            Self::Master(name) => write!(f, "{name}, of which it is a port"),
            Self::Routing => f.write_str("other networks, to which this host routes multicast"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn around(link: Link) -> Surroundings {
        Surroundings::among(&[Link { index: 1, ..Link::default() }, link], 4)
    }

    #[test]
    fn sharers_are_found_by_kind_and_index() {
        let upper = |lower, kind| around(Link { index: 9, name: "upper0".to_owned(), lower, kind, ..Link::default() });
        for kind in [InfoKind::MacVlan, InfoKind::MacVtap, InfoKind::IpVlan, InfoKind::IpVtap] {
            let device = Some(Sharer::Device("upper0".to_owned()));
            assert_eq!(upper(Some(4), Some(kind.clone())).sharer, device, "{kind:?}");
        }
        let vlan = upper(Some(4), Some(InfoKind::Vlan));
        assert_eq!((vlan.sharer, vlan.vlans), (None, Some(Vlans::Device("upper0".to_owned()))));
        // A device of another interface, one without a lower device, a veth's peer, a tunnel, and
        // one without a kind.
        let nobody = Surroundings { hardware: false, bridge: false, vlans: None, sharer: None };
        assert_eq!(upper(Some(5), Some(InfoKind::Vlan)), nobody);
        assert_eq!(upper(None, Some(InfoKind::Vlan)), nobody);
        assert_eq!(upper(Some(4), Some(InfoKind::Veth)), nobody);
        assert_eq!(upper(Some(4), Some(InfoKind::Vxlan)), nobody);
        assert_eq!(upper(Some(4), None), nobody);
    }

    #[test]
    fn hardware_and_bridges_are_told_apart_and_a_bridge_may_filter_vlans() {
        let own = |kind, vlan_filtering| {
            let around = around(Link { index: 4, kind, vlan_filtering, ..Link::default() });
            (around.hardware, around.bridge, around.vlans)
        };
        assert_eq!(own(None, false), (true, false, None));
        assert_eq!(own(Some(InfoKind::Veth), false), (false, false, None));
        assert_eq!(own(Some(InfoKind::Bridge), false), (false, true, None));
        assert_eq!(own(Some(InfoKind::Bridge), true), (false, true, Some(Vlans::Filtering)));
    }

    #[test]
    fn where_vlans_are_tc_comes_first_or_alone() {
        use AttachedMode::{Generic, Native, Tcx};
        let device = Vlans::Device("upper0".to_owned());
        for (vlans, ways, left) in [
            (None, vec![Generic, Tcx], vec![Generic, Tcx]),
            (Some(&Vlans::Filtering), vec![Generic, Tcx], vec![Tcx, Generic]),
            (Some(&Vlans::Filtering), vec![Generic], vec![Generic]),
            (Some(&device), vec![Native, Tcx, Generic], vec![Tcx]),
            (Some(&device), vec![Generic], vec![]),
        ] {
            assert_eq!(Vlans::leave(vlans, &ways), left, "{vlans:?} {ways:?}");
        }
    }

    #[test]
    fn a_port_is_shared_with_its_master() {
        let port = |master| Link { index: 4, lower: Some(9), kind: Some(InfoKind::Veth), master, ..Link::default() };
        let bridge = Link { index: 7, name: "virbr0".to_owned(), kind: Some(InfoKind::Bridge), ..Link::default() };
        let sharer = |links: &[Link]| Surroundings::among(links, 4).sharer;
        assert_eq!(sharer(&[port(None), bridge.clone()]), None);
        let master = |name: &str| Some(Sharer::Master(name.to_owned()));
        assert_eq!(sharer(&[port(Some(7)), bridge.clone()]), master("virbr0"));
        assert_eq!(sharer(&[port(Some(8)), bridge]), master("interface 8"));
    }

    #[test]
    fn an_occupant_is_named_as_well_as_it_can_be() {
        let occupant = |id, name: Option<&str>| Occupant { id, name: name.map(str::to_owned) }.to_string();
        assert_eq!(occupant(Some(7), Some("xdp_dispatcher")), "xdp_dispatcher (id 7)");
        assert_eq!(occupant(Some(7), None), "id 7");
        assert_eq!(occupant(None, None), "unknown (see `bpftool net show`)");
    }
}
