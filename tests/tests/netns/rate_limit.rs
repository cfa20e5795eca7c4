//! Attacks by one guest, while another one with a stock client is served as usual.

use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use fence_bench::caller;
use fence_common::wire::{DEFAULT_GROUP_V4, Op, Request};
use fence_lab::client::Family;
use fence_lab::flood::{Flood, Rounds, datagram, elsewhere, fragment, igmp};
use fence_lab::kernel::{self, Counters};
use fence_lab::lab::{BRIDGE, Guest, HYPERVISOR_V4};
use fence_lab::peer::{Peer, set_address};
use fence_lab::process::poll_until;
use fence_lab::server::Server;
use fence_lab::timings::Fence;
use nix::sys::signal::Signal;
use zerocopy::IntoBytes;

use crate::bench::{Bench, DOMAIN, key};

/// How long an event that must come may take on a loaded machine.
const SURELY: Duration = Duration::from_secs(60);

/// A daemon, a guest that attacks, and an honest guest that has been served before.
struct Scene {
    bench: Bench,
    honest: Guest,
    server: Server,
    before: Counters,
    position: usize,
    begun: Instant,
    used: Duration,
}

impl Scene {
    fn new() -> Result<Self> {
        let bench = Bench::new()?;
        let honest = bench.hypervisor.guest(2)?;
        let server = bench.serve(&bench.config("generic"))?;
        bench.expect(&server, honest.space(), &bench.about_domain("status"), 0)?;
        let (before, position) = (bench.counters()?, server.log_position());
        let (begun, used) = (Instant::now(), Duration::ZERO);
        let mut scene = Self { bench, honest, server, before, position, begun, used };
        scene.used = scene.server.process().processor_time()?;
        Ok(scene)
    }

    /// Ends the attack and checks its cost: little processor time, one log line for each fenced
    /// domain, and about a hundred for each misbehaving guest.
    fn conclude(mut self) -> Result<()> {
        let (took, used) = (self.begun.elapsed(), self.server.process().processor_time()?.saturating_sub(self.used));
        let lines = self.server.log_position() - self.position;
        eprintln!(
            "{took:.1?}: {used:?} of processor time, {lines} lines of log: {:?}",
            self.bench.counters()?.nonzero()
        );
        ensure!(used < took / 2, "the daemon computed for {used:?} of {took:?}");
        ensure!(lines < 400, "{lines} lines of log: {}", self.server.log());
        Ok(())
    }

    fn attacker(&self) -> Result<Peer> {
        Peer::new(&self.bench.guest, &key(), Family::V4)
    }

    /// The increase of a counter since the beginning.
    fn counted(&self, name: &str) -> Result<u64> {
        (&self.bench.counters()? - &self.before).get(name)
    }

    /// Waits until a counter has risen by more than `more_than`.
    fn until(&self, name: &str, more_than: u64) -> Result<()> {
        poll_until(name, SURELY, || Ok((self.counted(name)? > more_than).then_some(())))
            .with_context(|| format!("{:?}", self.bench.counters().map(|now| format!("{:?}", now.nonzero()))))
    }

    /// Sends the honest guest's requests during an attack. Each is answered, and none of its
    /// datagrams is dropped.
    fn serve_honest(&self, rounds: usize) -> Result<()> {
        for _ in 0..rounds {
            for (op, code) in [("status", 0), ("off", 0), ("status", 2), ("on", 0)] {
                self.bench.expect(&self.server, self.honest.space(), &self.bench.about_domain(op), code)?;
            }
        }
        let [failures, over_limit] = self.known_of(self.honest.v4)?;
        ensure!(failures == 0 && over_limit == 0, "{failures} of its digests were wrong, {over_limit} were refused");
        Ok(())
    }

    /// The bridge's group members and routers, for failure messages.
    fn bridge(&self) -> String {
        let said =
            |what: &[&str]| self.bench.hypervisor.space().must("bridge", &[&["-d", "mdb", "show"], what].concat());
        said(&["dev", BRIDGE]).map_or_else(|error| format!("{error:#}"), |said| said.stdout)
    }

    /// The program's record of a trusted sender: its failures, and its datagrams over a limit. Read
    /// through bpftool, as an administrator reads it.
    fn known_of(&self, ip: Ipv4Addr) -> Result<[u64; 2]> {
        let dump = kernel::dump(&self.bench.hypervisor, "fence_trusted")?;
        let entries = dump.as_array().context("no entries")?;
        let is_it = |entry: &&serde_json::Value| {
            let bytes = entry.pointer("/formatted/key/ip").and_then(|ip| ip.as_array());
            bytes.is_some_and(|bytes| {
                bytes.iter().take(4).map(serde_json::Value::as_u64).eq(ip.octets().map(|byte| Some(u64::from(byte))))
            })
        };
        let entry = entries.iter().find(is_it).with_context(|| format!("{ip} is not trusted: {dump}"))?;
        let field = |name: &str| {
            let value = entry.pointer("/formatted/value").and_then(|value| value.get(name));
            value.and_then(serde_json::Value::as_u64).with_context(|| format!("no {name}: {entry}"))
        };
        Ok([field("failures")?, field("over_limit")?])
    }
}

/// A request from another address, with a wrong digest.
fn forged(peer: &Peer, address: IpAddr) -> Result<Vec<u8>> {
    let mut request = peer.request(Op::Off, DOMAIN)?;
    set_address(&mut request, address);
    request.hash_kind = 2;
    request.hash = [0x5a; 64];
    let IpAddr::V4(source) = address else { anyhow::bail!("not IPv4") };
    datagram(source, request.as_bytes())
}

#[test]
fn a_flood_of_bad_digests_from_one_source() -> Result<()> {
    let scene = Scene::new()?;
    let peer = scene.attacker()?;
    let flood = Flood::start(&scene.bench.guest, vec![forged(&peer, peer.address())?], Rounds::Endless)?;
    scene.until("drop_source_limit", 10_000)?;
    scene.serve_honest(3)?;
    let sent = flood.stop()?;
    // The program examined almost none of the flood; the attacker's own good requests wait until
    // its bucket fills.
    let (looked, unseen) = (scene.counted("drop_digest")?, scene.counted("drop_source_limit")?);
    ensure!(unseen > looked, "of {sent}, {looked} were looked at and {unseen} were not");
    ensure!(scene.counted("drop_global_limit")? == 0);
    scene.conclude()
}

#[test]
fn a_flood_of_bad_digests_from_ten_thousand_sources() -> Result<()> {
    let scene = Scene::new()?;
    let peer = scene.attacker()?;
    let packets = (0..10_000).map(|n| forged(&peer, elsewhere(n))).collect::<Result<Vec<_>>>()?;
    let flood = Flood::start(&scene.bench.guest, packets, Rounds::Endless)?;
    scene.until("drop_global_limit", 10_000)?;
    scene.serve_honest(3)?;
    flood.stop()?;
    // The honest guest is trusted; unknown senders wait until the flood ends.
    let late = scene.bench.hypervisor.guest(3)?;
    scene.bench.expect(&scene.server, late.space(), &scene.bench.about_domain("status"), 0)?;
    scene.conclude()
}

#[test]
fn a_flood_of_a_recorded_request() -> Result<()> {
    let scene = Scene::new()?;
    let victim = Peer::new(&scene.honest, &key(), Family::V4)?;
    let recorded = victim.sign(victim.request(Op::Off, DOMAIN)?)?;
    victim.send_bytes(recorded.as_bytes())?;
    let mut call = victim.called_back(SURELY)?.context("no callback")?;
    ensure!(call.converse()? == 0);
    scene.bench.expect(&scene.server, scene.honest.space(), &scene.bench.about_domain("on"), 0)?;
    // By another guest, with the victim's source address.
    let packets = vec![datagram(scene.honest.v4, recorded.as_bytes())?];
    let flood = Flood::start(&scene.bench.guest, packets, Rounds::Endless)?;
    scene.until("drop_replay", 10_000)?;
    scene.serve_honest(3)?;
    flood.stop()?;
    ensure!(victim.called_back(Duration::from_millis(500))?.is_none(), "called back: {}", scene.server.log());
    ensure!(scene.counted("drop_digest")? == 0);
    scene.conclude()
}

/// So many requests of a guest, each new and right, that ask to be called back where nobody
/// listens.
fn fresh(peer: &Peer, guest: &Guest, many: usize) -> Result<Vec<Vec<u8>>> {
    let one = |_| -> Result<Vec<u8>> {
        let request = Request { port: 9.into(), ..peer.request(Op::Status, DOMAIN)? };
        datagram(guest.v4, peer.sign(request)?.as_bytes())
    };
    (0..many).map(one).collect()
}

#[test]
fn a_flood_of_right_requests_by_a_noisy_guest() -> Result<()> {
    let scene = Scene::new()?;
    let peer = scene.attacker()?;
    let mut flood = Flood::start(&scene.bench.guest, fresh(&peer, &scene.bench.guest, 4000)?, Rounds::One)?;
    scene.serve_honest(1)?;
    ensure!(flood.wait()? == 4000);
    scene.until("drop_delivery_limit", 500)?;
    scene.serve_honest(2)?;
    // The guest's requests are accepted again once its bucket has filled a little.
    ensure!(scene.attacker()?.ask(Op::Status, DOMAIN)?.converse()? == 0, "{}", scene.server.log());
    scene.conclude()
}

#[test]
fn a_flood_of_what_is_too_long_and_of_fragments() -> Result<()> {
    let scene = Scene::new()?;
    let guest = &scene.bench.guest;
    let mut packets = vec![datagram(guest.v4, &[0x11; 1400])?, datagram(guest.v4, &[])?];
    for n in 0..2000 {
        packets.push(fragment(guest.v4, n, true, &[0; 800])?);
        packets.push(fragment(guest.v4, n, false, &[0; 800])?);
    }
    let flood = Flood::start(guest, packets, Rounds::Endless)?;
    scene.until("pass_fragment", 10_000)?;
    scene.until("drop_length", 3)?;
    scene.serve_honest(3)?;
    flood.stop()?;
    scene.conclude()
}

/// Whether the host is a member of the group on the bridge, from the host's own view.
fn is_member(scene: &Scene) -> Result<bool> {
    let group = format!("{:08X}", u32::from_ne_bytes(DEFAULT_GROUP_V4));
    let table = scene.bench.hypervisor.proc_net("igmp")?;
    let of_bridge = table.lines().skip_while(|line| line.split_whitespace().nth(1) != Some(BRIDGE)).skip(1);
    Ok(of_bridge.take_while(|line| line.starts_with('\t')).any(|line| line.trim_start().starts_with(&group)))
}

/// Queries, reports and leaves from all addresses, as fast as possible: guests must not decide who
/// listens to the group.
#[test]
fn a_flood_of_igmp() -> Result<()> {
    let scene = Scene::new()?;
    let senders =
        [scene.bench.guest.v4, scene.honest.v4, HYPERVISOR_V4, Ipv4Addr::UNSPECIFIED, Ipv4Addr::new(10, 77, 0, 1)];
    let flood = Flood::start(&scene.bench.guest, igmp::noise(&senders)?, Rounds::Endless)?;
    poll_until("the flood", SURELY, || Ok((flood.sent() > 20_000).then_some(())))?;
    let honest = Peer::new(&scene.honest, &key(), Family::V4)?;
    for round in 0..20 {
        let answer = caller::ask(&honest, Op::Status, DOMAIN, SURELY)?;
        let answer = answer.with_context(|| format!("request {round} was lost: {}", scene.bridge()))?;
        ensure!(answer.code == 0);
    }
    scene.serve_honest(3)?;
    ensure!(is_member(&scene)?, "{}", scene.bench.hypervisor.proc_net("igmp")?);
    ensure!(flood.stop()? > 20_000);
    // The program counts all of it as other traffic.
    let counted = &scene.bench.counters()? - &scene.before;
    ensure!(counted.nonzero().iter().all(|(name, _)| *name == "delivered"), "{:?}", counted.nonzero());
    scene.conclude()
}

/// The daemon is stopped. No single sender fills the ring buffer, so the others' requests are there
/// when the daemon continues.
#[test]
fn a_ring_that_nobody_reads() -> Result<()> {
    let mut scene = Scene::new()?;
    let (noisy, honest) = (scene.attacker()?, Peer::new(&scene.honest, &key(), Family::V4)?);
    let packets = fresh(&noisy, &scene.bench.guest, 2000)?;
    scene.server.process().signal(Signal::SIGSTOP)?;
    ensure!(Flood::start(&scene.bench.guest, packets, Rounds::One)?.wait()? == 2000);
    scene.until("drop_delivery_limit", 500)?;
    honest.send(honest.request(Op::Status, DOMAIN)?)?;
    scene.server.process().signal(Signal::SIGCONT)?;
    let call = honest.called_back(SURELY)?;
    ensure!(call.context("no callback")?.converse()? == 0, "{}", scene.server.log());
    ensure!(scene.counted("pass_ring_full")? == 0, "the ring was full");
    scene.serve_honest(1)?;
    scene.conclude()
}

/// The daemon is stopped, and so many senders have the key that the ring buffer is full. Further
/// requests go to the socket, which keeps them.
#[test]
fn a_ring_held_full() -> Result<()> {
    let mut scene = Scene::new()?;
    let peer = scene.attacker()?;
    let right = |n: u16| {
        // The number of senders trusted at once, each with its own bucket.
        let (source, request) = (elsewhere(n % 500), peer.request(Op::Status, DOMAIN)?);
        let mut request = Request { port: 9.into(), ..request };
        set_address(&mut request, source);
        let IpAddr::V4(source) = source else { anyhow::bail!("not IPv4") };
        datagram(source, peer.sign(request)?.as_bytes())
    };
    // Little more than the ring buffer holds, so that the socket's buffer does not fill too.
    let packets = (0..1200).map(right).collect::<Result<Vec<_>>>()?;
    scene.server.process().signal(Signal::SIGSTOP)?;
    ensure!(Flood::start(&scene.bench.guest, packets, Rounds::One)?.wait()? == 1200);
    let full = scene.counted("pass_ring_full")?;
    ensure!(full > 0, "there was room: {:?}", scene.bench.counters()?.nonzero());
    let client = scene.bench.about_domain("status").start(scene.honest.space())?;
    scene.until("pass_ring_full", full)?;
    scene.server.process().signal(Signal::SIGCONT)?;
    let answer = client.finish(SURELY)?;
    ensure!(answer.code == Some(0), "{answer:?}: {}", scene.server.log());
    // The answer comes from the datagram that found no room, not from a later one.
    let honest = scene.honest.v4.to_string();
    let kept = |line: &str| {
        Fence::parse(line).filter(|fence| (fence.get("source"), fence.get("via")) == (Some(&honest), Some("socket")))
    };
    scene.server.wait_log(scene.position, SURELY, kept).with_context(|| scene.server.log())?;
    scene.serve_honest(1)
}

/// The daemon is stopped for seconds: the program passes requests to the stack, and the socket
/// keeps them until the daemon continues.
#[test]
fn without_a_sign_of_life_requests_pass_and_are_served_later() -> Result<()> {
    let mut scene = Scene::new()?;
    scene.server.process().signal(Signal::SIGSTOP)?;
    let client = scene.bench.about_domain("status").start(scene.honest.space())?;
    // The client repeats its request every 2 s; after some time its datagrams pass.
    scene.until("pass_stale", 0)?;
    scene.server.process().signal(Signal::SIGCONT)?;
    let answer = client.finish(SURELY)?;
    ensure!(answer.code == Some(0), "{answer:?}: {}", scene.server.log());
    let passed = scene.counted("pass_stale")?;
    scene.bench.expect_via(&scene.server, &scene.bench.about_domain("status"), 0, "kernel")?;
    ensure!(scene.counted("pass_stale")? == passed, "it passes on");
    Ok(())
}

/// A recorded `off` is sent again to the next daemon, after the first one was killed.
fn replayed_after_a_crash(attach: &'static str) -> Result<()> {
    let bench = Bench::new()?;
    let server = bench.serve(&bench.config(attach))?;
    let peer = Peer::new(&bench.guest, &key(), Family::V4)?;
    let recorded = peer.sign(peer.request(Op::Off, DOMAIN)?)?;
    peer.send_bytes(recorded.as_bytes())?;
    let mut call = peer.called_back(SURELY)?.context("no callback")?;
    ensure!(call.converse()? == 0);
    server.stop(Signal::SIGKILL)?;

    let server = bench.serve(&bench.config(attach))?;
    // The client still listens on its old port, so the replay cache alone prevents the second
    // `off`.
    peer.send_bytes(recorded.as_bytes())?;
    ensure!(peer.called_back(Duration::from_secs(2))?.is_none(), "called back for a copy: {}", server.log());
    ensure!(peer.ask(Op::Status, DOMAIN)?.converse()? == 0, "the daemon carried out a replay: {}", server.log());
    if attach == "off" {
        let ended = server.stop(Signal::SIGTERM)?;
        ensure!(ended.stderr.contains("drop_replay 1"), "{}", ended.stderr);
    } else {
        ensure!(bench.counters()?.get("drop_replay")? == 1, "{:?}", bench.counters()?.nonzero());
    }
    Ok(())
}

#[test]
fn a_recorded_off_does_nothing_after_a_crash_either() -> Result<()> {
    replayed_after_a_crash("generic")
}

#[test]
fn a_recorded_off_does_nothing_after_a_crash_at_the_socket_either() -> Result<()> {
    replayed_after_a_crash("off")
}
