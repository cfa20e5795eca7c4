//! The key slots, tried one after the other.

use fence_common::boundary::KEY_SLOTS;
use fence_common::digest::{Scratch, matches, stage};
use fence_common::frame::Verifier;
use fence_common::hash::HashKind;
use fence_common::wire::Request;

use crate::maps;

/// The keys in the map.
pub(crate) struct Slots;

impl Verifier for Slots {
    #[inline(always)]
    fn matching_slot(&self, kind: HashKind, request: &Request, scratch: &mut Scratch) -> Option<u32> {
        const { assert!(KEY_SLOTS == 2) };
        stage(request, scratch);
        // Written out: the verifier would have to be shown that a loop ends.
        if is_good(0, kind, scratch) {
            Some(0)
        } else if is_good(1, kind, scratch) {
            Some(1)
        } else {
            None
        }
    }
}

/// Whether the staged request's digest is right with the key in this slot.
#[inline(always)]
fn is_good(index: u32, kind: HashKind, scratch: &mut Scratch) -> bool {
    maps::KEYS.get(index).is_some_and(|slot| matches(slot, kind, scratch))
}
