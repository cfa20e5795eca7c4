//! Measures `fence-daemon` and stock's `fence_virtd` beside each other: what `cargo xtask bench` runs.
//!
//! The table goes to standard output, what is going on to standard error. With `--write` the results also become
//! `benchmarks.md` with its plots.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::Parser;
use fence_bench::figures::Part;
use fence_bench::rounds::{self, Plan};
use fence_bench::{machine, report};
use fence_lab::progress;
use fence_lab::server::Which;
use fence_lab::tools;

/// fence-daemon and fence_virtd in turn, on one lab, asked by one client.
#[derive(Parser)]
#[command(about)]
struct Arguments {
    /// The daemon to measure
    #[arg(long, value_name = "PATH")]
    daemon: PathBuf,
    /// How many rounds; both servers have their turn in each
    #[arg(long, default_value_t = 5, value_name = "N")]
    rounds: usize,
    /// One round with as little of everything as shows that it works: its figures mean nothing
    #[arg(long, conflicts_with = "rounds")]
    quick: bool,
    /// These parts alone
    #[arg(long, value_enum, value_name = "FIGURE", value_delimiter = ',')]
    only: Vec<Part>,
    /// Write benchmarks.md and benchmarks/*.svg into this folder
    #[arg(long, value_name = "FOLDER", conflicts_with_all = ["quick", "only"])]
    write: Option<PathBuf>,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            progress(&format!("fence-bench: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    tools::require(&["fence_virtd", "fence_xvm", "libvirtd", "virsh", "qemu-system-x86_64", "busybox", "ip", "tini"])?;
    if !arguments.daemon.is_file() {
        bail!("no fence-daemon at {}: run `cargo xtask bench`, which builds it", arguments.daemon.display());
    }
    let parts = if arguments.only.is_empty() { Part::ALL.to_vec() } else { arguments.only.clone() };
    let rounds = if arguments.quick { 1 } else { arguments.rounds };
    let ours = Which::Ours(std::path::absolute(&arguments.daemon)?);
    let facts = machine::describe();
    let results = rounds::run(&Plan { ours, rounds, parts, quick: arguments.quick })?;
    std::io::stdout().write_all(report::table(&results).as_bytes()).context("cannot print the results")?;
    if let Some(folder) = &arguments.write {
        report::write(folder, &results, &facts, rounds)?;
        progress(&format!("written: {}", folder.join("benchmarks.md").display()));
    }
    Ok(())
}
