//! Measures what the kernel program costs per frame: what `cargo xtask bench rate-limit` runs.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;
use fence_bench::machine;
use fence_bench::rate_limit::{floods, measure, report};
use fence_lab::progress;

/// The kernel program beside an empty one, and beside portable code.
#[derive(Parser)]
#[command(about)]
struct Arguments {
    /// How many samples of everything
    #[arg(long, default_value_t = 15, value_name = "N")]
    rounds: usize,
    /// The daemon to flood, beside stock's; without it there are no floods
    #[arg(long, value_name = "PATH")]
    daemon: Option<PathBuf>,
    /// Write rate-limit.md into this folder
    #[arg(long, value_name = "FOLDER")]
    write: Option<PathBuf>,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            progress(&format!("fence-rate-limit: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    let facts = machine::describe();
    let figures = measure::run(arguments.rounds)?;
    std::io::stdout().write_all(report::table(&figures).as_bytes()).context("cannot print the results")?;
    let floods = arguments.daemon.as_deref().map(floods::run).transpose()?;
    if let Some(floods) = &floods {
        std::io::stdout().write_all(floods.table().as_bytes()).context("cannot print the results")?;
    }
    if let Some(folder) = &arguments.write {
        report::write(folder, &figures, floods.as_ref(), &facts, arguments.rounds)?;
        progress(&format!("written: {}", folder.join("rate-limit.md").display()));
    }
    Ok(())
}
