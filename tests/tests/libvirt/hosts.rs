//! `backend = "cpg"`: hosts with a corosync, a libvirtd and a server each, whose guests share no
//! segment.
//!
//! fence_virtd says "off" while a machine runs, hangs, or is deaf. Each such situation has a test
//! here that `fence-daemon` passes, and one in `stock` that shows what fence_virtd does:
//!
//! | situation | ours | fence_virtd |
//! |---|---|---|
//! | the network between the hosts is cut | `rows`: `Trouble::Cut` | `stock`: lies |
//! | the owner's daemon is stopped or has crashed | `rows`: `Crash`, `Leave` | `stock`: lies |
//! | the target is a UUID, `name_mode` is unset | `rows`: each question | `stock`: lies |
//! | it is defined on two hosts, and runs on one | `rows`: machine `twin` | `stock`: lies |
//! | a name that nobody has ever heard | here, by name and by UUID | `stock`: lies |
//! | the hosts run two releases | `rows`: a stranger in the group | `stock`: two groups, lies |
//! | two daemons run on one host | `rows`: `two_daemons_*` | `stock`: lies |
//! | a late reply to a daemon's former life | `rows`: `*_stands_still_*` | `stock`: lies |
//! | another host does not answer | `rows`: `*_stands_still_*` | `stock`: hangs for good |
//! | the daemon is deaf from its start | each test: all hosts hear all | `stock`: counted by chance |
//! | corosync restarts, hangs, or comes late | `outages` | `stock`: deaf for ever |
//! | libvirtd is stopped | `rows`, `outages` | `stock`: no answer |
//! | `list` | here: all hosts' | `stock`: the own host's |
//! | the machine migrates | here, `arrivals` | as "defined on two hosts" |
//! | a daemon dies at any step | `deaths` | – |
//! | `CS_ERR_TRY_AGAIN`, flow control | `group`: 1 MB, and as a ring breaks | `stock`: gives up |
//! | a reply before the wait has begun | `fence-common/tests/hosts`: any order | read, not shown |
//! | a message per domain and host | `fence-common/tests/hosts/cost.rs` | read, not shown |
//! | anybody in the group is believed | `rows`: a stranger in the group | read, not shown |
//! | a slow client | `rows`: `a_silent_client_*` | read, not shown |
//!
//! "Not shown" has reasons. An early reply is a race of two of fence_virtd's threads. The other
//! rows are what its source says of trust and cost, and give no wrong answer.

mod arrivals;
mod deaths;
mod doctor;
mod on;
mod outages;
mod races;
mod resets;
mod rows;
mod stock;
mod twice;

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use fence_common::wire::Op;
use fence_lab::client::Client;
use fence_lab::corosync::HostRing;
use fence_lab::lab::Space;
use fence_lab::libvirtd::Libvirtd;
use fence_lab::machine::Machine;
use fence_lab::observer::Observer;
use fence_lab::process::{Finished, Process, poll_until};
use fence_lab::qemu;
use fence_lab::server::{Config, Server, Which};
use fence_lab::witness::Witness;

use super::KEY;
use super::site::{GUEST, SOON, Site};

/// A request gets its answer within 25 s, and clients wait for 30 s.
const ANSWER: Duration = Duration::from_secs(28);
/// The domain's UUID on all hosts.
const UUID: &str = "7d3c9a52-51c1-4a0e-9d0c-2a4b6c8d0e01";

/// A cluster of hosts with the given server.
pub(super) struct Hosts {
    // Drops before the hosts.
    pub(super) sites: Vec<Site>,
    pub(super) ring: HostRing,
}

impl Hosts {
    pub(super) fn new(count: u8) -> Result<Self> {
        let hosts = Self::with(&Which::ours()?, count)?;
        hosts.wait_whole()?;
        Ok(hosts)
    }

    pub(super) fn with(which: &Which, count: u8) -> Result<Self> {
        Self::on(which, HostRing::new(count)?)
    }

    /// On these hosts, whose corosync may be in any state.
    pub(super) fn on(which: &Which, ring: HostRing) -> Result<Self> {
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

    /// Starts the next server of a host.
    pub(super) fn next_daemon(&mut self, host: usize, which: &Which) -> Result<()> {
        let site = &mut self.sites[host];
        site.server = Server::start(&site.hypervisor, which, &site.config)?;
        Ok(())
    }

    /// Waits until each host's monitor says that all is well.
    pub(super) fn wait_whole(&self) -> Result<()> {
        for site in &self.sites {
            poll_until("all hosts to be well", SOON, || {
                Ok((Client::new("monitor", &site.key()).run(self.guest(site))?.code == Some(0)).then_some(()))
            })
            .with_context(|| self.logs())?;
        }
        Ok(())
    }

    pub(super) fn guest<'a>(&self, site: &'a Site) -> &'a Space {
        site.observer.guest().space()
    }

    /// Asks on one host about a machine of any: a success while one of these lives is an error.
    pub(super) fn ask(&self, host: usize, op: &str, domain: &str, victims: &[Witness]) -> Result<Finished> {
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
    pub(super) fn expect(
        &self,
        host: usize,
        op: &str,
        domain: &str,
        victims: &[Witness],
        code: i32,
    ) -> Result<Duration> {
        let answer = self.ask(host, op, domain, victims)?;
        ensure!(answer.code == Some(code), "{op} of {domain}: {code} expected, not {answer:?}: {}", self.logs());
        Ok(answer.elapsed)
    }

    /// Asks on one host, all at once: the replies. A success while one of these lives is an error.
    pub(super) fn ask_all(&self, host: usize, questions: &[(Op, &str)], victims: &[Witness]) -> Result<Vec<u8>> {
        let observer = &self.sites[host].observer;
        let ask = |(op, domain): &(Op, &str)| observer.ask_about(&KEY, *op, domain, victims);
        let replies: Result<Vec<u8>> = std::thread::scope(|scope| {
            let asking: Vec<_> = questions.iter().map(|question| scope.spawn(|| ask(question))).collect();
            asking.into_iter().map(|one| one.join().map_err(|_| anyhow!("a client panicked"))?).collect()
        });
        replies.with_context(|| self.logs())
    }

    /// Starts a machine on a host: its process.
    pub(super) fn start(&self, host: usize, name: &str) -> Result<Witness> {
        Machine::new(name).uuid(UUID).start(&self.sites[host].libvirtd)?;
        let machine = self.sites[host].machine(name)?;
        self.wait_known(name)?;
        Ok(machine)
    }

    /// As [`Self::start`], with a UUID of its own.
    pub(super) fn start_other(&self, host: usize, name: &str) -> Result<Witness> {
        Machine::new(name).start(&self.sites[host].libvirtd)?;
        self.wait_known(name)?;
        self.sites[host].machine(name)
    }

    /// Waits until all hosts say that it runs.
    pub(super) fn wait_known(&self, name: &str) -> Result<()> {
        for host in 0..self.sites.len() {
            poll_until(&format!("{name} to be known"), SOON, || {
                Ok((self.ask(host, "status", name, &[])?.code == Some(0)).then_some(()))
            })?;
        }
        Ok(())
    }

    pub(super) fn migrate(&self, from: usize, to: usize, name: &str, options: &[&str]) -> Result<Process> {
        let address = self.ring.hosts[to].address;
        let mut command = Command::new("virsh");
        command.args(["-q", "-c", qemu::URI, "migrate", "--live"]).args(options).arg(name);
        command.args([&format!("qemu+tcp://{address}/system"), &format!("tcp://{address}")]);
        Process::start(self.sites[from].hypervisor.space(), &mut command)
    }

    pub(super) fn logs(&self) -> String {
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
        hosts.expect(0, op, "00000000-dead-4000-8000-000000000000", &[], 1)?;
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
        let migration = hosts.migrate(0, 1, &name, &[])?;
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
