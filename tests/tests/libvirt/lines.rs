//! A real guest's line through what happens to guests and to libvirtd: a reset, a daemon that
//! starts while libvirtd is down, a migration. And a line of mode `vmchannel`.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fence_lab::client::Client;
use fence_lab::initramfs::{self, PLUGIN};
use fence_lab::lab::Hypervisor;
use fence_lab::libvirtd::Libvirtd;
use fence_lab::process::poll_until;
use fence_lab::qemu::{self, Extras, LinuxGuest};
use fence_lab::server::{Config, Server, Which};
use fence_lab::tools;
use fence_lab::witness::Witness;

use super::migration::{ended, hosts_with};
use super::serial::{DEVICE, LINES, by_line, wait_lines};
use super::{KEY, expect};

const GROUPS: &str = "groups { group { from = \"asker\"; uuid = \"victim\"; uuid = \"there\"; uuid = \"asker\"; } }\n";
/// How long a command in the guest may take on a loaded machine.
const LIMIT: Duration = Duration::from_secs(60);

/// A configuration with the serial listener, in this mode.
fn config(hypervisor: &Hypervisor, mode: &str) -> Result<Config> {
    hypervisor.write_mode(&format!("{LINES}/readme"), b"the lines of guests", 0o644)?;
    let mut config = Config::new(&hypervisor.write("fence.key", &KEY)?);
    config.uris = vec![qemu::URI.to_owned()];
    config.serial = Some(vec![("path", LINES.to_owned()), ("mode", mode.to_owned())]);
    config.more = GROUPS.to_owned();
    Ok(config)
}

fn status(domain: &str) -> Client {
    by_line("status").domain(domain)
}

#[test]
fn a_line_is_heard_after_a_reset_and_by_a_daemon_that_comes_before_libvirtd() -> Result<()> {
    let hypervisor = Hypervisor::new()?;
    let mut libvirtd = Libvirtd::start(&hypervisor)?;
    let config = config(&hypervisor, "serial")?;
    let mut server = Server::start(&hypervisor, &Which::ours()?, &config)?;
    let plugin = std::fs::read(tools::workspace().join("dist/stonith/external/fence-xdp"))?;
    let port = format!("<serial type='unix'><source mode='bind' path='{LINES}/asker'/><target port='2'/></serial>");
    let system = initramfs::SystemExtras { plugin: Some(&plugin), ..initramfs::SystemExtras::default() };
    let extras = Extras { devices: &port, system, ..Extras::default() };
    let mut asker = LinuxGuest::boot_with(&libvirtd, "asker", 1, &KEY, &extras)?;
    qemu::start_idle(&libvirtd, "victim")?;
    wait_lines(&server, 1)?;
    expect(&asker.fence(&status("victim"))?, 0, "status", &server)?;

    // A reset in the middle of a request. The QEMU stays, and the line with it.
    let process = Witness::of_qemu(&hypervisor, "asker")?;
    asker.command(&format!("printf 'abba\\002\\000vic' > {DEVICE}"), LIMIT)?;
    // QEMU serves one client of its console.
    drop(asker);
    libvirtd.virsh(qemu::URI, &["reset", "asker"])?;
    let mut asker = LinuxGuest::connect(&hypervisor, "asker")?;
    ensure!(!process.is_dead()?, "the reset has replaced the machine");
    expect(&asker.fence(&status("victim"))?, 0, "status after a reset", &server)?;

    // The plugin, in front of the real listener. Two at once take turns.
    let stonith = |action: &str| format!("hostlist='beta:victim' serial_device={DEVICE} timeout=20 {PLUGIN} {action}");
    let victim = Witness::of_qemu(&hypervisor, "victim")?;
    let (status_said, position) = (asker.command(&stonith("status"), LIMIT)?, server.log_position());
    expect(&status_said, 0, "status by the plugin", &server)?;
    expect(&asker.command(&stonith("off beta"), LIMIT)?, 0, "off by the plugin", &server)?;
    ensure!(victim.is_dead()?, "the plugin got a success and QEMU still lives");
    ensure!(server.next_fence(position)?.get("via") == Some("serial"), "{}", server.log());
    libvirtd.wait_state(qemu::URI, "victim", "shut off")?;
    expect(&asker.command(&stonith("on beta"), LIMIT)?, 0, "on by the plugin", &server)?;
    let both =
        format!("{} & first=$!; {}; second=$?; wait $first && exit $second", stonith("status"), stonith("status"));
    expect(&asker.command(&both, LIMIT)?, 0, "two plugins at once", &server)?;
    let stranger = stonith("off beta").replace("beta:victim", "beta:nobody");
    expect(&asker.command(&stranger, LIMIT)?, 1, "off of nobody", &server)?;

    // A daemon that starts without libvirtd knows of no line. It hears them when libvirtd is back.
    server.crash()?;
    libvirtd.kill()?;
    let server = Server::start(&hypervisor, &Which::ours()?, &config)?;
    let unheard = asker.fence(&status("victim").timeout(4))?;
    ensure!(unheard.code != Some(0), "an answer from a daemon that knows no line: {unheard:?}");
    libvirtd.go_on(qemu::URI)?;
    wait_lines(&server, 1)?;
    expect(&asker.fence(&status("victim"))?, 0, "status once libvirtd is back", &server)?;
    let victim = Witness::of_qemu(&hypervisor, "victim")?;
    expect(&asker.fence(&by_line("off").domain("victim"))?, 0, "off once libvirtd is back", &server)?;
    ensure!(victim.is_dead()?, "the client got a success and QEMU still lives");
    Ok(())
}

#[test]
fn a_line_is_heard_where_its_domain_has_moved_to() -> Result<()> {
    let [mut here, mut there] = hosts_with(&Which::ours()?)?;
    for host in [&mut here, &mut there] {
        host.site.config = config(&host.site.hypervisor, "serial")?;
        host.site.server.crash()?;
        host.site.next_daemon()?;
    }
    let mut asker = LinuxGuest::boot_with_line(&here.site.libvirtd, "asker", 1, &KEY, &format!("{LINES}/asker"))?;
    qemu::start_idle(&here.site.libvirtd, "victim")?;
    qemu::start_idle(&there.site.libvirtd, "there")?;
    wait_lines(&here.site.server, 1)?;
    expect(&asker.fence(&status("victim"))?, 0, "status before the migration", &here.site.server)?;

    // What its QEMU reads at the start, the other one reads too.
    let initrd = std::fs::read(here.site.hypervisor.outside(&here.site.hypervisor.path("asker.initrd")))?;
    there.site.hypervisor.write("asker.initrd", &initrd)?;
    drop(asker);
    let moved = ended(here.migrate(&there, "asker", &["--unsafe"])?)?;
    ensure!(moved.code == Some(0), "the migration has failed: {moved:?}");
    wait_lines(&there.site.server, 1)?;
    poll_until("the line to be gone here", LIMIT, || {
        let report = here.site.server.status()?.1["listeners"].to_string();
        Ok((!report.contains("1 line")).then_some(()))
    })
    .with_context(|| here.site.server.log())?;
    let mut asker = LinuxGuest::connect(&there.site.hypervisor, "asker")?;
    let (left, victim) = (here.site.machine("victim")?, there.site.machine("there")?);
    let position = there.site.server.log_position();
    expect(&asker.fence(&status("there"))?, 0, "status on the new host", &there.site.server)?;
    ensure!(there.site.server.next_fence(position)?.get("via") == Some("serial"), "{}", there.site.server.log());
    expect(&asker.fence(&by_line("off").domain("there"))?, 0, "off on the new host", &there.site.server)?;
    ensure!(victim.is_dead()?, "the client got a success and QEMU still lives");
    // The new host does not know what runs on the old one.
    let unknown = asker.fence(&by_line("off").domain("victim"))?;
    ensure!(unknown.code != Some(0) && !left.is_dead()?, "{unknown:?}: {}", there.site.server.log());
    Ok(())
}

/// libvirt makes no network card for the channel, so the domain's XML adds one for QEMU alone.
#[test]
fn a_guest_fences_another_over_vmchannel() -> Result<()> {
    let hypervisor = Hypervisor::new()?;
    let libvirtd = Libvirtd::start(&hypervisor)?;
    let server = Server::start(&hypervisor, &Which::ours()?, &config(&hypervisor, "vmchannel")?)?;
    let channel = format!(
        "<channel type='unix'><source mode='bind' path='{LINES}/asker'/>\
         <target type='guestfwd' address='10.0.2.179' port='1229'/></channel>\
         <serial type='unix'><source mode='bind' path='{LINES}/port'/><target port='2'/></serial>"
    );
    let card = ["-device", "virtio-net-pci,netdev=channel0,addr=0x10,romfile=,mac=52:54:00:00:07:01"];
    let extras = Extras { devices: &channel, arguments: &card, ..Extras::default() };
    let mut asker = LinuxGuest::boot_with(&libvirtd, "asker", 1, &KEY, &extras)?;
    qemu::start_idle(&libvirtd, "victim")?;
    qemu::start_idle(&libvirtd, "other")?;
    let up = asker.command("ip link set eth1 up && ip addr add 10.0.2.15/24 dev eth1", LIMIT)?;
    ensure!(up.code == Some(0), "{up:?}");
    // The channel alone: the serial port is not of this mode.
    wait_lines(&server, 1)?;
    let ask = |asker: &mut LinuxGuest, asked: &str| asker.command(&format!("fence_virt -t 20 -o {asked}"), LIMIT);
    expect(&ask(&mut asker, "monitor")?, 0, "monitor", &server)?;
    let list = ask(&mut asker, "list")?;
    expect(&list, 0, "list", &server)?;
    ensure!(list.stdout.contains("victim") && !list.stdout.contains("other"), "{list:?}");
    expect(&ask(&mut asker, "off -H other")?, 3, "off of a domain in no group", &server)?;
    let (victim, position) = (Witness::of_qemu(&hypervisor, "victim")?, server.log_position());
    expect(&ask(&mut asker, "off -H victim")?, 0, "off", &server)?;
    ensure!(victim.is_dead()?, "the client got a success and QEMU still lives");
    ensure!(
        server.next_fence(position)?.get("source").is_some_and(|source| source.starts_with("asker")),
        "{}",
        server.log()
    );
    libvirtd.wait_state(qemu::URI, "victim", "shut off")?;
    expect(&ask(&mut asker, "status -H victim")?, 2, "status of a guest that is off", &server)?;
    expect(&ask(&mut asker, "on -H victim")?, 0, "on", &server)?;
    Ok(())
}
