//! The key slots, tried one after the other.

use fence_common::boundary::KEY_SLOTS;
use fence_common::digest::{Scratch, matches, stage};
use fence_common::frame::Keys;
use fence_common::hash::HashKind;
use fence_common::wire::Request;

use crate::maps;

/// The keys in the map.
pub(crate) struct Slots;

impl Keys for Slots {
    #[inline(always)]
    fn verified_by(&self, kind: HashKind, request: &Request, scratch: &mut Scratch) -> Option<u32> {
        stage(request, scratch);
        (0..KEY_SLOTS as u32).find(|index| maps::KEYS.get(*index).is_some_and(|slot| matches(slot, kind, scratch)))
    }
}
