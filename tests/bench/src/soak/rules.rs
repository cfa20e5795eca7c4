//! What a run must keep.

use super::Outcome;
use super::judge::WayIn;
use super::watch::{Growth, Quantity};
use crate::stats::{Samples, Unit};

/// The share of requests that must be answered, of those during which the daemon was never away.
const SHARE: f64 = 0.99;
/// Every answer comes in 25 s (promise 4), and the client's own work takes a moment.
const LONGEST: f64 = 27.0;
/// The longest time of an answer that needs neither libvirt nor another process.
const PROBE: f64 = 10.0;
/// The longest time until the daemon answers after its own start, or after a reload.
const RECOVERY: f64 = 15.0;
/// The same after libvirtd's: it connects again, and asks.
const LIBVIRT_RECOVERY: f64 = 30.0;

/// A rule, and what came of it.
#[derive(Clone, Debug)]
pub(super) struct Ruling {
    pub(super) rule: String,
    pub(super) got: String,
    pub(super) is_kept: bool,
}

/// All rules.
pub(super) fn all(outcome: &Outcome) -> Vec<Ruling> {
    let notes = &outcome.judged;
    let mut rulings = vec![Ruling {
        rule: "no violation: no success while a process of the domain lives, none about a domain that may not be \
               fenced or does not exist, no list that lacks a domain, no daemon that ends or panics"
            .to_owned(),
        got: format!("{} violations, {} kills judged", notes.violations.len(), notes.kills),
        is_kept: notes.violations.is_empty(),
    }];
    let clients = || notes.asked.iter().filter(|(way, _)| **way != WayIn::Probe).map(|(_, asked)| asked);
    rulings.push(share(clients().map(|asked| (asked.undisturbed_answered, asked.undisturbed))));
    let at_most = |rule: &str, limit: f64, of: Vec<&Samples>| {
        let longest = of.into_iter().filter_map(|samples| samples.percentile(100)).map(|one| one.value);
        let longest = longest.fold(0.0, f64::max);
        Ruling { rule: format!("{rule}: at most {limit} s"), got: Unit::Time.show(longest), is_kept: longest <= limit }
    };
    rulings.push(at_most("the slowest answer", LONGEST, clients().map(|asked| &asked.took).collect()));
    let probes = notes.asked.get(&WayIn::Probe).map(|asked| &asked.took).into_iter().collect();
    rulings.push(at_most("the slowest probe, whatever else is under way", PROBE, probes));
    let recovered = |of_libvirt: bool| {
        let faults = notes.faults.iter().filter(|(kind, _)| kind.is_of_libvirt() == of_libvirt);
        faults.map(|(_, done)| &done.recovered).collect()
    };
    rulings.push(at_most("an answer after the daemon's start or a reload", RECOVERY, recovered(false)));
    rulings.push(at_most("an answer that needs libvirt, after libvirtd's return", LIBVIRT_RECOVERY, recovered(true)));
    // The second daemon lives for the whole run.
    rulings.extend(Quantity::ALL.map(|quantity| {
        let growth = Growth::of(quantity, &outcome.seen[1]);
        let [second, last] = growth.thirds;
        Ruling {
            rule: format!("{} of the daemon that lives on: flat", quantity.title()),
            got: format!("median of the second third {second:.1}, of the last {last:.1}"),
            is_kept: growth.is_flat(),
        }
    }));
    rulings
}

/// Of these, each answered requests and all.
fn share(counts: impl Iterator<Item = (usize, usize)>) -> Ruling {
    let (answered, all) = counts.fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1));
    let count = |number: usize| f64::from(u32::try_from(number).unwrap_or(u32::MAX));
    let share = if all == 0 { 0.0 } else { count(answered) / count(all) };
    Ruling {
        rule: format!("answered, of the requests while the daemon is there: at least {:.0} %", SHARE * 100.0),
        got: format!("{answered} of {all} ({:.2} %)", share * 100.0),
        is_kept: share >= SHARE,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_counts_all_clients_and_none_is_none() {
        assert!(share([(99, 100), (100, 100)].into_iter()).is_kept);
        assert!(!share([(50, 100), (100, 100)].into_iter()).is_kept);
        assert!(!share(std::iter::empty()).is_kept, "a run in which nobody asks proves nothing");
    }
}
