//! Rate limits: what a request must pass besides its form and its digest.
//! The limits bound the wrong digests of a sender, the requests of a sender, and the senders' share
//! of the ring buffer. A digest costs a microsecond and a request costs a conversation. So each is
//! bounded per sender, and no sender can use up what another one needs.
//!
//! The checks come in the order of their cost: [`before_digest`], then the digest, then
//! [`after_failure`] or [`before_delivery`]. The kernel program applies them to its maps; the
//! socket and the tests apply the same code to a [`Store`] of their own.
//!
//! A bucket is one number: the time at which it is full again (GCRA's "theoretical arrival time").
//! Records are copied out, changed and copied back, without a lock. Where two CPUs do so at once,
//! one change is lost, or lands in the record that replaced the sender's. That costs or saves one
//! token, so no lock is worth it.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::admit::Source;
use crate::replay_cache::DatagramId;
use crate::verdict::Verdict;
use crate::wire::{FAMILY_V4, FAMILY_V6};

/// How many trusted senders the store holds. Only a right digest adds one.
pub const TRUSTED_MAX: usize = 4096;
/// How many untrusted senders with wrong digests the store holds.
pub const FAILED_MAX: usize = 16_384;
/// How many datagrams the replay cache holds. Only holders of the key can add one. It lasts a day
/// and a half if 16 guests with two addresses run `monitor` once a minute.
pub const REPLAY_CACHE_MAX: usize = 1 << 16;

/// [`FAMILY_V4`] and [`FAMILY_V6`] in the width of [`Sender::family`].
const V4: u16 = 2;
const V6: u16 = 10;
const _: () = assert!(FAMILY_V4 == 2 && FAMILY_V6 == 10);

const SECOND: u64 = 1_000_000_000;

/// The sender of a datagram: its IP and its Ethernet address. A neighbour that forges the IP
/// address alone is another sender.
///
/// The alignment is for the verifier: it demands aligned writes to the stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(8))]
pub struct Sender {
    /// The IP source address: IPv4 in the first 4 bytes, the rest zero; or IPv6.
    pub ip: [u8; 16],
    /// The Ethernet source address. Zero where it is unknown, as at the socket.
    pub mac: [u8; 6],
    /// The IP version, and so the meaning of `ip`: 2 for IPv4, 10 for IPv6, as in requests.
    pub family: u16,
}

impl Sender {
    /// The sender with these addresses.
    #[inline(always)]
    #[must_use]
    pub fn new(source: &Source, mac: [u8; 6]) -> Self {
        match *source {
            // As a word: the compiler turns twelve zero bytes into a call of `memset`.
            Source::V4(ip) => Self { ip: zerocopy::transmute!([u32::from_ne_bytes(ip), 0, 0, 0]), mac, family: V4 },
            Source::V6(ip) => Self { ip, mac, family: V6 },
        }
    }

    /// The IP address.
    #[must_use]
    pub const fn source(&self) -> Source {
        let [a, b, c, d, ..] = self.ip;
        if self.family == V6 { Source::V6(self.ip) } else { Source::V4([a, b, c, d]) }
    }
}

/// A rate and a burst.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Limit {
    /// Nanoseconds between two. 0 means no limit.
    pub every_ns: u64,
    /// How far ahead of now the bucket's time may be, in nanoseconds: `burst - 1` times `every_ns`.
    pub ahead_ns: u64,
}

impl Limit {
    /// No limit.
    pub const NONE: Self = Self { every_ns: 0, ahead_ns: u64::MAX };

    /// `rate` per second, `burst` at once. A rate of 0 is no limit; a burst of 0 counts as 1.
    #[must_use]
    pub const fn per_second(rate: u32, burst: u32) -> Self {
        if rate == 0 {
            return Self::NONE;
        }
        let every_ns = SECOND / rate as u64;
        Self { every_ns, ahead_ns: every_ns.saturating_mul(burst.saturating_sub(1) as u64) }
    }

    /// Whether a bucket that is full at `full_at` allows one more now.
    #[inline(always)]
    #[must_use]
    pub const fn allows(&self, full_at: u64, now: u64) -> bool {
        full_at <= now.saturating_add(self.ahead_ns)
    }

    /// The time at which the bucket is full again after one more.
    #[inline(always)]
    #[must_use]
    pub const fn draw(&self, full_at: u64, now: u64) -> u64 {
        let from = if full_at > now { full_at } else { now };
        from.saturating_add(self.every_ns)
    }
}

/// Every limit that an administrator sets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Limits {
    /// Wrong digests of one untrusted sender. Beyond it the sender's datagrams are dropped unread.
    pub failures: Limit,
    /// Wrong digests of all untrusted senders together. Beyond it only trusted senders are read.
    pub strangers: Limit,
    /// Requests with a right digest of one sender.
    pub deliveries: Limit,
    /// How long the replay cache keeps a datagram, in nanoseconds. A datagram is accepted once in
    /// that time.
    pub replay_window_ns: u64,
}

impl Limits {
    /// No limit, and no replay cache.
    pub const NONE: Self =
        Self { failures: Limit::NONE, strangers: Limit::NONE, deliveries: Limit::NONE, replay_window_ns: 0 };
}

impl Default for Limits {
    /// At these limits one untrusted sender costs a thousandth of a CPU, and all together a
    /// hundredth. An honest guest sends once in two seconds for each of its addresses, with a wrong
    /// key as with a right one.
    fn default() -> Self {
        Self {
            failures: Limit::per_second(1000, 2000),
            strangers: Limit::per_second(10_000, 10_000),
            deliveries: Limit::per_second(100, 512),
            replay_window_ns: 24 * 3600 * SECOND,
        }
    }
}

/// A sender's share of the second half of the ring buffer: five requests, then one a second. A
/// sender that has filled the first half has no share left.
pub const RESERVE: Limit = Limit { every_ns: SECOND, ahead_ns: 4 * SECOND };

/// How many senders become trusted: 512 at once, then one a second. A holder of the key that makes
/// up addresses needs an hour to evict a trusted sender that is silent all that time. Newcomers
/// beyond this limit are served, but share one sender's bucket.
pub const NEWCOMERS: Limit = Limit { every_ns: SECOND, ahead_ns: 511 * SECOND };

/// How old the daemon's heartbeat may be, in nanoseconds.
pub const STALE_AFTER_NS: u64 = 5 * SECOND;

/// The record of a trusted sender: one whose digest was right before. Times are on the program's
/// clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Trusted {
    /// When its bucket of requests is full again.
    pub deliveries_full_at_ns: u64,
    /// How many wrong digests came since then.
    pub failures: u64,
    /// How many requests were right and within the limits.
    pub deliveries: u64,
    /// How many requests were dropped because its bucket was empty.
    pub over_limit: u64,
    /// When its last right digest came.
    pub last_right_ns: u64,
}

/// The record of an untrusted sender with wrong digests. Times are on the program's clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Failed {
    /// When its bucket of wrong digests is full again.
    pub failures_full_at_ns: u64,
    /// How many wrong digests came.
    pub failures: u64,
    /// How many datagrams were dropped because its bucket was empty.
    pub over_limit: u64,
    /// When its last wrong digest came.
    pub last_failure_ns: u64,
}

/// The record of all untrusted senders together. Times are on the program's clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Strangers {
    /// When their common bucket of wrong digests is full again.
    pub failures_full_at_ns: u64,
    /// How many wrong digests came.
    pub failures: u64,
    /// How many datagrams were dropped because the bucket was empty.
    pub over_limit: u64,
    /// When the bucket of [`NEWCOMERS`] is full again.
    pub newcomers_full_at_ns: u64,
    /// When the bucket of requests is full again that newcomers beyond [`NEWCOMERS`] share.
    pub deliveries_full_at_ns: u64,
}

/// Where the records and the replay cache are kept. A full store evicts the least recently used
/// one.
pub trait Store {
    /// Whether the sender is trusted.
    fn is_trusted(&mut self, sender: &Sender) -> bool;
    /// Changes a trusted sender's record. `None` if the sender is not trusted.
    fn with_trusted<R>(&mut self, sender: &Sender, change: impl FnOnce(&mut Trusted) -> R) -> Option<R>;
    /// Changes an untrusted sender's record. `None` if there is none.
    fn with_failed<R>(&mut self, sender: &Sender, change: impl FnOnce(&mut Failed) -> R) -> Option<R>;
    /// Changes the common record. It always exists; `None` is only for the verifier.
    fn with_strangers<R>(&mut self, change: impl FnOnce(&mut Strangers) -> R) -> Option<R>;
    /// Adds a trusted sender.
    fn trust(&mut self, sender: &Sender, trusted: &Trusted);
    /// Adds the record of an untrusted sender.
    fn fail(&mut self, sender: &Sender, failed: &Failed);
    /// When a datagram was accepted, if the replay cache has it.
    fn accepted(&mut self, datagram_id: &DatagramId) -> Option<u64>;
    /// Adds a datagram to the replay cache. `false` if it is there already; only `overwrite`
    /// replaces it.
    fn remember(&mut self, datagram_id: &DatagramId, at: u64, overwrite: bool) -> bool;
}

/// The rate limits of one datagram, around its digest.
pub trait Admission {
    /// Calls [`before_digest`].
    ///
    /// # Errors
    /// As [`before_digest`].
    fn before_digest(&mut self) -> Result<(), Verdict>;
    /// Calls [`after_failure`].
    fn after_failure(&mut self);
}

/// [`Admission`] of one datagram by a store.
#[derive(Debug)]
pub struct Check<'v, M> {
    /// The store.
    pub memory: &'v mut M,
    /// The datagram's sender.
    pub sender: &'v Sender,
    /// The datagram's identity.
    pub datagram_id: &'v DatagramId,
    /// The limits.
    pub limits: &'v Limits,
    /// When the datagram came, in nanoseconds.
    pub now: u64,
}

impl<M: Store> Admission for Check<'_, M> {
    fn before_digest(&mut self) -> Result<(), Verdict> {
        before_digest(self.memory, self.sender, self.datagram_id, self.limits, self.now)
    }

    fn after_failure(&mut self) {
        after_failure(self.memory, self.sender, self.limits, self.now);
    }
}

/// Whether a well-formed request may have its digest checked.
///
/// A duplicate is rejected here. A datagram that carries the beginning of an accepted digest is
/// either a copy or wrong. So duplicates cost no digest and no token.
///
/// # Errors
/// [`Verdict::SourceLimit`], [`Verdict::GlobalLimit`], [`Verdict::Replay`].
#[inline(always)]
pub fn before_digest<M: Store>(
    memory: &mut M,
    sender: &Sender,
    datagram_id: &DatagramId,
    limits: &Limits,
    now: u64,
) -> Result<(), Verdict> {
    // Addresses can be forged. What others send as a trusted sender must not use up its bucket.
    if !memory.is_trusted(sender) {
        stranger(memory, sender, limits, now)?;
    }
    match memory.accepted(datagram_id) {
        // A time in the future comes from another CPU, a moment ago.
        Some(at) if now.saturating_sub(at) < limits.replay_window_ns => Err(Verdict::Replay),
        Some(_) | None => Ok(()),
    }
}

#[inline(always)]
fn stranger<M: Store>(memory: &mut M, sender: &Sender, limits: &Limits, now: u64) -> Result<(), Verdict> {
    let alone = memory.with_failed(sender, |failed| {
        let allowed = limits.failures.allows(failed.failures_full_at_ns, now);
        failed.over_limit = failed.over_limit.wrapping_add(u64::from(!allowed));
        allowed
    });
    if alone == Some(false) {
        return Err(Verdict::SourceLimit);
    }
    let together = memory.with_strangers(|strangers| {
        let allowed = limits.strangers.allows(strangers.failures_full_at_ns, now);
        strangers.over_limit = strangers.over_limit.wrapping_add(u64::from(!allowed));
        allowed
    });
    if together == Some(false) { Err(Verdict::GlobalLimit) } else { Ok(()) }
}

/// Records a wrong digest. It costs an untrusted sender a token, and all of them one together. A
/// trusted sender's is only counted.
#[inline(always)]
pub fn after_failure<M: Store>(memory: &mut M, sender: &Sender, limits: &Limits, now: u64) {
    let trusted = memory.with_trusted(sender, |trusted| {
        trusted.failures = trusted.failures.wrapping_add(1);
    });
    if trusted.is_some() {
        return;
    }
    let _ = memory.with_strangers(|strangers| {
        strangers.failures_full_at_ns = limits.strangers.draw(strangers.failures_full_at_ns, now);
        strangers.failures = strangers.failures.wrapping_add(1);
    });
    let known = memory.with_failed(sender, |failed| {
        failed.failures_full_at_ns = limits.failures.draw(failed.failures_full_at_ns, now);
        failed.failures = failed.failures.wrapping_add(1);
        failed.last_failure_ns = now;
    });
    if known.is_none() {
        let first = Failed {
            failures_full_at_ns: limits.failures.draw(0, now),
            failures: 1,
            over_limit: 0,
            last_failure_ns: now,
        };
        memory.fail(sender, &first);
    }
}

/// The ring buffer's state when a request is to be delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Room {
    /// At most half full.
    Ample,
    /// More than half full: each sender has its [`RESERVE`] only.
    Scarce,
}

/// Whether a request with a right digest that is no duplicate may be delivered. From now on its
/// sender is trusted.
///
/// # Errors
/// [`Verdict::DeliveryLimit`], [`Verdict::RingReserve`].
#[inline(always)]
pub fn before_delivery<M: Store>(
    memory: &mut M,
    sender: &Sender,
    room: Room,
    limits: &Limits,
    now: u64,
) -> Result<(), Verdict> {
    let (limit, over) = match room {
        Room::Ample => (limits.deliveries, Verdict::DeliveryLimit),
        Room::Scarce => (RESERVE, Verdict::RingReserve),
    };
    let known = memory.with_trusted(sender, |trusted| {
        trusted.last_right_ns = now;
        let allowed = limit.allows(trusted.deliveries_full_at_ns, now);
        if allowed {
            trusted.deliveries_full_at_ns = limit.draw(trusted.deliveries_full_at_ns, now);
            trusted.deliveries = trusted.deliveries.wrapping_add(1);
        } else {
            trusted.over_limit = trusted.over_limit.wrapping_add(1);
        }
        allowed
    });
    match known {
        Some(true) => Ok(()),
        Some(false) => Err(over),
        None => match newcomer(memory, limit, now) {
            Newcomer::Joins => {
                let deliveries_full_at_ns = limit.draw(0, now);
                let first = Trusted { deliveries_full_at_ns, deliveries: 1, last_right_ns: now, ..Trusted::default() };
                memory.trust(sender, &first);
                Ok(())
            }
            Newcomer::Shares => Ok(()),
            Newcomer::TooMany => Err(over),
        },
    }
}

/// How a request of an untrusted sender is treated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Newcomer {
    /// Delivered; the sender becomes trusted.
    Joins,
    /// Delivered from the bucket that newcomers beyond [`NEWCOMERS`] share.
    Shares,
    /// Rejected: that bucket is empty.
    TooMany,
}

#[inline(always)]
fn newcomer<M: Store>(memory: &mut M, limit: Limit, now: u64) -> Newcomer {
    let found = memory.with_strangers(|strangers| {
        if NEWCOMERS.allows(strangers.newcomers_full_at_ns, now) {
            strangers.newcomers_full_at_ns = NEWCOMERS.draw(strangers.newcomers_full_at_ns, now);
            return Newcomer::Joins;
        }
        if limit.allows(strangers.deliveries_full_at_ns, now) {
            strangers.deliveries_full_at_ns = limit.draw(strangers.deliveries_full_at_ns, now);
            return Newcomer::Shares;
        }
        Newcomer::TooMany
    });
    found.unwrap_or(Newcomer::Joins)
}

/// Accepts a datagram right before its delivery. `false` if another CPU, or the other way in, has
/// accepted the same datagram since [`before_digest`].
#[inline(always)]
pub fn accept<M: Store>(memory: &mut M, datagram_id: &DatagramId, limits: &Limits, now: u64) -> bool {
    if limits.replay_window_ns == 0 || memory.remember(datagram_id, now, false) {
        return true;
    }
    match memory.accepted(datagram_id) {
        Some(at) if now.saturating_sub(at) < limits.replay_window_ns => false,
        // The entry is older than the window.
        Some(_) | None => {
            let _ = memory.remember(datagram_id, now, true);
            true
        }
    }
}
