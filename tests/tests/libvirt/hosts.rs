//! `backend = "cpg"`: hosts with a corosync, a libvirtd and a server each, whose guests share no
//! segment.
//!
//! Each test has a case in which stock's server says "off" while the machine runs, or hangs. With
//! `fence_virtd` the tests show that.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use fence_lab::client::Client;
use fence_lab::corosync::HostRing;
use fence_lab::lab::Space;
use fence_lab::libvirtd::Libvirtd;
use fence_lab::machine::Machine;
use fence_lab::observer::Observer;
use fence_lab::process::{Finished, Process, poll_until, run};
use fence_lab::qemu;
use fence_lab::server::{Config, Server, Which};
use fence_lab::witness::Witness;
use nix::sys::signal::Signal;

use super::KEY;
use super::site::{GUEST, SOON, Site};

/// A request gets its answer within 25 s, and clients wait for 30 s.
const ANSWER: Duration = Duration::from_secs(28);
/// The domain's UUID on all hosts.
const UUID: &str = "7d3c9a52-51c1-4a0e-9d0c-2a4b6c8d0e01";

/// A cluster of hosts with the given server.
struct Hosts {
    // Drops before the hosts.
    sites: Vec<Site>,
    ring: HostRing,
}

impl Hosts {
    fn new(count: u8) -> Result<Self> {
        let hosts = Self::with(&Which::ours()?, count)?;
        hosts.wait_whole()?;
        Ok(hosts)
    }

    fn with(which: &Which, count: u8) -> Result<Self> {
        let ring = HostRing::new(count)?;
        let mut sites = Vec::new();
        for (number, host) in ring.hosts.iter().enumerate() {
            let config = format!(
                "listen_tls = 0\nlisten_tcp = 1\nauth_tcp = \"none\"\nhost_uuid = \"00000000-0000-4000-8000-00000000000{number}\"\n"
            );
            let hypervisor = host.hypervisor.clone();
            let libvirtd = Libvirtd::start_with(&hypervisor, &config, &["--listen"])?;
            let key = hypervisor.write("fence.key", &KEY)?;
            let mut config = Config::new(&key);
            config.uris = vec![qemu::URI.to_owned()];
            config.backend_name = "cpg";
            let server = Server::start(&hypervisor, which, &config)?;
            let observer = Observer::new(&hypervisor, hypervisor.guest(GUEST)?, &key);
            sites.push(Site { server, libvirtd, observer, config, hypervisor });
        }
        Ok(Self { sites, ring })
    }

    /// Two hosts with stock's server, which has its ear to the group: it sometimes lacks it.
    fn of_stock() -> Result<Self> {
        for _ in 0..4 {
            let hosts = Self::with(&Which::Stock, 2)?;
            Machine::new("ear").start(&hosts.sites[1].libvirtd)?;
            let deadline = Instant::now() + Duration::from_secs(10);
            while Instant::now() < deadline {
                if hosts.run(0, "status", "ear")?.code == Some(0) {
                    return Ok(hosts);
                }
            }
        }
        bail!("fence_virtd does not hear its group")
    }

    /// Starts the next server of a host.
    fn next_daemon(&mut self, host: usize, which: &Which) -> Result<()> {
        let site = &mut self.sites[host];
        site.server = Server::start(&site.hypervisor, which, &site.config)?;
        Ok(())
    }

    /// Waits until each host's monitor says that all is well.
    fn wait_whole(&self) -> Result<()> {
        for site in &self.sites {
            poll_until("all hosts to be well", SOON, || {
                Ok((Client::new("monitor", &site.key()).run(self.guest(site))?.code == Some(0)).then_some(()))
            })
            .with_context(|| self.logs())?;
        }
        Ok(())
    }

    fn guest<'a>(&self, site: &'a Site) -> &'a Space {
        site.observer.guest().space()
    }

    /// Asks on a host by the stock client, whose own limit is a short one, and judges nothing.
    fn run(&self, host: usize, op: &str, domain: &str) -> Result<Finished> {
        let site = &self.sites[host];
        let mut client = Command::new("fence_xvm");
        client.args(["-o", op, "-k", &site.key(), "-H", domain, "-t", "8"]);
        run(self.guest(site), &mut client, Duration::from_secs(60))
    }

    /// Asks on one host about a machine of any: a success while one of these lives is an error.
    fn ask(&self, host: usize, op: &str, domain: &str, victims: &[Witness]) -> Result<Finished> {
        let site = &self.sites[host];
        let client = Client::new(op, &site.key()).domain(domain).start(self.guest(site))?;
        client.ends_within(Duration::from_secs(60))?;
        // Now, before anything else is done: a death that comes later is no excuse.
        let alive = victims.iter().map(Witness::is_dead).collect::<Result<Vec<_>>>()?.contains(&false);
        let answer = client.finish(Duration::ZERO).with_context(|| self.logs())?;
        let is_kill = matches!(op, "off" | "reboot");
        ensure!(!(is_kill && alive && answer.code == Some(0)), "FALSE SUCCESS: {op} of {domain}: {}", self.logs());
        ensure!(answer.elapsed < ANSWER, "{op} of {domain} took {:?}: {}", answer.elapsed, self.logs());
        Ok(answer)
    }

    /// As [`Self::ask`]; it must end with this exit code.
    fn expect(&self, host: usize, op: &str, domain: &str, victims: &[Witness], code: i32) -> Result<Duration> {
        let answer = self.ask(host, op, domain, victims)?;
        ensure!(answer.code == Some(code), "{op} of {domain}: {code} expected, not {answer:?}: {}", self.logs());
        Ok(answer.elapsed)
    }

    /// Starts a machine on a host: its process.
    fn start(&self, host: usize, name: &str) -> Result<Witness> {
        Machine::new(name).uuid(UUID).start(&self.sites[host].libvirtd)?;
        let machine = self.sites[host].machine(name)?;
        self.wait_known(name)?;
        Ok(machine)
    }

    /// As [`Self::start`], with a UUID of its own.
    fn start_other(&self, host: usize, name: &str) -> Result<Witness> {
        Machine::new(name).start(&self.sites[host].libvirtd)?;
        self.wait_known(name)?;
        self.sites[host].machine(name)
    }

    /// Waits until all hosts say that it runs.
    fn wait_known(&self, name: &str) -> Result<()> {
        for host in 0..self.sites.len() {
            poll_until(&format!("{name} to be known"), SOON, || {
                Ok((self.ask(host, "status", name, &[])?.code == Some(0)).then_some(()))
            })?;
        }
        Ok(())
    }

    fn migrate(&self, from: usize, to: usize, name: &str) -> Result<Process> {
        let address = self.ring.hosts[to].address;
        let mut command = Command::new("virsh");
        command.args(["-q", "-c", qemu::URI, "migrate", "--live", name]);
        command.args([&format!("qemu+tcp://{address}/system"), &format!("tcp://{address}")]);
        Process::start(self.sites[from].hypervisor.space(), &mut command)
    }

    fn logs(&self) -> String {
        let log = |(index, site): (usize, &Site)| format!("host {}: {}\n", index + 1, site.server.log());
        self.sites.iter().enumerate().map(log).collect()
    }
}

#[test]
fn a_machine_of_another_host_is_fenced_by_name_and_by_uuid() -> Result<()> {
    let hosts = Hosts::new(2)?;
    let machine = hosts.start(1, "vm-b")?;
    let local = hosts.expect(1, "status", "vm-b", &[], 0)?;
    let took = hosts.expect(0, "off", "vm-b", &[machine], 0)?;
    eprintln!("off of a machine of the other host: {took:?}; a status beside it: {local:?}");
    hosts.sites[1].libvirtd.wait_state(qemu::URI, "vm-b", "shut off")?;
    hosts.expect(0, "status", "vm-b", &[], 2)?;
    hosts.expect(0, "off", "vm-b", &[], 0)?;
    hosts.expect(0, "on", "vm-b", &[], 0)?;
    hosts.sites[1].libvirtd.wait_state(qemu::URI, "vm-b", "running")?;
    // By UUID, with name_mode unset: stock says "off" and nobody looks.
    let machine = hosts.sites[1].machine("vm-b")?;
    hosts.expect(0, "off", UUID, &[machine], 0)?;
    hosts.expect(0, "reboot", "vm-b", &[], 0)?;
    // Nobody has ever heard of it.
    for op in ["off", "reboot", "on"] {
        hosts.expect(0, op, "nobody", &[], 1)?;
    }
    Machine::new("vm-a").start(&hosts.sites[0].libvirtd)?;
    let list = poll_until("a list of both hosts", SOON, || {
        let list = Client::new("list", &hosts.sites[0].key()).run(hosts.guest(&hosts.sites[0]))?;
        Ok((list.stdout.contains("vm-a") && list.stdout.contains("vm-b")).then_some(list))
    })?;
    ensure!(list.code == Some(0), "{list:?}");
    Ok(())
}

#[test]
fn a_machine_behind_a_cut_network_is_not_called_off() -> Result<()> {
    let hosts = Hosts::new(2)?;
    let machine = hosts.start(1, "vm-b")?;
    hosts.ring.partition(&[1])?;
    hosts.ring.wait_members(&[0])?;
    for op in ["off", "reboot", "on"] {
        hosts.expect(0, op, "vm-b", std::slice::from_ref(&machine), 1)?;
    }
    ensure!(hosts.ask(0, "status", "vm-b", &[])?.code != Some(2), "status calls it off");
    ensure!(Client::new("list", &hosts.sites[0].key()).run(hosts.guest(&hosts.sites[0]))?.code != Some(0));
    ensure!(Client::new("monitor", &hosts.sites[0].key()).run(hosts.guest(&hosts.sites[0]))?.code != Some(0));
    ensure!(!machine.is_dead()?);
    hosts.ring.heal()?;
    hosts.ring.wait_members(&[0, 1])?;
    hosts.wait_whole()?;
    hosts.expect(0, "off", "vm-b", &[machine], 0).map(drop)
}

#[test]
fn a_machine_whose_daemon_is_gone_or_stopped_is_not_called_off() -> Result<()> {
    let mut hosts = Hosts::new(3)?;
    let machine = hosts.start(1, "vm-b")?;
    hosts.sites[1].server.process().signal(Signal::SIGSTOP)?;
    hosts.expect(0, "off", "vm-b", std::slice::from_ref(&machine), 1)?;
    ensure!(!machine.is_dead()?);
    // The order is old when it goes on.
    hosts.sites[1].server.process().signal(Signal::SIGCONT)?;
    std::thread::sleep(Duration::from_secs(3));
    ensure!(!machine.is_dead()?, "a stale order killed it: {}", hosts.logs());
    hosts.sites[1].server.crash()?;
    hosts.expect(0, "off", "vm-b", std::slice::from_ref(&machine), 1)?;
    ensure!(!machine.is_dead()?);
    hosts.next_daemon(1, &Which::ours()?)?;
    hosts.wait_whole()?;
    hosts.expect(2, "off", "vm-b", &[machine], 0).map(drop)
}

#[test]
fn a_name_on_two_hosts_is_off_when_it_runs_on_neither() -> Result<()> {
    let hosts = Hosts::new(2)?;
    Machine::new("twin").uuid(UUID).define(&hosts.sites[0].libvirtd)?;
    let machine = hosts.start(1, "twin")?;
    for _ in 0..5 {
        hosts.expect(0, "status", "twin", &[], 0)?;
    }
    hosts.expect(0, "off", "twin", &[machine], 0)?;
    // Split-brain: it runs on both.
    for site in &hosts.sites {
        site.libvirtd.wait_state(qemu::URI, "twin", "shut off")?;
        site.libvirtd.start_domain(qemu::URI, "twin")?;
    }
    let both = [hosts.sites[0].machine("twin")?, hosts.sites[1].machine("twin")?];
    hosts.wait_known("twin")?;
    hosts.expect(0, "off", "twin", &both, 0).map(drop)
}

#[test]
fn a_machine_that_moves_is_off_only_when_it_runs_nowhere() -> Result<()> {
    let hosts = Hosts::new(2)?;
    for round in 0..6 {
        let name = format!("nomad{round}");
        Machine::new(&name).create_transient(&hosts.sites[0].libvirtd)?;
        hosts.wait_known(&name)?;
        let process = hosts.sites[0].machine(&name)?;
        let migration = hosts.migrate(0, 1, &name)?;
        std::thread::sleep(Duration::from_millis(round * 90));
        // Asked on the host that it goes to.
        let answer = hosts.ask(1, "off", &name, &[process])?;
        migration.ends_within(SOON)?;
        let runs = |host: usize| -> bool {
            hosts.sites[host].libvirtd.state(qemu::URI, &name).is_ok_and(|state| state == "running")
        };
        if answer.code == Some(0) {
            ensure!(!runs(0) && !runs(1), "FALSE SUCCESS in round {round}: {}", hosts.logs());
        }
        for site in &hosts.sites {
            let _ = site.libvirtd.virsh(qemu::URI, &["destroy", &name]);
        }
    }
    Ok(())
}

#[test]
fn corosync_and_libvirtd_may_fail_and_come_back() -> Result<()> {
    let mut hosts = Hosts::new(2)?;
    let machine = hosts.start(1, "vm-b")?;
    // Without corosync a host fences what runs on it, and calls nothing else off.
    let here = hosts.start_other(0, "vm-a")?;
    hosts.ring.kill(0)?;
    hosts.expect(0, "off", "vm-b", std::slice::from_ref(&machine), 1)?;
    hosts.expect(0, "off", "vm-a", &[here], 0)?;
    hosts.expect(0, "off", "vm-a", &[], 1)?;
    hosts.ring.start(0)?;
    hosts.wait_whole()?;
    // libvirt of the owner hangs: whatever is said is true.
    hosts.sites[1].libvirtd.signal(Signal::SIGSTOP)?;
    let answer = hosts.ask(0, "off", "vm-b", std::slice::from_ref(&machine))?;
    ensure!((answer.code == Some(0)) == machine.is_dead()?, "{answer:?}: {}", hosts.logs());
    hosts.sites[1].libvirtd.signal(Signal::SIGCONT)
}

/// The owner's daemon dies at each step of the order.
#[test]
fn an_owner_that_dies_in_the_middle_is_no_success() -> Result<()> {
    let mut hosts = Hosts::new(2)?;
    for point in ["after-note", "after-kill", "after-proof"] {
        hosts.sites[1].server.crash()?;
        let Which::Ours(daemon) = Which::ours()? else { bail!("no daemon of ours") };
        let faults = daemon.with_file_name("fence-daemon-faults");
        let script = format!("#!/bin/sh\nFENCE_FAULT={point} exec '{}' \"$@\"\n", faults.display());
        hosts.sites[1].hypervisor.write_mode("mortal", script.as_bytes(), 0o755)?;
        let mortal = Which::Ours(hosts.sites[1].hypervisor.path("mortal").into());
        hosts.next_daemon(1, &mortal)?;
        hosts.wait_whole()?;
        let name = format!("vm-{point}");
        Machine::new(&name).start(&hosts.sites[1].libvirtd)?;
        hosts.wait_known(&name)?;
        let machine = hosts.sites[1].machine(&name)?;
        let answer = hosts.ask(0, "off", &name, std::slice::from_ref(&machine))?;
        let died = !hosts.sites[1].server.is_running()?;
        ensure!(died, "{point}: the owner's daemon has not come to this step: {}", hosts.logs());
        ensure!(answer.code == Some(1), "{point}: {answer:?}: {}", hosts.logs());
        ensure!(machine.is_dead()? == (point != "after-note"), "{point}");
        hosts.next_daemon(1, &Which::ours()?)?;
        hosts.wait_whole()?;
        hosts.expect(0, "off", &name, &[machine], 0)?;
    }
    Ok(())
}

/// What the tests above are about, with stock's server.
#[test]
fn stock_calls_running_machines_off() -> Result<()> {
    let mut hosts = Hosts::of_stock()?;
    Machine::new("vm-b").uuid(UUID).start(&hosts.sites[1].libvirtd)?;
    let machine = hosts.sites[1].machine("vm-b")?;
    let lies = |hosts: &Hosts, name: &str, what: &str| -> Result<()> {
        let answer = hosts.run(0, "off", name)?;
        ensure!(answer.code == Some(0) && !machine.is_dead()?, "{what}: {answer:?}");
        Ok(())
    };
    lies(&hosts, "nobody", "an unknown name")?;
    lies(&hosts, UUID, "a UUID")?;
    // Its daemon is gone; then the network is cut.
    hosts.sites[1].server.crash()?;
    lies(&hosts, "vm-b", "a daemon that is gone")?;
    hosts.ring.partition(&[1])?;
    hosts.ring.wait_members(&[0])?;
    lies(&hosts, "vm-b", "a cut network")
}
