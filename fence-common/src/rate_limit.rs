//! What is admitted beyond a request's form and digest: how often a sender may be wrong, what was accepted before, and how much of
//! the daemon one sender may take.
//!
//! A digest costs a microsecond and a request a conversation, so each is bounded per sender, and no sender can use up what another
//! one needs. The order of the questions is that of their cost: [`before_digest`], the digest, then [`after_failure`] or
//! [`before_delivery`]. The kernel program asks them of its maps, the socket and the tests of a [`Store`] of their own; the lines are
//! the same.
//!
//! Every bucket is one number: the time at which it is full again (GCRA's "theoretical arrival time"). MemoryStore are copied out, changed and
//! copied back. Where two CPUs do so at the same time, one of the changes is lost, or lands in the record of a sender that has just taken
//! the place of another: a token more or less, which is why no lock is worth it.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::admit::Source;
use crate::replay_cache::DatagramId;
use crate::verdict::Verdict;
use crate::wire::{FAMILY_V4, FAMILY_V6};

/// How many senders are remembered whose digest was right: those with a reserve. Only a right digest adds one.
pub const TRUSTED_MAX: usize = 4096;
/// How many other senders are remembered whose digest was wrong.
pub const FAILED_MAX: usize = 16_384;
/// How many datagrams are remembered. Only holders of the key can add one; with a `monitor` each minute by each of 16 guests with two
/// addresses it is a day and a half.
pub const REPLAY_CACHE_MAX: usize = 1 << 16;

/// The families of requests, in the width of [`Sender::family`].
const V4: u16 = 2;
const V6: u16 = 10;
const _: () = assert!(FAMILY_V4 == 2 && FAMILY_V6 == 10);

const SECOND: u64 = 1_000_000_000;

/// Who sent a datagram, as far as the frame tells. By both addresses: a neighbour who forges the IP address alone is somebody else.
///
/// Aligned as the kernel program's stack wants it: where it writes words into it the verifier asks for that.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(8))]
pub struct Sender {
    /// The IP source address: IPv4 in the first 4 bytes, the rest zero; or IPv6.
    pub ip: [u8; 16],
    /// The Ethernet source address; zero where nobody knows it, as at the socket.
    pub mac: [u8; 6],
    /// The IP version, and with it the meaning of `ip`: 2 for IPv4, 10 for IPv6, as in requests.
    pub family: u16,
}

impl Sender {
    /// The sender with these addresses.
    #[inline(always)]
    #[must_use]
    pub fn new(source: &Source, mac: [u8; 6]) -> Self {
        match *source {
            // In words, as elsewhere: twelve zero bytes become a call of `memset`.
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

/// So much at once, and so often again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Limit {
    /// Nanoseconds until one more is allowed; 0: always.
    pub every_ns: u64,
    /// How far ahead of now the bucket's time may be: the burst without its last one, times `every_ns`.
    pub ahead_ns: u64,
}

impl Limit {
    /// No limit.
    pub const NONE: Self = Self { every_ns: 0, ahead_ns: u64::MAX };

    /// `rate` a second, `burst` at once. A rate of 0 is no limit; a burst of 0 is as one of 1.
    #[must_use]
    pub const fn per_second(rate: u32, burst: u32) -> Self {
        if rate == 0 {
            return Self::NONE;
        }
        let every_ns = SECOND / rate as u64;
        Self { every_ns, ahead_ns: every_ns.saturating_mul(burst.saturating_sub(1) as u64) }
    }

    /// Whether one more is allowed now, of a bucket that is full at `full_at`.
    #[inline(always)]
    #[must_use]
    pub const fn allows(&self, full_at: u64, now: u64) -> bool {
        full_at <= now.saturating_add(self.ahead_ns)
    }

    /// When the bucket is full again after one more.
    #[inline(always)]
    #[must_use]
    pub const fn draw(&self, full_at: u64, now: u64) -> u64 {
        let from = if full_at > now { full_at } else { now };
        from.saturating_add(self.every_ns)
    }
}

/// Every bound that an administrator sets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Limits {
    /// Wrong digests of one sender that was never right. Beyond them its datagrams are dropped unread.
    pub failures: Limit,
    /// Wrong digests of all senders together that were not right before. Beyond them only those are read that were.
    pub strangers: Limit,
    /// Right requests of one sender.
    pub deliveries: Limit,
    /// How long a datagram is remembered, in nanoseconds: it is accepted once in that time.
    pub replay_window_ns: u64,
}

impl Limits {
    /// No bound on anything, and nothing is remembered.
    pub const NONE: Self =
        Self { failures: Limit::NONE, strangers: Limit::NONE, deliveries: Limit::NONE, replay_window_ns: 0 };
}

impl Default for Limits {
    /// A stranger that is wrong 1000 times a second costs a thousandth of a CPU, all strangers together a hundredth. An honest guest with the
    /// wrong key is wrong once in two seconds for each of its addresses, and one with the right key asks as often.
    fn default() -> Self {
        Self {
            failures: Limit::per_second(1000, 2000),
            strangers: Limit::per_second(10_000, 10_000),
            deliveries: Limit::per_second(100, 512),
            replay_window_ns: 24 * 3600 * SECOND,
        }
    }
}

/// What a sender may still put into the second half of the ring buffer: five requests, then one a second. A sender that has filled the first
/// half has nothing left for it.
pub const RESERVE: Limit = Limit { every_ns: SECOND, ahead_ns: 4 * SECOND };

/// How often a sender becomes trusted: 512 at once, then one a second. Who has the key and makes up addresses needs an hour
/// to push a sender out of the [`TRUSTED_MAX`] that is quiet for so long. Newcomers beyond it are served, and share the bucket of
/// one sender.
pub const NEWCOMERS: Limit = Limit { every_ns: SECOND, ahead_ns: 511 * SECOND };

/// How old the daemon's last sign of life may be.
pub const STALE_AFTER_NS: u64 = 5 * SECOND;

/// What is known of a sender whose digest was right.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Trusted {
    /// When its bucket of requests is full again, on the clock of the program.
    pub deliveries_full_at_ns: u64,
    /// How often its digest was wrong since then.
    pub failures: u64,
    /// How many requests of its were right and within the bounds.
    pub deliveries: u64,
    /// How many requests were dropped because its bucket was empty.
    pub over_limit: u64,
    /// When its digest was right last.
    pub last_right_ns: u64,
}

/// What is known of any other sender.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Failed {
    /// When its bucket of wrong digests is full again, on the clock of the program.
    pub failures_full_at_ns: u64,
    /// How often its digest was wrong.
    pub failures: u64,
    /// How many datagrams were dropped because its bucket was empty.
    pub over_limit: u64,
    /// When its digest was wrong last.
    pub last_failure_ns: u64,
}

/// What is known of all of those together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Strangers {
    /// When their bucket of wrong digests is full again, on the clock of the program.
    pub failures_full_at_ns: u64,
    /// How often a digest was wrong.
    pub failures: u64,
    /// How many datagrams were dropped because the bucket was empty.
    pub over_limit: u64,
    /// When the bucket of [`NEWCOMERS`] is full again.
    pub newcomers_full_at_ns: u64,
    /// When the bucket of requests is full again that newcomers beyond it share.
    pub deliveries_full_at_ns: u64,
}

/// Where it is kept. What is full forgets the one that was of no use for longest.
pub trait Store {
    /// Whether there is a sender whose digest was right.
    fn is_trusted(&mut self, sender: &Sender) -> bool;
    /// What is known of a sender whose digest was right, as `change` leaves it; `None` if there was no such.
    fn with_trusted<R>(&mut self, sender: &Sender, change: impl FnOnce(&mut Trusted) -> R) -> Option<R>;
    /// What is known of another sender.
    fn with_failed<R>(&mut self, sender: &Sender, change: impl FnOnce(&mut Failed) -> R) -> Option<R>;
    /// What is known of all of them. `None` only where there is no such memory, which cannot be.
    fn with_strangers<R>(&mut self, change: impl FnOnce(&mut Strangers) -> R) -> Option<R>;
    /// Notes a sender whose digest was right for the first time.
    fn trust(&mut self, sender: &Sender, trusted: &Trusted);
    /// Notes another sender.
    fn fail(&mut self, sender: &Sender, failed: &Failed);
    /// When a datagram was accepted, if it is remembered.
    fn accepted(&mut self, datagram_id: &DatagramId) -> Option<u64>;
    /// Notes when a datagram is accepted. `false` where it is noted already, which only `anew` overwrites.
    fn remember(&mut self, datagram_id: &DatagramId, at: u64, anew: bool) -> bool;
}

/// What is asked about one datagram around its digest.
pub trait Admission {
    /// [`before_digest`].
    ///
    /// # Errors
    /// Its.
    fn before_digest(&mut self) -> Result<(), Verdict>;
    /// [`after_failure`].
    fn after_failure(&mut self);
}

/// [`Admission`] by a memory at hand.
#[derive(Debug)]
pub struct Check<'v, M> {
    /// What is known.
    pub memory: &'v mut M,
    /// Who has sent it.
    pub sender: &'v Sender,
    /// What tells it from others.
    pub datagram_id: &'v DatagramId,
    /// The bounds.
    pub limits: &'v Limits,
    /// When it came.
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

/// Whether a request that is right in form may have its digest looked at.
///
/// A datagram that was accepted before is refused here already: whatever carries the beginning of its digest is a copy of it, or wrong.
/// That way copies cost no digest, and no token.
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
    // Addresses can be forged: what others send in the name of a trusted sender must not use up what it needs.
    if !memory.is_trusted(sender) {
        stranger(memory, sender, limits, now)?;
    }
    match memory.accepted(datagram_id) {
        // A time in the future is that of another CPU, a moment ago.
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

/// The digest was wrong. A sender that was never right pays for it, and so do all such. Of a trusted one it is counted only.
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

/// Where a right request is to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Room {
    /// There is room.
    Ample,
    /// Into the second half of the ring buffer, which is for those that ask seldom.
    Scarce,
}

/// The digest was right, of a datagram that was not accepted before: whether it may be delivered. The sender is trusted from now on.
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

/// What becomes of the request of a sender that is not trusted yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Newcomer {
    /// It is served, and trusted from now on.
    Joins,
    /// It is served from the bucket that newcomers beyond [`NEWCOMERS`] share.
    Shares,
    /// That bucket is empty.
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

/// Accepts a datagram, right before it is handed over: `false` where another CPU, or another way in, has accepted the same one since
/// [`before_digest`].
#[inline(always)]
pub fn accept<M: Store>(memory: &mut M, datagram_id: &DatagramId, limits: &Limits, now: u64) -> bool {
    if limits.replay_window_ns == 0 || memory.remember(datagram_id, now, false) {
        return true;
    }
    match memory.accepted(datagram_id) {
        Some(at) if now.saturating_sub(at) < limits.replay_window_ns => false,
        // It is noted, but too long ago to count.
        Some(_) | None => {
            let _ = memory.remember(datagram_id, now, true);
            true
        }
    }
}
