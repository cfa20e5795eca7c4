//! Requests that waited, and clients that are not there any more: what is late is not done, and nobody gets another's answer.

use std::time::Duration;

use anyhow::{Result, ensure};
use fence_common::wire::Op;
use fence_tests::client::Family;
use fence_tests::peer::Peer;
use nix::sys::signal::Signal;

use crate::bench::{Bench, DOMAIN, key};

/// Longer than a request may wait.
const TOO_LONG: Duration = Duration::from_secs(7);

fn peer(bench: &Bench) -> Result<Peer> {
    Peer::new(&bench.guest, &key(), Family::V4)
}

/// What becomes of an `off` that waited while the daemon stood still.
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
    // One that does not wait is served at once.
    bench.expect(&server, bench.guest.space(), &bench.about_domain("status"), 0)?;
    Ok(())
}

#[test]
fn what_waited_too_long_in_the_ring_is_not_done() -> Result<()> {
    waited_too_long("generic")
}

#[test]
fn what_waited_too_long_in_the_socket_is_not_done() -> Result<()> {
    waited_too_long("off")
}
