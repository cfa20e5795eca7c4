//! The daemons' memory, descriptors and threads, once a second.

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use fence_common::sync::lock;

use super::site::World;
use crate::measure::{resident, status_number};

/// How often a daemon is looked at.
const EVERY: Duration = Duration::from_secs(1);

/// One look at a daemon.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Look {
    /// Seconds since the beginning.
    pub(super) at: f64,
    /// In the order of [`Quantity::ALL`].
    pub(super) is: [f64; 3],
}

/// What is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Quantity {
    Memory,
    Descriptors,
    Threads,
}

impl Quantity {
    pub(super) const ALL: [Self; 3] = [Self::Memory, Self::Descriptors, Self::Threads];

    pub(super) fn title(self) -> &'static str {
        match self {
            Self::Memory => "resident memory (MB)",
            Self::Descriptors => "open descriptors",
            Self::Threads => "threads",
        }
    }

    /// What its median may grow by beside a tenth: what a few requests more or less take.
    fn slack(self) -> f64 {
        match self {
            Self::Memory => 0.5,
            Self::Descriptors => 4.0,
            Self::Threads => 4.0,
        }
    }
}

/// The share that a median may grow by.
const GROWTH: f64 = 0.1;

/// Looks until it is over: the samples of each hypervisor's daemon.
pub(super) fn watch(world: &World, over: &AtomicBool) -> [Vec<Look>; 2] {
    let (begun, mut seen) = (Instant::now(), [Vec::new(), Vec::new()]);
    while !over.load(Ordering::Relaxed) {
        for (host, samples) in world.hosts.iter().zip(&mut seen) {
            // It may have just ended.
            let daemon = *lock(&host.daemon);
            if let Some(is) = daemon.and_then(look) {
                samples.push(Look { at: begun.elapsed().as_secs_f64(), is });
            }
        }
        std::thread::sleep(EVERY);
    }
    seen
}

fn look(pid: u32) -> Option<[f64; 3]> {
    let descriptors = u32::try_from(fs::read_dir(format!("/proc/{pid}/fd")).ok()?.count()).ok()?;
    let threads = u32::try_from(status_number(&format!("/proc/{pid}/status"), "Threads:").ok()?).ok()?;
    Some([resident(pid).ok()? / 1e6, f64::from(descriptors), f64::from(threads)])
}

/// The median of the values; 0 where there are none.
pub(super) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values.get(values.len().saturating_sub(1) / 2).copied().unwrap_or_default()
}

/// A quantity in the second and in the last third of the time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Growth {
    pub(super) quantity: Quantity,
    /// The medians.
    pub(super) thirds: [f64; 2],
}

impl Growth {
    /// Of a daemon that lived all the time. The first third is its warm-up.
    pub(super) fn of(quantity: Quantity, samples: &[Look]) -> Self {
        let end = samples.last().map_or(0.0, |sample| sample.at);
        let third = |number: f64| {
            let in_it = |sample: &&Look| sample.at >= end * number / 3.0 && sample.at <= end * (number + 1.0) / 3.0;
            median(samples.iter().filter(in_it).map(|sample| sample.is[quantity as usize]).collect())
        };
        Self { quantity, thirds: [third(1.0), third(2.0)] }
    }

    /// Whether it is flat: the last third's median exceeds the second's by at most a tenth and a
    /// little.
    pub(super) fn is_flat(self) -> bool {
        let [second, last] = self.thirds;
        last <= second * (1.0 + GROWTH) + self.quantity.slack()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(value: impl Fn(f64) -> f64) -> Vec<Look> {
        (0..300).map(f64::from).map(|at| Look { at, is: [value(at); 3] }).collect()
    }

    #[test]
    fn what_leaks_is_not_flat_and_what_warms_up_is() {
        for quantity in Quantity::ALL {
            let grows = |value: fn(f64) -> f64| !Growth::of(quantity, &samples(value)).is_flat();
            assert!(!grows(|_| 40.0) && !grows(|at| if at < 90.0 { 10.0 } else { 40.0 }), "{quantity:?}");
            // One more each five seconds, as a request that leaves something behind.
            assert!(grows(|at| 40.0 + at / 5.0), "{quantity:?}");
            // A peak is no growth.
            assert!(!grows(|at| if (250.0..260.0).contains(&at) { 90.0 } else { 40.0 }), "{quantity:?}");
        }
    }

    #[test]
    fn this_process_can_be_looked_at() {
        let [memory, descriptors, threads] = look(std::process::id()).unwrap();
        assert!(memory > 0.1 && descriptors > 2.0 && threads >= 1.0);
        assert_eq!(look(u32::MAX), None);
    }
}
