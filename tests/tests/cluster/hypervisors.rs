//! Two hypervisors on one segment, each with a libvirtd and a daemon: both receive every request.
//!
//! docs/guide/several-hypervisors.md describes the behaviour that these tests show.

use std::cell::RefCell;
use std::net::Ipv4Addr;
use std::ops::Deref;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use fence_common::wire::DEFAULT_PORT;
use fence_lab::client::Client;
use fence_lab::lab::Hypervisor;
use fence_lab::libvirtd::Libvirtd;
use fence_lab::machine::{FILLING, Machine};
use fence_lab::observer::Observer;
use fence_lab::process::{Finished, Process, poll_until};
use fence_lab::qemu::{self, URI};
use fence_lab::server::{Config, Server, Which};
use fence_lab::timings::Fence;
use fence_lab::witness::Witness;
use nix::sys::signal::Signal;

/// Both hypervisors' key.
const KEY: [u8; 512] = [0x6b; 512];
/// Numbers of the guests that send requests: from here on the first host, from [`OTHERS`] on the
/// second. libvirt numbers its own machines' ports from 0.
const GUEST: u8 = 90;
const OTHERS: u8 = 50;
/// The rest of a guest between two requests. A late callback of the other host could reach the
/// guest's next client and make it fail.
const REST: Duration = Duration::from_secs(5);
/// The port of a second host's own listener.
const OTHER_PORT: u16 = 1230;
/// How long an operation of milliseconds may take on a loaded machine.
const SOON: Duration = Duration::from_secs(30);
/// The log line of a host that has received a request, and was not needed.
const SILENT: &str = "nobody waits for our answer";

/// The host, of the two, that a guest or a machine is on.
const HERE: usize = 0;
const THERE: usize = 1;
const BOTH: [usize; 2] = [HERE, THERE];

/// A guest that sends requests. Its rest begins when this is dropped.
struct Requester<'a> {
    host: &'a SecondHost,
    number: usize,
    observer: Observer,
}

impl Deref for Requester<'_> {
    type Target = Observer;

    fn deref(&self) -> &Observer {
        &self.observer
    }
}

impl Drop for Requester<'_> {
    fn drop(&mut self) {
        if let Some((_, rests)) = self.host.guests.borrow_mut().get_mut(self.number) {
            *rests = Some(Instant::now());
        }
    }
}

struct SecondHost {
    server: Option<Server>,
    libvirtd: Libvirtd,
    number: usize,
    /// The guests on this host, and the time of each one's last request; `None` while it sends one.
    guests: RefCell<Vec<(Observer, Option<Instant>)>>,
    config: Config,
    hypervisor: Hypervisor,
}

impl SecondHost {
    fn new(number: usize, hypervisor: Hypervisor, which: &Which) -> Result<Self> {
        // libvirt tells hosts apart by UUID, and both labs have this machine's, so each gets its
        // own.
        let config = format!(
            "listen_tls = 0\nlisten_tcp = 1\nauth_tcp = \"none\"\nhost_uuid = \"00000000-0000-4000-8000-00000000000{number}\"\n"
        );
        let libvirtd = Libvirtd::start_with(&hypervisor, &config, &["--listen"])?;
        let key = hypervisor.write("fence.key", &KEY)?;
        let mut config = Config::new(&key);
        config.uris = vec![URI.to_owned()];
        let server = Some(Server::start(&hypervisor, which, &config)?);
        Ok(Self { server, libvirtd, number, guests: RefCell::default(), config, hypervisor })
    }

    /// A guest that has rested.
    fn asker(&self) -> Result<Requester<'_>> {
        let mut guests = self.guests.borrow_mut();
        let rested = |(_, rests): &(Observer, Option<Instant>)| rests.is_some_and(|since| since.elapsed() > REST);
        let number = guests.iter().position(rested).unwrap_or(guests.len());
        if number == guests.len() {
            let name = GUEST + OTHERS * u8::try_from(self.number)? + u8::try_from(number)?;
            let guest = self.hypervisor.guest(name)?;
            guests.push((Observer::new(&self.hypervisor, guest, &self.config.key_file), None));
        }
        let (observer, rests) = guests.get_mut(number).context("no such guest")?;
        *rests = None;
        Ok(Requester { host: self, number, observer: observer.clone() })
    }

    fn server(&self) -> Result<&Server> {
        self.server.as_ref().context("the daemon is down")
    }

    fn log(&self) -> String {
        self.server.as_ref().map_or_else(|| "down".to_owned(), Server::log)
    }

    fn stop_daemon(&mut self) -> Result<()> {
        self.server.take().context("the daemon is down")?.stop(Signal::SIGTERM).map(drop)
    }

    fn start_daemon(&mut self) -> Result<()> {
        self.server = Some(Server::start(&self.hypervisor, &Which::ours()?, &self.config)?);
        Ok(())
    }

    fn machine(&self, name: &str) -> Result<Witness> {
        Witness::of_qemu(&self.hypervisor, name)
    }

    /// The processes of this name here, according to the kernel.
    fn runs(&self, name: &str) -> Result<bool> {
        let machines = Witness::of_all(&self.hypervisor, name)?;
        Ok(machines.iter().any(|machine| machine.is_dead().is_ok_and(|dead| !dead)))
    }

    /// Waits until the daemon has logged an answer to this guest, from `position` on. `None` if the
    /// log says that none was needed.
    fn answered(&self, position: usize, op: &str, domain: &str, guest: Ipv4Addr) -> Result<Option<Fence>> {
        let told = |line: &str| {
            let about = line.contains(&format!("op={op} domain={domain} source={guest} "));
            let fence = Fence::parse(line).filter(|_| about);
            if fence.is_none() && !(about && line.contains(SILENT)) { None } else { Some(fence) }
        };
        self.server()?.wait_log(position, SOON, told).with_context(|| format!("nothing about {domain}: {}", self.log()))
    }
}

struct Segment {
    hosts: [SecondHost; 2],
}

impl Segment {
    /// Two hosts with these servers.
    fn of(servers: [Which; 2]) -> Result<Self> {
        let [one, other] = Hypervisor::pair()?;
        let hosts = [SecondHost::new(HERE, one, &servers[HERE])?, SecondHost::new(THERE, other, &servers[THERE])?];
        Ok(Self { hosts })
    }

    fn new() -> Result<Self> {
        Self::of([Which::ours()?, Which::ours()?])
    }

    fn logs(&self) -> String {
        format!("here: {}there: {}", self.hosts[HERE].log(), self.hosts[THERE].log())
    }

    /// Sends a request from a guest on one host. After the answer "off", no machine of this name
    /// may live on either host.
    fn fence(&self, from: usize, op: &str, domain: &str) -> Result<(Finished, Ipv4Addr)> {
        let mut victims = Vec::new();
        for host in &self.hosts {
            victims.extend(Witness::of_all(&host.hypervisor, domain)?);
        }
        self.fence_knowing(from, op, domain, victims)
    }

    /// Like [`Self::fence`], with these victims.
    fn fence_knowing(
        &self,
        from: usize,
        op: &str,
        domain: &str,
        victims: Vec<Witness>,
    ) -> Result<(Finished, Ipv4Addr)> {
        let observer = self.hosts[from].asker()?;
        let client = Client::new(op, &self.hosts[from].config.key_file).domain(domain);
        let asked = observer.start_with(client, op, domain, victims)?;
        let answer = asked.finish().map_err(|error| anyhow!("{error:#}\n{}", self.logs()))?;
        Ok((answer, observer.guest().v4))
    }

    /// Like [`Self::fence`]; the request must end with this exit code.
    fn expect(&self, from: usize, op: &str, domain: &str, code: i32) -> Result<Ipv4Addr> {
        let (answer, guest) = self.fence(from, op, domain)?;
        ensure!(answer.code == Some(code), "{op} of {domain}: {code} expected, not {answer:?}\n{}", self.logs());
        Ok(guest)
    }

    /// Like [`Self::expect`]; `owner` must answer.
    fn expect_of(&self, owner: usize, from: usize, op: &str, domain: &str, code: i32) -> Result<Ipv4Addr> {
        let host = &self.hosts[owner];
        let position = host.server()?.log_position();
        let guest = self.expect(from, op, domain, code)?;
        let answer = host.answered(position, op, domain, guest)?;
        ensure!(answer.is_some(), "{op} of {domain} was not answered by host {owner}: {}", self.logs());
        Ok(guest)
    }

    /// Like [`Self::expect_of`]; the other host must log that it was not needed.
    fn expect_only_of(&self, owner: usize, from: usize, op: &str, domain: &str, code: i32) -> Result<()> {
        let other = &self.hosts[1 - owner];
        let position = other.server()?.log_position();
        let guest = self.expect_of(owner, from, op, domain, code)?;
        let answer = other.answered(position, op, domain, guest)?;
        ensure!(answer.is_none(), "{op} of {domain}: not to be answered by host {}: {answer:?}", 1 - owner);
        Ok(())
    }

    /// The only host that a machine runs on.
    fn only_place(&self, name: &str) -> Result<usize> {
        match (self.hosts[HERE].runs(name)?, self.hosts[THERE].runs(name)?) {
            (true, false) => Ok(HERE),
            (false, true) => Ok(THERE),
            both => bail!("{name} runs on {both:?}"),
        }
    }

    /// Begins the migration of a machine.
    fn migrate(&self, from: usize, to: usize, name: &str, options: &[&str]) -> Result<Process> {
        let address = self.hosts[to].hypervisor.v4();
        let mut command = Command::new("virsh");
        command.args(["-q", "-c", URI, "migrate", "--live", "--persistent"]).args(options).arg(name);
        command.args([format!("qemu+tcp://{address}/system"), format!("tcp://{address}")]);
        Process::start(self.hosts[from].hypervisor.space(), &mut command)
    }
}

#[test]
fn the_host_that_has_the_domain_answers_and_the_other_is_silent() -> Result<()> {
    let segment = Segment::new()?;
    for owner in BOTH {
        let name = format!("web{owner}");
        qemu::start_idle(&segment.hosts[owner].libvirtd, &name)?;
    }
    for (owner, from) in BOTH.into_iter().zip([THERE, HERE]) {
        let name = format!("web{owner}");
        segment.expect_of(owner, owner, "status", &name, 0)?;
        segment.expect_of(owner, owner, "reboot", &name, 0)?;
        segment.expect_of(owner, from, "reboot", &name, 0)?;
        segment.expect_only_of(owner, from, "off", &name, 0)?;
        // The domain is known on one host and shut off. The client must not believe the host that
        // does not know it.
        segment.expect_only_of(owner, from, "off", &name, 0)?;
        segment.expect_of(owner, from, "on", &name, 0)?;
        ensure!(segment.only_place(&name)? == owner);
    }
    // Neither host knows the domain.
    segment.expect(HERE, "off", "nobody", 1).map(drop)
}

#[test]
fn a_list_is_that_of_the_host_that_answers() -> Result<()> {
    let segment = Segment::new()?;
    for owner in BOTH {
        qemu::start_idle(&segment.hosts[owner].libvirtd, &format!("web{owner}"))?;
    }
    for from in BOTH {
        let list = segment.hosts[from].asker()?.list()?.success()?.stdout;
        let listed: Vec<_> = list.lines().filter_map(|line| line.split_whitespace().next()).collect();
        ensure!(listed == ["web0"] || listed == ["web1"], "{list}");
        let key = &segment.hosts[from].config.key_file;
        Client::new("monitor", key).run(segment.hosts[from].asker()?.guest().space())?.success()?;
    }
    // The host that was too late logs no warning.
    ensure!(!segment.logs().contains("callback failed"), "{}", segment.logs());
    Ok(())
}

#[test]
fn while_the_daemon_of_its_host_is_down_it_is_no_success() -> Result<()> {
    let mut segment = Segment::new()?;
    qemu::start_idle(&segment.hosts[THERE].libvirtd, "web")?;
    let machine = segment.hosts[THERE].machine("web")?;
    segment.hosts[THERE].stop_daemon()?;
    segment.expect_of(HERE, HERE, "off", "web", 1)?;
    segment.expect_of(HERE, THERE, "reboot", "web", 1)?;
    segment.expect_of(HERE, HERE, "on", "web", 1)?;
    ensure!(!machine.is_dead()?);
    segment.hosts[THERE].start_daemon()?;
    segment.expect_of(THERE, HERE, "off", "web", 0)?;
    ensure!(machine.is_dead()?);
    Ok(())
}

#[test]
fn a_shared_name_means_the_domain_that_runs() -> Result<()> {
    let segment = Segment::new()?;
    for host in &segment.hosts {
        qemu::define_idle(&host.libvirtd, "twin")?;
    }
    for (owner, from) in BOTH.into_iter().zip([THERE, HERE]) {
        let host = &segment.hosts[owner];
        host.libvirtd.start_domain(URI, "twin")?;
        segment.expect_of(owner, from, "status", "twin", 0)?;
        segment.expect_of(owner, from, "on", "twin", 0)?;
        segment.expect_of(owner, from, "reboot", "twin", 0)?;
        // The request comes while the domain is down, and it still belongs to this host.
        segment.expect_of(owner, from, "on", "twin", 0)?;
        ensure!(segment.only_place("twin")? == owner);
        segment.expect_of(owner, from, "off", "twin", 0)?;
        host.libvirtd.wait_state(URI, "twin", "shut off")?;
    }
    // No machine runs: one of the two is started, never both.
    segment.expect(HERE, "on", "twin", 0)?;
    let place = segment.only_place("twin")?;
    segment.expect_of(place, HERE, "on", "twin", 0)?;
    ensure!(segment.only_place("twin")? == place);
    Ok(())
}

/// Each host answers for itself, and the client believes the first. Two running machines of one
/// name are a mistake that only an administrator can see.
#[test]
fn two_domains_of_one_name_die_before_success() -> Result<()> {
    let segment = Segment::new()?;
    for host in &segment.hosts {
        qemu::start_idle(&host.libvirtd, "twin")?;
    }
    for host in &segment.hosts {
        // A host that does not know the domain yet asks libvirt, which may take longer than the
        // client waits.
        host.server()?.wait_domain("twin", "running")?;
    }
    let twins = [segment.hosts[HERE].machine("twin")?, segment.hosts[THERE].machine("twin")?];
    let position =
        segment.hosts.iter().map(|host| host.server().map(Server::log_position)).collect::<Result<Vec<_>>>()?;
    let (answer, _) = segment.fence_knowing(HERE, "off", "twin", Vec::new())?;
    ensure!(answer.code == Some(0), "{answer:?}");
    let survivor = segment.only_place("twin")?;
    ensure!(twins[1 - survivor].is_dead()?);
    // The host where the other machine lives logs it.
    let says = |line: &str| line.contains("although it runs here").then_some(());
    let told = segment.hosts[survivor].server()?.wait_log(position[survivor], SOON, says);
    told.with_context(|| format!("no log says that the other machine lives\n{}", segment.logs()))?;
    segment.expect_of(survivor, HERE, "off", "twin", 0)?;
    ensure!(twins[survivor].is_dead()?);
    Ok(())
}

#[test]
fn a_machine_that_has_moved_is_the_new_hosts() -> Result<()> {
    let mut segment = Segment::new()?;
    Machine::new("nomad").start(&segment.hosts[HERE].libvirtd)?;
    segment.migrate(HERE, THERE, "nomad", &[])?.finish(SOON)?.success()?;
    ensure!(segment.only_place("nomad")? == THERE);
    for from in BOTH {
        segment.expect_of(THERE, from, "status", "nomad", 0)?;
        segment.expect_of(THERE, from, "reboot", "nomad", 0)?;
        segment.expect_of(THERE, from, "off", "nomad", 0)?;
        // The old host has a definition as well, and does not start it.
        segment.expect_of(THERE, from, "on", "nomad", 0)?;
        ensure!(segment.only_place("nomad")? == THERE);
    }
    // The old host knows the domain as shut off and as migrated away.
    segment.hosts[THERE].stop_daemon()?;
    segment.expect_of(HERE, HERE, "off", "nomad", 1)?;
    segment.expect_of(HERE, HERE, "on", "nomad", 1)?;
    ensure!(segment.only_place("nomad")? == THERE);
    Ok(())
}

#[test]
fn a_machine_that_is_on_its_way_is_the_old_hosts() -> Result<()> {
    let segment = Segment::new()?;
    // All pages differ, and none is empty, so there is data to copy.
    let pages = (0..FILLING / 8).map(|number| (number as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes());
    let filling: Vec<u8> = pages.flatten().collect();
    let file = segment.hosts[HERE].hypervisor.write("filling", &filling)?;
    segment.hosts[THERE].hypervisor.write("filling", &filling)?;
    let libvirtd = &segment.hosts[HERE].libvirtd;
    Machine::new("traveller").filled(&file).start(libvirtd)?;
    let process = segment.hosts[HERE].machine("traveller")?;
    let migration = segment.migrate(HERE, THERE, "traveller", &["--bandwidth", "1"])?;
    poll_until("a migration", SOON, || {
        ensure!(!migration.ends_within(Duration::ZERO)?, "the migration has ended: {}", migration.stderr().text());
        let job = libvirtd.virsh(URI, &["domjobinfo", "traveller"])?.stdout;
        Ok((job.contains("Unbounded") && job.contains("Memory total")).then_some(()))
    })?;
    let twin = segment.hosts[THERE].machine("traveller")?;
    // The destination host would have to reject the request.
    segment.expect_of(HERE, THERE, "status", "traveller", 0)?;
    let (answer, _) = segment.fence_knowing(THERE, "off", "traveller", vec![process])?;
    ensure!(answer.code == Some(0), "{answer:?}\n{}", segment.logs());
    ensure!(migration.finish(SOON)?.code != Some(0), "the migration has succeeded");
    ensure!(twin.dies_within(SOON)?, "the machine still lives on the destination");
    Ok(())
}

/// Both hosts define a machine, and its own host's daemon is down: the other host would answer
/// "already off". Fence devices with separate ports prevent this: each speaks for one host.
#[test]
fn with_a_port_of_its_own_each_host_speaks_for_itself() -> Result<()> {
    let mut segment = Segment::new()?;
    for host in &segment.hosts {
        qemu::define_idle(&host.libvirtd, "twin")?;
    }
    segment.hosts[THERE].stop_daemon()?;
    segment.hosts[THERE].config.port = Some(OTHER_PORT);
    segment.hosts[THERE].start_daemon()?;
    segment.hosts[THERE].libvirtd.start_domain(URI, "twin")?;
    let machine = segment.hosts[THERE].machine("twin")?;
    let off = |segment: &Segment, port: u16, timeout: u32| -> Result<Finished> {
        let host = &segment.hosts[HERE];
        let client = Client::new("off", &host.config.key_file).domain("twin").port(port).timeout(timeout);
        client.run(host.asker()?.guest().space())
    };
    segment.hosts[THERE].stop_daemon()?;
    ensure!(off(&segment, DEFAULT_PORT, 30)?.code == Some(0) && !machine.is_dead()?, "not off by definition");
    // No daemon listens on this port.
    ensure!(off(&segment, OTHER_PORT, 3)?.code != Some(0) && !machine.is_dead()?, "answered on the other port");
    segment.hosts[THERE].start_daemon()?;
    ensure!(off(&segment, OTHER_PORT, 30)?.code == Some(0) && machine.is_dead()?);
    Ok(())
}

/// One host still has fence_virtd: it fences its own machines, and ours does not interfere. It
/// calls back at once about unknown domains, so for machines of our host either may be first.
#[test]
fn beside_a_stock_server() -> Result<()> {
    let segment = Segment::of([Which::Stock, Which::ours()?])?;
    for host in BOTH {
        qemu::start_idle(&segment.hosts[host].libvirtd, &format!("web{host}"))?;
    }
    for from in BOTH {
        segment.expect(from, "status", "web0", 0)?;
        segment.expect(from, "off", "web0", 0)?;
        segment.expect(from, "on", "web0", 0)?;
        if !segment.hosts[THERE].runs("web1")? {
            segment.hosts[THERE].libvirtd.wait_state(URI, "web1", "shut off")?;
            segment.hosts[THERE].libvirtd.start_domain(URI, "web1")?;
        }
        let (answer, _) = segment.fence(from, "off", "web1")?;
        let runs = segment.hosts[THERE].runs("web1")?;
        ensure!(matches!((answer.code, runs), (Some(0), false) | (Some(1), true)), "{runs} {answer:?}");
    }
    Ok(())
}
