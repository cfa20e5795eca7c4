//! How fast counters grow, from the difference of two reports.

use std::collections::{BTreeMap, VecDeque};

use fence_control::report::Report;

/// How many rates are remembered, one a second.
pub const HISTORY: usize = 30;

/// The counters and how fast they grow.
#[derive(Debug, Default)]
pub struct Rates {
    /// The daemon's process, and its uptime at the last report.
    of: Option<(u32, u64)>,
    counters: BTreeMap<String, Counter>,
}

/// One counter.
#[derive(Clone, Debug, Default)]
pub struct Counter {
    /// Its latest value.
    pub total: u64,
    /// Its growth in each recent second, the newest last.
    pub history: VecDeque<u64>,
}

impl Counter {
    /// Its growth per second.
    #[must_use]
    pub fn rate(&self) -> u64 {
        self.history.back().copied().unwrap_or(0)
    }
}

impl Rates {
    /// Takes in a report. A report of another daemon starts the rates again.
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

    /// A counter, if any report had it.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&Counter> {
        self.counters.get(name)
    }

    /// The names of all counters.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.counters.keys().map(String::as_str)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::example::example;

    fn report(pid: u32, uptime_ms: u64, kernel: u64, socket: u64) -> Report {
        let mut report = example();
        (report.daemon.pid, report.daemon.uptime_ms) = (pid, uptime_ms);
        report.socket = [("delivered".to_owned(), socket)].into();
        report.kernel.as_mut().unwrap().counters = Some([("delivered".to_owned(), kernel)].into());
        report
    }

    fn seen(rates: &Rates) -> (u64, Vec<u64>) {
        let counter = rates.get("delivered").unwrap();
        (counter.total, counter.history.iter().copied().collect())
    }

    #[test]
    fn a_rate_is_what_grew_in_the_time_that_passed() {
        let mut rates = Rates::default();
        rates.update(&report(1, 10_000, 100, 5));
        assert_eq!(seen(&rates), (105, vec![0]), "what was before is nobody's rate");
        rates.update(&report(1, 12_000, 300, 5));
        rates.update(&report(1, 12_500, 300, 6));
        assert_eq!(seen(&rates), (306, vec![0, 100, 2]));
        // The same report twice is no second.
        rates.update(&report(1, 12_500, 300, 6));
        assert_eq!(seen(&rates), (306, vec![0, 100, 2]));
    }

    #[test]
    fn another_daemon_begins_anew() {
        let mut rates = Rates::default();
        rates.update(&report(1, 10_000, 100, 0));
        rates.update(&report(1, 11_000, 200, 0));
        for (pid, uptime) in [(2, 12_000), (2, 500)] {
            rates.update(&report(pid, uptime, 7, 0));
            assert_eq!(seen(&rates), (7, vec![0]));
        }
    }

    #[test]
    fn the_history_is_bounded() {
        let mut rates = Rates::default();
        (1..100).for_each(|second| rates.update(&report(1, second * 1000, second, 0)));
        assert_eq!(seen(&rates), (99, vec![1; HISTORY]));
        assert_eq!(rates.names().collect::<Vec<_>>(), ["delivered"]);
    }
}
