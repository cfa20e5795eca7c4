//! Instances that the daemon has not seen yet, or that no URI reports: an `off` needs more than a
//! direct kill of the known instance.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fence_lab::container;
use fence_lab::lab::Hypervisor;
use fence_lab::libvirtd::Libvirtd;
use fence_lab::machine::Machine;
use fence_lab::process::poll_until;
use fence_lab::qemu;
use fence_lab::witness::Witness;

use super::proxy::Proxy;
use super::remains::remove_run_files;
use super::site::{SOON, Site};
use super::turns::Turn;

/// The delay of each answer of the other libvirtd. A look-up needs two.
const SLOW: Duration = Duration::from_millis(40);
/// The number of domains that this libvirtd needs about 20 s to report.
const MANY: u32 = 60;

/// The daemon has just started: one URI has reported all its domains, the other one is slow.
#[test]
fn a_domain_that_a_slow_uri_reports_late_is_killed_too() -> Result<()> {
    let (first, second) = (Hypervisor::new()?, Hypervisor::new()?);
    let (here, there) = (Libvirtd::start(&first)?, Libvirtd::start(&second)?);
    for number in 0..MANY {
        qemu::define_idle(&there, &format!("other{number}"))?;
    }
    qemu::start_idle(&here, "twin")?;
    // The last domain to be looked up.
    Machine::new("twin").uuid("ffffffff-3c5b-4c83-8c0f-0d9f6c3f1a03").start(&there)?;
    let both = [Witness::of_qemu(&first, "twin")?, Witness::of_qemu(&second, "twin")?];
    let socket = first.path("second.sock");
    let proxy = Proxy::between(&first, &socket, &second)?;
    proxy.delay_all_answers(SLOW);
    let uri = format!("qemu+unix:///system?socket={socket}");
    let site = Site::on(first, here, &[qemu::URI, &uri], &[])?;
    let connected = || Ok((site.server.log().matches("connected to libvirt").count() == 2).then_some(()));
    poll_until("both URIs", SOON, connected).with_context(|| site.server.log())?;
    site.server.wait_domain("twin", "running")?;
    site.expect("off", "twin", 0)?;
    for twin in &both {
        ensure!(twin.is_dead()?, "FALSE SUCCESS: {}: {}", twin.describe(), site.server.log());
    }
    Ok(())
}

/// A container is killed by its own process. Another URI calls a machine of that name off. That
/// machine runs here, and its libvirtd has lost it.
#[test]
fn a_lost_machine_with_a_containers_name_is_killed_with_that() -> Result<()> {
    let _turn = Turn::without_writes();
    let (first, second) = (Hypervisor::new()?, Hypervisor::new()?);
    let (here, there) = (Libvirtd::start(&first)?, Libvirtd::start(&second)?);
    let machine = Machine::new("same").uuid("5b0e7a52-3c5b-4c83-8c0f-0d9f6c3f1a04");
    machine.create_transient(&here)?;
    there.define(qemu::URI, "same", &machine.xml()?)?;
    let lost = Witness::of_qemu(&first, "same")?;
    here.crash()?;
    remove_run_files(&first, "same")?;
    let here = Libvirtd::start(&first)?;
    container::start(&here, "same")?;
    let socket = first.path("second.sock");
    let _proxy = Proxy::between(&first, &socket, &second)?;
    let uri = format!("qemu+unix:///system?socket={socket}");
    let site = Site::on(first, here, &[&uri, qemu::URI, container::URI], &[])?;
    site.server.wait_domain("same", "running")?;
    site.server.wait_domain("same", "shut off")?;
    let contained = Witness::of_container(&site.hypervisor, "same")?;
    ensure!(!lost.is_dead()? && !contained.is_dead()?, "the test is wrong: the machines are dead");
    site.expect("off", "same", 0)?;
    ensure!(contained.is_dead()?);
    ensure!(lost.is_dead()?, "FALSE SUCCESS: {}: {}", lost.describe(), site.server.log());
    site.wait_status("same", 2)
}

/// The user of another URI chooses the UUIDs there, and groups judge the name alone.
#[test]
fn a_machine_with_the_same_uuid_is_not_killed_under_another_name() -> Result<()> {
    let (first, second) = (Hypervisor::new()?, Hypervisor::new()?);
    let (here, there) = (Libvirtd::start(&first)?, Libvirtd::start(&second)?);
    let uuid = "5b0e7a52-3c5b-4c83-8c0f-0d9f6c3f1a05";
    Machine::new("database").uuid(uuid).start(&here)?;
    there.define(qemu::URI, "lent", &Machine::new("lent").uuid(uuid).xml()?)?;
    let database = Witness::of_qemu(&first, "database")?;
    let socket = first.path("second.sock");
    let _proxy = Proxy::between(&first, &socket, &second)?;
    let uri = format!("qemu+unix:///system?socket={socket}");
    let site = Site::on(first, here, &[&uri, qemu::URI], &[])?;
    site.server.wait_domain("lent", "shut off")?;
    site.server.wait_domain("database", "running")?;
    for op in ["off", "reboot"] {
        site.expect(op, "lent", 1)?;
        ensure!(!database.is_dead()?, "{op}: another machine was killed: {}", site.server.log());
    }
    site.expect("off", "database", 0)?;
    site.expect("off", "lent", 0)
}
