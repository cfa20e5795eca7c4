//! Runs the loaded kernel program and the judgement in user space on the same frames. `cargo xtask
//! fuzz program` runs it.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use clap::Parser;
use fence_lab::differential::{self, Coverage, Difference};
use fence_lab::program::{self, progress};

/// The kernel program against user space, on mutated real frames.
#[derive(Parser)]
#[command(about)]
struct Arguments {
    /// How many cases
    #[arg(long, default_value_t = 1_000_000, value_name = "N")]
    cases: u64,
    /// What the cases follow from [default: the time]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Where a case goes in which the two differ
    #[arg(long, value_name = "FOLDER")]
    found: PathBuf,
    /// Write the first case of each verdict there
    #[arg(long, value_name = "FOLDER")]
    examples: Option<PathBuf>,
}

fn main() -> ExitCode {
    program::exit("fence-differ", run(&Arguments::parse()).map(|()| true))
}

fn run(arguments: &Arguments) -> Result<()> {
    let seed = arguments.seed.unwrap_or_else(|| {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        now.as_secs() ^ u64::from(now.subsec_nanos()) << 20
    });
    let threads = std::thread::available_parallelism().map_or(1, |count| count.get() as u64);
    progress(&format!("{} cases from seed {seed}, on {threads} threads", arguments.cases));
    let begin = Instant::now();
    let results: Vec<Result<Coverage>> = std::thread::scope(|scope| {
        let one = |thread| {
            let cases = arguments.cases / threads + u64::from(thread < arguments.cases % threads);
            scope.spawn(move || differential::run(seed.wrapping_add(thread << 48), cases))
        };
        let running: Vec<_> = (0..threads).map(one).collect();
        let ended = running.into_iter().map(|thread| thread.join());
        ended.map(|result| result.unwrap_or_else(|_| Err(anyhow::anyhow!("a thread panicked")))).collect()
    });
    let took = begin.elapsed().as_secs_f64();
    let mut all = Coverage::default();
    for result in results {
        match result {
            Ok(coverage) => all.merge(coverage),
            Err(error) => return Err(written(error, &arguments.found)),
        }
    }
    let mut out = std::io::stdout().lock();
    for (name, count, case) in all.iter() {
        writeln!(out, "{name:<12} {count:>10}")?;
        if let Some(folder) = &arguments.examples {
            let text = format!("verdict={name}\n{}\n", case.to_string().replace(' ', "\n"));
            fs::write(folder.join(name.to_lowercase()), text).context("an example")?;
        }
    }
    let cases = arguments.cases;
    #[allow(clippy::cast_precision_loss, reason = "a figure for people")]
    let rate = cases as f64 / took;
    writeln!(out, "{cases} cases in {took:.1} s, {rate:.0} a second: no difference")?;
    Ok(())
}

/// Writes the case down that an error is about, if it is about one, and says where.
fn written(error: anyhow::Error, folder: &Path) -> anyhow::Error {
    let Some(difference) = error.downcast_ref::<Difference>() else { return error };
    let text = format!("# {}\n{}\n", difference.what, difference.case.to_string().replace(' ', "\n"));
    let path = folder.join("found");
    match fs::create_dir_all(folder).and_then(|()| fs::write(&path, text)) {
        Ok(()) => error.context(format!("written to {}", path.display())),
        Err(cannot) => error.context(format!("and cannot write {}: {cannot}", path.display())),
    }
}
