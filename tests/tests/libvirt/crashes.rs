//! The daemon is killed at every step of a request, and another one starts. There is at most one
//! kill, no success without a death, and a reboot is completed. The next request is served.
//!
//! The client is fence_xvm, or one that repeats its request after a lost connection. fence_xvm
//! never does so; the repetition shows that the next daemon knows the claim. libvirt's own events
//! count the kills, not the daemon.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use fence_common::wire::{Op, Request};
use fence_lab::client::{Client, Family};
use fence_lab::lab::{Guest, Hypervisor};
use fence_lab::libvirtd::Libvirtd;
use fence_lab::peer::Peer;
use fence_lab::process::{Process, poll_until, run};
use fence_lab::server::{Config, Server, Which, faults};
use fence_lab::witness::Witness;
use fence_lab::{container, qemu};

use super::KEY;

/// How long an event that must come may take on a loaded machine.
const SOON: Duration = Duration::from_secs(60);
/// How long the test waits for a callback that must not come.
const SILENCE: Duration = Duration::from_millis(700);

/// The variable that names the fault point at which the daemon dies.
const FAULT: &str = "FENCE_FAULT";

/// The fault points, in the order of a request.
const BEFORE_THE_NOTE: [&str; 4] = ["after-verify", "after-connect", "after-authentication", "after-claim"];
const AFTER_THE_KILL: [&str; 4] = ["after-kill", "after-proof", "before-reply", "after-reply"];
const IN_THE_RESTART: [&str; 2] = ["before-restart", "after-restart"];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Who {
    Stock,
    Insistent,
}

struct CrashLab {
    /// libvirt's events as virsh prints them. The first field, so that it is dropped first: the lab
    /// waits for all of its processes.
    events: Process,
    hypervisor: Hypervisor,
    libvirtd: Libvirtd,
    guest: Guest,
    key: String,
    config: Config,
    uri: &'static str,
}

impl CrashLab {
    fn new(uri: &'static str, backend: &[(&'static str, &'static str)]) -> Result<Self> {
        let hypervisor = Hypervisor::new()?;
        let libvirtd = Libvirtd::start(&hypervisor)?;
        let key = hypervisor.write("fence.key", &KEY)?;
        let guest = hypervisor.guest(1)?;
        let mut config = Config::new(&key);
        config.uris = vec![uri.to_owned()];
        config.backend = backend.to_vec();
        // Line by line: virsh would buffer its output to a pipe.
        let mut watch = Command::new("stdbuf");
        watch.args(["-oL", "virsh", "-c", uri, "event", "--event", "lifecycle", "--loop"]);
        let events = Process::start(hypervisor.space(), &mut watch)?;
        let lab = Self { hypervisor, libvirtd, guest, key, config, uri, events };
        // virsh misses events before it listens, so the test makes events until virsh shows one.
        poll_until("libvirt's events", SOON, || {
            lab.start_domain("first")?;
            lab.libvirtd.virsh(uri, &["destroy", "first"])?;
            Ok((lab.count("first", "Started") > 0).then_some(()))
        })?;
        Ok(lab)
    }

    fn start_domain(&self, name: &str) -> Result<()> {
        if self.uri == container::URI {
            container::start(&self.libvirtd, name)
        } else {
            qemu::start_idle(&self.libvirtd, name)
        }
    }

    fn witness(&self, name: &str) -> Result<Witness> {
        if self.uri == container::URI {
            Witness::of_container(&self.hypervisor, name)
        } else {
            Witness::of_qemu(&self.hypervisor, name)
        }
    }

    /// The number of these events of a domain. libvirt reports the end twice if a container is
    /// destroyed while it dies; this counts once.
    fn count(&self, name: &str, what: &str) -> usize {
        let of_it = format!("domain '{name}': ");
        let lines = self.events.stdout().lines();
        let mut told: Vec<_> = lines.iter().filter_map(|line| line.split_once(&of_it)?.1.split(' ').next()).collect();
        told.dedup_by(|later, earlier| later == earlier && *later == "Stopped");
        told.iter().filter(|one| **one == what).count()
    }

    /// Starts a daemon that dies at `point`, by a script that executes the daemon.
    fn mortal(&self, point: &str) -> Result<Server> {
        let script = format!("#!/bin/sh\n{FAULT}={point} exec '{}' \"$@\"\n", faults()?.display());
        self.hypervisor.write_mode("mortal", script.as_bytes(), 0o755)?;
        Server::start(&self.hypervisor, &Which::Ours(self.hypervisor.path("mortal").into()), &self.config)
    }

    /// Kills a daemon at `point` of a request, and checks the state that is left.
    fn die(&self, point: &str, op: Op, who: Who) -> Result<()> {
        let name = format!("{}-{point}", op.name());
        self.start_domain(&name)?;
        let before = self.witness(&name)?;
        let mut mortal = self.mortal(point)?;
        let mut asker = Asker::begin(self, who, &name, op)?;
        poll_until("the daemon's death", SOON, || {
            asker.talk()?;
            Ok((!mortal.is_running()?).then_some(()))
        })
        .with_context(|| mortal.log())?;
        let ended = mortal.finish(SOON)?;
        ensure!(ended.code.is_none(), "the daemon ended by itself: {ended:?}");
        let next = Server::start(&self.hypervisor, &Which::ours()?, &self.config)?;
        if !BEFORE_THE_NOTE.contains(&point) && !IN_THE_RESTART.contains(&point) {
            self.is_in_the_history(op, &name)?;
        }
        let told = asker.end(&before, !BEFORE_THE_NOTE.contains(&point))?;
        self.judge(point, op, &name, &before, told).with_context(|| format!("the next daemon: {}", next.log()))
    }

    /// The next daemon tells of the request that was begun, and not finished.
    fn is_in_the_history(&self, op: Op, name: &str) -> Result<()> {
        let Which::Ours(program) = Which::ours()? else { bail!("asked for ours") };
        let mut command = Command::new(program);
        command.args(["-f", &self.hypervisor.path("fence_virt.conf"), "history", "--json", "--domain", name]);
        let told = poll_until("the history to name the domain", SOON, || {
            let told = run(self.hypervisor.space(), &mut command, SOON)?.success()?.stdout;
            Ok(Some(told).filter(|told| !told.is_empty()))
        })?;
        let begun = format!("\"event\":\"unfinished\",\"op\":\"{}\"", op.name());
        ensure!(told.lines().count() == 1 && told.contains(&begun), "the history has: {told}");
        Ok(())
    }

    fn judge(&self, point: &str, op: Op, name: &str, before: &Witness, told: bool) -> Result<()> {
        let killed = AFTER_THE_KILL.contains(&point) || IN_THE_RESTART.contains(&point);
        ensure!(!(killed || told) || before.dies_within(SOON)?, "the domain was killed, and lives");
        if op == Op::Reboot {
            // The domain was never killed, or runs again.
            let runs =
                || Ok((self.libvirtd.state(self.uri, name)? == "running").then(|| self.witness(name).ok()).flatten());
            poll_until("what a reboot has killed to come back", SOON, runs)?;
        }
        if before.is_dead()? {
            poll_until(
                "libvirt's event about the death",
                SOON,
                || Ok((self.count(name, "Stopped") > 0).then_some(())),
            )?;
        }
        let stopped = self.count(name, "Stopped");
        ensure!(stopped <= 1, "one request, and {stopped} kills");
        let expected = if op == Op::Reboot { 1 + stopped } else { 1 };
        // The state changes a moment before its event arrives.
        let told = || Ok((self.count(name, "Started") >= expected).then_some(()));
        poll_until(&format!("{expected} starts, after {stopped} kills"), SOON, told)?;
        let started = self.count(name, "Started");
        ensure!(started == expected, "{stopped} kills, and started {started} times");

        // The next request is served, and concerns the present instance. libvirt may still perform
        // a destroy of the dead daemon, so no process that is ending may be chosen.
        let later = if stopped > 0 && started > stopped { Some(self.witness(name)?) } else { None };
        let off = Client::new("off", &self.key).domain(name).run(self.guest.space())?;
        ensure!(off.code == Some(0), "the next request: {off:?}");
        ensure!(before.is_dead()?, "success was answered, and the first instance lives");
        if let Some(later) = later {
            ensure!(later.is_dead()?, "success was answered, and the domain lives");
        }
        self.libvirtd.wait_state(self.uri, name, "shut off")
    }
}

/// A client in the middle of its request.
enum Asker {
    Stock(Process),
    Insistent { peer: Peer, request: Request, told: bool },
}

impl Asker {
    fn begin(lab: &CrashLab, who: Who, name: &str, op: Op) -> Result<Self> {
        match who {
            Who::Stock => {
                let client = Client::new(op.name(), &lab.key).domain(name).timeout(10);
                Ok(Self::Stock(client.start(lab.guest.space())?))
            }
            Who::Insistent => {
                let peer = Peer::new(&lab.guest, &KEY, Family::V4)?;
                let request = peer.request(op, name)?;
                peer.send(request)?;
                Ok(Self::Insistent { peer, request, told: false })
            }
        }
    }

    /// Takes a callback, if one comes.
    fn talk(&mut self) -> Result<()> {
        if let Self::Insistent { peer, told, .. } = self
            && let Some(mut call) = peer.called_back(Duration::ZERO)?
        {
            // The daemon may die in the middle of the conversation.
            *told |= call.converse().is_ok_and(|reply| reply == 0);
        }
        Ok(())
    }

    /// Whether the client got a success in the end, with the next daemon running. Checks the victim
    /// at that moment.
    fn end(self, before: &Witness, noted: bool) -> Result<bool> {
        let told = match self {
            Self::Stock(client) => client.finish(SOON)?.code == Some(0),
            Self::Insistent { told: true, .. } => true,
            Self::Insistent { peer, request, .. } => {
                peer.send(request)?;
                let limit = if noted { SILENCE } else { SOON };
                match peer.called_back(limit)? {
                    Some(_) if noted => bail!("the request was claimed, and the client is called back again"),
                    Some(mut call) => call.converse()? == 0,
                    None => {
                        ensure!(noted, "nothing was done, and no callback comes");
                        false
                    }
                }
            }
        };
        ensure!(!told || before.is_dead()?, "success was answered, and the domain lives");
        Ok(told)
    }
}

fn all(uri: &'static str, op: Op, who: Who, points: &[&[&str]]) -> Result<()> {
    all_with(&CrashLab::new(uri, &[])?, op, who, points)
}

fn all_with(lab: &CrashLab, op: Op, who: Who, points: &[&[&str]]) -> Result<()> {
    for point in points.concat() {
        lab.die(point, op, who).with_context(|| format!("{} of {who:?}, daemon killed {point}", op.name()))?;
    }
    Ok(())
}

const OFF: [&[&str]; 4] = [&BEFORE_THE_NOTE, &["after-note"], &["after-destroy"], &AFTER_THE_KILL];
const REBOOT: [&[&str]; 4] = [&BEFORE_THE_NOTE, &["after-note", "after-record"], &AFTER_THE_KILL, &IN_THE_RESTART];

#[test]
fn the_daemon_dies_in_the_middle_of_an_off() -> Result<()> {
    all(qemu::URI, Op::Off, Who::Stock, &OFF)
}

#[test]
fn the_daemon_dies_in_the_middle_of_an_off_that_is_asked_for_again() -> Result<()> {
    all(qemu::URI, Op::Off, Who::Insistent, &OFF)
}

#[test]
fn the_daemon_dies_in_the_middle_of_a_reboot() -> Result<()> {
    all(qemu::URI, Op::Reboot, Who::Stock, &REBOOT)
}

#[test]
fn the_daemon_dies_in_the_middle_of_a_reboot_that_is_asked_for_again() -> Result<()> {
    all(qemu::URI, Op::Reboot, Who::Insistent, &REBOOT)
}

#[test]
fn the_daemon_dies_in_the_middle_of_a_containers_reboot() -> Result<()> {
    all(container::URI, Op::Reboot, Who::Insistent, &[&["after-record", "after-kill", "before-reply"], &IN_THE_RESTART])
}

#[test]
fn the_daemon_dies_in_the_middle_of_a_containers_off() -> Result<()> {
    all(container::URI, Op::Off, Who::Insistent, &[&["after-note", "after-destroy"], &AFTER_THE_KILL])
}

#[test]
fn the_daemon_dies_in_the_middle_of_what_libvirt_does() -> Result<()> {
    let lab = CrashLab::new(qemu::URI, &[("kill", "libvirt")])?;
    let after = ["before-reply", "after-reply"];
    all_with(&lab, Op::Off, Who::Insistent, &[&["after-note", "after-destroy"], &after])?;
    all_with(
        &lab,
        Op::Reboot,
        Who::Insistent,
        &[&["after-note", "after-record", "after-destroy"], &after, &IN_THE_RESTART],
    )
}

/// The released daemon has no fault points.
#[test]
fn the_daemon_itself_has_no_point_at_which_it_dies() -> Result<()> {
    let has = |program: PathBuf| -> Result<bool> {
        let bytes = std::fs::read(&program).with_context(|| program.display().to_string())?;
        Ok(bytes.windows(FAULT.len()).any(|window| window == FAULT.as_bytes()))
    };
    let Which::Ours(ours) = Which::ours()? else { bail!("asked for ours") };
    ensure!(!has(ours)?, "the daemon was built with the feature `fault-points`");
    ensure!(has(faults()?)?, "the build with fault points does not have the variable");
    Ok(())
}
