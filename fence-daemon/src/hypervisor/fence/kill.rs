//! The short way off: SIGKILL to a domain's own process, and that process's death as the proof.
//!
//! The steps of an `off`:
//!
//! 1. libvirt's own destroy is sent and not waited for. For 0.2 s it expects the process to end, so
//!    that its record says "shut off (destroyed)" and not "crashed". If libvirt is slower than the
//!    kill, the record says "crashed". Nothing depends on it.
//! 2. SIGKILL is sent through the pidfd. A guest that is stopped or paused dies as well.
//! 3. The pidfd says that every thread is gone. Helpers are dead, too, and writes under way
//!    (io_uring) are over: see [`host`](crate::hypervisor::process::host).
//! 4. The client is answered. The domain is not started again until libvirt's destroy has ended, so
//!    that it cannot hit a later instance.
//!
//! A `reboot` has no step 1: destroy would hold the domain for 0.2 s before it can be started
//! again. libvirt notices the death by itself within milliseconds (see [`Monitor`]) and calls it a
//! crash. The start that follows replaces that record.
//!
//! A domain with a migration under way is not killed in this way: the death of its process here
//! says nothing about the other host.

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::{Instant, interval_at};

use super::{Off, Record, RecordFile, Records, Source, Unproven, by_libvirt::destroy};
use crate::clock::Moment;
use crate::fault::{self, Point};
use crate::hypervisor::deadline::Deadline;
use crate::hypervisor::known::{Entry, Identity, Uri};
use crate::hypervisor::libvirt::{CallError, Domain, Lane, State};
use crate::hypervisor::process::{Host, Job, Monitor, Victim};

/// How long a process may take to die before the log says what keeps it, and how often it says so.
const OBSTACLE: Duration = Duration::from_secs(3);

/// How long the other processes of a domain, and its writes, may take to be over.
const CLEAR_LIMIT: Duration = Duration::from_secs(60);

/// How late libvirt's destroy may begin: it is of use only while libvirt has not noticed the death.
const RECORD_BEGIN: Duration = Duration::from_millis(500);

/// How long libvirt may take to tell a transient domain's XML. Then it is killed without.
const XML_LIMIT: Duration = Duration::from_secs(2);

/// The same, if an earlier XML is known.
const XML_SOON: Duration = Duration::from_millis(250);

/// What came of the short way.
pub(super) struct Killed {
    pub(super) off: Off,
    /// libvirt's own destroy, still under way.
    pub(super) destroy: Option<JoinHandle<()>>,
    /// What the next daemon finds of a reboot, if this one dies.
    pub(super) kept: Option<RecordFile>,
}

/// Kills the domain's process and waits until it is dead, however long that takes. `None`: this way
/// is not open, and nothing was done.
pub(super) async fn kill(
    host: &Host,
    records: &Records,
    uri: &Arc<Uri>,
    domain: &Identity,
    entry: &Entry,
    reboot: bool,
    deadline: &Deadline,
) -> Option<Killed> {
    let instance = entry.instance.as_ref()?;
    let victim = instance.living()?;
    let source = if reboot && !entry.persistent { xml(uri, domain).await } else { Source::Definition };
    let record = Record::new(&domain.uri, domain.uuid, &domain.name, Some(instance.id), source.xml());
    let kept = reboot.then(|| records.write(&record)).flatten();
    if reboot {
        fault::point(Point::AfterRecord);
    }
    let monitor = if reboot { Monitor::of(victim) } else { None };
    let destroy = match send_kill(uri, domain, instance.id, victim, reboot, deadline).await {
        Ok(destroy) => destroy,
        Err(why) => {
            tracing::warn!(%domain, pid = victim.pid(), why, "not killed directly, left to libvirt");
            if let Some(kept) = kept {
                kept.remove();
            }
            return None;
        }
    };
    let killed = Instant::now();
    if let Some(monitor) = monitor {
        tokio::spawn(monitor.close_after_death());
    }
    fault::point(Point::AfterKill);
    // Beside the death: it takes no longer.
    let whom = uri.table.whom(domain.uuid, &domain.name);
    let (off, left) = tokio::join!(prove(domain, victim, instance.state, source), async {
        match &whom {
            Some(whom) => host.clear(whom, Some(victim), None, deadline, killed + CLEAR_LIMIT).await.map(drop),
            None => Ok(()),
        }
    });
    let off = match (off, left) {
        (Off::Proven { was, .. }, Err(left)) => Off::Unproven { was, why: Unproven::Left(left) },
        (Off::Proven { was, source, .. }, Ok(())) => Off::Proven { was, at: Moment::now(), source },
        (off, _) => off,
    };
    if matches!(off, Off::Proven { .. }) {
        uri.table.note_leaving(domain.uuid, false);
    }
    fault::point(Point::AfterProof);
    let kept = match (kept, &off) {
        (Some(kept), Off::Proven { at, .. }) => Some(records.confirm(record, kept, *at)),
        (kept, _) => kept,
    };
    Some(Killed { off, destroy, kept })
}

/// Sends SIGKILL, and before an off has libvirt destroy the domain as well.
///
/// # Errors
/// Nothing was sent: why.
async fn send_kill(
    uri: &Arc<Uri>,
    domain: &Identity,
    instance: u32,
    victim: &Victim,
    reboot: bool,
    deadline: &Deadline,
) -> Result<Option<JoinHandle<()>>, String> {
    let noted = uri.table.note_kill(domain.uuid, victim);
    noted.map_err(|error| format!("cannot see whether it uses io_uring: {error}"))?;
    // As late as possible: no migration must begin and end between here and the kill.
    match victim.job() {
        Job::None if !uri.table.is_leaving(domain.uuid) => {}
        job @ (Job::None | Job::Leaving | Job::Arriving | Job::Unknown) => return Err(format!("its job is {job:?}")),
    }
    // libvirt's way is too late as well, and says so.
    deadline.check().map_err(|_| "its time is over".to_owned())?;
    let destroy = (!reboot).then(|| tokio::spawn(destroy_for_record(Arc::clone(uri), domain.clone(), instance)));
    if destroy.is_some() {
        fault::point_elsewhere(Point::AfterDestroy).await;
    }
    victim.kill().map_err(|error| format!("cannot kill its process: {error}"))?;
    Ok(destroy)
}

/// Waits for the proof.
async fn prove(domain: &Identity, victim: &Victim, was: State, source: Source) -> Off {
    let killed = Instant::now();
    let mut late = interval_at(killed + OBSTACLE, 3 * OBSTACLE);
    let mut told = false;
    loop {
        tokio::select! {
            death = victim.death() => match death {
                Ok(()) => break,
                Err(error) => {
                    let error = CallError::NotConnected(format!("its process cannot be watched: {error}"));
                    return Off::Unproven { was, why: Unproven::Unknown(error) };
                }
            },
            _ = late.tick() => {
                told = true;
                let (pid, obstacle, after) = (victim.pid(), victim.obstacle(), killed.elapsed());
                tracing::error!(%domain, pid, ?after, "killed, and not dead yet: {obstacle}");
            }
        }
    }
    let at = Moment::now();
    if told {
        tracing::warn!(%domain, pid = victim.pid(), after = ?killed.elapsed(), "dead at last");
    }
    Off::Proven { was, at, source }
}

/// A transient domain's XML: as libvirt says now, or as it said last if it does not answer soon.
async fn xml(uri: &Arc<Uri>, domain: &Identity) -> Source {
    let uuid = domain.uuid;
    let limit = match uri.table.xml(uuid) {
        Some(xml) if !uri.is_lively() => return Source::Xml(xml),
        Some(_) => XML_SOON,
        None => XML_LIMIT,
    };
    let asked = uri.call(Lane::Query, Instant::now() + limit, move |connect| Domain::get(connect, uuid)?.xml());
    let why = match tokio::time::timeout(limit, asked).await {
        Ok(Ok(xml)) => return Source::Xml(xml),
        Ok(Err(error)) => error,
        Err(_) => CallError::Overdue,
    };
    uri.table.xml(uuid).map_or(Source::Nothing(why), Source::Xml)
}

/// Has libvirt destroy the domain too, so that its own record is what a destroy leaves behind.
async fn destroy_for_record(uri: Arc<Uri>, domain: Identity, instance: u32) {
    let uuid = domain.uuid;
    let deadline = Deadline::at(Instant::now() + RECORD_BEGIN);
    let begin_by = deadline.by();
    match uri.call(Lane::Record, begin_by, move |connect| destroy(connect, uuid, instance, &deadline)).await {
        Ok(()) => tracing::debug!(%domain, "libvirt has destroyed it, too"),
        // Mostly it was faster in noticing the death than in destroying.
        Err(error) => tracing::info!(%domain, %error, "killed; libvirt's own destroy did not go through"),
    }
}
