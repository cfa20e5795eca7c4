//! The key slots, tried one after the other.
//!
//! By `bpf_loop` (kernel 5.17 and later), since the verifier goes through its body once: through a loop of our own it would go once for
//! each slot, and a digest is most of what it has to go through.

use aya_ebpf::helpers::bpf_loop;
use fence_common::boundary::{KEY_SLOTS, NO_KEY_SLOT};
use fence_common::digest::{Scratch, verify};
use fence_common::frame::Keys;
use fence_common::hash::HashKind;
use fence_common::wire::Request;

use crate::maps;

/// The keys in the map.
pub(crate) struct Slots;

/// What a trial works with, and what came of it.
#[repr(C)]
struct Trial {
    request: *const Request,
    scratch: *mut Scratch,
    kind: u32,
    found: u32,
}

impl Keys for Slots {
    #[inline(always)]
    fn verified_by(&self, kind: HashKind, request: &Request, scratch: &mut Scratch) -> Option<u32> {
        let mut trial = Trial { request, scratch, kind: u32::from(kind.to_wire()), found: NO_KEY_SLOT };
        let body: unsafe extern "C" fn(u32, *mut Trial) -> i64 = try_slot;
        // SAFETY: helpers can be called in no other way. The kernel calls `try_slot` with numbers below `KEY_SLOTS` and with this very
        // pointer, before the helper returns; nothing else uses `trial` meanwhile.
        let _ = unsafe { bpf_loop(u32::try_from(KEY_SLOTS).unwrap_or(0), body as *mut _, (&raw mut trial).cast(), 0) };
        if trial.found == NO_KEY_SLOT { None } else { Some(trial.found) }
    }
}

/// Tries one slot. 1 ends the loop.
///
/// # Safety
/// `trial` must be valid, and so must be what it points to, for reading the request and for using the scratch alone.
unsafe extern "C" fn try_slot(index: u32, trial: *mut Trial) -> i64 {
    // SAFETY: the pointer is valid, and nobody else uses what it points to, as the caller vouches for.
    let trial = unsafe { &mut *trial };
    let Some(slot) = maps::KEYS.get(index) else { return 1 };
    let Some(kind) = u8::try_from(trial.kind).ok().and_then(HashKind::from_wire) else { return 1 };
    // SAFETY: the kernel hands on one pointer only, so this one was made from a reference, which lives until the loop is over.
    let request = unsafe { &*trial.request };
    // SAFETY: as before; and the caller's only other use of it is the reference that this pointer was made from.
    let scratch = unsafe { &mut *trial.scratch };
    if verify(slot, kind, request, scratch) {
        trial.found = index;
        return 1;
    }
    0
}
