//! The order of the rounds. Contenders take turns, so other load on the machine hits all of them.

use std::time::Instant;

use anyhow::{Context, Result};

use super::bed::{Bed, Victim};
use super::figures::{Contender, Part, Results};
use super::{hosts, measure, restart, serial, tcp, thousand};
use fence_lab::program::progress;
use fence_lab::qemu;
use fence_lab::server::Which;

/// A run of the bench.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The daemon.
    pub ours: Which,
    /// How many rounds.
    pub rounds: usize,
    /// Which parts.
    pub parts: Vec<Part>,
    /// As little of each part as shows that it works.
    pub quick: bool,
}

/// fence_virtd takes minutes in some parts. Only one in this many rounds has them.
const SLOW_EVERY: usize = 3;

impl Plan {
    fn has(&self, part: Part) -> bool {
        self.parts.contains(&part)
    }

    fn times(&self, times: usize) -> usize {
        if self.quick { 1 } else { times }
    }
}

/// The machines and how often each is killed in a round.
const VICTIMS: [(Part, Victim, usize); 4] = [
    (Part::Idle, Victim::Idle, 5),
    (Part::Booted, Victim::Booted, 1),
    (Part::Touched, Victim::Touched, 1),
    (Part::Container, Victim::Container, 2),
];

/// Runs the plan. A false success is an error.
pub fn run(plan: &Plan) -> Result<Results> {
    progress("making the lab ...");
    let bed = Bed::new(plan.ours.clone())?;
    for (_, victim, _) in VICTIMS.iter().filter(|(part, victim, _)| {
        let others = [Part::Status, Part::Callers, Part::Beside, Part::Off, Part::Tcp, Part::Serial];
        let asked_about = *victim == Victim::Idle && others.into_iter().any(|part| plan.has(part));
        plan.has(*part) || asked_about
    }) {
        bed.define(*victim).with_context(|| format!("the machine {}", victim.name()))?;
    }
    let most = if plan.has(Part::Storm100) { 100 } else { 17 };
    if plan.has(Part::Storm17) || plan.has(Part::Storm100) {
        bed.define_storm(most)?;
    }
    let mut results = Results::default();
    for round in 0..plan.rounds {
        // Who goes first changes from round to round.
        let mut contenders = [Contender::Ours, Contender::Stock];
        if round % 2 == 1 {
            contenders.reverse();
        }
        for contender in contenders {
            let begin = Instant::now();
            one(plan, &bed, contender, round, &mut results)
                .with_context(|| format!("round {}, {}", round + 1, contender.name()))?;
            let (round, rounds, seconds) = (round + 1, plan.rounds, begin.elapsed().as_secs());
            progress(&format!("round {round} of {rounds}, {}: {seconds} s", contender.name()));
        }
        if plan.has(Part::Restart) {
            restart::measure(&plan.ours, &mut results)?;
        }
        if plan.has(Part::Thousand) && round.is_multiple_of(SLOW_EVERY) {
            let size = if plan.quick { thousand::Size::QUICK } else { thousand::Size::FULL };
            thousand::run_round(&plan.ours, size, plan.times(5), &mut results)?;
        }
        if plan.has(Part::LargeGroups) && round.is_multiple_of(SLOW_EVERY) {
            hosts::measure_large(&plan.ours, plan.times(20), &mut results)?;
        }
        for (part, victim, times) in VICTIMS {
            if plan.has(part) {
                measure::kills(&bed, Contender::Bare, victim, plan.times(times), None, &mut results)?;
            }
        }
        if plan.has(Part::Storm100) && round.is_multiple_of(SLOW_EVERY) {
            measure::bare_storm(&bed, 100, &mut results)?;
        }
    }
    Ok(results)
}

fn one(plan: &Plan, bed: &Bed, contender: Contender, round: usize, results: &mut Results) -> Result<()> {
    let slow = round.is_multiple_of(SLOW_EVERY);
    for (part, victim, times) in VICTIMS {
        if plan.has(part) {
            let serving = bed.serve(contender, victim.uri())?;
            measure::kills(bed, contender, victim, plan.times(times), Some(&serving.server), results)?;
        }
    }
    if plan.has(Part::Beside) {
        let serving = bed.serve(contender, qemu::URI)?;
        measure::beside(bed, contender, plan.times(5), &serving.server, results)?;
    }
    let wanted = |part, in_this_round: bool| plan.has(part) && in_this_round;
    for (part, count, in_this_round) in [(Part::Storm17, 17, true), (Part::Storm100, 100, slow)] {
        if wanted(part, in_this_round) {
            let _serving = bed.serve(contender, qemu::URI)?;
            measure::storm(bed, contender, count, results)?;
        }
    }
    if wanted(Part::Callers, slow) {
        measure::callers(bed, contender, plan.times(10), results)?;
    }
    if plan.has(Part::Tcp) {
        tcp::measure(bed, contender, plan.times(20), results)?;
    }
    if plan.has(Part::Serial) {
        serial::measure(bed, contender, plan.times(20), results)?;
    }
    if plan.has(Part::Hosts) {
        hosts::measure(&bed.which(contender)?, contender, plan.times(10), results)?;
    }
    if plan.has(Part::Status) {
        let _serving = bed.serve(contender, qemu::URI)?;
        measure::status(bed, contender, plan.times(20), results)?;
    }
    if plan.has(Part::Off) {
        let _serving = bed.serve(contender, qemu::URI)?;
        measure::off(bed, contender, plan.times(20), results)?;
    }
    if plan.has(Part::Own) {
        for _ in 0..plan.times(3) {
            let mut serving = bed.serve(contender, qemu::URI)?;
            measure::own(contender, &mut serving, results)?;
        }
    }
    if wanted(Part::Asleep, slow) {
        let mut serving = bed.serve(contender, qemu::URI)?;
        measure::asleep(contender, &mut serving, results)?;
    }
    Ok(())
}
