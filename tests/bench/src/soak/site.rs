//! The soak's lab: two hypervisors that migrate to each other, their machines, and the
//! configuration of their daemons.

use std::sync::{Mutex, MutexGuard};
use std::time::Instant;

use anyhow::{Context as _, Result};
use fence_common::sync::lock;
use fence_common::wire::DEFAULT_PORT;
use fence_lab::container;
use fence_lab::lab::{Guest, HYPERVISOR_V4, Hypervisor};
use fence_lab::libvirtd::{LISTEN, Libvirtd, listening};
use fence_lab::line::{Line, Port};
use fence_lab::machine::{Machine, writing_disk};
use fence_lab::qemu;
use fence_lab::server::{Config, START_LIMIT, Server, Which};
use fence_lab::testdriver::{self, State, TestDomain, uuid};
use fence_lab::tools::random_bytes;
use fence_lab::witness::Witness;

use super::judge::Outages;

/// The directory of the serial lines' sockets.
pub(super) const LINES: &str = "/run/fence";
/// The domains that ask over serial lines: one with a stock client, one with ours.
pub(super) const ASKERS: [&str; 2] = ["line-stock", "line-own"];
/// A domain inside of the daemon's process. It answers whatever libvirtd does.
pub(super) const PROBE: &str = "probe";
/// A machine that is defined and never on: only libvirt can say so.
pub(super) const SLEEPER: &str = "sleeper";
/// A machine that no group permits to fence.
pub(super) const PROTECTED: &str = "protected";
/// A machine that no client asks about.
const BYSTANDER: &str = "bystander";
/// A domain that a group permits to fence, and that does not exist.
pub(super) const NOBODY: &str = "nobody";
/// The guests' first number. libvirt numbers the ports of its own machines from 0.
const GUEST: u8 = 90;
/// How many guests ask: by multicast with a stock client and with ours, by tcp, and for probes.
const ASKING: u8 = 4;

/// A domain that is fenced.
#[derive(Debug)]
pub(super) struct Domain {
    pub(super) name: String,
    pub(super) uri: &'static str,
    /// A machine's UUID, by which the kernel's list of processes shows it. Containers have none.
    uuid: Option<String>,
    /// Several clients may ask for it at once. More is judged where only one does.
    is_shared: bool,
    /// When the last order to start it ended. Who holds it is the only one that gives orders.
    ordered: Mutex<Instant>,
}

/// The right to give orders about a domain.
pub(super) enum Hold<'d> {
    /// Others may give orders, too.
    Shared,
    /// Nobody else does.
    Alone(MutexGuard<'d, Instant>),
}

impl Domain {
    fn machine(name: &str, is_shared: bool) -> Result<Self> {
        // By chance and not by the seed: another run of that seed may be under way.
        let hex: String = random_bytes(6)?.iter().map(|byte| format!("{byte:02x}")).collect();
        let uuid = Some(format!("50a50a50-0000-4000-8000-{hex}"));
        Ok(Self { name: name.to_owned(), uri: qemu::URI, uuid, is_shared, ordered: Mutex::new(Instant::now()) })
    }

    fn container(name: &str) -> Self {
        let ordered = Mutex::new(Instant::now());
        Self { name: name.to_owned(), uri: container::URI, uuid: None, is_shared: false, ordered }
    }

    /// `None` while somebody else holds it.
    pub(super) fn hold(&self) -> Option<Hold<'_>> {
        if self.is_shared { Some(Hold::Shared) } else { self.ordered.try_lock().ok().map(Hold::Alone) }
    }

    /// Its living processes, whatever libvirt knows of them.
    pub(super) fn living(&self, hypervisor: &Hypervisor) -> Result<Vec<Witness>> {
        match &self.uuid {
            Some(uuid) => Witness::of_uuid(uuid),
            None => Witness::of_all(hypervisor, &self.name),
        }
    }

    /// Its definition, without a disk.
    pub(super) fn definition(&self) -> Machine {
        let machine = Machine::new(&self.name);
        self.uuid.iter().fold(machine, |machine, uuid| machine.uuid(uuid))
    }
}

/// A key of the clients, by its number.
pub(super) fn key(number: u32) -> Vec<u8> {
    let mut key = vec![0x5a; 4096];
    key[..4].copy_from_slice(&number.to_le_bytes());
    key
}

/// Its file inside the lab.
pub(super) fn key_file(number: u32) -> String {
    format!("key.{number}")
}

/// What a reload may change.
#[derive(Clone, Copy, Debug)]
pub(super) struct Settings {
    /// The keys that are accepted.
    pub(super) keys: (u32, Option<u32>),
    /// `request_rate`.
    pub(super) rate: u32,
    /// `kill`.
    pub(super) kill: &'static str,
    /// Whether there is a group more.
    pub(super) second_group: bool,
}

impl Settings {
    fn new() -> Self {
        Self { keys: (0, None), rate: 100, kill: "direct", second_group: false }
    }
}

/// A hypervisor.
#[derive(Debug)]
pub(super) struct Host {
    pub(super) hypervisor: Hypervisor,
    /// Its address for migrations.
    pub(super) address: String,
    /// What clients fence here.
    pub(super) domains: Vec<Domain>,
    /// The guests of clients, see [`ASKING`].
    pub(super) guests: Vec<Guest>,
    pub(super) flooder: Guest,
    /// The key that clients sign with.
    pub(super) signing: Mutex<u32>,
    pub(super) outages: Outages,
    /// The daemon's process, while there is one.
    pub(super) daemon: Mutex<Option<u32>>,
    /// What must live until the end.
    pub(super) untouched: Vec<(&'static str, Witness)>,
    /// The ends of the serial lines, until their clients take them.
    pub(super) lines: Mutex<Option<(Port, Line)>>,
}

/// The hypervisors and the machine that moves between them.
#[derive(Debug)]
pub(super) struct World {
    pub(super) hosts: [Host; 2],
    pub(super) nomad: Domain,
}

/// What runs on a hypervisor and is killed.
#[derive(Debug)]
pub(super) struct Running {
    pub(super) libvirtd: Libvirtd,
    pub(super) server: Server,
    pub(super) settings: Settings,
}

impl Host {
    fn make(hypervisor: &Hypervisor, address: String, libvirtd: &Libvirtd) -> Result<Self> {
        let machines = [Domain::machine("one", false)?, Domain::machine("two", false)?];
        let (shared, disk) = (Domain::machine("shared", true)?, Domain::machine("disk", false)?);
        let image = hypervisor.write("disk.img", &writing_disk())?;
        disk.definition().disk(&image, "threads").start(libvirtd)?;
        for machine in machines.iter().chain([&shared]) {
            machine.definition().start(libvirtd)?;
        }
        let container = Domain::container("container");
        container::start(libvirtd, &container.name)?;
        qemu::define_idle(libvirtd, SLEEPER)?;
        let mut untouched = Vec::new();
        for name in [PROTECTED, BYSTANDER] {
            qemu::start_idle(libvirtd, name)?;
            untouched.push((name, Witness::of_qemu(hypervisor, name)?));
        }
        let domains = machines.into_iter().chain([shared, disk, container]).collect();
        let guests = (GUEST..GUEST + ASKING).map(|number| hypervisor.guest(number)).collect::<Result<Vec<_>>>()?;
        let flooder = hypervisor.guest(GUEST + ASKING)?;
        hypervisor.write(&key_file(0), &key(0))?;
        let line = |asker: usize| format!("{LINES}/{}", ASKERS[asker]);
        let asking = |asker: usize| {
            // A domain's first port is its console.
            let domain = TestDomain::new(ASKERS[asker], &uuid(asker), State::Running);
            domain.with_socket("serial", &format!("/run/console{asker}")).with_socket("serial", &line(asker))
        };
        let inside = [TestDomain::new(PROBE, &uuid(2), State::Running), asking(0), asking(1)];
        hypervisor.write("node.xml", testdriver::node(&inside).as_bytes())?;
        Ok(Self {
            hypervisor: hypervisor.clone(),
            address,
            domains,
            guests,
            flooder,
            signing: Mutex::new(0),
            outages: Outages::default(),
            daemon: Mutex::new(None),
            untouched,
            lines: Mutex::new(Some((Port::open(hypervisor, &line(0))?, Line::listen(hypervisor, &line(1))?))),
        })
    }

    /// The daemon's configuration file.
    pub(super) fn configuration(&self, settings: &Settings, nomad: &Domain) -> String {
        let Settings { keys: (first, second), rate, kill, second_group } = *settings;
        let path = |number| self.hypervisor.path(&key_file(number));
        let node = format!("test://{}", self.hypervisor.path("node.xml"));
        let mut config = Config::new(&path(first));
        config.key_file2 = second.map(path);
        config.uris = vec![qemu::URI.to_owned(), container::URI.to_owned(), node.clone()];
        config.tcp = Some(vec![("address", HYPERVISOR_V4.to_string())]);
        config.serial = Some(vec![("path", LINES.to_owned()), ("uri", node)]);
        config.backend = vec![("kill", kill)];
        let clients: String = self.guests.iter().map(|guest| format!(" ip = \"{}\";", guest.v4)).collect();
        let lines: String = ASKERS.iter().map(|asker| format!(" from = \"{asker}\";")).collect();
        let names = self.domains.iter().chain([nomad]).map(|domain| domain.name.as_str());
        let names: String = names.chain([PROBE, SLEEPER, NOBODY]).map(|name| format!(" uuid = \"{name}\";")).collect();
        let more = if second_group { "\tgroup { ip = \"::1\"; uuid = \"elsewhere\"; }\n" } else { "" };
        config.more = format!("groups {{\n{more}\tgroup {{{clients}{lines}{names} }}\n}}\n");
        config.render().replacen('{', &format!("{{\n\trate_limit {{ request_rate = \"{rate}\"; }}"), 1)
    }

    /// Writes the daemon's configuration file: its path inside the lab.
    pub(super) fn configure(&self, settings: &Settings, nomad: &Domain) -> Result<String> {
        self.hypervisor.write("fence_virt.conf", self.configuration(settings, nomad).as_bytes())
    }

    /// Starts a daemon and does not wait until it serves.
    pub(super) fn spawn(&self, which: &Which, settings: &Settings, nomad: &Domain) -> Result<Server> {
        let file = self.configure(settings, nomad)?;
        let mut server = Server::spawn_with_file(&self.hypervisor, which, &file, DEFAULT_PORT, &[])?;
        *lock(&self.daemon) = Some(server.process().id());
        Ok(server)
    }

    /// The key that clients sign with now, and its file.
    pub(super) fn signing(&self) -> (Vec<u8>, String) {
        let number = *lock(&self.signing);
        (key(number), self.hypervisor.path(&key_file(number)))
    }

    /// The names that a whole list has.
    pub(super) fn listed(&self) -> impl Iterator<Item = &str> {
        self.domains.iter().map(|domain| domain.name.as_str()).chain([PROBE, SLEEPER])
    }
}

/// Makes the lab, with a daemon that serves on each hypervisor.
pub(super) fn build(which: &Which) -> Result<(World, [Running; 2])> {
    let hypervisors = [Hypervisor::new()?, Hypervisor::new()?];
    let addresses = hypervisors[0].connect(&hypervisors[1])?;
    let make = |number: usize| -> Result<(Host, Libvirtd)> {
        let hypervisor = &hypervisors[number];
        let libvirtd = Libvirtd::start_with(hypervisor, &listening(number), &[LISTEN])?;
        Ok((Host::make(hypervisor, addresses[number].to_string(), &libvirtd)?, libvirtd))
    };
    let ((here, here_libvirtd), (there, there_libvirtd)) = (make(0)?, make(1)?);
    let nomad = Domain::machine("nomad", false)?;
    nomad.definition().define(&here_libvirtd)?;
    let world = World { hosts: [here, there], nomad };
    let serve = |number: usize, libvirtd: Libvirtd| -> Result<Running> {
        let (host, settings) = (&world.hosts[number], Settings::new());
        let mut server = host.spawn(which, &settings, &world.nomad)?;
        server.wait_ready(START_LIMIT)?;
        // Clients come when it knows all domains.
        server.wait_domain(SLEEPER, "shut off").context("the daemon does not know libvirt's domains")?;
        Ok(Running { libvirtd, server, settings })
    };
    let running = [serve(0, here_libvirtd)?, serve(1, there_libvirtd)?];
    Ok((world, running))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_differ_and_a_shared_domain_is_held_by_many() {
        assert_ne!(key(1), key(2));
        let shared = Domain::machine("shared", true).unwrap();
        assert!(matches!((shared.hold(), shared.hold()), (Some(Hold::Shared), Some(Hold::Shared))));
        let own = Domain::machine("own", false).unwrap();
        let held = own.hold();
        assert!(held.is_some() && own.hold().is_none());
        drop(held);
        assert!(own.hold().is_some());
        assert_ne!(shared.uuid, own.uuid);
    }
}
