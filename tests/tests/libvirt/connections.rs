//! The number of connections to libvirt, and the cost of renewing them for clients.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, ensure};
use fence_common::sync::{lock, unpoisoned};
use fence_common::wire::Op;
use fence_lab::observer::Observer;
use fence_lab::process::poll_until;
use fence_lab::qemu;
use nix::sys::signal::Signal;

use super::KEY;
use super::site::{GUEST, SOON, Site};

impl Site {
    /// The number of connections to libvirtd. The daemon is its only client.
    fn connections(&self) -> Result<usize> {
        let table = self.hypervisor.proc_net("unix")?;
        let is_one = |line: &&str| {
            let words: Vec<_> = line.split_whitespace().collect();
            words.get(5) == Some(&"03") && words.get(7).is_some_and(|path| path.ends_with("/libvirt/libvirt-sock"))
        };
        Ok(table.lines().filter(is_one).count())
    }

    /// Waits until this number is reached, and stays.
    fn has_connections(&self, wanted: usize) -> Result<()> {
        let mut last = 0;
        let found = poll_until("the connections", SOON, || {
            last = self.connections()?;
            std::thread::sleep(Duration::from_millis(100));
            Ok((last == wanted && self.connections()? == wanted).then_some(()))
        });
        found.map_err(|error| error.context(format!("{last} connections, not {wanted}: {}", self.server.log())))
    }
}

#[test]
fn two_connections_are_enough_and_a_stall_renews_no_more_than_it_must() -> Result<()> {
    let mut site = Site::new(&[qemu::URI], &[])?;
    qemu::start_idle(&site.libvirtd, "vm")?;
    qemu::define_idle(&site.libvirtd, "never-on")?;
    site.wait_status("vm", 0)?;
    std::thread::sleep(Duration::from_secs(3));
    site.has_connections(2)?;

    // Longer than a call on a reused connection may take, and shorter than the keepalive timeout.
    let position = site.server.log_position();
    site.libvirtd.signal(Signal::SIGSTOP)?;
    std::thread::scope(|scope| -> Result<()> {
        let asked = scope.spawn(|| site.observer.ask(&KEY, Op::Status, "never-on"));
        std::thread::sleep(Duration::from_secs(6));
        site.libvirtd.signal(Signal::SIGCONT)?;
        asked.join().map_err(|_| anyhow!("panicked"))?.map(drop)
    })?;
    site.libvirtd.go_on(qemu::URI)?;
    site.wait_status("never-on", 2)?;
    site.has_connections(2)?;
    site.not_logged(position, "libvirt connection lost")?;
    // Events still arrive.
    site.expect("on", "never-on", 0)?;
    site.server.wait_domain("never-on", "running")?;
    site.off_directly("never-on")
}

#[test]
fn no_monitor_fails_while_libvirtd_is_restarted() -> Result<()> {
    /// The number of requests that are served at once for one guest.
    const GUESTS: u8 = 4;
    let mut site = Site::new(&[qemu::URI], &[])?;
    let observers: Vec<_> = (1..=GUESTS)
        .map(|number| Ok(Observer::new(&site.hypervisor, site.hypervisor.guest(GUEST + number)?, &site.key())))
        .collect::<Result<_>>()?;
    let (answers, until) = (Mutex::new(Vec::new()), Instant::now() + Duration::from_secs(5));
    std::thread::scope(|scope| -> Result<()> {
        let answers = &answers;
        let ask = move || {
            std::thread::scope(|scope| {
                for observer in observers.iter().cycle() {
                    if Instant::now() >= until {
                        break;
                    }
                    scope.spawn(move || {
                        let answer = observer.ask(&KEY, Op::DevStatus, "");
                        lock(answers).push(answer);
                    });
                    std::thread::sleep(Duration::from_millis(25));
                }
            });
        };
        let asks = scope.spawn(ask);
        std::thread::sleep(Duration::from_secs(1));
        site.libvirtd.kill()?;
        std::thread::sleep(Duration::from_secs(2));
        site.libvirtd.go_on(qemu::URI)?;
        asks.join().map_err(|_| anyhow!("panicked"))
    })?;
    let answers = unpoisoned(answers.into_inner());
    let failed = answers.iter().filter(|answer| !matches!(answer, Ok(0))).count();
    ensure!(answers.len() > 50, "only {} monitors", answers.len());
    ensure!(failed == 0, "{failed} of {} monitors failed: {}", answers.len(), site.server.log());
    Ok(())
}
