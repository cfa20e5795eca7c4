//! An interface and the XDP program on it: attaching by bpf_link, and asking who is there.

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

/// Asks the kernel for the interface's description and finds the number of its XDP program.
fn xdp_program_id(interface: u32) -> io::Result<Option<u32>> {
    // From <linux/rtnetlink.h>: a header (length, type, flags, sequence, port) and an ifinfomsg (family, type, index, flags, change).
    const RTM_GETLINK: u16 = 18;
    const NLM_F_REQUEST: u16 = 1;
    let mut request = Vec::with_capacity(32);
    request.extend_from_slice(&32_u32.to_ne_bytes());
    request.extend_from_slice(&RTM_GETLINK.to_ne_bytes());
    request.extend_from_slice(&NLM_F_REQUEST.to_ne_bytes());
    request.extend_from_slice(&[0; 12]);
    request.extend_from_slice(&interface.to_ne_bytes());
    request.extend_from_slice(&[0; 8]);

    let socket = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkRoute)?;
    send(socket.as_raw_fd(), &request, MsgFlags::empty())?;
    // An answer to a question about one link is one message; the kernel allocates no more than 32 KiB for it.
    let mut answer = vec![0; 32 * 1024];
    let len = recv(socket.as_raw_fd(), &mut answer, MsgFlags::empty())?;
    Ok(answer.get(..len).and_then(program_id_in))
}

/// The program's number in an `RTM_NEWLINK` message, if it is one and there is one.
fn program_id_in(message: &[u8]) -> Option<u32> {
    const RTM_NEWLINK: u16 = 16;
    const HEADERS: usize = 32;
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
