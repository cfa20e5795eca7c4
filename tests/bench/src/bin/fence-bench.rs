//! Measures fence-daemon in the lab. `cargo xtask bench` runs it. Each subject has a page in
//! `docs/measured`.
//!
//! Results go to standard output, progress to standard error.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Parser, ValueEnum as _};
use fence_bench::bystanders::{self, Road};
use fence_bench::figures::Part;
use fence_bench::rate_limit::{self, floods};
use fence_bench::rounds::{self, Plan};
use fence_bench::{clusters, machine, report, soak};
use fence_lab::cluster::scenario::Scenario;
use fence_lab::program::{self, progress};
use fence_lab::server::Which;
use fence_lab::tools;

/// Measures fence-daemon, most of it beside fence_virtd
#[derive(Parser)]
enum Subject {
    /// fence-daemon and fence_virtd in turn, on one lab, asked by one client
    Daemon {
        #[command(flatten)]
        how: How,
        /// These parts alone
        #[arg(long, value_enum, value_name = "FIGURE", value_delimiter = ',', conflicts_with = "write")]
        only: Vec<Part>,
    },
    /// The eight ratios that tell most, in one round
    Quick {
        /// The daemon to measure
        #[arg(long, value_name = "PATH")]
        daemon: PathBuf,
    },
    /// The kernel program per frame, beside an empty program and portable code; both servers under
    /// floods
    RateLimit(How),
    /// TCP with the program on the interface, in every way to attach it, and without it
    Bystanders(How),
    /// fence-daemon and fence_virtd in turn, each on clusters of its own
    Clusters {
        #[command(flatten)]
        how: How,
        /// Play this scenario alone (as often as wanted)
        #[arg(long, value_enum, value_name = "SCENARIO", conflicts_with_all = ["quick", "write"])]
        only: Vec<Scenario>,
    },
    /// Honest load, floods and faults at random; an observer judges every success
    Soak {
        /// The daemon to soak
        #[arg(long, value_name = "PATH")]
        daemon: PathBuf,
        /// For how long
        #[arg(long, default_value_t = 60, value_name = "N")]
        minutes: u64,
        /// What chooses; printed, so that it can be repeated
        #[arg(long, value_name = "SEED")]
        seed: Option<u64>,
        /// Write the page and its picture into this folder
        #[arg(long, value_name = "FOLDER")]
        write: Option<PathBuf>,
        /// A sentence for the page: what else ran on the machine
        #[arg(long, default_value = "Nothing else ran on the machine.", value_name = "TEXT")]
        beside: String,
    },
}

/// How it is measured.
#[derive(clap::Args)]
struct How {
    /// The daemon to measure
    #[arg(long, value_name = "PATH")]
    daemon: PathBuf,
    /// How many rounds; all that is compared has its turn in each
    #[arg(long, default_value_t = 1, value_name = "N")]
    rounds: usize,
    /// One short round that shows that the bench works: its figures mean nothing
    #[arg(long, conflicts_with = "rounds")]
    quick: bool,
    /// Write the subject's page and its pictures into this folder
    #[arg(long, value_name = "FOLDER", conflicts_with = "quick")]
    write: Option<PathBuf>,
}

fn main() -> ExitCode {
    program::exit("fence-bench", run(&Subject::parse()).map(|()| true))
}

fn run(subject: &Subject) -> Result<()> {
    // Before anything runs: the load is one of them.
    let facts = machine::describe();
    match subject {
        Subject::Daemon { how, only } => {
            let needed =
                ["fence_virtd", "fence_xvm", "libvirtd", "virsh", "qemu-system-x86_64", "busybox", "ip", "tini"];
            tools::require(&needed)?;
            let parts = if only.is_empty() { Part::ALL.to_vec() } else { only.clone() };
            let plan = Plan { ours: Which::at(&how.daemon)?, rounds: how.rounds, parts, quick: how.quick };
            let results = rounds::run(&plan)?;
            print(&report::table(&results))?;
            how.write(|folder| report::write(folder, &results, &facts, how.rounds))
        }
        Subject::Quick { daemon } => {
            tools::require(&["fence_virtd", "fence_xvm", "libvirtd", "virsh", "qemu-system-x86_64", "ip", "tini"])?;
            let parts = vec![Part::Idle, Part::Storm17, Part::Status, Part::Own];
            let plan = Plan { ours: Which::at(daemon)?, rounds: 1, parts, quick: false };
            print(&report::telling(&rounds::run(&plan)?))
        }
        Subject::RateLimit(how) => {
            let daemon = Which::at(&how.daemon)?;
            let figures = rate_limit::measure::run(how.rounds)?;
            print(&rate_limit::report::table(&figures))?;
            let floods = floods::run(&daemon)?;
            print(&floods.table())?;
            how.write(|folder| rate_limit::report::write(folder, &figures, &floods, &facts, how.rounds))
        }
        Subject::Bystanders(how) => {
            tools::require(&["ip", "tini", "bpftool"])?;
            let results = bystanders::measure(&Which::at(&how.daemon)?, how.rounds)?;
            print(&[Road::Bridge, Road::Cable].map(|road| results.table(road)).join("\n"))?;
            // Of the machine, not of what fencing takes.
            let page = bystanders::page(&results, facts.get(..6).unwrap_or_default(), how.rounds);
            how.write(|folder| Ok(std::fs::write(folder.join("bystanders.md"), page)?))
        }
        Subject::Clusters { how, only } => {
            tools::require(&["fence_virtd", "libvirtd", "virsh", "ip", "tini", "mmdebstrap"])?;
            let all = Scenario::value_variants();
            let all = if how.quick { &all[..1] } else { all };
            let scenarios = if only.is_empty() { all } else { only };
            let results = clusters::run(&Which::at(&how.daemon)?, scenarios, how.rounds)?;
            progress(&clusters::report::markdown(&results, &facts, how.rounds));
            how.write(|folder| clusters::report::write(folder, &results, &facts, how.rounds))
        }
        Subject::Soak { daemon, minutes, seed, write, beside } => {
            tools::require(&["fence_xvm", "libvirtd", "virsh", "qemu-system-x86_64", "busybox", "ip", "tini"])?;
            let seed = seed.unwrap_or_else(soak::SoakPlan::any_seed);
            let length = Duration::from_secs(minutes * 60);
            let plan = soak::SoakPlan { daemon: Which::at(daemon)?, length, seed, pace: soak::Pace::FULL };
            // A run that broke a rule writes no page.
            let outcome = soak::run(&plan)?.kept()?;
            print(&soak::report::table(&outcome))?;
            let Some(folder) = write else { return Ok(()) };
            soak::report::write(folder, &outcome, &facts, beside)?;
            progress(&format!("written into {}", folder.display()));
            Ok(())
        }
    }
}

fn print(results: &str) -> Result<()> {
    std::io::stdout().write_all(results.as_bytes()).context("cannot print the results")
}

impl How {
    fn write(&self, page: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
        let Some(folder) = &self.write else { return Ok(()) };
        page(folder).with_context(|| format!("cannot write into {}", folder.display()))?;
        progress(&format!("written into {}", folder.display()));
        Ok(())
    }
}
