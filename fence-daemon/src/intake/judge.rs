//! Judges requests in user space: digest, rate limit and replay cache, the same for every listener.
//!
//! The checks and their order are the kernel program's. A sender has one budget, whichever way its
//! requests come.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use fence_common::caller::{Address, Who};
use fence_common::key::Key;
use fence_common::keys::KeyOwner;
use fence_common::memory_store::MemoryStore;
use fence_common::rate_limit::{self, Admission, Check, Failed, Limits, Room, Sender, Store, Strangers, Trusted};
use fence_common::rejected::{REJECTED_MAX, Rejected};
use fence_common::replay_cache::DatagramId;
use fence_common::sync::{Current, lock};
use fence_common::verdict::Verdict;
use fence_common::wire::Request;
use fence_config::Groups;

use super::keyring::Keyring;
use super::rate_limits::RateLimits;
use super::replay_cache::ReplayCache;
use super::request::Origin;
use crate::clock::Moment;
use crate::observe::sources::RejectedView;

/// What the requests of a listener are judged by. All listeners share senders and replay cache.
/// Clones share the keys too.
#[derive(Clone, Debug)]
pub struct Judge {
    keys: Keyring,
    origin: Arc<Origin>,
    limits: RateLimits,
    senders: Arc<Mutex<MemoryStore>>,
    replays: Arc<ReplayCache>,
    groups: Current<Groups>,
    rejected: Arc<Mutex<[Rejected; REJECTED_MAX]>>,
}

impl Judge {
    /// Without limits, replay cache or groups.
    #[must_use]
    pub fn new(keys: Keyring) -> Self {
        let (replays, groups) = (Arc::new(ReplayCache::none(Duration::ZERO)), Groups::Everyone.into());
        let (senders, rejected) = (Arc::default(), Arc::default());
        Self { keys, origin: Arc::default(), limits: Limits::NONE.into(), senders, replays, groups, rejected }
    }

    /// Limits rates as the kernel program does, with the senders that `replays` knows.
    #[must_use]
    pub fn rate_limited(self, limits: impl Into<RateLimits>, replays: Arc<ReplayCache>) -> Self {
        {
            let mut records = lock(&self.senders);
            for (sender, at) in replays.senders() {
                let trusted = Trusted { last_right_ns: at, ..Trusted::default() };
                records.trust(&Sender { mac: [0; 6], ..sender }, &trusted);
            }
        }
        Self { limits: limits.into(), replays, ..self }
    }

    /// Accepts a group's key only from that group's addresses.
    #[must_use]
    pub fn grouped(self, groups: impl Into<Current<Groups>>) -> Self {
        Self { groups: groups.into(), ..self }
    }

    /// The same for another listener, which has its own keys.
    #[must_use]
    pub fn of_listener(&self, keys: Keyring, origin: Origin) -> Self {
        Self { keys, origin: Arc::new(origin), ..self.clone() }
    }

    /// What the configuration says of its listener.
    pub(super) fn origin(&self) -> &Arc<Origin> {
        &self.origin
    }

    /// Records a request that was rejected for its form.
    pub(super) fn note_rejection(&self, sender: &Sender, verdict: Verdict, arrived: Moment) {
        if !verdict.is_form_rejection() {
            return;
        }
        let place = usize::try_from(Rejected::index(sender, verdict)).unwrap_or_default();
        let mut places = lock(&self.rejected);
        if let Some(place) = places.get_mut(place) {
            place.note(sender, verdict, arrived.nanos());
        }
    }

    /// The senders that were last rejected before their digest was checked.
    #[must_use]
    pub fn rejected(&self) -> Vec<RejectedView> {
        let places = *lock(&self.rejected);
        places.iter().filter_map(RejectedView::of).collect()
    }

    /// Whether `sender` may ask once more. For requests whose sender is certain without a digest.
    pub(super) fn permit(&self, sender: &Sender) -> Result<(), Verdict> {
        let mut senders = lock(&self.senders);
        let mut memory = SenderStore { senders: &mut senders, replays: &self.replays };
        rate_limit::before_delivery(&mut memory, sender, Room::Ample, &self.limits.now(), Moment::now().nanos())
    }

    /// Judges a request of the right form that `sender` has sent for `client`. Returns its
    /// key: the one that signed it, or the one for the answer.
    pub(super) fn judge(
        &self,
        request: &Request,
        sender: &Sender,
        client: Option<Address>,
    ) -> Result<(Option<Arc<Key>>, KeyOwner), Verdict> {
        let who = client.map(|address| Who::of(address, self.origin.listener));
        self.judge_keys(request, sender, |owner| who.is_some_and(|who| self.may_ask(owner, &who)))
    }

    /// The same for a client that is named later. [`may_ask`](Self::may_ask) then decides about
    /// it.
    pub(super) fn judge_unnamed(
        &self,
        request: &Request,
        sender: &Sender,
    ) -> Result<(Option<Arc<Key>>, KeyOwner), Verdict> {
        self.judge_keys(request, sender, |_| true)
    }

    /// Whether a request that is signed with this owner's key may come from this client.
    pub(super) fn may_ask(&self, owner: KeyOwner, who: &Who<'_>) -> bool {
        self.groups.now().may_ask(owner, who)
    }

    /// A key that does not count for the client is a wrong key.
    fn judge_keys(
        &self,
        request: &Request,
        sender: &Sender,
        counts: impl Fn(KeyOwner) -> bool,
    ) -> Result<(Option<Arc<Key>>, KeyOwner), Verdict> {
        // A request without a digest, which the configuration can allow, says nothing of its
        // sender.
        let Some(datagram_id) = DatagramId::of(request) else {
            return Ok((self.keys.current().first().cloned(), KeyOwner::EVERYBODY));
        };
        let mut senders = lock(&self.senders);
        let mut memory = SenderStore { senders: &mut senders, replays: &self.replays };
        let (limits, now) = (&self.limits.now(), Moment::now().nanos());
        let mut check = Check { memory: &mut memory, sender, datagram_id, limits, now };
        check.before_digest()?;
        let Some((key, owner)) = self.keys.verify(request).filter(|(_, owner)| counts(*owner)) else {
            check.after_failure();
            return Err(Verdict::Digest);
        };
        rate_limit::before_delivery(&mut memory, sender, Room::Ample, limits, now)?;
        Ok((Some(key), owner))
    }
}

/// The senders that user space knows, and the replay cache of all ways in.
struct SenderStore<'k> {
    senders: &'k mut MemoryStore,
    replays: &'k ReplayCache,
}

impl Store for SenderStore<'_> {
    fn is_trusted(&mut self, sender: &Sender) -> bool {
        self.senders.is_trusted(sender)
    }

    fn with_trusted<R>(&mut self, sender: &Sender, change: impl FnOnce(&mut Trusted) -> R) -> Option<R> {
        self.senders.with_trusted(sender, change)
    }

    fn with_failed<R>(&mut self, sender: &Sender, change: impl FnOnce(&mut Failed) -> R) -> Option<R> {
        self.senders.with_failed(sender, change)
    }

    fn with_strangers<R>(&mut self, change: impl FnOnce(&mut Strangers) -> R) -> Option<R> {
        self.senders.with_strangers(change)
    }

    fn trust(&mut self, sender: &Sender, trusted: &Trusted) {
        self.senders.trust(sender, trusted);
    }

    fn fail(&mut self, sender: &Sender, failed: &Failed) {
        self.senders.fail(sender, failed);
    }

    fn accepted(&mut self, datagram_id: &DatagramId) -> Option<u64> {
        self.replays.accepted_at(datagram_id)
    }

    /// The pipeline records it, whichever way it came.
    fn remember(&mut self, _: &DatagramId, _: u64, _: bool) -> bool {
        true
    }
}
