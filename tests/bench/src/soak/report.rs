//! The results as a table on a terminal, and as a page with a picture.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};

use super::faults::FaultKind;
use super::judge::{Asked, Done, Told};
use super::{Outcome, picture};
use crate::machine::Fact;
use crate::pages;
use crate::stats::{Samples, Unit};

/// The page, in which the figures are to be filled.
pub(crate) const PAGE: &str = include_str!("../pages/soak.md");

fn time(samples: &Samples, percent: usize) -> String {
    Unit::Time.show_sample(samples.percentile(percent))
}

fn requests(outcome: &Outcome) -> String {
    let mut table = String::from(
        "| by | requests | answered | while the daemon is there | answered | median | p99 | slowest |\n\
         |---|--:|--:|--:|--:|--:|--:|--:|\n",
    );
    for (way, Asked { all, answered, undisturbed, undisturbed_answered, took }) in &outcome.judged.asked {
        let (median, p99, slowest) = (time(took, 50), time(took, 99), time(took, 100));
        let _ = writeln!(
            table,
            "| {way} | {all} | {answered} | {undisturbed} | {undisturbed_answered} | {median} | {p99} | {slowest} |"
        );
    }
    table
}

fn answers(outcome: &Outcome) -> String {
    let told = &outcome.judged.told;
    let mut table = String::from("| | success | off | failure | denied | none |\n|---|--:|--:|--:|--:|--:|\n");
    let mut ops: Vec<_> = told.keys().map(|(op, _)| *op).collect();
    ops.dedup();
    for op in ops {
        let count = |one| told.get(&(op, one)).copied().unwrap_or_default();
        let [success, off, failure, denied, none] =
            [Told::Success, Told::Off, Told::Failure, Told::Denied, Told::Nothing].map(count);
        let _ = writeln!(table, "| `{op}` | {success} | {off} | {failure} | {denied} | {none} |");
    }
    table
}

fn faults(outcome: &Outcome) -> String {
    let mut table = String::from("| fault | times | an answer after: median | slowest |\n|---|--:|--:|--:|\n");
    for kind in FaultKind::ALL {
        let Done { count, recovered } = outcome.judged.faults.get(&kind).cloned().unwrap_or_default();
        let _ = writeln!(table, "| {kind} | {count} | {} | {} |", time(&recovered, 50), time(&recovered, 100));
    }
    table
}

fn rules(outcome: &Outcome) -> String {
    let mut table = String::from("| rule | got | |\n|---|---|---|\n");
    for ruling in outcome.rulings() {
        let end = if ruling.is_kept { "kept" } else { "**broken**" };
        let _ = writeln!(table, "| {} | {} | {end} |", ruling.rule, ruling.got);
    }
    table
}

fn judged(outcome: &Outcome) -> String {
    let notes = &outcome.judged;
    format!(
        "| what was judged | |\n|---|--:|\n\
         | answers that call a domain dead, with processes of it alive when the request was sent | {} |\n\
         | domains that were looked at again after an `off` or an `on` | {} |\n\
         | lists | {} |\n\
         | migrations that arrived | {} |\n\
         | migrations that an `off` ended | {} |\n\
         | bad requests and silent connections in floods | {} |\n\
         | domains that were fenced and started when all faults were over | {} |\n\
         | libvirtds that held one of these for ever, and were started again | {} |\n",
        notes.kills,
        notes.stayed,
        notes.lists,
        notes.migrations.0,
        notes.migrations.1,
        notes.flooded,
        notes.examined,
        notes.wedged,
    )
}

/// The tables for a terminal.
#[must_use]
pub fn table(outcome: &Outcome) -> String {
    let all = [requests, answers, faults, judged, rules].map(|table| table(outcome));
    format!("\nseed {}, {:.0} s\n\n{}", outcome.plan.seed, outcome.took.as_secs_f64(), all.join("\n"))
}

/// The page.
#[must_use]
pub fn markdown(outcome: &Outcome, facts: &[Fact], beside: &str) -> String {
    let minutes = format!("{:.0}", outcome.plan.length.as_secs_f64() / 60.0);
    let (seed, machine) = (outcome.plan.seed.to_string(), pages::machine(facts, &["fence_virtd"]));
    let [requests, answers, faults, judged, rules] =
        [requests, answers, faults, judged, rules].map(|table| table(outcome));
    let values = [
        ("minutes", minutes.as_str()),
        ("seed", &seed),
        ("beside", beside),
        ("machine", &machine),
        ("requests", &requests),
        ("answers", &answers),
        ("faults", &faults),
        ("judged", &judged),
        ("rules", &rules),
    ];
    pages::fill(PAGE, &values)
}

/// Writes the page and its picture. `beside` says what else ran on the machine.
pub fn write(folder: &Path, outcome: &Outcome, facts: &[Fact], beside: &str) -> Result<()> {
    let pictures = folder.join("soak");
    fs::create_dir_all(&pictures).with_context(|| format!("making {}", pictures.display()))?;
    let write =
        |path: &Path, text: String| fs::write(path, text).with_context(|| format!("writing {}", path.display()));
    write(&folder.join("soak.md"), markdown(outcome, facts, beside))?;
    write(&pictures.join("daemons.svg"), picture::picture(&outcome.seen))
}
