//! The world beside the daemons: machines with their instances, power, libvirt, migrations.

use fence_common::hosts::{ActEnd, HostDomain, LocalState, Look};
use fence_common::ledger::RequestId;
use fence_common::wire::Op;
use std::collections::BTreeSet;
use uuid::Uuid;

use crate::random::Random;

/// The one domain of the simulation.
pub(crate) const UUID: Uuid = Uuid::from_u128(0x6695_eb01_f6a4_8304_79aa_97f2_502e_193f);
pub(crate) const NAME: &str = "vm1";

/// Who has started an instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Birth {
    /// An administrator, or libvirt's autostart.
    Outside,
    /// The group, for this request.
    Ours(RequestId),
}

/// One life of the domain. A migration does not end it.
#[derive(Clone, Debug)]
pub(crate) struct Instance {
    pub(crate) born: u64,
    pub(crate) birth: Birth,
    pub(crate) host: usize,
    /// Where it migrates to.
    pub(crate) to: Option<usize>,
    pub(crate) lives: bool,
}

impl Instance {
    fn is_at(&self, host: usize) -> bool {
        self.lives && (self.host == host || self.to == Some(host))
    }
}

/// A machine.
#[derive(Clone, Debug)]
pub(crate) struct Machine {
    pub(crate) is_up: bool,
    /// Since when it has power again. libvirt starts later.
    pub(crate) up_since: u64,
    /// Whether it starts its domains by itself after a boot.
    pub(crate) autostarts: bool,
    pub(crate) is_defined: bool,
    pub(crate) libvirt_answers: bool,
    changes: u64,
    /// Whether the domain was last here as one that has moved away.
    has_moved: bool,
    /// The request whose reboot owes a start.
    pub(crate) owes: Option<RequestId>,
    /// What the daemon has recorded. A boot loses it.
    pub(crate) claims: BTreeSet<RequestId>,
    /// When it was fenced, and whether it was left off.
    pub(crate) fenced: Option<(u64, bool)>,
}

#[derive(Debug)]
pub(crate) struct World {
    pub(crate) machines: Vec<Machine>,
    pub(crate) instances: Vec<Instance>,
}

impl World {
    pub(crate) fn new(hosts: usize, random: &mut Random) -> Self {
        let everywhere = random.percent(40);
        let machine = |defined| Machine {
            is_up: true,
            up_since: 0,
            autostarts: false,
            is_defined: defined,
            libvirt_answers: true,
            changes: 0,
            has_moved: false,
            owes: None,
            claims: BTreeSet::new(),
            fenced: None,
        };
        let home = random.below(hosts);
        let machines = (0..hosts).map(|host| machine(everywhere || host == home)).collect();
        let mut world = Self { machines, instances: Vec::new() };
        if random.percent(80) {
            world.start(0, home, Birth::Outside);
        }
        world
    }

    /// Whether a host has power, and has booted. That takes longer than
    /// [`fence_common::hosts::BOOT`].
    pub(crate) fn is_booted(&self, now: u64, host: usize) -> bool {
        let machine = &self.machines[host];
        machine.is_up && (machine.up_since == 0 || now - machine.up_since > 6_000_000_000)
    }

    pub(crate) fn here(&self, host: usize) -> impl Iterator<Item = usize> + '_ {
        (0..self.instances.len()).filter(move |at| self.instances[*at].is_at(host))
    }

    pub(crate) fn living(&self) -> impl Iterator<Item = &Instance> {
        self.instances.iter().filter(|one| one.lives)
    }

    pub(crate) fn start(&mut self, now: u64, host: usize, birth: Birth) {
        self.instances.push(Instance { born: now, birth, host, to: None, lives: true });
        let machine = &mut self.machines[host];
        // The start that a reboot owes does not count.
        machine.changes += u64::from(machine.owes.is_none());
        (machine.has_moved, machine.is_defined) = (false, true);
    }

    /// Begins the migration of an instance.
    pub(crate) fn migrate(&mut self, instance: usize, to: usize) {
        if self.here(to).next().is_none() {
            self.instances[instance].to = Some(to);
            self.machines[to].changes += 1;
        }
    }

    /// Ends a migration, well or not.
    pub(crate) fn migrated(&mut self, instance: usize, is_well: bool) {
        let one = &mut self.instances[instance];
        if let Some(to) = one.to.take().filter(|_| one.lives && is_well) {
            let from = one.host;
            one.host = to;
            self.machines[from].has_moved = true;
            self.machines[to].is_defined = true;
            self.machines[to].has_moved = false;
        }
    }

    /// Power off, by fencing or failure.
    pub(crate) fn dies(&mut self, host: usize) {
        for one in &mut self.instances {
            one.lives &= one.host != host;
            one.to = one.to.filter(|to| *to != host);
        }
        let machine = &mut self.machines[host];
        (machine.is_up, machine.owes, machine.has_moved) = (false, None, false);
        machine.claims.clear();
    }

    pub(crate) fn look(&self, host: usize, random: &mut Random) -> Look {
        let machine = &self.machines[host];
        // One that comes in may yet stay where it is. One that goes out may be ended here.
        let comes_in = self.comes_in(host);
        let goes_out = self.here(host).any(|at| self.instances[at].to.is_some());
        // libvirt's record of the migration may be unreadable.
        let is_unrecorded = random.percent(if comes_in { 30 } else { 4 });
        let state = if !machine.libvirt_answers || (goes_out && !comes_in && random.percent(50)) {
            LocalState::CannotTell("libvirt is silent, or it migrates".into())
        } else if is_unrecorded && self.here(host).next().is_some() {
            LocalState::MayBeArriving
        } else if comes_in {
            LocalState::Arriving
        } else if self.here(host).next().is_some() || machine.owes.is_some() {
            LocalState::RunsHere
        } else if machine.is_defined {
            LocalState::DefinedHere
        } else {
            LocalState::NotHere
        };
        let is_known = !matches!(state, LocalState::NotHere | LocalState::CannotTell(_));
        let (uuid, name) = (is_known.then_some(UUID), is_known.then(|| NAME.to_owned()));
        Look { state, uuid, name, changes: machine.changes }
    }

    pub(crate) fn table(&self, host: usize) -> Vec<HostDomain> {
        let runs = self.here(host).next().is_some();
        let state = if runs { 1 } else { 5 };
        let domain = HostDomain { uuid: UUID, name: NAME.into(), state };
        if runs || self.machines[host].is_defined { vec![domain] } else { Vec::new() }
    }

    /// Whether a copy is on its way in.
    pub(crate) fn comes_in(&self, host: usize) -> bool {
        self.here(host).any(|at| self.instances[at].host != host)
    }

    pub(crate) fn changes(&self, host: usize) -> u64 {
        self.machines[host].changes
    }

    /// Kills what is on a host. `seen` are the instances that were there when the act was ordered.
    /// `arrival_seen`: of the copy that is on its way in then, libvirt may have lost the record.
    pub(crate) fn off(
        &mut self,
        host: usize,
        op: Op,
        request: RequestId,
        seen: &[usize],
        arrival_seen: bool,
        random: &mut Random,
    ) -> ActEnd {
        let fail = |why: &str| ActEnd::Failed(why.into());
        if !self.machines[host].libvirt_answers || random.percent(5) {
            return fail("libvirt is silent");
        }
        let owes = self.machines[host].owes.is_some();
        if op == Op::Off {
            self.machines[host].owes = None;
        }
        let here: Vec<_> = self.here(host).collect();
        let escapes =
            |world: &Self| seen.iter().any(|at| world.instances[*at].lives && world.instances[*at].host != host);
        if here.is_empty() && self.machines[host].has_moved {
            return fail("it has moved");
        }
        if here.is_empty() && !owes {
            return ActEnd::Gone;
        }
        let mut comes_in = false;
        for at in here {
            let one = &mut self.instances[at];
            if one.host == host {
                one.lives = false;
            } else {
                // An incoming migration fails; its source goes on.
                (one.to, comes_in) = (None, true);
            }
        }
        if comes_in {
            // A copy that libvirt has lost dies like a machine.
            let is_lost = arrival_seen && random.percent(50);
            return if is_lost { ActEnd::ProvenOff } else { fail("it was on its way in") };
        }
        if escapes(self) {
            return fail("it has moved meanwhile");
        }
        if op == Op::Reboot {
            self.machines[host].owes = Some(request);
        }
        if random.percent(4) { fail("dead, but not proven") } else { ActEnd::ProvenOff }
    }
}
