//! The kernel programs: they recognise fence requests, check their digests, drop what is wrong and hand what is right to the daemon.
//!
//! What decides is [`fence_common::frame`], the same code that user space is tested with. Here is only what the kernel adds: the
//! packet ([`packet`]), the [`maps`], the [`keys`], the [`store`], the [`workspace`], the clock, the ring buffer, and for each of the two programs (XDP
//! and tc) the one place where a verdict becomes its answer.
#![no_std]
#![no_main]
// For the one instruction that the language does not offer on this target: see `workspace`.
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

/// The XDP program, for generic XDP and for old kernels. Its name is that of [`fence_common::boundary::name::XDP`].
#[xdp]
fn fence_xdp(context: XdpContext) -> u32 {
    on_xdp(&context)
}

/// The same for drivers: it says that it takes frames in several pieces, as else a driver has to keep the MTU small. Not for generic XDP: the copy that
/// the kernel makes for it there has no length of the Ethernet header, and tc programs behind it would see frames without one. Its name is
/// that of [`fence_common::boundary::name::XDP_FRAGS`].
#[xdp(frags)]
fn fence_xdp_frags(context: XdpContext) -> u32 {
    on_xdp(&context)
}

#[inline(always)]
fn on_xdp(context: &XdpContext) -> u32 {
    let Some(config) = config() else { return XDP_PASS };
    match act(&XdpFrame::new(context), config) {
        // Consumed: the daemon answers it from the ring buffer, the socket must not see it as well.
        Action::Deliver | Action::Drop => XDP_DROP,
        Action::Pass => XDP_PASS,
    }
}

/// The tc program, for tcx. Its name is that of [`fence_common::boundary::name::TC`].
#[classifier]
fn fence_tc(context: TcContext) -> i32 {
    /// From <linux/bpf.h>: as if this program were not there; whatever else is attached has its turn.
    const TCX_NEXT: i32 = -1;
    /// `TC_ACT_STOLEN` would say better what becomes of a delivered one; but tcx takes it for "next".
    const TCX_DROP: i32 = 2;
    let Some(config) = config() else { return TCX_NEXT };
    let Some(frame) = SkbFrame::new(&context, config) else { return TCX_NEXT };
    match act(&frame, config) {
        Action::Deliver | Action::Drop => TCX_DROP,
        Action::Pass => TCX_NEXT,
    }
}

/// What to recognise and to demand, if somebody has said so.
#[inline(always)]
fn config() -> Option<&'static Config> {
    let config = maps::CONFIG.get(0)?;
    config.rules()?;
    Some(config)
}

/// Judges a frame, counts the verdict, and says what follows from it.
#[inline(always)]
fn act<F: Frame>(frame: &F, config: &Config) -> Action {
    let verdict = judge(frame, config);
    count(verdict);
    verdict.action()
}

#[inline(always)]
fn judge<F: Frame>(frame: &F, config: &Config) -> Verdict {
    let mut datagram = match classify(frame, config) {
        Ok(_) if frame.is_gso() => return Verdict::Gso,
        Ok(datagram) => datagram,
        Err(Verdict::Length) if frame.is_gso() => return Verdict::Gso,
        Err(verdict) if frame.is_foreign() => return verdict.on_segment(true),
        Err(verdict) => return verdict,
    };
    datagram.foreign |= frame.is_foreign();
    // SAFETY: a helper without arguments that is allowed in every program; it is `unsafe` only because all helpers are.
    let now = unsafe { bpf_ktime_get_ns() };
    // This element always exists; without it there is no judging, and what is not judged is not ours.
    let Some(element) = maps::SCRATCH.get_ptr_mut(0) else { return Verdict::NotOurs };
    // SAFETY: the helper gives nothing but a raw pointer. It is not null and points to this CPU's element, which lives as long as the
    // program, is aligned to 8 bytes, and is used in no other way.
    let Some(mut guard) = (unsafe { workspace::Guard::take(element) }) else { return Verdict::Busy };
    let sender = datagram.sender();
    let mut check = store::Check { sender: &sender, datagram_id: datagram.datagram_id(), config, now };
    let decided = decide(&datagram, config, &mut check, &keys::Slots, guard.scratch());
    drop(guard);
    match decided {
        Ok(slot) => {
            let arrival = Arrival { now, ifindex: frame.interface(), slot };
            deliver(&datagram, &sender, config, &arrival).on_segment(datagram.foreign)
        }
        Err(verdict) => {
            if verdict.is_form_rejection() {
                store::refuse(&sender, verdict, now);
            }
            verdict
        }
    }
}

/// What an event tells beside the datagram.
struct Arrival {
    now: u64,
    ifindex: u32,
    slot: u32,
}

/// Hands a request to the daemon, unless it is one too many, or the daemon would not read it.
#[inline(always)]
fn deliver(datagram: &Datagram<'_>, sender: &Sender, config: &Config, arrival: &Arrival) -> Verdict {
    let &Arrival { now, ifindex, slot } = arrival;
    let stale = maps::HEARTBEAT.get(0).is_none_or(|beat| now.saturating_sub(*beat) > STALE_AFTER_NS);
    // What is passed takes no room.
    let scarce = !stale && waiting() > RING_BYTES as u64 / 2;
    if slot == NO_KEY_SLOT {
        // Anybody could have sent it, so it has no part in the reserve.
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
    // After there is room for it, since what is passed for want of room must not be taken for a copy when it is sent again.
    if slot != NO_KEY_SLOT && !store::accept(datagram.datagram_id(), config, now) {
        record.discard(0);
        return Verdict::Replay;
    }
    // SAFETY: zerocopy's checked cast looks at the address, which the verifier forbids. The record has the event's length, the ring
    // buffer aligns records to 8 bytes, `Event` has no invalid values, and the borrow ends before the record is submitted.
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
            // In words: twelve zero bytes become a call of `memset`, as with `memcpy` below.
            event.source = zerocopy::transmute!([u32::from_ne_bytes(source), 0, 0, 0]);
        }
        Source::V6(source) => {
            event.family = FAMILY_V6;
            event.source = source;
        }
    }
    // In two halves: a copy of more than 128 bytewise stores becomes a call of `memcpy`, which libbpf cannot link.
    let (to, from) = (event.request.as_mut_bytes(), datagram.request.as_bytes());
    let ((to_head, to_tail), (from_head, from_tail)) =
        (to.split_at_mut(REQUEST_LEN / 2), from.split_at(REQUEST_LEN / 2));
    to_head.copy_from_slice(from_head);
    to_tail.copy_from_slice(from_tail);
    record.submit(0);
    Verdict::Delivered
}

/// How many bytes of the ring buffer wait to be read.
#[inline(always)]
fn waiting() -> u64 {
    let ring = (&raw const maps::REQUESTS).cast_mut().cast();
    // SAFETY: helpers can be called in no other way. This one reads the positions of the ring buffer that the pointer stands for: the loader
    // puts the map in its place.
    unsafe { bpf_ringbuf_query(ring, u64::from(BPF_RB_AVAIL_DATA)) }
}

#[inline(always)]
fn count(verdict: Verdict) {
    // What is not counted touches no map: other traffic leaves early.
    if verdict == Verdict::NotOurs {
        return;
    }
    if let Some(counters) = maps::COUNTERS.get_ptr_mut(0) {
        // SAFETY: not null, and this CPU's own. User space reads it at any time, each counter in one aligned word, which is written
        // in one. A run that interrupts this one (see `workspace`) may add to the same counter between our reading and writing it; then
        // one of the two is not counted. Nothing is decided by these numbers, which is why they are not worth an atomic addition.
        unsafe { &mut *counters }.count(verdict);
    }
}

/// Nothing here panics; the compiler wants it said what would happen. The verifier refuses a program that could get here.
#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// The kernel lets only programs with a GPL-compatible licence use the clock helper.
// SAFETY: the loader finds the licence by this section's name; it is plain data, NUL-terminated.
#[unsafe(link_section = "license")]
// SAFETY: the symbol must survive though nothing refers to it; no other object is linked, so the name cannot clash.
#[unsafe(no_mangle)]
pub(crate) static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
