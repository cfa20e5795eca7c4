//! Honest clients beside all that peers can do to the tcp listener: each of them is answered, and
//! nothing is killed.

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use fence_common::wire::{DEFAULT_PORT, Op, Request};
use fence_lab::client::{Client, Family};
use fence_lab::lab::{Guest, HYPERVISOR_V4};
use fence_lab::peer::{CallBack, Peer};
use fence_lab::process::poll_until;
use fence_lab::server::Server;
use zerocopy::IntoBytes;

use crate::bench::{Bench, DOMAIN, key};

const HERE: SocketAddr = SocketAddr::new(IpAddr::V4(HYPERVISOR_V4), DEFAULT_PORT);
/// Guests that stay silent, and the connections of each: more in all than the daemon has places.
const CROWDS: u8 = 10;
const SILENT: usize = 100;
/// How many requests each honest client sends, one after the other.
const HONEST: usize = 15;
/// A pause after six requests of one address, so that they are fewer than 100 a second.
const BELOW_THE_RATE_LIMIT: Duration = Duration::from_millis(100);
/// How long the attacks may take to begin on a loaded machine.
const LIMIT: Duration = Duration::from_secs(120);

/// A guest that attacks with the key of the cluster.
struct Attacker {
    guest: Guest,
    peer: Peer,
}

impl Attacker {
    fn new(bench: &Bench, number: u8) -> Result<Self> {
        let guest = bench.hypervisor.guest(number)?;
        let peer = Peer::new(&guest, &key(), Family::V4)?;
        Ok(Self { guest, peer })
    }

    fn connect(&self) -> Result<CallBack> {
        self.peer.connect(self.guest.space(), HERE)
    }

    fn sent(&self, request: &Request) -> Result<CallBack> {
        let mut connection = self.connect()?;
        connection.write(request.as_bytes())?;
        Ok(connection)
    }

    fn signed(&self, op: Op, domain: &str) -> Result<Request> {
        self.peer.sign(self.peer.stream_request(op, domain)?)
    }

    /// Connections that say nothing, until the daemon closes them.
    fn says_nothing(&self, opened: &AtomicUsize) -> Result<()> {
        let mut silent = Vec::new();
        for _ in 0..SILENT {
            silent.push(self.connect()?);
            opened.fetch_add(1, Ordering::Relaxed);
        }
        silent.iter_mut().try_for_each(unanswered)
    }

    /// A good request in bytes of their own, too slowly.
    fn writes_slowly(&self) -> Result<()> {
        let mut slow = (0..20).map(|_| self.connect()).collect::<Result<Vec<_>>>()?;
        let request = self.signed(Op::Off, DOMAIN)?;
        for byte in request.as_bytes() {
            // The daemon closes it before the last byte.
            slow.retain_mut(|connection| connection.write(&[*byte]).is_ok());
            std::thread::sleep(Duration::from_millis(20));
        }
        slow.iter_mut().try_for_each(unanswered)
    }

    /// Good requests of a peer that then goes silent, at each point where it can, or never reads.
    fn goes_silent(&self) -> Result<()> {
        let mut silent = Vec::new();
        for _ in 0..10 {
            silent.push(self.sent(&self.signed(Op::Off, DOMAIN)?)?);
            let mut without_a_response = self.sent(&self.signed(Op::Off, DOMAIN)?)?;
            without_a_response.challenge()?;
            silent.push(without_a_response);
            let mut unread = self.sent(&self.signed(Op::HostList, "")?)?;
            unread.challenge()?;
            unread.respond()?;
            silent.push(unread);
        }
        std::thread::sleep(Duration::from_millis(500));
        Ok(())
    }

    /// Two requests that were answered once, byte for byte by both ways, and signed again.
    fn replays(&self, by_multicast: &Request, by_tcp: &Request) -> Result<()> {
        for old in [by_multicast, by_tcp] {
            self.peer.send_bytes(old.as_bytes())?;
            unanswered(&mut self.sent(old)?)?;
            let by_stream = Request { seqno: old.seqno, ..self.peer.stream_request(Op::Off, DOMAIN)? };
            unanswered(&mut self.sent(&self.peer.sign(by_stream)?)?)?;
        }
        let signed_again = Request { seqno: by_tcp.seqno, ..self.peer.request(Op::Off, DOMAIN)? };
        self.peer.send(signed_again)
    }

    /// The daemon's own challenge of one connection on another one, by each pair of ways.
    fn reflects(&self) -> Result<()> {
        for [asks_by_tcp, mirrors_by_tcp] in [[true, false], [false, true], [true, true]] {
            let ask = |by_tcp| match by_tcp {
                true => self.sent(&self.signed(Op::Off, DOMAIN)?),
                false => self.peer.ask(Op::Off, DOMAIN),
            };
            let (mut asked, mut mirror) = (ask(asks_by_tcp)?, ask(mirrors_by_tcp)?);
            asked.challenge()?;
            mirror.write(&asked.read_block()?)?;
            unanswered(&mut mirror)?;
        }
        // The rate limit would end the attack.
        std::thread::sleep(BELOW_THE_RATE_LIMIT);
        Ok(())
    }
}

/// Checks that the daemon closes a connection without a word.
fn unanswered(connection: &mut CallBack) -> Result<()> {
    let said = connection.rest()?;
    ensure!(said.is_empty(), "the daemon said {said:02x?}");
    Ok(())
}

/// Ends the attacks, also where a check fails.
struct Until<'a>(&'a AtomicBool);

impl Drop for Until<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Attacks until the flag is set; says after the first time that it does.
fn attack(over: &AtomicBool, begun: &AtomicUsize, mut once: impl FnMut() -> Result<()>) -> Result<()> {
    let mut first = true;
    while !over.load(Ordering::Relaxed) {
        once()?;
        if std::mem::take(&mut first) {
            begun.fetch_add(1, Ordering::Relaxed);
        }
    }
    Ok(())
}

/// A client that sends its requests beside the attacks.
fn asks(bench: &Bench, server: &Server, guest: &Guest, client: &Client) -> Result<()> {
    for number in 0..HONEST {
        bench.expect(server, guest.space(), client, 0).with_context(|| format!("honest request {number}"))?;
    }
    Ok(())
}

#[test]
fn each_honest_client_is_answered_beside_all_attacks() -> Result<()> {
    let bench = Bench::new()?;
    let server = bench.serve(&bench.with_tcp(&[("address", "0.0.0.0")]))?;
    let crowds = (0..CROWDS).map(|number| Attacker::new(&bench, 2 + number)).collect::<Result<Vec<_>>>()?;
    let attacker = |number: u8| Attacker::new(&bench, 20 + number);
    let (slow, silent, replaying, mirror) = (attacker(0)?, attacker(1)?, attacker(2)?, attacker(3)?);
    let (by_tcp, by_multicast) = (bench.hypervisor.guest(30)?, bench.hypervisor.guest(31)?);
    let status = bench.about_domain("status");
    let stream = status.clone().tcp(&HYPERVISOR_V4.to_string());

    // What is replayed: one request of each way that has acted.
    let datagram = replaying.peer.sign(replaying.peer.request(Op::Off, DOMAIN)?)?;
    replaying.peer.send_bytes(datagram.as_bytes())?;
    ensure!(replaying.peer.called_back(LIMIT)?.context("no callback")?.converse()? == 0, "{}", server.log());
    bench.expect(&server, by_tcp.space(), &bench.about_domain("on"), 0)?;
    let request = replaying.signed(Op::Off, DOMAIN)?;
    ensure!(replaying.sent(&request)?.converse()? == 0, "{}", server.log());
    bench.expect(&server, by_tcp.space(), &bench.about_domain("on"), 0)?;

    let (over, begun, opened) = (AtomicBool::new(false), AtomicUsize::new(0), AtomicUsize::new(0));
    let position = server.log_position();
    std::thread::scope(|scope| {
        let (over, begun, opened) = (&over, &begun, &opened);
        let mut attacks: Vec<_> = crowds
            .iter()
            .map(|crowd| {
                scope.spawn(move || attack(over, begun, || crowd.says_nothing(opened).context("says nothing")))
            })
            .collect();
        attacks.push(scope.spawn(|| attack(over, begun, || slow.writes_slowly().context("slow"))));
        attacks.push(scope.spawn(|| attack(over, begun, || silent.goes_silent().context("silent"))));
        attacks.push(scope.spawn(|| attack(over, begun, || replaying.replays(&datagram, &request).context("replays"))));
        attacks.push(scope.spawn(|| attack(over, begun, || mirror.reflects().context("mirror"))));
        let until = Until(over);
        let all = attacks.len();
        poll_until("each attack to run", LIMIT, || {
            if let Some(ended) = attacks.iter().position(|attack| attack.is_finished()) {
                attacks.swap_remove(ended).join().map_err(|_| anyhow!("an attack panicked"))?.context("an attack")?;
            }
            Ok((begun.load(Ordering::Relaxed) == all).then_some(()))
        })
        .and_then(|()| {
            let honest = [(&by_tcp, &stream), (&by_multicast, &status), (&bench.guest, &stream)];
            let honest = honest.map(|(guest, client)| scope.spawn(|| asks(&bench, &server, guest, client)));
            honest.into_iter().try_for_each(|one| one.join().map_err(|_| anyhow!("a client panicked"))?)
        })
        .and_then(|()| {
            drop(until);
            attacks.into_iter().try_for_each(|one| one.join().map_err(|_| anyhow!("an attack panicked"))?)
        })
    })?;
    ensure!(opened.load(Ordering::Relaxed) >= 1000, "too few silent connections");
    let log = server.log();
    let acted = log.lines().skip(position).find(|line| line.contains("op=off") && line.contains("reply=success"));
    ensure!(acted.is_none(), "an attack had the domain killed: {acted:?}");
    ensure!(replaying.peer.called_back(Duration::ZERO)?.is_none(), "a replay was called back: {log}");
    bench.expect(&server, by_tcp.space(), &status, 0)?;
    Ok(())
}

/// Slowness alone is no offence, within the second that a request has.
#[test]
fn a_request_in_single_bytes_is_answered() -> Result<()> {
    let bench = Bench::new()?;
    let server = bench.serve(&bench.with_tcp(&[("address", "0.0.0.0")]))?;
    let client = Attacker::new(&bench, 2)?;
    let request = client.signed(Op::Status, DOMAIN)?;
    let mut connection = client.connect()?;
    request.as_bytes().iter().try_for_each(|byte| connection.write(&[*byte]))?;
    ensure!(connection.converse()? == 0, "{}", server.log());
    Ok(())
}
