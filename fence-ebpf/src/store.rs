//! The rate limits' store: senders and datagrams in maps that all CPUs share.
//!
//! Records are copied out, changed, and copied back; [`fence_common::rate_limit`] says what that
//! may lose. The functions that the program calls are not inlined. So their records have stack
//! frames of their own, and the entry's frame has room for the digest's.

use aya_ebpf::bindings::{BPF_ANY, BPF_NOEXIST};
use fence_common::boundary::Config;
use fence_common::rate_limit::{self, Admission, Failed, Room, Sender, Store, Strangers, Trusted};
use fence_common::rejected::Rejected;
use fence_common::replay_cache::DatagramId;
use fence_common::verdict::Verdict;

use crate::maps;

/// `-EEXIST`.
const EXISTS: i32 = -17;

/// The store in the maps.
struct Maps;

/// Changes the record behind a map's pointer.
///
/// # Safety
/// `record` must be valid and aligned.
#[inline(always)]
unsafe fn change<V: Copy, R>(record: *mut V, change: impl FnOnce(&mut V) -> R) -> R {
    // SAFETY: the caller vouches for the pointer. The access is volatile, as other CPUs write there
    // at any time. Each word is read at once, and all words are valid in any combination.
    let mut value = unsafe { record.read_volatile() };
    let result = change(&mut value);
    // SAFETY: as above.
    unsafe { record.write_volatile(value) };
    result
}

impl Store for Maps {
    #[inline(always)]
    fn is_trusted(&mut self, sender: &Sender) -> bool {
        maps::TRUSTED.get_ptr(sender).is_some()
    }

    #[inline(always)]
    fn with_trusted<R>(&mut self, sender: &Sender, by: impl FnOnce(&mut Trusted) -> R) -> Option<R> {
        let record = maps::TRUSTED.get_ptr_mut(sender)?;
        // SAFETY: a map's element is aligned to 8 bytes and stays in place while the program runs,
        // though it may become another sender's.
        Some(unsafe { change(record, by) })
    }

    #[inline(always)]
    fn with_failed<R>(&mut self, sender: &Sender, by: impl FnOnce(&mut Failed) -> R) -> Option<R> {
        let record = maps::FAILED.get_ptr_mut(sender)?;
        // SAFETY: as above.
        Some(unsafe { change(record, by) })
    }

    #[inline(always)]
    fn with_strangers<R>(&mut self, by: impl FnOnce(&mut Strangers) -> R) -> Option<R> {
        let record = maps::STRANGERS.get_ptr_mut(0)?;
        // SAFETY: an array's only element always exists and is aligned to 8 bytes.
        Some(unsafe { change(record, by) })
    }

    // A failed insertion (no free element, or another CPU holds the lock) only means that a token
    // is not paid.

    #[inline(always)]
    fn trust(&mut self, sender: &Sender, trusted: &Trusted) {
        let _ = maps::TRUSTED.insert(sender, trusted, u64::from(BPF_ANY));
    }

    #[inline(always)]
    fn fail(&mut self, sender: &Sender, failed: &Failed) {
        let _ = maps::FAILED.insert(sender, failed, u64::from(BPF_ANY));
    }

    #[inline(always)]
    fn accepted(&mut self, datagram_id: &DatagramId) -> Option<u64> {
        let at = maps::REPLAY.get_ptr(datagram_id)?;
        // SAFETY: a map's element stays in place while the program runs, and this is one aligned
        // word.
        Some(unsafe { at.read_volatile() })
    }

    #[inline(always)]
    fn remember(&mut self, datagram_id: &DatagramId, at: u64, overwrite: bool) -> bool {
        let flags = u64::from(if overwrite { BPF_ANY } else { BPF_NOEXIST });
        // After any other failure the datagram is accepted: user space has a replay cache of its
        // own.
        maps::REPLAY.insert(datagram_id, at, flags) != Err(EXISTS)
    }
}

/// The rate limits of the datagram at hand.
pub(crate) struct Check<'v> {
    pub(crate) sender: &'v Sender,
    pub(crate) datagram_id: &'v DatagramId,
    pub(crate) config: &'v Config,
    pub(crate) now: u64,
}

impl Admission for Check<'_> {
    #[inline(always)]
    fn before_digest(&mut self) -> Result<(), Verdict> {
        before_digest(self.sender, self.datagram_id, self.config, self.now)
    }

    #[inline(always)]
    fn after_failure(&mut self) {
        after_failure(self.sender, self.config, self.now);
    }
}

#[inline(never)]
fn before_digest(sender: &Sender, datagram_id: &DatagramId, config: &Config, now: u64) -> Result<(), Verdict> {
    rate_limit::before_digest(&mut Maps, sender, datagram_id, &config.limits, now)
}

#[inline(never)]
fn after_failure(sender: &Sender, config: &Config, now: u64) {
    rate_limit::after_failure(&mut Maps, sender, &config.limits, now);
}

/// Records a rejected sender and the reason, for people who look for it.
#[inline(never)]
pub(crate) fn refuse(sender: &Sender, verdict: Verdict, now: u64) {
    let Some(record) = maps::REJECTED.get_ptr_mut(Rejected::index(sender, verdict)) else { return };
    // SAFETY: needed, as the helper gives a raw pointer. An element of a per-CPU array always
    // exists and is aligned to 8 bytes. It is this CPU's own. User space, and a run that interrupts
    // this one, may see or leave half of it, which at worst shows people a wrong sender.
    //
    // In place: Linux 6.1 allows a call chain 512 bytes of stack, and a copy of the record would
    // exceed them.
    unsafe { &mut *record }.note(sender, verdict, now);
}

/// Calls [`rate_limit::before_delivery`].
#[inline(never)]
pub(crate) fn before_delivery(sender: &Sender, config: &Config, scarce: bool, now: u64) -> Result<(), Verdict> {
    let room = if scarce { Room::Scarce } else { Room::Ample };
    rate_limit::before_delivery(&mut Maps, sender, room, &config.limits, now)
}

/// Calls [`rate_limit::accept`].
#[inline(never)]
pub(crate) fn accept(datagram_id: &DatagramId, config: &Config, now: u64) -> bool {
    rate_limit::accept(&mut Maps, datagram_id, &config.limits, now)
}
