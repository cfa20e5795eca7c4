//! The packet of a run, as XDP has it and as tc has it: the only place with packet pointers.

use core::arch::asm;
use core::hint::black_box;
use core::mem::offset_of;

use aya_ebpf::bindings::{__sk_buff, xdp_md};
use aya_ebpf::programs::{TcContext, XdpContext};
use fence_common::boundary::Config;
use fence_common::frame::{FRAME_MAX, Packet, classify};
use fence_common::verdict::Verdict;

/// No length that a header can tell is larger, other headers in front of it included.
const LEN_MAX: usize = 0x1_ffff;

/// What a run of a program is about: a packet, and what the kernel says of it beside its bytes.
pub(crate) trait Frame: Packet {
    /// The number of the interface that it came by.
    fn interface(&self) -> u32;

    /// Whether it carried the tag of a VLAN that is not among its bytes any more.
    fn is_foreign(&self) -> bool;

    /// Whether the kernel says that these are several packets that were joined to one.
    fn is_gso(&self) -> bool;
}

/// One of a packet's two ends, as the context has it: a field of 32 bits that stands for a whole pointer.
///
/// In one load: left to the compiler it becomes one and a copy of its lower half, and the verifier does not take that for a pointer.
///
/// # Safety
/// `context` must be the context that the kernel gave this run.
#[inline(always)]
unsafe fn end<C, const OFFSET: usize>(context: *const C) -> usize {
    let end: usize;
    // SAFETY: there is no other way to have this one instruction. The verifier knows contexts, and lets it read what it may read and nothing else.
    unsafe {
        asm!("{end} = *(u32 *)({context} + {offset})",
            end = out(reg) end, context = in(reg) context, offset = const OFFSET, options(pure, readonly, nostack));
    };
    end
}

/// Implements [`Packet`] for what has `start`, `end` and a length.
macro_rules! packet {
    ($frame:ident, $len:expr) => {
        impl Packet for $frame<'_> {
            #[inline(always)]
            fn bytes<const N: usize>(&self, offset: usize) -> Option<&[u8; N]> {
                let start = self.start() + offset;
                if start + N > self.end() {
                    return None;
                }
                // SAFETY: there is no other way to a packet's bytes. `data..data_end` is readable for as long as the program runs and does
                // not move the packet's ends, which nothing does while there is a reference that borrows from the frame. `N` bytes
                // were just checked to lie inside (the verifier proves that again), and bytes have no alignment and no bad values.
                Some(unsafe { &*(start as *const [u8; N]) })
            }

            #[inline(always)]
            fn holds(&self, len: usize) -> bool {
                let holds: fn(&Self, usize) -> bool = $len;
                holds(self, len)
            }
        }
    };
}

/// The bytes between `data` and `data_end`. Of a frame in several pieces (MTUs above 3 KiB) that is the first one, which holds more than a request
/// is long; a frame that should be longer than it counts as malformed, and is passed.
pub(crate) struct XdpFrame<'c>(&'c XdpContext);

impl<'c> XdpFrame<'c> {
    /// The packet of this run of the program.
    #[inline(always)]
    pub(crate) fn new(context: &'c XdpContext) -> Self {
        Self(context)
    }

    #[inline(always)]
    fn start(&self) -> usize {
        // SAFETY: it is the context that aya got from the kernel.
        unsafe { end::<_, { offset_of!(xdp_md, data) }>(self.0.ctx) }
    }

    #[inline(always)]
    fn end(&self) -> usize {
        // SAFETY: as above.
        unsafe { end::<_, { offset_of!(xdp_md, data_end) }>(self.0.ctx) }
    }
}

// A length from a header: if the compiler saw through this comparison it would conclude that fixed parts lie inside too and leave out their
// checks, which the verifier (it does not conclude from variable lengths) insists on. That of Linux 6.1 does not know any more, behind the
// barrier, that there is an upper bound: the mask says it again.
packet!(XdpFrame, |frame, len| frame.start() + (black_box(len) & LEN_MAX) <= frame.end());

impl Frame for XdpFrame<'_> {
    #[inline(always)]
    fn interface(&self) -> u32 {
        u32::try_from(self.0.ingress_ifindex()).unwrap_or(0)
    }

    #[inline(always)]
    fn is_foreign(&self) -> bool {
        // Nobody tells: that is why there is no XDP program on an interface with a VLAN on top.
        false
    }

    #[inline(always)]
    fn is_gso(&self) -> bool {
        // Seen by the length: see [`Verdict::Gso`].
        false
    }
}

/// What of a socket buffer lies in one piece, from the Ethernet header on. The rest counts for its length only.
pub(crate) struct SkbFrame<'c>(&'c TcContext);

/// So many bytes hold the Ethernet header, a VLAN tag, and an IPv6 header: what says whether a frame may be ours.
const HEAD: u32 = 14 + 4 + 40;

impl<'c> SkbFrame<'c> {
    /// The packet of this run of the program, if it is one from the network: with an Ethernet header. What this host has sent and hears
    /// itself has none.
    ///
    /// Where the bytes of a request lie in several pieces they are brought together, and nobody else's are touched.
    #[inline(always)]
    pub(crate) fn new(context: &'c TcContext, config: &Config) -> Option<Self> {
        /// From <linux/if_packet.h>.
        const PACKET_LOOPBACK: u32 = 5;
        let frame = Self(context);
        if frame.skb().pkt_type == PACKET_LOOPBACK {
            return None;
        }
        // Network cards leave headers in one piece at least; the stack would bring them together next.
        frame.bring_together(HEAD);
        if frame.is_in_pieces(FRAME_MAX) && matches!(classify(&frame, config), Err(Verdict::Malformed)) {
            // To our group and port, and not all there. If the kernel has no memory for it, the stack gets it as it is.
            frame.bring_together(FRAME_MAX);
        }
        Some(frame)
    }

    /// Whether of the first `len` bytes some lie elsewhere.
    #[inline(always)]
    fn is_in_pieces(&self, len: u32) -> bool {
        self.start() + (len.min(self.0.len()) as usize) > self.end()
    }

    /// Brings the first `len` bytes, or as many as there are, into one piece. No reference to the packet may be kept across.
    #[inline(always)]
    fn bring_together(&self, len: u32) {
        if self.is_in_pieces(len) {
            let _ = self.0.pull_data(len.min(self.0.len()));
        }
    }

    #[inline(always)]
    fn start(&self) -> usize {
        // SAFETY: it is the context that aya got from the kernel.
        unsafe { end::<_, { offset_of!(__sk_buff, data) }>(self.0.skb.skb) }
    }

    #[inline(always)]
    fn end(&self) -> usize {
        // SAFETY: as above.
        unsafe { end::<_, { offset_of!(__sk_buff, data_end) }>(self.0.skb.skb) }
    }

    #[inline(always)]
    fn skb(&self) -> &__sk_buff {
        // SAFETY: the context is a pointer in aya too. It is the one that the kernel gave this run; each access of a field becomes a read that
        // the verifier checks, and nothing here writes any.
        unsafe { &*self.0.skb.skb }
    }
}

packet!(SkbFrame, |frame, len| black_box(len) <= frame.0.len() as usize);

impl Frame for SkbFrame<'_> {
    #[inline(always)]
    fn interface(&self) -> u32 {
        self.skb().ifindex
    }

    #[inline(always)]
    fn is_foreign(&self) -> bool {
        // VLAN 0 is no VLAN: such a tag carries a priority only.
        self.skb().vlan_present != 0 && self.skb().vlan_tci & 0x0fff != 0
    }

    #[inline(always)]
    fn is_gso(&self) -> bool {
        self.skb().gso_size != 0
    }
}
