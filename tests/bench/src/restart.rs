//! A restart of the daemon while libvirtd hangs: how long nobody answers.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use fence_common::wire::Op;
use fence_lab::client::Family;
use fence_lab::lab::Guest;
use fence_lab::peer::Peer;
use fence_lab::qemu;
use fence_lab::server::{Config, START_LIMIT, Server, Which};
use nix::sys::signal::Signal;

use super::bed::{Bed, KEY};
use super::caller::{self, PATIENCE};
use super::figures::{Contender, Figure, Part, Results, Target};
use super::stats::Unit;

/// The driver and the domain inside the daemon's process, which answer whatever libvirtd does.
const INSIDE: (&str, &str) = ("test:///default", "test");
/// The time of answers before the stop, and after the start.
const AROUND: Duration = Duration::from_millis(500);

pub(crate) fn figures() -> Vec<Figure> {
    let needed = "less to do before the first answer, or an earlier end";
    vec![Figure {
        id: "restart.deaf".to_owned(),
        part: Part::Restart,
        title: "a restart while libvirtd hangs: no answer for".to_owned(),
        unit: Unit::Time,
        targets: vec![(Target::AtMost(2.0), needed)],
    }]
}

/// Restarts the daemon while clients ask, and takes the longest time between two answers.
pub fn measure(daemon: &Which, results: &mut Results) -> Result<()> {
    let mut bed = Bed::new(daemon.clone())?;
    let uris = vec![qemu::URI.to_owned(), INSIDE.0.to_owned()];
    let config = Config { uris, ..Config::new(&bed.key) };
    let server = Server::start(&bed.hypervisor, daemon, &config)?;
    bed.libvirtd.signal(Signal::SIGSTOP)?;
    let over = AtomicBool::new(false);
    let answers = std::thread::scope(|scope| {
        let answering = scope.spawn(|| answers(&bed.asker, &over));
        let restarted = || -> Result<Server> {
            std::thread::sleep(AROUND);
            server.stop(Signal::SIGTERM)?;
            let next = Server::start(&bed.hypervisor, daemon, &config)?;
            std::thread::sleep(AROUND);
            Ok(next)
        };
        let restarted = restarted();
        over.store(true, Ordering::Relaxed);
        let answers = answering.join().map_err(|_| anyhow!("a client panicked"))?;
        restarted.and(answers)
    });
    bed.libvirtd.go_on(qemu::URI)?;
    let answers = answers?;
    let deaf = answers.windows(2).map(|pair| pair[1] - pair[0]).max().context("no answers")?;
    results.add("restart.deaf", Contender::Ours, deaf.as_secs_f64());
    Ok(())
}

/// The times of successive answers, until `over` is set.
fn answers(guest: &Guest, over: &AtomicBool) -> Result<Vec<Instant>> {
    let mut answers = Vec::new();
    while !over.load(Ordering::Relaxed) {
        let peer = Peer::new(guest, &KEY, Family::V4)?;
        let answer =
            caller::ask_every(&peer, Op::Status, INSIDE.1, PATIENCE.min(START_LIMIT), Duration::from_millis(50));
        // The daemon that stops may hang up.
        if let Ok(Some(answer)) = answer {
            answers.push(answer.replied);
        }
    }
    Ok(answers)
}
