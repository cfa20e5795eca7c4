//! The bytes of the fence_xvm protocol, as Debian 12's `fence-virt` 4.12.1 sends and reads them.
//!
//! Source: captures of the stock client and server (the golden datagrams in
//! `fence-common/fixtures`). Integers are little-endian; addresses are in network order.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned, little_endian};

use crate::hash::HashKind;

/// Length of a request in bytes: the whole payload of a datagram.
pub const REQUEST_LEN: usize = 176;
/// Offset of the `hash` field. The digest covers the bytes before it as sent, and the field as
/// zeros.
pub const HASH_OFFSET: usize = 112;
/// Length of the `hash` field, of a challenge and of a response in bytes. Shorter digests are
/// zero-padded.
pub const HASH_LEN: usize = 64;
/// Length of a domain name field in bytes: at most 63 bytes of text and a NUL.
pub const DOMAIN_LEN: usize = 64;
/// Length in bytes of the longest key; stock peers read no more of a key file.
pub const KEY_MAX: usize = 4096;
/// The default UDP port of requests and TCP port of callbacks.
pub const DEFAULT_PORT: u16 = 1229;
/// The default IPv4 group.
pub const DEFAULT_GROUP_V4: [u8; 4] = [225, 0, 0, 12];
/// The default IPv6 group (`ff05::3:1`).
pub const DEFAULT_GROUP_V6: [u8; 16] = [0xff, 0x05, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3, 0, 1];

/// The `family` of a request with an IPv4 callback address.
pub const FAMILY_V4: u32 = 2;
/// The `family` of a request with an IPv6 callback address.
pub const FAMILY_V6: u32 = 10;

/// The operation that a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Op {
    /// Nothing; answered with failure.
    Null = 0,
    /// Power the domain off.
    Off = 1,
    /// Power the domain off, then start it again.
    Reboot = 2,
    /// Start the domain.
    On = 3,
    /// Ask whether the domain runs.
    Status = 4,
    /// Ask whether the fence device works (`monitor`).
    DevStatus = 5,
    /// Ask for the list of domains.
    HostList = 6,
}

impl Op {
    /// Every operation in datagrams. `metadata` (7) and `validate-all` (8) never leave the client.
    pub const ALL: [Self; 7] =
        [Self::Null, Self::Off, Self::Reboot, Self::On, Self::Status, Self::DevStatus, Self::HostList];

    /// The operation of a byte on the wire, if any.
    #[inline(always)]
    #[must_use]
    pub const fn from_wire(byte: u8) -> Option<Self> {
        match byte {
            0 => Some(Self::Null),
            1 => Some(Self::Off),
            2 => Some(Self::Reboot),
            3 => Some(Self::On),
            4 => Some(Self::Status),
            5 => Some(Self::DevStatus),
            6 => Some(Self::HostList),
            _ => None,
        }
    }

    /// The byte on the wire.
    #[must_use]
    pub const fn to_wire(self) -> u8 {
        self as u8
    }

    /// Whether it may switch a domain off or on.
    #[must_use]
    pub const fn changes_power(self) -> bool {
        match self {
            Self::Off | Self::Reboot | Self::On => true,
            Self::Null | Self::Status | Self::DevStatus | Self::HostList => false,
        }
    }

    /// The name on `fence_xvm`'s command line (`-o`).
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Null => "null",
            Self::Off => "off",
            Self::Reboot => "reboot",
            Self::On => "on",
            Self::Status => "status",
            Self::DevStatus => "monitor",
            Self::HostList => "list",
        }
    }

    /// Whether the operation is about one domain, named in the request.
    #[must_use]
    pub const fn names_a_domain(self) -> bool {
        match self {
            Self::Off | Self::Reboot | Self::On | Self::Status => true,
            Self::Null | Self::DevStatus | Self::HostList => false,
        }
    }
}

/// A request as in the datagram. Any 176 bytes are one; the caller checks whether they mean
/// anything.
#[derive(Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Request {
    /// An [`Op`].
    pub op: u8,
    /// A [`HashKind`].
    pub hash_kind: u8,
    /// 4 or 16. Stock servers ignore it, and so does fence-xdp.
    pub addr_len: u8,
    /// Bit 0: "the domain is a UUID". Stock servers look at the text instead, and so does
    /// fence-xdp.
    pub flags: u8,
    /// Domain name or canonical UUID, NUL-terminated.
    pub domain: [u8; DOMAIN_LEN],
    /// The callback address: IPv4 in the first 4 bytes or IPv6 in the first 16.
    pub address: [u8; 28],
    /// The TCP port of the callback.
    pub port: little_endian::U16,
    /// Random bytes, new in each datagram.
    pub random: [u8; 6],
    /// The same in all copies of one invocation of the client.
    pub seqno: little_endian::U32,
    /// [`FAMILY_V4`] or [`FAMILY_V6`].
    pub family: little_endian::U32,
    /// The digest, zero-padded.
    pub hash: [u8; HASH_LEN],
}

impl Request {
    /// The operation, if the byte names one.
    #[inline(always)]
    #[must_use]
    pub const fn op(&self) -> Option<Op> {
        Op::from_wire(self.op)
    }

    /// The kind of digest, if the byte names one.
    #[inline(always)]
    #[must_use]
    pub const fn hash_kind(&self) -> Option<HashKind> {
        HashKind::from_wire(self.hash_kind)
    }

    /// The text of the domain field without its NUL. `None` if it has no NUL.
    #[must_use]
    pub fn domain_text(&self) -> Option<&[u8]> {
        self.domain.iter().position(|&byte| byte == 0).map(|end| &self.domain[..end])
    }

    /// The callback address, if the family is known.
    #[must_use]
    pub fn callback_ip(&self) -> Option<core::net::IpAddr> {
        match self.family.get() {
            FAMILY_V4 => Some(<[u8; 4]>::try_from(&self.address[..4]).ok()?.into()),
            FAMILY_V6 => Some(<[u8; 16]>::try_from(&self.address[..16]).ok()?.into()),
            _ => None,
        }
    }

    /// The bytes that the digest covers as sent. The 64 bytes behind them count as zero.
    #[must_use]
    pub fn signed_part(&self) -> &[u8] {
        &self.as_bytes()[..HASH_OFFSET]
    }
}

/// The last byte of a conversation, except about a host list. It becomes the client's exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Reply {
    /// Done; for `status`: the domain runs.
    Success = 0,
    /// Not done, or not known to be done.
    Failure = 1,
    /// For `status`: the domain is off.
    Off = 2,
    /// The requester may not fence this domain.
    PermissionDenied = 3,
}

impl Reply {
    /// The byte on the wire.
    #[must_use]
    pub const fn to_wire(self) -> u8 {
        self as u8
    }

    /// The name in logs and reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Success => "success",
            Self::Failure => "failure",
            Self::Off => "off",
            Self::PermissionDenied => "permission denied",
        }
    }
}

/// The first byte of a host list. [`HostRecord`]s follow, then an all-zero one, then a [`Reply`].
pub const HOST_LIST: u8 = 253;

/// One domain in a host list: 130 bytes.
#[derive(Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct HostRecord {
    /// The domain's name, NUL-terminated.
    pub name: [u8; DOMAIN_LEN],
    /// The domain's UUID as canonical text, NUL-terminated.
    pub uuid: [u8; DOMAIN_LEN],
    /// libvirt's `virDomainState`. The client prints "on" for 1 only.
    pub state: u8,
    /// Padding.
    pub pad: u8,
}

impl HostRecord {
    /// The record that ends a list.
    pub const END: Self = Self { name: [0; DOMAIN_LEN], uuid: [0; DOMAIN_LEN], state: 0, pad: 0 };

    /// A record. Text is cut after 63 bytes.
    #[must_use]
    pub fn new(name: &str, uuid: &str, state: u8) -> Self {
        Self { name: text_field(name), uuid: text_field(uuid), state, pad: 0 }
    }
}

/// `text` NUL-terminated and zero-padded; at most 63 bytes of it.
fn text_field(text: &str) -> [u8; DOMAIN_LEN] {
    let mut field = [0; DOMAIN_LEN];
    let len = text.len().min(DOMAIN_LEN - 1);
    field[..len].copy_from_slice(&text.as_bytes()[..len]);
    field
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::mem::{align_of, offset_of, size_of};
    use zerocopy::FromZeros;

    #[test]
    fn the_layout_is_the_one_on_the_wire() {
        assert_eq!((size_of::<Request>(), align_of::<Request>()), (REQUEST_LEN, 1));
        assert_eq!(offset_of!(Request, domain), 4);
        assert_eq!(offset_of!(Request, address), 68);
        assert_eq!(offset_of!(Request, port), 96);
        assert_eq!(offset_of!(Request, random), 98);
        assert_eq!(offset_of!(Request, seqno), 104);
        assert_eq!(offset_of!(Request, family), 108);
        assert_eq!(offset_of!(Request, hash), HASH_OFFSET);
        assert_eq!((size_of::<HostRecord>(), align_of::<HostRecord>()), (130, 1));
    }

    #[test]
    fn operations_round_trip_and_nothing_else_is_one() {
        for op in Op::ALL {
            assert_eq!(Op::from_wire(op.to_wire()), Some(op));
        }
        assert!((7..=u8::MAX).all(|byte| Op::from_wire(byte).is_none()));
    }

    #[test]
    fn a_domain_needs_its_nul() {
        let mut request = Request::new_zeroed();
        assert_eq!(request.domain_text(), Some(&b""[..]));
        request.domain = [b'x'; DOMAIN_LEN];
        assert_eq!(request.domain_text(), None);
        request.domain[63] = 0;
        assert_eq!(request.domain_text().map(<[u8]>::len), Some(63));
    }

    #[test]
    fn a_host_record_cuts_long_text_and_keeps_its_nul() {
        let record = HostRecord::new(&"n".repeat(100), "u", 1);
        assert_eq!(record.name[62..], [b'n', 0]);
        assert_eq!(record.uuid[..2], [b'u', 0]);
    }
}
