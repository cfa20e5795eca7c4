//! The kernel program's slots for keys, written while it runs.

use aya::maps::{Array, MapData};
use fence_common::boundary::name;
use fence_common::digest::KeySlot;

use super::{Error, map_error};
use crate::intake::keyring::Slots;

/// The map with the keys.
pub struct KeyMap(pub(super) Array<MapData, [u8; size_of::<KeySlot>()]>);

impl Slots for KeyMap {
    fn put(&mut self, slot: u32, content: &KeySlot) -> Result<(), Error> {
        // The kernel reads the bytes in place, so no copy of a key remains.
        let bytes: &[u8; size_of::<KeySlot>()] = zerocopy::transmute_ref!(content);
        self.0.set(slot, bytes, 0).map_err(map_error(name::KEYS))
    }
}
