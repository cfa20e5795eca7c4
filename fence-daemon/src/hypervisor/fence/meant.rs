//! The domains that an order means: looked up, and locked until the order is carried out.

use std::sync::atomic::Ordering;

use fence_common::target::Target;
use tokio::time::{Instant, timeout_at};
use uuid::Uuid;

use super::status::{doubt, last_word, nowhere};
use super::{Detail, Foresight, Held, Locks, Restarts};
use crate::hypervisor::known::{Answers, Entry, Identity, Instance, Known, Unknown, sorted};
use crate::hypervisor::libvirt::{CallError, Lane, Power, State, domain};
use crate::hypervisor::process::{Driver, Remains};

/// A domain at a URI that an order means.
pub(super) struct Meant {
    /// The URI's index.
    pub(super) index: usize,
    pub(super) domain: Identity,
    /// Its power before the lock was taken, for the order of trying only.
    pub(super) power: Power,
    /// What the table knows of it, if its own process is to be killed.
    pub(super) entry: Option<Entry>,
    /// Why nothing can be done there: the last word of a silent URI.
    pub(super) veto: Option<Detail>,
    /// Whether only this host's own processes speak of it, and no URI does.
    pub(super) by_host: bool,
}

impl Meant {
    fn new(index: usize, domain: Identity, power: Power) -> Self {
        Self { index, domain, power, entry: None, veto: None, by_host: false }
    }

    fn is(&self, index: usize, uuid: Uuid) -> bool {
        self.index == index && self.domain.uuid == uuid
    }

    /// Whether its URI has a say. A namesake that was off by libvirt's last word has none if
    /// libvirt does not answer now. It is left out, as by a look-up: the silence of one URI must
    /// not keep what runs at another from being fenced.
    pub(super) async fn has_a_say(&self, known: &Known) -> bool {
        if self.entry.is_none() || self.power.is_active() {
            return true;
        }
        let Some(uri) = known.uris.get(self.index) else { return false };
        let (uuid, by) = (self.domain.uuid, Instant::now() + known.grace);
        let asked = uri.call(Lane::Query, by, move |connect| domain::id(connect, uuid));
        // A full queue is no silence.
        let answers =
            matches!(timeout_at(by, asked).await, Ok(Ok(_) | Err(CallError::Busy(_) | CallError::Libvirt(_))));
        if !answers {
            let domain = &self.domain;
            tracing::warn!(%domain, "libvirt does not answer about it: taken to be off still, as it was when it last did");
            uri.silent.store(true, Ordering::Relaxed);
        }
        answers
    }
}

/// What an order is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// To kill, by a domain's own process if that is at hand and `direct`.
    Kill { direct: bool },
    /// To start.
    Start,
}

/// Looks a target up and takes the locks of its domains.
pub(super) struct Search<'a> {
    pub(super) known: &'a Known,
    pub(super) locks: &'a Locks,
    pub(super) restarts: &'a Restarts,
    pub(super) target: &'a Target,
}

impl Search<'_> {
    /// The domains that are meant, or why there is none. The locks that are taken are put into
    /// `held`.
    ///
    /// What was foreseen tells which domains there are, and spares a look-up. Whether one is off is
    /// asked again, with its lock held.
    pub(super) async fn run(
        &self,
        purpose: Purpose,
        foresight: Option<Foresight>,
        held: &mut Vec<Held>,
    ) -> Result<Vec<Meant>, Detail> {
        held.push(self.locks.spelled(self.target).await);
        self.known.refresh(self.target).await;
        if purpose == (Purpose::Kill { direct: true }) {
            if let Some(all) = self.by_processes(held).await {
                return Ok(all);
            }
            held.truncate(1);
        }
        let mut all: Vec<Meant> = Vec::new();
        // Before the look-up as well as after it. Else neither would see a transient domain's
        // restart that is done in between, and the domain would be called unknown.
        self.add_pending(&mut all, |_| true);
        let answers = match Foresight::end(foresight, self.known, self.restarts, self.target).await {
            Some(foreseen) => foreseen.answers,
            None => self.known.query(self.target, |_| false).await,
        };
        for found in &answers.found {
            if let Some(domain) = self.known.identity(found) {
                all.retain(|meant| !meant.is(found.index, domain.uuid));
                all.push(Meant::new(found.index, domain, found.seen.power));
            }
        }
        self.add_remembered(&answers, &mut all);
        if purpose != Purpose::Start {
            self.add_unknown(&mut all).await;
        }
        self.add_pending(&mut all, |_| true);
        let uuids = sorted(all.iter().map(|meant| meant.domain.uuid));
        self.lock(&uuids, held).await;
        // The order that was waited for may have been a reboot.
        self.add_pending(&mut all, |uuid| uuids.contains(&uuid));
        if all.is_empty() { Err(nowhere(answers)) } else { Ok(all) }
    }

    async fn lock(&self, uuids: &[Uuid], held: &mut Vec<Held>) {
        for uuid in uuids {
            if *self.target != Target::Uuid(*uuid) {
                held.push(self.locks.uuid(*uuid).await);
            }
        }
    }

    /// Finds the target in the tables alone. `None`: no process of it is known to live, or there is
    /// more to it, and the URIs have to be asked.
    async fn by_processes(&self, held: &mut Vec<Held>) -> Option<Vec<Meant>> {
        let found = || {
            let uris = self.known.uris.iter().enumerate();
            let all =
                uris.filter_map(|(index, uri)| uri.table.find(self.target).map(|(uuid, entry)| (index, uuid, entry)));
            let all: Vec<_> = all.collect();
            let lives = |entry: &Entry| entry.instance.as_ref().and_then(Instance::living).is_some();
            all.iter().any(|(_, _, entry)| lives(entry)).then_some(all)
        };
        let first = found()?;
        self.lock(&sorted(first.iter().map(|(_, uuid, _)| *uuid)), held).await;
        // The wait for the locks took its time. What is true now counts, and must be about the
        // domains that are locked.
        let now = found()?;
        let which = |all: &[(usize, Uuid, Entry)]| all.iter().map(|it| (it.0, it.1)).collect::<Vec<_>>();
        if which(&now) != which(&first) {
            return None;
        }
        // An earlier daemon knew of a domain at a URI that this one has not heard of yet.
        if self.known.uris.iter().any(|uri| uri.table.recalled.find(self.target).is_some()) {
            return None;
        }
        // Nor may an instance be left out that runs at a URI and is not in its table yet.
        if self.known.is_known_unseen(self.target).await {
            return None;
        }
        let mut all = Vec::new();
        for (index, uuid, entry) in now {
            let uri = &self.known.uris[index];
            let power = match &entry.instance {
                Some(instance) => Power::Active(instance.state),
                None if entry.moved_away => Power::MovedAway,
                None => Power::Off,
            };
            // An "off" that cannot be had afresh is left out, as by a query. So is where the domain
            // has moved away from, since it lives at another URI.
            if power.is_active() || uri.is_lively() {
                let domain = uri.identity(uuid, &entry.name);
                all.push(Meant { entry: Some(entry), ..Meant::new(index, domain, power) });
            }
        }
        // A namesake that waits for its restart is meant, too.
        let mut pending = Vec::new();
        self.add_pending(&mut pending, |uuid| !all.iter().any(|meant| meant.domain.uuid == uuid));
        if !pending.is_empty() {
            return None;
        }
        // A machine that another URI speaks of may run here, lost by its own libvirtd.
        self.add_unknown(&mut all).await;
        Some(all)
    }

    /// Adds the domains that wait for a restart: a transient one is known nowhere else.
    fn add_pending(&self, all: &mut Vec<Meant>, wanted: impl Fn(Uuid) -> bool) {
        for plan in self.restarts.of(self.target) {
            let uuid = plan.domain.uuid;
            if !all.iter().any(|meant| meant.is(plan.index, uuid)) && wanted(uuid) {
                all.push(Meant::new(plan.index, plan.domain.clone(), Power::Off));
            }
        }
    }

    /// Adds the last words of silent URIs, but not about a domain that was killed there and waits
    /// for its restart.
    fn add_remembered(&self, answers: &Answers, all: &mut Vec<Meant>) {
        for (found, error) in &answers.remembered {
            let Some(domain) = self.known.identity(found) else { continue };
            if !all.iter().any(|meant| meant.is(found.index, domain.uuid)) {
                let veto = Some(last_word(self.known, found, error.clone()));
                all.push(Meant { veto, ..Meant::new(found.index, domain, found.seen.power) });
            }
        }
    }

    /// Adds the domains that only this host's own processes speak of: those that libvirt has lost,
    /// or cannot speak of now.
    ///
    /// If no URI speaks of the target, all is added that the target means by its processes. Beside
    /// a URI's word only the very domain counts: a machine with the UUID that this URI speaks of,
    /// and the domain that a silent URI spoke of last. A namesake is another domain.
    async fn add_unknown(&self, all: &mut Vec<Meant>) {
        let known = self.known;
        let nobody_speaks = all.iter().all(|meant| meant.veto.is_some());
        // A container is no machine.
        let machines = all.iter().filter(|meant| known.driver(meant.index) != Some(Driver::Lxc));
        let machines = sorted(machines.map(|meant| meant.domain.uuid));
        let is_at =
            |meant: &Meant, of: Driver, uuid| meant.domain.uuid == uuid && known.driver(meant.index) == Some(of);
        let is_spoken_of =
            |all: &[Meant], of: Driver, uuid| all.iter().any(|meant| meant.veto.is_none() && is_at(meant, of, uuid));
        let qemu = known.index_of(Driver::Qemu);
        let is_lost = qemu.is_some() && machines.iter().any(|uuid| !is_spoken_of(all, Driver::Qemu, *uuid));
        let is_silent = all.iter().any(|meant| meant.veto.is_some() && known.driver(meant.index).is_some());
        if !nobody_speaks && !is_lost && !is_silent {
            return;
        }
        let look = known.host.look(Vec::new()).await;
        for Unknown { index, domain, may_be_elsewhere } in known.unknown(&look, self.target, &machines) {
            let (Some(of), uuid) = (known.driver(index), domain.uuid) else { continue };
            let is_it = |meant: &Meant| is_at(meant, of, uuid);
            let is_the_very_one =
                all.iter().any(is_it) || of == Driver::Qemu && machines.contains(&uuid) || nobody_speaks;
            if is_spoken_of(all, of, uuid) || !is_the_very_one {
                continue;
            }
            let mut meant = Meant { by_host: true, ..Meant::new(index, domain, Power::Active(State::RUNNING)) };
            // It lives, so nobody may say that it is off. And another host may go on with it, so
            // its death says nothing.
            let has_moved = all.iter().any(|known| is_it(known) && known.power == Power::MovedAway);
            if has_moved || may_be_elsewhere {
                tracing::warn!(domain = %meant.domain, "a process of it lives, and it may be on its way to or from another host");
                if !all.iter().any(is_it) {
                    let why = "a process of it lives here, and it may be on its way to or from another host";
                    meant.veto = Some(doubt(why.to_owned()));
                    all.push(meant);
                }
                continue;
            }
            // Groups have judged the name that was asked for. A URI whose user chooses UUIDs must
            // not lead to the kill of another machine.
            let is_asked_for = match self.target {
                Target::Uuid(asked) => *asked == uuid,
                Target::Name(asked) => *asked == meant.domain.name,
            };
            if !is_asked_for {
                let why =
                    format!("a machine with its UUID and the name {} lives here", meant.domain.name.escape_debug());
                tracing::warn!(domain = %meant.domain, "not killed for {}, which has its UUID", self.target);
                all.push(Meant { veto: Some(doubt(why)), ..meant });
                continue;
            }
            all.retain(|known| !is_it(known));
            all.push(meant);
        }
        // If the processes could not be looked at, nobody may say that nothing of the domain lives
        // here.
        let Some(uri) = qemu.and_then(|index| known.uris.get(index)) else { return };
        for uuid in machines {
            if all.iter().any(|meant| is_at(meant, Driver::Qemu, uuid)) {
                continue;
            }
            let Some(name) = all.iter().find(|meant| meant.domain.uuid == uuid).map(|meant| &meant.domain.name) else {
                continue;
            };
            let Some(whom) = uri.table.whom(uuid, name) else { continue };
            if matches!(look.remains(&whom), Remains::Nothing) {
                continue;
            }
            let why = match known.host.remains(&whom).await {
                Remains::Nothing => continue,
                Remains::Living(_) => "a process of it has only now been found".to_owned(),
                Remains::Doubt(why) => why,
            };
            let (index, domain) = (qemu.unwrap_or_default(), uri.identity(uuid, name));
            let meant = Meant::new(index, domain, Power::Active(State::RUNNING));
            all.push(Meant { veto: Some(doubt(why)), by_host: true, ..meant });
        }
    }
}
