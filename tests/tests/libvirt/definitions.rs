//! The definition that a guest restarts with: rows `hot-plugged` and `managed-save` of
//! `docs/reference/compatibility.md`, with either server.

use anyhow::{Context, Result, ensure};
use fence_lab::lab::Hypervisor;
use fence_lab::libvirtd::Libvirtd;
use fence_lab::machine::{BOOTED, Machine, writing_disk};
use fence_lab::process::poll_until;
use fence_lab::qemu;
use fence_lab::server::Which;
use fence_lab::witness::Witness;

use super::site::{SOON, Site};

fn site(which: &Which) -> Result<Site> {
    let hypervisor = Hypervisor::new()?;
    let libvirtd = Libvirtd::start(&hypervisor)?;
    Site::with(which, hypervisor, libvirtd, &[qemu::URI], &[])
}

#[test]
fn a_reboot_starts_the_definition_and_stock_what_ran() -> Result<()> {
    for (which, keeps) in [(Which::Stock, true), (Which::ours()?, false)] {
        let site = site(&which)?;
        // A disk can be plugged in only with ACPI.
        let xml = Machine::new("vm").xml()?.replacen("</os>", "</os><features><acpi/></features>", 1);
        site.libvirtd.define(qemu::URI, "vm", &xml)?;
        site.libvirtd.start_domain(qemu::URI, "vm")?;
        let extra = site.hypervisor.write("extra.img", &[0; 65536])?;
        site.libvirtd.virsh(qemu::URI, &["attach-disk", "vm", &extra, "vdb", "--live"])?;
        let before = Witness::of_qemu(&site.hypervisor, "vm")?;
        let has_it = |arguments: &[&str]| -> Result<bool> {
            Ok(site.libvirtd.virsh(qemu::URI, arguments)?.stdout.contains("extra.img"))
        };
        ensure!(has_it(&["dumpxml", "vm"])? && !has_it(&["dumpxml", "vm", "--inactive"])?, "not hot-plugged");
        site.expect("reboot", "vm", 0)?;
        before.wait_next(&site.hypervisor, "vm")?;
        site.libvirtd.wait_state(qemu::URI, "vm", "running")?;
        let kept = has_it(&["dumpxml", "vm"])?;
        ensure!(kept == keeps, "{}: the hot-plugged disk is there: {kept}", which.name());
    }
    Ok(())
}

#[test]
fn a_saved_guest_is_booted_and_stock_resumes_it() -> Result<()> {
    for (which, resumes) in [(Which::Stock, true), (Which::ours()?, false)] {
        let site = site(&which)?;
        let disk = site.hypervisor.write("vm.img", &writing_disk())?;
        let serial = site.hypervisor.path("vm.serial");
        Machine::new("vm").disk(&disk, "threads").serial(&serial).start(&site.libvirtd)?;
        // Each new process truncates the file.
        let boots = || -> Result<usize> {
            let said = std::fs::read(site.hypervisor.outside(&serial)).context("what the machine says")?;
            Ok(said.into_iter().filter(|&byte| byte == BOOTED).count())
        };
        poll_until("a boot", SOON, || Ok((boots()? == 1).then_some(())))?;
        site.libvirtd.virsh(qemu::URI, &["managedsave", "vm"])?;
        site.libvirtd.wait_state(qemu::URI, "vm", "shut off")?;
        site.expect("on", "vm", 0)?;
        site.libvirtd.wait_state(qemu::URI, "vm", "running")?;
        if resumes {
            let info = site.libvirtd.virsh(qemu::URI, &["dominfo", "vm"])?.stdout;
            ensure!(info.contains("Managed save:   no") && boots()? == 0, "{}: {info}", which.name());
        } else {
            poll_until("a boot", SOON, || Ok((boots()? == 1).then_some(())))?;
        }
    }
    Ok(())
}
