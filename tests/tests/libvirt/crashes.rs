//! The daemon is killed at every step of a request, and another one is started: one kill at most,
//! no success without death, what a reboot killed comes back, and the next request is served.
//!
//! Whoever asks is a stock client, or one that sends its request again when the connection is lost,
//! as no stock client does: it shows that the next daemon knows what was claimed. Who counts the
//! kills is libvirt's own record of events, not the daemon.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use fence_common::wire::{Op, Request};
use fence_lab::client::{Client, Family};
use fence_lab::lab::{Guest, Hypervisor};
use fence_lab::libvirtd::Libvirtd;
use fence_lab::peer::Peer;
use fence_lab::process::{Process, poll_until};
use fence_lab::server::{Config, Server, Which};
use fence_lab::witness::Witness;
use fence_lab::{container, qemu, tools};

use super::KEY;

/// How long what is certain to happen may take on a loaded machine.
const SOON: Duration = Duration::from_secs(60);
/// How long a call-back that must not come is waited for.
const SILENCE: Duration = Duration::from_millis(700);

/// Says where the daemon dies.
const FAULT: &str = "FENCE_FAULT";

/// The steps at which it does, in the order of a request.
const BEFORE_THE_NOTE: [&str; 4] = ["after-verify", "after-connect", "after-authentication", "after-claim"];
const AFTER_THE_KILL: [&str; 4] = ["after-kill", "after-proof", "before-reply", "after-reply"];
const IN_THE_RESTART: [&str; 2] = ["before-restart", "after-restart"];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Who {
    Stock,
    Insistent,
}

/// `fence-daemon` with points at which it dies.
fn faults() -> Result<PathBuf> {
    let path = std::env::var_os("FENCE_DAEMON_FAULTS_BIN")
        .map_or_else(|| tools::target_directory().join("debug/fence-daemon-faults"), PathBuf::from);
    ensure!(path.is_file(), "no {}: run `cargo xtask test libvirt`", path.display());
    Ok(path)
}

struct Lab {
    /// libvirt's events, as virsh prints them. First, as it ends first: the lab waits for all of
    /// its processes.
    events: Process,
    hypervisor: Hypervisor,
    libvirtd: Libvirtd,
    guest: Guest,
    key: String,
    config: Config,
    uri: &'static str,
}

impl Lab {
    fn new(uri: &'static str, backend: &[(&'static str, &'static str)]) -> Result<Self> {
        let hypervisor = Hypervisor::new()?;
        let libvirtd = Libvirtd::start(&hypervisor)?;
        let key = hypervisor.write("fence.key", &KEY)?;
        let guest = hypervisor.guest(1)?;
        let mut config = Config::new(&key);
        config.uris = vec![uri.to_owned()];
        config.backend = backend.to_vec();
        // Line by line: into a pipe virsh would save it up.
        let mut watch = Command::new("stdbuf");
        watch.args(["-oL", "virsh", "-c", uri, "event", "--event", "lifecycle", "--loop"]);
        let events = Process::start(hypervisor.space(), &mut watch)?;
        let lab = Self { hypervisor, libvirtd, guest, key, config, uri, events };
        // What begins before virsh listens is not seen: begin something until it is.
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

    /// How often libvirt has said this of a domain. The end of a container that is destroyed while
    /// it dies is told twice: it counts once.
    fn count(&self, name: &str, what: &str) -> usize {
        let of_it = format!("domain '{name}': ");
        let lines = self.events.stdout().lines();
        let mut told: Vec<_> = lines.iter().filter_map(|line| line.split_once(&of_it)?.1.split(' ').next()).collect();
        told.dedup_by(|later, earlier| later == earlier && *later == "Stopped");
        told.iter().filter(|one| **one == what).count()
    }

    /// A daemon that dies at `point`. Through a script, which becomes the daemon.
    fn mortal(&self, point: &str) -> Result<Server> {
        let script = format!("#!/bin/sh\n{FAULT}={point} exec '{}' \"$@\"\n", faults()?.display());
        self.hypervisor.write_mode("mortal", script.as_bytes(), 0o755)?;
        Server::start(&self.hypervisor, &Which::Ours(self.hypervisor.path("mortal").into()), &self.config)
    }

    /// Has a daemon die at `point` of a request, and looks at what is left.
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
        ensure!(ended.code.is_none(), "it has ended by itself: {ended:?}");
        let next = Server::start(&self.hypervisor, &Which::ours()?, &self.config)?;
        let told = asker.end(&before, !BEFORE_THE_NOTE.contains(&point))?;
        self.judge(point, op, &name, &before, told).with_context(|| format!("the next daemon: {}", next.log()))
    }

    fn judge(&self, point: &str, op: Op, name: &str, before: &Witness, told: bool) -> Result<()> {
        let killed = AFTER_THE_KILL.contains(&point) || IN_THE_RESTART.contains(&point);
        ensure!(!(killed || told) || before.dies_within(SOON)?, "it was killed, and lives");
        if op == Op::Reboot {
            // Never killed, or started again.
            let runs =
                || Ok((self.libvirtd.state(self.uri, name)? == "running").then(|| self.witness(name).ok()).flatten());
            poll_until("what a reboot has killed to come back", SOON, runs)?;
        }
        if before.is_dead()? {
            poll_until("libvirt's word of the death", SOON, || Ok((self.count(name, "Stopped") > 0).then_some(())))?;
        }
        let stopped = self.count(name, "Stopped");
        ensure!(stopped <= 1, "one request, and {stopped} kills");
        let expected = if op == Op::Reboot { 1 + stopped } else { 1 };
        // The state is there a moment before the event about it.
        let told = || Ok((self.count(name, "Started") >= expected).then_some(()));
        poll_until(&format!("{expected} starts, after {stopped} kills"), SOON, told)?;
        let started = self.count(name, "Started");
        ensure!(started == expected, "{stopped} kills, and started {started} times");

        // The next request is served, and means what runs now. libvirt may still carry out a
        // destroy that the dead daemon called: do not look for a process that ends right now.
        let later = if stopped > 0 && started > stopped { Some(self.witness(name)?) } else { None };
        let off = Client::new("off", &self.key).domain(name).run(self.guest.space())?;
        ensure!(off.code == Some(0), "the next request: {off:?}");
        ensure!(before.is_dead()?, "told of success, and the first instance lives");
        if let Some(later) = later {
            ensure!(later.is_dead()?, "told of success, and it lives");
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
    fn begin(lab: &Lab, who: Who, name: &str, op: Op) -> Result<Self> {
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

    /// Takes a call-back, if there is one.
    fn talk(&mut self) -> Result<()> {
        if let Self::Insistent { peer, told, .. } = self
            && let Some(mut call) = peer.called_back(Duration::ZERO)?
        {
            // The daemon may die in the middle of it.
            *told |= call.converse().is_ok_and(|reply| reply == 0);
        }
        Ok(())
    }

    /// Whether it was told of success in the end, with the next daemon there. It looks at the
    /// victim right then.
    fn end(self, before: &Witness, noted: bool) -> Result<bool> {
        let told = match self {
            Self::Stock(client) => client.finish(SOON)?.code == Some(0),
            Self::Insistent { told: true, .. } => true,
            Self::Insistent { peer, request, .. } => {
                peer.send(request)?;
                let limit = if noted { SILENCE } else { SOON };
                match peer.called_back(limit)? {
                    Some(_) if noted => bail!("it was claimed, and is called back once more"),
                    Some(mut call) => call.converse()? == 0,
                    None => {
                        ensure!(noted, "nothing was done, and nobody calls back");
                        false
                    }
                }
            }
        };
        ensure!(!told || before.is_dead()?, "told of success, and it lives");
        Ok(told)
    }
}

fn all(uri: &'static str, op: Op, who: Who, points: &[&[&str]]) -> Result<()> {
    all_with(&Lab::new(uri, &[])?, op, who, points)
}

fn all_with(lab: &Lab, op: Op, who: Who, points: &[&[&str]]) -> Result<()> {
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
    let lab = Lab::new(qemu::URI, &[("kill", "libvirt")])?;
    let after = ["before-reply", "after-reply"];
    all_with(&lab, Op::Off, Who::Insistent, &[&["after-note", "after-destroy"], &after])?;
    all_with(
        &lab,
        Op::Reboot,
        Who::Insistent,
        &[&["after-note", "after-record", "after-destroy"], &after, &IN_THE_RESTART],
    )
}

/// What users get has no such points.
#[test]
fn the_daemon_itself_has_no_point_at_which_it_dies() -> Result<()> {
    let has = |program: PathBuf| -> Result<bool> {
        let bytes = std::fs::read(&program).with_context(|| program.display().to_string())?;
        Ok(bytes.windows(FAULT.len()).any(|window| window == FAULT.as_bytes()))
    };
    let Which::Ours(ours) = Which::ours()? else { bail!("asked for ours") };
    ensure!(!has(ours)?, "the daemon was built with the feature `fault-points`");
    ensure!(has(faults()?)?, "a variable of another name");
    Ok(())
}
