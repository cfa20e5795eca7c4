//! The short way: SIGKILL to a domain's own process, and that process's death as the proof.
//!
//! The order of things, for an `off`:
//!
//! 1. libvirt's own destroy is sent off first and not waited for. It takes it 0.2 s, in which it expects the process to end, so that its
//!    record says "shut off (destroyed)" and not "crashed". If libvirt is slower than the kill, "crashed" it is; nothing depends on it.
//! 2. SIGKILL through the pidfd. A guest that is stopped or paused dies as well.
//! 3. The pidfd says that every thread is gone. Helpers are dead, too, and writes under way (io_uring) are over: see `host`.
//! 4. The client is told. The domain is not started again until libvirt's destroy has ended, so that it cannot hit a later instance.
//!
//! For a `reboot` there is no 1: destroy would hold the domain for its 0.2 s before it can be started again; libvirt notices the death by
//! itself within milliseconds, calls it a crash, and the start that follows replaces that record.
//!
//! A domain with a migration under way does not go this way: the death of its process here says nothing about the other host.

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::{Instant, interval_at, timeout_at};
use zeroize::Zeroizing;

use super::outcome::Identity;
use super::record::{Kept, Record};
use crate::clock::Moment;
use crate::fault::{self, Point};
use crate::hypervisor::Inner;
use crate::hypervisor::deadline::Deadline;
use crate::hypervisor::known::table::Entry;
use crate::hypervisor::libvirt::connection::Uri;
use crate::hypervisor::libvirt::domain::{self, Off, Source, State, Unproven};
use crate::hypervisor::libvirt::error::CallError;
use crate::hypervisor::libvirt::link::Lane;
use crate::hypervisor::process::host::Whom;
use crate::hypervisor::process::victim::{Job, Victim};

/// How long a process may take to die before the log says what keeps it, and how often it says so.
const OBSTACLE: Duration = Duration::from_secs(3);

/// How long what a domain has beside its own process may take to be over: other processes, writes under way.
const CLEAR_LIMIT: Duration = Duration::from_secs(60);

/// How late libvirt's destroy may begin: it is of use only while libvirt has not noticed the death.
const RECORD_BEGIN: Duration = Duration::from_millis(500);

/// How long a transient domain's XML may take to be had before it is killed without.
const XML_LIMIT: Duration = Duration::from_secs(2);

/// The same, if it is known how it was when libvirt last spoke of it.
const XML_SOON: Duration = Duration::from_millis(250);

/// What came of the short way.
pub(crate) struct Killed {
    pub(crate) off: Off,
    /// libvirt's book-keeping, still under way.
    pub(crate) record: Option<JoinHandle<()>>,
    /// What the next daemon finds of a reboot, if this one dies.
    pub(crate) kept: Option<Kept>,
}

/// Kills the domain's process and waits until it is dead, however long that takes. `None`: this way cannot be gone, nothing was done.
pub(crate) async fn kill(
    inner: &Inner,
    uri: &Arc<Uri>,
    domain: &Identity,
    entry: &Entry,
    reboot: bool,
    deadline: &Deadline,
) -> Option<Killed> {
    let instance = entry.instance.as_ref()?;
    let victim = instance.living()?;
    let source = match (reboot, entry.persistent) {
        (true, false) => xml(uri, domain).await,
        _ => Source::Definition,
    };
    let plan = Record::new(&domain.uri, domain.uuid, &domain.name, Some(instance.id), source.xml());
    let kept = if reboot {
        let kept = inner.records.write(&plan);
        fault::point(Point::AfterRecord);
        kept
    } else {
        None
    };
    let not_this_way = || {
        if let Some(kept) = &kept {
            kept.remove();
        }
    };
    if let Err(error) = uri.table.note_kill(domain.uuid, victim) {
        tracing::warn!(%domain, pid = victim.pid(), %error, "cannot see whether it uses io_uring: left to libvirt");
        not_this_way();
        return None;
    }
    // As late as possible: from here to the kill there must be no time for a migration to begin and to end.
    match victim.job() {
        Job::None if !uri.table.is_leaving(domain.uuid) => {}
        job @ (Job::None | Job::Leaving | Job::Arriving | Job::Unknown) => {
            tracing::info!(%domain, ?job, "not killed directly, left to libvirt");
            not_this_way();
            return None;
        }
    }
    if deadline.check().is_err() {
        // libvirt's way is too late as well, and says so.
        not_this_way();
        return None;
    }
    let record = (!reboot).then(|| tokio::spawn(record(Arc::clone(uri), domain.clone(), instance.id)));
    if record.is_some() {
        fault::point_elsewhere(Point::AfterDestroy).await;
    }
    if let Err(error) = victim.kill() {
        tracing::warn!(%domain, pid = victim.pid(), %error, "cannot kill its process: left to libvirt");
        not_this_way();
        return None;
    }
    let killed = Instant::now();
    fault::point(Point::AfterKill);
    // Beside the death: it takes no longer.
    let whom = Whom::at(&uri.table, domain.uuid, &domain.name);
    let (off, left) = tokio::join!(prove(domain, victim, instance.state, source), async {
        match &whom {
            Some(whom) => inner.host.clear(whom, Some(victim), deadline, killed + CLEAR_LIMIT).await.map(drop),
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
        (Some(kept), Off::Proven { at, .. }) => Some(inner.records.confirm(plan, kept, *at)),
        (kept, _) => kept,
    };
    Some(Killed { off, record, kept })
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

/// What a transient domain is made of: as libvirt says now, or, if it does not answer soon, as it said last.
async fn xml(uri: &Arc<Uri>, domain: &Identity) -> Source {
    let uuid = domain.uuid;
    let limit = match uri.table.xml(uuid) {
        Some(xml) if !uri.is_lively() => return Source::Xml(Zeroizing::clone(&xml)),
        Some(_) => XML_SOON,
        None => XML_LIMIT,
    };
    let asked = uri.call(Lane::Query, Instant::now() + limit, move |connect| domain::xml_of(connect, uuid));
    let why = match tokio::time::timeout(limit, asked).await {
        Ok(Ok(xml)) => return Source::Xml(xml),
        Ok(Err(error)) => error,
        Err(_) => CallError::Overdue,
    };
    match uri.table.xml(uuid) {
        Some(xml) => Source::Xml(Zeroizing::clone(&xml)),
        None => Source::Nothing(why),
    }
}

/// Kills processes of a domain that libvirt has lost and no longer speaks of, and waits for their death. `false`: not all of them are dead.
pub(crate) async fn strays(domain: &Identity, strays: &[Arc<Victim>], deadline: &Deadline) -> bool {
    if deadline.check().is_err() {
        return false;
    }
    for stray in strays {
        let pid = stray.pid();
        tracing::warn!(%domain, pid, "libvirt does not know that it runs, but its process lives: killed");
        if let Err(error) = stray.kill() {
            tracing::error!(%domain, pid, %error, "cannot kill it");
            return false;
        }
    }
    for stray in strays {
        if !matches!(timeout_at(deadline.by(), stray.death()).await, Ok(Ok(()))) {
            tracing::error!(%domain, pid = stray.pid(), "killed, and not dead: {}", stray.obstacle());
            return false;
        }
    }
    true
}

/// Has libvirt destroy the domain too, so that its own record is what a destroy leaves behind.
async fn record(uri: Arc<Uri>, domain: Identity, instance: u32) {
    let uuid = domain.uuid;
    let deadline = Deadline::at(Instant::now() + RECORD_BEGIN);
    let begin_by = deadline.by();
    match uri.call(Lane::Record, begin_by, move |connect| domain::destroy(connect, uuid, instance, &deadline)).await {
        Ok(()) => tracing::debug!(%domain, "libvirt has destroyed it, too"),
        // As a rule it was faster in noticing the death than in destroying.
        Err(error) => tracing::info!(%domain, %error, "killed; libvirt's own destroy did not go through"),
    }
}
