//! Requests that are signed and still rejected. The log has the reason, for an administrator who
//! looks for it at 3 a.m.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use fence_common::wire::{Op, Reply};
use fence_lab::client::Family;
use fence_lab::peer::Peer;
use fence_lab::server::{Config, Server};

use crate::bench::{Bench, DOMAIN, key};

const SOON: Duration = Duration::from_secs(20);

/// Guest 1 may fence the domain; no other guest may fence anything.
fn grouped(bench: &Bench) -> Config {
    let (ip, domain) = (bench.guest.v4, DOMAIN);
    Config {
        more: format!("groups {{ group {{ ip = \"{ip}\"; uuid = \"{domain}\"; uuid = \"nobody\"; }} }}\n"),
        ..bench.config("auto")
    }
}

/// The next log line with all of `words` in it.
fn line_with(server: &Server, position: usize, words: &[&str]) -> Result<String> {
    let found =
        server.wait_log(position, SOON, |line| words.iter().all(|word| line.contains(word)).then(|| line.to_owned()));
    found.with_context(|| format!("no line with {words:?}: {}", server.log()))
}

#[test]
fn each_refusal_is_logged_with_its_reason() -> Result<()> {
    let bench = Bench::new()?;
    let other = bench.hypervisor.guest(2)?;
    let server = bench.serve(&grouped(&bench))?;
    let (member, stranger) = (Peer::new(&bench.guest, &key(), Family::V4)?, Peer::new(&other, &key(), Family::V4)?);

    let position = server.log_position();
    ensure!(stranger.ask(Op::Off, DOMAIN)?.converse()? == Reply::PermissionDenied.to_wire());
    let source = format!("source={}", other.v4);
    line_with(&server, position, &["WARN", "no group has both", "reply=permission-denied", "op=off", &source])?;

    ensure!(member.ask(Op::Off, "nobody")?.converse()? == Reply::Failure.to_wire());
    let source = format!("source={}", bench.guest.v4);
    line_with(&server, position, &["WARN", "no such domain", "reply=failure", "domain=nobody", &source])?;

    let mut call = member.ask(Op::Off, DOMAIN)?;
    call.challenge()?;
    let _ = call.read_block()?;
    call.write(&[7; 64])?;
    ensure!(call.reply()?.is_none());
    line_with(&server, position, &["WARN", "callback failed", "op=off", &source])?;

    ensure!(
        member.ask(Op::Status, DOMAIN)?.converse()? == Reply::Success.to_wire(),
        "the daemon rejected the request and still switched the domain off"
    );
    Ok(())
}

/// A client with the domain's own address is still not known to be that domain.
#[test]
fn a_group_of_a_domain_alone_denies_clients_that_are_known_by_their_address() -> Result<()> {
    let bench = Bench::new()?;
    let (other, ip) = (bench.hypervisor.guest(2)?, bench.guest.v4);
    let more = format!(
        "groups {{ group {{ from = \"{DOMAIN}\"; uuid = \"{DOMAIN}\"; }} group {{ ip = \"{ip}\"; uuid = \"nobody\"; }} }}\n"
    );
    let server = bench.serve(&Config { more, ..bench.config("auto") })?;
    ensure!(server.log().contains("no listener here knows which domain asks"), "{}", server.log());
    for guest in [&bench.guest, &other] {
        let asked = Peer::new(guest, &key(), Family::V4)?.ask(Op::Off, DOMAIN)?.converse()?;
        ensure!(asked == Reply::PermissionDenied.to_wire(), "{asked}: {}", server.log());
    }
    Ok(())
}

#[test]
fn a_loud_source_is_held_back_and_the_others_are_not() -> Result<()> {
    let bench = Bench::new()?;
    let [loud, quiet] = [bench.hypervisor.guest(2)?, bench.hypervisor.guest(3)?];
    let server = bench.serve(&grouped(&bench))?;
    let [loud_peer, quiet_peer] = [Peer::new(&loud, &key(), Family::V4)?, Peer::new(&quiet, &key(), Family::V4)?];
    // What is denied is called back late, so many ask at the same time.
    let many = (0..50).map(|_| Peer::new(&loud, &key(), Family::V4)).collect::<Result<Vec<_>>>()?;
    let (position, begun) = (server.log_position(), Instant::now());
    for _ in 0..6 {
        many.iter().try_for_each(|peer| peer.send(peer.request(Op::Off, DOMAIN)?))?;
        for peer in &many {
            let mut call = peer.called_back(SOON)?.context("no callback")?;
            ensure!(call.converse()? == Reply::PermissionDenied.to_wire());
        }
    }
    let seconds = usize::try_from(begun.elapsed().as_secs())?;
    ensure!(quiet_peer.ask(Op::Off, DOMAIN)?.converse()? == Reply::PermissionDenied.to_wire());
    line_with(&server, position, &["no group has both", &format!("source={}", quiet.v4)])?;
    let source = format!("source={} ", loud.v4);
    let lines = server.log().lines().filter(|line| line.contains(&source)).count();
    ensure!((100..=101 + seconds).contains(&lines), "{lines} lines in {seconds} s");

    std::thread::sleep(Duration::from_millis(1100));
    ensure!(loud_peer.ask(Op::Off, DOMAIN)?.converse()? == Reply::PermissionDenied.to_wire());
    line_with(&server, position, &["no group has both", &source, "held_back="])?;
    Ok(())
}

#[test]
fn a_host_that_does_not_know_the_domain_lets_others_go_first() -> Result<()> {
    let bench = Bench::new()?;
    let server = bench.serve(&bench.config("auto"))?;
    let [patient, hasty] = [(); 2].map(|()| Peer::new(&bench.guest, &key(), Family::V4));
    let (patient, hasty) = (patient?, hasty?);
    const GIVEN: &str = "other hosts were given time";

    let position = server.log_position();
    patient.send(patient.request(Op::Off, "nobody")?)?;
    ensure!(
        patient.called_back(Duration::from_millis(700))?.is_none(),
        "called back before the host that has it could"
    );
    let mut call = patient.called_back(SOON)?.context("never called back")?;
    ensure!(call.converse()? == Reply::Failure.to_wire());
    line_with(&server, position, &["no such domain", GIVEN])?;

    // Another host has answered meanwhile and the guest does not listen any more: no reason for a
    // warning.
    let position = server.log_position();
    let request = hasty.request(Op::Off, "nobody")?;
    hasty.send(request)?;
    drop(hasty);
    std::thread::sleep(Duration::from_millis(2000));
    ensure!(patient.ask(Op::Off, DOMAIN)?.converse()? == Reply::Success.to_wire());
    let line = line_with(&server, position, &["reply=success", "op=off"])?;
    ensure!(!line.contains(GIVEN), "{line}");
    let since: Vec<_> = server.log().lines().skip(position).map(str::to_owned).collect();
    ensure!(!since.iter().any(|line| line.contains("WARN")), "{since:?}");
    Ok(())
}
