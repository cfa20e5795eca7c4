//! An interface and the XDP program on it: attaching by bpf_link, and asking who is there and who else listens.

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};

use aya::programs::loaded_programs;
use nix::libc;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket};

use super::AttachedMode;

/// Creates the link that attaches the program to the interface. Closing the descriptor detaches it.
///
/// Not by aya: where the kernel says `EINVAL`, aya's `attach` goes on by netlink without a word, which replaces another program
/// and stays after a crash.
pub(super) fn link(program: BorrowedFd<'_>, interface: u32, mode: AttachedMode) -> io::Result<OwnedFd> {
    // From <linux/bpf.h> and <linux/if_link.h>.
    const BPF_LINK_CREATE: libc::c_long = 28;
    const BPF_XDP: u32 = 37;
    const XDP_FLAGS_SKB_MODE: u32 = 1 << 1;
    const XDP_FLAGS_DRV_MODE: u32 = 1 << 2;

    /// The head of `union bpf_attr`'s `link_create`; what follows is zero to the kernel.
    #[repr(C)]
    struct LinkCreate {
        program: u32,
        interface: u32,
        attach_type: u32,
        flags: u32,
    }
    let flags = match mode {
        AttachedMode::Native => XDP_FLAGS_DRV_MODE,
        AttachedMode::Generic => XDP_FLAGS_SKB_MODE,
    };
    let program = u32::try_from(program.as_raw_fd()).map_err(io::Error::other)?;
    let attributes = LinkCreate { program, interface, attach_type: BPF_XDP, flags };
    // SAFETY: neither libc nor nix has bpf(2). The kernel reads `size` bytes from the pointer during the call and writes none;
    // they are those of a live struct without padding, and the length is its own.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, BPF_LINK_CREATE, &raw const attributes, size_of::<LinkCreate>()) };
    let fd = RawFd::try_from(result).map_err(io::Error::other)?;
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call succeeded, so this is a new descriptor that nobody else knows or closes.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Whether the kernel refused because another program is on the interface, in this mode (`EBUSY`) or in another (`EEXIST`).
pub(super) fn is_occupied(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EBUSY | libc::EEXIST))
}

/// The XDP program that is on an interface, as far as it can be found out.
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
        let id = xdp_program_id(interface).unwrap_or_default();
        let name = id.and_then(|id| {
            loaded_programs()
                .filter_map(Result::ok)
                .find(|program| program.id() == id)
                .and_then(|program| program.name_as_str().map(str::to_owned))
        });
        Self { id, name }
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

/// Who else gets what comes by an interface, and would miss what the program takes out there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Sharer {
    /// A device on top of the interface: a VLAN, a macvlan or the like. A VLAN's frames cannot even be told from the interface's own: on
    /// a bridge, and with many network cards, the tag is no longer in the frame when the program sees it.
    Device(String),
    /// The bridge or bond that the interface is a port of.
    Master(String),
    /// The networks that the host routes multicast to.
    Routing,
}

impl Sharer {
    /// Looks for one. Who comes later is not noticed.
    pub(super) fn of(interface: &str, index: u32) -> io::Result<Option<Self>> {
        let routed = ["ipv4", "ipv6"].iter().any(|version| {
            let file = format!("/proc/sys/net/{version}/conf/{interface}/mc_forwarding");
            std::fs::read_to_string(file).is_ok_and(|text| text.trim() != "0")
        });
        if routed {
            return Ok(Some(Self::Routing));
        }
        let mut found = None;
        ask_for_links(LinkRequest::All, |message| {
            if found.is_none() {
                found = sharer_in(message, index);
            }
        })?;
        Ok(found)
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

/// What an `RTM_NEWLINK` message tells about who shares the interface with number `index`.
fn sharer_in(message: &[u8], index: u32) -> Option<Sharer> {
    const IFLA_IFNAME: u16 = 3;
    const IFLA_LINK: u16 = 5;
    const IFLA_MASTER: u16 = 10;
    const IFLA_LINKINFO: u16 = 18;
    const IFLA_INFO_KIND: u16 = 1;
    const IFLA_LINK_NETNSID: u16 = 37;
    const ON_TOP: [&[u8]; 5] = [b"vlan", b"macvlan", b"macvtap", b"ipvlan", b"ipvtap"];

    let own = u32::from_ne_bytes(message.get(20..24)?.try_into().ok()?);
    let run = message.get(HEADERS..)?;
    let find = |wanted| attributes(run).find(|(kind, _)| *kind == wanted).map(|(_, payload)| payload);
    let number = |wanted| Some(u32::from_ne_bytes(find(wanted)?.try_into().ok()?));
    if own == index {
        let master = number(IFLA_MASTER)?;
        // An unknown number's name is no error there, but empty.
        let name = nix::net::if_::if_indextoname(master).map(|name| name.to_string_lossy().into_owned()).ok();
        let name = name.filter(|name| !name.is_empty()).unwrap_or_else(|| format!("interface {master}"));
        return Some(Sharer::Master(name));
    }
    // A link's number may be one of another namespace: then it is said of which.
    if number(IFLA_LINK)? != index || find(IFLA_LINK_NETNSID).is_some() {
        return None;
    }
    let (_, kind) = attributes(find(IFLA_LINKINFO)?).find(|(kind, _)| *kind == IFLA_INFO_KIND)?;
    let text =
        |bytes: &[u8]| String::from_utf8_lossy(bytes.split(|byte| *byte == 0).next().unwrap_or_default()).into_owned();
    ON_TOP.contains(&text(kind).as_bytes()).then(|| Sharer::Device(find(IFLA_IFNAME).map(text).unwrap_or_default()))
}

/// Asks the kernel for the interface's description and finds the number of its XDP program.
fn xdp_program_id(interface: u32) -> io::Result<Option<u32>> {
    let mut found = None;
    ask_for_links(LinkRequest::One(interface), |message| found = program_id_in(message))?;
    Ok(found)
}

/// A header (length, type, flags, sequence, port) and an ifinfomsg (family, type, index, flags, change) of <linux/rtnetlink.h>.
const HEADERS: usize = 32;

enum LinkRequest {
    One(u32),
    All,
}

/// Asks the kernel for descriptions of interfaces, and shows each message of the answer.
fn ask_for_links(which: LinkRequest, mut show: impl FnMut(&[u8])) -> io::Result<()> {
    const RTM_GETLINK: u16 = 18;
    const NLM_F_REQUEST: u16 = 1;
    const NLM_F_DUMP: u16 = 0x300;
    const NLMSG_ERROR: u16 = 2;
    const NLMSG_DONE: u16 = 3;

    let (flags, interface) = match which {
        LinkRequest::One(interface) => (NLM_F_REQUEST, interface),
        LinkRequest::All => (NLM_F_REQUEST | NLM_F_DUMP, 0),
    };
    let mut request = Vec::with_capacity(HEADERS);
    request.extend_from_slice(&32_u32.to_ne_bytes());
    request.extend_from_slice(&RTM_GETLINK.to_ne_bytes());
    request.extend_from_slice(&flags.to_ne_bytes());
    request.extend_from_slice(&[0; 12]);
    request.extend_from_slice(&interface.to_ne_bytes());
    request.extend_from_slice(&[0; 8]);

    let socket = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkRoute)?;
    send(socket.as_raw_fd(), &request, MsgFlags::empty())?;
    // The kernel allocates no more than 32 KiB for a part of an answer.
    let mut answer = vec![0; 32 * 1024];
    loop {
        let len = recv(socket.as_raw_fd(), &mut answer, MsgFlags::empty())?;
        let mut rest = answer.get(..len).unwrap_or_default();
        while let Some((message, kind, next)) = first_message(rest) {
            match kind {
                NLMSG_DONE | NLMSG_ERROR => return Ok(()),
                _ => show(message),
            }
            rest = next;
        }
        // The description of one interface is one message, and nothing says that it is the last.
        if len == 0 || matches!(which, LinkRequest::One(_)) {
            return Ok(());
        }
    }
}

/// The first netlink message in a run of them, its type, and the rest.
fn first_message(run: &[u8]) -> Option<(&[u8], u16, &[u8])> {
    let len = usize::try_from(u32::from_ne_bytes(run.get(..4)?.try_into().ok()?)).ok()?;
    let kind = u16::from_ne_bytes(run.get(4..6)?.try_into().ok()?);
    let message = run.get(..len).filter(|message| message.len() >= 16)?;
    Some((message, kind, run.get(len.next_multiple_of(4)..).unwrap_or_default()))
}

/// The program's number in an `RTM_NEWLINK` message, if it is one and there is one.
fn program_id_in(message: &[u8]) -> Option<u32> {
    const RTM_NEWLINK: u16 = 16;
    const IFLA_XDP: u16 = 43;
    const IFLA_XDP_PROG_ID: u16 = 4;
    const IFLA_XDP_DRV_PROG_ID: u16 = 5;
    const IFLA_XDP_SKB_PROG_ID: u16 = 6;
    const IFLA_XDP_HW_PROG_ID: u16 = 7;

    if u16::from_ne_bytes(message.get(4..6)?.try_into().ok()?) != RTM_NEWLINK {
        return None;
    }
    let (_, xdp) = attributes(message.get(HEADERS..)?).find(|(kind, _)| *kind == IFLA_XDP)?;
    // The first where one program is attached, one of the others where there are several.
    let ids = [IFLA_XDP_PROG_ID, IFLA_XDP_DRV_PROG_ID, IFLA_XDP_SKB_PROG_ID, IFLA_XDP_HW_PROG_ID];
    let (_, id) = attributes(xdp).find(|(kind, _)| ids.contains(kind))?;
    Some(u32::from_ne_bytes(id.try_into().ok()?))
}

/// The attributes in a run of them: kind (without the flag bits) and payload. Ends where the run is no longer well-formed.
fn attributes(mut run: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let (&[l0, l1, k0, k1], _) = run.split_first_chunk()?;
        let len = usize::from(u16::from_ne_bytes([l0, l1]));
        let payload = run.get(4..len)?;
        run = run.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some((u16::from_ne_bytes([k0, k1]) & 0x3fff, payload))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attribute(kind: u16, payload: &[u8]) -> Vec<u8> {
        let len = u16::try_from(payload.len() + 4).unwrap();
        let mut bytes = [len.to_ne_bytes(), kind.to_ne_bytes()].concat();
        bytes.extend_from_slice(payload);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn message(attributes: &[Vec<u8>]) -> Vec<u8> {
        let mut bytes = vec![0; 32];
        bytes[4..6].copy_from_slice(&16_u16.to_ne_bytes());
        bytes.extend(attributes.concat());
        bytes
    }

    #[test]
    fn the_program_is_found_among_other_attributes() {
        let xdp = [attribute(2, &[2]), attribute(4, &77_u32.to_ne_bytes())].concat();
        let full = message(&[attribute(3, b"virbr0\0"), attribute(43 | 0x8000, &xdp), attribute(9, &[0; 3])]);
        assert_eq!(program_id_in(&full), Some(77));
        assert_eq!(program_id_in(&message(&[attribute(3, b"lo\0"), attribute(43, &attribute(2, &[0]))])), None);
        // Cut anywhere it is either found or not, but never a panic.
        for len in 0..full.len() {
            let _ = program_id_in(&full[..len]);
        }
    }

    #[test]
    fn who_shares_an_interface_is_found_by_kind_and_number() {
        let link = |index: u32, lower: u32, kind: &[u8], more: &[Vec<u8>]| {
            let info = attribute(1, kind);
            let all = [attribute(3, b"upper0\0"), attribute(5, &lower.to_ne_bytes()), attribute(18 | 0x8000, &info)];
            let mut message = message(&[all.as_slice(), more].concat());
            message[20..24].copy_from_slice(&index.to_ne_bytes());
            message
        };
        let device = Some(Sharer::Device("upper0".to_owned()));
        for kind in ["vlan\0", "macvlan", "macvtap\0", "ipvlan"] {
            let full = link(9, 4, kind.as_bytes(), &[]);
            assert_eq!(sharer_in(&full, 4), device, "{kind}");
            for len in 0..full.len() {
                let _ = sharer_in(&full[..len], 4);
            }
        }
        // Another interface's, a veth's other end, a tunnel, and one whose lower device is in another namespace.
        assert_eq!(sharer_in(&link(9, 5, b"vlan\0", &[]), 4), None);
        assert_eq!(sharer_in(&link(9, 4, b"veth\0", &[]), 4), None);
        assert_eq!(sharer_in(&link(9, 4, b"vxlan\0", &[]), 4), None);
        assert_eq!(sharer_in(&link(9, 4, b"vlan\0", &[attribute(37, &[1, 0, 0, 0])]), 4), None);
        // The interface itself, without and with a master.
        assert_eq!(sharer_in(&link(4, 9, b"veth\0", &[]), 4), None);
        let port = link(4, 9, b"veth\0", &[attribute(10, &u32::MAX.to_ne_bytes())]);
        assert_eq!(sharer_in(&port, 4), Some(Sharer::Master(format!("interface {}", u32::MAX))));
    }

    #[test]
    fn a_run_of_messages_ends_where_it_is_cut() {
        let run = [message(&[attribute(3, b"a\0")]), message(&[])];
        let run: Vec<u8> = run
            .into_iter()
            .flat_map(|mut one| {
                let len = u32::try_from(one.len()).unwrap();
                one[..4].copy_from_slice(&len.to_ne_bytes());
                one
            })
            .collect();
        let (_, kind, rest) = first_message(&run).unwrap();
        assert_eq!((kind, rest.len()), (16, 32));
        assert!(first_message(first_message(rest).unwrap().2).is_none());
        for len in 0..rest.len() {
            assert!(first_message(&rest[..len]).is_none());
        }
        assert!(first_message(&[0; 32]).is_none());
    }

    #[test]
    fn loopback_has_no_program() {
        assert_eq!(xdp_program_id(1).unwrap(), None);
    }

    #[test]
    fn an_occupant_is_named_as_well_as_it_can_be() {
        let occupant = |id, name: Option<&str>| Occupant { id, name: name.map(str::to_owned) }.to_string();
        assert_eq!(occupant(Some(7), Some("xdp_dispatcher")), "xdp_dispatcher (id 7)");
        assert_eq!(occupant(Some(7), None), "id 7");
        assert_eq!(occupant(None, None), "unknown (see `bpftool net show`)");
    }
}
