//! Trouble from outside: floods of bad requests, and an administrator who starts and stops
//! machines.

use std::net::{IpAddr, SocketAddr};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Result;
use fastrand::Rng;
use fence_common::wire::{DEFAULT_PORT, Op};
use fence_lab::client::Family;
use fence_lab::flood::{Flood, datagram, elsewhere, fragment};
use fence_lab::lab::{COMMAND_LIMIT, HYPERVISOR_V4, Hypervisor};
use fence_lab::peer::Peer;
use fence_lab::process::{Finished, run};
use zerocopy::IntoBytes as _;

use super::faults::FaultKind;
use super::judge::Judge;
use super::site::{Hold, Host, PROBE, World};
use super::{Pace, SoakPlan, rest};

/// How many datagrams of a flood differ.
const VARIANTS: u16 = 256;
/// A flood's pace: so many datagrams, and then a pause. That is some 5,000 a second, so that the
/// machine has time for the rest.
const SPURT: usize = 20;
const BREATH: Duration = Duration::from_millis(4);
/// How long a flood lasts, and at most how long none comes.
const LASTS: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_secs(12);
/// How many connections by tcp say nothing.
const SILENT: usize = 200;

/// Floods one hypervisor after the other.
pub(super) fn flood(world: &World, judge: &Judge, over: &AtomicBool, mut rng: Rng) -> Result<()> {
    loop {
        rest(over, SoakPlan::up_to(&mut rng, PAUSE));
        if over.load(Ordering::Relaxed) {
            return Ok(());
        }
        let host = &world.hosts[rng.usize(..world.hosts.len())];
        let lasts = SoakPlan::up_to(&mut rng, LASTS);
        let sent = match rng.u32(..5) {
            0 => stand_silent(host, over, lasts)?,
            kind => {
                let packets = packets(host, kind)?;
                let paced = (0..).map_while(move |number: usize| {
                    if number.is_multiple_of(SPURT) {
                        std::thread::sleep(BREATH);
                    }
                    packets.get(number % packets.len()).cloned()
                });
                let flood = Flood::of(&host.flooder, paced)?;
                rest(over, lasts);
                flood.stop()?
            }
        };
        judge.recovered(FaultKind::Flood, None);
        judge.note(|notes| notes.flooded += sent);
    }
}

/// What is sent over and over: a replay, fragments, and wrong digests from one sender or from many.
fn packets(host: &Host, kind: u32) -> Result<Vec<Vec<u8>>> {
    let flooder = &host.flooder;
    let own = flooder.v4;
    if kind == 1 {
        let (key, _) = host.signing();
        let peer = Peer::new(flooder, &key, Family::V4)?;
        return Ok(vec![datagram(own, peer.sign(peer.request(Op::Off, PROBE)?)?.as_bytes())?]);
    }
    let peer = Peer::new(flooder, b"a key that nobody has", Family::V4)?;
    let wrong = |number: u16| -> Result<Vec<u8>> {
        let payload = peer.sign(peer.request(Op::Off, PROBE)?)?;
        let source = match elsewhere(number) {
            IpAddr::V4(source) if kind == 2 => source,
            IpAddr::V4(_) | IpAddr::V6(_) => own,
        };
        if kind == 3 {
            fragment(source, number, true, payload.as_bytes())
        } else {
            datagram(source, payload.as_bytes())
        }
    };
    (0..VARIANTS).map(wrong).collect()
}

/// Connections by tcp that say nothing; each is made again when the daemon closes it.
fn stand_silent(host: &Host, over: &AtomicBool, lasts: Duration) -> Result<u64> {
    let peer = Peer::new(&host.flooder, b"a key that nobody has", Family::V4)?;
    host.flooder.space().in_network(|| {
        let (until, mut made, mut open) = (Instant::now() + lasts, 0, Vec::new());
        while Instant::now() < until && !over.load(Ordering::Relaxed) {
            // While there is no daemon, nobody listens.
            if let Ok(connection) = peer.connect_here(SocketAddr::from((HYPERVISOR_V4, DEFAULT_PORT))) {
                open.push(connection);
                made += 1;
            }
            if open.len() > SILENT {
                open.clear();
            }
            std::thread::sleep(BREATH);
        }
        Ok(made)
    })
}

/// Runs virsh. While libvirtd is away, it fails.
pub(super) fn virsh(hypervisor: &Hypervisor, uri: &str, arguments: &[&str]) -> Result<Finished> {
    run(hypervisor.space(), Command::new("virsh").args(["-q", "-c", uri]).args(arguments), COMMAND_LIMIT)?.success()
}

/// Starts, stops, suspends and resumes machines by libvirt's means.
pub(super) fn administrate(world: &World, pace: Pace, over: &AtomicBool, mut rng: Rng) -> Result<()> {
    loop {
        rest(over, SoakPlan::up_to(&mut rng, 2 * pace.client));
        if over.load(Ordering::Relaxed) {
            return Ok(());
        }
        let host = &world.hosts[rng.usize(..world.hosts.len())];
        let domain = &host.domains[rng.usize(..host.domains.len())];
        let verb = ["start", "start", "destroy", "suspend", "resume"][rng.usize(..5)];
        let Some(hold) = domain.hold() else { continue };
        if let Hold::Alone(mut ordered) = hold {
            *ordered = Instant::now();
            let _ = virsh(&host.hypervisor, domain.uri, &[verb, &domain.name]);
            // A paused machine does not answer a fence worse, and is not left behind.
            if verb == "suspend" {
                let _ = virsh(&host.hypervisor, domain.uri, &["resume", &domain.name]);
            }
        } else {
            let _ = virsh(&host.hypervisor, domain.uri, &[verb, &domain.name]);
        }
    }
}
