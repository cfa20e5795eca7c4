//! The rate limits' store in user space: the same content as the kernel's maps.

use alloc::collections::BTreeMap;

use crate::rate_limit::{FAILED_MAX, Failed, Sender, Store, Strangers, TRUSTED_MAX, Trusted};
use crate::replay_cache::{DatagramId, ReplayCache};

/// A bounded map that evicts the least recently used entry.
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

/// The senders' records and the replay cache.
#[derive(Debug)]
pub struct MemoryStore {
    trusted: Recent<Trusted>,
    failed: Recent<Failed>,
    strangers: Strangers,
    /// The accepted datagrams.
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
    /// The trusted senders.
    pub fn trusted(&self) -> impl Iterator<Item = (&Sender, &Trusted)> {
        self.trusted.values.iter().map(|(sender, (_, trusted))| (sender, trusted))
    }

    /// The untrusted senders with wrong digests.
    pub fn failed(&self) -> impl Iterator<Item = (&Sender, &Failed)> {
        self.failed.values.iter().map(|(sender, (_, failed))| (sender, failed))
    }

    /// The common record of untrusted senders.
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

    fn remember(&mut self, datagram_id: &DatagramId, at: u64, overwrite: bool) -> bool {
        let free = overwrite || self.replay_cache.accepted_at(datagram_id).is_none();
        if free {
            self.replay_cache.note(*datagram_id, at);
        }
        free
    }
}
