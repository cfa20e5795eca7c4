//! The daemon restarts while libvirtd hangs: the restart does not wait, and no request is lost.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use fence_common::wire::Op;
use fence_lab::client::Family;
use fence_lab::lab::Hypervisor;
use fence_lab::libvirtd::Libvirtd;
use fence_lab::peer::Peer;
use fence_lab::qemu;
use fence_lab::server::{Server, Which};
use nix::mount::{MsFlags, mount};
use nix::sys::signal::Signal;

use super::KEY;
use super::site::{GUEST, SOON, Site};
use super::unkillable::writer;

/// The domain of libvirt's driver inside the daemon's process, which answers whatever libvirtd
/// does.
const INSIDE: (&str, &str) = ("test:///default", "test");

/// How long nobody may be served, on a loaded machine. It is below 1 s on a quiet one.
const DEAF: Duration = Duration::from_secs(2);

/// The times of successive answers, until `over` is set.
fn answers(guest: &fence_lab::lab::Guest, over: &AtomicBool) -> Result<Vec<Instant>> {
    let mut answers = Vec::new();
    while !over.load(Ordering::Relaxed) {
        let peer = Peer::new(guest, &KEY, Family::V4)?;
        peer.send(peer.request(Op::Status, INSIDE.1)?)?;
        if let Some(mut call) = peer.called_back(Duration::from_millis(100))?
            && call.converse().is_ok_and(|reply| reply == 0)
        {
            answers.push(Instant::now());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(answers)
}

#[test]
fn a_restart_is_over_soon_while_libvirtd_hangs() -> Result<()> {
    let mut site = Site::new(&[qemu::URI, INSIDE.0], &[])?;
    qemu::define_idle(&site.libvirtd, "never-on")?;
    qemu::start_idle(&site.libvirtd, "vm")?;
    site.server.wait_domain("vm", "running")?;
    let before = site.machine("vm")?;
    let guest = site.hypervisor.guest(GUEST + 1)?;
    let over = AtomicBool::new(false);
    std::thread::sleep(Duration::from_secs(1));
    site.libvirtd.signal(Signal::SIGSTOP)?;
    // The domain's restart stays pending.
    site.expect("reboot", "vm", 0)?;
    ensure!(before.is_dead()?);
    std::thread::scope(|scope| -> Result<()> {
        let answered = scope.spawn(|| answers(&guest, &over));
        let observer = &site.observer;
        let hangs: Vec<_> = [Op::Status, Op::Off, Op::On]
            .map(|op| scope.spawn(move || (op, observer.ask(&KEY, op, "never-on"), Instant::now())))
            .into_iter()
            .collect();
        std::thread::sleep(Duration::from_secs(2));
        let Site { mut server, .. } = site;
        let stopped = Instant::now();
        server.process().signal(Signal::SIGTERM)?;
        let ended = server.finish(Duration::from_secs(40))?;
        let ends = stopped.elapsed();
        let next = Server::start(&site.hypervisor, &Which::ours()?, &site.config)?;
        std::thread::sleep(Duration::from_secs(1));
        over.store(true, Ordering::Relaxed);
        for hung in hangs {
            let (op, reply, at) = hung.join().map_err(|_| anyhow!("panicked"))?;
            let reply = reply.with_context(|| format!("no answer to {}: {}", op.name(), ended.stderr))?;
            ensure!(reply == 1, "{}: {reply}", op.name());
            ensure!(at > stopped, "{} did not hang", op.name());
        }
        let answers = answered.join().map_err(|_| anyhow!("panicked"))??;
        let deaf = answers.windows(2).map(|pair| pair[1] - pair[0]).max().context("no answers")?;
        eprintln!("ended {ends:?} after SIGTERM, no answer for {deaf:?}");
        ensure!(answers.last().is_some_and(|last| *last > stopped + ends), "the next daemon answers nothing");
        ensure!(deaf < DEAF, "no answer for {deaf:?}: {}", ended.stderr);
        // The stop answers them. Their own time limit would have come much later.
        let by_the_stop = ended.stderr.matches("the daemon stops before this was done").count();
        ensure!(by_the_stop >= 3, "ended {ends:?} after SIGTERM: {}", ended.stderr);
        ensure!(ended.code == Some(0), "{ended:?}");

        // The next daemon completes the pending restart.
        site.libvirtd.go_on(qemu::URI)?;
        let back = |line: &str| line.contains("started again after its reboot").then_some(());
        next.wait_log(0, SOON, back).with_context(|| format!("not started again: {}", next.log()))
    })
}

/// A guest that does not die keeps nobody else from being served. Its client gets a failure.
#[test]
fn a_restart_does_not_wait_for_a_guest_that_does_not_die() -> Result<()> {
    let site = Site::new(&[qemu::URI, INSIDE.0], &[])?;
    let disk = writer(&site, "stuck", "threads")?;
    let machine = site.machine("stuck")?;
    disk.hold()?;
    let guest = site.hypervisor.guest(GUEST + 1)?;
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| -> Result<()> {
        let answered = scope.spawn(|| answers(&guest, &over));
        let (observer, position) = (&site.observer, site.server.log_position());
        let off = scope.spawn(move || observer.ask(&KEY, Op::Off, "stuck"));
        let told = |line: &str| line.contains("killed, and not dead yet").then_some(());
        site.server.wait_log(position, SOON, told).with_context(|| site.server.log())?;
        let Site { mut server, .. } = site;
        let stopped = Instant::now();
        server.process().signal(Signal::SIGTERM)?;
        let ended = server.finish(Duration::from_secs(40))?;
        let ends = stopped.elapsed();
        let next = Server::start(&site.hypervisor, &Which::ours()?, &site.config)?;
        std::thread::sleep(Duration::from_secs(1));
        over.store(true, Ordering::Relaxed);
        let reply = off.join().map_err(|_| anyhow!("panicked"))?.with_context(|| ended.stderr.clone())?;
        ensure!(reply == 1 && !machine.is_dead()?, "a definite failure, not {reply}: {}", ended.stderr);
        let answers = answered.join().map_err(|_| anyhow!("panicked"))??;
        let deaf = answers.windows(2).map(|pair| pair[1] - pair[0]).max().context("no answers")?;
        eprintln!("ended {ends:?} after SIGTERM, no answer for {deaf:?}");
        ensure!(answers.last().is_some_and(|last| *last > stopped + ends), "the next daemon answers nothing");
        ensure!(deaf < DEAF && deaf < ends, "no answer for {deaf:?}: {}", ended.stderr);

        // The kill is pending, and the next daemon proves the death.
        disk.release();
        ensure!(machine.dies_within(SOON)?, "the kill has not stayed in force");
        site.observer.expect("off", "stuck", 0).with_context(|| next.log()).map(drop)
    })
}

/// The next daemon does not know a restart without a record. The stop waits for this restart, and
/// the daemon serves meanwhile.
#[test]
fn a_stop_that_waits_for_an_unrecorded_restart_serves_until_its_end() -> Result<()> {
    const STATE: &str = "/run/fence-xdp";
    let hypervisor = Hypervisor::new()?;
    let libvirtd = Libvirtd::start(&hypervisor)?;
    // The disk has no room for a record.
    hypervisor.space().in_mounts(|| {
        std::fs::create_dir_all(STATE)?;
        mount(Some("tmpfs"), STATE, Some("tmpfs"), MsFlags::empty(), Some("size=4096,mode=0700"))?;
        Ok(std::fs::write(Path::new(STATE).join("filling"), [1; 4096])?)
    })?;
    let site = Site::on(hypervisor, libvirtd, &[qemu::URI, INSIDE.0], &[])?;
    qemu::start_idle(&site.libvirtd, "vm")?;
    site.server.wait_domain("vm", "running")?;
    let before = site.machine("vm")?;
    let guest = site.hypervisor.guest(GUEST + 1)?;
    let over = AtomicBool::new(false);
    std::thread::sleep(Duration::from_secs(1));
    site.libvirtd.signal(Signal::SIGSTOP)?;
    site.expect("reboot", "vm", 0)?;
    ensure!(before.is_dead()?);
    site.logs(0, "this reboot will be forgotten if this daemon dies")?;
    std::thread::scope(|scope| -> Result<()> {
        let answered = scope.spawn(|| answers(&guest, &over));
        std::thread::sleep(Duration::from_secs(1));
        let Site { mut server, .. } = site;
        let stopped = Instant::now();
        server.process().signal(Signal::SIGTERM)?;
        // Within the 5 s that the stop waits.
        std::thread::sleep(Duration::from_secs(3));
        site.libvirtd.signal(Signal::SIGCONT)?;
        let ended = server.finish(Duration::from_secs(40))?;
        let ends = stopped.elapsed();
        let _next = Server::start(&site.hypervisor, &Which::ours()?, &site.config)?;
        std::thread::sleep(Duration::from_secs(1));
        over.store(true, Ordering::Relaxed);
        let answers = answered.join().map_err(|_| anyhow!("panicked"))??;
        let deaf = answers.windows(2).map(|pair| pair[1] - pair[0]).max().context("no answers")?;
        eprintln!("ended {ends:?} after SIGTERM, no answer for {deaf:?}");
        ensure!(ended.stderr.contains("started again after its reboot"), "{}", ended.stderr);
        ensure!(answers.last().is_some_and(|last| *last > stopped + ends), "the next daemon answers nothing");
        ensure!(deaf < DEAF && deaf < ends, "no answer for {deaf:?}: {}", ended.stderr);
        Ok(())
    })
}
