//! The page about the phases of fences in real clusters, by fence-daemon and by fence_virtd.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::ValueEnum as _;

use super::picture::{Lane, picture};
use crate::figures::Contender;
use crate::machine::Fact;
use crate::pages;
use crate::stats::{Sample, Samples, Unit, three};
use fence_lab::cluster::scenario::Scenario;
use fence_lab::cluster::timeline::{Phase, Timeline};

/// The two that are compared, in the order of the table.
pub const CONTENDERS: [Contender; 2] = [Contender::Ours, Contender::Stock];

/// `reboot_pause` for the lab's `token` of 1000 ms, in seconds. corosync misses a node after the
/// token, and a node needs half a second more to boot.
pub const PAUSE: &str = "3.5";

/// How often each scenario went how.
#[derive(Clone, Debug, Default)]
pub struct ClusterResults {
    timelines: BTreeMap<(Scenario, u8), Vec<Timeline>>,
    /// fence-daemon's with a pause of [`PAUSE`].
    with_pause: BTreeMap<Scenario, Vec<Timeline>>,
    failures: Vec<(Scenario, Contender, String)>,
}

fn place(contender: Contender) -> u8 {
    match contender {
        Contender::Ours => 0,
        Contender::Stock => 1,
        Contender::Bare => 2,
    }
}

impl ClusterResults {
    /// Adds what was seen of a scenario that went well.
    pub fn add(&mut self, scenario: Scenario, contender: Contender, timeline: Timeline) {
        self.timelines.entry((scenario, place(contender))).or_default().push(timeline);
    }

    /// Adds what was seen of one with fence-daemon and a pause of [`PAUSE`].
    pub fn add_with_pause(&mut self, scenario: Scenario, timeline: Timeline) {
        self.with_pause.entry(scenario).or_default().push(timeline);
    }

    /// Adds that one did not, and why.
    pub fn fail(&mut self, scenario: Scenario, contender: Contender, why: String) {
        self.failures.push((scenario, contender, why));
    }

    fn of(&self, scenario: Scenario, contender: Contender) -> &[Timeline] {
        self.timelines.get(&(scenario, place(contender))).map_or(&[], Vec::as_slice)
    }

    fn phase(&self, scenario: Scenario, contender: Contender, phase: Phase) -> Option<f64> {
        median(self.of(scenario, contender), |timeline| timeline.get(phase))
    }

    /// From the request to `phase`.
    fn since_asked(&self, scenario: Scenario, contender: Contender, phase: Phase) -> Option<f64> {
        let since = |timeline: &Timeline| timeline.get(phase)?.checked_sub(timeline.get(Phase::Asked)?);
        median(self.of(scenario, contender), since)
    }

    fn scenarios(&self) -> impl Iterator<Item = Scenario> + '_ {
        let has = |scenario: &Scenario| CONTENDERS.iter().any(|&contender| !self.of(*scenario, contender).is_empty());
        Scenario::value_variants().iter().copied().filter(has)
    }
}

/// The median of a time that timelines have.
fn median(timelines: &[Timeline], time: impl Fn(&Timeline) -> Option<Duration>) -> Option<f64> {
    let mut samples = Samples::default();
    for value in timelines.iter().filter_map(time) {
        samples.push(Sample { value: value.as_secs_f64(), at_least: false });
    }
    samples.median().map(|sample| sample.value)
}

fn show(seconds: Option<f64>) -> String {
    seconds.map_or_else(|| "–".to_owned(), |seconds| Unit::Time.show(seconds))
}

/// The page, in which the figures are to be filled.
pub(crate) const PAGE: &str = include_str!("../pages/clusters.md");
/// What the page has about fence races, where one was measured.
pub(crate) const RACES: &str = include_str!("../pages/races.md");

/// The page.
#[must_use]
pub fn markdown(results: &ClusterResults, facts: &[Fact], rounds: usize) -> String {
    let raced = results.scenarios().any(|scenario| scenario == Scenario::FenceRace);
    let (rounds, machine) = (rounds.to_string(), pages::machine(facts, &[]));
    let (phases, parts, failures) = (phases(results), parts(results), failures(results));
    let pauses = pauses(results);
    pages::fill(
        PAGE,
        &[
            ("rounds", &rounds),
            ("machine", &machine),
            ("phases", &phases),
            ("parts", &parts),
            ("races", if raced { RACES } else { "" }),
            ("failures", &failures),
            ("pauses", &pauses),
        ],
    )
}

/// When what happened, as a table.
fn phases(results: &ClusterResults) -> String {
    let mut text = String::from("| what is broken | server |");
    for phase in Phase::ALL {
        let _ = write!(text, " {} |", phase.title());
    }
    text.push_str(&format!("\n|---|---|{}\n", "--:|".repeat(Phase::ALL.len())));
    for scenario in results.scenarios() {
        for contender in CONTENDERS {
            let title = if contender == Contender::Ours { scenario.title() } else { "" };
            let _ = write!(text, "| {title} | {} |", contender.name());
            for phase in Phase::ALL {
                let _ = write!(text, " {} |", show(results.phase(scenario, contender, phase)));
            }
            text.push('\n');
        }
    }
    text
}

/// How long the servers' parts took, as a table.
fn parts(results: &ClusterResults) -> String {
    let mut text = String::from(
        "| what is broken | to dead: fence-daemon | fence_virtd | ratio | to replied: fence-daemon | fence_virtd | ratio |\n\
         |---|--:|--:|--:|--:|--:|--:|\n",
    );
    for scenario in results.scenarios() {
        let _ = write!(text, "| {} |", scenario.title());
        for phase in [Phase::Dead, Phase::Replied] {
            let [ours, stock] = CONTENDERS.map(|contender| results.since_asked(scenario, contender, phase));
            let ratio = ours.zip(stock).filter(|(ours, _)| *ours > 0.0);
            let ratio = ratio.map_or_else(|| "–".to_owned(), |(ours, stock)| format!("{} ×", three(stock / ours)));
            let _ = write!(text, " {} | {} | {ratio} |", show(ours), show(stock));
        }
        text.push('\n');
    }
    text
}

/// What went wrong, if anything did.
fn failures(results: &ClusterResults) -> String {
    if results.failures.is_empty() {
        return String::new();
    }
    let mut text = String::from("\n## What went wrong\n\n");
    for (scenario, contender, why) in &results.failures {
        let _ = writeln!(text, "- {}, {}: {why}", scenario.title(), contender.name());
    }
    text
}

/// What a pause changes, as a table.
fn pauses(results: &ClusterResults) -> String {
    if results.with_pause.is_empty() {
        return String::new();
    }
    let phases = [Phase::Replied, Phase::Started, Phase::Back];
    let mut text = String::from("| what is asked for | server |");
    for phase in phases {
        let _ = write!(text, " {} |", phase.title());
    }
    let _ = writeln!(text, "\n|---|---|{}", "--:|".repeat(phases.len()));
    for (scenario, paused) in &results.with_pause {
        let servers = [
            ("fence-daemon".to_owned(), results.of(*scenario, Contender::Ours)),
            (format!("fence-daemon, `reboot_pause = \"{PAUSE}\"`"), paused.as_slice()),
            ("fence_virtd".to_owned(), results.of(*scenario, Contender::Stock)),
        ];
        for (index, (server, timelines)) in servers.iter().enumerate() {
            let _ = write!(text, "| {} | {server} |", if index == 0 { scenario.title() } else { "" });
            for phase in phases {
                let _ = write!(text, " {} |", show(median(timelines, |timeline| timeline.get(phase))));
            }
            text.push('\n');
        }
    }
    text.push('\n');
    text
}

/// Writes the page and its picture.
pub fn write(folder: &Path, results: &ClusterResults, facts: &[Fact], rounds: usize) -> Result<()> {
    let pictures = folder.join("clusters");
    fs::create_dir_all(&pictures).with_context(|| format!("making {}", pictures.display()))?;
    let lanes: Vec<_> = results
        .scenarios()
        .flat_map(|scenario| CONTENDERS.map(|contender| (scenario, contender)))
        .map(|(scenario, contender)| Lane {
            title: scenario.title(),
            contender,
            times: Phase::ALL.map(|phase| results.phase(scenario, contender, phase)),
        })
        .collect();
    for (path, text) in
        [(pictures.join("phases.svg"), picture(&lanes)), (folder.join("clusters.md"), markdown(results, facts, rounds))]
    {
        fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn results() -> ClusterResults {
        let mut results = ClusterResults::default();
        for (contender, dead) in [(Contender::Ours, 2.05), (Contender::Stock, 4.0)] {
            let times = [Some(1.9), Some(2.0), Some(dead), Some(dead + 0.05), Some(dead + 0.2), Some(dead + 1.5)];
            results.add(
                Scenario::Frozen,
                contender,
                Timeline::new(times.map(|time| time.map(Duration::from_secs_f64))),
            );
        }
        results.fail(Scenario::Hung, Contender::Stock, "it never came".to_owned());
        results
    }

    #[test]
    fn the_page_has_both_servers_their_ratio_and_what_went_wrong() {
        let page = markdown(&results(), &[Fact { what: "cores", is: "2".into() }], 1);
        for part in [
            "| corosync frozen (SIGSTOP) | fence-daemon | 1.90 s | 2.00 s | 2.05 s |",
            "|  | fence_virtd | 1.90 s | 2.00 s | 4.00 s |",
            "| corosync frozen (SIGSTOP) | 50.0 ms | 2.00 s | 40.0 × |",
            "hangs, fence_virtd: it never came",
            "| cores | 2 |",
        ] {
            assert!(page.contains(part), "no {part} in {page}");
        }
        assert!(!page.contains('{'), "{page}");
        assert!(!page.contains("## Fence races") && !page.contains("reboot_pause ="));
    }

    #[test]
    fn a_pause_stands_beside_none_and_beside_the_other_server() {
        let mut results = results();
        let times = |service, back| {
            Timeline::new(
                [None, None, None, Some(0.5), Some(service), Some(back)].map(|time| time.map(Duration::from_secs_f64)),
            )
        };
        results.add(Scenario::Reboot, Contender::Ours, times(5.0, 1.5));
        results.add(Scenario::Reboot, Contender::Stock, times(3.0, 3.5));
        results.add_with_pause(Scenario::Reboot, times(2.25, 3.25));
        let page = markdown(&results, &[], 1);
        let rows = "| `stonith_admin --reboot` | fence-daemon | 500 ms | 5.00 s | 1.50 s |\n\
                    |  | fence-daemon, `reboot_pause = \"3.5\"` | 500 ms | 2.25 s | 3.25 s |\n\
                    |  | fence_virtd | 500 ms | 3.00 s | 3.50 s |\n\n## How it is measured";
        assert!(page.contains(rows), "{page}");
        assert!(page.contains(
            "\n\n| what is asked for | server | replied | service up | node back |\n|---|---|--:|--:|--:|\n"
        ));
    }
}
