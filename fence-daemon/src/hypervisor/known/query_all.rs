//! Asking all URIs at once.
//!
//! As long as no URI knows the domain, all are waited for up to the look-up bound: a silent URI may
//! be the one that has it. Once one URI knows it, the others get only a short grace. A URI that was
//! not connected, or was silent before, gets none.
//!
//! A silent URI counts by its last word about the domain (see [`last_words`](super::last_words)).
//! If that is "it runs here", the URI is waited for up to the look-up bound: a libvirtd that is
//! restarted is back within it.
//!
//! # Last words that this host disproves
//!
//! A local libvirtd hangs, and its last word is that the domain runs. This host knows better: it
//! sees all its processes. So the word does not count if no process of the domain lives here and
//! the domain has not gone to another host. Containers do not move. A machine that ended here while
//! its libvirtd was silent still stands in libvirt's record, without a migration. Without a record
//! the machine may have moved before, and the word counts.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use fence_common::target::Target;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout_at};
use uuid::Uuid;

use super::{Identity, Known, SeenDead, Uri, last_words::Word};
use crate::hypervisor::libvirt::{CallError, Lane, Power, Seen, State, domain};
use crate::hypervisor::process::{Job, Remains, Whom};

/// A domain at the URI with this index.
#[derive(Debug)]
pub(crate) struct FoundDomain {
    pub(crate) index: usize,
    pub(crate) seen: Seen,
}

impl FoundDomain {
    pub(crate) fn is_active(&self) -> bool {
        self.seen.power.is_active()
    }
}

/// What the URIs say about a target. A URI that is in no list positively does not know it.
#[derive(Debug, Default)]
pub(crate) struct Answers {
    pub(crate) found: Vec<FoundDomain>,
    /// The last words of the URIs that do not answer, and why they do not.
    pub(crate) remembered: Vec<(FoundDomain, CallError)>,
    pub(crate) doubts: Vec<(Arc<str>, CallError)>,
}

impl Known {
    /// Which domain was found, and where.
    pub(crate) fn identity(&self, found: &FoundDomain) -> Option<Identity> {
        Some(self.uris.get(found.index)?.identity(found.seen.uuid, &found.seen.name))
    }

    /// Asks every URI for `target`, and leaves out the last words that this host disproves. The
    /// first answer that is `enough` ends the query.
    pub(crate) async fn query(&self, target: &Target, enough: fn(&Seen) -> bool) -> Answers {
        let mut answers = self.query_uris(target, enough).await;
        for (found, error) in std::mem::take(&mut answers.remembered) {
            if self.is_disproved(&found).await {
                let name = found.seen.name.escape_debug();
                tracing::info!(domain = %name, uuid = %found.seen.uuid, "it ran here when libvirt last spoke of it, and nothing of it lives: no hindrance");
            } else {
                answers.remembered.push((found, error));
            }
        }
        answers
    }

    /// Whether nothing of a domain lives on this host, and it has not left the host.
    pub(crate) async fn is_disproved(&self, found: &FoundDomain) -> bool {
        let Seen { uuid, name, .. } = &found.seen;
        let whom = self.uris.get(found.index).and_then(|uri| uri.table.whom(*uuid, name));
        let Some(whom) = whom.filter(|_| found.is_active()) else { return false };
        let stays = |whom: &Whom| Job::on_record(whom.driver, name) == Job::None;
        // Before and after: libvirt may come back and go on with a migration in between.
        stays(&whom) && matches!(self.host.remains(&whom).await, Remains::Nothing) && stays(&whom)
    }

    /// As [`Self::query`], without this host's word.
    pub(crate) async fn query_uris(&self, target: &Target, enough: fn(&Seen) -> bool) -> Answers {
        let uris = &self.uris;
        let begun = Instant::now();
        let bound = begun + self.look_up;
        let mut asked = JoinSet::new();
        for (index, uri) in uris.iter().enumerate() {
            let (uri, target) = (Arc::clone(uri), target.clone());
            asked.spawn(async move { (index, look_up(&uri, target, bound).await) });
        }
        let mut open = vec![true; uris.len()];
        let mut answers = Answers::default();
        // A URI that answers at all does so within a round trip. Once the domain is known, only
        // such a URI is worth waiting for.
        let lively: Vec<bool> = uris.iter().map(|uri| uri.is_lively()).collect();
        while !asked.is_empty() {
            let waited_for = |index: usize| open[index] && lively[index] && uris[index].is_lively();
            // The last word of a URI that is silent now may be a veto. Its present word is worth
            // the whole bound.
            let may_veto = |index: usize| open[index] && uris[index].table.last_word(target).is_some();
            let by = match answers.found.is_empty() {
                true => bound,
                false if (0..uris.len()).any(may_veto) => bound,
                false if (0..uris.len()).any(waited_for) => begun + self.grace,
                false => begun,
            };
            let answer = match asked.try_join_next() {
                Some(answer) => answer,
                None => match timeout_at(by, asked.join_next()).await {
                    Ok(Some(answer)) => answer,
                    Ok(None) | Err(_) => break,
                },
            };
            // A lost task leaves its URI open, which makes it a doubt.
            let Ok((index, answer)) = answer else { continue };
            open[index] = false;
            match answer {
                Ok(seen) => {
                    let seen = match seen {
                        Some(seen) => corrected(&uris[index], seen),
                        None => match orphaned(&uris[index], target) {
                            Some(seen) => seen,
                            None => continue,
                        },
                    };
                    let enough = enough(&seen);
                    answers.found.push(FoundDomain { index, seen });
                    if enough {
                        return answers;
                    }
                }
                Err(error) => self.doubt(&mut answers, index, target, error),
            }
        }
        for (index, _) in open.into_iter().enumerate().filter(|(_, open)| *open) {
            let uri = &uris[index];
            let state = uri.state().borrow().clone();
            let error = if state.connected {
                uri.silent.store(true, Ordering::Relaxed);
                CallError::Overdue
            } else {
                CallError::NotConnected(state.error.unwrap_or_else(|| "no connection yet".to_owned()))
            };
            self.doubt(&mut answers, index, target, error);
        }
        // The configuration's order, whichever answered first.
        answers.found.sort_by_key(|found| found.index);
        answers
    }

    /// Whether a lively URI knows `target`, and its table does not hold all its domains yet. Tables
    /// are so for some seconds after the daemon's start. All such URIs are asked at once, for the
    /// grace at most. A URI that does not answer by then is left out, as by a query.
    pub(crate) async fn is_known_unseen(&self, target: &Target) -> bool {
        let by = Instant::now() + self.grace;
        let mut asked = JoinSet::new();
        let is_untold = |uri: &&Arc<Uri>| uri.is_lively() && !uri.table.is_filled() && uri.table.find(target).is_none();
        for uri in self.uris.iter().filter(is_untold) {
            let (uri, target) = (Arc::clone(uri), target.clone());
            asked.spawn(async move {
                let answer = timeout_at(by, look_up(&uri, target, by)).await;
                if answer.is_err() {
                    uri.silent.store(true, Ordering::Relaxed);
                }
                matches!(answer, Ok(Ok(Some(_))))
            });
        }
        while let Some(knows) = asked.join_next().await {
            if matches!(knows, Ok(true)) {
                return true;
            }
        }
        false
    }

    /// A URI does not answer.
    fn doubt(&self, answers: &mut Answers, index: usize, target: &Target, error: CallError) {
        let uri = &self.uris[index];
        if let Some((uuid, Word { name, power })) = uri.table.last_word(target) {
            let seen = Seen { name, uuid, id: None, power };
            answers.remembered.push((FoundDomain { index, seen }, error.clone()));
        }
        answers.doubts.push((Arc::clone(&uri.text), error));
    }
}

/// libvirt's word, put right by the domain's own process or libvirt's earlier word.
fn corrected(uri: &Uri, seen: Seen) -> Seen {
    let dead = uri.table.is_dead(seen.uuid, seen.id);
    let power = if !uri.table.orphans(seen.uuid).is_empty() {
        Power::Active(State::RUNNING)
    } else if seen.power != Power::Off && !dead {
        seen.power
    } else if uri.table.is_leaving(seen.uuid) || dead && uri.table.died_on_its_way(seen.uuid) {
        // Its end here says nothing about the other host, where it may go on.
        Power::MovedAway
    } else {
        Power::Off
    };
    Seen { power, ..seen }
}

/// A domain that libvirt does not know any more while a process of it lives.
fn orphaned(uri: &Uri, target: &Target) -> Option<Seen> {
    let (uuid, name) = uri.table.orphaned_as(target)?;
    Some(Seen { name, uuid, id: None, power: Power::Active(State::RUNNING) })
}

/// Asks one URI. A question that loses its connection is asked once more on the next one: a
/// libvirtd that is being restarted, which takes a second or two, should cost no fence.
async fn look_up(uri: &Uri, target: Target, bound: Instant) -> Result<Option<Seen>, CallError> {
    // A death that was seen here needs no word of libvirt's, which may hang.
    if let Some(SeenDead { uuid, name, unnoticed, .. }) = uri.table.seen_dead(&target) {
        let id = unnoticed.map(|instance| instance.id);
        return Ok(Some(Seen { name, uuid, id, power: Power::Off }));
    }
    let again = target.clone();
    match uri.call(Lane::Query, bound, move |connect| domain::look_up(connect, &target)).await {
        Err(CallError::Lost(_)) => uri.call(Lane::Query, bound, move |connect| domain::look_up(connect, &again)).await,
        answer => answer,
    }
}

/// UUIDs each once and in order.
pub(crate) fn sorted(uuids: impl Iterator<Item = Uuid>) -> Vec<Uuid> {
    let mut uuids: Vec<Uuid> = uuids.collect();
    uuids.sort_unstable();
    uuids.dedup();
    uuids
}
