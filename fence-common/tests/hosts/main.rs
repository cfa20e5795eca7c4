//! The group of hosts in simulation: the real state machines of two to five hosts, over a model of
//! corosync that promises no more than corosync does.
//!
//! A seed makes a schedule: cuts between hosts, delays, crashes, daemons that stand still, lost
//! power, fenced hosts that boot and start their domains, migrations, second copies of a running
//! machine, silent libvirts, and clients that several hosts hear. At the end all is mended.
//!
//! * `cpg`: corosync. `world`: machines and instances. `driver`: a daemon around the real
//!   [`fence_common::hosts::Hosts`]. `run`: a schedule, and what must hold.
//!
//! What must hold:
//!
//! * When a host says "off", every instance is dead that is older than the question.
//! * The group never starts a domain that runs. A reboot starts it once.
//! * A host acts at most once per request, also after a crash.
//! * Every question is answered, and an `off` works once all is mended.
//!
//! One case is excused, and counted. A *second copy* of a machine may live on a host that is cut
//! off and that nobody knows to run it, while the copy that the group knows is proven dead.
//!
//! `FENCE_SCHEDULES=1000000 cargo test --release -p fence-common --test hosts schedules` runs as
//! many. `FENCE_SEED=n ... one_seed -- --nocapture` prints one.

// (`cfg(test)` is always on here; saying it tells clippy that the modules may panic.)
#[cfg(test)]
mod arrivals;
#[cfg(test)]
mod cost;
#[cfg(test)]
mod cpg;
#[cfg(test)]
mod driver;
#[cfg(test)]
mod group;
#[cfg(test)]
mod races;
#[cfg(test)]
mod random;
#[cfg(test)]
mod rules;
#[cfg(test)]
mod run;
#[cfg(test)]
mod world;

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::Instant;

    use fence_common::hosts::HostsRule;

    use crate::run::{Broken, Run, Tally};
    use crate::{cost, races};

    /// How many schedules a plain `cargo test` runs. They find each broken rule.
    const SAMPLE: u64 = 600;

    fn schedule(seed: u64, broken: Option<HostsRule>) -> Result<Tally, Broken> {
        Run::new(seed, broken, false).run()
    }

    fn number(name: &str) -> Option<u64> {
        std::env::var(name).ok().map(|text| text.parse().unwrap())
    }

    /// Runs seeds on all processors. Returns the sum, or the first broken promise.
    fn schedules(seeds: std::ops::Range<u64>, broken: Option<HostsRule>) -> Result<Tally, (u64, Broken)> {
        let is_found = AtomicBool::new(false);
        let threads = u64::try_from(std::thread::available_parallelism().map_or(1, usize::from)).unwrap();
        std::thread::scope(|scope| {
            let mut parts = Vec::new();
            for thread in 0..threads {
                let (seeds, is_found) = (seeds.clone(), &is_found);
                parts.push(scope.spawn(move || {
                    let mut sum = Tally::default();
                    for seed in seeds.filter(|seed| seed % threads == thread) {
                        if is_found.load(Ordering::Relaxed) {
                            break;
                        }
                        let tally = schedule(seed, broken).map_err(|wrong| {
                            is_found.store(true, Ordering::Relaxed);
                            (seed, wrong)
                        })?;
                        sum.successes += tally.successes;
                        sum.failures += tally.failures;
                        sum.acts += tally.acts;
                        sum.copies_excused += tally.copies_excused;
                        sum.steps += tally.steps;
                    }
                    Ok(sum)
                }));
            }
            let mut sum = Tally::default();
            for part in parts {
                let tally = part.join().unwrap()?;
                sum.successes += tally.successes;
                sum.failures += tally.failures;
                sum.acts += tally.acts;
                sum.copies_excused += tally.copies_excused;
                sum.steps += tally.steps;
            }
            Ok(sum)
        })
    }

    /// Straight to stdout: the test harness hides what a passing test prints.
    fn say(line: &str) {
        let _ = writeln!(std::io::stdout(), "{line}");
    }

    fn explain(seed: u64, broken: Option<HostsRule>) -> String {
        let mut run = Run::new(seed, broken, true);
        let end = run.run();
        format!("{}\nseed {seed}: {end:?}", run.trace().join("\n"))
    }

    #[test]
    fn schedules_keep_the_promises() {
        let count = number("FENCE_SCHEDULES").unwrap_or(SAMPLE);
        let first = number("FENCE_FIRST_SEED").unwrap_or(0);
        let begun = Instant::now();
        match schedules(first..first + count, None) {
            Ok(sum) => {
                say(&format!("hosts: {count} schedules in {:.1?}: {sum:?}", begun.elapsed()));
                // A group that refuses everything keeps its promises, too.
                assert!(sum.successes > count, "too few successes: {sum:?}");
            }
            Err((seed, _)) => panic!("{}", explain(seed, None)),
        }
    }

    /// The rules that chance meets too seldom are in `rules`.
    #[test]
    fn every_broken_rule_is_found() {
        let mut unfound = Vec::new();
        for rule in [
            HostsRule::AllSpeak,
            HostsRule::AbsentFenced,
            HostsRule::TwoRounds,
            HostsRule::DoubtFails,
            HostsRule::ProofAwaited,
            HostsRule::ActsOnce,
            HostsRule::FirstStart,
            HostsRule::FirstReboot,
            HostsRule::ArrivalsWait,
            HostsRule::GoneIsNoProof,
            HostsRule::Quorum,
        ] {
            let begun = Instant::now();
            match schedules(0..SAMPLE, Some(rule)) {
                Err((seed, wrong)) => {
                    say(&format!("hosts: {rule:?} broken: seed {seed}: {wrong} ({:.1?})", begun.elapsed()));
                }
                Ok(sum) => unfound.push(format!("{rule:?} is not missed: {sum:?}")),
            }
        }
        assert!(unfound.is_empty(), "{unfound:#?}");
    }

    #[test]
    fn of_two_guests_that_fence_each_other_at_most_one_dies() {
        let sum = races::races(number("FENCE_SCHEDULES").unwrap_or(600), None);
        let sum = sum.unwrap_or_else(|(seed, wrong)| panic!("seed {seed}: {wrong}"));
        say(&format!("hosts: fence races: {sum:?}"));
        // A group that refuses both keeps the promise, too.
        assert!(sum.races > 100 && sum.won * 2 > sum.races, "{sum:?}");
        for rule in [
            HostsRule::VictimWaits,
            HostsRule::BegunFirst,
            HostsRule::SilentMayAct,
            HostsRule::KilledIsDead,
            HostsRule::DeadAreKnown,
        ] {
            let (seed, wrong) = races::races(1000, Some(rule)).expect_err("the rule is not missed");
            say(&format!("hosts: {rule:?} broken: seed {seed}: {wrong}"));
        }
    }

    /// docs/design/scale.md has these numbers.
    #[test]
    fn a_question_costs_messages_by_the_host_and_none_by_the_domain() {
        for (hosts, messages) in [(2, 9), (16, 37), (32, 69)] {
            let (off, joining) = (cost::of_off(hosts), cost::of_joining(hosts));
            say(&format!("hosts: {hosts}: off {off:?}, one more daemon {joining:?}"));
            assert_eq!((off.messages, joining.messages), (messages, hosts));
        }
    }

    #[test]
    fn one_seed() {
        if let Some(seed) = number("FENCE_SEED") {
            say(&explain(seed, None));
        }
    }
}
