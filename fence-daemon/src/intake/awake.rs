//! When the daemon was last surely awake: nothing else tells the age of bytes on a serial line.
//!
//! A daemon that stood still (SIGSTOP, a frozen control group) finds what came meanwhile in its
//! lines' buffers. Who wrote it may have given up long ago. So it counts as arrived before the
//! standstill, and the pipeline's rule for stale requests applies.

use std::sync::Mutex;
use std::time::Duration;

use fence_common::rate_limit::STALE_AFTER_NS;
use fence_common::sync::lock;

use crate::clock::Moment;

/// A longer time without a heartbeat is a standstill: one heartbeat may come late.
const STILL: Duration = Duration::from_nanos(STALE_AFTER_NS);

/// How long after a standstill what is read may still be from its time: buffers of the lines, of
/// QEMU and of the guest are emptied one after the other.
const OLD_NEWS: Duration = Duration::from_secs(2);

/// The daemon's last heartbeats.
#[derive(Debug)]
pub(super) struct Awake(Mutex<Beats>);

#[derive(Debug)]
struct Beats {
    last: Moment,
    /// The last standstill: its last heartbeat before, and its first one after.
    still: Option<(Moment, Moment)>,
}

impl Awake {
    /// The daemon is awake at this moment.
    pub(super) fn since(now: Moment) -> Self {
        Self(Mutex::new(Beats { last: now, still: None }))
    }

    /// Notes a heartbeat. Returns how long the daemon stood still before it, if it did.
    pub(super) fn beat(&self, now: Moment) -> Option<Duration> {
        let mut beats = lock(&self.0);
        let pause = now.since(beats.last);
        let stood_still = pause > STILL;
        if stood_still {
            beats.still = Some((beats.last, now));
        }
        beats.last = now;
        stood_still.then_some(pause)
    }

    /// The earliest moment at which bytes may have come that are read now.
    pub(super) fn arrival(&self, now: Moment) -> Moment {
        let beats = lock(&self.0);
        match beats.still {
            _ if now.since(beats.last) > STILL => beats.last,
            Some((before, after)) if now.since(after) < OLD_NEWS => before,
            Some(_) | None => now,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_read_after_a_standstill_came_before_it() {
        let at = |seconds: u64| Moment::from_ktime(seconds * 1_000_000_000);
        let awake = Awake::since(at(10));
        assert_eq!((awake.beat(at(12)), awake.arrival(at(14))), (None, at(14)));
        // A late heartbeat is no standstill.
        assert_eq!((awake.beat(at(17)), awake.arrival(at(18))), (None, at(18)));
        // Read before the heartbeat notices, and after it.
        assert_eq!((awake.arrival(at(40)), awake.beat(at(40))), (at(17), Some(Duration::from_secs(23))));
        assert_eq!((awake.arrival(at(41)), awake.arrival(at(42))), (at(17), at(42)));
        assert_eq!((awake.beat(at(43)), awake.arrival(at(43))), (None, at(43)));
    }
}
