//! Boots each kernel and runs the steps in it.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use fence_lab::debian::{Kernel, Series};

use crate::guest::{self, Done, Extra, Step};
use crate::table::{self, Row};

/// Names the other test programs: `NAME=PATH`, separated by `:`.
const PROGRAMS: &str = "FENCE_TEST_PROGRAMS";

fn programs() -> Result<Vec<(&'static str, PathBuf)>> {
    let listed =
        std::env::var(PROGRAMS).with_context(|| format!("{PROGRAMS} is not set: run `cargo xtask test kernels`"))?;
    let mut programs = vec![("kernels", std::env::current_exe()?)];
    for name in ["prog_run", "kernel_program", "netns"] {
        let path = listed.split(':').filter_map(|one| one.split_once('=')).find(|(listed, _)| *listed == name);
        programs.push((name, path.with_context(|| format!("{PROGRAMS} does not name {name}"))?.1.into()));
    }
    programs.extend(guest::executables()?);
    Ok(programs)
}

/// A step that runs a test program with these filters, one test after the other: emulated
/// processors are slow.
fn tests(name: &'static str, program: &str, filters: &str) -> Step {
    Step { name, command: format!("{program} --test-threads 1 --nocapture {filters}") }
}

fn boot(series: Series) -> Result<()> {
    let kernel = Kernel::get(series)?;
    let attach = match series {
        // A kernel without tcx skips the tests that need it.
        Series::Linux6_1 => {
            "attach::auto attach::a_mode attach::an_occupied_interface_says attach::large attach::counters"
        }
        Series::Linux6_12 => "attach::",
    };
    let steps = [
        tests("verifier", "kernels", "verifier::"),
        tests("verdicts", "prog_run", "digests:: shapes::good_requests refusals::each_fault"),
        tests("attach", "kernel_program", attach),
        tests("fence", "netns", "operations::the_log_tells rotation::a_request_goes_on"),
    ];
    let scratch = tempfile::tempdir()?;
    let done = run(&kernel, scratch.path(), &steps)?;

    let mut rows = Vec::new();
    for (step, done) in steps.iter().zip(&done) {
        let said = done.output.join("\n");
        eprintln!("{} on {}: {:.1} s", step.name, kernel.release(), done.took.as_secs_f64());
        ensure!(done.code == 0, "{} fails on Linux {}: {said}", step.name, kernel.release());
        // A filter without a match is a success to the test program, and a failure here.
        let passed = done.output.iter().filter_map(|line| passed(line)).sum::<u32>();
        ensure!(passed > 0, "{}: no test ran: {said}", step.name);
        ensure!(!said.contains("this kernel has no VLANs"), "a test of VLANs did not run: {said}");
        rows.extend(done.output.iter().filter_map(|line| Row::parse(&kernel.release(), line)));
    }
    ensure!(!rows.is_empty(), "the verifier's statistics are missing");
    for row in &rows {
        eprintln!("{row}");
    }
    table::write(series, &rows)
}

fn run(kernel: &Kernel, scratch: &Path, steps: &[Step]) -> Result<Vec<Done>> {
    let initrd = scratch.join("initrd");
    std::fs::write(&initrd, guest::initrd(kernel, &programs()?, &Extra::default(), steps, scratch)?)?;
    guest::run(kernel, &initrd, steps)
}

/// The number of passed tests, if this is a test program's last line.
fn passed(line: &str) -> Option<u32> {
    line.trim().strip_prefix("test result: ok. ")?.split_once(" passed;")?.0.parse().ok()
}

#[test]
fn linux_6_1_of_debian_12() -> Result<()> {
    boot(Series::Linux6_1)
}

#[test]
fn linux_6_12_of_debian_13() -> Result<()> {
    boot(Series::Linux6_12)
}

#[test]
fn only_tests_that_ran_count() {
    assert_eq!(passed("test result: ok. 3 passed; 0 failed; 0 ignored"), Some(3));
    assert_eq!(passed("test result: FAILED. 3 passed; 1 failed; 0 ignored"), None);
}
