//! The kernel programs: they recognise fence requests, check their digests, drop wrong ones and
//! hand right ones to the daemon.
//!
//! [`fence_common::frame`] decides; user space is tested with the same code. This crate adds what
//! only the kernel has: the packet ([`packet`]), the [`maps`], the [`keys`], the [`store`] of the
//! rate limits, the [`workspace`], the clock and the ring buffer. Each program (XDP and tc) has one
//! place that turns a verdict into its answer.
#![no_std]
#![no_main]
// For one instruction that the language does not offer on this target: see `workspace`.
#![feature(asm_experimental_arch)]

mod keys;
mod maps;
mod packet;
mod store;
mod workspace;

use aya_ebpf::bindings::BPF_RB_AVAIL_DATA;
use aya_ebpf::bindings::xdp_action::{XDP_DROP, XDP_PASS};
use aya_ebpf::helpers::{bpf_ktime_get_ns, bpf_ringbuf_query};
use aya_ebpf::macros::{classifier, xdp};
use aya_ebpf::programs::{TcContext, XdpContext};
use fence_common::admit::Source;
use fence_common::boundary::{ABI_VERSION, Config, Event, NO_KEY_SLOT, RING_BYTES};
use fence_common::frame::{Datagram, classify, decide};
use fence_common::rate_limit::{STALE_AFTER_NS, Sender};
use fence_common::verdict::{Action, Verdict};
use fence_common::wire::{FAMILY_V4, FAMILY_V6, REQUEST_LEN};
use zerocopy::IntoBytes;

use crate::packet::{Frame, SkbFrame, XdpFrame};

/// The XDP program for generic XDP and for old kernels ([`fence_common::boundary::name::XDP`]).
#[xdp]
fn fence_xdp(context: XdpContext) -> u32 {
    on_xdp(&context)
}

/// The XDP program for drivers ([`fence_common::boundary::name::XDP_FRAGS`]).
///
/// It declares that it accepts frames in several pieces; otherwise a driver must keep the MTU
/// small. It is not for generic XDP. The kernel's copy for it there loses the Ethernet header's
/// length, so tc programs behind it would see frames without one.
#[xdp(frags)]
fn fence_xdp_frags(context: XdpContext) -> u32 {
    on_xdp(&context)
}

#[inline(always)]
fn on_xdp(context: &XdpContext) -> u32 {
    let Some(config) = config() else { return XDP_PASS };
    match act(&XdpFrame::new(context), config) {
        // The daemon answers a delivered request from the ring buffer; the socket must not see it
        // again.
        Action::Deliver | Action::Drop => XDP_DROP,
        Action::Pass => XDP_PASS,
    }
}

/// The tc program for tcx ([`fence_common::boundary::name::TC`]).
#[classifier]
fn fence_tc(context: TcContext) -> i32 {
    /// From <linux/bpf.h>: the next program decides.
    const TCX_NEXT: i32 = -1;
    /// Also for a delivered request: tcx takes `TC_ACT_STOLEN` for "next".
    const TCX_DROP: i32 = 2;
    let Some(config) = config() else { return TCX_NEXT };
    let Some(frame) = SkbFrame::new(&context, config) else { return TCX_NEXT };
    match act(&frame, config) {
        Action::Deliver | Action::Drop => TCX_DROP,
        Action::Pass => TCX_NEXT,
    }
}

/// The configuration, if the daemon has written one of this version.
#[inline(always)]
fn config() -> Option<&'static Config> {
    let config = maps::CONFIG.get(0)?;
    config.rules()?;
    Some(config)
}

/// Judges a frame, counts the verdict, and returns the action.
#[inline(always)]
fn act<F: Frame>(frame: &F, config: &Config) -> Action {
    let verdict = judge(frame, config);
    count(verdict);
    verdict.action()
}

#[inline(always)]
fn judge<F: Frame>(frame: &F, config: &Config) -> Verdict {
    let datagram = match classify(frame, config) {
        Ok(_) if frame.is_gso() => return Verdict::Gso,
        Ok(_) if frame.is_foreign() => return Verdict::ForeignVlan,
        Ok(datagram) => datagram,
        Err(Verdict::Length) if frame.is_gso() => return Verdict::Gso,
        Err(verdict) if frame.is_foreign() => return verdict.on_segment(true),
        Err(verdict) => return verdict,
    };
    // SAFETY: needed, as all helpers are `unsafe`. This one takes no arguments and every program
    // may call it.
    let now = unsafe { bpf_ktime_get_ns() };
    // The element always exists. Without it nothing is judged, so the frame is passed.
    let Some(element) = maps::SCRATCH.get_ptr_mut(0) else { return Verdict::NotOurs };
    // SAFETY: needed, as the helper gives a raw pointer. It is not null and points to this CPU's
    // element, which lives as long as the program, is aligned to 8 bytes, and is used in no other
    // way.
    let Some(mut guard) = (unsafe { workspace::Guard::take(element) }) else { return Verdict::Busy };
    let sender = datagram.sender();
    let mut check = store::Check { sender: &sender, datagram_id: datagram.datagram_id(), config, now };
    let decided = decide(&datagram, config, &mut check, &keys::Slots, guard.scratch());
    drop(guard);
    match decided {
        Ok(slot) => {
            let arrival = Arrival { now, ifindex: frame.interface(), slot };
            deliver(&datagram, &sender, config, &arrival)
        }
        Err(verdict) => {
            if verdict.is_form_rejection() {
                store::refuse(&sender, verdict, now);
            }
            verdict
        }
    }
}

/// What an event says beside the datagram.
struct Arrival {
    now: u64,
    ifindex: u32,
    slot: u32,
}

/// Delivers a request to the daemon, unless a limit forbids it or the daemon's heartbeat is too
/// old.
#[inline(always)]
fn deliver(datagram: &Datagram<'_>, sender: &Sender, config: &Config, arrival: &Arrival) -> Verdict {
    let &Arrival { now, ifindex, slot } = arrival;
    let stale = maps::HEARTBEAT.get(0).is_none_or(|beat| now.saturating_sub(*beat) > STALE_AFTER_NS);
    // A request that is passed takes no room.
    let scarce = !stale && waiting() > RING_BYTES as u64 / 2;
    if slot == NO_KEY_SLOT {
        // Anybody can have sent it, so it has no share of the reserve.
        if scarce {
            return Verdict::RingFull;
        }
    } else if let Err(verdict) = store::before_delivery(sender, config, scarce, now) {
        return verdict;
    }
    if stale {
        return Verdict::Stale;
    }
    let Some(mut record) = maps::REQUESTS.reserve_bytes(size_of::<Event>(), 0) else { return Verdict::RingFull };
    // Only once there is room: a request that is passed for want of room must not be a duplicate
    // when it is sent again.
    if slot != NO_KEY_SLOT && !store::accept(datagram.datagram_id(), config, now) {
        record.discard(0);
        return Verdict::Replay;
    }
    // SAFETY: needed, as zerocopy's checked cast looks at the address, which the verifier forbids.
    // The record has the event's length, the ring buffer aligns records to 8 bytes, `Event` has no
    // invalid values, and the borrow ends before the record is submitted.
    let event = unsafe { &mut *record.as_mut_ptr().cast::<Event>() };
    event.arrived_ns = now;
    event.abi = ABI_VERSION;
    event.ifindex = ifindex;
    event.slot = slot;
    event.mac = sender.mac;
    event.reserved = [0; 2];
    match datagram.source {
        Source::V4(source) => {
            event.family = FAMILY_V4;
            // As words: the compiler turns twelve zero bytes into a call of `memset`, as with
            // `memcpy` below.
            event.source = zerocopy::transmute!([u32::from_ne_bytes(source), 0, 0, 0]);
        }
        Source::V6(source) => {
            event.family = FAMILY_V6;
            event.source = source;
        }
    }
    // In two halves: more than 128 bytewise stores become a call of `memcpy`, which libbpf cannot
    // link.
    let (to, from) = (event.request.as_mut_bytes(), datagram.request.as_bytes());
    let ((to_head, to_tail), (from_head, from_tail)) =
        (to.split_at_mut(REQUEST_LEN / 2), from.split_at(REQUEST_LEN / 2));
    to_head.copy_from_slice(from_head);
    to_tail.copy_from_slice(from_tail);
    record.submit(0);
    Verdict::Delivered
}

/// How many bytes of the ring buffer are unread.
#[inline(always)]
fn waiting() -> u64 {
    let ring = (&raw const maps::REQUESTS).cast_mut().cast();
    // SAFETY: needed, as helpers can be called in no other way. This one reads the positions of the
    // ring buffer behind the pointer, where the loader puts the map.
    unsafe { bpf_ringbuf_query(ring, u64::from(BPF_RB_AVAIL_DATA)) }
}

#[inline(always)]
fn count(verdict: Verdict) {
    // Other traffic leaves here, without touching a map.
    if verdict == Verdict::NotOurs {
        return;
    }
    if let Some(counters) = maps::COUNTERS.get_ptr_mut(0) {
        // SAFETY: needed, as the helper gives a raw pointer. It is not null, and the element is
        // this CPU's own. User space reads it at any time; each counter is one aligned word that is
        // written at once. A run that interrupts this one may add to the same counter, and then one
        // of the two is lost. Nothing is decided by these numbers, so an atomic addition is not
        // worth its cost.
        unsafe { &mut *counters }.count(verdict);
    }
}

/// Required by the compiler. The verifier refuses a program that can get here.
#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// The kernel allows the clock helper only to programs with a GPL-compatible licence.
// SAFETY: needed, as the loader finds the licence by this section's name. It is plain data with a
// NUL at its end.
#[unsafe(link_section = "license")]
// SAFETY: needed, as nothing refers to the symbol and it must survive. No other object is linked,
// so the name cannot clash.
#[unsafe(no_mangle)]
pub(crate) static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
