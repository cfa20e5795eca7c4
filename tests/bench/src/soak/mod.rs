//! The soak: honest load, floods and faults at random for as long as wanted. An independent
//! observer judges every success.
//!
//! * `site`: two hypervisors that migrate to each other, their machines, and the daemons'
//!   configuration.
//! * `load`: honest clients. `client` is one of them; `traveller` fences a machine that
//!   migrates.
//! * `faults`: what is done to daemons and libvirtds. `hands` does it. `trouble`: floods, and
//!   an administrator who starts and stops machines.
//! * `judge`: what was answered, and what must not have been. `rules`: what a run must keep.
//! * `watch`: the daemons' memory, descriptors and threads. `picture` and `report` show them.
//! * `exam`: whether everything can be fenced once all faults are over.
//!
//! The daemon of the first hypervisor is killed and stopped. That of the second lives for the whole
//! run, so that what it loses shows. A seed chooses what each thread does, and in which order. How
//! the threads meet is chance.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use fastrand::Rng;
use fence_lab::program::progress;
use fence_lab::server::Which;

mod client;
mod exam;
mod faults;
mod hands;
mod judge;
mod load;
mod picture;
pub mod report;
mod rules;
mod site;
mod traveller;
mod trouble;
mod watch;

use hands::Hands;
use judge::Judge;
use load::Worker;
use rules::Ruling;
use site::World;

/// How hard it is.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// The longest pause of a client between two requests; half of it on average.
    client: Duration,
    /// The longest pause between two faults.
    fault: Duration,
    /// The longest time that a libvirtd hangs.
    hang: Duration,
}

impl Pace {
    /// For a machine that does nothing else.
    pub const FULL: Self =
        Self { client: Duration::from_millis(1500), fault: Duration::from_secs(8), hang: Duration::from_secs(20) };
    /// Beside other tests, and short: every kind of fault has its turn in two minutes.
    pub const GENTLE: Self =
        Self { client: Duration::from_secs(4), fault: Duration::from_secs(3), hang: Duration::from_secs(8) };
}

/// What is to be done.
#[derive(Clone, Debug)]
pub struct SoakPlan {
    /// The daemon.
    pub daemon: Which,
    /// For how long, without the exam at the end.
    pub length: Duration,
    /// What chooses.
    pub seed: u64,
    /// How hard.
    pub pace: Pace,
}

impl SoakPlan {
    /// A seed for a run that nobody has chosen one for.
    pub fn any_seed() -> u64 {
        // Short enough to be typed.
        fastrand::u64(..1_000_000_000)
    }

    /// A piece of the run's time at random, from a fifth of it on.
    fn up_to(rng: &mut Rng, longest: Duration) -> Duration {
        longest.mul_f64(0.2 + 0.8 * rng.f64())
    }
}

/// What came of a run.
#[derive(Debug)]
pub struct Outcome {
    plan: SoakPlan,
    took: Duration,
    judged: judge::Notes,
    seen: [Vec<watch::Look>; 2],
    /// What of the daemons' logs belongs to the violations.
    log: String,
}

impl Outcome {
    /// The rules, and whether each was kept.
    fn rulings(&self) -> Vec<Ruling> {
        rules::all(self)
    }

    /// Itself, if all rules were kept.
    ///
    /// # Errors
    /// One was not: with the seed, the violations and the daemons' log.
    pub fn kept(self) -> Result<Self> {
        let broken: Vec<_> = self.rulings().into_iter().filter(|ruling| !ruling.is_kept).collect();
        ensure!(
            broken.is_empty(),
            "the soak with seed {} broke: {}\n{}\n{}{}",
            self.plan.seed,
            broken.iter().map(|ruling| format!("{}: {}", ruling.rule, ruling.got)).collect::<Vec<_>>().join("; "),
            self.judged.violations.join("\n"),
            report::table(&self),
            self.log,
        );
        Ok(self)
    }

    /// The false successes that the observer has seen.
    #[must_use]
    pub fn false_successes(&self) -> usize {
        self.judged.violations.iter().filter(|violation| violation.contains("FALSE SUCCESS")).count()
    }
}

/// A run. What breaks a rule is in its outcome.
///
/// # Errors
/// The lab could not be made, or failed.
pub fn run(plan: &SoakPlan) -> Result<Outcome> {
    progress(&format!("soak: seed {}, {:.0} s", plan.seed, plan.length.as_secs_f64()));
    let mut rng = Rng::with_seed(plan.seed);
    let (world, running) = site::build(&plan.daemon)?;
    let hands = Hands::new(plan, &world, running, rng.fork());
    let judge = Judge::new();
    let begun = Instant::now();
    let (mut hands, seen) = together(plan, &world, &judge, hands, &mut rng)?;
    if judge.is_clean() {
        progress("soak: the faults are over; everything is fenced once more");
        exam::take(&world, &judge, &mut hands)?;
    }
    hands.note_panics(&judge);
    let judged = judge.into_notes();
    let log = if judged.violations.is_empty() { String::new() } else { hands.log() };
    Ok(Outcome { plan: plan.clone(), took: begun.elapsed(), judged, seen, log })
}

type Threads<'scope> = Vec<std::thread::ScopedJoinHandle<'scope, Result<()>>>;

/// Everything at once, until the time is over or a rule is broken.
fn together<'w>(
    plan: &SoakPlan,
    world: &'w World,
    judge: &Judge,
    mut hands: Hands<'w>,
    rng: &mut Rng,
) -> Result<(Hands<'w>, [Vec<watch::Look>; 2])> {
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let mut threads: Threads<'_> = Vec::new();
        let over = &over;
        for worker in Worker::all(world, judge, plan.pace, rng)? {
            threads.push(scope.spawn(move || ended(over, worker.work(over))));
        }
        let mut rngs = [rng.fork(), rng.fork(), rng.fork()].into_iter();
        let mut next = || rngs.next().context("too few generators");
        let (flooding, managing, travelling) = (next()?, next()?, next()?);
        threads.push(scope.spawn(move || ended(over, trouble::flood(world, judge, over, flooding))));
        threads.push(scope.spawn(move || ended(over, trouble::administrate(world, plan.pace, over, managing))));
        threads.push(scope.spawn(move || ended(over, traveller::travel(world, judge, plan.pace, over, travelling))));
        let watching = scope.spawn(move || watch::watch(world, over));
        let breaking = scope.spawn(move || {
            let result = hands.work(judge, over);
            (hands, ended(over, result))
        });

        let begun = Instant::now();
        let mut told = 0;
        while begun.elapsed() < plan.length && judge.is_clean() && !over.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(200));
            let minute = begun.elapsed().as_secs() / 60;
            if minute > told {
                told = minute;
                progress(&format!("soak: {minute} min: {}", judge.summary()));
            }
        }
        over.store(true, Ordering::Relaxed);
        let panicked = |_| anyhow!("a thread of the soak panicked");
        let (hands, broke) = breaking.join().map_err(panicked)?;
        let seen = watching.join().map_err(panicked)?;
        let ends: Vec<_> = threads.into_iter().map(|thread| thread.join().map_err(panicked)).collect();
        // A violation explains more than what follows from it.
        if judge.is_clean() {
            broke.with_context(|| hands.log())?;
            for end in ends {
                end?.with_context(|| hands.log())?;
            }
        }
        Ok((hands, seen))
    })
}

/// A thread that fails ends the others.
fn ended(over: &AtomicBool, result: Result<()>) -> Result<()> {
    if result.is_err() {
        over.store(true, Ordering::Relaxed);
    }
    result
}

/// Sleeps, unless it is over before.
fn rest(over: &AtomicBool, time: Duration) {
    let until = Instant::now() + time;
    while !over.load(Ordering::Relaxed) {
        let Some(left) = until.checked_duration_since(Instant::now()) else { break };
        std::thread::sleep(left.min(Duration::from_millis(100)));
    }
}
