//! The machines that this daemon has killed and that are not dead yet.
//!
//! The kernel takes a killed machine's memory first, and its command line with it. What follows
//! takes a hundred times as long. A scan would search the files of all threads for what the machine
//! was. It is known, as the pidfd of the kill still holds it. A hundred machines that are killed at
//! once are read some dozen times while they die, and need the processors themselves.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use fence_common::sync::lock;
use uuid::Uuid;

use super::super::victim::Victim;

/// The killed machines, by process number.
#[derive(Debug, Default)]
pub(super) struct DyingMachines(Mutex<HashMap<i32, (Uuid, Arc<Victim>)>>);

impl DyingMachines {
    /// Notes a machine that is killed.
    pub(super) fn note(&self, uuid: Uuid, victim: &Arc<Victim>) {
        lock(&self.0).insert(victim.pid(), (uuid, Arc::clone(victim)));
    }

    /// The machine that the process with this number is, if it is one that we have killed and that
    /// is not dead. As long as it is not, nothing else has its number.
    pub(super) fn machine(&self, pid: i32) -> Option<Uuid> {
        let (uuid, victim) = lock(&self.0).get(&pid).cloned()?;
        victim.is_dying().then_some(uuid)
    }

    /// Lets the dead go.
    pub(super) fn forget_dead(&self) {
        lock(&self.0).retain(|_, (_, victim)| victim.is_dying());
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::super::super::driver::Driver;
    use super::*;

    #[test]
    fn a_machine_is_dying_from_its_kill_to_its_death() {
        let dying = DyingMachines::default();
        let mut child = Command::new("sleep").arg("600").spawn().unwrap();
        let victim = Arc::new(Victim::dangerous_for_test(Driver::Qemu, "vm", &child));
        let (pid, uuid) = (victim.pid(), Uuid::from_u128(7));
        dying.note(uuid, &victim);
        assert_eq!(dying.machine(pid), None, "it is not killed yet");
        // Stopped, so that nothing but the kill below ends it, and not at once.
        let traced = rustix::process::Pid::from_child(&child);
        rustix::process::kill_process(traced, rustix::process::Signal::STOP).unwrap();
        victim.kill().unwrap();
        assert!(matches!(dying.machine(pid), Some(found) if found == uuid) || victim.is_dead());
        child.wait().unwrap();
        assert_eq!(dying.machine(pid), None, "it is dead");
        dying.forget_dead();
        assert!(lock(&dying.0).is_empty());
    }
}
