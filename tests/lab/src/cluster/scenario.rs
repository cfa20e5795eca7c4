//! The ways to break a cluster of two, and what must follow. One node dies, its service starts
//! elsewhere after that, and the node comes back.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use fence_common::wire::Op;
use nix::sys::signal::Signal;

use super::corosync::Member;
use super::lab::{Cluster, SERVICE};
use super::shell::{self, Shell as _};
use super::timeline::Timeline;
use super::watch::{Event, Seen, Watch, now};
use crate::container::URI;

/// How long each step may take on a loaded machine, a server that is slow included.
const STEP: Duration = Duration::from_secs(120);
/// For how long libvirtd does not answer, or is not there.
const HANGS: Duration = Duration::from_secs(15);

/// What is broken, or requested.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Scenario {
    /// The active node's corosync is stopped (SIGSTOP): it runs its service on and says nothing.
    Frozen,
    /// The active node's corosync is killed.
    Killed,
    /// The active node's network interface is taken down.
    Unplugged,
    /// The service dies on a node that is well, and `on-fail=fence`.
    Unhealthy,
    /// `stonith_admin --reboot` of the active node.
    Reboot,
    /// `pcs stonith fence` of the active node.
    Pcs,
    /// `stonith_admin --fence` (off) of the active node, and `--unfence` (on).
    OffAndOn,
    /// Split-brain: both nodes can ask the hypervisor to fence the other. `priority-fencing-delay`
    /// favours the active one.
    #[value(alias = "race")]
    DelayedRace,
    /// The same without a delay: either node may die, and one survives. (With fence_virtd too,
    /// which serves one request after the other.)
    #[value(alias = "duel")]
    FenceRace,
    /// As [`Self::Frozen`], while libvirtd does not answer.
    Hung,
    /// As [`Self::Frozen`], while libvirtd is not there.
    Absent,
    /// As [`Self::Frozen`], and the server is killed when it has been asked, and started again.
    Restarted,
}

/// The node that runs the service is fenced two seconds later than the other one would be.
const DELAY: &str = "crm_resource --resource solo --meta --set-parameter priority --parameter-value 1 && \
                     crm_attribute --name priority-fencing-delay --update 2s";
const NO_DELAY: &str = "crm_attribute --name priority-fencing-delay --delete";

impl Scenario {
    /// Scenarios that fence a healthy node, so that corosync hears of the death only afterwards.
    pub const UNNOTICED: [Self; 3] = [Self::Unhealthy, Self::Reboot, Self::Pcs];

    /// For people, in a few words.
    #[must_use]
    pub fn title(self) -> &'static str {
        match self {
            Self::Frozen => "corosync frozen (SIGSTOP)",
            Self::Killed => "corosync killed",
            Self::Unplugged => "network interface down",
            Self::Unhealthy => "service dies, `on-fail=fence`",
            Self::Reboot => "`stonith_admin --reboot`",
            Self::Pcs => "`pcs stonith fence`",
            Self::OffAndOn => "`stonith_admin --fence` (off), then `--unfence` (on)",
            Self::DelayedRace => "nodes cut off from each other, `priority-fencing-delay=2s`",
            Self::FenceRace => "nodes cut off from each other, no delay",
            Self::Hung => "corosync frozen while libvirtd hangs",
            Self::Absent => "corosync frozen while libvirtd is down",
            Self::Restarted => "corosync frozen, server restarted in the middle",
        }
    }

    /// Whether the service must move to the other node. Where corosync hears of the death late, a
    /// container may be back before that, and Pacemaker may choose either node. The same holds
    /// where the fence device has to start first: it waits for the stopped server for so long that
    /// the node is back.
    fn moves(self) -> bool {
        self != Self::Restarted && !Self::UNNOTICED.contains(&self)
    }
}

/// Breaks the cluster in this way, waits until it is whole again, and checks the events.
///
/// An error is anything but one death, the service's start elsewhere after it, and the node's
/// return. It has all events.
pub fn play(cluster: &mut Cluster, scenario: Scenario) -> Result<Timeline> {
    played(cluster, scenario).with_context(|| format!("{}: {}", scenario.title(), cluster.report()))
}

fn played(cluster: &mut Cluster, scenario: Scenario) -> Result<Timeline> {
    let active = cluster.wait_ready()?;
    let watch = Watch::start(&cluster.nodes)?;
    prepare(cluster, scenario, active)?;
    let begun = now();
    injure(cluster, scenario, active, &watch)?;
    let died = |event: &Event| if let Event::Died(node) = event { Some(*node) } else { None };
    if matches!(scenario, Scenario::Hung | Scenario::Absent) && watch.wait_for("a death", 0, HANGS, died).is_err() {
        // Not with this server, then; a breach is found again below.
        cluster.libvirtd.go_on(URI)?;
    }
    let victim = watch.wait_for("a death", 0, STEP, died)?;
    if victim == active {
        let started = |event: &Event| matches!(event, Event::Started(_)).then_some(());
        watch.wait_for("the service's start", 0, STEP, started)?;
    }
    repair(cluster, scenario, victim)?;
    let back = |event: &Event| matches!(event, Event::Returned(_)).then_some(());
    let dead = watch.position(|event| *event == Event::Died(victim));
    watch.wait_for("the fenced node's return", dead, STEP, back)?;
    cluster.wait_online()?;
    let seen = watch.finish()?;
    check(cluster, scenario, &seen, active, victim)?;
    Ok(Timeline::of(begun, &seen, victim))
}

/// What must be so before.
fn prepare(cluster: &Cluster, scenario: Scenario, active: usize) -> Result<()> {
    if scenario == Scenario::DelayedRace {
        let node = cluster.node(active)?;
        node.must(DELAY)?;
        shell::settle(node)?;
    }
    Ok(())
}

fn injure(cluster: &mut Cluster, scenario: Scenario, active: usize, watch: &Watch) -> Result<()> {
    let (victim, other) = (cluster.node(active)?.clone(), cluster.node(1 - active)?.clone());
    let name = &victim.member().name;
    match scenario {
        Scenario::Frozen => victim.signal("STOP", "corosync"),
        Scenario::Killed => victim.signal("KILL", "corosync"),
        Scenario::Unplugged => victim.must("ip link set eth0 down").map(drop),
        Scenario::Unhealthy => victim.must("kill -KILL $(cat /run/solo.pid)").map(drop),
        Scenario::Reboot => other.must(&format!("stonith_admin --reboot {name} --timeout 60")).map(drop),
        Scenario::Pcs => other.must(&format!("pcs stonith fence {name}")).map(drop),
        Scenario::OffAndOn => other.must(&format!("stonith_admin --fence {name} --timeout 60")).map(drop),
        Scenario::DelayedRace | Scenario::FenceRace => cut(cluster),
        Scenario::Hung => {
            cluster.libvirtd.signal(Signal::SIGSTOP)?;
            victim.signal("STOP", "corosync")
        }
        Scenario::Absent => {
            cluster.libvirtd.kill()?;
            victim.signal("STOP", "corosync")
        }
        Scenario::Restarted => {
            // It is to have been asked, and not to have answered.
            cluster.server.process().signal(Signal::SIGSTOP)?;
            victim.signal("STOP", "corosync")?;
            let asked = |event: &Event| matches!(event, Event::Asked { op: Op::Reboot | Op::Off, .. }).then_some(());
            watch.wait_for("a request", 0, STEP, asked)?;
            cluster.server.crash()?;
            let which = cluster.server.which().clone();
            cluster.start_server(&which)
        }
    }
}

/// Isolates the nodes' bridge ports: the nodes cannot reach each other, and both reach the
/// hypervisor. The isolation ends with a node's port.
fn cut(cluster: &Cluster) -> Result<()> {
    for node in &cluster.nodes {
        cluster.hypervisor.space().must("bridge", &["link", "set", "dev", &node.port(), "isolated", "on"])?;
    }
    Ok(())
}

/// What does not come back by itself.
fn repair(cluster: &mut Cluster, scenario: Scenario, victim: usize) -> Result<()> {
    let (node, other) = (cluster.node(victim)?.clone(), cluster.node(1 - victim)?.clone());
    let Member { name, domain, .. } = node.member();
    match scenario {
        Scenario::OffAndOn => {
            cluster.libvirtd.wait_state(URI, domain, "shut off")?;
            ensure!(node.witness().is_err(), "{name} was switched off, and runs");
            other.must(&format!("stonith_admin --unfence {name} --timeout 60")).map(drop)
        }
        Scenario::Hung | Scenario::Absent => cluster.libvirtd.go_on(URI),
        Scenario::Frozen
        | Scenario::Killed
        | Scenario::Unplugged
        | Scenario::Unhealthy
        | Scenario::Reboot
        | Scenario::Pcs
        | Scenario::FenceRace
        | Scenario::Restarted => Ok(()),
        Scenario::DelayedRace => other.must(NO_DELAY).map(drop),
    }
}

/// Whether what was seen is what has to be.
fn check(cluster: &Cluster, scenario: Scenario, seen: &[Seen], active: usize, victim: usize) -> Result<()> {
    let survivor = 1 - victim;
    let told = || format!("seen: {seen:#?}");
    let deaths: Vec<_> = seen.iter().filter(|one| matches!(one.event, Event::Died(_))).collect();
    // Pacemaker can take the late news of a death for another one, and fence the node once more.
    let once_more =
        Scenario::UNNOTICED.contains(&scenario) && deaths.iter().all(|one| one.event == Event::Died(victim));
    ensure!(deaths.len() == 1 || once_more, "one death is to be, not {}; {}", deaths.len(), told());
    let is_expected = scenario == Scenario::FenceRace || (victim == active) == (scenario != Scenario::DelayedRace);
    ensure!(is_expected, "the wrong node was fenced; {}", told());
    // The survivor's request about the victim, and a reply of success to it after the death.
    let (by, domain) = (cluster.node(survivor)?, &cluster.node(victim)?.member().domain);
    let wanted = |one: &&Seen| matches!(&one.event, Event::Asked { by, op: Op::Reboot | Op::Off, domain: of } if *by == survivor && of == domain);
    let asked = seen.iter().find(wanted).with_context(|| format!("nobody asked for it; {}", told()))?;
    let replied = |one: &&Seen| one.event == Event::Replied { to: survivor, byte: 0 } && one.at >= asked.at;
    seen.iter().find(replied).with_context(|| format!("no reply of success; {}", told()))?;
    let start = |one: &Seen| if let Event::Started(node) = one.event { Some((node, one.at)) } else { None };
    let starts: Vec<_> = seen.iter().filter_map(start).collect();
    let runs_on = match *starts.as_slice() {
        [] if victim != active => active,
        [(node, at)] if victim == active && at >= deaths[0].at && (node == survivor || !scenario.moves()) => node,
        [(_, first), .., (node, _)] if once_more && deaths.len() > 1 && first >= deaths[0].at => node,
        _ => bail!("the service is to start once, after the death, and elsewhere; {}", told()),
    };
    // What the cluster itself wrote down.
    let name = &cluster.node(victim)?.member().name;
    let history = by.must(&format!("stonith_admin --history {name} --verbose"))?;
    ensure!(history.contains("succe"), "Pacemaker's history: {history}");
    let status = shell::status(by)?;
    let expected = &cluster.node(runs_on)?.member().name;
    ensure!(shell::runs_on(&status, SERVICE) == Some(expected), "{SERVICE} is to run on {expected}: {status}");
    Ok(())
}

impl Cluster {
    /// Logs and states, for an error.
    fn report(&self) -> String {
        let mut text = format!("the server's log: {}\n", self.server.log());
        for node in &self.nodes {
            let log = std::fs::read_to_string(node.outside("/var/log/pacemaker/pacemaker.log")).unwrap_or_default();
            let lines: Vec<_> = log.lines().filter(|line| !line.contains("info: ")).collect();
            let from = lines.len().saturating_sub(60);
            text.push_str(&format!("{}'s Pacemaker: {}\n", node.member().name, lines[from..].join("\n")));
        }
        text
    }
}
