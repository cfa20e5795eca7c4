//! How fast counters grow: the difference of two reports, and those of the last minute.

use std::collections::{BTreeMap, VecDeque};

use crate::control::view::Report;

/// How many rates are remembered, one a second.
pub const HISTORY: usize = 30;

/// What counters there are, and how fast they grow.
#[derive(Debug, Default)]
pub struct Rates {
    /// Which daemon they are of, and for how long it ran at the last report.
    of: Option<(u32, u64)>,
    counters: BTreeMap<String, Counter>,
}

/// One counter.
#[derive(Clone, Debug, Default)]
pub struct Counter {
    /// How far it has come.
    pub total: u64,
    /// How much it grew in each second of late, the newest last.
    pub history: VecDeque<u64>,
}

impl Counter {
    /// How much it grows in a second.
    #[must_use]
    pub fn rate(&self) -> u64 {
        self.history.back().copied().unwrap_or(0)
    }
}

impl Rates {
    /// Takes in a report. Another daemon's begins anew.
    pub fn update(&mut self, report: &Report) {
        let daemon = (report.daemon.pid, report.daemon.uptime_ms);
        let passed = match self.of {
            Some((pid, uptime)) if pid == daemon.0 && uptime <= daemon.1 => daemon.1 - uptime,
            Some(_) | None => {
                self.counters.clear();
                0
            }
        };
        let is_new = self.of.is_none() || self.counters.is_empty();
        if !is_new && passed == 0 {
            return;
        }
        self.of = Some(daemon);
        let kernel = report.kernel.iter().filter_map(|kernel| kernel.counters.as_ref()).flatten();
        let mut totals: BTreeMap<&str, u64> = BTreeMap::new();
        for (name, count) in kernel.chain(&report.socket) {
            *totals.entry(name).or_default() += count;
        }
        for (name, total) in totals {
            let known = self.counters.contains_key(name);
            let counter = self.counters.entry(name.to_owned()).or_default();
            let grown = if known { total.saturating_sub(counter.total) } else { 0 };
            let rate = grown.saturating_mul(1000).checked_div(passed).unwrap_or(0);
            if counter.history.len() >= HISTORY {
                counter.history.pop_front();
            }
            counter.history.push_back(rate);
            counter.total = total;
        }
    }

    /// A counter, if it was heard of.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&Counter> {
        self.counters.get(name)
    }

    /// The names of all.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.counters.keys().map(String::as_str)
    }
}
