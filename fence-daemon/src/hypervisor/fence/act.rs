//! Off, on and reboot: the rules of the [module](super), carried out. What only asks is in [`status`](super::status).

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use fence_common::target::Target;
use fence_common::wire::{Op, Reply};
use tokio::time::{Instant, sleep, timeout, timeout_at};
use uuid::Uuid;

use super::fence_race::{Aim as Entered, Aimed, Asker, Doomed, Refused};
use super::locks::Held;
use super::off::{self, At};
use super::outcome::{Detail, Identity, Outcome};
use super::restart::{self, Plan};
use super::status::{self, last_word, nowhere};
use crate::hypervisor::deadline::Deadline;
use crate::hypervisor::known::disproof;
use crate::hypervisor::known::events::refresh;
use crate::hypervisor::known::presumed;
use crate::hypervisor::known::query_all::{Found, Survey};
use crate::hypervisor::known::table::Entry;
use crate::hypervisor::libvirt::domain::{self, Power, Source, Started};
use crate::hypervisor::libvirt::error::CallError;
use crate::hypervisor::libvirt::link::Lane;
use crate::hypervisor::{Inner, Kill, RebootReply};

/// How long libvirt's own destroy may keep the domain's lock after the kill: longer than its connection lives without an answer.
const RECORD_LIMIT: Duration = Duration::from_secs(25);

/// How long after a destroy the domain is left alone. libvirt (9.0) queues what it makes of the closed monitor for a thread of its own, which does not
/// look whether that was an earlier instance's: if it comes late it kills what was started meanwhile, and nothing tells when it has come.
const SETTLED: Duration = Duration::from_millis(150);

/// Does what `op` says to `target`. What is not begun by the deadline is not done; what is begun is seen through to its end, with the
/// domain's lock held, however long that takes.
pub(crate) async fn perform(
    inner: Arc<Inner>,
    op: Op,
    target: Target,
    asker: Option<Asker>,
    deadline: Deadline,
) -> Outcome {
    match op {
        Op::Status => status::status(&inner, &target).await,
        Op::Off | Op::Reboot => fence(&inner, op, &target, asker, &deadline).await,
        Op::On => {
            inner.restarts.permit(&target, Instant::now());
            Change::begin(inner, &target, deadline, Aim::Start).await.run_on().await
        }
        Op::Null | Op::DevStatus | Op::HostList => Outcome::failure(Detail::NotAboutADomain),
    }
}

/// Off or reboot. An asker that is being fenced itself waits for what comes of that, with no lock held.
async fn fence(inner: &Arc<Inner>, op: Op, target: &Target, asker: Option<Asker>, deadline: &Deadline) -> Outcome {
    let reboot = op == Op::Reboot;
    let mut asked = Instant::now();
    if reboot {
        inner.restarts.permit(target, asked);
    }
    loop {
        if !reboot {
            // Before its turn comes, and beyond it if it never does: a reboot that has been stuck must not bring the domain back then.
            asked = inner.restarts.forbid(target);
        }
        let change = Change::begin(Arc::clone(inner), target, deadline.clone(), Aim::Kill).await;
        let done = change.run_off(reboot, asker, asked).await;
        if !reboot && done.as_ref().map_or(true, |outcome| outcome.detail != Detail::Occupied) {
            inner.restarts.permit(target, asked);
        }
        match done {
            Ok(outcome) => return outcome,
            Err(doomed) if !inner.duels.over(&doomed, deadline.by()).await => {
                return Outcome::failure(Detail::Condemned(doomed.name));
            }
            Err(_) => {}
        }
    }
}

/// Enters those that are about to be killed, unless whoever asks for it is being killed itself.
fn aim(inner: &Inner, places: &[Place], asker: Option<Asker>) -> Result<Entered, Refused> {
    let running = places.iter().filter(|place| matches!(place.power, Power::Active(_)));
    let aimed = running.filter_map(|place| {
        let Identity { uuid, name, .. } = place.domain.clone();
        let macs = inner.uris.get(place.number)?.table.get(uuid)?.macs;
        Some(Aimed { uuid, name, macs })
    });
    let running_with = |mac| inner.uris.iter().flat_map(|uri| uri.table.running_with(mac)).collect();
    inner.duels.aim(asker, aimed.collect(), running_with)
}

/// Where a domain is known, and in which state a look-up before the lock found it (for the order of trying only).
pub(crate) struct Place {
    pub(crate) number: usize,
    pub(crate) domain: Identity,
    pub(crate) power: Power,
    /// What the table knows of it, if its own process is to be killed.
    pub(crate) entry: Option<Entry>,
    /// Why nothing can be done there: what a silent URI said last.
    pub(crate) veto: Option<Detail>,
    /// Whether no URI speaks of it, and only this host's own processes do.
    pub(crate) by_host: bool,
}

impl Place {
    /// Whether this place has a say. A namesake that was off when libvirt last spoke of it has none if libvirt does not answer now: it is left
    /// out, as by a look-up, since the silence of one URI must not keep what runs at another from being fenced.
    async fn is_worth_waiting_for(&self, inner: &Inner) -> bool {
        if self.entry.is_none() || matches!(self.power, Power::Active(_)) {
            return true;
        }
        let Some(uri) = inner.uris.get(self.number) else { return false };
        let (uuid, by) = (self.domain.uuid, Instant::now() + inner.limits.grace);
        let asked = uri.call(Lane::Query, by, move |connect| domain::id(connect, uuid));
        // That more is asked than can be is no silence.
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
enum Aim {
    Kill,
    Start,
}

/// An order to change a domain's power, with all its locks held.
struct Change {
    inner: Arc<Inner>,
    deadline: Deadline,
    /// The domains that are meant, or why there is none.
    places: Result<Vec<Place>, Detail>,
    /// Held until the order is seen through.
    locks: Vec<Held>,
}

impl Change {
    /// Looks the target up and takes the locks.
    async fn begin(inner: Arc<Inner>, target: &Target, deadline: Deadline, aim: Aim) -> Self {
        let by = deadline.by();
        let mut change = Self { inner, deadline, places: Err(Detail::Occupied), locks: Vec::new() };
        if timeout_at(by, change.prepare(target, aim)).await.is_err() {
            change.places = Err(Detail::Occupied);
        }
        change
    }

    async fn prepare(&mut self, target: &Target, aim: Aim) {
        self.locks.push(self.inner.locks.spelled(target).await);
        refresh(&self.inner.uris, target, self.inner.limits.grace).await;
        if aim == Aim::Kill && self.inner.kill == Kill::Direct && self.aim_at_processes(target).await {
            return;
        }
        let mut places: Vec<Place> = Vec::new();
        // Before the look-up as well as after it: a transient domain's restart that is done in between would otherwise be seen by
        // neither, and the domain be called unknown.
        self.add_pending(target, &mut places, |_| true);
        let survey = disproof::ask(&self.inner, target, |_| false).await;
        for found in &survey.found {
            let Found { place: number, seen } = found;
            if let Some(domain) = found.identity(&self.inner.uris) {
                places.retain(|place| place.number != *number || place.domain.uuid != domain.uuid);
                places.push(Place {
                    number: *number,
                    domain,
                    power: seen.power,
                    entry: None,
                    veto: None,
                    by_host: false,
                });
            }
        }
        self.add_remembered(&survey, &mut places);
        if aim == Aim::Kill {
            presumed::add_unknown(&self.inner, target, &mut places).await;
        }
        self.add_pending(target, &mut places, |_| true);
        let uuids = crate::hypervisor::known::query_all::sorted(places.iter().map(|place| place.domain.uuid));
        for uuid in &uuids {
            if *target != Target::Uuid(*uuid) {
                self.locks.push(self.inner.locks.uuid(*uuid).await);
            }
        }
        // What we waited for may have been a reboot.
        self.add_pending(target, &mut places, |uuid| uuids.contains(&uuid));
        self.places = if places.is_empty() { Err(nowhere(survey)) } else { Ok(places) };
    }

    /// Finds the target in the tables alone. `false`: no process of it is known to live, libvirt has to be asked.
    async fn aim_at_processes(&mut self, target: &Target) -> bool {
        let lives = |entry: &Entry| entry.instance.as_ref().is_some_and(|instance| instance.living().is_some());
        let found = |inner: &Inner| {
            let uris = inner.uris.iter().enumerate();
            let known =
                uris.filter_map(|(number, uri)| uri.table.find(target).map(|(uuid, entry)| (number, uuid, entry)));
            known.collect::<Vec<_>>()
        };
        let first = found(&self.inner);
        if !first.iter().any(|(_, _, entry)| lives(entry)) {
            return false;
        }
        for uuid in crate::hypervisor::known::query_all::sorted(first.iter().map(|(_, uuid, _)| *uuid)) {
            if *target != Target::Uuid(uuid) {
                self.locks.push(self.inner.locks.uuid(uuid).await);
            }
        }
        // Waiting for the locks took its time: what is true now counts, and must be about the domains that are locked.
        let now = found(&self.inner);
        let same =
            now.iter().map(|(number, uuid, _)| (number, uuid)).eq(first.iter().map(|(number, uuid, _)| (number, uuid)));
        if !same || !now.iter().any(|(_, _, entry)| lives(entry)) {
            self.locks.truncate(1);
            return false;
        }
        // What an earlier daemon knew of a URI that this one has not heard of yet is for a survey.
        if self.inner.uris.iter().any(|uri| uri.table.recalled.find(target).is_some()) {
            self.locks.truncate(1);
            return false;
        }
        let mut places = Vec::new();
        for (number, uuid, entry) in now {
            let uri = &self.inner.uris[number];
            let power = match &entry.instance {
                Some(instance) => Power::Active(instance.state),
                None if entry.moved_away => Power::MovedAway,
                None => Power::Off,
            };
            // What is off here by a word that cannot be had afresh is left out, as by a survey. So is where it has moved away from, since
            // it lives at another URI.
            if matches!(power, Power::Active(_)) || uri.is_lively() {
                let domain = Identity { uri: Arc::clone(&uri.text), uuid, name: entry.name.clone() };
                places.push(Place { number, domain, power, entry: Some(entry), veto: None, by_host: false });
            }
        }
        // A namesake that waits for its restart is meant, too.
        let mut pending = Vec::new();
        self.add_pending(target, &mut pending, |uuid| !places.iter().any(|place| place.domain.uuid == uuid));
        if !pending.is_empty() {
            self.locks.truncate(1);
            return false;
        }
        self.places = Ok(places);
        true
    }

    /// Adds the domains that wait for a restart: a transient one is known nowhere else.
    fn add_pending(&self, target: &Target, places: &mut Vec<Place>, wanted: impl Fn(Uuid) -> bool) {
        for plan in self.inner.restarts.of(target) {
            let known = places.iter().any(|place| place.number == plan.place && place.domain.uuid == plan.domain.uuid);
            if !known && wanted(plan.domain.uuid) {
                let domain = plan.domain.clone();
                places.push(Place {
                    number: plan.place,
                    domain,
                    power: Power::Off,
                    entry: None,
                    veto: None,
                    by_host: false,
                });
            }
        }
    }

    /// Adds what silent URIs said last, but not of what was killed there and waits for its restart.
    fn add_remembered(&self, survey: &Survey, places: &mut Vec<Place>) {
        for (found, error) in &survey.remembered {
            let Some(domain) = found.identity(&self.inner.uris) else { continue };
            let is_it = |place: &Place| place.number == found.place && place.domain.uuid == domain.uuid;
            if !places.iter().any(is_it) {
                let veto = Some(last_word(&self.inner, found, error.clone()));
                places.push(Place {
                    number: found.place,
                    domain,
                    power: found.seen.power,
                    entry: None,
                    veto,
                    by_host: false,
                });
            }
        }
    }

    /// `off`, or with `reboot` the off and the start in the background. `asked`: when it was asked for.
    ///
    /// # Errors
    /// The asker is being fenced itself, and nothing was done yet.
    async fn run_off(self, reboot: bool, asker: Option<Asker>, asked: Instant) -> Result<Outcome, Doomed> {
        let places = match self.places {
            Ok(places) => places,
            Err(detail) => return Ok(Outcome::failure(detail)),
        };
        let aim = match aim(&self.inner, &places, asker) {
            Ok(aim) => aim,
            Err(Refused::Dying(doomed)) => return Err(doomed),
            Err(Refused::Dead(name)) => return Ok(Outcome::failure(Detail::Condemned(name))),
        };
        let meant = crate::hypervisor::known::query_all::sorted(places.iter().map(|place| place.domain.uuid));
        // All at once: two domains of one name at two URIs are two kills.
        let kills: Vec<_> = places
            .into_iter()
            .map(|place| {
                let (inner, deadline) = (Arc::clone(&self.inner), self.deadline.clone());
                let domain = place.domain.clone();
                let kill = async move {
                    if !place.is_worth_waiting_for(&inner).await {
                        return None;
                    }
                    Some(off::off_at(inner, place, reboot, deadline).await)
                };
                (domain, tokio::spawn(kill))
            })
            .collect();
        let mut outcomes = Vec::new();
        let mut plans = Vec::new();
        let mut records = Vec::new();
        let mut destroyed = false;
        for (domain, kill) in kills {
            let at = kill.await.unwrap_or_else(|_| Some(At::said(Outcome::failure(Detail::Broken))));
            let Some(At { outcome, plan, record, by_libvirt }) = at else { continue };
            destroyed |= by_libvirt;
            outcomes.push(outcome.about(domain));
            plans.extend(plan);
            records.extend(record);
        }
        let outcome = off::together(outcomes);
        match outcome.proven_off {
            Some(at) => aim.succeeded(at),
            None => drop(aim),
        }
        let mut starting = Vec::new();
        for plan in plans {
            if outcome.reply == Reply::Success {
                starting.push((plan.place, plan.domain.uuid));
                restart::schedule(&self.inner, plan, asked);
            } else {
                // It must not come back while its namesake, which may be the same guest, is not known to be off.
                tracing::error!(domain = %plan.domain, "rebooted only in part: it is off and is not started again");
                if let Some(kept) = plan.kept {
                    kept.remove();
                }
            }
        }
        // libvirt's destroy, where one is under way, must not hit what a later request starts.
        if destroyed || !records.is_empty() {
            let unsettled: Vec<_> = meant.into_iter().map(|uuid| self.inner.settling.enter(uuid)).collect();
            tokio::spawn(async move {
                for record in records {
                    // A lost task is as much over as one that ended. One that hangs in libvirt must not keep the domain from being fenced again.
                    let _ = timeout(RECORD_LIMIT, record).await;
                }
                sleep(SETTLED).await;
                drop(unsettled);
            });
        }
        // Only now: a pending restart is entered with the lock held.
        drop(self.locks);
        Ok(match self.inner.reboot_reply {
            RebootReply::On if !starting.is_empty() => {
                off::started(&self.inner, outcome, &starting, self.deadline.by()).await
            }
            RebootReply::Off | RebootReply::On => outcome,
        })
    }

    async fn run_on(self) -> Outcome {
        let mut places = match self.places {
            Ok(places) => places,
            Err(detail) => return Outcome::failure(detail),
        };
        // Where it runs there is nothing to do; where it moved away from is the last place to start it.
        places.sort_by_key(|place| {
            let rank = match place.power {
                Power::Active(_) => 0,
                Power::Off => 1,
                Power::MovedAway => 2,
            };
            (rank, place.number)
        });
        let Some(place) = places.first() else { return Outcome::failure(Detail::Broken) };
        if let Some(veto) = &place.veto {
            return Outcome::failure(veto.clone()).about(place.domain.clone());
        }
        let (number, uuid) = (place.number, place.domain.uuid);
        // A pending restart knows more than we do: the XML of a transient domain. It stays pending if this start fails.
        let plan = self.inner.restarts.get(number, uuid).unwrap_or_else(|| {
            Arc::new(Plan {
                place: number,
                domain: place.domain.clone(),
                source: Source::Definition,
                // One that has just died, and libvirt has not noticed, is not "on already".
                dead: self.inner.uris.get(number).and_then(|uri| uri.table.dead_instance(uuid)),
                died: None,
                kept: None,
                inherited: false,
                held: false,
            })
        });
        let outcome = match plan.attempt(&self.inner, &self.deadline).await {
            Ok(Started::Already(state)) => Outcome::found(Reply::Success, Detail::AlreadyActive(state)),
            Ok(Started::Now(state)) => Outcome::found(Reply::Success, Detail::Started(state)),
            Ok(Started::NotActive) => Outcome::failure(Detail::NotActive),
            Ok(Started::MovedAway) => Outcome::failure(Detail::MovedAway),
            Ok(Started::Gone) => Outcome::failure(Detail::Vanished),
            Ok(Started::NotYet) => Outcome::failure(Detail::NotActive),
            Err(error) => Outcome::failure(Detail::Failed { uri: Arc::clone(&place.domain.uri), error }),
        };
        if outcome.reply == Reply::Success {
            for place in &places {
                self.inner.restarts.cancel(place.number, place.domain.uuid);
            }
        }
        drop(self.locks);
        outcome.about(plan.domain.clone())
    }
}
