//! Asking all URIs at once.
//!
//! Everybody is waited for, up to the look-up bound, as long as nobody knows the domain: a silent URI may be the one that has it. Once
//! one URI knows it, the others get only a short grace, and none at all if they were not connected or have been silent before.
//!
//! What a silent URI counts for is the rule of [`memory`](super::last_words): its last word about the domain, if it had one.
//! A URI whose last word is that the domain runs there is waited for up to the look-up bound: a libvirtd that is
//! restarted is back within it.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use fence_common::target::Target;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout_at};
use uuid::Uuid;

use super::deaths::SeenDead;
use super::last_words::Word;
use crate::hypervisor::Limits;
use crate::hypervisor::fence::outcome::Identity;
use crate::hypervisor::libvirt::connection::Uri;
use crate::hypervisor::libvirt::domain::{self, Power, Seen, State};
use crate::hypervisor::libvirt::error::CallError;
use crate::hypervisor::libvirt::link::Lane;

/// `VIR_DOMAIN_RUNNING`, as a host list has it.
pub(crate) const RUNNING: u8 = 1;
/// `VIR_DOMAIN_SHUTOFF`, as a host list has it.
pub(crate) const SHUT_OFF: u8 = 5;

/// A domain at the URI with this index.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) place: usize,
    pub(crate) seen: Seen,
}

impl Found {
    /// Which domain, and where.
    pub(crate) fn identity(&self, uris: &[Arc<Uri>]) -> Option<Identity> {
        let uri = Arc::clone(&uris.get(self.place)?.text);
        Some(Identity { uri, uuid: self.seen.uuid, name: self.seen.name.clone() })
    }
}

/// What the URIs say about a target. A URI that is in no list positively does not know it.
#[derive(Debug, Default)]
pub(crate) struct Survey {
    pub(crate) found: Vec<Found>,
    /// What URIs that do not answer said last, and why they do not.
    pub(crate) remembered: Vec<(Found, CallError)>,
    pub(crate) doubts: Vec<(Arc<str>, CallError)>,
}

/// Asks every URI for `target`. The first to say something that is `enough` ends the survey.
pub(crate) async fn survey(uris: &[Arc<Uri>], target: &Target, limits: &Limits, enough: fn(&Seen) -> bool) -> Survey {
    let begun = Instant::now();
    let bound = begun + limits.look_up;
    let mut asked = JoinSet::new();
    for (place, uri) in uris.iter().enumerate() {
        let (uri, target) = (Arc::clone(uri), target.clone());
        asked.spawn(async move { (place, look_up(&uri, target, bound).await) });
    }
    let mut open = vec![true; uris.len()];
    let mut survey = Survey::default();
    // Those that answer at all do so within a round trip: only they are worth waiting for once the domain is known.
    let lively: Vec<bool> = uris.iter().map(|uri| uri.is_lively()).collect();
    while !asked.is_empty() {
        let waited_for = |place: usize| open[place] && lively[place] && uris[place].is_lively();
        // A last word of a URI that is silent now may be a veto: its word of this moment is worth the whole bound.
        let may_veto = |place: usize| open[place] && uris[place].table.last_word(target).is_some();
        let by = match survey.found.is_empty() {
            true => bound,
            false if (0..uris.len()).any(may_veto) => bound,
            false if (0..uris.len()).any(waited_for) => begun + limits.grace,
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
        let Ok((place, answer)) = answer else { continue };
        open[place] = false;
        match answer {
            Ok(seen) => {
                let seen = match seen {
                    Some(seen) => Some(corrected(&uris[place], seen)),
                    None => lost(&uris[place], target),
                };
                let Some(seen) = seen else { continue };
                let enough = enough(&seen);
                survey.found.push(Found { place, seen });
                if enough {
                    return survey;
                }
            }
            Err(error) => survey.doubt(uris, place, target, error),
        }
    }
    for (place, _) in open.into_iter().enumerate().filter(|(_, open)| *open) {
        let uri = &uris[place];
        let state = uri.state().borrow().clone();
        let error = if state.connected {
            uri.silent.store(true, Ordering::Relaxed);
            CallError::Overdue
        } else {
            CallError::NotConnected(state.error.unwrap_or_else(|| "no connection yet".to_owned()))
        };
        survey.doubt(uris, place, target, error);
    }
    // The configuration's order, whoever was first to answer.
    survey.found.sort_by_key(|found| found.place);
    survey
}

impl Survey {
    /// A URI does not answer.
    fn doubt(&mut self, uris: &[Arc<Uri>], place: usize, target: &Target, error: CallError) {
        let uri = &uris[place];
        if let Some((uuid, word)) = uri.table.last_word(target) {
            let Word { name, power } = word;
            self.remembered.push((Found { place, seen: Seen { name, uuid, id: None, power } }, error.clone()));
        }
        self.doubts.push((Arc::clone(&uri.text), error));
    }
}

/// What libvirt has said, put right where the domain's own process or libvirt's earlier word says more.
fn corrected(uri: &Uri, seen: Seen) -> Seen {
    let dead = uri.table.is_dead(seen.uuid, seen.id);
    let power = if !uri.table.strays(seen.uuid).is_empty() {
        Power::Active(State(RUNNING))
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
fn lost(uri: &Uri, target: &Target) -> Option<Seen> {
    let (uuid, name) = uri.table.lost_as(target)?;
    Some(Seen { name, uuid, id: None, power: Power::Active(State(RUNNING)) })
}

/// Asks one URI. A question that loses its connection is asked once more on the next one: a libvirtd that is being restarted, which takes
/// it a second or two, should cost no fence.
async fn look_up(uri: &Arc<Uri>, target: Target, bound: Instant) -> Result<Option<Seen>, CallError> {
    // What was seen to die here needs no word of libvirt's, which may hang.
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
