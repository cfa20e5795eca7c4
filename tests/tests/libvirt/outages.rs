//! libvirt is stopped, killed, restarted, not started yet, or hangs. Domains that run here are
//! fenced all the same, and every other answer comes in time.

use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, ensure};
use fence_lab::container;
use fence_lab::lab::Hypervisor;
use fence_lab::libvirtd::Libvirtd;
use fence_lab::machine::Machine;
use fence_lab::observer::Observer;
use fence_lab::qemu;
use fence_lab::server::{Config, Server, Which};
use nix::mount::{MsFlags, mount};
use nix::sys::signal::Signal;

use super::site::{GUEST, SOON, Site};
use super::{KEY, expect_listed};

/// Stock clients give up after 30 s; an earlier answer is in time.
const IN_TIME: Duration = Duration::from_secs(28);

impl Site {
    /// A request that cannot succeed now must fail in time.
    fn fails_in_time(&self, op: &str, domain: &str) -> Result<()> {
        let begun = Instant::now();
        self.expect(op, domain, 1)?;
        ensure!(begun.elapsed() < IN_TIME, "{op}: {:?}", begun.elapsed());
        Ok(())
    }

    /// The list must have all domains, as last known, in time.
    fn list_is_whole(&self, lister: &Observer) -> Result<()> {
        let (begun, position) = (Instant::now(), self.server.log_position());
        let list = lister.list()?;
        ensure!(begun.elapsed() < IN_TIME && list.code == Some(0), "{list:?}");
        for (domain, state) in [("one", "off"), ("ct1", "off"), ("three", "on"), ("ct2", "on"), ("never-on", "off")] {
            expect_listed(&list, domain, state)?;
        }
        self.logs(position, "those of qemu:///system as they were last known: ")
    }
}

/// Starts the machines that these tests fence.
fn populate(libvirtd: &Libvirtd) -> Result<()> {
    for name in ["one", "two", "three"] {
        qemu::start_idle(libvirtd, name)?;
    }
    Machine::new("transient").create_transient(libvirtd)?;
    container::start(libvirtd, "ct1")?;
    container::start(libvirtd, "ct2")
}

#[test]
fn a_running_domain_is_fenced_while_libvirtd_hangs() -> Result<()> {
    let hypervisor = Hypervisor::new()?;
    let libvirtd = Libvirtd::start(&hypervisor)?;
    populate(&libvirtd)?;
    libvirtd.define(qemu::URI, "never-on", &Machine::new("never-on").xml()?)?;
    let mut site = Site::on(hypervisor, libvirtd, &[qemu::URI, container::URI], &[])?;
    let lister = Observer::new(&site.hypervisor, site.hypervisor.guest(GUEST + 1)?, &site.key());
    let rebooted = site.machine("two")?;
    // The daemon opens its last connection half a second after the first.
    std::thread::sleep(Duration::from_secs(1));
    site.libvirtd.signal(Signal::SIGSTOP)?;

    site.off_directly("one")?;
    site.off_directly("ct1")?;
    site.off_directly("transient")?;
    site.expect("reboot", "two", 0)?;
    ensure!(rebooted.is_dead()?);
    ensure!(site.observer.fence("status", "three")?.code == Some(0), "its process lives");
    // Without libvirt the daemon does not answer what only libvirt knows: neither that this domain
    // is off nor that it is on.
    std::thread::scope(|scope| -> Result<()> {
        let listed = scope.spawn(|| site.list_is_whole(&lister));
        site.fails_in_time("status", "never-on")?;
        site.fails_in_time("off", "never-on")?;
        site.fails_in_time("on", "never-on")?;
        site.fails_in_time("status", "nobody")?;
        listed.join().map_err(|_| anyhow!("panicked"))?
    })?;

    // The daemon recovers by itself and finishes what it has begun. It does not carry out requests
    // that it has failed.
    site.libvirtd.go_on(qemu::URI)?;
    ensure!(site.server.is_running()?, "{}", site.server.log());
    site.wait_status("two", 0)?;
    site.wait_status("one", 2)?;
    site.wait_status("ct1", 2)?;
    site.wait_status("never-on", 2)?;
    ensure!(site.machine("two")?.pid != rebooted.pid);
    site.libvirtd.wait_state(container::URI, "ct1", "shut off")?;
    site.off_directly("two")
}

#[test]
fn a_namesake_at_a_uri_that_hangs_delays_nobody() -> Result<()> {
    let hypervisor = Hypervisor::new()?;
    let libvirtd = Libvirtd::start(&hypervisor)?;
    qemu::start_idle(&libvirtd, "twin")?;
    container::start(&libvirtd, "twin")?;
    libvirtd.virsh(container::URI, &["destroy", "twin"])?;
    let mut site = Site::on(hypervisor, libvirtd, &[qemu::URI, container::URI], &[])?;
    site.wait_status("twin", 0)?;
    std::thread::sleep(Duration::from_secs(1));
    site.libvirtd.signal(Signal::SIGSTOP)?;
    let (begun, position) = (Instant::now(), site.server.log_position());
    site.off_directly("twin")?;
    // Not for the 15 s that it takes to notice a hung libvirtd.
    ensure!(begun.elapsed() < Duration::from_secs(10), "{:?}: {}", begun.elapsed(), site.server.log());
    site.logs(position, "libvirt does not answer about it: taken to be off still")?;
    site.libvirtd.go_on(qemu::URI)?;
    site.wait_status("twin", 2)
}

#[test]
fn a_running_domain_is_fenced_while_libvirtd_is_down_and_later() -> Result<()> {
    let hypervisor = Hypervisor::new()?;
    let libvirtd = Libvirtd::start(&hypervisor)?;
    populate(&libvirtd)?;
    let site = Site::on(hypervisor, libvirtd, &[qemu::URI, container::URI], &[])?;
    site.wait_status("three", 0)?;
    let rebooted = site.machine("two")?;
    let Site { server, libvirtd, observer, config, hypervisor } = site;
    libvirtd.crash()?;
    // In its place, the same site with no process at the socket.
    let away = Away { server, observer, config, hypervisor };
    away.expect("off", "one", 0)?;
    away.expect("off", "ct1", 0)?;
    away.expect("reboot", "two", 0)?;
    ensure!(rebooted.is_dead()?);
    // The daemon itself saw this domain die.
    for (op, code) in [("on", 1), ("status", 2)] {
        let begun = Instant::now();
        away.expect(op, "one", code)?;
        ensure!(begun.elapsed() < IN_TIME);
    }
    // A shorter list would make a cluster forget its targets.
    let list = away.observer.list()?;
    ensure!(list.code == Some(0), "{list:?}: {}", away.server.log());
    for (domain, state) in [("one", "off"), ("ct1", "off"), ("two", "off"), ("three", "on"), ("ct2", "on")] {
        expect_listed(&list, domain, state)?;
    }
    let said =
        |line: &str| line.contains("those of qemu:///system as they were last known: not connected: ").then_some(());
    ensure!(away.server.wait_log(0, SOON, said).is_some(), "{}", away.server.log());

    let Away { server, observer, config, hypervisor } = away;
    let libvirtd = Libvirtd::start(&hypervisor)?;
    let site = Site { server, libvirtd, observer, config, hypervisor };
    site.wait_status("two", 0)?;
    site.wait_status("one", 2)?;
    site.expect("on", "one", 0)?;
    site.off_directly("one")?;
    site.off_directly("three")?;
    site.off_directly("ct2")?;
    site.off_directly("two")
}

/// A site whose libvirtd is gone.
struct Away {
    server: Server,
    observer: Observer,
    config: Config,
    hypervisor: Hypervisor,
}

impl Away {
    fn expect(&self, op: &str, domain: &str, code: i32) -> Result<()> {
        let answer = self.observer.fence(op, domain)?;
        ensure!(answer.code == Some(code), "{op} of {domain}: {answer:?}: {}", self.server.log());
        Ok(())
    }
}

#[test]
fn a_connection_that_hangs_costs_the_others_nothing() -> Result<()> {
    let hypervisor = Hypervisor::new()?;
    // The socket accepts connections and never answers.
    let socket = hypervisor.path("silent");
    let _silent = UnixListener::bind(hypervisor.outside(&socket))?;
    let silent = format!("qemu+unix:///system?socket={socket}");
    let absent = "qemu+unix:///system?socket=/run/lab/absent";
    let libvirtd = Libvirtd::start(&hypervisor)?;
    qemu::start_idle(&libvirtd, "vm")?;
    let key = hypervisor.write("fence.key", &KEY)?;
    let mut config = Config::new(&key);
    config.uris = [absent, qemu::URI, &silent, container::URI].map(str::to_owned).to_vec();
    let server = Server::start(&hypervisor, &Which::ours()?, &config)?;
    let observer = Observer::new(&hypervisor, hypervisor.guest(GUEST)?, &key);
    let site = Site { server, libvirtd, observer, config, hypervisor };
    site.wait_status("vm", 0)?;
    site.off_directly("vm")?;
    let position = site.server.log_position();
    for (op, code) in [("status", 2), ("on", 0), ("status", 0), ("off", 0), ("off", 0), ("status", 2)] {
        site.expect(op, "vm", code)?;
    }
    // The daemon does not wait for the silent URIs, whose look-up takes 5 s.
    let slow = |line: &str| {
        let fence = fence_lab::timings::Fence::parse(line)?;
        let took = fence.step("replied")?.saturating_sub(fence.step("called_back")?);
        (took > Duration::from_secs(4)).then(|| line.to_owned())
    };
    let slow = site.server.wait_log(position, Duration::ZERO, slow);
    ensure!(slow.is_none(), "{slow:?}");
    // No reachable URI knows the domain, and one URI is silent, so the daemon cannot answer.
    site.expect("off", "nobody", 1)?;
    site.logs(0, "could not say")?;
    Ok(())
}

#[test]
fn a_fence_that_libvirtd_outlives_is_not_repeated() -> Result<()> {
    // libvirt's own destroy continues beside the kill: it must not hit the new instance.
    let site = Site::new(&[qemu::URI], &[])?;
    qemu::start_idle(&site.libvirtd, "phoenix")?;
    site.wait_status("phoenix", 0)?;
    for _ in 0..5 {
        site.off_directly("phoenix")?;
        site.expect("on", "phoenix", 0)?;
        let risen = site.machine("phoenix")?;
        ensure!(!risen.dies_within(Duration::from_millis(500))?, "killed after it was started again");
    }
    Ok(())
}

#[test]
fn a_full_state_directory_keeps_nobody_from_being_fenced() -> Result<()> {
    const STATE: &str = "/run/fence-xdp";
    let hypervisor = Hypervisor::new()?;
    let libvirtd = Libvirtd::start(&hypervisor)?;
    hypervisor.space().in_mounts(|| {
        std::fs::create_dir_all(STATE)?;
        mount(Some("tmpfs"), STATE, Some("tmpfs"), MsFlags::empty(), Some("size=4096,mode=0700"))?;
        Ok(std::fs::write(Path::new(STATE).join("filling"), [1; 4096])?)
    })?;
    let mut site = Site::on(hypervisor, libvirtd, &[qemu::URI], &[])?;
    qemu::start_idle(&site.libvirtd, "vm")?;
    site.wait_status("vm", 0)?;
    let position = site.server.log_position();
    let before = site.machine("vm")?;
    site.expect("reboot", "vm", 0)?;
    ensure!(before.is_dead()?);
    site.logs(position, "a claim is not stored")?;
    site.logs(position, "this reboot will be forgotten if this daemon dies")?;
    site.logs(position, "started again after its reboot")?;
    site.off_directly("vm")?;
    // No half-written record remains that the next daemon could trip over.
    let left = std::fs::read_dir(site.hypervisor.outside(STATE))?.flatten().map(|entry| (entry.file_name(), entry));
    for (name, entry) in left {
        ensure!(name == "filling" || entry.metadata()?.len() == 0, "{} was left", name.display());
    }
    site.server.crash()?;
    site.next_daemon()?;
    site.expect("off", "vm", 0)
}
