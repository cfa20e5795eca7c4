//! Situations in which fence_virtd calls running machines off: `fence-daemon` does not.
//!
//! Each one is asked about a machine that is defined on one host and one that is defined on two, by
//! name and by UUID, with the owner's libvirtd running and stopped.

use anyhow::{Context, Result, anyhow, ensure};
use fence_common::wire::Op;
use fence_lab::client::{Client, Family};
use fence_lab::machine::Machine;
use fence_lab::peer::Peer;
use fence_lab::process::poll_until;
use fence_lab::qemu;
use fence_lab::server::{Server, Which};
use fence_lab::witness::Witness;
use nix::sys::signal::Signal;

use super::super::KEY;
use super::super::group::Speaker;
use super::super::migration::filling;
use super::super::site::{SOON, Site};
use super::{Hosts, UUID};

/// The host whose guest asks, and the host that runs the machines.
const ASKER: usize = 0;
const OWNER: usize = 1;

/// The machine that only its owner knows.
const SINGLE: &str = "single";
const SINGLE_UUID: &str = "7d3c9a52-51c1-4a0e-9d0c-2a4b6c8d0e02";
/// The machine that is defined on the asker's host as well, under [`UUID`].
const TWIN: &str = "twin";

/// Where the second daemon of a host listens.
const SECOND_PORT: u16 = 1230;

/// What keeps the owner's word from the host that asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trouble {
    /// The network between the hosts is cut.
    Cut,
    /// The owner's daemon has crashed.
    Crash,
    /// It was stopped by its administrator.
    Leave,
    /// The owner's corosync has crashed.
    OwnersRingDies,
    /// It hangs.
    OwnersRingHangs,
    /// The asking host's corosync has crashed.
    AskersRingDies,
    /// It hangs.
    AskersRingHangs,
}

impl Trouble {
    const ALL: [Self; 7] = [
        Self::Cut,
        Self::Crash,
        Self::Leave,
        Self::OwnersRingDies,
        Self::OwnersRingHangs,
        Self::AskersRingDies,
        Self::AskersRingHangs,
    ];

    fn begin(self, hosts: &mut Hosts) -> Result<()> {
        match self {
            Self::Cut => hosts.ring.partition(&[OWNER]),
            Self::Crash => hosts.sites[OWNER].server.crash(),
            Self::Leave => {
                let server = &mut hosts.sites[OWNER].server;
                server.process().signal(Signal::SIGTERM)?;
                poll_until("the daemon's end", SOON, || Ok((!server.is_running()?).then_some(())))
            }
            Self::OwnersRingDies => hosts.ring.kill(OWNER),
            Self::OwnersRingHangs => hosts.ring.signal(OWNER, Signal::SIGSTOP),
            Self::AskersRingDies => hosts.ring.kill(ASKER),
            Self::AskersRingHangs => hosts.ring.signal(ASKER, Signal::SIGSTOP),
        }
    }

    fn end(self, hosts: &mut Hosts) -> Result<()> {
        match self {
            Self::Cut => hosts.ring.heal()?,
            Self::Crash | Self::Leave => hosts.next_daemon(OWNER, &Which::ours()?)?,
            Self::OwnersRingDies => hosts.ring.start(OWNER)?,
            Self::OwnersRingHangs => hosts.ring.signal(OWNER, Signal::SIGCONT)?,
            Self::AskersRingDies => hosts.ring.start(ASKER)?,
            Self::AskersRingHangs => hosts.ring.signal(ASKER, Signal::SIGCONT)?,
        }
        hosts.wait_whole().with_context(|| format!("after {self:?}"))
    }
}

/// Two hosts, and the processes of [`SINGLE`] and [`TWIN`] on the owner.
fn hosts() -> Result<(Hosts, Vec<Witness>)> {
    let hosts = Hosts::new(2)?;
    Machine::new(TWIN).uuid(UUID).define(&hosts.sites[ASKER].libvirtd)?;
    for (name, uuid) in [(SINGLE, SINGLE_UUID), (TWIN, UUID)] {
        Machine::new(name).uuid(uuid).start(&hosts.sites[OWNER].libvirtd)?;
        hosts.wait_known(name)?;
    }
    let machines = [SINGLE, TWIN].map(|name| hosts.sites[OWNER].machine(name));
    Ok((hosts, machines.into_iter().collect::<Result<_>>()?))
}

/// No order is a success, no machine is called off, and none is killed.
fn nothing_is_called_off(hosts: &Hosts, machines: &[Witness], what: &str) -> Result<()> {
    let names = [SINGLE, SINGLE_UUID, TWIN, UUID];
    let questions: Vec<_> =
        [Op::Off, Op::Reboot, Op::On, Op::Status].iter().flat_map(|op| names.map(|name| (*op, name))).collect();
    let replies = hosts.ask_all(ASKER, &questions, machines).with_context(|| what.to_owned())?;
    for ((op, domain), reply) in questions.iter().zip(replies) {
        let is_right = if *op == Op::Status { reply != 2 } else { reply == 1 };
        ensure!(is_right, "{what}: {op:?} of {domain} is answered with {reply}: {}", hosts.logs());
    }
    all_live(hosts, machines, what)
}

fn all_live(hosts: &Hosts, machines: &[Witness], what: &str) -> Result<()> {
    let alive = machines.iter().map(Witness::is_dead).collect::<Result<Vec<_>>>()?;
    ensure!(!alive.contains(&true), "{what}: a machine was killed, dead are {alive:?}: {}", hosts.logs());
    Ok(())
}

#[test]
fn no_trouble_between_the_hosts_makes_a_running_machine_off() -> Result<()> {
    let (mut hosts, machines) = hosts()?;
    for trouble in Trouble::ALL {
        let what = format!("{trouble:?}");
        trouble.begin(&mut hosts)?;
        nothing_is_called_off(&hosts, &machines, &what)?;
        if trouble == Trouble::Cut {
            for op in ["list", "monitor"] {
                let answer = Client::new(op, &hosts.sites[ASKER].key()).run(hosts.guest(&hosts.sites[ASKER]))?;
                ensure!(answer.code != Some(0), "{op} behind a cut network: {answer:?}");
            }
        }
        hosts.sites[OWNER].libvirtd.signal(Signal::SIGSTOP)?;
        nothing_is_called_off(&hosts, &machines, &format!("{what}, and the owner's libvirtd is stopped"))?;
        hosts.sites[OWNER].libvirtd.signal(Signal::SIGCONT)?;
        trouble.end(&mut hosts)?;
        // What was ordered meanwhile is old.
        all_live(&hosts, &machines, &format!("after {what}"))?;
    }
    hosts.expect(ASKER, "off", SINGLE_UUID, &machines[..1], 0)?;
    hosts.expect(ASKER, "off", TWIN, &machines[1..], 0).map(drop)
}

/// The owner's daemon stands still, and the asking daemon is restarted meanwhile: the late words to
/// its former life are no words to this one.
#[test]
fn an_owner_that_stands_still_and_an_asker_in_its_next_life_call_nothing_off() -> Result<()> {
    let (mut hosts, machines) = hosts()?;
    hosts.sites[OWNER].server.process().signal(Signal::SIGSTOP)?;
    // The former life asks about a name that nobody has, and about a machine.
    let peer = Peer::new(hosts.sites[ASKER].observer.guest(), &KEY, Family::V4)?;
    let mut former = Vec::new();
    for domain in ["nobody", SINGLE] {
        peer.send(peer.request(Op::Off, domain)?)?;
        let mut call = peer.called_back(SOON)?.context("no callback")?;
        call.challenge()?;
        call.respond()?;
        former.push(call);
    }
    hosts.sites[ASKER].server.crash()?;
    hosts.next_daemon(ASKER, &Which::ours()?)?;
    drop(former);
    nothing_is_called_off(&hosts, &machines, "the owner stands still")?;
    // The orders are old when it goes on.
    hosts.sites[OWNER].server.process().signal(Signal::SIGCONT)?;
    hosts.wait_whole()?;
    all_live(&hosts, &machines, "a stale order")?;
    hosts.expect(ASKER, "off", SINGLE, &machines[..1], 0)?;
    hosts.expect(ASKER, "off", UUID, &machines[1..], 0).map(drop)
}

/// A machine migrates, and at the same time a trouble begins.
#[test]
fn a_machine_that_moves_beside_a_trouble_is_off_only_when_it_runs_nowhere() -> Result<()> {
    let mut hosts = Hosts::new(2)?;
    // Something to copy, so that the trouble begins before the end.
    let filling = filling();
    for host in &hosts.sites {
        host.hypervisor.write("filling", &filling)?;
    }
    let mut successes = 0;
    // The others differ from these in how long the hosts take to notice.
    let troubles = [Trouble::Cut, Trouble::Crash, Trouble::OwnersRingDies, Trouble::AskersRingDies];
    for (round, trouble) in troubles.into_iter().enumerate() {
        let name = format!("nomad{round}");
        let filling = hosts.sites[OWNER].hypervisor.path("filling");
        Machine::new(&name).uuid(UUID).filled(&filling).create_transient(&hosts.sites[OWNER].libvirtd)?;
        hosts.wait_known(&name)?;
        let migration = hosts.migrate(OWNER, ASKER, &name, &["--bandwidth", "16"])?;
        trouble.begin(&mut hosts)?;
        // By name and by UUID, on the host that it goes to.
        let replies = hosts.ask_all(ASKER, &[(Op::Off, name.as_str()), (Op::Off, UUID)], &[])?;
        let nowhere = |what: &str| -> Result<()> {
            let runs = |site: &Site| site.libvirtd.state(qemu::URI, &name).is_ok_and(|state| state == "running");
            ensure!(!hosts.sites.iter().any(runs), "FALSE SUCCESS beside {trouble:?}, {what}: {}", hosts.logs());
            Ok(())
        };
        if replies.contains(&0) {
            successes += 1;
            // A source that has stopped its machine may resume it when the migration fails at last.
            nowhere("at the answer")?;
            migration.ends_within(SOON)?;
            nowhere("after the migration")?;
        }
        trouble.end(&mut hosts)?;
        // A migration whose network was cut may take until TCP gives up.
        drop(migration);
        for site in &hosts.sites {
            let _ = site.libvirtd.virsh(qemu::URI, &["destroy", &name]);
        }
    }
    eprintln!("{successes} of {} machines were fenced beside a trouble", troubles.len());
    Ok(())
}

/// Another daemon of ours on the first host: its own listener, state and PID file.
fn second_daemon(hosts: &Hosts) -> Result<Server> {
    let site = &hosts.sites[ASKER];
    let mut config = site.config.clone();
    config.port = Some(SECOND_PORT);
    config.daemon.push(("state_directory", "/run/second"));
    let file = site.hypervisor.write("second.conf", config.render().as_bytes())?;
    let pid_file = ["-p", "/run/second.pid"];
    let mut server = Server::spawn_with_file(&site.hypervisor, &Which::ours()?, &file, SECOND_PORT, &pid_file)?;
    server.wait_ready(SOON)?;
    Ok(server)
}

/// fence_virtd's two daemons take each other's replies, as both count from 1.
#[test]
fn two_daemons_on_one_host_do_not_take_each_others_answers() -> Result<()> {
    let (hosts, machines) = hosts()?;
    let second = second_daemon(&hosts)?;
    let (key, guest) = (hosts.sites[ASKER].key(), hosts.guest(&hosts.sites[ASKER]));
    let ask_second = |op: &str, domain: &str| Client::new(op, &key).port(SECOND_PORT).domain(domain).run(guest);
    poll_until("the second daemon to hear all hosts", SOON, || {
        Ok((ask_second("status", SINGLE)?.code == Some(0)).then_some(()))
    })
    .with_context(|| second.log())?;
    hosts.wait_whole()?;
    for victim in [(SINGLE, 0), (UUID, 1)] {
        let victims = &machines[victim.1..=victim.1];
        std::thread::scope(|scope| -> Result<()> {
            let nobody = scope.spawn(|| ask_second("off", "nobody"));
            let answer = hosts.expect(ASKER, "off", victim.0, victims, 0);
            let nobody = nobody.join().map_err(|_| anyhow!("a client panicked"))??;
            ensure!(nobody.code == Some(1), "off of nobody: {nobody:?}: {}", second.log());
            answer.map(drop)
        })?;
    }
    // Both daemons see this one run on their host, and both kill it.
    let here = hosts.start_other(ASKER, "here")?;
    let answer = ask_second("off", "here")?;
    ensure!(answer.code == Some(0) && here.is_dead()?, "{answer:?}: {}", second.log());
    Ok(())
}

/// Anybody who is in corosync's network can join the group. Of release to release, messages change.
#[test]
fn a_member_that_is_not_understood_is_no_success() -> Result<()> {
    let (hosts, machines) = hosts()?;
    let stranger = Speaker::start(&hosts.ring.hosts[OWNER])?;
    // It cannot send before it has heard who is there.
    stranger.says(0, "members ")?;
    stranger.send("a message of another release")?;
    hosts.expect(ASKER, "off", SINGLE, &machines[..1], 1)?;
    hosts.expect(ASKER, "off", UUID, &machines[1..], 1)?;
    let position = hosts.sites[ASKER].server.log_position();
    drop(stranger);
    let has_left = |line: &str| line.contains("has left the group").then_some(());
    hosts.sites[ASKER].server.wait_log(position, SOON, has_left).with_context(|| hosts.logs())?;
    hosts.expect(ASKER, "off", SINGLE, &machines[..1], 0)?;
    hosts.expect(ASKER, "off", UUID, &machines[1..], 0).map(drop)
}

#[test]
fn a_silent_client_holds_up_no_other_host() -> Result<()> {
    let (hosts, machines) = hosts()?;
    // It takes its callback, and says nothing: once on each host.
    let silent = hosts.sites.iter().map(|site| {
        let peer = Peer::new(site.observer.guest(), &KEY, Family::V4)?;
        peer.send(peer.request(Op::Off, TWIN)?)?;
        peer.called_back(SOON)?.context("no callback")
    });
    let silent = silent.collect::<Result<Vec<_>>>()?;
    hosts.expect(ASKER, "off", SINGLE, &machines[..1], 0)?;
    for call in &silent {
        ensure!(call.is_open()?, "the silent client was not in the way any more");
    }
    all_live(&hosts, &machines[1..], "a client that proves nothing")
}
