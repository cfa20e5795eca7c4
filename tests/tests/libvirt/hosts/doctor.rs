//! The doctor on hosts that answer together: each thing that they need is broken for real.

use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use fence_lab::process::{poll_until, run};
use fence_lab::server::Which;
use nix::sys::signal::Signal;
use serde_json::Value;

use super::super::site::SOON;
use super::Hosts;

/// Another key.
const OTHER_KEY: [u8; 512] = [0x3d; 512];

/// The doctor's report on a host.
fn asked(hosts: &Hosts, host: usize) -> Result<Value> {
    let Which::Ours(program) = Which::ours()? else { bail!("the stock server has no doctor") };
    let hypervisor = &hosts.sites[host].hypervisor;
    let mut command = Command::new(program);
    command.args(["-f", &hypervisor.path("fence_virt.conf"), "doctor", "--json"]);
    let said = run(hypervisor.space(), &mut command, 4 * SOON)?;
    serde_json::from_str(&said.stdout).with_context(|| format!("{said:?}"))
}

/// The findings of a check: state and text.
fn said(report: &Value, check: &str) -> Vec<(String, String)> {
    let findings = report["findings"].as_array().into_iter().flatten().filter(|finding| finding["check"] == check);
    findings.map(|finding| (finding["state"].as_str().unwrap_or_default().to_owned(), finding.to_string())).collect()
}

/// Asks until a check has a finding in this state with these words.
fn says(hosts: &Hosts, host: usize, check: &str, state: &str, words: &str) -> Result<()> {
    let mut last = Value::Null;
    // One look of the doctor takes 5 s where corosync hangs.
    let told = poll_until(&format!("{check} to be {state} with `{words}`"), 4 * SOON, || {
        last = asked(hosts, host)?;
        let fits = |(found, text): &(String, String)| found == state && text.contains(words);
        Ok(said(&last, check).iter().any(fits).then_some(()))
    });
    told.with_context(|| format!("{last:#}: {}", hosts.logs()))
}

/// The checks of the group, and `clock`, are quiet. Pacemaker is not installed here.
fn is_quiet(hosts: &Hosts, host: usize) -> Result<()> {
    for check in ["corosync", "quorum", "node list", "hosts"] {
        says(hosts, host, check, "ok", "")?;
    }
    let report = asked(hosts, host)?;
    let clocks = said(&report, "clock");
    ensure!(!clocks.iter().any(|(_, text)| text.contains("the clock of")), "one clock, and it differs: {report:#}");
    Ok(())
}

#[test]
fn the_doctor_says_what_the_hosts_lack_and_what_to_type() -> Result<()> {
    let mut hosts = Hosts::new(2)?;
    is_quiet(&hosts, 0)?;
    let report = asked(&hosts, 0)?;
    let fencing = said(&report, "host fencing");
    ensure!(
        fencing.iter().any(|(state, text)| state == "warning" && text.contains("never count as off")),
        "{report:#}"
    );

    // The other daemon is gone, with its corosync there.
    hosts.sites[1].server.crash()?;
    says(&hosts, 0, "hosts", "wrong", "ssh host2 systemctl start fence-daemon")?;
    says(&hosts, 0, "node list", "ok", "host2 (node 2)")?;
    // It comes back with another key, which it tells nobody.
    let key = hosts.sites[1].hypervisor.write("other.key", &OTHER_KEY)?;
    let right = std::mem::replace(&mut hosts.sites[1].config.key_file, key);
    hosts.next_daemon(1, &Which::ours()?)?;
    says(&hosts, 0, "hosts", "wrong", "the key of host2 differs from ours, whose fingerprint is ")?;
    says(&hosts, 1, "hosts", "wrong", "the key of host1 differs from ours, whose fingerprint is ")?;
    hosts.sites[1].server.crash()?;
    hosts.sites[1].config.key_file = right;
    hosts.next_daemon(1, &Which::ours()?)?;
    is_quiet(&hosts, 0)?;

    hosts.ring.partition(&[1])?;
    says(&hosts, 0, "node list", "wrong", "corosync does not see host2 (node 2)")?;
    hosts.ring.heal()?;
    says(&hosts, 0, "node list", "ok", "host2")?;

    // corosync hangs, is gone, and is there again.
    hosts.ring.signal(0, Signal::SIGSTOP)?;
    says(&hosts, 0, "corosync", "wrong", "it does not answer within 5 s")?;
    hosts.ring.signal(0, Signal::SIGCONT)?;
    hosts.ring.kill(0)?;
    says(&hosts, 0, "corosync", "wrong", "systemctl enable --now corosync")?;
    says(&hosts, 0, "hosts", "unknown", "")?;
    hosts.ring.start(0)?;
    is_quiet(&hosts, 0)?;

    // Nobody counts votes.
    hosts.ring.kill(0)?;
    let conf = hosts.ring.conf();
    hosts.ring.configure(&conf.replace("provider: corosync_votequorum", ""))?;
    hosts.ring.start(0)?;
    says(&hosts, 0, "quorum", "wrong", "corosync_votequorum")
}
