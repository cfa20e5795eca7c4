//! Fences under the real unit through URIs other than this host's system libvirtd: `qemu+ssh://`,
//! and the socket of a user's own libvirtd.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use fence_lab::cluster::corosync::KEY_PATH;
use fence_lab::lab::Hypervisor;
use fence_lab::machine::Machine;
use fence_lab::process::{Process, poll_until};
use fence_lab::qemu;
use fence_lab::server::Config;
use fence_lab::witness::Witness;
use serde_json::Value;

use crate::host::{Host, LIMIT, UNIT_PATH};

const BY_SSH: &str = "qemu+ssh://root@hypervisor/system";
/// `nobody`: libvirt looks up the user's name.
const USER: u32 = 65_534;
const SESSION: &str = "qemu:///session?socket=/run/user/65534/libvirt/libvirt-sock";
const UUID: &str = "5e55109e-0000-4000-8000-000000000001";

/// A success that leaves the machine alive must never occur.
fn off(host: &Host, domain: &str, machine: &Witness) -> Result<()> {
    let asked = host.run(&format!("fence_xvm -o off -H {domain}"))?;
    ensure!(machine.is_dead()?, "{domain} lives: {asked:?}; {}", host.log());
    ensure!(asked.code == Some(0), "{asked:?}; {}", host.log());
    let status = host.run(&format!("fence_xvm -o status -H {domain}"))?;
    ensure!(status.code == Some(2), "{status:?}; {}", host.log());
    Ok(())
}

/// The daemon with these URIs, and a user's libvirtd.
fn scene(uris: &[&str]) -> Result<(Process, Host)> {
    let host = Host::new(&Config { uris: uris.iter().map(|&uri| uri.to_owned()).collect(), ..Config::new(KEY_PATH) })?;
    host.allow_ssh()?;
    let user = session(host.hypervisor())?;
    host.must("cp ~/.ssh/id_ed25519 /etc/ssh/fence && systemctl enable --now fence-daemon")?;
    host.wait_connected(uris.len())?;
    Ok((user, host))
}

/// The libvirtd of a user.
fn session(hypervisor: &Hypervisor) -> Result<Process> {
    let directory = format!("/run/user/{USER}");
    let make = format!(
        "mkdir -p /run/user && install -d -m 700 -o {USER} -g {USER} {directory} {directory}/.config {directory}/.config/libvirt"
    );
    hypervisor.space().must("sh", &["-c", &make])?;
    hypervisor.write_mode(&format!("{directory}/.config/libvirt/qemu.conf"), b"stdio_handler = \"file\"\n", 0o644)?;
    let mut command = Command::new("setpriv");
    command.args(["--reuid", &USER.to_string(), "--regid", &USER.to_string(), "--clear-groups", "libvirtd"]);
    command.env("HOME", &directory).env("XDG_RUNTIME_DIR", &directory).env_remove("XDG_CONFIG_HOME");
    let mut process = Process::start(hypervisor.space(), &mut command)?;
    let socket = format!("{directory}/libvirt/libvirt-sock");
    poll_until("a user's libvirtd", LIMIT, || {
        ensure!(process.is_running()?, "the user's libvirtd has ended");
        Ok(hypervisor.outside(&socket).exists().then_some(()))
    })
    .with_context(|| process.stderr().text())?;
    Ok(process)
}

#[test]
fn off_by_ssh_and_by_a_users_socket_under_the_unit() -> Result<()> {
    let (_user, host) = scene(&[BY_SSH, SESSION])?;
    qemu::start_idle(&host.libvirtd, "far")?;
    let far = Witness::of_qemu(host.hypervisor(), "far")?;
    host.libvirtd.define(SESSION, "mine", &Machine::new("mine").uuid(UUID).xml()?)?;
    host.libvirtd.start_domain(SESSION, "mine")?;
    let [mine] = <[Witness; 1]>::try_from(Witness::of_uuid(UUID)?)
        .map_err(|all| anyhow::anyhow!("{} processes of one machine", all.len()))?;
    let status = std::fs::read_to_string(format!("/proc/{}/status", mine.pid))?;
    ensure!(
        status.lines().any(|line| line.starts_with(&format!("Uid:\t{USER}\t"))),
        "the machine runs as root: {status}"
    );

    off(&host, "far", &far)?;
    off(&host, "mine", &mine)
}

/// The doctor's findings about libvirt that are `wrong`.
fn doctor_about_libvirt(host: &Host) -> Result<Vec<Value>> {
    let doctor = host.run("fence-daemon doctor --json")?;
    let report: Value = serde_json::from_str(&doctor.stdout).with_context(|| format!("{doctor:?}"))?;
    let findings = report["findings"].as_array().context("no findings")?.iter();
    let is_it = |finding: &&Value| finding["check"] == "libvirt" && finding["state"] == "wrong";
    Ok(findings.filter(is_it).cloned().collect())
}

#[test]
fn each_form_of_uri_connects_under_the_unit() -> Result<()> {
    let (_user, host) = scene(&[
        "qemu:///system",
        "lxc:///",
        "qemu+unix:///system",
        BY_SSH,
        "qemu+ssh://root@hypervisor/system?keyfile=/etc/ssh/fence",
        SESSION,
        "test:///default",
    ])?;
    // A program that libvirt's client has started is an ordinary process.
    let children = host.must("for pid in $(pgrep -x ssh); do cat /proc/$pid/oom_score_adj /proc/$pid/stat; done")?;
    let scores: Vec<&str> = children.lines().step_by(2).collect();
    ensure!(!scores.is_empty() && scores.iter().all(|score| *score == "0"), "{children}");
    let nice = |stat: &str| stat.rsplit(") ").next().and_then(|rest| rest.split(' ').nth(16).map(|nice| nice == "0"));
    ensure!(children.lines().skip(1).step_by(2).all(|stat| nice(stat) == Some(true)), "{children}");
    // The doctor sees the URIs as the daemon does, also where the doctor has more rights.
    let wrong = doctor_about_libvirt(&host)?;
    ensure!(wrong.is_empty(), "{wrong:#?}");
    // In a container with cgroup v1, systemd does not always notice that an ssh has ended, and
    // waits for it.
    let less = b"[Service]\nCapabilityBoundingSet=~CAP_SETPCAP\nTimeoutStopSec=5\n";
    let path = format!("{}{UNIT_PATH}.d/less.conf", host.booted.root());
    host.hypervisor().write_mode(&path, less, 0o644)?;
    host.must("systemctl daemon-reload && systemctl restart fence-daemon")?;
    let wrong = poll_until("the doctor to report the failing URI", LIMIT, || {
        let wrong = doctor_about_libvirt(&host)?;
        Ok((wrong.len() == 2).then_some(wrong))
    })
    .with_context(|| host.log())?;
    for finding in wrong {
        let text = finding.to_string();
        ensure!(text.contains("qemu+ssh://") && text.contains("answers here, but not to the daemon"), "{text}");
        // With the daemon's rights the doctor fails like the daemon.
        let command = finding["commands"][0].as_str().with_context(|| text.clone())?;
        let tried = host.run(command)?;
        // The error message varies: libvirt's client sees either the ssh die or its pipe break.
        ensure!(tried.code != Some(0) && command.contains("nsenter"), "{command}: {tried:?}");
    }
    Ok(())
}
