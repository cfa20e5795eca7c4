//! `cargo xtask fuzz`: libFuzzer searches inputs that violate the properties in `fence-fuzz`.
//! A test of `prog_run` searches frames on which the kernel program and user space differ.
//!
//! The stable toolchain suffices: the compiler's own pass counts coverage, and a C++ compiler
//! builds libFuzzer. Findings stay below `target/fuzz`; a person decides which to keep
//! (fuzz/README.md).

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context as _, bail};
use clap::ValueEnum;

use crate::bpf;
use crate::name_of;
use crate::privilege::Privilege;
use crate::progress::{self, say};
use crate::setup::{self, Profile};
use crate::suites;
use crate::workspace::{self, Workspace};

/// Compiler flags for coverage. Overflows and failed debug assertions are findings too.
const FLAGS: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares -Cdebug-assertions=on -Coverflow-checks=on -Ccodegen-units=1";

/// The test that compares new frames.
const COMPARISON: &str = "differential::new_frames_have_the_same_verdict_from_both";

/// A fuzz target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Target {
    /// The configuration file
    Config,
    /// A request, as a datagram and in a frame
    Request,
    /// A request over a client's own connection, beside the same request as a datagram
    Stream,
    /// A record of the ring buffer
    Event,
    /// What a guest writes to its serial line
    Line,
    /// The loaded kernel program against user space, on mutated real frames (needs root)
    Program,
}

/// Options of `cargo xtask fuzz`.
#[derive(Debug, clap::Args)]
pub(crate) struct FuzzOptions {
    /// The fuzz target
    #[arg(value_enum, default_value = "config")]
    target: Target,
    /// The duration
    #[arg(long, default_value_t = 20, value_name = "N")]
    minutes: u32,
    /// The number of cases (only for `program`, which has no duration)
    #[arg(long, default_value_t = 1_000_000, value_name = "N")]
    cases: u64,
    /// The seed of the cases (only for `program`) [default: the time]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Instead of fuzzing, write the smallest set of inputs with the same coverage to
    /// target/fuzz/merged
    #[arg(long)]
    merge: bool,
}

/// Builds the target and runs it until its time is over or it finds something.
///
/// # Errors
/// The target cannot be built, or it has found something. The input's path has been printed then.
pub(crate) fn run(workspace: &Workspace, options: &FuzzOptions) -> anyhow::Result<ExitCode> {
    if options.target == Target::Program {
        return program(workspace, options);
    }
    setup::ensure(workspace, Profile::Build)?;
    let compiler = Command::new("c++").arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    if !compiler.is_ok_and(|status| status.success()) {
        bail!("no `c++` to compile libFuzzer with: install a C++ compiler (on Debian: apt-get install g++)");
    }
    let name = name_of(&options.target);
    let folder = workspace.root().join("target/fuzz");
    let program = build(workspace, &folder)?.join(format!("fuzz-{name}"));
    let kept = workspace.root().join("fuzz/corpus").join(&name);
    let found = folder.join("found").join(&name);
    std::fs::create_dir_all(&found).with_context(|| format!("cannot make {}", found.display()))?;

    let seeds = folder.join("seeds").join(&name);
    std::fs::create_dir_all(&seeds).with_context(|| format!("cannot make {}", seeds.display()))?;

    // A small stack, as in the tests, exposes recursion per level of the input.
    let mut command = Command::new("sh");
    command.args(["-c", "ulimit -s 256; exec \"$0\" \"$@\""]).arg(program).current_dir(&folder);
    command.env("FENCE_FUZZ_SEEDS", &seeds);
    if options.merge {
        let merged = folder.join("merged").join(&name);
        if merged.exists() {
            std::fs::remove_dir_all(&merged).with_context(|| format!("cannot remove {}", merged.display()))?;
        }
        std::fs::create_dir_all(&merged).with_context(|| format!("cannot make {}", merged.display()))?;
        command.args(["-set_cover_merge=1", "-use_counters=0"]).arg(&merged).arg(&found).arg(&kept).arg(&seeds);
        say(format!("the smallest set of inputs for {name}: {}", merged.display()));
    } else {
        command.arg(format!("-max_total_time={}", u64::from(options.minutes) * 60));
        command.args(["-timeout=5", "-max_len=6000", "-print_final_stats=1"]);
        command.arg(format!("-artifact_prefix={}/{name}-", folder.display()));
        if options.target == Target::Config {
            command.arg(format!("-dict={}", workspace.root().join("fuzz/config.dict").display()));
        }
        command.arg(&found).arg(&kept).arg(&seeds);
        say(format!("fuzzing {name} for {} min", options.minutes));
    }
    let status = command.status().context("cannot start the fuzzer")?;
    if !status.success() {
        bail!("{name} has found a fault: the input is shown above and stored in {} (fuzz/README.md)", folder.display());
    }
    Ok(ExitCode::SUCCESS)
}

/// Runs the kernel program and user space on the same frames.
fn program(workspace: &Workspace, options: &FuzzOptions) -> anyhow::Result<ExitCode> {
    setup::ensure(workspace, Profile::Lab)?;
    let object = bpf::build(workspace.root())?;
    let mut cargo = workspace.cargo(&object);
    cargo.args(["test", "--release", "--config", "profile.release.lto=false", "--package", "fence-tests"]);
    cargo.args(["--test", "prog_run", "--", "--exact", "--nocapture", COMPARISON]);
    cargo.env("FENCE_CASES", options.cases.to_string());
    cargo.envs(options.seed.map(|seed| ("FENCE_SEED", seed.to_string())));
    if Privilege::of_this_process() == Privilege::Sudo {
        let (name, runner) = suites::sudo_runner()?;
        cargo.env(name, runner);
    }
    say(format!("running {}", progress::line(&cargo)));
    let status = cargo.status().context("cannot start the comparison")?;
    if !status.success() {
        bail!("kernel program and user space differ, see above: add the case to fuzz/corpus/program (fuzz/README.md)");
    }
    Ok(ExitCode::SUCCESS)
}

/// Builds all targets and returns their directory.
fn build(workspace: &Workspace, folder: &Path) -> anyhow::Result<PathBuf> {
    let object = bpf::build(workspace.root())?;
    let host = workspace::host()?;
    let mut cargo = workspace.cargo(&object);
    cargo.args(["build", "--release", "--package", "fence-fuzz", "--features", "libfuzzer", "--bins"]);
    // Optimising across crates takes minutes and finds nothing more.
    cargo.args(["--config", "profile.release.lto=false"]);
    // With an explicit target, build scripts and procedural macros are compiled without the flags.
    cargo.args(["--target", &host]).arg("--target-dir").arg(folder).env("RUSTFLAGS", FLAGS);
    cargo.env_remove("CARGO_ENCODED_RUSTFLAGS");
    progress::shown("building the fuzz targets", cargo)?;
    Ok(folder.join(host).join("release"))
}
