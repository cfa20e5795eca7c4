//! Measures the phases of fences in real clusters, with `fence-daemon` and with stock's `fence_virtd`: what `cargo xtask bench clusters` runs.
//!
//! A lie of ours (a success while the victim lives, the service twice) ends it with an error; what goes wrong with stock's server is written down.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::Parser;
use fence_bench::clusters::report::{self, CONTENDERS, PAUSE, Results};
use fence_bench::figures::Contender;
use fence_bench::machine;
use fence_lab::cluster::lab::Cluster;
use fence_lab::cluster::scenario::{Scenario, play};
use fence_lab::progress;
use fence_lab::server::Which;
use fence_lab::tools;

/// fence-daemon and fence_virtd in turn, each on clusters of its own.
#[derive(Parser)]
#[command(about)]
struct Arguments {
    /// The daemon to measure
    #[arg(long, value_name = "PATH")]
    daemon: PathBuf,
    /// How many rounds; both servers have their turn in each
    #[arg(long, default_value_t = 3, value_name = "N")]
    rounds: usize,
    /// One round of one scenario
    #[arg(long, conflicts_with = "rounds")]
    quick: bool,
    /// Play this scenario alone, or several of them, as often as wanted; `--only help` lists them
    #[arg(long, value_enum, value_name = "SCENARIO", conflicts_with_all = ["quick", "write"])]
    only: Vec<Scenario>,
    /// Write clusters.md and its picture into this folder
    #[arg(long, value_name = "FOLDER", conflicts_with = "quick")]
    write: Option<PathBuf>,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            progress(&format!("fence-clusters: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    tools::require(&["fence_virtd", "libvirtd", "virsh", "ip", "tini", "mmdebstrap"])?;
    if !arguments.daemon.is_file() {
        bail!("no fence-daemon at {}: run `cargo xtask bench clusters`, which builds it", arguments.daemon.display());
    }
    let ours = Which::Ours(std::path::absolute(&arguments.daemon)?);
    let facts = machine::describe();
    let (rounds, scenarios) = match (arguments.quick, arguments.only.as_slice()) {
        (true, _) => (1, &Scenario::ALL[..1]),
        (false, []) => (arguments.rounds, &Scenario::ALL[..]),
        (false, only) => (arguments.rounds, only),
    };
    let mut results = Results::default();
    for round in 1..=rounds {
        for contender in CONTENDERS {
            let which = if contender == Contender::Ours { ours.clone() } else { Which::Stock };
            progress(&format!("round {round} of {rounds}: {}", contender.name()));
            play_all(&which, contender, scenarios, &mut results)?;
        }
    }
    progress(&report::markdown(&results, &facts, rounds));
    if let Some(folder) = &arguments.write {
        report::write(folder, &results, &facts, rounds)?;
        progress(&format!("written: {}", folder.join("clusters.md").display()));
    }
    Ok(())
}

fn play_all(which: &Which, contender: Contender, scenarios: &[Scenario], results: &mut Results) -> Result<()> {
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

/// What nobody notices by itself, played again with a pause that lets the others miss the node.
fn play_with_pause(which: &Which, cluster: &mut Cluster, scenarios: &[Scenario], results: &mut Results) -> Result<()> {
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
