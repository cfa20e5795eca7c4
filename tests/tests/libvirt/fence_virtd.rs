//! Behaviour of fence_virtd, where no test runs against both servers: rows of
//! `docs/reference/compatibility.md`.

use anyhow::{Result, ensure};
use fence_common::wire::Op;
use fence_lab::client::Client;
use fence_lab::lab::Hypervisor;
use fence_lab::libvirtd::Libvirtd;
use fence_lab::machine::{Machine, writing_disk};
use fence_lab::process::poll_until;
use fence_lab::qemu;
use fence_lab::server::Which;
use fence_lab::witness::Witness;
use nix::sys::signal::Signal;

use super::fuse::Disk;
use super::helpers::{TPM, shared_directory, signal};
use super::images::stalled;
use super::lists::destroyed_for_long;
use super::migration::{ended, hosts_with};
use super::site::{SOON, Site};
use super::{KEY, expect_listed};

fn site(uris: &[&str]) -> Result<Site> {
    let hypervisor = Hypervisor::new()?;
    let libvirtd = Libvirtd::start(&hypervisor)?;
    Site::with(&Which::Stock, hypervisor, libvirtd, uris, &[])
}

/// Row `list-outage`.
#[test]
fn a_list_is_empty_while_libvirtd_is_stopped_and_none_while_it_hangs() -> Result<()> {
    let mut site = site(&[qemu::URI])?;
    qemu::start_idle(&site.libvirtd, "runs")?;
    let disk = Disk::serve(&site.hypervisor, "stuck", writing_disk())?;
    Machine::new("stuck").disk(&disk.path(), "threads").start(&site.libvirtd)?;
    disk.wait_written()?;
    expect_listed(&site.observer.list()?, "runs", "on")?;

    let destroy = destroyed_for_long(&site, &disk, "stuck")?;
    let held_up = site.observer.list()?;
    disk.release();
    destroy.finish(SOON)?;
    poll_until("a list", SOON, || Ok((site.observer.list()?.code == Some(0)).then_some(())))?;

    site.libvirtd.signal(Signal::SIGSTOP)?;
    let hung = site.observer.list()?;
    site.libvirtd.go_on(qemu::URI)?;
    poll_until("a list", SOON, || Ok((site.observer.list()?.code == Some(0)).then_some(())))?;

    site.libvirtd.kill()?;
    let stopped = site.observer.list()?;
    ensure!(stopped.code == Some(0) && !stopped.stdout.contains("runs"), "stopped: {stopped:?}");
    for (what, list) in [("held up", held_up), ("hung", hung)] {
        ensure!(list.code == Some(0) && list.said() == "Timed out!\n", "{what}: {list:?}");
    }
    Ok(())
}

/// Row `last-words`.
#[test]
fn a_domain_that_runs_at_a_dead_uri_is_off_and_started_again() -> Result<()> {
    let (first, second) = (Hypervisor::new()?, Hypervisor::new()?);
    let [_, address] = first.connect(&second)?;
    let config = "listen_tls = 0\nlisten_tcp = 1\nauth_tcp = \"none\"\n";
    let mut there = Libvirtd::start_with(&second, config, &["--listen"])?;
    let here = Libvirtd::start(&first)?;
    let machine = Machine::new("vm1").uuid("5b0e7a52-3c5b-4c83-8c0f-0d9f6c3f1a02");
    here.define(qemu::URI, "vm1", &machine.xml()?)?;
    machine.start(&there)?;
    let uri = format!("qemu+tcp://{address}/system");
    let site = Site::with(&Which::Stock, first, here, &[qemu::URI, &uri], &[])?;
    let process = Witness::of_qemu(there.hypervisor(), "vm1")?;
    there.kill()?;
    site.expect("off", "vm1", 0)?;
    ensure!(!process.is_dead()?, "fence_virtd killed the domain: the row is out of date");
    site.expect("on", "vm1", 0)?;
    ensure!(!process.is_dead()? && !Witness::of_all(&site.hypervisor, "vm1")?.is_empty(), "there is no second copy");
    Ok(())
}

/// Row `moved-status`.
#[test]
fn a_domain_that_has_moved_away_is_off_by_status() -> Result<()> {
    let [here, there] = hosts_with(&Which::Stock)?;
    here.start_heavy(&there, "heavy")?;
    let (migration, _) = here.migrate_for_ever(&there, "heavy")?;
    let on_its_way = [&here, &there].map(|host| host.site.observer.fence("status", "heavy"));
    here.site.libvirtd.virsh(qemu::URI, &["destroy", "heavy"])?;
    ended(migration)?;
    Machine::new("nomad").start(&here.site.libvirtd)?;
    here.site.expect("status", "nomad", 0)?;
    ensure!(ended(here.migrate(&there, "nomad", &[])?)?.code == Some(0));
    here.site.expect("status", "nomad", 2)?;
    here.site.expect("off", "nomad", 0)?;
    ensure!(!there.site.machine("nomad")?.is_dead()?, "fence_virtd killed the domain: the row is out of date");
    for status in on_its_way {
        let status = status?;
        ensure!(status.code == Some(0), "on its way: {status:?}");
    }
    Ok(())
}

/// Row `kept-restarts`.
#[test]
fn a_start_that_fails_in_a_reboot_is_tried_once() -> Result<()> {
    let site = site(&[qemu::URI])?;
    let path = site.hypervisor.write("vm.img", &writing_disk())?;
    let disk = site.hypervisor.outside(&path);
    Machine::new("vm").disk(&path, "threads").start(&site.libvirtd)?;
    let machine = site.machine("vm")?;
    std::fs::remove_file(&disk)?;
    let reboot = site.observer.ask(&KEY, Op::Reboot, "vm")?;
    ensure!(machine.is_dead()?);
    std::fs::write(&disk, writing_disk())?;
    // Our daemon would try again after one second at most.
    std::thread::sleep(SOON / 2);
    ensure!(
        Witness::of_all(&site.hypervisor, "vm")?.is_empty(),
        "fence_virtd started the domain: the row is out of date"
    );
    ensure!(reboot == 0, "the reboot answered {reboot}");
    Ok(())
}

/// Row `writes-under-way`.
#[test]
fn a_write_that_is_under_way_is_no_hindrance_to_a_success() -> Result<()> {
    let site = site(&[qemu::URI])?;
    let disk = stalled(&site, "ring")?;
    let off = site.observer.ask(&KEY, Op::Off, "ring")?;
    ensure!(off == 0, "off answered {off}");
    site.expect("status", "ring", 2)?;
    disk.release();
    Ok(())
}

/// Row `helpers`.
#[test]
fn helpers_that_stand_still_are_waited_for() -> Result<()> {
    let site = site(&[qemu::URI])?;
    let directory = shared_directory(&site, "data", None)?;
    let helpers = site.with_helpers("vm", &[&directory, TPM], 3)?;
    signal(&helpers, Signal::SIGSTOP)?;
    let mut victims = Witness::of_all(&site.hypervisor, "vm")?;
    victims.extend(helpers);
    let client = Client::new("off", &site.key()).domain("vm").timeout(50);
    let off = site.observer.start_with(client, "off", "vm", victims)?.finish()?;
    // On a loaded machine it waits even longer than this client.
    ensure!(matches!(off.code, Some(0 | 255)) && off.elapsed.as_secs() >= 30, "{off:?}");
    Ok(())
}
