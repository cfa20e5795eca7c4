//! Fences in real clusters, by fence-daemon and by fence_virtd in turn, each on clusters of its
//! own.
//!
//! A false success of fence-daemon ends the bench with an error, and so does a service that runs
//! twice. Failures of fence_virtd go into the report.

use anyhow::Result;
use fence_lab::cluster::lab::Cluster;
use fence_lab::cluster::scenario::{Scenario, play};
use fence_lab::program::progress;
use fence_lab::server::Which;

use self::report::{CONTENDERS, ClusterResults, PAUSE};
use crate::figures::Contender;

mod picture;
pub mod report;

/// Plays these scenarios so many rounds.
pub fn run(ours: &Which, scenarios: &[Scenario], rounds: usize) -> Result<ClusterResults> {
    let mut results = ClusterResults::default();
    for round in 1..=rounds {
        for contender in CONTENDERS {
            let which = if contender == Contender::Ours { ours } else { &Which::Stock };
            progress(&format!("round {round} of {rounds}: {}", contender.name()));
            play_all(which, contender, scenarios, &mut results)?;
        }
    }
    Ok(results)
}

fn play_all(which: &Which, contender: Contender, scenarios: &[Scenario], results: &mut ClusterResults) -> Result<()> {
    let mut cluster = Cluster::start(which)?;
    for &scenario in scenarios {
        match play(&mut cluster, scenario) {
            Ok(timeline) => {
                progress(&format!("  {}: {timeline}", scenario.title()));
                results.add(scenario, contender, timeline);
            }
            Err(error) if contender == Contender::Stock => {
                let why = error.root_cause().to_string();
                let why = why.lines().next().unwrap_or_default();
                progress(&format!("  {}: {why}", scenario.title()));
                results.fail(scenario, contender, why.to_owned());
                // What it has left behind is not for the next one.
                drop(cluster);
                cluster = Cluster::start(which)?;
            }
            Err(error) => return Err(error),
        }
    }
    if contender == Contender::Ours {
        play_with_pause(which, &mut cluster, scenarios, results)?;
    }
    Ok(())
}

/// Plays the fences that corosync does not notice again, with a pause in which it does.
fn play_with_pause(
    which: &Which,
    cluster: &mut Cluster,
    scenarios: &[Scenario],
    results: &mut ClusterResults,
) -> Result<()> {
    let scenarios: Vec<_> = scenarios.iter().filter(|scenario| Scenario::UNNOTICED.contains(scenario)).collect();
    if scenarios.is_empty() {
        return Ok(());
    }
    cluster.reconfigure_server(which, &[("reboot_pause", PAUSE)])?;
    for &scenario in scenarios {
        let timeline = play(cluster, scenario)?;
        progress(&format!("  {}, with a pause of {PAUSE} s: {timeline}", scenario.title()));
        results.add_with_pause(scenario, timeline);
    }
    Ok(())
}
