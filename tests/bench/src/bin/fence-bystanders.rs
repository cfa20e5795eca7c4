//! Measures what the kernel program costs other traffic: what `cargo xtask bench bystanders` runs.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Parser;
use fence_bench::bystanders::{self, Road};
use fence_bench::machine;
use fence_lab::progress;
use fence_lab::server::Which;
use fence_lab::tools;

/// TCP with the program on the interface, in every way that it can be attached, and without it.
#[derive(Parser)]
#[command(about)]
struct Arguments {
    /// The daemon that attaches it
    #[arg(long, value_name = "PATH")]
    daemon: PathBuf,
    /// How many rounds; each way has its turn in each
    #[arg(long, default_value_t = 11, value_name = "N")]
    rounds: usize,
    /// One short round that shows that the bench works: its figures mean nothing
    #[arg(long, conflicts_with = "rounds")]
    quick: bool,
    /// Write bystanders.md into this folder
    #[arg(long, value_name = "FOLDER", conflicts_with = "quick")]
    write: Option<PathBuf>,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            progress(&format!("fence-bystanders: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    tools::require(&["ip", "tini", "bpftool"])?;
    if !arguments.daemon.is_file() {
        bail!("no fence-daemon at {}: run `cargo xtask bench bystanders`, which builds it", arguments.daemon.display());
    }
    let (rounds, long) =
        if arguments.quick { (1, Duration::from_millis(50)) } else { (arguments.rounds, Duration::from_millis(500)) };
    let daemon = Which::Ours(std::path::absolute(&arguments.daemon)?);
    // Of the machine, not of what fencing takes.
    let facts = machine::describe().into_iter().take(6).collect::<Vec<_>>();
    let rows = bystanders::measure(&daemon, rounds, long)?;
    let table = [Road::Bridge, Road::Cable].map(|road| bystanders::table(&rows, road)).join("\n");
    std::io::stdout().write_all(table.as_bytes()).context("cannot print the results")?;
    if let Some(folder) = &arguments.write {
        let file = folder.join("bystanders.md");
        std::fs::write(&file, bystanders::page(&rows, &facts, rounds, long))
            .with_context(|| format!("cannot write {}", file.display()))?;
        progress(&format!("written: {}", file.display()));
    }
    Ok(())
}
