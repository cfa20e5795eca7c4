//! What a guest comes back as. The rows `hot-plugged` and `managed-save` of `docs/reference/compatibility.md`, with either server.

use anyhow::{Context, Result, ensure};
use fence_lab::lab::Hypervisor;
use fence_lab::libvirtd::Libvirtd;
use fence_lab::machine::{BOOTED, Machine, writing_disk};
use fence_lab::observer::Observer;
use fence_lab::process::poll_until;
use fence_lab::qemu;
use fence_lab::server::{Config, Server, Which};
use fence_lab::witness::Witness;

use super::KEY;
use super::site::{GUEST, SOON};

/// A hypervisor with libvirtd, a server, and a guest that asks.
struct Pair {
    observer: Observer,
    _server: Server,
    libvirtd: Libvirtd,
    hypervisor: Hypervisor,
}

impl Pair {
    fn new(which: &Which) -> Result<Self> {
        let hypervisor = Hypervisor::new()?;
        let libvirtd = Libvirtd::start(&hypervisor)?;
        let key = hypervisor.write("fence.key", &KEY)?;
        let config = Config { uris: vec![qemu::URI.to_owned()], ..Config::new(&key) };
        let server = Server::start(&hypervisor, which, &config)?;
        let observer = Observer::new(&hypervisor, hypervisor.guest(GUEST)?, &key);
        Ok(Self { observer, _server: server, libvirtd, hypervisor })
    }

    fn fence(&self, op: &str) -> Result<()> {
        let answer = self.observer.fence(op, "vm")?;
        ensure!(answer.code == Some(0), "{op}: {:?}", answer.code);
        Ok(())
    }
}

#[test]
fn a_reboot_starts_the_definition_and_stock_what_ran() -> Result<()> {
    for (which, keeps) in [(Which::Stock, true), (Which::ours()?, false)] {
        let pair = Pair::new(&which)?;
        // Without ACPI nothing can be plugged into its bus.
        let xml = Machine::new("vm").xml()?.replacen("</os>", "</os><features><acpi/></features>", 1);
        pair.libvirtd.define(qemu::URI, "vm", &xml)?;
        pair.libvirtd.start_domain(qemu::URI, "vm")?;
        let extra = pair.hypervisor.write("extra.img", &[0; 65536])?;
        pair.libvirtd.virsh(qemu::URI, &["attach-disk", "vm", &extra, "vdb", "--live"])?;
        let before = Witness::of_qemu(&pair.hypervisor, "vm")?;
        let has_it = |arguments: &[&str]| -> Result<bool> {
            Ok(pair.libvirtd.virsh(qemu::URI, arguments)?.stdout.contains("extra.img"))
        };
        ensure!(has_it(&["dumpxml", "vm"])? && !has_it(&["dumpxml", "vm", "--inactive"])?, "not hot-plugged");
        pair.fence("reboot")?;
        before.wait_next(&pair.hypervisor, "vm")?;
        pair.libvirtd.wait_state(qemu::URI, "vm", "running")?;
        let kept = has_it(&["dumpxml", "vm"])?;
        ensure!(kept == keeps, "{}: the hot-plugged disk is there: {kept}", which.name());
    }
    Ok(())
}

#[test]
fn a_saved_guest_is_booted_and_stock_resumes_it() -> Result<()> {
    for (which, resumes) in [(Which::Stock, true), (Which::ours()?, false)] {
        let pair = Pair::new(&which)?;
        let disk = pair.hypervisor.write("vm.img", &writing_disk())?;
        let serial = pair.hypervisor.path("vm.serial");
        Machine::new("vm").disk(&disk, "threads").serial(&serial).start(&pair.libvirtd)?;
        // Each process begins the file anew.
        let boots = || -> Result<usize> {
            let said = std::fs::read(pair.hypervisor.outside(&serial)).context("what the machine says")?;
            Ok(said.into_iter().filter(|&byte| byte == BOOTED).count())
        };
        poll_until("a boot", SOON, || Ok((boots()? == 1).then_some(())))?;
        pair.libvirtd.virsh(qemu::URI, &["managedsave", "vm"])?;
        pair.libvirtd.wait_state(qemu::URI, "vm", "shut off")?;
        pair.fence("on")?;
        pair.libvirtd.wait_state(qemu::URI, "vm", "running")?;
        if resumes {
            let info = pair.libvirtd.virsh(qemu::URI, &["dominfo", "vm"])?.stdout;
            ensure!(info.contains("Managed save:   no") && boots()? == 0, "{}: {info}", which.name());
        } else {
            poll_until("a boot", SOON, || Ok((boots()? == 1).then_some(())))?;
        }
    }
    Ok(())
}
