//! `status` of real machines, also while libvirtd hangs or is gone: it never waits for libvirt.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use fence_lab::lab::Hypervisor;
use fence_lab::libvirtd::Libvirtd;
use fence_lab::machine::Machine;
use fence_lab::process::poll_until;
use fence_lab::qemu;
use nix::sys::signal::Signal;

use super::site::{SOON, Site};

#[test]
fn status_and_list_answer_while_libvirtd_hangs_or_is_gone() -> Result<()> {
    let hypervisor = Hypervisor::new()?;
    let libvirtd = Libvirtd::start(&hypervisor)?;
    for name in ["one", "two"] {
        qemu::start_idle(&libvirtd, name)?;
    }
    libvirtd.define(qemu::URI, "never-on", &Machine::new("never-on").xml()?)?;
    let mut site = Site::on(hypervisor, libvirtd, &[qemu::URI], &[])?;

    let one = site.server.wait_domain("one", "running")?;
    let file = std::fs::read_to_string(site.hypervisor.outside("/run/libvirt/qemu/one.pid"))?;
    ensure!(one["pid"].as_i64() == Some(file.trim().parse()?), "{one} is not {file}");
    ensure!(site.server.wait_domain("never-on", "shut off")?["pid"].is_null());
    let (code, report) = site.server.status()?;
    ensure!(code == Some(0), "{report:#}");

    // libvirtd hangs: neither the kill by process nor the status waits for it.
    site.libvirtd.signal(Signal::SIGSTOP)?;
    site.off_directly("one")?;
    let begun = Instant::now();
    let dead = site.server.wait_domain("one", "dead")?;
    ensure!(dead["pid"].is_null() && begun.elapsed() < SOON, "{dead}");
    let (_, report) = site.server.status()?;
    let off = &report["requests"]["recent"][0];
    ensure!(off["op"] == "off" && off["result"] == "success" && off["steps"]["dead_us"].is_u64(), "{off}");
    site.libvirtd.go_on(qemu::URI)?;
    site.server.wait_domain("one", "shut off")?;

    // libvirtd is gone: the status says so, with what the daemon still knows.
    site.libvirtd.signal(Signal::SIGKILL)?;
    let report = poll_until("the status to report the lost connection", Duration::from_secs(60), || {
        let (code, report) = site.server.status()?;
        Ok((code == Some(1) && report["uris"][0]["connected"] == false).then_some(report))
    })?;
    let problem = report["problems"][0].as_str().unwrap_or_default();
    ensure!(problem.contains(qemu::URI) && problem.contains("can be fenced all the same"), "{problem}");
    ensure!(report["uris"][0]["last_error"].is_string() && report["uris"][0]["for_ms"].is_u64(), "{report:#}");
    ensure!(site.server.wait_domain("two", "running")?["pid"].is_i64());
    site.off_directly("two")
}
