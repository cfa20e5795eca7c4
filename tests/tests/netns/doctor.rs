//! `fence-daemon doctor` is quiet on a healthy host. Each test breaks one thing for real, reads the
//! finding and runs the commands that it proposes.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use fence_lab::lab::Space;
use fence_lab::process::run;
use fence_lab::server::Which;
use fence_lab::tools;
use serde_json::Value;

use crate::bench::Bench;

mod firewall;
mod guest;
mod host;
mod network;

/// Longer than anything here takes on a loaded machine.
const LIMIT: Duration = Duration::from_secs(120);

/// The doctor's exit status where something is wrong.
const WRONG: i32 = 1;

fn program() -> Result<String> {
    match Which::ours()? {
        Which::Ours(program) => Ok(program.to_string_lossy().into_owned()),
        Which::Stock => bail!("the stock server has no doctor"),
    }
}

/// The doctor's report.
struct Told {
    code: Option<i32>,
    report: Value,
}

impl Told {
    fn findings(&self) -> impl Iterator<Item = &Value> {
        self.report["findings"].as_array().into_iter().flatten()
    }

    /// The finding of a check in this state; the first of several.
    fn find(&self, check: &str, state: &str) -> Result<&Value> {
        let found = self.findings().find(|finding| finding["check"] == check && finding["state"] == state);
        found.with_context(|| format!("no {check} that is {state} in {:#}", self.report))
    }

    /// The names of the checks in this state, in order.
    fn checks(&self, state: &str) -> Vec<&str> {
        self.findings()
            .filter(|finding| finding["state"] == state)
            .filter_map(|finding| finding["check"].as_str())
            .collect()
    }

    /// Checks that the report has only `ok`, the clock excepted: it is the host's.
    fn is_quiet(&self) -> Result<()> {
        for state in ["wrong", "warning", "unknown"] {
            let mut loud = self.checks(state);
            loud.retain(|check| *check != "clock");
            ensure!(loud.is_empty(), "{state}: {loud:?} in {:#}", self.report);
        }
        ensure!(self.code == Some(0), "exit code {:?}", self.code);
        Ok(())
    }
}

/// Runs the doctor in a network namespace and validates its report against
/// `docs/reference/doctor.schema.json`.
fn ask(space: &Space, arguments: &[&str]) -> Result<Told> {
    let mut command = Command::new(program()?);
    command.args(arguments).arg("--json");
    let said = run(space, &mut command, LIMIT)?;
    let report: Value = serde_json::from_str(&said.stdout).with_context(|| format!("{said:?}"))?;
    let path = tools::workspace().join("docs/reference/doctor.schema.json");
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let schema = jsonschema::validator_for(&serde_json::from_str(&text)?)?;
    let wrong: Vec<String> =
        schema.iter_errors(&report).map(|error| format!("{}: {error}", error.instance_path())).collect();
    ensure!(wrong.is_empty(), "not as documented: {wrong:?}: {report:#}");
    ensure!((said.code == Some(WRONG)) == (report["verdict"] == "wrong"), "exit code {:?}: {report:#}", said.code);
    Ok(Told { code: said.code, report })
}

/// Runs the doctor on the hypervisor.
fn on_hypervisor(bench: &Bench) -> Result<Told> {
    ask(bench.hypervisor.space(), &["-f", &bench.hypervisor.path("fence_virt.conf"), "doctor"])
}

/// Runs the commands that a finding proposes.
fn mend(space: &Space, finding: &Value) -> Result<()> {
    let commands = finding["commands"].as_array().context("no list")?;
    ensure!(!commands.is_empty() && finding["remedy"].is_string(), "no remedy: {finding:#}");
    for command in commands {
        let command = command.as_str().context("no text")?.replacen("fence-daemon", &program()?, 1);
        space.must("sh", &["-c", &command]).with_context(|| command.clone())?;
    }
    Ok(())
}

/// Checks that a finding's text has all `words`.
fn says(finding: &Value, words: &[&str]) -> Result<()> {
    let text = format!("{} {} {}", finding["seen"], finding["remedy"], finding["commands"]);
    for words in words {
        ensure!(text.contains(words), "no {words} in {finding:#}");
    }
    Ok(())
}

#[test]
fn a_healthy_host_has_no_findings() -> Result<()> {
    let bench = Bench::new()?;
    let server = bench.serve(&bench.config("auto"))?;
    bench.expect_via(&server, &bench.about_domain("status"), 0, "kernel")?;
    let told = on_hypervisor(&bench)?;
    told.is_quiet()?;
    for check in [
        "configuration",
        "key",
        "daemon",
        "state",
        "port",
        "interface",
        "membership",
        "snooping",
        "rp_filter",
        "program",
        "firewall",
        "libvirt",
        "domains",
        "requests",
        "kernel",
    ] {
        told.find(check, "ok")?;
    }
    // The page has a line for each check, and a summary at its end.
    let mut command = Command::new(program()?);
    command.args(["-f", &bench.hypervisor.path("fence_virt.conf"), "doctor"]);
    let page = run(bench.hypervisor.space(), &mut command, LIMIT)?;
    let last = page.stdout.lines().last().context("nothing")?;
    ensure!(last.starts_with("nothing is wrong on this hypervisor: "), "{}", page.stdout);
    ensure!(page.code == Some(0) && !page.stdout.contains('\x1b') && page.stderr.is_empty(), "{page:?}");
    Ok(())
}
