//! Firewalls that block fencing for real: the doctor's finding is true, and its commands open the
//! way.

use std::path::Path;

use anyhow::{Result, ensure};
use fence_lab::lab::Space;
use fence_lab::tools;

use super::{Told, ask, mend, on_hypervisor, says};
use crate::bench::Bench;

/// Loads nftables rules.
fn nft(space: &Space, rules: &str) -> Result<()> {
    tools::find("nft")?;
    for rule in rules.split('\n').map(str::trim).filter(|rule| !rule.is_empty()) {
        space.must("nft", &[rule])?;
    }
    Ok(())
}

const TABLE: &str = "add table inet f
    add chain inet f in { type filter hook input priority 0; policy accept; }
    add chain inet f out { type filter hook output priority 0; policy accept; }";

/// Whether a guest's request is answered within `within` seconds.
fn is_answered(bench: &Bench, within: u32) -> Result<bool> {
    let client = bench.client("status").domain(crate::bench::DOMAIN).timeout(within);
    Ok(client.run(bench.guest.space())?.code == Some(0))
}

/// Long enough to see that no answer comes.
const BRIEFLY: u32 = 2;
/// Long enough for an answer on a loaded machine.
const PATIENTLY: u32 = 30;

/// Hides a program of the system, in the lab only.
fn hide(bench: &Bench, program: &str) -> Result<()> {
    let file = tools::find(program)?;
    bench.hypervisor.space().must("mount", &["--bind", "/dev/null", &file.to_string_lossy()])?;
    Ok(())
}

/// Loads each set of rules in turn: the doctor names it, and its commands open the way. `blocked`
/// checks that the rules block fencing indeed.
fn each(
    bench: &Bench,
    space: &Space,
    ask: impl Fn() -> Result<Told>,
    blocked: impl Fn(&Told) -> Result<bool>,
    cases: &[(&str, &[&str])],
) -> Result<()> {
    for (rules, words) in cases {
        nft(space, "flush ruleset")?;
        nft(space, TABLE)?;
        nft(space, rules)?;
        let told = ask()?;
        ensure!(blocked(&told)?, "{rules} does not block anything");
        let finding = told.find("firewall", "wrong")?;
        says(finding, words)?;
        mend(space, finding)?;
        ensure!(is_answered(bench, PATIENTLY)?, "{finding:#} did not help against {rules}");
        ask()?.find("firewall", "ok")?;
    }
    Ok(())
}

#[test]
fn on_the_hypervisor_each_way_that_is_closed_is_reported_and_opened() -> Result<()> {
    let bench = Bench::new()?;
    // Without the kernel program, requests pass through the firewall.
    let _server = bench.serve(&bench.config("off"))?;
    let cases: [(&str, &[&str]); 4] = [
        ("add rule inet f in udp dport 1229 counter drop", &["requests (UDP 1229, in)", "chain in in table inet f"]),
        ("add rule inet f out ct state new tcp dport { 80, 1229 } reject", &["the callback", "chain out"]),
        (
            "add chain inet f in { policy drop; }
             add rule inet f in udp dport 1229 accept",
            &["the guests' packets of the callback", "the chain's policy"],
        ),
        (
            "add chain inet f guests
             add rule inet f guests ip saddr 192.168.0.0/16 drop
             add rule inet f in iifname virbr0 meta l4proto udp jump guests",
            &["requests", "chain in"],
        ),
    ];
    let blocked = |_: &Told| Ok(!is_answered(&bench, BRIEFLY)?);
    each(&bench, bench.hypervisor.space(), || on_hypervisor(&bench), blocked, &cases)
}

#[test]
fn in_a_guest_each_way_that_is_closed_is_reported_and_opened() -> Result<()> {
    let bench = Bench::new()?;
    let _server = bench.serve(&bench.config("auto"))?;
    let asked = || ask(bench.guest.space(), &["doctor", "--from-guest", "--key", &bench.key]);
    let cases: [(&str, &[&str]); 2] = [
        (
            "add chain inet f in { policy drop; }
             add rule inet f in ct state vmap { established : accept, related : accept, invalid : drop }",
            &["the callback (TCP 1229, in)", "the chain's policy"],
        ),
        ("add rule inet f out oifname eth0 udp dport 1000-2000 drop", &["requests (UDP 1229, out)"]),
    ];
    each(&bench, bench.guest.space(), asked, |told| Ok(told.find("exchange", "wrong").is_ok()), &cases)
}

#[test]
fn the_kernel_program_is_before_the_firewall() -> Result<()> {
    let bench = Bench::new()?;
    let _server = bench.serve(&bench.config("auto"))?;
    let space = bench.hypervisor.space();
    nft(space, TABLE)?;
    nft(space, "add rule inet f in udp dport 1229 drop")?;
    ensure!(is_answered(&bench, PATIENTLY)?, "the firewall blocks requests before the kernel program");
    let told = on_hypervisor(&bench)?;
    told.is_quiet()?;
    says(told.find("firewall", "ok")?, &["harmless while the kernel program is attached"])?;
    // The callback goes through it all the same.
    nft(space, "add rule inet f out tcp dport 1229 drop")?;
    says(on_hypervisor(&bench)?.find("firewall", "wrong")?, &["the callback"])
}

#[test]
fn an_unknown_match_makes_the_firewall_finding_unknown() -> Result<()> {
    let bench = Bench::new()?;
    let _server = bench.serve(&bench.config("off"))?;
    let space = bench.hypervisor.space();
    nft(space, TABLE)?;
    nft(space, "add rule inet f in meta mark 7 drop")?;
    let told = on_hypervisor(&bench)?;
    let finding = told.find("firewall", "unknown")?;
    says(finding, &["may be dropped", "it depends on rule"])?;
    ensure!(told.code == Some(0) && told.find("firewall", "wrong").is_err());
    mend(space, finding)?;
    // Rules of other families count too, and the doctor does not analyse them.
    nft(space, "flush ruleset")?;
    nft(
        space,
        "add table bridge b
         add chain bridge b in { type filter hook input priority 0; policy accept; }
         add rule bridge b in udp dport 1229 counter",
    )?;
    says(on_hypervisor(&bench)?.find("firewall", "unknown")?, &["bridge b"])
}

/// The rules of firewalld 1.3.3 (Debian 12) as `nft -j list ruleset` prints them: zone `public` by
/// default, and after `firewall-cmd --zone=public --change-interface=virbr0` and `--zone=public
/// --add-port=1229/udp`.
#[test]
fn the_rules_of_a_real_firewalld_are_followed() -> Result<()> {
    const CLOSED: &str = include_str!("firewalld/closed.json");
    const OPEN: &str = include_str!("firewalld/open.json");
    let bench = Bench::new()?;
    let _server = bench.serve(&bench.config("off"))?;
    let space = bench.hypervisor.space();
    let load = |rules: &str| -> Result<()> {
        let file = bench.hypervisor.write("rules.json", rules.as_bytes())?;
        nft(space, "flush ruleset")?;
        space.must("nft", &["-j", "-f", &file]).map(drop)
    };
    load(CLOSED)?;
    ensure!(!is_answered(&bench, BRIEFLY)?);
    let told = on_hypervisor(&bench)?;
    let finding = told.find("firewall", "wrong")?;
    says(finding, &["requests (UDP 1229, in)", "chain filter_INPUT in table inet firewalld"])?;
    let typed = [
        "firewall-cmd --zone=public --add-port=1229/udp",
        "firewall-cmd --permanent --zone=public --add-port=1229/udp",
    ];
    ensure!(finding["commands"] == serde_json::json!(typed), "{finding:#}");
    load(OPEN)?;
    ensure!(is_answered(&bench, PATIENTLY)?);
    on_hypervisor(&bench)?.is_quiet()
}

#[test]
fn rules_of_iptables_are_read_with_nft_and_without() -> Result<()> {
    let bench = Bench::new()?;
    let _server = bench.serve(&bench.config("off"))?;
    let space = bench.hypervisor.space();
    tools::find("iptables")?;
    let closed = ["-A", "INPUT", "-i", "virbr+", "-p", "udp", "-m", "multiport", "--dports", "53,1229", "-j", "REJECT"];
    for hidden in [None, Some("nft")] {
        if let Some(program) = hidden {
            hide(&bench, program)?;
        }
        space.must("iptables", &closed)?;
        let told = on_hypervisor(&bench)?;
        let finding = told.find("firewall", "wrong")?;
        says(finding, &["requests (UDP 1229, in)", "-j REJECT"])?;
        ensure!(
            finding["commands"][0].as_str().is_some_and(|line| line.starts_with("iptables -I INPUT")),
            "{finding:#}"
        );
        ensure!(!is_answered(&bench, BRIEFLY)?);
        mend(space, finding)?;
        ensure!(is_answered(&bench, PATIENTLY)?);
        on_hypervisor(&bench)?.find("firewall", "ok")?;
        space.must("iptables", &["-F"])?;
    }
    // Without nft and iptables-save the doctor cannot read any rules.
    for program in ["iptables-save", "iptables-legacy-save"] {
        if let Ok(file) = tools::find(program) {
            ensure!(Path::new(&file).exists());
            hide(&bench, program)?;
        }
    }
    says(on_hypervisor(&bench)?.find("firewall", "unknown")?, &["neither nft nor iptables-save"])
}
