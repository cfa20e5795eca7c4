//! Carries out the faults, and waits until the daemon answers again.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use fastrand::Rng;
use fence_common::sync::lock;
use fence_common::wire::Op;
use fence_lab::client::Family;
use fence_lab::peer::Peer;
use fence_lab::qemu;
use fence_lab::server::{START_LIMIT, STOP_LIMIT};
use nix::sys::signal::Signal;

use super::client::probe;
use super::faults::{Fault, FaultKind, Faults};
use super::judge::{Judge, Told};
use super::site::{Host, PROBE, Running, SLEEPER, World, key, key_file};
use super::{SoakPlan, rest};

/// How long is waited for an answer after a fault. The rule is stricter.
const GIVE_UP: Duration = Duration::from_secs(90);
/// The longest time that nothing is in a killed process's place.
const AWAY: Duration = Duration::from_secs(3);
/// How long clients may still sign with a key after the others have changed: longer than a stock
/// client waits.
const KEY_KEPT: Duration = Duration::from_secs(40);
/// How long a callback that must not come is waited for.
const SILENCE: Duration = Duration::from_millis(1500);
/// How many lines of a daemon's log a report shows.
const SHOWN: usize = 200;

/// What the faults are done to.
pub(super) struct Hands<'w> {
    plan: SoakPlan,
    world: &'w World,
    running: [Running; 2],
    /// The logs of daemons that have ended, by hypervisor.
    ended: [String; 2],
    /// When the clients changed to the key that they sign with.
    changed: [Instant; 2],
    faults: Faults,
    rng: Rng,
}

impl<'w> Hands<'w> {
    pub(super) fn new(plan: &SoakPlan, world: &'w World, running: [Running; 2], mut rng: Rng) -> Self {
        let (faults, now) = (Faults::new(rng.fork()), Instant::now());
        Self { plan: plan.clone(), world, running, ended: Default::default(), changed: [now; 2], faults, rng }
    }

    /// One fault after the other, until it is over.
    pub(super) fn work(&mut self, judge: &Judge, over: &AtomicBool) -> Result<()> {
        loop {
            rest(over, SoakPlan::up_to(&mut self.rng, self.plan.pace.fault));
            self.see_daemons(judge)?;
            let Some(fault) = self.faults.next().filter(|_| !over.load(Ordering::Relaxed)) else { return Ok(()) };
            self.carry_out(fault, judge).with_context(|| format!("{} at hypervisor {}", fault.kind, fault.host + 1))?;
        }
    }

    fn carry_out(&mut self, Fault { kind, host: number }: Fault, judge: &Judge) -> Result<()> {
        let host = &self.world.hosts[number];
        let recovered = match kind {
            FaultKind::DaemonKill | FaultKind::DaemonStop => {
                host.outages.begin(kind);
                self.end_daemon(number, kind, judge)?;
                std::thread::sleep(SoakPlan::up_to(&mut self.rng, AWAY));
                let Running { server, settings, .. } = &mut self.running[number];
                *server = host.spawn(&self.plan.daemon, settings, &self.world.nomad)?;
                let recovered = probe(host, PROBE, Told::Success, GIVE_UP)?;
                server.wait_ready(START_LIMIT)?;
                recovered
            }
            FaultKind::LibvirtdKill | FaultKind::LibvirtdStop | FaultKind::LibvirtdHang => {
                host.outages.begin(kind);
                self.disturb_libvirtd(number, kind)?;
                probe(host, SLEEPER, Told::Off, GIVE_UP)?
            }
            FaultKind::Reload => {
                self.change_settings(number, judge)?;
                probe(host, PROBE, Told::Success, GIVE_UP)?
            }
            FaultKind::BrokenReload => {
                let settings = self.running[number].settings;
                let text = host.configuration(&settings, &self.world.nomad);
                let broken = text.replacen(&format!("kill = \"{}\"", settings.kill), "kill = \"bluntly\"", 1);
                host.hypervisor.write("fence_virt.conf", broken.as_bytes())?;
                self.hang_up(number, true, judge)?;
                host.configure(&settings, &self.world.nomad)?;
                probe(host, PROBE, Told::Success, GIVE_UP)?
            }
            FaultKind::Key => {
                self.change_key(number, judge)?;
                probe(host, PROBE, Told::Success, GIVE_UP)?
            }
            // Floods have a thread of their own.
            FaultKind::Flood => return Ok(()),
        };
        host.outages.end();
        judge.recovered(kind, recovered);
        if recovered.is_none() {
            judge.violation(format_args!("hypervisor {}: no answer for {GIVE_UP:?} after {kind}", number + 1));
        }
        Ok(())
    }

    fn disturb_libvirtd(&mut self, number: usize, kind: FaultKind) -> Result<()> {
        let hangs = kind == FaultKind::LibvirtdHang;
        let away = SoakPlan::up_to(&mut self.rng, if hangs { self.plan.pace.hang } else { AWAY });
        let libvirtd = &mut self.running[number].libvirtd;
        if hangs {
            libvirtd.signal(Signal::SIGSTOP)?;
        } else if kind == FaultKind::LibvirtdKill {
            libvirtd.kill()?;
        } else {
            libvirtd.stop()?;
        }
        std::thread::sleep(away);
        if !hangs {
            libvirtd.start_again()?;
        }
        libvirtd.go_on(qemu::URI)
    }

    /// Kills a libvirtd, and starts it again.
    pub(super) fn renew_libvirtd(&mut self, number: usize) -> Result<()> {
        let libvirtd = &mut self.running[number].libvirtd;
        libvirtd.kill()?;
        libvirtd.start_again()?;
        libvirtd.go_on(qemu::URI)
    }

    fn end_daemon(&mut self, number: usize, kind: FaultKind, judge: &Judge) -> Result<()> {
        let server = &mut self.running[number].server;
        if kind == FaultKind::DaemonKill {
            server.crash()?;
        } else {
            server.process().signal(Signal::SIGTERM)?;
            if !server.process().ends_within(STOP_LIMIT)? {
                judge.violation(format_args!("hypervisor {}: the daemon does not end", number + 1));
                server.crash()?;
            }
        }
        *lock(&self.world.hosts[number].daemon) = None;
        self.ended[number].push_str(&server.log());
        Ok(())
    }

    /// Makes the daemon read its present settings.
    fn reload(&mut self, number: usize, judge: &Judge) -> Result<()> {
        self.world.hosts[number].configure(&self.running[number].settings, &self.world.nomad)?;
        self.hang_up(number, false, judge)
    }

    /// Sends SIGHUP, and compares what the daemon says.
    fn hang_up(&mut self, number: usize, is_refused: bool, judge: &Judge) -> Result<()> {
        let server = &mut self.running[number].server;
        let position = server.log_position();
        server.process().signal(Signal::SIGHUP)?;
        let said = server.wait_log(position, GIVE_UP, |line| line.contains("SIGHUP: ").then(|| line.to_owned()));
        let refuses = |line: &String| line.contains("stay in force");
        if said.as_ref().is_none_or(|line| refuses(line) != is_refused) {
            let wanted = if is_refused { "refused" } else { "taken" };
            judge.violation(format_args!("hypervisor {}: a reload is not {wanted}: {said:?}", number + 1));
        }
        Ok(())
    }

    fn change_settings(&mut self, number: usize, judge: &Judge) -> Result<()> {
        let settings = &mut self.running[number].settings;
        settings.rate = self.rng.u32(50..200);
        settings.kill = if self.rng.bool() { "direct" } else { "libvirt" };
        settings.second_group = !settings.second_group;
        self.reload(number, judge)
    }

    /// A second key comes and the clients take it, or the first one goes. Until it may, something
    /// else changes.
    fn change_key(&mut self, number: usize, judge: &Judge) -> Result<()> {
        let host = &self.world.hosts[number];
        match self.running[number].settings.keys {
            (first, None) => {
                let new = first + 1;
                host.hypervisor.write(&key_file(new), &key(new))?;
                self.running[number].settings.keys = (first, Some(new));
                self.reload(number, judge)?;
                *lock(&host.signing) = new;
                self.changed[number] = Instant::now();
            }
            (_, Some(_)) if self.changed[number].elapsed() < KEY_KEPT => self.change_settings(number, judge)?,
            (old, Some(new)) => {
                self.running[number].settings.keys = (new, None);
                self.reload(number, judge)?;
                if answers_to(host, old)? {
                    judge.violation(format_args!("hypervisor {}: a dropped key is served", number + 1));
                }
            }
        }
        Ok(())
    }

    /// A daemon that has ended by itself is a violation.
    fn see_daemons(&mut self, judge: &Judge) -> Result<()> {
        for (number, running) in self.running.iter_mut().enumerate() {
            if !running.server.is_running()? {
                judge.violation(format_args!("the daemon of hypervisor {} has ended by itself", number + 1));
            }
        }
        Ok(())
    }

    /// A panic in a daemon's log is a violation.
    pub(super) fn note_panics(&self, judge: &Judge) {
        for (number, (ended, running)) in self.ended.iter().zip(&self.running).enumerate() {
            let log = running.server.log();
            if let Some(line) = ended.lines().chain(log.lines()).find(|line| line.contains("panicked")) {
                judge.violation(format_args!("the daemon of hypervisor {}: {line}", number + 1));
            }
        }
    }

    /// The ends of the daemons' logs.
    pub(super) fn log(&self) -> String {
        let mut text = String::new();
        for (number, (ended, running)) in self.ended.iter().zip(&self.running).enumerate() {
            let log = format!("{ended}{}", running.server.log());
            let lines: Vec<&str> = log.lines().collect();
            let shown = lines.get(lines.len().saturating_sub(SHOWN)..).unwrap_or_default().join("\n");
            text += &format!("\nthe daemon of hypervisor {}:\n{shown}\n", number + 1);
        }
        text
    }
}

/// Whether the daemon serves a request with this key.
fn answers_to(host: &Host, number: u32) -> Result<bool> {
    let guest = host.guests.last().context("no guest for probes")?;
    let peer = Peer::new(guest, &key(number), Family::V4)?;
    peer.send(peer.request(Op::Status, PROBE)?)?;
    Ok(peer.called_back(SILENCE)?.is_some())
}
