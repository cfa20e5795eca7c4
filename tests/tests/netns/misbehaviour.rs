//! Clients that misbehave after a valid request: each fails its own request and disturbs no other.

use std::net::{Ipv6Addr, TcpListener};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fence_common::hash::HashKind;
use fence_common::wire::{HASH_LEN, Op};
use fence_lab::client::Family;
use fence_lab::peer::{CallBack, NOBODY, Peer, set_address};
use fence_lab::server::{Config, Server};
use zerocopy::IntoBytes;

use crate::bench::{Bench, DOMAIN, key};

/// The longest time of an honest request beside a misbehaving client. The daemon waits 10 s for the
/// latter (1.9 s for a dead address). An idle machine takes milliseconds.
const AT_ONCE: Duration = Duration::from_secs(4);

fn peer(bench: &Bench) -> Result<Peer> {
    Peer::new(&bench.guest, &key(), Family::V4)
}

/// A callback in which the daemon has answered our challenge, and the challenge that it waits for
/// our answer to.
fn examined(peer: &Peer) -> Result<(CallBack, [u8; HASH_LEN])> {
    let mut call = peer.ask(Op::Off, DOMAIN)?;
    call.challenge()?;
    let challenge = call.read_block()?;
    Ok((call, challenge))
}

/// Checks that another guest is answered at once, and that the domain still runs.
fn others_are_served_at_once(bench: &Bench, server: &Server, number: u8) -> Result<()> {
    let guest = bench.hypervisor.guest(number)?;
    let answer = bench.expect(server, guest.space(), &bench.about_domain("status"), 0)?;
    ensure!(answer.elapsed < AT_ONCE, "took {:?}: {}", answer.elapsed, server.log());
    Ok(())
}

#[test]
fn silence_delays_nobody_else() -> Result<()> {
    let bench = Bench::new()?;
    let server = bench.serve(&bench.config("auto"))?;
    // Several at once: a server with only a few threads would be stuck.
    let peers: Vec<_> = (0..10).map(|_| peer(&bench)).collect::<Result<_>>()?;
    let calls: Vec<_> = peers.iter().map(|peer| peer.ask(Op::Off, DOMAIN)).collect::<Result<_>>()?;
    others_are_served_at_once(&bench, &server, 2)?;
    drop(calls);
    Ok(())
}

#[test]
fn half_a_challenge_and_half_a_response_delay_nobody_else() -> Result<()> {
    let bench = Bench::new()?;
    let server = bench.serve(&bench.config("auto"))?;
    let (first, second) = (peer(&bench)?, peer(&bench)?);
    let mut half_challenge = first.ask(Op::Off, DOMAIN)?;
    half_challenge.write(&[1; 32])?;
    let mut half_response = second.ask(Op::Off, DOMAIN)?;
    half_response.challenge()?;
    half_response.read_block()?;
    half_response.write(&[1; 63])?;
    others_are_served_at_once(&bench, &server, 2)
}

#[test]
fn a_wrong_response_is_no_authentication() -> Result<()> {
    let bench = Bench::new()?;
    let server = bench.serve(&bench.config("auto"))?;
    let peer = peer(&bench)?;
    let (mut call, challenge) = examined(&peer)?;
    let mut response = peer.key().digest(HashKind::Sha256, &[&challenge]);
    response[31] ^= 1;
    call.write(&response)?;
    ensure!(call.reply()? != Some(0), "a wrong response was taken for a right one: {}", server.log());
    // The padding counts too: a response of another kind of digest differs only there.
    let (mut call, challenge) = examined(&peer)?;
    let mut response = peer.key().digest(HashKind::Sha256, &[&challenge]);
    response[63] = 1;
    call.write(&response)?;
    ensure!(call.reply()? != Some(0), "{}", server.log());
    others_are_served_at_once(&bench, &server, 2)
}

#[test]
fn our_own_challenge_is_not_answered_for_a_keyless_guest() -> Result<()> {
    let bench = Bench::new()?;
    let server = bench.serve(&bench.config("auto"))?;
    let (victim, mirror) = (peer(&bench)?, peer(&bench)?);
    // The daemon examines us on one connection; on the other one we send it the same challenge.
    let (_exam, challenge) = examined(&victim)?;
    let mut reflected = mirror.ask(Op::Status, DOMAIN)?;
    reflected.write(&challenge)?;
    if let Ok(answer) = reflected.read_block() {
        ensure!(
            answer != mirror.key().digest(HashKind::Sha256, &[&challenge]),
            "the daemon answered its own challenge: {}",
            server.log()
        );
    }
    others_are_served_at_once(&bench, &server, 2)
}

#[test]
fn a_challenge_reflected_on_its_own_connection_is_refused() -> Result<()> {
    let bench = Bench::new()?;
    let server = bench.serve(&bench.config("auto"))?;
    let peer = peer(&bench)?;
    let (mut call, challenge) = examined(&peer)?;
    call.write(&challenge)?;
    ensure!(call.reply()? != Some(0), "{}", server.log());
    others_are_served_at_once(&bench, &server, 2)
}

#[test]
fn a_dead_address_delays_nobody_else() -> Result<()> {
    let bench = Bench::new()?;
    let server = bench.serve(&Config { strict_source: Some("no"), ..bench.config("auto") })?;
    let peer = peer(&bench)?;
    for _ in 0..5 {
        let mut request = peer.request(Op::Off, DOMAIN)?;
        set_address(&mut request, NOBODY.into());
        peer.send(request)?;
    }
    others_are_served_at_once(&bench, &server, 2)
}

#[test]
fn a_request_whose_call_back_failed_is_served_when_it_comes_again() -> Result<()> {
    let bench = Bench::new()?;
    let server = bench.serve(&bench.config("auto"))?;
    let peer = peer(&bench)?;
    let request = peer.request(Op::Off, DOMAIN)?;
    peer.send(request)?;
    drop(peer.called_back(Duration::from_secs(20))?.context("no callback")?);
    // The same request again, as the stock client repeats it every two seconds, until its callback
    // is taken.
    let again = || -> Result<Option<u8>> {
        peer.send(request)?;
        peer.called_back(Duration::from_secs(2))?.map(|mut call| call.converse()).transpose()
    };
    let reply = fence_lab::process::poll_until("an answer", Duration::from_secs(20), again)?;
    ensure!(reply == 0, "{}", server.log());
    // An answered request is not served a third time.
    peer.send(request)?;
    ensure!(peer.called_back(Duration::from_secs(1))?.is_none(), "served twice: {}", server.log());
    Ok(())
}

/// A guest without the key recorded an `off` on the segment. Long after the answer, a client
/// listens on the old port again.
#[test]
fn a_datagram_that_was_heard_and_is_sent_again_does_nothing() -> Result<()> {
    for attach in ["generic", "off"] {
        let bench = Bench::new()?;
        let server = bench.serve(&bench.config(attach))?;
        let peer = peer(&bench)?;
        let heard = peer.sign(peer.request(Op::Off, DOMAIN)?)?;
        peer.send_bytes(heard.as_bytes())?;
        let mut call = peer.called_back(Duration::from_secs(5))?.context("no callback")?;
        ensure!(call.converse()? == 0, "{}", server.log());
        bench.expect(&server, bench.guest.space(), &bench.about_domain("on"), 0)?;
        std::thread::sleep(fence_common::ledger::REMEMBER + Duration::from_secs(1));

        let mut call = peer.ask(Op::DevStatus, "")?;
        peer.send_bytes(heard.as_bytes())?;
        ensure!(peer.called_back(Duration::from_secs(1))?.is_none(), "called back for a replay: {}", server.log());
        ensure!(call.converse()? == 0, "the replay has overtaken it: {}", server.log());
        bench.expect(&server, bench.guest.space(), &bench.about_domain("status"), 0)?;
    }
    Ok(())
}

/// A guest that names the hypervisor's own loopback as its callback address would be authenticated
/// by whatever client runs on the hypervisor, in that one's name.
#[test]
fn a_guest_is_not_called_back_on_the_hypervisor_itself() -> Result<()> {
    for attach in ["generic", "off"] {
        let bench = Bench::new()?;
        let server = bench.serve(&Config { family: Family::V6, ..bench.config(attach) })?;
        let listener = bench.hypervisor.space().in_network(|| Ok(TcpListener::bind(("::1", 0))?))?;
        let peer = Peer::new(&bench.guest, &key(), Family::V6)?;
        let position = server.log_position();
        let mut request = peer.request(Op::Status, DOMAIN)?;
        set_address(&mut request, Ipv6Addr::LOCALHOST.into());
        request.port = listener.local_addr()?.port().into();
        peer.send(request)?;
        // Once this request is answered, the daemon has judged the previous one.
        ensure!(peer.ask(Op::Status, DOMAIN)?.converse()? == 0, "{}", server.log());
        std::thread::sleep(Duration::from_millis(500));
        listener.set_nonblocking(true)?;
        ensure!(listener.accept().is_err(), "{attach}: called back: {}", server.log());
        let counter = if attach == "off" { "/socket/drop_loopback" } else { "/kernel/counters/drop_loopback" };
        let (_, report) = server.status()?;
        ensure!(report.pointer(counter) == Some(&1.into()), "{attach}: not counted: {report}");
        let said = |line: &str| line.contains("this host's own loopback address").then_some(());
        let line = server.wait_log(position, Duration::from_secs(60), said);
        line.with_context(|| format!("{attach}: no line about it: {}", server.log()))?;
    }
    Ok(())
}

/// Each holder of the key hears the request, and can be called back for it too.
#[test]
fn who_copies_a_status_takes_no_answer_from_its_client() -> Result<()> {
    let bench = Bench::new()?;
    let server = bench.serve(&bench.config("auto"))?;
    let other = bench.hypervisor.guest(2)?;
    let (client, thief) = (peer(&bench)?, Peer::new(&other, &key(), Family::V4)?);
    for (op, domain) in [(Op::Status, DOMAIN), (Op::HostList, "")] {
        let request = client.request(op, domain)?;
        let mut copy = request;
        copy.port = thief.port()?.into();
        set_address(&mut copy, thief.address());
        for (peer, request) in [(&thief, copy), (&client, request)] {
            peer.send(request)?;
            let call = peer.called_back(AT_ONCE)?;
            let mut call = call.with_context(|| format!("{op:?}: {} is not called back", peer.address()))?;
            call.challenge()?;
            call.respond()?;
            let answer = call.rest()?;
            ensure!(answer.last() == Some(&0), "{op:?}: {answer:?}: {}", server.log());
        }
    }
    Ok(())
}
