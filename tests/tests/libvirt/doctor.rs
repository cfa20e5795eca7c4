//! The doctor beside a real libvirtd that runs, hangs or is gone, and inside a real container,
//! which finds itself in the list.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use fence_lab::container;
use fence_lab::process::run;
use fence_lab::qemu;
use fence_lab::server::{Which, commands_beside};
use nix::sys::signal::Signal;
use serde_json::Value;

use super::site::{SOON, Site};

fn program() -> Result<String> {
    match Which::ours()? {
        Which::Ours(program) => Ok(program.to_string_lossy().into_owned()),
        Which::Stock => bail!("the stock server has no doctor"),
    }
}

fn told(site: &Site, command: &mut Command) -> Result<Value> {
    let said = run(site.hypervisor.space(), command, 4 * SOON)?;
    serde_json::from_str(&said.stdout).with_context(|| format!("{said:?}"))
}

fn on_hypervisor(site: &Site) -> Result<Value> {
    let mut command = Command::new(program()?);
    command.args(["-f", &site.hypervisor.path("fence_virt.conf"), "doctor", "--json"]);
    told(site, &mut command)
}

/// The findings of a check: state and text.
fn said(report: &Value, check: &str) -> Vec<(String, String)> {
    let findings = report["findings"].as_array().into_iter().flatten().filter(|finding| finding["check"] == check);
    findings.map(|finding| (finding["state"].as_str().unwrap_or_default().to_owned(), finding.to_string())).collect()
}

fn expect(report: &Value, check: &str, state: &str, words: &str) -> Result<()> {
    let fits = |(found, text): &(String, String)| found == state && text.contains(words);
    ensure!(said(report, check).iter().any(fits), "no {check} that is {state} with `{words}`: {report:#}");
    Ok(())
}

#[test]
fn a_libvirtd_that_hangs_or_is_gone_is_reported() -> Result<()> {
    let mut site = Site::new(&[qemu::URI, container::URI], &[])?;
    expect(&on_hypervisor(&site)?, "libvirt", "warning", "qemu:///system has no domains")?;
    qemu::start_idle(&site.libvirtd, "vm1")?;
    qemu::define_idle(&site.libvirtd, "vm2")?;
    container::start(&site.libvirtd, "my,container")?;
    let report = on_hypervisor(&site)?;
    expect(&report, "libvirt", "ok", "qemu:///system answers: 2 domains, 1 running")?;
    expect(&report, "libvirt", "ok", "lxc:/// answers: 1 domain, 1 running")?;
    expect(&report, "domains", "warning", "my,container")?;
    ensure!(report["verdict"] == "warning", "{report:#}");

    site.libvirtd.signal(Signal::SIGSTOP)?;
    let report = on_hypervisor(&site)?;
    expect(&report, "libvirt", "wrong", "qemu:///system does not answer within 5 s")?;
    site.libvirtd.go_on(qemu::URI)?;
    expect(&on_hypervisor(&site)?, "libvirt", "ok", "2 domains, 1 running")?;

    let Site { libvirtd, hypervisor, .. } = site;
    libvirtd.crash()?;
    let mut command = Command::new(program()?);
    command.args(["-f", &hypervisor.path("fence_virt.conf"), "doctor", "--json"]);
    let gone = run(hypervisor.space(), &mut command, 4 * SOON)?;
    let gone: Value = serde_json::from_str(&gone.stdout)?;
    expect(&gone, "libvirt", "wrong", "whether libvirt's daemon runs")?;
    expect(&gone, "libvirt", "wrong", "virsh -c 'qemu:///system' list --all")
}

/// A container with this machine's programs, our own and the key, on an overlay that goes with the
/// lab.
fn start_container(site: &Site, name: &str) -> Result<()> {
    let space = site.hypervisor.space();
    let root = site.hypervisor.path("root");
    let program = program()?;
    let script = format!(
        "mkdir -p {root} {root}.up {root}.work && mount -t overlay overlay -o lowerdir=/,upperdir={root}.up,workdir={root}.work {root} && \
         install -D -m 755 {program} {root}/usr/local/sbin/fence-daemon && \
         install -D -m 755 {} {root}/usr/local/libexec/fence-xdp/fence-daemon-commands && \
         install -D -m 600 {} {root}/etc/cluster/fence_xvm.key",
        commands_beside(Path::new(&program)).display(),
        site.key()
    );
    space.must("sh", &["-c", &script])?;
    let emulator = ["/usr/lib/libvirt/libvirt_lxc", "/usr/libexec/libvirt_lxc"];
    let emulator =
        emulator.into_iter().find(|path| Path::new(path).exists()).context("libvirt's LXC driver is missing")?;
    let xml = format!(
        "<domain type='lxc'><name>{name}</name><memory unit='MiB'>64</memory><vcpu>1</vcpu>\
         <os><type>exe</type><init>/bin/sleep</init><initarg>3600</initarg></os>\
         <devices><emulator>{emulator}</emulator>\
         <filesystem type='mount'><source dir='{root}'/><target dir='/'/></filesystem>\
         <interface type='bridge'><source bridge='virbr0'/></interface><console type='pty'/></devices></domain>"
    );
    site.libvirtd.define(container::URI, name, &xml)?;
    site.libvirtd.start_domain(container::URI, name)
}

/// Runs the doctor in a container after the commands in `before`.
fn in_container(site: &Site, name: &str, before: &str) -> Result<Value> {
    let script = format!("{before}; exec /usr/local/sbin/fence-daemon doctor --from-guest --json");
    let mut command = Command::new("virsh");
    command.args([
        "-q",
        "-c",
        container::URI,
        "lxc-enter-namespace",
        "--noseclabel",
        name,
        "--",
        "/bin/sh",
        "-c",
        &script,
    ]);
    told(site, &mut command)
}

#[test]
fn a_container_finds_itself_in_the_list_by_its_uuid() -> Result<()> {
    let site = Site::new(&[container::URI], &[])?;
    start_container(&site, "ct1")?;
    let report = in_container(&site, "ct1", "ip link set eth0 up; ip addr add 192.168.122.77/24 dev eth0")?;
    expect(&report, "key", "ok", "/etc/cluster/fence_xvm.key: 4096 bytes")?;
    expect(&report, "exchange", "ok", "a list of 1 domain")?;
    // libvirt sets the container's host name to the domain's name.
    expect(&report, "own name", "ok", "this guest is the domain ct1, as its host name says")?;
    let report = in_container(&site, "ct1", "hostname node1")?;
    expect(&report, "own name", "warning", "this guest (node1) is the domain ct1")?;
    expect(&report, "own name", "warning", "pcmk_host_map=\\\"node1:ct1\\\"")?;
    // Fencing node1 by its host name would kill the other domain.
    container::start(&site.libvirtd, "node1")?;
    expect(&in_container(&site, "ct1", ":")?, "own name", "wrong", "this guest is ct1")
}
