//! How often a domain has appeared at a URI: a start, an arrival from another host, a resume.
//!
//! A host that says "not here" twice may have had the domain in between. This count tells it. It
//! may be too high and never too low, apart from an event that libvirt has yet to deliver.
//!
//! The start that a reboot owes is no appearance: the reboot has killed what ran before it, and the
//! other hosts have yet to be asked once more.

use std::collections::HashMap;
use std::sync::Mutex;

use fence_common::sync::lock;
use fence_common::target::Target;
use uuid::Uuid;

use super::Entry;

/// How many domains are counted apart. Beyond that all share one count.
const APART_MAX: usize = 16_384;

/// The counts of one URI.
#[derive(Debug, Default)]
pub(crate) struct Appearances(Mutex<Counts>);

#[derive(Debug, Default)]
struct Counts {
    /// Of domains that are not counted apart.
    shared: u64,
    apart: HashMap<Uuid, Count>,
}

#[derive(Debug, Default)]
struct Count {
    /// `None`: no name is known, so it may have any.
    name: Option<String>,
    /// The instance that was seen last.
    id: Option<u32>,
    /// The instance that the last owed start has made.
    owed: Option<u32>,
    /// While an owed start is under way: the instances that have appeared. Which of them is its
    /// own is known when it ends. libvirt takes no second one beside it.
    meanwhile: Option<Vec<Option<u32>>>,
    times: u64,
}

impl Count {
    /// How many may have appeared.
    fn seen(&self) -> u64 {
        let meanwhile = self.meanwhile.as_ref().map_or(0, Vec::len);
        self.times.saturating_add(u64::try_from(meanwhile).unwrap_or(u64::MAX))
    }

    fn appeared(&mut self, id: Option<u32>) {
        match &mut self.meanwhile {
            _ if id.is_some() && id == self.owed => {}
            Some(meanwhile) => meanwhile.push(id),
            None => self.times = self.times.saturating_add(1),
        }
    }
}

/// An owed start that is under way. If it is dropped, nothing has come of it, and all that has
/// appeared meanwhile counts.
#[derive(Debug)]
pub(crate) struct OwedStart<'a> {
    counts: &'a Appearances,
    uuid: Uuid,
    id: Option<u32>,
}

impl OwedStart<'_> {
    /// It has started this instance.
    pub(crate) fn end(mut self, id: Option<u32>) {
        self.id = id;
    }
}

impl Drop for OwedStart<'_> {
    fn drop(&mut self) {
        let mut counts = lock(&self.counts.0);
        let count = counts.of(self.uuid);
        count.owed = self.id.or(count.owed);
        for id in count.meanwhile.take().unwrap_or_default() {
            count.appeared(id);
        }
    }
}

impl Counts {
    fn of(&mut self, uuid: Uuid) -> &mut Count {
        if self.apart.len() >= APART_MAX && !self.apart.contains_key(&uuid) {
            let all: u64 = self.apart.drain().map(|(_, count)| count.seen()).sum();
            self.shared = self.shared.saturating_add(all).saturating_add(1);
        }
        self.apart.entry(uuid).or_default()
    }
}

impl Appearances {
    /// libvirt tells that the domain was started, has arrived, or was resumed.
    pub(super) fn note(&self, uuid: Uuid, id: Option<u32>) {
        lock(&self.0).of(uuid).appeared(id);
    }

    /// A start begins that a reboot owes. The domain's lock is held, so there is one at a time.
    pub(crate) fn owed_start(&self, uuid: Uuid) -> OwedStart<'_> {
        lock(&self.0).of(uuid).meanwhile = Some(Vec::new());
        OwedStart { counts: self, uuid, id: None }
    }

    /// The domain was looked at.
    pub(super) fn observe(&self, uuid: Uuid, entry: Option<&Entry>) {
        let Some(entry) = entry else { return };
        let id = entry.instance.as_ref().map(|instance| instance.id);
        let mut counts = lock(&self.0);
        if id.is_none() && !counts.apart.contains_key(&uuid) {
            return;
        }
        let count = counts.of(uuid);
        let is_new = id.is_some() && id != count.id;
        let is_renamed = count.name.as_ref().is_some_and(|name| *name != entry.name);
        if is_new {
            count.appeared(id);
        }
        count.times = count.times.saturating_add(u64::from(is_renamed));
        count.id = id.or(count.id);
        count.name = Some(entry.name.clone());
    }

    /// How often the target has appeared.
    pub(crate) fn of(&self, target: &Target) -> u64 {
        let counts = lock(&self.0);
        let is_it = |uuid: &Uuid, count: &Count| match target {
            Target::Uuid(wanted) => wanted == uuid,
            Target::Name(wanted) => count.name.as_ref().is_none_or(|name| name == wanted),
        };
        let own = counts.apart.iter().filter(|(uuid, count)| is_it(uuid, count)).map(|(_, count)| count.times);
        own.fold(counts.shared, u64::saturating_add)
    }
}

#[cfg(test)]
mod tests {
    use super::super::Instance;
    use super::*;
    use crate::hypervisor::libvirt::State;

    fn entry(name: &str, id: Option<u32>) -> Entry {
        let instance = id.map(|id| Instance { id, state: State(1), victim: None });
        let (persistent, moved_away, macs, cid, generation) = (true, false, [].into(), None, 1);
        Entry { name: name.to_owned(), persistent, moved_away, instance, macs, cid, generation }
    }

    #[test]
    fn each_appearance_counts_and_an_end_does_not() {
        let (counts, uuid) = (Appearances::default(), Uuid::from_u128(1));
        let by_name = || counts.of(&Target::Name("a".to_owned()));
        counts.observe(uuid, Some(&entry("a", None)));
        assert_eq!((by_name(), counts.of(&Target::Uuid(uuid))), (0, 0));
        counts.observe(uuid, Some(&entry("a", Some(1))));
        counts.observe(uuid, Some(&entry("a", Some(1))));
        assert_eq!(by_name(), 1, "the same instance, seen twice");
        counts.observe(uuid, Some(&entry("a", None)));
        counts.observe(uuid, None);
        assert_eq!(by_name(), 1);
        counts.observe(uuid, Some(&entry("a", Some(2))));
        counts.note(uuid, Some(2));
        assert_eq!((by_name(), counts.of(&Target::Uuid(uuid))), (3, 3));
        assert_eq!(counts.of(&Target::Name("b".to_owned())), 0);
        // Come and gone before anybody could look: it may be anybody.
        counts.note(Uuid::from_u128(2), None);
        assert_eq!((by_name(), counts.of(&Target::Name("b".to_owned()))), (4, 1));
        assert_eq!(counts.of(&Target::Uuid(uuid)), 3);
    }

    #[test]
    fn a_start_that_a_reboot_owes_does_not_count() {
        let (counts, uuid) = (Appearances::default(), Uuid::from_u128(1));
        let times = || counts.of(&Target::Uuid(uuid));
        counts.observe(uuid, Some(&entry("a", Some(1))));
        assert_eq!(times(), 1);
        // libvirt tells of it before the call returns, and afterwards.
        let start = counts.owed_start(uuid);
        counts.note(uuid, Some(2));
        counts.observe(uuid, Some(&entry("a", Some(2))));
        start.end(Some(2));
        counts.note(uuid, Some(2));
        counts.observe(uuid, Some(&entry("a", Some(2))));
        assert_eq!(times(), 1);
        // Another instance counts, also one that appears while a start is under way.
        let start = counts.owed_start(uuid);
        counts.note(uuid, Some(3));
        counts.note(uuid, Some(4));
        assert_eq!(times(), 1, "it is not known yet which of them is its own");
        start.end(Some(4));
        assert_eq!(times(), 2);
        // A start that fails has no instance of its own.
        let start = counts.owed_start(uuid);
        counts.note(uuid, Some(5));
        drop(start);
        counts.note(uuid, None);
        assert_eq!(times(), 4);
    }

    #[test]
    fn a_count_never_falls_however_many_domains_there_are() {
        let (counts, first) = (Appearances::default(), Uuid::from_u128(0));
        counts.note(first, None);
        let before = counts.of(&Target::Uuid(first));
        (1..2 * APART_MAX as u128).for_each(|number| counts.note(Uuid::from_u128(number), None));
        assert!(counts.of(&Target::Uuid(first)) > before);
    }
}
