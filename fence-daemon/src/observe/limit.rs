//! Bounds on how often something may be logged, so that no peer can fill a disk.

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::Duration;

use fence_common::caller::Address;
use fence_common::sync::lock;

use crate::clock::Moment;

/// How many sources have a bound of their own. All further sources share one.
const SOURCES: usize = 1024;

/// `burst` lines at once, then one per `every`.
#[derive(Clone, Copy, Debug)]
struct Pace {
    burst: u32,
    every: Duration,
}

/// A token bucket that counts what it holds back.
#[derive(Debug)]
struct Bucket {
    tokens: u32,
    refilled: Moment,
    held_back: u64,
}

impl Bucket {
    fn full(pace: Pace, now: Moment) -> Self {
        Self { tokens: pace.burst, refilled: now, held_back: 0 }
    }

    fn refill(&mut self, pace: Pace, now: Moment) {
        let due = now.since(self.refilled).as_nanos() / pace.every.as_nanos().max(1);
        if due > 0 {
            let due = u32::try_from(due).unwrap_or(u32::MAX);
            self.tokens = self.tokens.saturating_add(due).min(pace.burst);
            self.refilled = if self.tokens == pace.burst { now } else { self.refilled.plus(pace.every * due) };
        }
    }

    fn take(&mut self, pace: Pace, now: Moment) -> Option<u64> {
        self.refill(pace, now);
        if self.tokens == 0 {
            self.held_back += 1;
            return None;
        }
        self.tokens -= 1;
        Some(std::mem::take(&mut self.held_back))
    }
}

/// One bound for everybody.
#[derive(Debug)]
pub struct LogLimit {
    pace: Pace,
    bucket: Mutex<Bucket>,
}

impl LogLimit {
    /// Allows `burst` lines at once, then one per `every`. The next line tells how many were held
    /// back.
    #[must_use]
    pub fn new(burst: u32, every: Duration) -> Self {
        let pace = Pace { burst, every };
        Self { pace, bucket: Mutex::new(Bucket::full(pace, Moment::now())) }
    }

    /// Whether a line may be logged at `now`; if so, how many were held back since the last one.
    pub fn allow(&self, now: Moment) -> Option<u64> {
        lock(&self.bucket).take(self.pace, now)
    }
}

/// A bound for each source, so that one source's lines do not use up those of others.
#[derive(Debug)]
pub struct SourceLimit {
    pace: Pace,
    buckets: Mutex<Buckets>,
}

#[derive(Debug)]
struct Buckets {
    own: HashMap<Address, Bucket>,
    /// For sources that come when there is no room for another bucket.
    shared: Bucket,
}

impl SourceLimit {
    /// Allows `burst` lines of each source at once, then one per `every`.
    #[must_use]
    pub fn new(burst: u32, every: Duration) -> Self {
        let pace = Pace { burst, every };
        let buckets = Buckets { own: HashMap::new(), shared: Bucket::full(pace, Moment::now()) };
        Self { pace, buckets: Mutex::new(buckets) }
    }

    /// Whether a line about `source` may be logged at `now`; if so, how many about it were held
    /// back since the last one.
    pub fn allow(&self, source: Address, now: Moment) -> Option<u64> {
        let pace = self.pace;
        let mut buckets = lock(&self.buckets);
        let Buckets { own, shared } = &mut *buckets;
        if own.len() >= SOURCES && !own.contains_key(&source) {
            // A full bucket with nothing held back is worth as much as a new one.
            own.retain(|_, bucket| {
                bucket.refill(pace, now);
                bucket.tokens < pace.burst || bucket.held_back > 0
            });
            if own.len() >= SOURCES {
                return shared.take(pace, now);
            }
        }
        own.entry(source).or_insert_with(|| Bucket::full(pace, now)).take(pace, now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{IpAddr, Ipv4Addr};

    fn at(start: Moment, millis: u64) -> Moment {
        start.plus(Duration::from_millis(millis))
    }

    #[test]
    fn a_burst_then_one_at_a_time_and_the_rest_is_counted() {
        let limit = LogLimit::new(2, Duration::from_secs(1));
        let start = Moment::now();
        assert_eq!([0, 1, 2, 3].map(|millis| limit.allow(at(start, millis))), [Some(0), Some(0), None, None]);
        assert_eq!([1100, 1200].map(|millis| limit.allow(at(start, millis))), [Some(2), None]);
        assert_eq!([9000, 9001, 9002].map(|millis| limit.allow(at(start, millis))), [Some(1), Some(0), None]);
    }

    #[test]
    fn one_source_does_not_use_up_anothers_lines() {
        let limit = SourceLimit::new(1, Duration::from_secs(1));
        let start = Moment::now();
        let [loud, quiet] = [1, 2].map(|last| Address::from(IpAddr::from([192, 0, 2, last])));
        assert_eq!([0, 1, 2].map(|millis| limit.allow(loud, at(start, millis))), [Some(0), None, None]);
        assert_eq!(limit.allow(quiet, at(start, 3)), Some(0));
        assert_eq!(limit.allow(loud, at(start, 1100)), Some(2));
    }

    #[test]
    fn a_crowd_of_sources_takes_bounded_room_and_bounded_lines() {
        let limit = SourceLimit::new(1, Duration::from_secs(1));
        let start = Moment::now();
        let crowd = || (0..5 * u32::try_from(SOURCES).unwrap()).map(|n| Address::from(IpAddr::from(Ipv4Addr::from(n))));
        let lines = crowd().filter_map(|source| limit.allow(source, start)).count();
        assert_eq!(lines, SOURCES + 1);
        assert_eq!(limit.buckets.lock().unwrap().own.len(), SOURCES);
        // Once they are quiet there is room again.
        let late = Address::from(IpAddr::from([192, 0, 2, 1]));
        assert_eq!(limit.allow(late, at(start, 2000)), Some(0));
        assert_eq!(limit.buckets.lock().unwrap().own.len(), 1);
    }
}
