//! What a table says of a domain while its URI does not answer, or libvirt does not speak of the
//! domain.

use fence_common::domain_state;
use fence_common::target::Target;
use uuid::Uuid;

use super::{Entry, Instance, Table, last_words::Word};
use crate::hypervisor::libvirt::Power;
use crate::hypervisor::process::Job;

impl Table {
    /// The domain that a target means, if libvirt does not speak of it any more and a process of it
    /// lives.
    pub(crate) fn orphaned_as(&self, target: &Target) -> Option<(Uuid, String)> {
        let orphans = self.all_orphans().into_iter();
        let mut named = orphans.filter_map(|(uuid, orphans)| Some((uuid, orphans.first()?.name().to_owned())));
        named.find(|(uuid, name)| match target {
            Target::Uuid(wanted) => uuid == wanted,
            Target::Name(wanted) => name == wanted,
        })
    }

    /// Whether the known process of a domain had a migration under way, by libvirt's record.
    pub(crate) fn died_on_its_way(&self, uuid: Uuid) -> bool {
        let victim = self.instance(uuid).and_then(|instance| instance.victim);
        victim.is_some_and(|victim| matches!(victim.job(), Job::Leaving | Job::Arriving))
    }

    /// Whether a domain that is off here may run on another host: it has moved there, or was
    /// stopped or died on its way.
    pub(crate) fn may_run_elsewhere(&self, uuid: Uuid) -> bool {
        let moved = |entry| self.word_of(uuid, &entry).is_some_and(|word| word.power == Power::MovedAway);
        self.is_leaving(uuid) || self.get(uuid).is_some_and(moved)
    }

    /// The last word of this URI about a target, if that counts while the URI does not answer: see
    /// [`last_words`](super::last_words).
    pub(crate) fn last_word(&self, target: &Target) -> Option<(Uuid, Word)> {
        let Some((uuid, entry)) = self.find(target) else { return self.recalled.find(target) };
        Some((uuid, self.word_of(uuid, &entry)?))
    }

    /// The last word about an entry, where that counts.
    fn word_of(&self, uuid: Uuid, entry: &Entry) -> Option<Word> {
        let power = match &entry.instance {
            _ if entry.moved_away || self.is_leaving(uuid) => Power::MovedAway,
            Some(instance) if instance.may_live() => Power::Active(instance.state),
            Some(_) if self.died_on_its_way(uuid) => Power::MovedAway,
            Some(_) | None => return None,
        };
        Some(Word { name: entry.name.clone(), power })
    }

    /// The domains that run here, by libvirt's last word. (A domain on its way here is paused until
    /// it has arrived.)
    pub(crate) fn running(&self) -> Vec<Uuid> {
        let runs = |entry: &Entry| {
            let running = |known: &Instance| known.state.0 == domain_state::RUNNING;
            entry.generation == self.generation() && entry.instance.as_ref().is_some_and(running)
        };
        self.domains().iter().filter(|(_, entry)| runs(entry)).map(|(uuid, _)| *uuid).collect()
    }

    /// A domain that has moved away from here was found where it went to.
    pub(crate) fn note_found(&self, uuid: Uuid) {
        let has_moved = |word: &Word| word.power == Power::MovedAway;
        if self.recalled.find(&Target::Uuid(uuid)).is_some_and(|(_, word)| has_moved(&word)) {
            self.recalled.forget(uuid);
        }
        if let Some(entry) = self.domains().get_mut(&uuid) {
            entry.moved_away = false;
        }
        self.leaving().note(uuid, false);
    }

    /// All last words that count while this URI does not answer.
    pub(crate) fn last_words(&self) -> Vec<(Uuid, Word)> {
        let known = self.all();
        let mut words: Vec<_> =
            known.iter().filter_map(|(uuid, entry)| Some((*uuid, self.word_of(*uuid, entry)?))).collect();
        words.extend(self.recalled.all());
        words
    }
}
