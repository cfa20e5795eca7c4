//! Key rotation under load: docs/guide/key-rotation.md step by step, while the stock client sends
//! requests.

use std::io::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use fence_common::wire::Op;
use fence_lab::client::{Client, Family};
use fence_lab::kernel;
use fence_lab::lab::{Guest, Hypervisor};
use fence_lab::peer::Peer;
use fence_lab::process::{Finished, poll_until};
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
    reloaded(server, position, said)
}

/// The log line about a SIGHUP since `position`.
fn reloaded(server: &Server, position: usize, said: &str) -> Result<String> {
    let line = server.wait_log(position, SOON, |line| line.contains("SIGHUP: ").then(|| line.to_owned()));
    let line = line.with_context(|| format!("the log does not mention the SIGHUP: {}", server.log()))?;
    ensure!(line.contains(said), "not \"{said}\": {line}");
    Ok(line)
}

/// The key's path in docs/guide/key-rotation.md.
const PLACE: &str = "/etc/cluster/fence_xvm.key";
/// Hypervisors and guests of the page are one machine here, so the page's copies get another file
/// name.
const REMOTE: &str = "scp() { cp \"$1\" \"$2\" \"${3#*:}\"; }; ssh() { shift; sh -c \"$*\"; };";
/// The page's command for checking a guest's new key.
const LOOK: &str = "ssh root@GUEST fence_xvm -o status -H GUEST";

/// The commands of a step of the page, in order.
fn typed(step: u8) -> Result<Vec<String>> {
    let page = std::fs::read_to_string(fence_lab::tools::workspace().join("docs/guide/key-rotation.md"))?;
    let begin = format!("**{step}. ");
    let lines = page.lines().skip_while(|line| !line.starts_with(&begin)).skip(1);
    let lines = lines.take_while(|line| !line.starts_with("**") && !line.starts_with("## "));
    let typed = lines.filter_map(|line| line.strip_prefix("    ").filter(|line| !line.starts_with("INFO ")));
    let typed: Vec<_> = typed.map(str::to_owned).collect();
    ensure!(!typed.is_empty(), "nothing is typed in step {step} of the page");
    Ok(typed)
}

/// Runs the commands of a step on the hypervisor, and sends SIGHUP where the page reloads.
fn on_hypervisor(bench: &Bench, server: &Server, step: u8, said: &str) -> Result<()> {
    let Which::Ours(daemon) = Which::ours()? else { bail!("ours is not ours") };
    let here = bench.hypervisor.path("fence.key");
    for line in typed(step)? {
        let line = line.replace("fence-daemon", &daemon.to_string_lossy()).replace(PLACE, &here);
        let position = server.log_position();
        shell(&bench.hypervisor, &format!("{REMOTE} {line}"))?;
        if line.starts_with("kill -HUP") {
            reloaded(server, position, said)?;
        }
    }
    Ok(())
}

/// A guest that sends `status` again and again, with the stock client and its own key file. Each
/// request is for another, irrelevant domain: the client's sequence number is a time of day without
/// seconds. The same number for the same domain within ten seconds counts as a duplicate.
struct Asking {
    key: String,
    stop: Arc<AtomicBool>,
    asked: Arc<AtomicU32>,
    thread: JoinHandle<Result<()>>,
}

impl Asking {
    fn start(hypervisor: &Hypervisor, guest: &Guest) -> Result<Self> {
        let key = hypervisor.write(&format!("{}.key", guest.name), &key())?;
        let (stop, asked) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU32::new(0)));
        let (name, key_file) = (guest.name.clone(), key.clone());
        let thread = std::thread::spawn({
            let (stop, asked, space) = (Arc::clone(&stop), Arc::clone(&asked), guest.space().clone());
            move || {
                while !stop.load(Ordering::Relaxed) {
                    let number = asked.load(Ordering::Relaxed);
                    let client = Client::new("monitor", &key_file).domain(&format!("{name}-{number}"));
                    let answer: Finished = client.run(&space)?;
                    ensure!(answer.code == Some(0), "a lost request: {answer:?}");
                    asked.fetch_add(1, Ordering::Relaxed);
                }
                Ok(())
            }
        });
        Ok(Self { key, stop, asked, thread })
    }

    /// Waits for some more answers.
    fn go_on(&self) -> Result<()> {
        let before = self.asked.load(Ordering::Relaxed);
        poll_until("further answers", SOON, || {
            let more = self.asked.load(Ordering::Relaxed).wrapping_sub(before) >= 4;
            Ok((more || self.thread.is_finished()).then_some(()))
        })
    }

    fn end(self) -> Result<u32> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow!("the asking guest panicked"))??;
        Ok(self.asked.load(Ordering::Relaxed))
    }
}

/// Performs docs/guide/key-rotation.md in its order. No guest may need a second request.
fn rotate(attach: &'static str) -> Result<()> {
    let (bench, config) = bench()?;
    let hypervisor = &bench.hypervisor;
    let mut server = bench.serve(&Config { attach: Some(attach), ..config })?;
    let other = hypervisor.guest(2)?;
    let guests = [Asking::start(hypervisor, &bench.guest)?, Asking::start(hypervisor, &other)?];
    let go_on = || guests.iter().try_for_each(Asking::go_on);
    go_on()?;

    // 1. The new key: every hypervisor accepts both.
    let second = hypervisor.path("fence.key2");
    on_hypervisor(&bench, &server, 1, "changed accepted=2 added=1 dropped=0")?;
    go_on()?;

    // 2. One guest after the other.
    let idle = hypervisor.guest(3)?;
    for guest in &guests {
        for line in typed(2)?.iter().filter(|line| *line != LOOK) {
            let line = line.replace(&format!("{PLACE}2"), &second).replace(PLACE, &guest.key);
            shell(hypervisor, &format!("{REMOTE} {line}"))?;
        }
        go_on()?;
        // From a guest whose port is free: the other guests send all the time.
        ensure!(typed(2)?.iter().any(|line| line == LOOK), "the page does not look: {LOOK}");
        let look = LOOK.trim_start_matches("ssh root@GUEST ").replace("GUEST", DOMAIN);
        idle.space().must("sh", &["-c", &format!("{look} -k {}", guest.key)])?;
    }
    // A second signal changes nothing.
    for _ in 0..5 {
        reload(&mut server, "are the same accepted=2")?;
    }
    go_on()?;

    // 3. The old key goes.
    let old = hypervisor.write("old.key", &key())?;
    on_hypervisor(&bench, &server, 3, "changed accepted=1 added=0 dropped=1")?;
    go_on()?;

    let asked = guests.into_iter().map(Asking::end).sum::<Result<u32>>();
    let asked = asked.with_context(|| format!("the server's log: {}", server.log()))?;
    ensure!(asked >= 40, "only {asked} requests");
    let log = server.log();
    ensure!(!log.contains("callback failed") && !log.contains("ERROR"), "{log}");
    if attach == "auto" {
        // The daemon accepted each datagram the first time, through the ring buffer.
        let counters = bench.counters()?;
        ensure!(counters.get("drop_digest")? == 0, "{:?}", counters.nonzero());
        ensure!(
            counters.get("delivered")? >= u64::from(asked) && !log.contains("via=socket"),
            "{:?}",
            counters.nonzero()
        );
    }
    let with_old = Client::new("status", &old).domain(DOMAIN).timeout(5).run(bench.guest.space())?;
    ensure!(with_old.code != Some(0), "the old key still works");
    if attach == "auto" {
        ensure!(bench.counters()?.get("drop_digest")? > 0, "the kernel lets the old key through");
        let slots = kernel::dump(hypervisor, "fence_keys")?;
        let slots = slots.as_array().context("no slots")?;
        let is_empty = |slot: &&Value| {
            let bytes = slot.pointer("/value").and_then(Value::as_array);
            bytes.is_some_and(|bytes| bytes.len() > 1000 && bytes.iter().all(|byte| byte == "0x00"))
        };
        ensure!(slots.len() == 2 && slots.iter().filter(is_empty).count() == 1, "something is left of the old key");
    }
    Ok(())
}

#[test]
fn nobody_is_lost_while_keys_rotate_in_the_kernel() -> Result<()> {
    rotate("auto")
}

#[test]
fn nobody_is_lost_while_keys_rotate_at_the_socket() -> Result<()> {
    rotate("off")
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
