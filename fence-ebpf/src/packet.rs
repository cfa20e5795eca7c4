//! The packet of a run, for XDP and for tc. Packet pointers occur only here.

use core::arch::asm;
use core::hint::black_box;
use core::mem::offset_of;

use aya_ebpf::bindings::{__sk_buff, xdp_md};
use aya_ebpf::programs::{TcContext, XdpContext};
use fence_common::boundary::Config;
use fence_common::frame::{FRAME_MAX, Packet, classify};
use fence_common::verdict::Verdict;

/// A mask above every length that a header can state, with other headers in front of it.
const LEN_MAX: usize = 0x1_ffff;

/// A run's packet, and what the kernel says about it beside its bytes.
pub(crate) trait Frame: Packet {
    /// The index of the interface that received it.
    fn interface(&self) -> u32;

    /// Whether it had a VLAN tag that is not among its bytes any more.
    fn is_foreign(&self) -> bool;

    /// Whether the kernel says that several packets were joined into this one (GSO).
    fn is_gso(&self) -> bool;
}

/// One of a packet's ends: the context's field of 32 bits that stands for a whole pointer.
///
/// It takes one load. The compiler would make a load and a copy of its lower half, which the
/// verifier does not accept as a pointer.
///
/// # Safety
/// `context` must be the context that the kernel gave this run.
#[inline(always)]
unsafe fn end<C, const OFFSET: usize>(context: *const C) -> usize {
    let end: usize;
    // SAFETY: needed, as the compiler chooses other instructions. The verifier knows contexts and
    // allows only reads that are valid.
    unsafe {
        asm!("{end} = *(u32 *)({context} + {offset})",
            end = out(reg) end, context = in(reg) context, offset = const OFFSET, options(pure, readonly, nostack));
    };
    end
}

/// Implements [`Packet`] for a type with `start`, `end` and a length.
macro_rules! packet {
    ($frame:ident, $len:expr) => {
        impl Packet for $frame<'_> {
            #[inline(always)]
            fn bytes<const N: usize>(&self, offset: usize) -> Option<&[u8; N]> {
                let start = self.start() + offset;
                if start + N > self.end() {
                    return None;
                }
                // SAFETY: needed, as a packet's bytes are behind raw pointers only.
                // `data..data_end` is readable as long as the program runs and does not move the
                // packet's ends. Nothing does while a reference borrows from the frame. The check
                // above proves that the `N` bytes lie inside, the verifier proves it again, and
                // bytes have neither alignment nor invalid values.
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

/// The bytes between `data` and `data_end`. Of a frame in several pieces (MTUs above 3 KiB) that is
/// the first one, which is longer than a request. A frame that should be longer than it is
/// malformed, and is passed.
pub(crate) struct XdpFrame<'c>(&'c XdpContext);

impl<'c> XdpFrame<'c> {
    /// The packet of this run of the program.
    #[inline(always)]
    pub(crate) fn new(context: &'c XdpContext) -> Self {
        Self(context)
    }

    #[inline(always)]
    fn start(&self) -> usize {
        // SAFETY: the context is the one that aya got from the kernel.
        unsafe { end::<_, { offset_of!(xdp_md, data) }>(self.0.ctx) }
    }

    #[inline(always)]
    fn end(&self) -> usize {
        // SAFETY: as above.
        unsafe { end::<_, { offset_of!(xdp_md, data_end) }>(self.0.ctx) }
    }
}

// A length from a header. If the compiler saw through this comparison, it would infer that fixed
// parts lie inside too and omit their checks. The verifier does not infer from variable lengths and
// requires them. Linux 6.1's verifier forgets the upper bound behind the barrier, so the mask
// states it again.
packet!(XdpFrame, |frame, len| frame.start() + (black_box(len) & LEN_MAX) <= frame.end());

impl Frame for XdpFrame<'_> {
    #[inline(always)]
    fn interface(&self) -> u32 {
        u32::try_from(self.0.ingress_ifindex()).unwrap_or(0)
    }

    #[inline(always)]
    fn is_foreign(&self) -> bool {
        // XDP cannot tell, so there is no XDP program on an interface with a VLAN on top.
        false
    }

    #[inline(always)]
    fn is_gso(&self) -> bool {
        // The length tells: see [`Verdict::Gso`].
        false
    }
}

/// The first piece of a socket buffer, from the Ethernet header on. The rest counts for its length
/// only.
pub(crate) struct SkbFrame<'c>(&'c TcContext);

/// The bytes of an Ethernet header, a VLAN tag and an IPv6 header: they say whether a frame may be
/// ours.
const HEAD: u32 = 14 + 4 + 40;

impl<'c> SkbFrame<'c> {
    /// The packet of this run, if it came from the network, with an Ethernet header. A packet that
    /// this host sends to itself has none.
    ///
    /// If a request lies in several pieces they are joined. Other traffic is not touched.
    #[inline(always)]
    pub(crate) fn new(context: &'c TcContext, config: &Config) -> Option<Self> {
        /// From <linux/if_packet.h>.
        const PACKET_LOOPBACK: u32 = 5;
        let frame = Self(context);
        if frame.skb().pkt_type == PACKET_LOOPBACK {
            return None;
        }
        // Network cards keep at least the headers in one piece; the stack would join them next.
        frame.bring_together(HEAD);
        if frame.is_in_pieces(FRAME_MAX) && matches!(classify(&frame, config), Err(Verdict::Malformed)) {
            // To our group and port, and not in one piece. If the kernel lacks memory, the stack
            // gets it as it is.
            frame.bring_together(FRAME_MAX);
        }
        Some(frame)
    }

    /// Whether some of the first `len` bytes lie in another piece.
    #[inline(always)]
    fn is_in_pieces(&self, len: u32) -> bool {
        self.start() + (len.min(self.0.len()) as usize) > self.end()
    }

    /// Joins the first `len` bytes, or as many as there are. No reference to the packet may be kept
    /// across.
    #[inline(always)]
    fn bring_together(&self, len: u32) {
        if self.is_in_pieces(len) {
            let _ = self.0.pull_data(len.min(self.0.len()));
        }
    }

    #[inline(always)]
    fn start(&self) -> usize {
        // SAFETY: the context is the one that aya got from the kernel.
        unsafe { end::<_, { offset_of!(__sk_buff, data) }>(self.0.skb.skb) }
    }

    #[inline(always)]
    fn end(&self) -> usize {
        // SAFETY: as above.
        unsafe { end::<_, { offset_of!(__sk_buff, data_end) }>(self.0.skb.skb) }
    }

    #[inline(always)]
    fn skb(&self) -> &__sk_buff {
        // SAFETY: needed, as the context is a raw pointer in aya too. The kernel gave it to this
        // run. Each access to a field becomes a read that the verifier checks, and nothing here
        // writes one.
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
