//! Changes the key by `docs/guide/key-rotation.md` while guests send requests.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::JoinHandle;

use anyhow::{Context, Result, anyhow, ensure};
use fence_lab::client::Client;
use fence_lab::cluster::corosync::KEY_PATH;
use fence_lab::cluster::lab::KEY;
use fence_lab::kernel;
use fence_lab::lab::{Guest, Hypervisor};
use fence_lab::process::{Finished, poll_until};
use fence_lab::server::Config;

use super::page;
use crate::host::{Host, LIMIT};

/// Hypervisors and guests of the page are one machine here. A guest's key has another file name.
const REMOTE: &str = "scp() { cp \"$1\" \"$2\" \"${3#*:}\"; }; ssh() { shift; sh -c \"$*\"; };";
/// The page's command for checking a guest's new key.
const LOOK: &str = "ssh root@GUEST fence_xvm -o status -H GUEST";
const RELOAD: &str = "systemctl reload fence-daemon";
const DOMAIN: &str = "test";

/// The commands of a step of the page, in order.
fn typed(step: u8) -> Result<Vec<String>> {
    let page = page("guide/key-rotation.md")?;
    let begin = format!("**{step}. ");
    let lines = page.lines().skip_while(|line| !line.starts_with(&begin)).skip(1);
    let lines = lines.take_while(|line| !line.starts_with("**") && !line.starts_with("## "));
    let typed = lines.filter_map(|line| line.strip_prefix("    ").filter(|line| !line.starts_with("SIGHUP: ")));
    let typed: Vec<_> = typed.map(str::to_owned).collect();
    ensure!(!typed.is_empty(), "nothing is typed in step {step} of the page");
    Ok(typed)
}

/// Runs a line that reloads the keys, and waits for the log line with its result.
fn reload(host: &Host, line: &str, said: &str) -> Result<()> {
    const WORDS: &str = "SIGHUP: ";
    let before = host.log().matches(WORDS).count();
    host.must(line)?;
    host.wait_log(WORDS, before + 1)?;
    let log = host.log();
    let last = log.lines().rfind(|line| line.contains(WORDS)).unwrap_or_default();
    ensure!(last.contains(said), "not \"{said}\": {last}");
    Ok(())
}

/// Runs the commands of a step on the hypervisor.
fn on_hypervisor(host: &Host, step: u8, said: &str) -> Result<()> {
    for line in typed(step)? {
        let line = format!("{REMOTE} {line}");
        if line.contains("kill -HUP") { reload(host, &line, said)? } else { host.must(&line).map(drop)? }
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
        let key = hypervisor.write(&format!("{}.key", guest.name), &KEY)?;
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
        poll_until("further answers", LIMIT, || {
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

/// Performs the page in its order. No guest may need a second request.
fn rotate(attach: &'static str) -> Result<()> {
    let second = format!("{KEY_PATH}2");
    let config = Config { attach: Some(attach), key_file2: Some(second.clone()), ..Config::new(KEY_PATH) };
    let host = Host::new(&config)?;
    host.must("systemctl start fence-daemon")?;
    host.wait_serving("0")?;
    if attach != "off" {
        // The socket serves while the program is loaded.
        host.wait_log("program=generic", 1)?;
    }
    let hypervisor = host.hypervisor();
    let guests = [hypervisor.guest(1)?, hypervisor.guest(2)?].map(|guest| Asking::start(hypervisor, &guest));
    let guests = guests.into_iter().collect::<Result<Vec<_>>>()?;
    let go_on = || guests.iter().try_for_each(Asking::go_on);
    go_on()?;

    // 1. The new key: every hypervisor accepts both.
    let shown = page("guide/key-rotation.md")?;
    let shown = shown.lines().find_map(|line| line.strip_prefix("    ").filter(|line| line.starts_with("SIGHUP: ")));
    on_hypervisor(&host, 1, shown.context("the page shows no line of the log")?)?;
    go_on()?;

    // 2. One guest after the other.
    let idle = hypervisor.guest(3)?;
    for guest in &guests {
        for line in typed(2)?.iter().filter(|line| *line != LOOK) {
            let line = line.replace(&second, "SECOND").replace(KEY_PATH, &guest.key).replace("SECOND", &second);
            host.must(&format!("{REMOTE} {line}"))?;
        }
        go_on()?;
        // From a guest whose port is free: the other guests send all the time.
        ensure!(typed(2)?.iter().any(|line| line == LOOK), "the page does not look: {LOOK}");
        let look = LOOK.trim_start_matches("ssh root@GUEST ").replace("GUEST", DOMAIN);
        idle.space().must("sh", &["-c", &format!("{look} -k {}", guest.key)])?;
    }
    // A second signal changes nothing.
    for _ in 0..5 {
        reload(&host, RELOAD, "are the same accepted=2")?;
    }
    go_on()?;

    // 3. The old key goes.
    on_hypervisor(&host, 3, "changed accepted=1 added=0 dropped=1")?;
    go_on()?;

    let asked = guests.into_iter().map(Asking::end).sum::<Result<u32>>();
    let asked = asked.with_context(|| format!("the daemon's log: {}", host.log()))?;
    ensure!(asked >= 40, "only {asked} requests");
    let log = host.log();
    let errors = host.must("journalctl -q --unit=fence-daemon --priority=err --output=cat")?;
    ensure!(!log.contains("callback failed") && errors.is_empty(), "{log}");
    let in_kernel = attach != "off";
    if in_kernel {
        // The daemon accepted each datagram the first time, through the ring buffer.
        let counters = kernel::counters(hypervisor)?;
        ensure!(counters.get("drop_digest")? == 0, "{:?}", counters.nonzero());
        ensure!(
            counters.get("delivered")? >= u64::from(asked) && !log.contains("via=socket"),
            "{:?}",
            counters.nonzero()
        );
    }
    let old = hypervisor.write("old.key", &KEY)?;
    let with_old = Client::new("status", &old).domain(DOMAIN).timeout(5).run(idle.space())?;
    ensure!(with_old.code != Some(0), "the old key still works");
    if in_kernel {
        ensure!(kernel::counters(hypervisor)?.get("drop_digest")? > 0, "the kernel lets the old key through");
        let slots = kernel::dump(hypervisor, "fence_keys")?;
        let slots = slots.as_array().context("no slots")?;
        let is_empty = |slot: &&serde_json::Value| {
            let bytes = slot.pointer("/value").and_then(serde_json::Value::as_array);
            bytes.is_some_and(|bytes| bytes.len() > 1000 && bytes.iter().all(|byte| byte == "0x00"))
        };
        ensure!(slots.len() == 2 && slots.iter().filter(is_empty).count() == 1, "something is left of the old key");
    }
    Ok(())
}

#[test]
fn no_request_is_lost_while_keys_rotate_in_the_kernel() -> Result<()> {
    rotate("auto")
}

#[test]
fn no_request_is_lost_while_keys_rotate_at_the_socket() -> Result<()> {
    rotate("off")
}
