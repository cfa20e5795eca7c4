//! What the kernel program costs other traffic: TCP between a guest and the host, with and without
//! the program on the interface.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr};

use anyhow::{Context, Result, bail, ensure};

use crate::machine::Fact;
use crate::pages;
use crate::stats::{Sample, Samples, three};
use fence_lab::kernel::{tcx_on, xdp_on};
use fence_lab::lab::{BRIDGE, Guest, HYPERVISOR_V4, Hypervisor, Space};
use fence_lab::pump::{self, Flow};
use fence_lab::server::{Config, START_LIMIT, Server, Which};
use fence_lab::tools;

/// The host's end of a cable to a guest, without a bridge.
pub const CABLE: &str = "port9";
/// The host's address on it.
pub const CABLE_V4: Ipv4Addr = Ipv4Addr::new(192, 168, 123, 1);
/// The guest's.
const CABLE_GUEST_V4: Ipv4Addr = Ipv4Addr::new(192, 168, 123, 12);

/// What the bytes go by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Road {
    /// `virbr0`, as everywhere.
    Bridge,
    /// A veth pair, whose driver knows XDP.
    Cable,
}

impl Road {
    /// The host's interface, which the program is on.
    #[must_use]
    pub fn interface(self) -> &'static str {
        match self {
            Self::Bridge => BRIDGE,
            Self::Cable => CABLE,
        }
    }
}

/// How the program is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Way {
    /// Not at all: there is no daemon.
    None,
    /// The same again: what differs from it is chance.
    Control,
    /// As tc program.
    Tcx,
    /// As XDP, by the network stack.
    Generic,
    /// As XDP, by the driver.
    Native,
}

impl Way {
    /// The value of `attach`, for what there is.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::None | Self::Control => "none",
            Self::Tcx => "tcx",
            Self::Generic => "generic",
            Self::Native => "native",
        }
    }

    /// As the head of a column.
    fn title(self) -> &'static str {
        match self {
            Self::None => "no program",
            Self::Control => "no program, again",
            Self::Tcx | Self::Generic | Self::Native => self.name(),
        }
    }

    /// What is compared on a road. The first one is the yardstick.
    #[must_use]
    pub fn on(road: Road) -> &'static [Self] {
        match road {
            Road::Bridge => &[Self::None, Self::Control, Self::Tcx, Self::Generic],
            Road::Cable => &[Self::None, Self::Control, Self::Tcx, Self::Generic, Self::Native],
        }
    }
}

/// What frames the bytes are in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Frames {
    /// The MTU on the way.
    pub mtu: u32,
    /// Whether the stack may pass many segments at once and leave the cutting to the network card
    /// (GSO).
    pub joined: bool,
}

impl Frames {
    /// All that the bench tries.
    pub const ALL: [Self; 4] = [
        Self { mtu: 1500, joined: true },
        Self { mtu: 1500, joined: false },
        Self { mtu: 9000, joined: true },
        Self { mtu: 9000, joined: false },
    ];

    /// How many pieces of 64 KiB take some 25 ms.
    fn pieces(self) -> usize {
        match self {
            Self { joined: true, .. } => 400,
            Self { mtu: 1500, .. } => 16,
            Self { .. } => 80,
        }
    }

    fn name(self) -> String {
        format!("MTU {}, {}", self.mtu, if self.joined { "segments joined (GSO)" } else { "one frame a segment" })
    }
}

/// Where the bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Direction {
    /// From the guest to the host: the program sees them all.
    ToHost,
    /// From the host to the guest: the program sees the acknowledgements.
    ToGuest,
}

impl Direction {
    /// Both.
    pub const ALL: [Self; 2] = [Self::ToHost, Self::ToGuest];

    fn name(self) -> &'static str {
        match self {
            Self::ToHost => "guest, host",
            Self::ToGuest => "host, guest",
        }
    }
}

/// Where the two ends run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Placement {
    /// On one processor, whose cache holds what is copied.
    Together,
    /// On a processor each.
    Apart,
}

impl Placement {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Together, Self::Apart];

    fn name(self) -> &'static str {
        match self {
            Self::Together => "one processor",
            Self::Apart => "two processors",
        }
    }

    /// The sender's processor, and the receiver's.
    fn processors(self) -> [usize; 2] {
        match self {
            Self::Together => [0, 0],
            Self::Apart => [0, 1],
        }
    }
}

/// What is measured in a cell of the tables.
type Case = (Road, Frames, Placement, Direction);

/// A hypervisor with a guest on its bridge, and one on a cable of its own.
#[derive(Debug)]
pub struct Ground {
    /// The hypervisor.
    pub hypervisor: Hypervisor,
    bridged: Guest,
    cabled: Guest,
    key: String,
}

impl Ground {
    /// Makes it.
    pub fn new() -> Result<Self> {
        let hypervisor = Hypervisor::new()?;
        let (bridged, cabled) = (hypervisor.guest(1)?, hypervisor.guest(2)?);
        let key = hypervisor.write("fence.key", &tools::random_bytes(512)?)?;
        hypervisor.ip(&["link", "del", "vnet2"])?;
        hypervisor.ip(&["link", "add", CABLE, "type", "veth", "peer", "name", "eth9", "netns", &cabled.name])?;
        hypervisor.ip(&["addr", "add", &format!("{CABLE_V4}/24"), "dev", CABLE])?;
        hypervisor.ip(&["link", "set", CABLE, "up"])?;
        cabled.space().must("ip", &["addr", "add", &format!("{CABLE_GUEST_V4}/24"), "dev", "eth9"])?;
        cabled.space().must("ip", &["link", "set", "eth9", "up"])?;
        Ok(Self { hypervisor, bridged, cabled, key })
    }

    /// Sets what frames a road carries.
    pub fn set(&self, road: Road, frames: Frames) -> Result<()> {
        let (mtu, segments) = (frames.mtu.to_string(), if frames.joined { "65535" } else { "1" });
        let (guest, end, host) = match road {
            Road::Bridge => (&self.bridged, "eth0", ["vnet1", BRIDGE].as_slice()),
            Road::Cable => (&self.cabled, "eth9", [CABLE].as_slice()),
        };
        let arguments = |interface| ["link", "set", "dev", interface, "mtu", &mtu, "gso_max_segs", segments];
        for interface in host {
            self.hypervisor.ip(&arguments(interface))?;
        }
        guest.space().must("ip", &arguments(end)).map(drop)
    }

    /// The guest at the end of a road.
    #[must_use]
    pub fn guest(&self, road: Road) -> &Guest {
        match road {
            Road::Bridge => &self.bridged,
            Road::Cable => &self.cabled,
        }
    }

    /// From where to where, and the address there.
    #[must_use]
    pub fn ends(&self, road: Road, direction: Direction) -> (&Space, &Space, IpAddr) {
        let (host, guest) = (self.hypervisor.space(), self.guest(road));
        let (host_v4, guest_v4) = match road {
            Road::Bridge => (HYPERVISOR_V4, guest.v4),
            Road::Cable => (CABLE_V4, CABLE_GUEST_V4),
        };
        match direction {
            Direction::ToHost => (guest.space(), host, host_v4.into()),
            Direction::ToGuest => (host, guest.space(), guest_v4.into()),
        }
    }

    /// The key that requests are signed with here.
    #[must_use]
    pub fn key(&self) -> &str {
        &self.key
    }

    /// Starts the daemon with the program on a road in this way, and makes sure that it is there.
    pub fn serve(&self, daemon: &Which, road: Road, way: Way) -> Result<Option<Server>> {
        if matches!(way, Way::None | Way::Control) {
            return Ok(None);
        }
        let config =
            Config { interface: road.interface().to_owned(), attach: Some(way.name()), ..Config::new(&self.key) };
        let server = Server::start(&self.hypervisor, daemon, &config)?;
        server.wait_settled(START_LIMIT)?;
        let is_there = match way {
            Way::None | Way::Control => true,
            Way::Tcx => tcx_on(&self.hypervisor, road.interface())?.iter().any(fence_lab::kernel::Program::is_ours),
            Way::Generic | Way::Native => {
                xdp_on(&self.hypervisor, road.interface())?.is_some_and(|program| program.is_ours())
            }
        };
        ensure!(is_there, "the program is not on {} ({}): {}", road.interface(), way.name(), server.log());
        Ok(Some(server))
    }

    /// How many packets and bytes the host has got by a road.
    pub fn received(&self, road: Road) -> Result<[u64; 2]> {
        let one = |what: &str| -> Result<u64> {
            let path = format!("/sys/class/net/{}/statistics/rx_{what}", road.interface());
            let read = format!("cat {path}");
            Ok(self.hypervisor.space().must("sh", &["-c", &read])?.stdout.trim().parse()?)
        };
        Ok([one("packets")?, one("bytes")?])
    }

    /// How many TCP segments the host found with a wrong checksum.
    pub fn wrong_checksums(&self) -> Result<u64> {
        let table = self.hypervisor.proc_net("snmp")?;
        let mut lines = table.lines().filter_map(|line| line.strip_prefix("Tcp: "));
        let (Some(names), Some(values)) = (lines.next(), lines.next()) else { bail!("no Tcp in {table}") };
        let at = names.split(' ').position(|name| name == "InCsumErrors").context("no InCsumErrors")?;
        Ok(values.split(' ').nth(at).context("no value")?.parse()?)
    }
}

/// The samples of a way. Its ratios are to the same round's yardstick.
#[derive(Debug, Default)]
struct Cell {
    /// Bytes per second.
    speeds: Samples,
    /// Ratios of processor time per byte: above 1 it costs more.
    costs: Samples,
}

/// All samples.
#[derive(Debug, Default)]
pub struct BystanderResults(BTreeMap<(Case, Way), Cell>);

/// Measures in rounds, with a lab for each way: so turns are short, and other load on the machine
/// falls on all ways alike. Another way is first in each round.
pub fn measure(daemon: &Which, rounds: usize) -> Result<BystanderResults> {
    let mut results = BystanderResults::default();
    for road in [Road::Bridge, Road::Cable] {
        let ways = Way::on(road);
        let mut labs = Vec::new();
        for &way in ways {
            let ground = Ground::new()?;
            // Before the driver knows of a program, which may limit what it takes.
            ground.set(road, Frames { mtu: 1500, joined: true })?;
            labs.push((way, ground.serve(daemon, road, way)?, ground));
        }
        // The cable matters less: bridges are what guests are on.
        let rounds = if road == Road::Bridge { rounds } else { rounds.div_ceil(5) };
        for (frames, placement) in Frames::ALL.into_iter().flat_map(|one| Placement::ALL.map(|place| (one, place))) {
            fence_lab::program::progress(&format!("{}: {}, {}", road.interface(), frames.name(), placement.name()));
            for (way, _, ground) in &labs {
                ground.set(road, frames).with_context(|| format!("{}, {}", way.name(), frames.name()))?;
            }
            for (round, direction) in (0..rounds).flat_map(|round| Direction::ALL.map(|to| (round, to))) {
                let mut flows = BTreeMap::new();
                for (way, _, ground) in labs.iter().cycle().skip(round % labs.len()).take(labs.len()) {
                    let (from, to, address) = ground.ends(road, direction);
                    let processors = placement.processors();
                    flows.insert(*way, pump::throughput(from, to, address, frames.pieces(), processors)?);
                }
                results.add((road, frames, placement, direction), &flows);
            }
        }
    }
    Ok(results)
}

impl BystanderResults {
    /// Adds a round's flows.
    fn add(&mut self, case: Case, flows: &BTreeMap<Way, Flow>) {
        let Some(yardstick) = flows.get(&Way::None) else { return };
        for (&way, flow) in flows {
            let cell = self.0.entry((case, way)).or_default();
            let sample = |value| Sample { value, at_least: false };
            cell.speeds.push(sample(flow.per_second));
            cell.costs.push(sample(yardstick.per_cpu_second / flow.per_cpu_second));
        }
    }

    /// The table of one road, in Markdown.
    #[must_use]
    pub fn table(&self, road: Road) -> String {
        let mut text = String::from("| frames | ends on | from, to |");
        for way in Way::on(road) {
            let _ = write!(text, " {} |", way.title());
        }
        let _ = writeln!(text, "\n|---|---|---|{}", "---:|".repeat(Way::on(road).len()));
        let cases = Frames::ALL.into_iter().flat_map(|frames| Placement::ALL.map(|placement| (frames, placement)));
        for ((frames, placement), direction) in cases.flat_map(|case| Direction::ALL.map(|to| (case, to))) {
            let _ = write!(text, "| {} | {} | {} |", frames.name(), placement.name(), direction.name());
            for &way in Way::on(road) {
                let cell = self.0.get(&((road, frames, placement, direction), way));
                let Some(cell) = cell else { continue };
                let median = |samples: &Samples| samples.median().map_or(f64::NAN, |sample| sample.value);
                let _ = write!(text, " {} Gbit/s", three(median(&cell.speeds) * 8e-9));
                if let (true, Some([low, high])) = (way != Way::None, cell.costs.interval()) {
                    let _ = write!(text, ", **{:.2}** ({low:.2} to {high:.2})", median(&cell.costs));
                }
                text.push_str(" |");
            }
            text.push('\n');
        }
        text
    }
}

/// The page, in which the figures are to be filled.
pub(crate) const PAGE: &str = include_str!("pages/bystanders.md");

/// The whole page.
#[must_use]
pub fn page(results: &BystanderResults, facts: &[Fact], rounds: usize) -> String {
    let rounds = rounds.to_string();
    let (bridge, cable) = (results.table(Road::Bridge), results.table(Road::Cable));
    let machine = pages::machine(facts, &[]);
    let values = [("rounds", &rounds), ("machine", &machine), ("bridge", &bridge), ("cable", &cable)];
    pages::fill(PAGE, &values.map(|(name, value)| (name, value.as_str())))
}
