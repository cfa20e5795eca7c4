//! Frames, byte by byte, and a raw socket that sends them from the guest's end of the cable.

use std::io;
use std::net::IpAddr;
use std::os::fd::{FromRawFd as _, OwnedFd};

use fence_common::hash::HashKind;
use fence_common::wire::{DEFAULT_GROUP_V4, DEFAULT_GROUP_V6, DEFAULT_PORT, FAMILY_V4, FAMILY_V6, Op, Request};
use nix::libc;
use zerocopy::{FromZeros as _, IntoBytes as _};

use crate::bench::key;

/// The parts of a frame. The default is the stock client's frame.
#[derive(Clone, Debug)]
pub(crate) struct Frame {
    /// Destination MAC address; `None` for the group's.
    pub(crate) mac: Option<[u8; 6]>,
    /// VLAN tags, the outer one first: Ethernet type and tag.
    pub(crate) tags: Vec<[u16; 2]>,
    pub(crate) source: IpAddr,
    /// The callback address, where it is not the source.
    pub(crate) callback: Option<IpAddr>,
    pub(crate) ttl: u8,
    /// IPv4: flags and fragment offset.
    pub(crate) fragment: u16,
    /// IPv4 options, or IPv6 extension headers; the first of these is of the type in `extension`.
    pub(crate) options: Vec<u8>,
    pub(crate) extension: u8,
    pub(crate) source_port: u16,
    /// A number that is added to the IPv4 header's checksum.
    pub(crate) ip_checksum: u16,
    pub(crate) udp_checksum: UdpChecksum,
    /// A number that is added to the UDP length.
    pub(crate) udp_len: i16,
    /// A number that is added to the IP length.
    pub(crate) ip_len: i16,
    /// Bytes after the IP packet.
    pub(crate) trailer: usize,
    /// Whether the digest is wrong.
    pub(crate) forged: bool,
    /// The number of requests of 176 bytes in the payload. The receiver splits them, as with a
    /// guest's driver.
    pub(crate) segments: usize,
    /// The number of payload bytes after the requests.
    pub(crate) more: usize,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum UdpChecksum {
    Right,
    Wrong,
    Zero,
}

/// The guest's address.
pub(crate) fn guest(v6: bool) -> IpAddr {
    if v6 { [0xfd00, 0x122, 0, 0, 0, 0, 0, 11].into() } else { [192, 168, 122, 11].into() }
}

impl Frame {
    pub(crate) fn new(v6: bool) -> Self {
        Self {
            mac: None,
            tags: Vec::new(),
            source: guest(v6),
            callback: None,
            ttl: 2,
            fragment: 0,
            options: Vec::new(),
            extension: 0,
            source_port: 40_000,
            ip_checksum: 0,
            udp_checksum: UdpChecksum::Right,
            udp_len: 0,
            ip_len: 0,
            trailer: 0,
            forged: false,
            segments: 1,
            more: 0,
        }
    }

    fn request(&self, seqno: u32) -> Request {
        let mut request = Request::new_zeroed();
        request.op = Op::Status.to_wire();
        request.domain[..4].copy_from_slice(b"test");
        request.port = DEFAULT_PORT.into();
        request.seqno = seqno.into();
        match self.callback.unwrap_or(self.source) {
            IpAddr::V4(ip) => {
                request.family = FAMILY_V4.into();
                request.address[..4].copy_from_slice(&ip.octets());
            }
            IpAddr::V6(ip) => {
                request.family = FAMILY_V6.into();
                request.address[..16].copy_from_slice(&ip.octets());
            }
        }
        key().sign(HashKind::Sha256, &mut request);
        if self.forged {
            request.hash[0] ^= 1;
        }
        request
    }

    /// The frame, and the offsets of its IP and UDP headers.
    pub(crate) fn bytes(&self, seqno: u32) -> (Vec<u8>, usize, usize) {
        let mut udp = [self.source_port.to_be_bytes(), DEFAULT_PORT.to_be_bytes()].concat();
        let payload = [self.request(seqno).as_bytes().repeat(self.segments), vec![0x5a; self.more]].concat();
        let len = u16::try_from(8 + payload.len()).unwrap();
        udp.extend(len.wrapping_add_signed(self.udp_len).to_be_bytes());
        udp.extend([0, 0]);
        udp.extend(payload);
        let addresses: Vec<u8> = match self.source {
            IpAddr::V4(source) => [source.octets(), DEFAULT_GROUP_V4].concat(),
            IpAddr::V6(source) => [source.octets(), DEFAULT_GROUP_V6].concat(),
        };
        let pseudo = [addresses.as_slice(), &17_u32.to_be_bytes(), &u32::from(len).to_be_bytes()].concat();
        let checksum = if self.segments > 1 || self.more > 0 {
            // Each segment completes the checksum.
            !sum(&pseudo, 0)
        } else {
            match sum(&udp, u64::from(!sum(&pseudo, 0))) {
                0 => 0xffff,
                other => other,
            }
        };
        let checksum = match self.udp_checksum {
            UdpChecksum::Right => checksum,
            UdpChecksum::Wrong => checksum ^ 0x1111,
            UdpChecksum::Zero => 0,
        };
        udp[6..8].copy_from_slice(&checksum.to_be_bytes());

        let mac = self.mac.unwrap_or(match self.source {
            IpAddr::V4(_) => [1, 0, 0x5e, 0, 0, 12],
            IpAddr::V6(_) => [0x33, 0x33, 0, 3, 0, 1],
        });
        let mut frame = [mac, [2, 0, 0, 0, 0, 11]].concat();
        for [ether_type, tag] in &self.tags {
            frame.extend([ether_type.to_be_bytes(), tag.to_be_bytes()].concat());
        }
        frame.extend(if self.source.is_ipv4() { [0x08, 0] } else { [0x86, 0xdd] });
        let ip = frame.len();
        let carried = u16::try_from(self.options.len() + udp.len()).unwrap().wrapping_add_signed(self.ip_len);
        if self.source.is_ipv4() {
            let mut header = vec![0x45 + u8::try_from(self.options.len() / 4).unwrap(), 0];
            header.extend((20 + carried).to_be_bytes());
            header.extend([0, 7]);
            header.extend(self.fragment.to_be_bytes());
            header.extend([self.ttl, 17, 0, 0]);
            header.extend(addresses);
            header.extend(&self.options);
            let checksum = sum(&header, 0).wrapping_add(self.ip_checksum).to_be_bytes();
            header[10..12].copy_from_slice(&checksum);
            frame.extend(header);
        } else {
            frame.extend([0x60, 0, 0, 0]);
            frame.extend(carried.to_be_bytes());
            frame.extend([if self.options.is_empty() { 17 } else { self.extension }, self.ttl]);
            frame.extend(addresses);
            frame.extend(&self.options);
        }
        let start = frame.len();
        frame.extend(udp);
        frame.resize(frame.len() + self.trailer, 0xee);
        (frame, ip, start)
    }
}

/// The Internet checksum of `bytes`, begun with `start`.
fn sum(bytes: &[u8], start: u64) -> u16 {
    let words = bytes.chunks(2).map(|word| u64::from(word[0]) << 8 | u64::from(word.get(1).copied().unwrap_or(0)));
    let mut sum = start + words.sum::<u64>();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap()
}

/// A raw socket on an interface.
pub(crate) struct Cable(OwnedFd);

impl Cable {
    pub(crate) fn to(interface: &str) -> Self {
        let check = |result: i32| if result < 0 { panic!("{}", io::Error::last_os_error()) } else { result };
        // SAFETY: there is no safe way to a packet socket here. No pointer is passed; the result is
        // checked.
        let fd = check(unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) });
        // SAFETY: the descriptor is new and nobody else's.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        // SAFETY: plain numbers, for which zero is a value.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = u16::try_from(libc::AF_PACKET).unwrap();
        address.sll_ifindex = i32::try_from(nix::net::if_::if_nametoindex(interface).unwrap()).unwrap();
        let len = u32::try_from(size_of_val(&address)).unwrap();
        // SAFETY: the kernel reads `len` bytes of a live value.
        check(unsafe { libc::bind(fd, (&raw const address).cast(), len) });
        let on: i32 = 1;
        // SAFETY: the kernel reads the four bytes of a live value.
        check(unsafe { libc::setsockopt(fd, libc::SOL_PACKET, libc::PACKET_VNET_HDR, (&raw const on).cast(), 4) });
        Self(socket)
    }

    /// Sends a frame as a guest's network card would.
    pub(crate) fn send(&self, frame: &Frame, seqno: u32) {
        let (bytes, _, udp) = frame.bytes(seqno);
        let mut all = vec![0_u8; 10];
        if frame.segments > 1 || frame.more > 0 {
            // struct virtio_net_hdr: the checksum is incomplete, and the segments are UDP payloads
            // of 176 bytes.
            all[0] = 1;
            all[1] = 5;
            for (at, value) in [(2, udp + 8), (4, 176), (6, udp), (8, 6)] {
                all[at..at + 2].copy_from_slice(&u16::try_from(value).unwrap().to_ne_bytes());
            }
        }
        all.extend(bytes);
        nix::unistd::write(&self.0, &all).unwrap_or_else(|error| panic!("{error}: {frame:?}"));
    }
}
