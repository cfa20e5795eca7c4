//! `cargo xtask test`: the sets of tests, their requirements, and one table of results.

use std::env;
use std::fmt::Write as _;
use std::io::{self, IsTerminal as _, Write as _};
use std::num::NonZero;
use std::path::Path;
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use clap::ValueEnum;

use crate::bpf;
use crate::dist;
use crate::fetch;
use crate::name_of;
use crate::privilege::Privilege;
use crate::programs;
use crate::progress::{self, Errors, Running, say};
use crate::setup::{self, Profile};
use crate::workspace::{self, Workspace};

/// The daemon with fault points, and the feature that enables them.
const FAULTS: &str = "fence-daemon-faults";
/// The daemon's group of hosts alone. Tests find it beside the daemon.
const GROUP: &str = "fence-daemon-group";

/// The variable that sets the number of concurrent tests.
const THREADS: &str = "RUST_TEST_THREADS";

/// A set of tests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Suite {
    /// Tests that need only a compiler: fence-common, the daemon's library, xtask
    Unit,
    /// The BPF program alone, through BPF_PROG_TEST_RUN, and on its own interfaces
    ProgRun,
    /// The daemon and the stock client in network namespaces
    Netns,
    /// The same requests to fence_virtd and to the daemon
    Conformance,
    /// Real guests under a real libvirtd: QEMU and LXC
    Libvirt,
    /// Debian's kernels in QEMU, with the daemon and the tests of the kernel program
    Kernels,
    /// Real Pacemaker clusters, in containers and in QEMU guests, and the commands of the guides
    Cluster,
    /// The packages: installed, upgraded, removed, in Debian's releases under systemd
    Packages,
    /// netns, conformance and libvirt again, with Debian 13's libvirt, QEMU and fence-virt
    Trixie,
}

/// The sets that run in Debian 13, and the tests of each that tell most. A run of all sets takes
/// these alone: together they need about a minute. `cargo xtask test trixie` runs the whole sets.
const IN_TRIXIE: [(Suite, &[&str]); 3] = [
    (Suite::Netns, &["operations::", "startup::"]),
    (Suite::Conformance, &["matrix"]),
    (
        Suite::Libvirt,
        &[
            "a_qemu_guest_fences_another",
            "a_container_is_fenced",
            "helpers::helpers_that_stand_still_are_dead_with_their_machine",
            "reboot::a_rebooted_domain_dies_first_and_comes_back",
            "slow_starts::an_off_cuts_a_restart_short",
            "snapshots::",
        ],
    ),
];
/// Runs a program in a root directory with a release of Debian.
const INSIDE: &str = "fence-debian";
/// The release.
const RELEASE: &str = "trixie";

impl Suite {
    /// The arguments of `cargo test`.
    ///
    /// None names a package: cargo unites the features of the selected packages, and a different
    /// selection makes it compile most dependencies again.
    fn selection(self) -> &'static [&'static str] {
        match self {
            Self::Unit => &[
                "--lib",
                "--bins",
                "--test",
                "bad_config",
                "--test",
                "command_line",
                "--test",
                "commands",
                "--test",
                "corpus",
                "--test",
                "golden",
                "--test",
                "hosts",
                "--test",
                "model",
                "--test",
                "pages",
                "--test",
                "process",
                "--test",
                "rate_limit",
                "--test",
                "state_directory",
                "--test",
                "unit_file",
            ],
            Self::ProgRun => &["--test", "prog_run", "--test", "kernel_program"],
            Self::Netns => &["--test", "netns"],
            Self::Conformance => &["--test", "conformance"],
            Self::Libvirt => &["--test", "libvirt"],
            Self::Kernels => &["--test", "kernels"],
            Self::Cluster => &["--test", "cluster"],
            Self::Packages => &["--test", "packages"],
            Self::Trixie => &[],
        }
    }

    fn needs_root(self) -> bool {
        self != Self::Unit
    }

    /// The number of concurrent tests per number of processors, if it differs: some sets mostly
    /// wait.
    fn threads(self, processors: usize) -> Option<usize> {
        match self {
            Self::Netns => Some(3 * processors),
            Self::Libvirt | Self::Cluster => Some(2 * processors),
            Self::Unit | Self::ProgRun | Self::Conformance | Self::Kernels | Self::Packages | Self::Trixie => None,
        }
    }

    /// Whether the set needs the files that [`fetch`] downloads.
    fn needs_fetched(self) -> bool {
        self >= Self::Libvirt
    }

    /// The machine's profile for this set.
    fn profile(self) -> Profile {
        match self {
            Self::Unit => Profile::Build,
            Self::ProgRun => Profile::Lab,
            Self::Netns
            | Self::Conformance
            | Self::Libvirt
            | Self::Kernels
            | Self::Cluster
            | Self::Packages
            | Self::Trixie => Profile::Test,
        }
    }
}

/// The summed results of a set's test programs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Tally {
    passed: u64,
    failed: u64,
    ignored: u64,
}

impl Tally {
    /// These and the others.
    fn and(self, other: Self) -> Self {
        Self {
            passed: self.passed + other.passed,
            failed: self.failed + other.failed,
            ignored: self.ignored + other.ignored,
        }
    }

    /// Adds a line if it is the last one of a test program:
    /// `test result: ok. 12 passed; 0 failed; 1 ignored; ...`.
    fn read(&mut self, line: &str) {
        let Some((_, counts)) = line.trim().strip_prefix("test result: ").and_then(|rest| rest.split_once(". ")) else {
            return;
        };
        for count in counts.split("; ") {
            let Some((number, what)) = count.split_once(' ') else { continue };
            let Ok(number) = number.parse::<u64>() else { continue };
            match what {
                "passed" => self.passed += number,
                "failed" => self.failed += number,
                "ignored" => self.ignored += number,
                _ => {}
            }
        }
    }
}

/// The result of a set.
#[derive(Debug)]
struct Outcome {
    suite: Suite,
    tally: Tally,
    passed: bool,
    took: Duration,
}

/// Runs the sets in `wanted` (all if it is empty) in order, also after a failure. Fails if any set
/// failed.
///
/// # Errors
/// Setup or the build of the tests' requirements fails.
pub(crate) fn run(workspace: &Workspace, wanted: &[Suite], filter: &[String]) -> anyhow::Result<ExitCode> {
    let mut suites = if wanted.is_empty() { Suite::value_variants().to_vec() } else { wanted.to_vec() };
    suites.sort_unstable();
    suites.dedup();
    let privilege = Privilege::of_this_process();
    let for_root: Vec<_> = suites.iter().filter(|suite| suite.needs_root()).map(name_of).collect();
    if privilege == Privilege::None && !for_root.is_empty() {
        bail!(
            "{} needs root, and sudo does not work here: run this as root, or run `cargo xtask test unit`",
            for_root.join(", ")
        );
    }

    let widest = suites.iter().map(|suite| suite.profile()).max().unwrap_or(Profile::Build);
    setup::ensure(workspace, widest)?;
    let object = bpf::build(workspace.root())?;
    let mut cargo = workspace.cargo(&object);
    cargo.args(["build", "--bin", "fence-daemon", "--bin", "fence-daemon-commands"]);
    if suites.contains(&Suite::Cluster) {
        cargo.args(["--bin", "fence-cluster"]);
    }
    if suites.contains(&Suite::Trixie) {
        cargo.args(["--bin", INSIDE]);
    }
    progress::shown("building the daemon", cargo)?;
    if suites.iter().any(|suite| matches!(suite, Suite::Libvirt | Suite::Cluster | Suite::Trixie)) {
        let mut cargo = workspace.cargo(&object);
        cargo.args(["build", "--features", "fence-daemon/fault-points", "--bin", FAULTS, "--bin", GROUP]);
        progress::shown("building the daemon with fault points", cargo)?;
    }

    // One set alone downloads what it needs itself.
    let fetched = suites.len() > 1 && suites.iter().any(|suite| suite.needs_fetched());
    let mut download = fetched.then(|| fetch::start(workspace));
    let runner = Runner { workspace, object: &object, privilege };
    let mut outcomes = Vec::new();
    for suite in suites {
        if suite.needs_fetched()
            && let Some(download) = download.take()
            && let Err(error) = download.and_then(Running::finish)
        {
            say(format!("{error:#}: the tests that need these files will fail"));
        }
        let started = Instant::now();
        say(format!("testing: {}", name_of(&suite)));
        let (tally, passed) = if suite == Suite::Trixie {
            runner.run_inside(wanted.is_empty(), filter)?
        } else {
            runner.run_one(suite, None, filter)?
        };
        outcomes.push(Outcome { suite, tally, passed, took: started.elapsed() });
    }
    let failed = outcomes.iter().any(|outcome| !outcome.passed);
    io::stdout().write_all(table(&outcomes).as_bytes()).context("cannot print the results")?;
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Runs test programs.
struct Runner<'a> {
    workspace: &'a Workspace,
    object: &'a Path,
    privilege: Privilege,
}

impl Runner<'_> {
    /// Runs the sets of [`IN_TRIXIE`] there, or only the tests of it that tell most.
    fn run_inside(&self, only_sample: bool, filter: &[String]) -> anyhow::Result<(Tally, bool)> {
        let (mut sum, mut passed) = (Tally::default(), true);
        for (suite, sample) in IN_TRIXIE {
            say(format!("{RELEASE}: {}{}", name_of(&suite), if only_sample { ", a sample" } else { "" }));
            let sample: Vec<_> = sample.iter().map(|&test| test.to_owned()).collect();
            let is_sample = only_sample && filter.is_empty();
            let (tally, success) = self.run_one(suite, Some(RELEASE), if is_sample { &sample } else { filter })?;
            sum = sum.and(tally);
            // A sample whose names match nothing any more proves nothing.
            passed &= success && (!is_sample || tally.passed > 0);
        }
        Ok((sum, passed))
    }

    /// Runs a set, on this system or in a release of Debian. Returns the results, and whether that
    /// is a success.
    fn run_one(&self, suite: Suite, release: Option<&str>, filter: &[String]) -> anyhow::Result<(Tally, bool)> {
        let Self { workspace, object, privilege } = *self;
        let mut tally = Tally::default();
        let mut cargo = workspace.cargo(object);
        cargo.args(["test", "--no-fail-fast"]).args(suite.selection());
        if !filter.is_empty() {
            cargo.arg("--").args(filter);
        }
        cargo.env("FENCE_DAEMON_BIN", workspace.binary("fence-daemon", false));
        cargo.env("FENCE_DAEMON_FAULTS_BIN", workspace.binary(FAULTS, false));
        let processors = thread::available_parallelism().map_or(1, NonZero::get);
        if let (Some(threads), None) = (suite.threads(processors), env::var_os(THREADS)) {
            cargo.env(THREADS, threads.to_string());
        }
        if suite == Suite::Packages {
            cargo.env(dist::VARIABLE, dist::for_tests(workspace)?);
        }
        if suite == Suite::Kernels {
            cargo.env(programs::VARIABLE, programs::of_guests(workspace, object)?);
        }
        let mut words = Vec::new();
        if suite.needs_root() && privilege == Privilege::Sudo {
            // cargo runs as the user, who owns the target directory; only the test programs get
            // root.
            words.push(SUDO.to_owned());
        }
        if let Some(release) = release {
            words.push(format!("{} {release}", workspace.binary(INSIDE, false).display()));
        }
        if !words.is_empty() {
            cargo.env(runner_variable()?, words.join(" "));
        }
        // A log keeps both outputs in order; on a terminal cargo draws its progress.
        let errors = if io::stderr().is_terminal() { Errors::Inherited } else { Errors::Merged };
        let status = progress::follow(cargo, errors, |line| {
            tally.read(&String::from_utf8_lossy(line));
            let mut stdout = io::stdout().lock();
            // The reader of our output is gone: the tests go on, and their exit status still
            // counts.
            let _ = stdout.write_all(line).and_then(|()| stdout.write_all(b"\n")).and_then(|()| stdout.flush());
        })?;
        let success = status.success();
        // A set without a test that ran proves nothing. But a filter may match nothing in one of
        // several sets.
        let ran = tally.passed + tally.failed > 0 || !filter.is_empty();
        if !ran && success {
            say(format!("{}: no test ran", name_of(&suite)));
        }
        Ok((tally, success && ran))
    }
}

/// Runs a test program as root, with the variables that it needs.
const SUDO: &str = "sudo --preserve-env=FENCE_DAEMON_BIN,FENCE_DAEMON_FAULTS_BIN,FENCE_EBPF_OBJECT,FENCE_TEST_PROGRAMS,FENCE_PACKAGES,FENCE_WRITE_DOCS,FENCE_CASES,FENCE_SEED,FENCE_RESTARTS,FENCE_BETWEEN,CARGO_MANIFEST_DIR,\
                    RUST_BACKTRACE,RUST_TEST_THREADS,CI --";

/// The variable whose words cargo puts before a test program.
fn runner_variable() -> anyhow::Result<String> {
    let host = workspace::host()?;
    Ok(format!("CARGO_TARGET_{}_RUNNER", host.to_uppercase().replace(['-', '.'], "_")))
}

/// Makes cargo run test programs through sudo, with the variables that they need.
pub(crate) fn sudo_runner() -> anyhow::Result<(String, String)> {
    Ok((runner_variable()?, SUDO.to_owned()))
}

/// The results, one line per set.
fn table(outcomes: &[Outcome]) -> String {
    let mut text =
        format!("\n{:<11} {:<7} {:>7} {:>7} {:>8} {:>9}\n", "set", "result", "passed", "failed", "ignored", "seconds");
    for Outcome { suite, tally, passed, took } in outcomes {
        let result = if *passed { "ok" } else { "FAILED" };
        let _ = writeln!(
            text,
            "{:<11} {result:<7} {:>7} {:>7} {:>8} {:>9.1}",
            name_of(suite),
            tally.passed,
            tally.failed,
            tally.ignored,
            took.as_secs_f64()
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_of_several_programs_add_up() {
        let mut tally = Tally::default();
        for line in [
            "test result: ok. 12 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.01s",
            "test result: FAILED. 3 passed; 2 failed; 0 ignored; 0 measured; 7 filtered out; finished in 1.00s",
            "test tests::result ... ok",
            "    test result: what a test printed",
        ] {
            tally.read(line);
        }
        assert_eq!(tally, Tally { passed: 15, failed: 2, ignored: 1 });
    }

    /// A test program that no set names would never run, and nothing would show it.
    #[test]
    fn every_test_program_is_in_a_set() {
        let selected: Vec<_> = Suite::value_variants().iter().flat_map(|suite| suite.selection()).collect();
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let manifest = std::fs::read_to_string(root.join("Cargo.toml")).unwrap();
        let (_, members) = manifest.split_once("default-members = [").unwrap();
        let (members, _) = members.split_once(']').unwrap();
        let mut programs = 0;
        for folder in members.split('"').skip(1).step_by(2) {
            let tests = root.join(folder).join("tests");
            for entry in tests.read_dir().into_iter().flatten().map(Result::unwrap) {
                let path = entry.path();
                // A directory without a main.rs has the modules of a program beside it.
                if path.extension().is_some_and(|extension| extension == "rs") || path.join("main.rs").exists() {
                    let name = path.file_stem().unwrap().to_str().unwrap();
                    assert!(selected.contains(&&name), "{} is in no set", path.display());
                    programs += 1;
                }
            }
        }
        assert!(programs > 10, "only {programs} test programs found");
    }

    /// Only tests may use a daemon with fault points.
    #[test]
    fn only_tests_build_a_daemon_with_fault_points() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let read = |file: &str| std::fs::read_to_string(root.join(file)).unwrap();
        let manifest = read("fence-daemon/Cargo.toml");
        assert!(manifest.contains("required-features = [\"fault-points\"]"));
        assert!(!manifest.contains("default = "), "a default feature could enable fault points");
        for folder in ["fence-common", "fence-daemon/client", "fuzz", "tests", "tests/bench", "tests/lab", "xtask", "."]
        {
            assert!(!read(&format!("{folder}/Cargo.toml")).contains("fault-points"), "{folder} enables fault points");
        }
        assert!(read("fence-daemon/src/fault.rs").contains("not(debug_assertions)))]\ncompile_error!"));
    }

    #[test]
    fn the_table_names_what_failed() {
        let outcome =
            |suite, passed| Outcome { suite, tally: Tally::default(), passed, took: Duration::from_millis(1240) };
        let text = table(&[outcome(Suite::Unit, true), outcome(Suite::ProgRun, false)]);
        let lines: Vec<_> = text.lines().skip(2).map(|line| line.split_whitespace().collect::<Vec<_>>()).collect();
        assert_eq!(lines[0], ["unit", "ok", "0", "0", "0", "1.2"]);
        assert_eq!(lines[1], ["prog-run", "FAILED", "0", "0", "0", "1.2"]);
    }
}
