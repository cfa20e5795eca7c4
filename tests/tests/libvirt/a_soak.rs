//! A short soak in each test run: `cargo xtask soak` is the long one. And a daemon that lies, which
//! the soak must find out.
//!
//! Tests begin in the order of their names. This module's name lets the longest one begin first.

use std::os::unix::fs::PermissionsExt as _;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use fence_bench::soak::{Pace, SoakPlan, run};
use fence_lab::server::Which;
use fence_lab::testdriver::{State, TestDomain, node, uuid};

/// With the exam at the end it is some two minutes.
const SHORT: Duration = Duration::from_secs(100);

/// The seed of `FENCE_SEED`, or any.
fn seed() -> Result<u64> {
    match std::env::var("FENCE_SEED") {
        Ok(seed) => seed.parse().with_context(|| format!("FENCE_SEED is no number: {seed}")),
        Err(_) => Ok(SoakPlan::any_seed()),
    }
}

#[test]
fn two_minutes_of_load_and_faults_break_no_rule() -> Result<()> {
    let plan = SoakPlan { daemon: Which::ours()?, length: SHORT, seed: seed()?, pace: Pace::GENTLE };
    let outcome = run(&plan)?.kept()?;
    eprintln!("{}", fence_bench::soak::report::table(&outcome));
    Ok(())
}

/// This daemon fences namesakes in libvirt's test driver. It answers with success, and the machines
/// live.
#[test]
fn a_daemon_that_lies_is_found_out() -> Result<()> {
    let Which::Ours(daemon) = Which::ours()? else { bail!("asked for ours") };
    let folder = tempfile::tempdir()?;
    let running = ["one", "two", "shared", "disk", "nomad", "protected", "bystander"];
    let running = running.into_iter().map(|name| (name, State::Running));
    let domains = running.chain([("sleeper", State::ShutOff)]).zip(100..);
    let domains: Vec<_> = domains.map(|((name, state), number)| TestDomain::new(name, &uuid(number), state)).collect();
    let file = folder.path().join("namesakes.xml");
    std::fs::write(&file, node(&domains))?;
    let script = format!(
        "#!/bin/sh\nif [ \"$1\" != -F ]; then exec '{daemon}' \"$@\"; fi\n\
         sed 's#\"qemu:///system\"#\"test://{}\"#' \"$3\" > \"$3.lie\"\nexec '{daemon}' -F -f \"$3.lie\"\n",
        file.display(),
        daemon = daemon.display(),
    );
    let liar = folder.path().join("liar");
    std::fs::write(&liar, script)?;
    std::fs::set_permissions(&liar, std::fs::Permissions::from_mode(0o755))?;

    let plan = SoakPlan { daemon: Which::Ours(liar), length: SHORT, seed: seed()?, pace: Pace::GENTLE };
    let outcome = run(&plan)?;
    ensure!(outcome.false_successes() > 0, "{}", fence_bench::soak::report::table(&outcome));
    let error = outcome.kept().err().context("the rules were kept")?.to_string();
    ensure!(error.contains(&format!("seed {}", plan.seed)) && error.contains("FALSE SUCCESS"), "{error}");
    Ok(())
}
