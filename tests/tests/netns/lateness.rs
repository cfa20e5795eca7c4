//! Stale requests and clients that are gone: a stale request is rejected, and no client gets
//! another's answer.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use fence_common::wire::Op;
use fence_lab::client::Family;
use fence_lab::peer::Peer;
use fence_lab::server::Server;
use nix::sys::signal::Signal;

use crate::bench::{Bench, DOMAIN, key};

/// Longer than a request may wait.
const TOO_LONG: Duration = Duration::from_secs(7);

fn peer(bench: &Bench) -> Result<Peer> {
    Peer::new(&bench.guest, &key(), Family::V4)
}

/// The outcome of an `off` that waited while the daemon was stopped (SIGSTOP).
fn waited_too_long(attach: &'static str) -> Result<()> {
    let bench = Bench::new()?;
    let mut server = bench.serve(&bench.config(attach))?;
    let peer = peer(&bench)?;
    server.process().signal(Signal::SIGSTOP)?;
    peer.send(peer.request(Op::Off, DOMAIN)?)?;
    std::thread::sleep(TOO_LONG);
    server.process().signal(Signal::SIGCONT)?;
    let called = peer.called_back(Duration::from_secs(2))?;
    ensure!(called.is_none(), "called back {TOO_LONG:?} late: {}", server.log());
    // A fresh request is served at once.
    bench.expect(&server, bench.guest.space(), &bench.about_domain("status"), 0)?;
    Ok(())
}

#[test]
fn a_stale_request_in_the_ring_is_not_carried_out() -> Result<()> {
    waited_too_long("generic")
}

#[test]
fn a_stale_request_in_the_socket_is_not_carried_out() -> Result<()> {
    waited_too_long("off")
}

/// A client is gone, the next one listens on the same address and port and asks for something else:
/// the callback that was made for the first one ends at once, and the second one has its own.
#[test]
fn a_call_back_for_a_client_that_is_gone_ends_when_the_next_one_asks() -> Result<()> {
    let bench = Bench::new()?;
    let server = bench.serve(&bench.config("auto"))?;
    let peer = peer(&bench)?;
    let mut gone = peer.ask(Op::DevStatus, "")?;
    let asked = Instant::now();
    let mut next = peer.ask(Op::Off, "nobody")?;
    ensure!(next.converse()? == 1, "{}", server.log());
    ensure!(gone.reply()?.is_none(), "answered: {}", server.log());
    ensure!(asked.elapsed() < Duration::from_secs(3), "after {:?}: {}", asked.elapsed(), server.log());
    Ok(())
}

/// Nothing has come of a callback for as long as a client takes to ask again. The client is gone
/// by now, and the next listener there has a request of its own on the way, perhaps lost:
/// no connection may bring it somebody else's answer.
#[test]
fn a_call_back_that_takes_long_is_not_the_next_clients() -> Result<()> {
    let bench = Bench::new()?;
    let server = bench.serve(&bench.config("auto"))?;
    let peer = peer(&bench)?;
    let space = bench.guest.space();
    let rules = "table inet shut { chain in { type filter hook input priority 0; ip protocol tcp drop; }; }";
    space.must("nft", &[rules])?;
    peer.send(peer.request(Op::DevStatus, "")?)?;
    // The kernel tries to connect at once, and 1, 3 and 7 s later.
    std::thread::sleep(Duration::from_millis(2200));
    space.must("nft", &["delete table inet shut"])?;
    ensure!(peer.called_back(Duration::from_secs(3))?.is_none(), "called back: {}", server.log());
    said(&server, 0, "no connection to")?;
    // A request that comes now is answered.
    ensure!(peer.ask(Op::DevStatus, "")?.converse()? == 0, "{}", server.log());
    Ok(())
}

/// The stock client takes one connection, whichever comes first. Where requests of two clients at
/// one place waited together, none of the connections that are made may bring the first one's
/// answer.
fn waited_together(attach: &'static str) -> Result<()> {
    let bench = Bench::new()?;
    let mut server = bench.serve(&bench.config(attach))?;
    for round in 0..20 {
        let peer = peer(&bench)?;
        server.process().signal(Signal::SIGSTOP)?;
        peer.send(peer.request(Op::DevStatus, "")?)?;
        peer.send(peer.request(Op::Null, "")?)?;
        server.process().signal(Signal::SIGCONT)?;
        let mut answered = 0;
        while let Some(mut call) = peer.called_back(Duration::from_millis(300))? {
            match call.converse() {
                Ok(reply) => {
                    ensure!(reply == 1, "round {round}: `monitor`'s answer for another question: {}", server.log());
                    answered += 1;
                }
                Err(_) => continue,
            }
        }
        ensure!(answered == 1, "round {round}: {answered} answers: {}", server.log());
    }
    Ok(())
}

#[test]
fn only_the_newer_of_two_requests_in_the_ring_is_answered() -> Result<()> {
    waited_together("generic")
}

#[test]
fn only_the_newer_of_two_requests_in_the_socket_is_answered() -> Result<()> {
    waited_together("off")
}

/// A client that has taken its callback does not ask again: a stop must not cut it off in the
/// middle of the conversation.
#[test]
fn a_stop_leaves_a_conversation_time_to_end() -> Result<()> {
    let bench = Bench::new()?;
    let mut server = bench.serve(&bench.config("auto"))?;
    let peer = peer(&bench)?;
    let mut call = peer.ask(Op::Off, DOMAIN)?;
    let position = server.log_position();
    server.process().signal(Signal::SIGTERM)?;
    said(&server, position, "stopping")?;
    std::thread::sleep(Duration::from_millis(200));
    ensure!(call.converse()? == 0, "{}", server.log());
    let ended = server.finish(fence_lab::server::STOP_LIMIT)?;
    ensure!(ended.code == Some(0), "{:?}: {}", ended.code, ended.stderr);
    Ok(())
}

/// The stock client sends one request for each of its addresses and takes the first callback; the
/// others come to nothing, which is no news.
#[test]
fn a_guest_with_two_addresses_is_no_cause_for_complaint() -> Result<()> {
    let bench = Bench::new()?;
    let server = bench.serve(&bench.config("auto"))?;
    bench.guest.space().must("ip", &["addr", "add", "192.168.122.111/24", "dev", "eth0"])?;
    for op in ["status", "off", "on"] {
        bench.expect(&server, bench.guest.space(), &bench.about_domain(op), 0)?;
    }
    std::thread::sleep(Duration::from_secs(1));
    ensure!(!server.log().contains("callback failed"), "{}", server.log());
    Ok(())
}

fn said(server: &Server, position: usize, what: &str) -> Result<()> {
    server
        .wait_log(position, Duration::from_secs(10), |line| line.contains(what).then_some(()))
        .with_context(|| format!("no `{what}`: {}", server.log()))
}
