//! Domains that this daemon itself saw die. They are off, also while libvirt cannot say so.
//!
//! A death counts as long as nothing has been heard of the domain since, over the same connection
//! to libvirt: a new libvirtd is asked. It is never the whole proof. This host must have no living
//! process of the domain at that moment.
//!
//! - A domain that was killed here and proven dead, with no migration under way.
//! - A QEMU that has died by itself, and libvirt has not noticed. Its status file is still there
//!   and knows of no migration. libvirt writes a job there before its first step, and removes the
//!   file when it notices the death. (Not a container: one that has ended may have asked for its
//!   own reboot, which libvirt carries out.)

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard};

use fence_common::sync::lock;
use fence_common::target::Target;
use uuid::Uuid;

use super::{Entry, Instance, Table};
use crate::hypervisor::process::Job;

/// What was seen to die.
#[derive(Debug, Default)]
pub(crate) struct Deaths(Mutex<HashMap<Uuid, Death>>);

#[derive(Clone, Debug)]
struct Death {
    name: String,
    /// libvirt's number of the instance, if that is known.
    id: Option<u32>,
    /// The connection over which the domain was known.
    generation: u64,
}

/// A domain that was seen to die.
#[derive(Clone, Debug)]
pub(crate) struct SeenDead {
    pub(crate) uuid: Uuid,
    pub(crate) name: String,
    /// The dead instance, if libvirt has not noticed and no fence was answered with it.
    pub(crate) unnoticed: Option<Instance>,
}

impl Deaths {
    fn all(&self) -> MutexGuard<'_, HashMap<Uuid, Death>> {
        lock(&self.0)
    }

    /// What libvirt says of a domain now. Another instance of it is news, and so is a move.
    pub(crate) fn observe(&self, uuid: Uuid, entry: Option<&Entry>) {
        let Some(entry) = entry else { return };
        let runs = entry.instance.as_ref().map(|instance| instance.id);
        self.all().retain(|known, death| *known != uuid || !entry.moved_away && (runs.is_none() || runs == death.id));
    }

    /// The domain is started, or another host goes on with it.
    pub(crate) fn forget(&self, uuid: Uuid) {
        self.all().remove(&uuid);
    }
}

impl Table {
    /// A domain was proven dead here, with no migration under way.
    pub(crate) fn note_death(&self, uuid: Uuid, name: &str, id: Option<u32>) {
        let death = Death { name: name.to_owned(), id, generation: self.generation() };
        self.deaths.all().insert(uuid, death);
    }

    /// Whether a domain was proven dead here, and nothing has been heard of it since.
    pub(crate) fn is_proven_dead(&self, uuid: Uuid) -> bool {
        !self.is_blind() && self.seen_to_die(&Target::Uuid(uuid)).is_some()
    }

    /// Whether a domain was seen to die, and nothing has been heard of it since. Reads libvirt's
    /// status file of a domain that has died by itself.
    pub(crate) fn seen_dead(&self, target: &Target) -> Option<SeenDead> {
        // Without events nothing is heard of the domain.
        self.driver.filter(|_| !self.is_blind())?;
        let proven = |(uuid, death): (Uuid, Death)| SeenDead { uuid, name: death.name, unnoticed: None };
        let seen = self.seen_to_die(target).map(proven).or_else(|| self.has_died(target))?;
        (!self.is_leaving(seen.uuid)).then_some(seen)
    }

    fn seen_to_die(&self, target: &Target) -> Option<(Uuid, Death)> {
        let found = {
            let deaths = self.deaths.all();
            let mut matching = deaths.iter().filter(|(uuid, death)| match target {
                Target::Uuid(wanted) => *uuid == wanted,
                Target::Name(wanted) => death.name == *wanted,
            });
            matching.next().map(|(uuid, death)| (*uuid, death.clone()))
        };
        found.filter(|(_, death)| death.generation == self.generation())
    }

    fn has_died(&self, target: &Target) -> Option<SeenDead> {
        let (uuid, entry) = self.find(target)?;
        if !self.runs_machines() || entry.generation != self.generation() {
            return None;
        }
        let instance = entry.instance?;
        let victim = instance.victim.as_ref().filter(|victim| victim.is_dead())?;
        // Else there is another instance, of which the table has not heard yet.
        let is_settled = victim.job() == Job::None && victim.is_on_record();
        is_settled.then_some(SeenDead { uuid, name: entry.name, unnoticed: Some(instance) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hypervisor::libvirt::{State, Told};

    fn entry(id: Option<u32>, moved_away: bool) -> Entry {
        let instance = id.map(|id| Instance { id, state: State(1), victim: None });
        Entry {
            name: "vm".to_owned(),
            persistent: false,
            moved_away,
            instance,
            macs: [].into(),
            cid: None,
            generation: 0,
        }
    }

    #[test]
    fn a_death_counts_until_something_is_heard_of_the_domain() {
        let uuid = Uuid::from_u128(1);
        let by_name = Target::Name("vm".to_owned());
        let after = |what: &dyn Fn(&Table)| {
            let table = Table::new("qemu:///system");
            assert!(table.seen_dead(&by_name).is_none());
            table.note_death(uuid, "vm", Some(7));
            what(&table);
            assert_eq!(table.seen_dead(&by_name).is_some(), table.seen_dead(&Target::Uuid(uuid)).is_some());
            table.seen_dead(&by_name).is_some()
        };
        assert!(after(&|_| ()));
        assert!(after(&|table| table.put(uuid, Some(entry(Some(7), false)))), "libvirt has not noticed");
        assert!(after(&|table| table.put(uuid, Some(entry(None, false)))));
        assert!(after(&|table| table.put(uuid, None)), "a transient one");
        assert!(after(&|table| table.put(Uuid::from_u128(2), Some(entry(Some(8), false)))), "another domain");
        assert!(!after(&|table| table.put(uuid, Some(entry(Some(8), false)))), "another instance");
        assert!(!after(&|table| {
            table.put(uuid, Some(entry(Some(8), false)));
            table.put(uuid, None);
        }));
        assert!(!after(&|table| table.put(uuid, Some(entry(None, true)))), "moved away");
        assert!(!after(&|table| table.note_leaving(uuid, true)));
        assert!(!after(&|table| table.begin_generation(Told { changes: true, resets: true })), "another libvirtd");
        assert!(
            !after(&|table| table.begin_generation(Told { changes: false, resets: false })),
            "libvirt reports no events"
        );
        assert!(!after(&|table| table.deaths.forget(uuid)));
    }

    #[test]
    fn only_deaths_of_local_processes_are_seen() {
        let table = Table::new("qemu+ssh://host/system");
        table.note_death(Uuid::from_u128(1), "vm", None);
        assert!(table.seen_dead(&Target::Uuid(Uuid::from_u128(1))).is_none());
    }
}
