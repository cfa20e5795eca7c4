//! The accepted keys: one, or two during a rotation.
//!
//! Each key has a slot, here and in the kernel program's map, and keeps it as long as it is
//! accepted. So a key that stays is never rewritten, and there is no moment in which its requests
//! are rejected. The slot in a verified request says which key that was.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::array;

use subtle::ConstantTimeEq;

use crate::boundary::KEY_SLOTS;
use crate::key::Key;
use crate::wire::Request;

/// Where a key counts: everywhere, or in the groups that name it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyOwner(pub usize);

impl KeyOwner {
    /// The listener's key. It counts in all groups without a key of their own.
    pub const EVERYBODY: Self = Self(0);
}

/// A key that counts in some groups only.
#[derive(Clone, Debug)]
pub struct GroupKey {
    /// The groups.
    pub owner: KeyOwner,
    /// The key.
    pub key: Arc<Key>,
}

impl GroupKey {
    /// Whether both are the same key of the same groups.
    #[must_use]
    pub fn is_same(&self, other: &Self) -> bool {
        self.owner == other.owner && is_same(&self.key, &other.key)
    }
}

/// The content of the key files: a first key, and perhaps a second one.
#[derive(Clone, Debug)]
pub struct KeyPair {
    /// The key for answers where nothing in the request tells which key its sender has.
    pub first: Key,
    /// The other accepted key.
    pub second: Option<Key>,
}

impl From<Key> for KeyPair {
    fn from(first: Key) -> Self {
        Self { first, second: None }
    }
}

impl KeyPair {
    /// The keys without repetition: both files may hold the same one.
    fn distinct(self) -> Vec<Arc<Key>> {
        let second = self.second.filter(|second| !is_same(second, &self.first));
        [Some(self.first), second].into_iter().flatten().map(Arc::new).collect()
    }
}

/// The accepted keys in their slots. Without a key nothing is verified.
#[derive(Clone, Debug, Default)]
pub struct Keys {
    slots: [Option<Arc<Key>>; KEY_SLOTS],
    /// The first key's slot.
    first: usize,
    /// Keys without a slot. They are accepted as long as the kernel program may still have them.
    leaving: Vec<Arc<Key>>,
}

impl From<KeyPair> for Keys {
    fn from(pair: KeyPair) -> Self {
        Self::default().change(pair).after
    }
}

impl Keys {
    /// The key of a slot.
    #[must_use]
    pub fn in_slot(&self, slot: u32) -> Option<&Arc<Key>> {
        self.slots.get(usize::try_from(slot).ok()?)?.as_ref()
    }

    /// Every slot with its key.
    pub fn in_slots(&self) -> impl Iterator<Item = (u32, Option<Arc<Key>>)> {
        (0_u32..).zip(self.slots.iter().cloned())
    }

    /// The first key.
    #[must_use]
    pub fn first(&self) -> Option<&Arc<Key>> {
        self.slots.get(self.first)?.as_ref()
    }

    /// The keys in slots as the files had them; `None` if there is none.
    #[must_use]
    pub fn pair(&self) -> Option<KeyPair> {
        let first = self.first()?;
        let second = self.slots.iter().flatten().find(|key| !Arc::ptr_eq(first, key));
        Some(KeyPair { first: (**first).clone(), second: second.map(|key| (**key).clone()) })
    }

    /// How many are accepted.
    #[must_use]
    pub fn len(&self) -> usize {
        self.iter().count()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Key>> {
        self.slots.iter().flatten().chain(&self.leaving)
    }

    /// Whether this key is accepted.
    #[must_use]
    pub fn accepts(&self, key: &Key) -> bool {
        self.iter().any(|known| is_same(known, key))
    }

    /// The key that a request is signed with. The first key is tried first. `None` if it is none of
    /// ours, or the request names no digest.
    #[must_use]
    pub fn verify(&self, request: &Request) -> Option<&Arc<Key>> {
        let others = self.iter().filter(|key| !self.first().is_some_and(|first| Arc::ptr_eq(first, key)));
        self.first().into_iter().chain(others).find(|key| key.verify(request))
    }

    /// The steps after which `pair` is accepted and nothing else.
    #[must_use]
    pub fn change(&self, pair: KeyPair) -> Change {
        let wanted = pair.distinct();
        let stays = |slot: &Option<Arc<Key>>| {
            let known = slot.as_ref()?;
            wanted.iter().any(|key| is_same(key, known)).then(|| Arc::clone(known))
        };
        let mut after = Self { slots: array::from_fn(|at| self.slots.get(at).and_then(stays)), ..Self::default() };
        let mut writes = Vec::new();
        for key in wanted.iter().filter(|key| !self.accepts(key)) {
            let empty = |slots: &[Option<Arc<Key>>; KEY_SLOTS], at: usize| slots.get(at).is_some_and(Option::is_none);
            // A free slot if there is one: then the new key is there before an old one goes.
            let free = (0..KEY_SLOTS).find(|&at| empty(&after.slots, at) && empty(&self.slots, at));
            let Some(at) = free.or_else(|| (0..KEY_SLOTS).find(|&at| empty(&after.slots, at))) else { continue };
            if let Some(slot) = after.slots.get_mut(at) {
                *slot = Some(Arc::clone(key));
            }
            writes.push((at, Some(Arc::clone(key))));
        }
        let first = after
            .slots
            .iter()
            .position(|slot| slot.as_ref().zip(wanted.first()).is_some_and(|(key, first)| is_same(key, first)));
        after.first = first.unwrap_or(0);

        let mut during = after.clone();
        let (added, mut dropped) = (writes.len(), 0_usize);
        for (at, (old, new)) in self.slots.iter().zip(&after.slots).enumerate() {
            let Some(old) = old else { continue };
            match new {
                Some(new) if is_same(old, new) => continue,
                Some(_) => during.leaving.push(Arc::clone(old)),
                None => {
                    // A request that this key has verified and that is not read yet finds it here.
                    if let Some(slot) = during.slots.get_mut(at) {
                        *slot = Some(Arc::clone(old));
                    }
                    writes.push((at, None));
                }
            }
            dropped = dropped.saturating_add(1);
        }
        let writes = writes.into_iter().filter_map(|(at, key)| Some((u32::try_from(at).ok()?, key))).collect();
        Change { during, writes, after, added, dropped }
    }
}

/// A rotation, in three steps: user space accepts [`during`](Self::during); the
/// [`writes`](Self::writes) to the kernel program's map are made in order; user space accepts
/// [`after`](Self::after).
///
/// So user space always accepts what the kernel program delivers. A key that is accepted before and
/// after is accepted by both all the time.
#[derive(Clone, Debug)]
pub struct Change {
    /// The old keys and the new ones.
    pub during: Keys,
    /// The slots to write; those to be emptied come last.
    pub writes: Vec<(u32, Option<Arc<Key>>)>,
    /// The new keys alone.
    pub after: Keys,
    /// How many keys are accepted that were not before.
    pub added: usize,
    /// How many keys are accepted no longer.
    pub dropped: usize,
}

/// Whether two keys are the same, in constant time.
fn is_same(one: &Key, other: &Key) -> bool {
    one.dangerous_bytes().ct_eq(other.dangerous_bytes()).into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hash::HashKind;
    use proptest::prelude::*;
    use zerocopy::FromZeros;

    fn key(name: u8) -> Key {
        Key::new(&[name; 20]).unwrap()
    }

    fn pair(first: u8, second: Option<u8>) -> KeyPair {
        KeyPair { first: key(first), second: second.map(key) }
    }

    fn signed(with: u8) -> Request {
        let mut request = Request::new_zeroed();
        key(with).sign(HashKind::Sha256, &mut request);
        request
    }

    fn slots(keys: &Keys) -> [Option<u8>; KEY_SLOTS] {
        array::from_fn(|at| keys.in_slot(u32::try_from(at).unwrap()).map(|key| key.dangerous_bytes()[0]))
    }

    #[test]
    fn a_rotation_moves_no_key() {
        let old = Keys::from(KeyPair::from(key(1)));
        assert_eq!((slots(&old), old.len(), old.is_empty()), ([Some(1), None], 1, false));
        let both = old.change(pair(1, Some(2)));
        assert_eq!((slots(&both.after), both.added, both.dropped, both.writes.len()), ([Some(1), Some(2)], 1, 0, 1));
        let new = both.after.change(pair(2, None));
        assert_eq!((slots(&new.after), new.added, new.dropped), ([None, Some(2)], 0, 1));
        assert_eq!(slots(&new.during), [Some(1), Some(2)], "what is not read yet is still known");
        assert!(matches!(new.writes.as_slice(), [(0, None)]), "{:?}", new.writes);
        assert_eq!(new.after.first().unwrap().dangerous_bytes()[0], 2);
        // At once, without a second file: the new one is there before the old one goes.
        let other = new.after.change(pair(3, None));
        assert_eq!((slots(&other.after), slots(&other.during)), ([Some(3), None], [Some(3), Some(2)]));
        assert!(matches!(other.writes.as_slice(), [(0, Some(_)), (1, None)]), "{:?}", other.writes);
    }

    #[test]
    fn the_same_key_twice_is_one() {
        let keys = Keys::from(pair(1, Some(1)));
        assert_eq!((slots(&keys), keys.len()), ([Some(1), None], 1));
        assert_eq!(keys.change(pair(1, None)).writes.len(), 0);
    }

    #[test]
    fn without_keys_nothing_is_verified() {
        let none = Keys::default();
        assert!(none.is_empty() && none.first().is_none() && none.verify(&signed(1)).is_none());
        assert!(none.in_slot(0).is_none() && none.in_slot(u32::MAX).is_none());
        // One without a digest is signed with none.
        assert!(Keys::from(pair(1, None)).verify(&Request::new_zeroed()).is_none());
    }

    proptest! {
        /// Every change between any two sets of keys. Between any two steps the kernel program's
        /// map is compared.
        #[test]
        fn there_is_no_moment_in_which_a_key_that_stays_is_refused(
            rounds in prop::collection::vec((1..5_u8, prop::option::of(1..5_u8)), 1..6),
        ) {
            let mut keys = Keys::default();
            let mut map = [None; KEY_SLOTS];
            let mut before: Vec<u8> = Vec::new();
            for (first, second) in rounds {
                let after: Vec<u8> = [Some(first), second].into_iter().flatten().collect();
                let change = keys.change(pair(first, second));
                let added = after.iter().enumerate().filter(|(at, name)| !before.contains(name) && !after[..*at].contains(name));
                prop_assert_eq!(change.added, added.count());
                let check = |map: &[Option<u8>; KEY_SLOTS], user: &Keys| -> Result<(), TestCaseError> {
                    for name in 1..5 {
                        if before.contains(&name) && after.contains(&name) {
                            prop_assert!(map.contains(&Some(name)), "the kernel refuses {}", name);
                            prop_assert!(user.verify(&signed(name)).is_some(), "the socket refuses {}", name);
                        }
                        if let Some(at) = map.iter().position(|slot| *slot == Some(name)) {
                            prop_assert!(user.accepts(&key(name)), "the kernel lets through what the socket refuses");
                            if before.contains(&name) && after.contains(&name) {
                                prop_assert_eq!(slots(user)[at], Some(name), "taken for another key's");
                            }
                        }
                    }
                    Ok(())
                };
                check(&map, &keys)?;
                check(&map, &change.during)?;
                for (slot, key) in &change.writes {
                    map[*slot as usize] = key.as_ref().map(|key| key.dangerous_bytes()[0]);
                    check(&map, &change.during)?;
                }
                prop_assert_eq!(map, slots(&change.after));
                check(&map, &change.after)?;
                keys = change.after;
                prop_assert_eq!(keys.first().unwrap().dangerous_bytes()[0], first);
                for name in 1..5 {
                    prop_assert_eq!(keys.verify(&signed(name)).is_some(), after.contains(&name));
                }
                before = after;
            }
        }
    }
}
