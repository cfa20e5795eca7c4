//! Off or reboot of one domain at one URI.

use std::sync::Arc;

use fence_common::target::Target;
use fence_config::RebootMethod;
use tokio::task::JoinHandle;

use super::proof::{after_death, confirm, first_process};
use super::{
    Detail, Meant, Off, Orders, Outcome, Plan, Record, RecordFile, Records, Source, Unproven, by_libvirt, kill,
    orphans, reset,
};
use crate::clock::Moment;
use crate::fault::{self, Point};
use crate::hypervisor::deadline::Deadline;
use crate::hypervisor::known::{Identity, SeenDead, Uri};
use crate::hypervisor::libvirt::State;

/// What came of an `off` at one URI.
pub(super) struct OffAt {
    pub(super) outcome: Outcome,
    /// What a restart needs, if the domain is to be started again.
    pub(super) plan: Option<Plan>,
    /// A call to libvirt that is still under way.
    pub(super) pending: Option<JoinHandle<()>>,
    /// Whether libvirt was asked to destroy it.
    pub(super) by_libvirt: bool,
}

impl OffAt {
    pub(super) fn said(outcome: Outcome) -> Self {
        Self { outcome, plan: None, pending: None, by_libvirt: false }
    }
}

impl Orders {
    /// Powers the domain off at one URI, with its lock held.
    pub(super) async fn off_at(&self, meant: Meant, reboot: bool, deadline: Deadline) -> OffAt {
        let Meant { index, domain, power, entry, veto, by_host } = meant;
        if let Some(veto) = veto {
            return OffAt::said(Outcome::failure(veto));
        }
        let Some(uri) = self.known.uris.get(index) else { return OffAt::said(Outcome::failure(Detail::Broken)) };
        let (uuid, host, records) = (domain.uuid, &self.known.host, &self.restarter.records);
        // A reboot of a domain that waits for its restart is the same reboot: it will come back. An
        // off ends that.
        let restart = self.restarts.get(index, uuid);
        let was_ours = restart.as_ref().is_some_and(|plan| !plan.inherited);
        let mut already = match (restart.is_some(), reboot) {
            (false, _) => Detail::AlreadyOff,
            (true, true) => Detail::RestartPending,
            (true, false) => Detail::RestartCancelled,
        };
        if !reboot {
            self.restarts.cancel(index, uuid);
        }
        let mut resetting = None;
        let may_reset = reboot && restart.is_none() && self.options.now().reboot_method == RebootMethod::Reset;
        if may_reset
            && power.is_active()
            && self.known.is_alone(uri, &domain).await
            && let Some(at) = reset::reset(uri, &domain, self.reset, &deadline, &mut resetting).await
        {
            return OffAt::said(Outcome::off(at, Detail::Reset));
        }
        let orphans = uri.table.orphans(uuid);
        let had_orphans = !orphans.is_empty();
        let unproven = |why| OffAt::said(Outcome::failure(Detail::NotProvenOff { was: State(0), why }));
        // It may run where it was going, from what is left here.
        if had_orphans && uri.table.is_leaving(uuid) {
            return unproven(Unproven::Migrating);
        }
        if had_orphans && !orphans::kill(&domain, &orphans, &deadline).await {
            return unproven(Unproven::Orphan);
        }
        let id = uri.table.instance(uuid).map(|instance| instance.id);
        let killed = match &entry {
            Some(entry) => kill::kill(host, records, uri, &domain, entry, reboot, &deadline).await,
            None => None,
        };
        let (result, pending, kept, dead, by_libvirt) = match killed {
            Some(kill::Killed { off, destroy, kept }) => {
                let by_libvirt = destroy.is_some();
                (Ok(off), destroy, kept, id, by_libvirt)
            }
            None => {
                let foreseen = if reboot { foresee(records, uri, &domain) } else { None };
                let first = first_process(uri, &domain);
                let seen_dead = uri.table.seen_dead(&Target::Uuid(uuid));
                let dead = seen_dead.as_ref().and_then(|seen| seen.unnoticed.as_ref()).map(|instance| instance.id);
                let (result, look) = match seen_dead {
                    Some(seen) => {
                        already = if already == Detail::AlreadyOff { Detail::SeenDead } else { already };
                        (Ok(by_its_death(uri, &seen, reboot)), None)
                    }
                    None if by_host => (Ok(Off::Gone), None),
                    None => {
                        // At the same time: to look at this host takes as long as to ask libvirt.
                        let whom = uri.table.whom(uuid, &domain.name).filter(|_| !power.is_active());
                        let look = async { Some(host.look(vec![whom?]).await) };
                        tokio::join!(by_libvirt::off(uri, uuid, reboot, &deadline), look)
                    }
                };
                let result = confirm(host, uri, &domain, result, look.as_deref(), had_orphans, &deadline).await;
                let result = after_death(result, first.as_deref(), &deadline).await;
                let kept = foreseen.map(|(record, kept)| match &result {
                    Ok(Off::Proven { at, .. }) => records.confirm(record, kept, *at),
                    _ => kept,
                });
                let destroyed =
                    !uri.is_in_process() && !matches!(result, Ok(Off::Already(_) | Off::Gone | Off::MovedAway));
                (result, None, kept, dead, destroyed)
            }
        };
        if matches!(result, Ok(Off::Proven { .. })) && uri.table.driver.is_some() {
            uri.table.note_death(uuid, &domain.name, id.or(dead));
        }
        if let (Some(kept), false) = (&kept, matches!(result, Ok(Off::Proven { .. }))) {
            kept.remove();
        }
        // A reset that libvirt has not answered about is waited for like its destroy.
        let pending = match resetting {
            Some(resetting) => Some(tokio::spawn(async move {
                let _ = resetting.await;
                if let Some(pending) = pending {
                    let _ = pending.await;
                }
            })),
            None => pending,
        };
        if matches!(result, Ok(Off::Already(_) | Off::Proven { .. })) {
            tell_unseen(uri, &domain);
        }
        let mut plan = None;
        let outcome = match result {
            Ok(Off::Already(at)) => Outcome::off(at, already),
            // A transient domain between its proven off and its restart: we know why it is gone.
            Ok(Off::Gone) if was_ours => Outcome::off(Moment::now(), already),
            Ok(Off::Gone) => Outcome::failure(Detail::Vanished),
            Ok(Off::MovedAway) => Outcome::failure(Detail::MovedAway),
            Ok(Off::Proven { was, at, .. }) if !reboot => Outcome::off(at, Detail::Destroyed { was }),
            Ok(Off::Proven { was, at, source }) => {
                let died = Some(at);
                plan = Some(Plan { index, domain, source, dead, died, kept, inherited: false, held: false });
                Outcome::off(at, Detail::Rebooting { was })
            }
            Ok(Off::Unproven { was, why }) => Outcome::failure(Detail::NotProvenOff { was, why }),
            Err(error) => Outcome::failure(Detail::Failed { uri: Arc::clone(&uri.text), error }),
        };
        OffAt { outcome, plan, pending, by_libvirt }
    }
}

/// Names the disks of a fenced domain whose writes this host cannot see.
fn tell_unseen(uri: &Uri, domain: &Identity) {
    let unseen = uri.table.belongings.unseen(domain.uuid);
    if !unseen.is_empty() {
        tracing::warn!(%domain, unseen = unseen.join("; "), "fenced, but a server may still carry out what it has sent to these: fence it at the storage, too");
    }
}

/// A domain that was seen to die here is off without libvirt's word, which may hang. A reboot of
/// one that has died by itself, unnoticed, brings it back.
fn by_its_death(uri: &Uri, seen: &SeenDead, reboot: bool) -> Off {
    let at = Moment::now();
    match &seen.unnoticed {
        Some(instance) if reboot => {
            let source = uri.table.xml(seen.uuid).map_or(Source::Definition, Source::Xml);
            Off::Proven { was: instance.state, at, source }
        }
        Some(_) | None => Off::Already(at),
    }
}

/// Writes down what the next daemon needs if this one dies while libvirt destroys a domain that is
/// to be started again. Of a transient domain nothing can be said before its XML is known, which is
/// when it is about to be destroyed.
fn foresee(records: &Records, uri: &Uri, domain: &Identity) -> Option<(Record, RecordFile)> {
    let entry = uri.table.get(domain.uuid).filter(|entry| entry.persistent)?;
    let instance = entry.instance?.id;
    let record = Record::new(&domain.uri, domain.uuid, &domain.name, Some(instance), None);
    let kept = records.write(&record);
    fault::point(Point::AfterRecord);
    Some((record, kept?))
}
