//! The keys in force, in user space and in the kernel programs. Both change to new keys without a
//! moment in which a kept key is refused.
//!
//! [`fence_common::keys`] decides the steps; this module carries them out.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, RwLock};

use fence_common::boundary::empty_slot;
use fence_common::digest::{KeySlot, PreparedKey};
use fence_common::key::Key;
use fence_common::keys::{GroupKey, KeyOwner, KeyPair, Keys};
use fence_common::sync::{lock, unpoisoned};
use fence_common::wire::Request;

use super::kernel;

/// The kernel program's slots for keys.
pub trait Slots: Send {
    /// Writes the content of a slot. A run of the program may see half of it and half of the old
    /// content.
    ///
    /// # Errors
    /// The kernel refuses; the slot is unchanged.
    fn put(&mut self, slot: u32, content: &KeySlot) -> Result<(), kernel::Error>;
}

/// Why the new keys are not in force, or an old one is not wiped.
#[derive(Debug, thiserror::Error)]
pub enum RotationError {
    /// The old keys are in force.
    #[error("the kernel program rejects the new keys")]
    Refused(#[source] kernel::Error),
    /// The new keys are in force. The kernel program still lets an old one pass, but user space
    /// refuses it.
    #[error("an old key cannot be wiped from the kernel program; what is signed with it is refused all the same")]
    NotWiped(#[source] kernel::Error),
}

/// What a change of keys came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rotated {
    /// How many keys are accepted that were not.
    pub added: usize,
    /// How many keys are dropped. They are wiped from the kernel at once, and from here when the
    /// last request that was signed with one is over.
    pub dropped: usize,
    /// How many are accepted now.
    pub accepted: usize,
}

impl Rotated {
    /// This change and another one.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self {
            added: self.added.saturating_add(other.added),
            dropped: self.dropped.saturating_add(other.dropped),
            accepted: self.accepted.saturating_add(other.accepted),
        }
    }
}

/// The keys in force. Clones are the same ones.
#[derive(Clone)]
pub struct Keyring(Arc<SharedKeys>);

struct SharedKeys {
    keys: RwLock<Arc<Keys>>,
    /// The groups' own keys. The kernel program does not know them: it is not loaded if there are
    /// any.
    groups: RwLock<Arc<Vec<GroupKey>>>,
    /// Those of each kernel program that uses these keys. Held while keys change: one change at a
    /// time, and none while a kernel program gets its first ones.
    slots: Mutex<Vec<Box<dyn Slots>>>,
}

impl Keyring {
    /// A ring of keys that no kernel program knows yet. Without keys nothing is verified.
    #[must_use]
    pub fn new(keys: Option<KeyPair>) -> Self {
        let keys = keys.map_or_else(Keys::default, Keys::from);
        Self(Arc::new(SharedKeys {
            keys: RwLock::new(Arc::new(keys)),
            groups: RwLock::default(),
            slots: Mutex::default(),
        }))
    }

    /// The keys that are accepted at this moment.
    #[must_use]
    pub fn current(&self) -> Arc<Keys> {
        let keys = unpoisoned(self.0.keys.read());
        Arc::clone(&keys)
    }

    /// The groups' own keys that are accepted now.
    #[must_use]
    pub fn groups(&self) -> Arc<Vec<GroupKey>> {
        let groups = unpoisoned(self.0.groups.read());
        Arc::clone(&groups)
    }

    /// Accepts these group keys from now on and no others.
    pub fn set_groups(&self, groups: Vec<GroupKey>) -> Rotated {
        let groups = Arc::new(groups);
        let before = {
            let mut place = unpoisoned(self.0.groups.write());
            std::mem::replace(&mut *place, Arc::clone(&groups))
        };
        let missing_in = |there: &[GroupKey], here: &[GroupKey]| {
            here.iter().filter(|key| !there.iter().any(|other| key.is_same(other))).count()
        };
        let (added, dropped) = (missing_in(&before, &groups), missing_in(&groups, &before));
        Rotated { added, dropped, accepted: groups.len() }
    }

    /// The key that a request is signed with, and its owner. `None` if no key fits, or if the
    /// request names no digest.
    #[must_use]
    pub fn verify(&self, request: &Request) -> Option<(Arc<Key>, KeyOwner)> {
        if let Some(key) = self.current().verify(request) {
            return Some((Arc::clone(key), KeyOwner::EVERYBODY));
        }
        let groups = self.groups();
        groups.iter().find(|group| group.key.verify(request)).map(|group| (Arc::clone(&group.key), group.owner))
    }

    /// Gives a kernel program the keys, now and at each change. Call it before the program sees its
    /// first packet.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn connect(&self, mut slots: Box<dyn Slots>) -> Result<(), kernel::Error> {
        let mut place = self.slots();
        for (slot, key) in self.current().in_slots() {
            exchange(&mut *slots, slot, None, key.as_deref())?;
        }
        place.push(slots);
        Ok(())
    }

    /// Changes the keys of several rings, all of them or none. Returns what changed in each.
    ///
    /// # Errors
    /// As [`rotate`](Self::rotate).
    pub fn rotate_all(changes: impl IntoIterator<Item = (Self, KeyPair)>) -> Result<Vec<Rotated>, RotationError> {
        let mut all = Vec::new();
        let (mut done, mut not_wiped): (Vec<(Self, Arc<Keys>)>, _) = (Vec::new(), None);
        for (ring, pair) in changes {
            let before = ring.current();
            match ring.rotate(pair) {
                Ok(rotated) => all.push(rotated),
                Err(error @ RotationError::NotWiped(_)) => not_wiped = Some(error),
                Err(refused @ RotationError::Refused(_)) => {
                    for (ring, before) in done {
                        if let Some(Err(error)) = before.pair().map(|pair| ring.rotate(pair)) {
                            tracing::error!("old keys cannot be put back: {error}");
                        }
                    }
                    return Err(refused);
                }
            }
            done.push((ring, before));
        }
        not_wiped.map_or(Ok(all), Err)
    }

    /// Accepts these keys from now on and no others.
    ///
    /// # Errors
    /// See [`RotationError`].
    pub fn rotate(&self, pair: KeyPair) -> Result<Rotated, RotationError> {
        let mut slots = self.slots();
        let before = self.current();
        let change = before.change(pair);
        self.publish(change.during);
        let (filled, emptied): (Vec<_>, Vec<_>) = change.writes.iter().partition(|(_, key)| key.is_some());
        let old = |slot: u32| before.in_slot(slot).map(|key| &**key);
        let write = |program: &mut Box<dyn Slots>, (slot, key): &(u32, Option<Arc<Key>>)| {
            exchange(&mut **program, *slot, old(*slot), key.as_deref())
        };
        let mut fill =
            || slots.iter_mut().try_for_each(|program| filled.iter().try_for_each(|new| write(program, new)));
        if let Err(error) = fill() {
            for program in slots.iter_mut() {
                for (slot, key) in &filled {
                    if let Err(error) = exchange(&mut **program, *slot, key.as_deref(), old(*slot)) {
                        tracing::error!("an old key cannot be put back into the kernel program: {error}");
                    }
                }
            }
            self.publish((*before).clone());
            return Err(RotationError::Refused(error));
        }
        let mut wipe = |program: &mut Box<dyn Slots>| emptied.iter().try_for_each(|gone| write(program, gone));
        // Each is tried, whatever becomes of the others.
        let wiped = slots.iter_mut().map(&mut wipe).fold(Ok(()), Result::and);
        let rotated = Rotated { added: change.added, dropped: change.dropped, accepted: change.after.len() };
        self.publish(change.after);
        wiped.map_err(RotationError::NotWiped).map(|()| rotated)
    }

    fn slots(&self) -> MutexGuard<'_, Vec<Box<dyn Slots>>> {
        lock(&self.0.slots)
    }

    fn publish(&self, keys: Keys) {
        *unpoisoned(self.0.keys.write()) = Arc::new(keys);
    }
}

impl From<Option<Key>> for Keyring {
    fn from(key: Option<Key>) -> Self {
        Self::new(key.map(KeyPair::from))
    }
}

impl fmt::Debug for Keyring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Keyring").field(&self.current()).finish()
    }
}

/// Replaces one key in a slot.
///
/// A run of the program may see a half-written slot, and that must never count as a key. Anybody
/// could sign with a key whose beginning is there and whose rest is zeros.
fn exchange(slots: &mut dyn Slots, slot: u32, old: Option<&Key>, new: Option<&Key>) -> Result<(), kernel::Error> {
    if let Some(old) = old {
        slots.put(slot, PreparedKey::unloaded(old).dangerous_slot())?;
    }
    let Some(new) = new else { return slots.put(slot, &empty_slot()) };
    slots.put(slot, PreparedKey::unloaded(new).dangerous_slot())?;
    slots.put(slot, PreparedKey::new(new).dangerous_slot())
}

#[cfg(test)]
mod tests {
    use fence_common::boundary::KEY_SLOTS;
    use fence_common::digest::{Scratch, verify};
    use fence_common::hash::HashKind;
    use zerocopy::{FromZeros, IntoBytes};

    use super::*;

    fn key(name: u8) -> Key {
        Key::new(&[name; 200]).unwrap()
    }

    fn pair(first: u8, second: Option<u8>) -> KeyPair {
        KeyPair { first: key(first), second: second.map(key) }
    }

    fn signed(with: u8) -> Request {
        let mut request = Request::new_zeroed();
        key(with).sign(HashKind::Sha256, &mut request);
        request
    }

    /// A map as the kernel has it. Around each write the test asks it what it would let through.
    struct Map {
        slots: Arc<Mutex<[KeySlot; KEY_SLOTS]>>,
        ring: Keyring,
        /// The keys that may never be refused.
        stay: Arc<Mutex<Vec<u8>>>,
        /// How many writes succeed.
        room: Arc<Mutex<usize>>,
    }

    fn lets_through(slots: &[KeySlot; KEY_SLOTS], with: u8) -> Option<usize> {
        let mut scratch = Scratch::new_zeroed();
        slots.iter().position(|slot| verify(slot, HashKind::Sha256, &signed(with), &mut scratch))
    }

    impl Map {
        fn check(&self) {
            let slots = self.slots.lock().unwrap();
            let keys = self.ring.current();
            for name in (1..9).filter(|name| lets_through(&slots, *name).is_some()) {
                assert!(keys.accepts(&key(name)), "the kernel lets through what user space does not know");
            }
            for name in self.stay.lock().unwrap().iter() {
                let slot = lets_through(&slots, *name).unwrap_or_else(|| panic!("{name} is refused by the kernel"));
                let known = keys.in_slot(u32::try_from(slot).unwrap()).unwrap();
                assert_eq!(known.dangerous_bytes(), key(*name).dangerous_bytes());
                assert!(keys.verify(&signed(*name)).is_some(), "{name} is refused by the socket");
            }
        }
    }

    impl Slots for Map {
        fn put(&mut self, slot: u32, content: &KeySlot) -> Result<(), kernel::Error> {
            self.check();
            let mut room = self.room.lock().unwrap();
            *room = room.checked_sub(1).ok_or(kernel::Error::Missing("room"))?;
            drop(room);
            let mut slots = self.slots.lock().unwrap();
            let place = &mut slots[usize::try_from(slot).unwrap()];
            // A slot that counts as a key changes nothing else in that write, and one that becomes
            // a key is complete.
            let differs = place.as_bytes()[4..] != content.as_bytes()[4..];
            assert!(!differs || (place.loaded == 0 && content.loaded == 0), "half a key counts");
            *place = *content;
            drop(slots);
            self.check();
            Ok(())
        }
    }

    struct Rotation {
        ring: Keyring,
        slots: Arc<Mutex<[KeySlot; KEY_SLOTS]>>,
        stay: Arc<Mutex<Vec<u8>>>,
        room: Arc<Mutex<usize>>,
    }

    fn bench(first: u8, second: Option<u8>) -> Rotation {
        let ring = Keyring::new(Some(pair(first, second)));
        let slots = Arc::new(Mutex::new([empty_slot(); KEY_SLOTS]));
        let (stay, room) = (Arc::new(Mutex::default()), Arc::new(Mutex::new(usize::MAX)));
        let map =
            Map { slots: Arc::clone(&slots), ring: ring.clone(), stay: Arc::clone(&stay), room: Arc::clone(&room) };
        ring.connect(Box::new(map)).unwrap();
        Rotation { ring, slots, stay, room }
    }

    impl Rotation {
        fn kernel(&self) -> Vec<u8> {
            let slots = self.slots.lock().unwrap();
            (1..9).filter(|name| lets_through(&slots, *name).is_some()).collect()
        }

        fn user(&self) -> Vec<u8> {
            (1..9).filter(|name| self.ring.current().verify(&signed(*name)).is_some()).collect()
        }
    }

    #[test]
    fn a_rotation_refuses_nobody_and_wipes_the_old_key() {
        let bench = bench(1, None);
        *bench.stay.lock().unwrap() = vec![1];
        let rotated = bench.ring.rotate(pair(1, Some(2))).unwrap();
        assert_eq!(rotated, Rotated { added: 1, dropped: 0, accepted: 2 });
        assert_eq!((bench.kernel(), bench.user()), (vec![1, 2], vec![1, 2]));
        *bench.stay.lock().unwrap() = vec![2];
        let rotated = bench.ring.rotate(pair(2, None)).unwrap();
        assert_eq!(rotated, Rotated { added: 0, dropped: 1, accepted: 1 });
        assert_eq!((bench.kernel(), bench.user()), (vec![2], vec![2]));
        assert!(bench.slots.lock().unwrap()[0].as_bytes().iter().all(|byte| *byte == 0), "the old key lies there");
        assert_eq!(bench.ring.rotate(pair(2, None)).unwrap(), Rotated { added: 0, dropped: 0, accepted: 1 });
    }

    #[test]
    fn only_a_key_in_use_outlives_the_rotation() {
        let bench = bench(1, None);
        let used = Arc::clone(bench.ring.current().in_slot(0).unwrap());
        let weak = Arc::downgrade(&used);
        bench.ring.rotate(pair(2, None)).unwrap();
        assert_eq!(used.dangerous_bytes(), key(1).dangerous_bytes());
        drop(used);
        assert!(weak.upgrade().is_none(), "an old key is kept");
    }

    #[test]
    fn a_refusal_of_the_kernel_keeps_the_old_keys() {
        let bench = bench(1, Some(2));
        *bench.stay.lock().unwrap() = vec![1];
        *bench.room.lock().unwrap() = 0;
        assert!(matches!(bench.ring.rotate(pair(1, Some(3))), Err(RotationError::Refused(_))));
        assert_eq!((bench.kernel(), bench.user()), (vec![1, 2], vec![1, 2]));
        *bench.room.lock().unwrap() = usize::MAX;
        assert!(bench.ring.rotate(pair(1, Some(2))).is_ok());
        // The kernel does not drop an old key; user space does.
        *bench.room.lock().unwrap() = 0;
        assert!(matches!(bench.ring.rotate(pair(1, None)), Err(RotationError::NotWiped(_))));
        assert_eq!((bench.kernel(), bench.user()), (vec![1, 2], vec![1]));
    }

    #[test]
    fn keys_that_change_while_the_program_is_loaded_are_the_ones_it_gets() {
        let ring = Keyring::new(Some(pair(1, None)));
        ring.rotate(pair(1, Some(2))).unwrap();
        let slots = Arc::new(Mutex::new([empty_slot(); KEY_SLOTS]));
        let (stay, room) = (Arc::default(), Arc::new(Mutex::new(usize::MAX)));
        ring.connect(Box::new(Map { slots: Arc::clone(&slots), ring: ring.clone(), stay, room })).unwrap();
        let slots = slots.lock().unwrap();
        assert!(lets_through(&slots, 1).is_some() && lets_through(&slots, 2).is_some());
    }

    #[test]
    fn no_key_is_printed() {
        let said = format!("{:?}", Keyring::new(Some(pair(65, Some(66)))));
        assert!(!said.contains("65") && !said.contains('A') && said.contains("200 bytes"), "{said}");
    }
}
