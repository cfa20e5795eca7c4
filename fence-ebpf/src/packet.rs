//! The packet of an XDP context: the only place with packet pointers.

use core::hint::black_box;

use aya_ebpf::programs::XdpContext;
use fence_common::frame::Packet;

/// No length that a header can tell is larger, other headers in front of it included.
const LEN_MAX: usize = 0x1_ffff;

/// The bytes between `data` and `data_end`.
pub(crate) struct XdpPacket<'c>(&'c XdpContext);

impl<'c> XdpPacket<'c> {
    /// The packet of this run of the program.
    #[inline(always)]
    pub(crate) fn new(context: &'c XdpContext) -> Self {
        Self(context)
    }
}

impl Packet for XdpPacket<'_> {
    #[inline(always)]
    fn bytes<const N: usize>(&self, offset: usize) -> Option<&[u8; N]> {
        let start = self.0.data() + offset;
        if start + N > self.0.data_end() {
            return None;
        }
        // SAFETY: there is no other way to a packet's bytes. `data..data_end` is readable for as long as the program runs and does
        // not move the packet's ends, which nothing here does; the reference borrows from the context. `N` bytes were just checked
        // to lie inside (the verifier proves that again), and bytes have no alignment and no bad values.
        Some(unsafe { &*(start as *const [u8; N]) })
    }

    #[inline(always)]
    fn holds(&self, len: usize) -> bool {
        // A length from a header: if the compiler saw through this comparison it would conclude that fixed parts lie inside too
        // and leave out their checks, which the verifier (it does not conclude from variable lengths) insists on.
        // The verifier of Linux 6.1 does not know any more, behind the barrier, that it has an upper bound: the mask says it again.
        self.0.data() + (black_box(len) & LEN_MAX) <= self.0.data_end()
    }
}
