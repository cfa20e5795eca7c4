//! A bound on how often something may be logged, so that no peer can fill a disk.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::clock::Moment;

/// A token bucket: `burst` lines at once, then one per `every`; what is held back is counted and told with the next line.
#[derive(Debug)]
pub struct LogLimit {
    burst: u32,
    every: Duration,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    tokens: u32,
    refilled: Moment,
    held_back: u64,
}

impl LogLimit {
    /// A bucket that starts full.
    #[must_use]
    pub fn new(burst: u32, every: Duration) -> Self {
        Self { burst, every, state: Mutex::new(State { tokens: burst, refilled: Moment::now(), held_back: 0 }) }
    }

    /// Whether a line may be logged at `now`; if so, how many were held back since the last one.
    pub fn allow(&self, now: Moment) -> Option<u64> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let due = now.since(state.refilled).as_nanos() / self.every.as_nanos().max(1);
        if due > 0 {
            let due = u32::try_from(due).unwrap_or(u32::MAX);
            state.tokens = state.tokens.saturating_add(due).min(self.burst);
            state.refilled = if state.tokens == self.burst { now } else { state.refilled.plus(self.every * due) };
        }
        if state.tokens == 0 {
            state.held_back += 1;
            return None;
        }
        state.tokens -= 1;
        Some(std::mem::take(&mut state.held_back))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_then_one_at_a_time_and_the_rest_is_counted() {
        let limit = LogLimit::new(2, Duration::from_secs(1));
        let start = Moment::now();
        let at = |millis| start.plus(Duration::from_millis(millis));
        assert_eq!([0, 1, 2, 3].map(|millis| limit.allow(at(millis))), [Some(0), Some(0), None, None]);
        assert_eq!([1100, 1200].map(|millis| limit.allow(at(millis))), [Some(2), None]);
        assert_eq!([9000, 9001, 9002].map(|millis| limit.allow(at(millis))), [Some(1), Some(0), None]);
    }
}
