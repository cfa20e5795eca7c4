//! Frames whose bytes are in several pieces, as network cards deliver them. A tap device makes such
//! frames on demand.

use std::fs::File;
use std::io::{IoSlice, Write as _};
use std::os::fd::AsRawFd as _;
use std::time::Duration;

use fence_common::verdict::Counters;
use fence_daemon::clock::Moment;
use fence_daemon::intake::kernel::{Mode, Ring};
use nix::libc;

use crate::bench::{in_namespace, ip, load};
use crate::frames::Frame;

/// A tap device `tap9`, up, whose frames consist of the pieces in which they are written.
struct Tap(File);

impl Tap {
    fn new() -> Self {
        // From <linux/if_tun.h>.
        const IFF_NAPI: i32 = 0x10;
        const IFF_NAPI_FRAGS: i32 = 0x20;
        let file = File::options().read(true).write(true).open("/dev/net/tun");
        let file = file.unwrap_or_else(|error| panic!("/dev/net/tun: {error}. Remedy: modprobe tun"));
        // SAFETY: plain numbers, for which zero is a value.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(b"tap9") {
            *to = libc::c_char::try_from(*from).unwrap();
        }
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | IFF_NAPI | IFF_NAPI_FRAGS;
        request.ifr_ifru.ifru_flags = libc::c_short::try_from(flags).unwrap();
        // SAFETY: there is no safe way to this call here. The kernel reads and writes a live
        // `ifreq`, which is what it expects.
        let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
        assert!(result >= 0, "{}", std::io::Error::last_os_error());
        ip("link set tap9 up");
        Self(file)
    }

    /// A frame in two pieces, the first of this length, as if it came from the network.
    fn receive(&mut self, frame: &[u8], first: usize) {
        let (head, tail) = frame.split_at(first);
        let written = self.0.write_vectored(&[IoSlice::new(head), IoSlice::new(tail)]).unwrap();
        assert_eq!(written, frame.len());
    }
}

/// The number of ring buffer entries, each checked against the sent request.
fn events(ring: &mut Ring, seqno: u32) -> usize {
    let mut count = 0;
    while let Some(event) = ring.next() {
        let event = event.unwrap();
        assert_eq!((event.request.seqno.get(), event.request.domain.starts_with(b"test\0")), (seqno, true));
        assert_eq!(event.ifindex, nix::net::if_::if_nametoindex("tap9").unwrap());
        count += 1;
    }
    count
}

/// The number of IP datagrams from the interface that the stack did not drop for their form.
fn frames_seen() -> u64 {
    std::fs::read_to_string("/proc/thread-self/net/dev")
        .unwrap()
        .lines()
        .find_map(|line| line.trim().strip_prefix("tap9:")?.split_whitespace().nth(1)?.parse().ok())
        .unwrap()
}

/// Every split of a good request is delivered, and every split of a forged one is dropped.
#[test]
fn a_request_in_pieces_is_put_together() {
    in_namespace(|| {
        let mut program = load();
        let mut ring = program.take_ring().unwrap().unwrap();
        // The test has no daemon that shows signs of life.
        ring.beat(Moment::now().plus(Duration::from_secs(3600)));
        let mut tap = Tap::new();
        program.attach("tap9", Mode::Tcx).unwrap();
        let mut expected = Counters::default();
        let mut seqno = 0;
        for v6 in [false, true] {
            for tags in [vec![], vec![[0x8100, 0xa000]]] {
                let good = Frame { tags, ..Frame::new(v6) };
                let len = good.bytes(0).0.len();
                // The kernel needs the Ethernet header in one piece.
                for first in (14..len).step_by(3).chain([len - 1]) {
                    seqno += 1;
                    let before = frames_seen();
                    tap.receive(&good.bytes(seqno).0, first);
                    tap.receive(&Frame { forged: true, ..good.clone() }.bytes(seqno).0, first);
                    let longer = Frame { more: 2000, ..good.clone() };
                    tap.receive(&longer.bytes(seqno).0, first);
                    expected.delivered += 1;
                    expected.drop_digest += 1;
                    expected.drop_length += 1;
                    for _ in 0..1000 {
                        if program.counters().unwrap() == expected {
                            break;
                        }
                        std::thread::sleep(Duration::from_millis(10));
                    }
                    let counters = program.counters().unwrap();
                    assert_eq!(counters, expected, "cut after {first} of {len} bytes, {good:?}");
                    assert_eq!(events(&mut ring, seqno), 1, "cut after {first} of {len} bytes, {good:?}");
                    assert_eq!(frames_seen(), before + 3);
                }
            }
        }
    });
}
