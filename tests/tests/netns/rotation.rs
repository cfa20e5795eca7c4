//! SIGHUP: which key is in force, and which is refused. `cluster/pages/rotation.rs` changes keys
//! under load.

use std::io::Write as _;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fence_common::wire::Op;
use fence_lab::client::{Client, Family};
use fence_lab::kernel;
use fence_lab::lab::Hypervisor;
use fence_lab::peer::Peer;
use fence_lab::server::{Config, START_LIMIT, Server, Which};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::bench::{Bench, DOMAIN, key};

/// The longest time of a short operation on a loaded machine.
const SOON: Duration = Duration::from_secs(60);
/// A second key.
const NEW: &[u8] = b"another key";

/// A lab whose configuration has a second key file, which does not exist yet.
fn bench() -> Result<(Bench, Config)> {
    let bench = Bench::new()?;
    let config = Config { key_file2: Some(bench.hypervisor.path("fence.key2")), ..bench.config("auto") };
    Ok((bench, config))
}

/// Runs a command on the hypervisor, as an administrator does.
fn shell(hypervisor: &Hypervisor, command: &str) -> Result<()> {
    hypervisor.space().must("sh", &["-c", command]).map(drop)
}

/// Sends SIGHUP and returns the log line with its result.
fn reload(server: &mut Server, said: &str) -> Result<String> {
    let position = server.log_position();
    server.process().signal(Signal::SIGHUP)?;
    let line = server.wait_log(position, SOON, |line| line.contains("SIGHUP: ").then(|| line.to_owned()));
    let line = line.with_context(|| format!("the log does not mention the SIGHUP: {}", server.log()))?;
    ensure!(line.contains(said), "not \"{said}\": {line}");
    Ok(line)
}

#[test]
fn a_request_goes_on_with_the_key_that_it_began_with() -> Result<()> {
    let (bench, config) = bench()?;
    let mut server = bench.serve(&config)?;
    let peer = Peer::new(&bench.guest, &key(), Family::V4)?;
    let mut call = peer.ask(Op::Status, DOMAIN)?;
    call.challenge()?;
    // Replaced at once, without a time in which both keys are accepted.
    let (first, new) = (bench.hypervisor.path("fence.key"), bench.hypervisor.write("new.key", NEW)?);
    shell(&bench.hypervisor, &format!("mv {new} {first}"))?;
    reload(&mut server, "changed accepted=1 added=1 dropped=1")?;
    call.respond()?;
    ensure!(call.reply()? == Some(0), "{}", server.log());
    let new = Peer::new(&bench.guest, NEW, Family::V4)?;
    ensure!(new.ask(Op::Status, DOMAIN)?.converse()? == 0, "{}", server.log());
    Ok(())
}

/// Where the kernel program verifies a request with a key that the daemon has dropped, the daemon
/// rejects it. The socket knows the keys of the moment, so the digest is wrong there.
#[test]
fn a_request_with_a_dropped_key_is_counted_and_goes_unanswered() -> Result<()> {
    const KEYS: &str = "fence_keys";
    let slots = |bench: &Bench| -> Result<Vec<Value>> {
        Ok(kernel::dump(&bench.hypervisor, KEYS)?.as_array().cloned().unwrap_or_default())
    };
    for attach in ["auto", "off"] {
        let (bench, config) = bench()?;
        let mut server = bench.serve(&Config { attach: Some(attach), ..config })?;
        let in_kernel = attach == "auto";
        let before = if in_kernel { slots(&bench)? } else { Vec::new() };
        let (file, new) = (bench.hypervisor.path("fence.key"), bench.hypervisor.write("new.key", NEW)?);
        shell(&bench.hypervisor, &format!("mv {new} {file}"))?;
        reload(&mut server, "changed accepted=1 added=1 dropped=1")?;
        if in_kernel {
            // The old key is back in its slot, as if the kernel had refused to wipe it.
            let after = slots(&bench)?;
            let loaded =
                |slot: &Value| slot["value"].as_array().is_some_and(|bytes| bytes.iter().any(|byte| byte != "0x00"));
            let old = before.iter().zip(&after).find(|(old, new)| loaded(old) && !loaded(new)).context("no old key")?.0;
            let bytes = |part: &str| -> Vec<&str> {
                old[part].as_array().into_iter().flatten().filter_map(Value::as_str).collect()
            };
            kernel::put(&bench.hypervisor, KEYS, &bytes("key"), &bytes("value"))?;
        }
        let position = server.log_position();
        let [old, new] = [&key()[..], NEW].map(|key| Peer::new(&bench.guest, key, Family::V4));
        let (old, new) = (old?, new?);
        old.send(old.request(Op::Off, DOMAIN)?)?;
        // Once this request is answered, the daemon has judged the previous one.
        ensure!(new.ask(Op::Status, DOMAIN)?.converse()? == 0, "{attach}: it is off: {}", server.log());
        ensure!(old.called_back(Duration::from_millis(500))?.is_none(), "{attach}: called back: {}", server.log());
        let (_, report) = server.status()?;
        let counted = [
            ("/requests/retired_key", u64::from(in_kernel)),
            ("/requests/answered", 1),
            ("/socket/drop_digest", u64::from(!in_kernel)),
        ];
        for (pointer, expected) in counted {
            ensure!(
                report.pointer(pointer) == Some(&expected.into()),
                "{attach}: {pointer} is not {expected}: {report}"
            );
        }
        if in_kernel {
            let said =
                |line: &str| line.contains("WARN rejected: signed with a key that is no longer accepted").then_some(());
            server.wait_log(position, SOON, said).with_context(|| format!("no line about it: {}", server.log()))?;
            ensure!(report["requests"]["recent"][1]["result"] == "retired key", "{report}");
        }
    }
    Ok(())
}

#[test]
fn a_half_written_key_keeps_the_old_ones() -> Result<()> {
    let (bench, config) = bench()?;
    let mut server = bench.serve(&config)?;
    let client = |file: &str| Client::new("status", file).domain(DOMAIN);
    let old = bench.hypervisor.write("old.key", &key())?;
    let (first, second) = (bench.hypervisor.path("fence.key"), bench.hypervisor.path("fence.key2"));

    let mut writer = std::fs::File::create(bench.hypervisor.outside(&second))?;
    writer.write_all(&NEW[..3])?;
    let line = reload(&mut server, "the old keys stay in force")?;
    ensure!(line.contains("ERROR") && line.contains("fence.key2 is being written"), "{line}");
    bench.expect(&server, bench.guest.space(), &client(&old), 0)?;
    // The part of the key that exists does not work as a key.
    let half = bench.hypervisor.write("half.key", &NEW[..3])?;
    ensure!(client(&half).timeout(3).run(bench.guest.space())?.code != Some(0), "half a key is a key");

    writer.write_all(&NEW[3..])?;
    drop(writer);
    reload(&mut server, "changed accepted=2")?;
    let new = bench.hypervisor.write("new.key", NEW)?;
    for file in [&old, &new] {
        bench.expect_via(&server, &client(file), 0, "kernel")?;
    }

    for (broken, said) in [
        (format!(": > {first}"), "is empty"),
        (format!("head -c 100 {old} > {first}"), "only the beginning of a key"),
        (format!("rm {first}"), "does not exist"),
        (format!("mkdir {first}"), "is not a regular file"),
        (format!("rmdir {first}; cat {old} {old} | tr 1 2 > {first}"), "is longer than a key"),
    ] {
        shell(&bench.hypervisor, &broken)?;
        let line = reload(&mut server, "the old keys stay in force")?;
        ensure!(line.contains("ERROR") && line.contains(said), "{broken}: {line}");
        for file in [&old, &new] {
            bench.expect_via(&server, &client(file), 0, "kernel")?;
        }
    }
    Ok(())
}

#[test]
fn a_key_that_comes_while_the_program_is_loaded_is_in_it() -> Result<()> {
    let (bench, config) = bench()?;
    let mut server = Server::spawn(&bench.hypervisor, &Which::ours()?, &config, &[])?;
    let second = bench.hypervisor.write("fence.key2.new", NEW)?;
    server.wait_log(0, START_LIMIT, |line| line.contains("program=loading").then_some(())).context("never ready")?;
    shell(&bench.hypervisor, &format!("mv {second} {}", bench.hypervisor.path("fence.key2")))?;
    reload(&mut server, "changed accepted=2")?;
    server.wait_settled(START_LIMIT)?;
    for file in ["fence.key", "fence.key2"] {
        let client = Client::new("status", &bench.hypervisor.path(file)).domain(DOMAIN);
        bench.expect_via(&server, &client, 0, "kernel")?;
    }
    Ok(())
}
