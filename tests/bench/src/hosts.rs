//! Machines of another host: a real corosync between hosts with a real libvirtd each. In large
//! groups only the first two have one; the others have libvirt's test driver in their daemon.

use std::net::UdpSocket;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use fence_common::wire::Op;
use fence_lab::client::{Client, Family};
use fence_lab::corosync::HostRing;
use fence_lab::lab::Guest;
use fence_lab::libvirtd::Libvirtd;
use fence_lab::peer::Peer;
use fence_lab::process::poll_until;
use fence_lab::qemu;
use fence_lab::server::{Config, Server, Which};
use fence_lab::witness::Witness;

use super::bed::KEY;
use super::caller::{self, PATIENCE};
use super::figures::{Contender, Figure, Part, Results, Target};
use super::stats::Unit;

const ROUND: &str = "hosts.round";
const LOCAL: &str = "hosts.local";
const OTHER: &str = "hosts.other";
const STATUS: &str = "hosts.status";
/// The groups that are larger than two.
const LARGE: [u8; 3] = [3, 16, 32];
/// How many hosts have a libvirtd.
const WITH_LIBVIRTD: usize = 2;
/// The machine of each of these.
const MACHINES: [&str; WITH_LIBVIRTD] = ["near", "far"];
/// How many datagrams go between the hosts and back.
const ROUNDS: usize = 200;
/// How many fence_virtd may be deaf to their group, one after the other.
const STARTS: usize = 12;
/// The pause after the start of a machine: its own start-up work is not measured.
const SETTLE: Duration = Duration::from_millis(500);
/// How long a large group may take to be one.
const WHOLE_LIMIT: Duration = Duration::from_secs(180);
const GUEST: u8 = 90;

pub(crate) fn figures() -> Vec<Figure> {
    let figure = |id: &str, title: &str, targets: Vec<(Target, &'static str)>| Figure {
        id: id.to_owned(),
        part: Part::Hosts,
        title: title.to_owned(),
        unit: Unit::Time,
        targets,
    };
    let less = "fewer messages one after the other, or a corosync that orders them sooner";
    let mut all = vec![
        figure(ROUND, "network between two hosts, there and back", Vec::new()),
        figure(LOCAL, "2 hosts: off on its own host, to reply", vec![(Target::Faster(30.0), less)]),
        figure(
            OTHER,
            "2 hosts: off on the other host, to reply",
            vec![(Target::Faster(30.0), less), (Target::OfOwnAndBare(2.0, LOCAL.to_owned(), ROUND.to_owned()), less)],
        ),
        figure(STATUS, "2 hosts: status on the other host", Vec::new()),
    ];
    all.extend(LARGE.map(|count| {
        let large = figure(&of(count), &format!("{count} hosts: off on another host, to reply"), Vec::new());
        Figure { part: Part::LargeGroups, ..large }
    }));
    all
}

/// The figure of a group of this size.
fn of(count: u8) -> String {
    format!("{OTHER}.{count}")
}

/// A host. Its fields drop in this order.
struct Seat {
    server: Server,
    libvirtd: Option<Libvirtd>,
    guest: Guest,
    key: String,
    config: Config,
}

/// A group of hosts.
struct Party {
    // Drops before the hosts.
    seats: Vec<Seat>,
    ring: HostRing,
}

impl Party {
    fn new(which: &Which, count: u8) -> Result<Self> {
        let ring = HostRing::new(count)?;
        let seat = |(index, host): (usize, &fence_lab::corosync::RingHost)| {
            let hypervisor = &host.hypervisor;
            let libvirtd = if index < WITH_LIBVIRTD { Some(Libvirtd::start(hypervisor)?) } else { None };
            if let Some(libvirtd) = &libvirtd {
                qemu::define_idle(libvirtd, MACHINES[index])?;
            }
            let key = hypervisor.write("fence.key", &KEY)?;
            let mut config = Config::new(&key);
            if libvirtd.is_some() {
                config.uris = vec![qemu::URI.to_owned()];
            }
            config.backend_name = "cpg";
            let server = Server::start(hypervisor, which, &config)?;
            Ok(Seat { server, libvirtd, guest: hypervisor.guest(GUEST)?, key, config })
        };
        let seats = ring.hosts.iter().enumerate().map(seat).collect::<Result<Vec<_>>>()?;
        let mut party = Self { seats, ring };
        match which {
            Which::Ours(_) => party.wait_whole()?,
            Which::Stock => party.wait_hearing()?,
        }
        Ok(party)
    }

    fn client(&self, seat: usize, client: &Client) -> Result<Option<i32>> {
        let seat = self.seats.get(seat).context("no such host")?;
        Ok(client.run(seat.guest.space())?.code)
    }

    fn wait_whole(&self) -> Result<()> {
        for (index, seat) in self.seats.iter().enumerate().take(WITH_LIBVIRTD) {
            poll_until("all hosts to be well", WHOLE_LIMIT, || {
                Ok((self.client(index, &Client::new("monitor", &seat.key))? == Some(0)).then_some(()))
            })
            .with_context(|| seat.server.log())?;
        }
        Ok(())
    }

    /// A fence_virtd is sometimes deaf to its group from its start on, and another start helps.
    fn wait_hearing(&mut self) -> Result<()> {
        for index in 0..self.seats.len() {
            self.bring_up(index)?;
            let mut starts = 0;
            while !self.hears(index)? {
                starts += 1;
                ensure!(starts < STARTS, "fence_virtd does not hear its group");
                let hypervisor = self.ring.hosts.get(index).context("no such host")?.hypervisor.clone();
                let seat = self.seats.get_mut(index).context("no such host")?;
                seat.server.crash()?;
                seat.server = Server::start(&hypervisor, &Which::Stock, &seat.config)?;
            }
        }
        Ok(())
    }

    fn hears(&self, index: usize) -> Result<bool> {
        let key = &self.seats.get(index).context("no such host")?.key;
        Ok(self.client(index, &Client::new("status", key).domain(MACHINES[index]).timeout(4))? == Some(0))
    }

    fn libvirtd(&self, index: usize) -> Result<&Libvirtd> {
        self.seats.get(index).and_then(|seat| seat.libvirtd.as_ref()).context("this host has no libvirtd")
    }

    /// Brings the machine of a host up: its process.
    fn bring_up(&self, index: usize) -> Result<Witness> {
        let (libvirtd, name) = (self.libvirtd(index)?, MACHINES[index]);
        if libvirtd.state(qemu::URI, name)? != "running" {
            libvirtd.start_domain(qemu::URI, name)?;
        }
        std::thread::sleep(SETTLE);
        Witness::of_qemu(libvirtd.hypervisor(), name)
    }

    /// A guest of the first host fences the machine of a host. A false success is an error.
    fn off(&self, owner: usize) -> Result<Duration> {
        let witness = self.bring_up(owner)?;
        let asker = self.seats.first().context("no hosts")?;
        let peer = Peer::new(&asker.guest, &KEY, Family::V4)?;
        let answer = caller::ask(&peer, Op::Off, MACHINES[owner], PATIENCE)?.context("no callback")?;
        let was_dead = witness.is_dead()?;
        let log = || format!("off of {}: {}", MACHINES[owner], asker.server.log());
        ensure!(answer.code == 0, "the reply is {}: {}", answer.code, log());
        ensure!(was_dead, "FALSE SUCCESS: {}", log());
        self.libvirtd(owner)?.wait_state(qemu::URI, MACHINES[owner], "shut off")?;
        Ok(answer.took())
    }

    fn status(&self, owner: usize) -> Result<Duration> {
        let asker = self.seats.first().context("no hosts")?;
        let peer = Peer::new(&asker.guest, &KEY, Family::V4)?;
        let answer = caller::ask(&peer, Op::Status, MACHINES[owner], PATIENCE)?.context("no callback")?;
        ensure!(answer.code == 0, "status of a machine that runs: {}", answer.code);
        Ok(answer.took())
    }

    /// The times of datagrams from the first host to the second and back.
    fn round_trips(&self) -> Result<Vec<Duration>> {
        let [first, second, ..] = self.ring.hosts.as_slice() else { bail!("one host has no network") };
        let socket = |host: &fence_lab::corosync::RingHost| {
            host.hypervisor.space().in_network(|| {
                let socket = UdpSocket::bind((host.address, 0))?;
                socket.set_read_timeout(Some(PATIENCE))?;
                Ok(socket)
            })
        };
        let (near, far) = (socket(first)?, socket(second)?);
        near.connect(far.local_addr()?)?;
        far.connect(near.local_addr()?)?;
        std::thread::scope(|scope| {
            let echo = scope.spawn(move || -> Result<()> {
                let mut bytes = [0; 64];
                for _ in 0..ROUNDS {
                    let length = far.recv(&mut bytes)?;
                    far.send(bytes.get(..length).context("a longer datagram")?)?;
                }
                Ok(())
            });
            let mut took = Vec::new();
            for _ in 0..ROUNDS {
                let begin = Instant::now();
                near.send(&[0; 64])?;
                near.recv(&mut [0; 64])?;
                took.push(begin.elapsed());
            }
            echo.join().map_err(|_| anyhow::anyhow!("the echo panicked"))??;
            Ok(took)
        })
    }
}

/// Two hosts: offs on the own and on the other host, by turns.
pub fn measure(which: &Which, contender: Contender, times: usize, results: &mut Results) -> Result<()> {
    let party = Party::new(which, 2)?;
    for _ in 0..times {
        results.add(LOCAL, contender, party.off(0)?.as_secs_f64());
        results.add(OTHER, contender, party.off(1)?.as_secs_f64());
    }
    party.bring_up(1)?;
    for _ in 0..times {
        results.add(STATUS, contender, party.status(1)?.as_secs_f64());
    }
    if contender == Contender::Ours {
        for took in party.round_trips()? {
            results.add(ROUND, Contender::Bare, took.as_secs_f64());
        }
    }
    Ok(())
}

/// Larger groups, of ours alone.
pub fn measure_large(which: &Which, times: usize, results: &mut Results) -> Result<()> {
    for count in LARGE {
        let party = Party::new(which, count).with_context(|| format!("a group of {count} hosts"))?;
        for _ in 0..times {
            results.add(&of(count), Contender::Ours, party.off(1)?.as_secs_f64());
        }
    }
    Ok(())
}
