//! A domain is known at two URIs and runs at the one that does not answer any more. The daemon
//! neither calls it off nor starts it again.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use fence_lab::lab::Hypervisor;
use fence_lab::libvirtd::Libvirtd;
use fence_lab::machine::Machine;
use fence_lab::process::poll_until;
use fence_lab::qemu;
use fence_lab::witness::Witness;
use nix::sys::signal::Signal;

use super::site::{SOON, Site};

const UUID: &str = "5b0e7a52-3c5b-4c83-8c0f-0d9f6c3f1a01";

/// Two hypervisors. The daemon of the first uses both.
struct Pair {
    here: Site,
    there: Libvirtd,
    /// The URI of the second hypervisor, as the daemon writes it.
    uri: String,
}

impl Pair {
    /// Defines `vm1` on both hypervisors and starts it on the second.
    fn new(name: &str) -> Result<Self> {
        let (first, second) = (Hypervisor::new()?, Hypervisor::new()?);
        let [_, address] = first.connect(&second)?;
        let config = "listen_tls = 0\nlisten_tcp = 1\nauth_tcp = \"none\"\n";
        let there = Libvirtd::start_with(&second, config, &["--listen"])?;
        let here = Libvirtd::start(&first)?;
        let machine = Machine::new(name).uuid(UUID);
        here.define(qemu::URI, name, &machine.xml()?)?;
        machine.start(&there)?;
        let uri = format!("qemu+tcp://{address}/system");
        let here = Site::on(first, here, &[qemu::URI, &uri], &[])?;
        here.wait_status(name, 0)?;
        let pair = Self { here, there, uri };
        pair.is_kept(name)?;
        Ok(pair)
    }

    /// Waits until the daemon has recorded that the machine runs there.
    fn is_kept(&self, name: &str) -> Result<()> {
        let file = self.here.hypervisor.outside("/run/fence-xdp/last-known");
        poll_until("the record of the domain's last state", SOON, || {
            Ok(fs::read_to_string(&file).is_ok_and(|kept| kept.contains(name)).then_some(()))
        })
        .with_context(|| self.here.server.log())
    }

    /// Checks that no request calls the domain off or starts a second copy.
    fn nothing_is_said(&self, name: &str, there: &Witness) -> Result<()> {
        for op in ["status", "off", "on", "reboot", "status"] {
            self.here.expect(op, name, 1)?;
            ensure!(!there.is_dead()?, "{op}: the test is wrong: the machine is dead");
            let copies = Witness::of_all(&self.here.hypervisor, name)?;
            ensure!(copies.is_empty(), "{op} has started a second copy: {}", self.here.server.log());
        }
        ensure!(self.here.server.log().contains("by the last word from there"), "{}", self.here.server.log());
        Ok(())
    }

    fn restart_daemon(&mut self) -> Result<()> {
        self.here.server.crash()?;
        self.here.next_daemon()
    }
}

#[test]
fn a_domain_at_a_killed_libvirtd_is_not_off_elsewhere() -> Result<()> {
    let mut pair = Pair::new("vm1")?;
    let machine = Witness::of_qemu(pair.there.hypervisor(), "vm1")?;
    pair.there.kill()?;
    pair.nothing_is_said("vm1", &machine)?;

    // The next daemon never reaches that libvirtd.
    pair.restart_daemon()?;
    pair.nothing_is_said("vm1", &machine)?;
    ensure!(Path::new(&pair.here.hypervisor.outside("/run/fence-xdp/last-known")).exists());

    // Once that libvirtd is back, its answers count.
    let hypervisor = pair.there.hypervisor().clone();
    let config = "listen_tls = 0\nlisten_tcp = 1\nauth_tcp = \"none\"\n";
    pair.there = Libvirtd::start_with(&hypervisor, config, &["--listen"])?;
    pair.here.wait_status("vm1", 0)?;
    pair.here.expect("off", "vm1", 0)?;
    ensure!(machine.is_dead()?, "the answer was off, and the machine lives: {}", pair.here.server.log());
    pair.here.wait_status("vm1", 2)?;
    pair.there.kill()?;
    // According to its last state the domain was off there.
    pair.here.expect("off", "vm1", 0)?;
    pair.here.expect("on", "vm1", 0)?;
    pair.here.libvirtd.wait_state(qemu::URI, "vm1", "running")
}

#[test]
fn a_domain_at_a_hung_libvirtd_is_not_off_elsewhere() -> Result<()> {
    let mut pair = Pair::new("vm1")?;
    let machine = Witness::of_qemu(pair.there.hypervisor(), "vm1")?;
    pair.there.signal(Signal::SIGSTOP)?;
    pair.nothing_is_said("vm1", &machine)?;
    pair.restart_daemon()?;
    pair.nothing_is_said("vm1", &machine)?;
    let uri = pair.uri.clone();
    ensure!(pair.here.server.log().contains(&uri), "{}", pair.here.server.log());
    pair.there.signal(Signal::SIGCONT)?;
    pair.here.wait_status("vm1", 0)?;
    pair.here.expect("off", "vm1", 0)?;
    ensure!(machine.is_dead()?, "the answer was off, and the machine lives: {}", pair.here.server.log());
    Ok(())
}

/// The reverse: the domain runs here, and libvirtd hangs here.
#[test]
fn another_uri_cannot_call_a_local_domain_off() -> Result<()> {
    let (first, second) = (Hypervisor::new()?, Hypervisor::new()?);
    let [_, address] = first.connect(&second)?;
    let config = "listen_tls = 0\nlisten_tcp = 1\nauth_tcp = \"none\"\n";
    let there = Libvirtd::start_with(&second, config, &["--listen"])?;
    let here = Libvirtd::start(&first)?;
    let machine = Machine::new("vm2").uuid(UUID);
    machine.start(&here)?;
    there.define(qemu::URI, "vm2", &machine.xml()?)?;
    let uri = format!("qemu+tcp://{address}/system");
    let here = Site::on(first, here, &[qemu::URI, &uri], &[])?;
    here.wait_status("vm2", 0)?;
    let mut pair = Pair { here, there, uri };
    pair.is_kept("vm2")?;
    let process = pair.here.machine("vm2")?;
    pair.here.libvirtd.signal(Signal::SIGSTOP)?;
    pair.restart_daemon()?;

    // The domain is on, and killed by its process; no copy is started there.
    for (op, code) in [("status", 0), ("on", 1), ("off", 0)] {
        pair.here.expect(op, "vm2", code)?;
        ensure!(process.is_dead()? == (op == "off"), "{op}: {}", pair.here.server.log());
        ensure!(Witness::of_all(pair.there.hypervisor(), "vm2")?.is_empty(), "{op} has started a second copy");
    }
    pair.here.libvirtd.go_on(qemu::URI)?;
    pair.here.expect("off", "vm2", 0)?;
    ensure!(process.is_dead()?, "the answer was off, and the machine lives: {}", pair.here.server.log());
    Ok(())
}
