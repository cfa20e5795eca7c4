//! The rate limits' memory outside of the kernel: what the maps hold there.

use alloc::collections::BTreeMap;

use crate::rate_limit::{FAILED_MAX, Failed, Sender, Store, Strangers, TRUSTED_MAX, Trusted};
use crate::replay_cache::{DatagramId, ReplayCache};

/// A map that is bounded and forgets what was not used for longest.
#[derive(Debug)]
struct Recent<V> {
    max: usize,
    uses: u64,
    values: BTreeMap<Sender, (u64, V)>,
    order: BTreeMap<u64, Sender>,
}

impl<V> Recent<V> {
    fn new(max: usize) -> Self {
        Self { max, uses: 0, values: BTreeMap::new(), order: BTreeMap::new() }
    }

    fn get_mut(&mut self, sender: &Sender) -> Option<&mut V> {
        let (used, value) = self.values.get_mut(sender)?;
        self.order.remove(used);
        self.uses += 1;
        *used = self.uses;
        self.order.insert(self.uses, *sender);
        Some(value)
    }

    fn insert(&mut self, sender: Sender, value: V) {
        self.uses += 1;
        if let Some((used, _)) = self.values.insert(sender, (self.uses, value)) {
            self.order.remove(&used);
        }
        self.order.insert(self.uses, sender);
        if self.values.len() > self.max
            && let Some((_, oldest)) = self.order.pop_first()
        {
            self.values.remove(&oldest);
        }
    }
}

/// What is known of senders, and which datagrams were accepted.
#[derive(Debug)]
pub struct MemoryStore {
    trusted: Recent<Trusted>,
    failed: Recent<Failed>,
    strangers: Strangers,
    /// The datagrams.
    pub replay_cache: ReplayCache,
}

impl Default for MemoryStore {
    fn default() -> Self {
        Self {
            trusted: Recent::new(TRUSTED_MAX),
            failed: Recent::new(FAILED_MAX),
            strangers: Strangers::default(),
            replay_cache: ReplayCache::default(),
        }
    }
}

impl MemoryStore {
    /// The senders whose digest was right.
    pub fn trusted(&self) -> impl Iterator<Item = (&Sender, &Trusted)> {
        self.trusted.values.iter().map(|(sender, (_, trusted))| (sender, trusted))
    }

    /// The other senders.
    pub fn failed(&self) -> impl Iterator<Item = (&Sender, &Failed)> {
        self.failed.values.iter().map(|(sender, (_, failed))| (sender, failed))
    }

    /// All of those together.
    #[must_use]
    pub fn strangers(&self) -> &Strangers {
        &self.strangers
    }
}

impl Store for MemoryStore {
    fn is_trusted(&mut self, sender: &Sender) -> bool {
        self.trusted.get_mut(sender).is_some()
    }

    fn with_trusted<R>(&mut self, sender: &Sender, change: impl FnOnce(&mut Trusted) -> R) -> Option<R> {
        self.trusted.get_mut(sender).map(change)
    }

    fn with_failed<R>(&mut self, sender: &Sender, change: impl FnOnce(&mut Failed) -> R) -> Option<R> {
        self.failed.get_mut(sender).map(change)
    }

    fn with_strangers<R>(&mut self, change: impl FnOnce(&mut Strangers) -> R) -> Option<R> {
        Some(change(&mut self.strangers))
    }

    fn trust(&mut self, sender: &Sender, trusted: &Trusted) {
        self.trusted.insert(*sender, *trusted);
    }

    fn fail(&mut self, sender: &Sender, failed: &Failed) {
        self.failed.insert(*sender, *failed);
    }

    fn accepted(&mut self, datagram_id: &DatagramId) -> Option<u64> {
        self.replay_cache.accepted_at(datagram_id)
    }

    fn remember(&mut self, datagram_id: &DatagramId, at: u64, anew: bool) -> bool {
        let free = anew || self.replay_cache.accepted_at(datagram_id).is_none();
        if free {
            self.replay_cache.note(*datagram_id, at);
        }
        free
    }
}
