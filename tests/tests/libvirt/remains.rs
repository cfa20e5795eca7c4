//! Orphaned processes of a domain that libvirt calls off or mistakes for something else. The host's
//! own processes are the proof.

use std::os::unix::fs::symlink;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use fence_lab::container;
use fence_lab::lab::Hypervisor;
use fence_lab::libvirtd::Libvirtd;
use fence_lab::machine::Machine;
use fence_lab::process::poll_until;
use fence_lab::qemu;
use fence_lab::witness::Witness;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::site::{SOON, Site};
use super::turns::Turn;

/// The number of processes that a machine has when another program starts its emulator.
const WITH_LAUNCHER: usize = 2;

/// Defines and starts a machine with this emulator.
fn start(site: &Site, name: &str, emulator: &str) -> Result<()> {
    let xml = Machine::new(name).xml()?.replace(&qemu::emulator()?, emulator);
    site.libvirtd.define(qemu::URI, name, &xml)?;
    site.libvirtd.start_domain(qemu::URI, name)
}

fn uuid(site: &Site, name: &str) -> Result<String> {
    Ok(site.libvirtd.virsh(qemu::URI, &["domuuid", name])?.stdout.trim().to_owned())
}

/// All processes of a machine, which must be `count`.
pub(crate) fn processes(site: &Site, name: &str, count: usize) -> Result<Vec<Witness>> {
    let uuid = uuid(site, name)?;
    poll_until(&format!("{count} processes of {name}"), SOON, || {
        let found = Witness::of_uuid(&uuid)?;
        Ok((found.len() == count).then_some(found))
    })
}

pub(crate) fn all_dead(processes: &[Witness], site: &Site) -> Result<()> {
    for process in processes {
        ensure!(process.is_dead()?, "FALSE SUCCESS: {}: {}", process.describe(), site.server.log());
    }
    Ok(())
}

/// A domain with a dead launcher is not off, and no copy is started beside its living emulator.
fn is_fenced_whole(site: &Site, name: &str) -> Result<()> {
    let before = processes(site, name, WITH_LAUNCHER)?;
    site.wait_status(name, 0)?;
    site.expect("off", name, 0)?;
    all_dead(&before, site)?;
    site.wait_status(name, 2)?;
    site.expect("on", name, 0)?;
    let before = processes(site, name, WITH_LAUNCHER)?;
    site.wait_status(name, 0)?;
    let position = site.server.log_position();
    site.expect("reboot", name, 0)?;
    all_dead(&before, site)?;
    site.logs(position, "started again after its reboot")?;
    processes(site, name, WITH_LAUNCHER).map(drop)
}

#[test]
fn a_script_around_the_emulator_is_fenced_with_it() -> Result<()> {
    let site = Site::new(&[qemu::URI], &[])?;
    let script = format!("#!/bin/sh\n{} \"$@\"\nexit\n", qemu::emulator()?);
    let script = site.hypervisor.write_mode("wrapper", script.as_bytes(), 0o755)?;
    start(&site, "wrapped", &script)?;
    is_fenced_whole(&site, "wrapped")
}

/// The launcher is a shell with an emulator's name, so the kernel reports that name for the
/// launcher too.
#[test]
fn a_launcher_that_is_called_like_an_emulator_is_fenced_with_it() -> Result<()> {
    let site = Site::new(&[qemu::URI], &[])?;
    let shell = std::fs::read("/bin/sh")?;
    let launcher = site.hypervisor.write_mode("qemu-launcher", &shell, 0o755)?;
    let script = format!("#!{launcher}\n{} \"$@\"\nexit\n", qemu::emulator()?);
    let script = site.hypervisor.write_mode("launch", script.as_bytes(), 0o755)?;
    start(&site, "launched", &script)?;
    is_fenced_whole(&site, "launched")
}

/// Also through libvirt: it ends the launcher, and calls the machine off.
#[test]
fn processes_left_by_libvirts_destroy_are_killed() -> Result<()> {
    let _turn = Turn::without_writes();
    let site = Site::new(&[qemu::URI], &[("kill", "libvirt")])?;
    // The emulator does not even get SIGTERM.
    let script = format!("#!/bin/sh\nsetsid {} \"$@\" &\nwait\nexit\n", qemu::emulator()?);
    let script = site.hypervisor.write_mode("wrapper", script.as_bytes(), 0o755)?;
    start(&site, "wrapped", &script)?;
    is_fenced_whole(&site, "wrapped")
}

/// Some distributions ship such an emulator. libvirt hangs, so only the kill by process remains.
#[test]
fn an_emulator_of_another_name_is_fenced_while_libvirtd_hangs() -> Result<()> {
    let mut site = Site::new(&[qemu::URI], &[])?;
    // The emulator finds its firmware and its modules relative to its own path.
    for directory in ["share", "lib"] {
        symlink(format!("/usr/{directory}"), site.hypervisor.outside(&site.hypervisor.path(directory)))?;
    }
    std::fs::create_dir_all(site.hypervisor.outside(&site.hypervisor.path("bin")))?;
    let program = std::fs::read(qemu::emulator()?)?;
    let emulator = site.hypervisor.write_mode("bin/.qemu-system-x86_64-wrapped", &program, 0o755)?;
    start(&site, "renamed", &emulator)?;
    site.wait_status("renamed", 0)?;
    let machine = site.machine("renamed")?;
    site.libvirtd.signal(Signal::SIGSTOP)?;
    site.off_directly("renamed")?;
    ensure!(machine.is_dead()?);
    site.libvirtd.go_on(qemu::URI)
}

/// Restarts libvirtd and the daemon without their records of this domain.
pub(crate) fn forget(mut site: Site, domain: &str, files: impl Fn(&Hypervisor) -> Result<()>) -> Result<Site> {
    site.server.crash()?;
    let Site { server, libvirtd, observer, config, hypervisor } = site;
    libvirtd.crash()?;
    files(&hypervisor)?;
    // The records of an earlier daemon would help.
    let _ = std::fs::remove_dir_all(hypervisor.outside("/run/fence-xdp"));
    let libvirtd = Libvirtd::start(&hypervisor)?;
    libvirtd.wait_state(qemu::URI, domain, "shut off")?;
    let mut site = Site { server, libvirtd, observer, config, hypervisor };
    site.next_daemon()?;
    Ok(site)
}

/// Removes libvirt's run files of a domain.
pub(crate) fn remove_run_files(hypervisor: &Hypervisor, domain: &str) -> Result<()> {
    for kind in ["xml", "pid"] {
        let file = hypervisor.outside(&format!("/run/libvirt/qemu/{domain}.{kind}"));
        std::fs::remove_file(&file).with_context(|| file.display().to_string())?;
    }
    Ok(())
}

#[test]
fn an_orphan_is_on_until_it_is_dead() -> Result<()> {
    let _turn = Turn::without_writes();
    let mut site = Site::new(&[qemu::URI], &[])?;
    for domain in ["forgotten", "on"] {
        qemu::start_idle(&site.libvirtd, domain)?;
        site.wait_status(domain, 0)?;
    }
    let (forgotten, on) = (processes(&site, "forgotten", 1)?, processes(&site, "on", 1)?);
    site = forget(site, "forgotten", |hypervisor| {
        remove_run_files(hypervisor, "forgotten")?;
        remove_run_files(hypervisor, "on")
    })?;
    site.expect("status", "forgotten", 0)?;
    let listed = site.observer.list()?;
    let line = listed.stdout.lines().find(|line| line.starts_with("forgotten ")).context("it is not listed")?;
    ensure!(line.trim_end().ends_with(" on"), "{line}");
    site.expect("on", "on", 1)?;
    processes(&site, "on", 1)?;
    site.expect("off", "forgotten", 0)?;
    all_dead(&forgotten, &site)?;
    site.wait_status("forgotten", 2)?;
    let position = site.server.log_position();
    site.expect("reboot", "on", 0)?;
    all_dead(&on, &site)?;
    site.logs(position, "started again after its reboot")
}

#[test]
fn both_running_instances_are_killed() -> Result<()> {
    let _turn = Turn::without_writes();
    let mut site = Site::new(&[qemu::URI], &[])?;
    qemu::start_idle(&site.libvirtd, "twice")?;
    site = forget(site, "twice", |hypervisor| remove_run_files(hypervisor, "twice"))?;
    site.libvirtd.start_domain(qemu::URI, "twice")?;
    let both = processes(&site, "twice", 2)?;
    site.wait_status("twice", 0)?;
    site.server.wait_domain("twice", "running")?;
    site.expect("off", "twice", 0)?;
    all_dead(&both, &site)
}

/// A transient domain has no definition left, so libvirt does not know it.
#[test]
fn a_lost_transient_machine_is_ended_by_off() -> Result<()> {
    let _turn = Turn::without_writes();
    let mut site = Site::new(&[qemu::URI], &[])?;
    for name in ["known", "unknown"] {
        Machine::new(name).create_transient(&site.libvirtd)?;
        site.wait_status(name, 0)?;
    }
    qemu::define_idle(&site.libvirtd, "other")?;
    let (known, unknown) = (processes(&site, "known", 1)?, processes(&site, "unknown", 1)?);
    let uuid = uuid(&site, "unknown")?;
    // The old daemon has seen one of them; the new one has seen none.
    let position = site.server.log_position();
    let Site { server, libvirtd, observer, config, hypervisor } = site;
    libvirtd.crash()?;
    remove_run_files(&hypervisor, "known")?;
    remove_run_files(&hypervisor, "unknown")?;
    let libvirtd = Libvirtd::start(&hypervisor)?;
    site = Site { server, libvirtd, observer, config, hypervisor };
    site.logs(position, "connected to libvirt")?;
    site.server.wait_domain("known", "lost")?;
    site.expect("status", "known", 0)?;
    site.expect("off", "known", 0)?;
    all_dead(&known, &site)?;

    site = forget(site, "other", |_| Ok(()))?;
    site.expect("status", "unknown", 0)?;
    ensure!(uuid.len() == 36);
    site.expect("off", "unknown", 0)?;
    all_dead(&unknown, &site)
}

/// The libvirtd that ran the domain has lost it. Another URI has it defined, answers first, and
/// calls it off.
#[test]
fn a_lost_machine_is_not_off_by_the_word_of_another_uri() -> Result<()> {
    let _turn = Turn::without_writes();
    let (first, second) = (Hypervisor::new()?, Hypervisor::new()?);
    let [_, address] = first.connect(&second)?;
    let config = "listen_tls = 0\nlisten_tcp = 1\nauth_tcp = \"none\"\n";
    let there = Libvirtd::start_with(&second, config, &["--listen"])?;
    let here = Libvirtd::start(&first)?;
    let machine = Machine::new("moved").uuid("5b0e7a52-3c5b-4c83-8c0f-0d9f6c3f1a02");
    machine.create_transient(&here)?;
    there.define(qemu::URI, "moved", &machine.xml()?)?;
    let lost = [Witness::of_qemu(&first, "moved")?];
    here.crash()?;
    remove_run_files(&first, "moved")?;
    let here = Libvirtd::start(&first)?;
    let uri = format!("qemu+tcp://{address}/system");
    let site = Site::on(first, here, &[&uri, qemu::URI], &[])?;
    let connected = poll_until("both URIs", SOON, || {
        Ok((site.server.log().matches("connected to libvirt").count() >= 2).then_some(()))
    });
    connected.with_context(|| site.server.log())?;

    site.expect("status", "moved", 0)?;
    site.expect("on", "moved", 1)?;
    ensure!(Witness::of_all(&second, "moved")?.is_empty(), "`on` has started a second copy: {}", site.server.log());
    ensure!(!lost[0].is_dead()?, "the test is wrong: the machine is dead");
    site.expect("off", "moved", 0)?;
    all_dead(&lost, &site)?;
    site.wait_status("moved", 2)?;
    site.expect("on", "moved", 0)?;
    there.wait_state(qemu::URI, "moved", "running")
}

/// Commands that an administrator may type during a fence.
#[test]
fn a_command_that_mentions_a_machine_is_not_killed_for_it() -> Result<()> {
    let site = Site::new(&[qemu::URI], &[])?;
    qemu::start_idle(&site.libvirtd, "mentioned")?;
    site.wait_status("mentioned", 0)?;
    let uuid = uuid(&site, "mentioned")?;
    let machine = site.machine("mentioned")?;
    let mut command = std::process::Command::new("sh");
    command.args(["-c", "sleep 600; exit", "sh", "-uuid", &uuid]);
    let mut mention = fence_lab::process::Process::start(site.hypervisor.space(), &mut command)?;
    let position = site.server.log_position();
    // The process may be the machine, so the daemon does not answer "off".
    site.expect("off", "mentioned", 1)?;
    ensure!(machine.is_dead()? && mention.is_running()?);
    site.logs(position, "may be its or not")?;
    ensure!(site.observer.fence("status", "mentioned")?.code == Some(1));
    mention.signal(Signal::SIGKILL)?;
    ensure!(mention.ends_within(SOON)?);
    site.expect("off", "mentioned", 0)
}

/// With libvirtd down nothing handles the controller's end, and the container's init lives on.
#[test]
fn a_container_without_its_controller_is_on_until_it_is_dead() -> Result<()> {
    let mut site = Site::new(&[container::URI], &[])?;
    for name in ["orphan", "started"] {
        container::start(&site.libvirtd, name)?;
        site.wait_status(name, 0)?;
    }
    let orphan = Witness::of_container(&site.hypervisor, "orphan")?;
    let started = Witness::of_container(&site.hypervisor, "started")?;
    site.server.crash()?;
    let Site { server, libvirtd, observer, config, hypervisor } = site;
    libvirtd.crash()?;
    for first in [&orphan, &started] {
        let controller = parent(first.pid)?;
        kill(Pid::from_raw(controller), Signal::SIGKILL)?;
        poll_until("the controller's end", SOON, || {
            Ok((!Path::new(&format!("/proc/{controller}")).exists()).then_some(()))
        })?;
    }
    let libvirtd = Libvirtd::start(&hypervisor)?;
    libvirtd.wait_state(container::URI, "orphan", "shut off")?;
    ensure!(
        !orphan.is_dead()? && !started.is_dead()?,
        "the container ended with its controller, so this case cannot occur here"
    );
    site = Site { server, libvirtd, observer, config, hypervisor };
    site.next_daemon()?;
    site.expect("status", "orphan", 0)?;
    site.expect("on", "started", 1)?;
    site.expect("off", "orphan", 0)?;
    ensure!(orphan.is_dead()?, "FALSE SUCCESS: {}", site.server.log());
    site.wait_status("orphan", 2)?;
    let position = site.server.log_position();
    site.expect("reboot", "started", 0)?;
    ensure!(started.is_dead()?);
    site.logs(position, "started again after its reboot")
}

/// A container can reboot itself: libvirt starts it again, and reports only a reboot.
#[test]
fn a_container_that_reboots_itself_is_followed() -> Result<()> {
    let site = Site::new(&[container::URI], &[])?;
    let init = "#!/bin/sh\ntrap '' TERM INT\nif [ -e /data/again ]; then while :; do /bin/busybox sleep 3600; done; fi\n\
                while [ ! -e /data/go ]; do /bin/busybox sleep 0.1; done\n\
                : > /data/again\n/bin/busybox reboot -f\nwhile :; do /bin/busybox sleep 3600; done\n";
    let data = site.hypervisor.path("shared");
    std::fs::create_dir_all(site.hypervisor.outside(&data))?;
    container::start_with(&site.libvirtd, "restless", init, Some(&data))?;
    site.wait_status("restless", 0)?;
    let before = Witness::of_container(&site.hypervisor, "restless")?;
    site.hypervisor.write("shared/go", b"")?;
    ensure!(before.dies_within(SOON)?, "it does not reboot");
    let after = poll_until("the next first process", SOON, || {
        Ok(Witness::of_container(&site.hypervisor, "restless").ok().filter(|after| after.pid != before.pid))
    })?;
    let known = poll_until("the daemon to know it", SOON, || {
        let domain = site.server.wait_domain("restless", "running")?;
        Ok(domain["pid"].as_i64())
    })?;
    ensure!(known > 1);
    site.wait_status("restless", 0)?;
    site.off_directly("restless")?;
    ensure!(after.is_dead()?);
    Ok(())
}

fn parent(pid: u32) -> Result<i32> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    Ok(status.lines().find_map(|line| line.strip_prefix("PPid:")).context("no parent")?.trim().parse()?)
}
