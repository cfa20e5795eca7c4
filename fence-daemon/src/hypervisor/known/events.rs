//! Keeps a URI's table as its domains are: all of them once, and then each that an event names.
//!
//! Each look at a domain is a call of its own, and few are made at a time. libvirt does not answer
//! about a domain that it destroys and that cannot die. Such a look costs the other domains
//! nothing, nor the questions of requests. A look that failed is tried again.

use std::collections::{BTreeSet, HashMap};
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use fence_common::target::Target;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout_at};
use uuid::Uuid;

use super::{Known, Uri, observe::observe};
use crate::hypervisor::libvirt::{CallError, Lane, News, domain};
use crate::hypervisor::process::VictimError;

/// Domains that are looked at at a time.
const LOOKS_AT_ONCE: usize = 2;
/// How long a look keeps its turn. libvirt is busy with a domain that it destroys until that dies.
const PATIENCE: Duration = Duration::from_secs(1);
/// Looks that may be under way in all, also those that have lost their turn. One thread is left for
/// the list.
const LOOKS_IN_ALL: usize = 5;
/// How long a look may wait for its turn.
const TURN: Duration = Duration::from_secs(10);
/// How long after a failure a look is tried again at first, and how often.
const SOON: Duration = Duration::from_millis(50);
const TRIES: u32 = 8;
/// How long after further failures.
const AGAIN: Duration = Duration::from_secs(1);
/// How many events are taken in at once.
const EVENTS_AT_ONCE: usize = 256;
/// How often all domains are looked at if libvirt tells no events.
const REFRESH: Duration = Duration::from_secs(3);
/// The longest pause. Nothing is to be done at its end.
const IDLE: Duration = Duration::from_secs(3600);

/// What a call came to.
enum Done {
    /// The list of all domains.
    Listed(Result<Vec<Uuid>, CallError>),
    /// A look at one domain, and why its process is not at hand although it runs.
    Looked(Uuid, Result<Option<VictimError>, CallError>),
}

/// What is to be looked at, and what is being.
#[derive(Default)]
struct Looks {
    due: BTreeSet<Uuid>,
    /// Those that are being looked at.
    busy: HashMap<Uuid, LookUnderWay>,
    /// Failed or partial looks, and when to try again.
    later: HashMap<Uuid, Instant>,
    /// How often in a row a look failed.
    tries: HashMap<Uuid, u32>,
}

/// A look that is under way.
struct LookUnderWay {
    since: Instant,
    /// Whether something has happened to the domain since.
    again: bool,
}

impl Looks {
    fn want(&mut self, uuid: Uuid) {
        self.later.remove(&uuid);
        match self.busy.get_mut(&uuid) {
            Some(look) => look.again = true,
            None => drop(self.due.insert(uuid)),
        }
    }

    /// The next domain to be looked at, if there is a turn.
    fn next(&mut self, now: Instant) -> Option<Uuid> {
        let ripe: Vec<_> = self.later.iter().filter(|(_, at)| **at <= now).map(|(uuid, _)| *uuid).collect();
        ripe.into_iter().for_each(|uuid| self.want(uuid));
        let in_turn = self.busy.values().filter(|look| now < look.since + PATIENCE).count();
        if in_turn >= LOOKS_AT_ONCE || self.busy.len() >= LOOKS_IN_ALL {
            return None;
        }
        let uuid = self.due.pop_first()?;
        self.busy.insert(uuid, LookUnderWay { since: now, again: false });
        Some(uuid)
    }

    fn done(&mut self, uuid: Uuid, looked: bool, now: Instant) {
        let again = self.busy.remove(&uuid).is_some_and(|look| look.again);
        if looked {
            self.tries.remove(&uuid);
        } else {
            *self.tries.entry(uuid).or_default() += 1;
        }
        if again {
            self.due.insert(uuid);
        } else if !looked {
            self.later.insert(uuid, now + if self.tries(uuid) < TRIES { SOON } else { AGAIN });
        }
    }

    fn tries(&self, uuid: Uuid) -> u32 {
        self.tries.get(&uuid).copied().unwrap_or(0)
    }

    fn wake_at(&self, now: Instant) -> Option<Instant> {
        let turn =
            self.busy.values().map(|look| look.since + PATIENCE).filter(|end| *end > now && !self.due.is_empty());
        self.later.values().copied().chain(turn).min()
    }
}

/// Keeps the table as the domains are, as long as it is polled and the connection lasts.
pub(super) async fn follow(uri: &Arc<Uri>, mut events: mpsc::UnboundedReceiver<News>) -> Infallible {
    let (report, mut reports) = mpsc::unbounded_channel();
    let mut looks = Looks::default();
    // A domain that has gone since is in no list.
    uri.table.uuids().into_iter().for_each(|uuid| looks.want(uuid));
    let mut list_at = Some(Instant::now());
    // Those of the list that were not seen yet. `None`: there is no list yet.
    let mut unseen: Option<BTreeSet<Uuid>> = None;
    let mut news = Vec::new();
    let mut silent = false;
    loop {
        let now = Instant::now();
        if list_at.is_some_and(|at| at <= now) {
            list_at = None;
            list(uri, report.clone());
        }
        while let Some(uuid) = looks.next(now) {
            // libvirt destroys it as well, and would not answer before it is dead. An event tells
            // that.
            if uri.table.get(uuid).is_some_and(|entry| entry.victim().is_some_and(|victim| victim.is_dying())) {
                looks.done(uuid, false, now);
                continue;
            }
            look(uri, uuid, report.clone());
        }
        if unseen.as_ref().is_some_and(BTreeSet::is_empty) {
            unseen = None;
            uri.table.note_filled();
        }
        let wake_at = looks.wake_at(now).into_iter().chain(list_at).min().unwrap_or(now + IDLE);
        tokio::select! {
            count = events.recv_many(&mut news, EVENTS_AT_ONCE), if !silent => {
                // Zero: the listener is gone, and its connection with it.
                silent = count == 0;
                for news in news.drain(..) {
                    match news {
                        News::Changed(uuid) => looks.want(uuid),
                        News::Appeared(uuid, id) => uri.table.appearances.note(uuid, id),
                        News::Reset(uuid) => {
                            uri.table.note_reset(uuid);
                            // A container that reboots itself is another process afterwards. This
                            // event is all that libvirt tells.
                            looks.want(uuid);
                        }
                        News::Leaving(uuid) => uri.table.note_leaving(uuid, true),
                        News::Closed => {}
                    }
                }
            }
            Some(done) = reports.recv() => match done {
                Done::Listed(Ok(uuids)) => {
                    uuids.iter().for_each(|uuid| looks.want(*uuid));
                    if uri.table.is_blind() {
                        // Also the domains that are gone.
                        uri.table.uuids().into_iter().for_each(|uuid| looks.want(uuid));
                        list_at = Some(Instant::now() + REFRESH);
                    }
                    unseen = Some(uuids.into_iter().collect());
                }
                Done::Listed(Err(error)) => {
                    tracing::debug!(uri = %uri.text, %error, "the domains could not be listed");
                    list_at = Some(Instant::now() + AGAIN);
                }
                Done::Looked(uuid, result) => {
                    let whole = match &result {
                        Ok(None) => true,
                        // A starting domain is a process before it is QEMU.
                        Ok(Some(lacking)) => {
                            let last = looks.tries(uuid) + 1 == TRIES;
                            if last {
                                tracing::warn!(uri = %uri.text, %uuid, error = %lacking, "its process is not found: it will be fenced by libvirt alone");
                            }
                            last
                        }
                        Err(error) => {
                            tracing::debug!(uri = %uri.text, %uuid, %error, "a domain could not be looked at");
                            false
                        }
                    };
                    looks.done(uuid, whole, Instant::now());
                    if let (Some(unseen), Ok(_)) = (unseen.as_mut(), &result) {
                        unseen.remove(&uuid);
                    }
                }
            },
            () = sleep_until(wake_at) => {}
        }
    }
}

impl Known {
    /// Looks at a request's domain at the URIs whose table is behind: where libvirt tells no
    /// events, and where the daemon has just started. Without the look libvirt would have to
    /// destroy the domain, which is slower. Costs nothing elsewhere.
    pub(crate) async fn refresh(&self, target: &Target) {
        let by = Instant::now() + self.grace;
        let mut looks = JoinSet::new();
        let is_untold = |uri: &Uri| !uri.table.is_filled() && uri.table.find(target).is_none();
        let is_behind = |uri: &Uri| uri.table.is_blind() || is_untold(uri);
        for uri in self.uris.iter().filter(|uri| uri.is_lively() && is_behind(uri)) {
            let (uri, target) = (Arc::clone(uri), target.clone());
            looks.spawn(async move {
                let known = uri.table.find(&target).map(|(uuid, _)| uuid);
                let found = uri.call(Lane::Look, by, move |connect| domain::look_up(connect, &target)).await;
                let found = found.ok().flatten().map(|seen| seen.uuid);
                // Both, in case a name has gone from one domain to another.
                let mut uuids: Vec<_> = known.into_iter().chain(found).collect();
                uuids.dedup();
                for uuid in uuids {
                    if let Err(error) = observe(&uri, uuid, by).await {
                        tracing::debug!(uri = %uri.text, %uuid, %error, "a domain could not be looked at");
                    }
                }
            });
        }
        let all = async { while looks.join_next().await.is_some() {} };
        // A look that has begun goes on, and enters what it finds.
        if timeout_at(by, all).await.is_err() {
            looks.detach_all();
        }
    }
}

fn list(uri: &Arc<Uri>, report: mpsc::UnboundedSender<Done>) {
    let uri = Arc::clone(uri);
    tokio::spawn(async move {
        let listed = uri.call(Lane::Look, Instant::now() + TURN, domain::uuids).await;
        // Fails only if nobody follows any more.
        let _ = report.send(Done::Listed(listed));
    });
}

fn look(uri: &Arc<Uri>, uuid: Uuid, report: mpsc::UnboundedSender<Done>) {
    let uri = Arc::clone(uri);
    tokio::spawn(async move {
        let looked = observe(&uri, uuid, Instant::now() + TURN).await;
        let _ = report.send(Done::Looked(uuid, looked));
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uuid(number: u128) -> Uuid {
        Uuid::from_u128(number)
    }

    #[test]
    fn a_failed_look_is_retried_and_blocks_nobody() {
        let now = Instant::now();
        let mut looks = Looks::default();
        (1..=4).for_each(|number| looks.want(uuid(number)));
        assert_eq!([looks.next(now), looks.next(now), looks.next(now)], [Some(uuid(1)), Some(uuid(2)), None]);
        looks.done(uuid(1), false, now);
        assert_eq!(looks.next(now), Some(uuid(3)), "the next one has its turn");
        looks.done(uuid(2), true, now);
        looks.done(uuid(3), true, now);
        assert_eq!([looks.next(now), looks.next(now)], [Some(uuid(4)), None]);
        assert_eq!(looks.wake_at(now), Some(now + SOON));
        assert_eq!(looks.next(now + SOON), Some(uuid(1)));
        for _ in 1..TRIES {
            looks.done(uuid(1), false, now);
            looks.next(now + SOON);
        }
        assert_eq!(looks.wake_at(now), Some(now + AGAIN), "patiently from then on");
    }

    #[test]
    fn a_look_that_hangs_loses_its_turn_and_not_all_may() {
        let now = Instant::now();
        let mut looks = Looks::default();
        (1..=9).for_each(|number| looks.want(uuid(number)));
        assert_eq!([looks.next(now), looks.next(now), looks.next(now)], [Some(uuid(1)), Some(uuid(2)), None]);
        assert_eq!(looks.wake_at(now), Some(now + PATIENCE));
        let later = now + PATIENCE;
        assert_eq!([looks.next(later), looks.next(later), looks.next(later)], [Some(uuid(3)), Some(uuid(4)), None]);
        let last = later + PATIENCE;
        assert_eq!([looks.next(last), looks.next(last)], [Some(uuid(5)), None], "there are as many threads");
        looks.done(uuid(1), true, last);
        assert_eq!(looks.next(last), Some(uuid(6)));
    }

    #[test]
    fn a_change_during_a_look_causes_another_look() {
        let now = Instant::now();
        let mut looks = Looks::default();
        looks.want(uuid(1));
        assert_eq!(looks.next(now), Some(uuid(1)));
        looks.want(uuid(1));
        assert_eq!(looks.next(now), None, "one look at a time");
        looks.done(uuid(1), true, now);
        assert_eq!(looks.next(now), Some(uuid(1)));
        looks.done(uuid(1), true, now);
        assert_eq!((looks.next(now), looks.wake_at(now)), (None, None));
    }
}
