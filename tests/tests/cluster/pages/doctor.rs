//! Runs the commands of `docs/reference/doctor.md`.

use anyhow::{Context, Result, ensure};
use fence_lab::cluster::corosync::KEY_PATH;
use fence_lab::server::Config;
use fence_lab::tools;
use serde_json::Value;

use super::{commands, page};
use crate::host::{Host, LIMIT};

#[test]
fn the_commands_of_the_documentation_work() -> Result<()> {
    let host = Host::serving(&Config::new(KEY_PATH))?;
    host.wait_log("the kernel program is attached", 1)?;
    let guest = host.hypervisor().guest(1)?;
    let page = page("reference/doctor.md")?;
    let [doctor, from_guest, fingerprint, json, jq] = commands(&page)[..] else { anyhow::bail!("other commands") };
    ensure!(from_guest.ends_with(" --from-guest") && fingerprint.ends_with("| cut -c -16"));

    // The page has a line or a row for each check, and each line that is printed.
    let knows = |check: &str| page.contains(&format!("`{check}`")) || page.contains(&format!("ok      {check} "));
    let schema = tools::workspace().join("docs/reference/doctor.schema.json");
    let schema: Value = serde_json::from_str(&std::fs::read_to_string(schema)?)?;
    let checks = schema["$defs"]["finding"]["properties"]["check"]["enum"].as_array().context("no checks")?;
    for check in checks.iter().filter_map(Value::as_str).filter(|check| *check != "privileges") {
        ensure!(knows(check), "{check} is missing from the page");
    }
    let here = host.must(doctor)?;
    let in_guest = format!("nsenter --net=/run/netns/{} {from_guest}", guest.name);
    let there = host.must(&in_guest)?;
    for (printed, end) in [(&here, "nothing is wrong on this hypervisor"), (&there, "nothing is wrong in this guest")] {
        ensure!(printed.lines().last().is_some_and(|line| line.starts_with(end)), "{printed}");
    }
    ensure!(here.contains("\nok      boot "), "{here}");

    // One key, one fingerprint, also by shell.
    let digits = host.must(fingerprint)?.trim().to_owned();
    for printed in [&here, &there] {
        let told = printed.lines().find_map(|line| Some(line.split_once("fingerprint ")?.1.replace(' ', "")));
        ensure!(told.as_deref() == Some(&digits), "{digits} is not in {printed}");
    }

    // Scripts get what is wrong and what to type.
    ensure!(host.must(jq)?.is_empty(), "nothing is wrong");
    host.must("systemctl stop fence-daemon")?;
    let done = host.booted.shell(&[], json, LIMIT)?;
    let report: Value = serde_json::from_str(&done.stdout).with_context(|| format!("{done:?}"))?;
    ensure!(done.code == Some(1) && report["verdict"] == "wrong", "{report:#}");
    let told = host.must(jq)?;
    ensure!(told.contains("no daemon answers") && told.contains("systemctl"), "{told}");
    Ok(())
}
