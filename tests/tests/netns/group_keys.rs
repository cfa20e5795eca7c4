//! Keys of groups: the stock client with each key, in each group.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fence_common::wire::Op;
use fence_lab::client::{Client, Family};
use fence_lab::lab::Guest;
use fence_lab::peer::Peer;
use fence_lab::server::{Config, Server, Which};
use nix::sys::signal::Signal;

use crate::bench::{Bench, DOMAIN, key};

const SOON: Duration = Duration::from_secs(60);
const OF_A: &[u8] = b"the key of group a, of some length";
const OF_B: &[u8] = b"the key of group b, of some length";
const NEW_OF_A: &[u8] = b"another key of group a, of some length";

/// The exit code of `fence_xvm -o status`: 0 only if it was answered.
fn ask(guest: &Guest, key: &str) -> Result<Option<i32>> {
    Ok(Client::new("status", key).domain(DOMAIN).retransmit(5).timeout(4).run(guest.space())?.code)
}

/// Sends SIGHUP and checks what the log says about it.
fn reload(server: &mut Server, said: &str) -> Result<()> {
    let position = server.log_position();
    server.process().signal(Signal::SIGHUP)?;
    let line = server.wait_log(position, SOON, |line| line.contains("SIGHUP: ").then(|| line.to_owned()));
    let line = line.with_context(|| format!("the log does not mention the SIGHUP: {}", server.log()))?;
    ensure!(line.contains(said), "not \"{said}\": {line}");
    Ok(())
}

#[test]
fn a_groups_own_key_counts_in_it_and_no_other_does() -> Result<()> {
    let bench = Bench::new()?;
    let hypervisor = &bench.hypervisor;
    let (of_a, of_b, of_none) = (&bench.guest, hypervisor.guest(2)?, hypervisor.guest(3)?);
    let [a, b] = [("a.key", OF_A), ("b.key", OF_B)].map(|(name, bytes)| hypervisor.write(name, bytes));
    let (a, b, second) = (a?, b?, hypervisor.path("a.key2"));
    let group =
        |ip: &Guest, domain: &str, keys: &str| format!("group {{ {keys} ip = \"{}\"; uuid = \"{domain}\"; }}\n", ip.v4);
    let groups = [
        group(of_a, DOMAIN, &format!("key_file = \"{a}\"; key_file2 = \"{second}\";")),
        group(&of_b, DOMAIN, &format!("key_file = \"{b}\";")),
        group(&of_none, DOMAIN, ""),
    ];
    let config = Config { more: format!("groups {{\n{}}}\n", groups.concat()), ..bench.config("auto") };
    let mut server = bench.serve(&config)?;
    let log = server.log();

    // Each guest with each key.
    let own = |guest: &str| match guest {
        "a" => &a,
        "b" => &b,
        _ => &bench.key,
    };
    for (guest, space) in [("a", of_a), ("b", &of_b), ("none", &of_none)] {
        for (whose, file) in [("a", &a), ("b", &b), ("the listener's", &bench.key)] {
            let code = ask(space, file)?;
            let is_right = own(guest) == file;
            ensure!(
                (code == Some(0)) == is_right,
                "guest of group {guest} with the key of {whose}: exit code {code:?}\n{}",
                server.log()
            );
        }
    }
    ensure!(
        log.contains("it does not know the groups' own keys"),
        "the log does not say why there is no program: {log}"
    );

    // A holder of one group's key names another group's client as its own address. That client is
    // not even called back.
    let victim = Peer::new(&of_b, OF_A, Family::V4)?;
    victim.send(victim.request(Op::Off, DOMAIN)?)?;
    ensure!(victim.called_back(Duration::from_secs(3))?.is_none(), "a forged address was called back");

    // First the second key beside the first one, then the second key alone.
    let new = hypervisor.write("new.key", NEW_OF_A)?;
    hypervisor.write("a.key2", NEW_OF_A)?;
    ensure!(ask(of_a, &new)? != Some(0), "a key counts before SIGHUP");
    reload(&mut server, "changed accepted=4 added=1 dropped=0")?;
    let old = hypervisor.write("old.key", OF_A)?;
    for file in [&new, &old] {
        ensure!(ask(of_a, file)? == Some(0), "{file} of two: {}", server.log());
    }
    hypervisor.space().must("mv", &[&second, &a])?;
    reload(&mut server, "changed accepted=3 added=0 dropped=1")?;
    ensure!(ask(of_a, &new)? == Some(0), "{}", server.log());
    ensure!(ask(of_a, &old)? != Some(0), "the old key still counts");

    // A group's key that equals the listener's key is rejected, and all keys stay.
    hypervisor.write("a.key", &key())?;
    reload(&mut server, "the old keys stay in force")?;
    ensure!(ask(of_a, &new)? == Some(0), "{}", server.log());
    ensure!(ask(of_a, &bench.key)? != Some(0), "the listener's key counts in the group");
    Ok(())
}

/// Row `group-keys` of `docs/reference/compatibility.md`: fence_virtd's behaviour with the same
/// file.
#[test]
fn fence_virtd_ignores_the_keys_of_groups() -> Result<()> {
    let bench = Bench::new()?;
    let hypervisor = &bench.hypervisor;
    let key = hypervisor.write("a.key", OF_A)?;
    let ip = bench.guest.v4;
    let groups = format!("groups {{\ngroup {{ key_file = \"{key}\"; ip = \"{ip}\"; uuid = \"{DOMAIN}\"; }}\n}}\n");
    let config = Config { more: groups, ..bench.config("auto") };
    let _server = Server::start(hypervisor, &Which::Stock, &config)?;
    ensure!(ask(&bench.guest, &bench.key)? == Some(0), "the listener's key does not count in the group");
    ensure!(ask(&bench.guest, &key)? != Some(0), "the group's key counts");
    Ok(())
}
