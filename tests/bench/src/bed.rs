//! The bench's lab: one hypervisor with libvirt, the machines that die, and the guests that ask.

use std::io::{self, BufRead as _, BufReader, Write as _};
use std::net::Ipv4Addr;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use fence_common::wire::Op;

use super::caller::{self, PATIENCE};
use super::figures::Contender;
use super::measure::resident;
use fence_lab::client::Family;
use fence_lab::container;
use fence_lab::lab::{Guest, HYPERVISOR_V4, Hypervisor};
use fence_lab::libvirtd::Libvirtd;
use fence_lab::machine::Machine;
use fence_lab::peer::Peer;
use fence_lab::process::poll_until;
use fence_lab::qemu::{self, LinuxGuest};
use fence_lab::server::{Config, START_LIMIT, Server, Which};
use fence_lab::witness::Witness;

/// Any key will do; this one is as long as Debian's.
pub const KEY: [u8; 4096] = [0x5a; 4096];
/// The memory of [`Victim::Touched`], in MiB.
const TOUCHED_MIB: u32 = 4096;
/// How many addresses storms and crowds come from.
const ADDRESSES: u8 = 100;
/// The pause after the start of a machine or a server. Their own start-up work is not measured.
const SETTLE: Duration = Duration::from_millis(300);
/// How long libvirt may take to bring a machine up.
const UP_LIMIT: Duration = Duration::from_secs(60);

/// A machine that is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Victim {
    /// QEMU, 16 MiB, firmware only.
    Idle,
    /// QEMU, 192 MiB, Linux.
    Booted,
    /// QEMU, 4 GiB, every page of it in use.
    Touched,
    /// An LXC container.
    Container,
}

impl Victim {
    /// Its name for libvirt and in the figures.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Booted => "booted",
            Self::Touched => "touched",
            Self::Container => "container",
        }
    }

    /// libvirt's driver for it.
    #[must_use]
    pub fn uri(self) -> &'static str {
        match self {
            Self::Idle | Self::Booted | Self::Touched => qemu::URI,
            Self::Container => container::URI,
        }
    }
}

/// A server and how long it took to come up.
#[derive(Debug)]
pub struct Serving {
    /// The server.
    pub server: Server,
    /// Until it said that it is ready, or its port was bound.
    pub ready: Duration,
    /// Until it had answered a request.
    pub answered: Duration,
}

/// The lab.
#[derive(Debug)]
pub struct Bed {
    /// The hypervisor.
    pub hypervisor: Hypervisor,
    /// Its libvirt.
    pub libvirtd: Libvirtd,
    /// The guest that asks.
    pub asker: Guest,
    /// The guest whose many addresses storms and silent callers come from.
    pub crowd: Guest,
    /// A guest whose many addresses do not answer.
    pub dead: Guest,
    /// The key file, as the lab sees it.
    pub key: String,
    ours: Which,
}

/// The addresses of [`Bed::crowd`] or [`Bed::dead`].
fn addresses(first: u8) -> Vec<Ipv4Addr> {
    (0..ADDRESSES).map(|at| Ipv4Addr::new(192, 168, 122, first.saturating_add(at))).collect()
}

impl Bed {
    /// Makes the lab. No machine runs in it yet.
    pub fn new(ours: Which) -> Result<Self> {
        let hypervisor = Hypervisor::new()?;
        let libvirtd = Libvirtd::start(&hypervisor)?;
        let (asker, crowd, dead) = (hypervisor.guest(1)?, hypervisor.guest(2)?, hypervisor.guest(3)?);
        let key = hypervisor.write("fence.key", &KEY)?;
        let bed = Self { hypervisor, libvirtd, asker, crowd, dead, key, ours };
        // These addresses answer no ARP request, yet a request from them is genuine.
        bed.dead.space().must("sh", &["-c", "echo 8 > /proc/sys/net/ipv4/conf/eth0/arp_ignore"])?;
        for (guest, addresses) in [(&bed.crowd, bed.crowd_addresses()), (&bed.dead, bed.dead_addresses())] {
            let lines = addresses.iter().map(|at| format!("ip addr add {at}/24 dev eth0")).collect::<Vec<_>>();
            guest.space().must("sh", &["-c", &lines.join("\n")])?;
        }
        Ok(bed)
    }

    /// Addresses of storms and of silent callers.
    #[must_use]
    pub fn crowd_addresses(&self) -> Vec<Ipv4Addr> {
        addresses(40)
    }

    /// Addresses that do not answer.
    #[must_use]
    pub fn dead_addresses(&self) -> Vec<Ipv4Addr> {
        addresses(145)
    }

    /// A client in the asking guest.
    pub fn peer(&self) -> Result<Peer> {
        Peer::new(&self.asker, &KEY, Family::V4)
    }

    /// Starts a server for the machines of one driver.
    pub fn serve(&self, contender: Contender, uri: &str) -> Result<Serving> {
        let which = self.which(contender)?;
        let config = Config { uris: vec![uri.to_owned()], ..Config::new(&self.key) };
        let peer = self.peer()?;
        // The one before may just have been killed, and the kernel be taking down what it had.
        std::thread::sleep(SETTLE);
        let begin = Instant::now();
        let server = Server::spawn(&self.hypervisor, &which, &config, &[])?;
        let (ready, answered) = std::thread::scope(|scope| {
            // Asks from the start on, as often as the machine bears. The server answers the first
            // request that it receives.
            let answer =
                scope.spawn(|| caller::ask_every(&peer, Op::DevStatus, "", START_LIMIT, Duration::from_millis(5)));
            let ready = Self::ready(&server, begin);
            let answer = answer.join().map_err(|_| anyhow::anyhow!("the client panicked"));
            anyhow::Ok((ready?, answer??.context("no answer from a server that has started")?.replied - begin))
        })
        .with_context(|| format!("{}'s log: {}", contender.name(), server.log()))?;
        server.wait_settled(START_LIMIT)?;
        std::thread::sleep(SETTLE);
        Ok(Serving { server, ready, answered })
    }

    /// Starts a server that listens at tcp, ours at multicast as well.
    pub fn serve_by_tcp(&self, contender: Contender, uri: &str) -> Result<Server> {
        let tcp = vec![("address", HYPERVISOR_V4.to_string()), ("key_file", self.key.clone())];
        let config = Config { uris: vec![uri.to_owned()], tcp: Some(tcp), ..Config::new(&self.key) };
        std::thread::sleep(SETTLE);
        let server = Server::start(&self.hypervisor, &self.which(contender)?, &config)?;
        std::thread::sleep(SETTLE);
        Ok(server)
    }

    /// The server of a contender.
    pub(crate) fn which(&self, contender: Contender) -> Result<Which> {
        match contender {
            Contender::Ours => Ok(self.ours.clone()),
            Contender::Stock => Ok(Which::Stock),
            Contender::Bare => bail!("the bare limit needs no server"),
        }
    }

    fn ready(server: &Server, begin: Instant) -> Result<Duration> {
        while begin.elapsed() < START_LIMIT {
            if server.is_ready()? {
                return Ok(begin.elapsed());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        bail!("not ready within {START_LIMIT:?}")
    }

    /// Defines a machine; `0..` for more of a kind.
    pub fn define(&self, victim: Victim) -> Result<()> {
        match victim {
            Victim::Idle => qemu::define_idle(&self.libvirtd, victim.name()),
            Victim::Touched => Machine::new(victim.name()).touched(TOUCHED_MIB).define(&self.libvirtd),
            Victim::Booted => {
                LinuxGuest::boot(&self.libvirtd, victim.name(), 1, &KEY)?;
                self.remove(victim)
            }
            Victim::Container => {
                container::start(&self.libvirtd, victim.name())?;
                self.remove(victim)
            }
        }
    }

    /// Ends a machine by libvirt's means, if it runs.
    pub fn remove(&self, victim: Victim) -> Result<()> {
        if self.libvirtd.state(victim.uri(), victim.name())? == "running" {
            // It may end by itself meanwhile; what it comes to is waited for.
            let _ = self.libvirtd.virsh(victim.uri(), &["destroy", victim.name()]);
        }
        self.wait_off(victim)
    }

    /// Waits until libvirt notices that a machine is dead. Until then libvirt calls it running.
    pub fn wait_off(&self, victim: Victim) -> Result<()> {
        self.libvirtd.wait_state(victim.uri(), victim.name(), "shut off")
    }

    /// Brings a machine up, and to where nothing more happens in it.
    pub fn bring_up(&self, victim: Victim) -> Result<Witness> {
        let (uri, name) = (victim.uri(), victim.name());
        if self.libvirtd.state(uri, name)? != "running" {
            self.libvirtd.wait_state(uri, name, "shut off")?;
            self.libvirtd.start_domain(uri, name)?;
        }
        if victim == Victim::Booted {
            LinuxGuest::connect(&self.hypervisor, name)?;
        }
        std::thread::sleep(SETTLE);
        let witness = self.witness(victim)?;
        if victim == Victim::Touched {
            let resident = resident(witness.pid)?;
            ensure!(resident >= f64::from(TOUCHED_MIB) * 1024.0 * 1024.0, "of its memory only {resident} B are in use");
        }
        Ok(witness)
    }

    /// The process whose death is the machine's.
    pub fn witness(&self, victim: Victim) -> Result<Witness> {
        match victim {
            Victim::Idle | Victim::Booted | Victim::Touched => Witness::of_qemu(&self.hypervisor, victim.name()),
            Victim::Container => Witness::of_container(&self.hypervisor, victim.name()),
        }
    }

    /// What libvirt has written down of a running machine: its process number and whether it runs.
    fn recorded(&self, victim: Victim) -> Option<(String, bool)> {
        let driver = if victim == Victim::Container { "lxc" } else { "qemu" };
        let file = self.hypervisor.outside(&format!("/run/libvirt/{driver}/{}.xml", victim.name()));
        let text = std::fs::read_to_string(file).ok()?;
        let head = text.lines().find(|line| line.contains("<domstatus"))?.to_owned();
        let pid = head.split("pid='").nth(1)?.split('\'').next()?.to_owned();
        Some((pid, head.contains("state='running'")))
    }

    /// Starts to look for a machine's next life: see [`Rebirth::wait`].
    pub fn expect_rebirth(&self, victim: Victim) -> Result<Rebirth<'_>> {
        let (old, _) = self.recorded(victim).with_context(|| format!("{} does not run", victim.name()))?;
        Ok(Rebirth { bed: self, victim, old })
    }

    /// Has libvirt start a machine that is off, with no server between: the time until it runs.
    pub fn create(&self, victim: Victim) -> Result<Duration> {
        let mut virsh = Command::new("virsh");
        virsh.args(["-q", "-c", victim.uri()]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut virsh = self.hypervisor.space().spawn(&mut virsh)?;
        let (Some(mut types), Some(prints)) = (virsh.stdin.take(), virsh.stdout.take()) else { bail!("no pipes") };
        // Once it answers it is connected.
        writeln!(types, "uri")?;
        let is_answer = |line: &io::Result<String>| line.as_ref().is_ok_and(|line| line.ends_with(victim.uri()));
        let mut lines = BufReader::new(prints).lines();
        ensure!(lines.any(|line| is_answer(&line)), "virsh does not answer");
        let begin = Instant::now();
        writeln!(types, "start {}", victim.name())?;
        drop(types);
        while !self.recorded(victim).is_some_and(|(_, runs)| runs) {
            ensure!(begin.elapsed() < UP_LIMIT, "{} is not running within {UP_LIMIT:?}", victim.name());
            std::thread::sleep(Duration::from_millis(2));
        }
        let took = begin.elapsed();
        ensure!(lines.all(|line| line.is_ok()) && virsh.wait()?.success(), "virsh has failed");
        Ok(took)
    }

    /// Defines the machines of a storm.
    pub fn define_storm(&self, count: usize) -> Result<()> {
        for name in storm_names(count) {
            qemu::define_idle(&self.libvirtd, &name)?;
        }
        Ok(())
    }

    /// Brings up the machines of a storm.
    pub fn bring_up_storm(&self, count: usize) -> Result<Vec<Witness>> {
        let names = storm_names(count);
        poll_until("the last storm's machines to be gone", UP_LIMIT, || {
            let running = self.libvirtd.virsh(qemu::URI, &["list", "--name"])?.stdout;
            Ok((!running.lines().any(|line| names.iter().any(|name| name == line.trim()))).then_some(()))
        })?;
        // One virsh for some of them: starting it takes longer than what it asks for.
        for some in names.chunks(10) {
            let commands = some.iter().map(|name| format!("start {name}")).collect::<Vec<_>>();
            self.libvirtd.virsh(qemu::URI, &[&commands.join("; ")])?;
        }
        std::thread::sleep(3 * SETTLE);
        names.iter().map(|name| Witness::of_qemu(&self.hypervisor, name)).collect()
    }

    /// The round trip of a status; `None` if the server takes longer than a stock client waits.
    pub fn status(&self, peer: &Peer, domain: &str) -> Result<Option<Duration>> {
        Ok(caller::ask(peer, Op::Status, domain, PATIENCE)?.map(|answer| answer.took()))
    }
}

/// The names of a storm's machines.
#[must_use]
pub fn storm_names(count: usize) -> Vec<String> {
    (0..count).map(|number| format!("storm{number}")).collect()
}

/// A machine that is to come up again, as another process.
#[derive(Debug)]
pub struct Rebirth<'a> {
    bed: &'a Bed,
    victim: Victim,
    old: String,
}

impl Rebirth<'_> {
    /// Waits until libvirt records that another process runs the machine: the time, to 2 ms.
    pub fn wait(&self) -> Result<Instant> {
        let deadline = Instant::now() + UP_LIMIT;
        while Instant::now() < deadline {
            if self.bed.recorded(self.victim).is_some_and(|(pid, runs)| runs && pid != self.old) {
                return Ok(Instant::now());
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        bail!("{} is not running again within {UP_LIMIT:?}", self.victim.name())
    }
}
