//! A real guest fences another over a serial port of its own, with the stock client.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fence_lab::client::Client;
use fence_lab::initramfs;
use fence_lab::lab::Hypervisor;
use fence_lab::libvirtd::Libvirtd;
use fence_lab::process::poll_until;
use fence_lab::qemu::{self, LinuxGuest};
use fence_lab::server::{Config, Server, Which};
use fence_lab::witness::Witness;

use super::{KEY, expect, expect_listed};

/// The directory of the lines' sockets.
pub(crate) const LINES: &str = "/run/fence";
/// The guest's end of its line.
pub(crate) const DEVICE: &str = "/dev/ttyS2";
const GROUPS: &str = "groups { group { from = \"asker\"; uuid = \"victim\"; uuid = \"asker\"; } }\n";
/// How long the daemon may take until it hears a line that is there.
const HEARD_WITHIN: Duration = Duration::from_secs(60);

pub(crate) fn by_line(op: &str) -> Client {
    Client::new(op, initramfs::KEY).serial(DEVICE).timeout(20)
}

/// Waits until the daemon hears this many lines.
pub(crate) fn wait_lines(server: &Server, count: usize) -> Result<()> {
    let wanted = if count == 1 { "1 line".to_owned() } else { format!("{count} lines") };
    poll_until("the line to be heard", HEARD_WITHIN, || {
        let report = server.status()?.1;
        let listeners = report["listeners"].as_array().context("no listeners")?;
        let is_heard = |one: &serde_json::Value| {
            one["kind"] == "serial"
                && one["hears"] == true
                && one["status"].as_str().is_some_and(|status| status.split(';').next() == Some(wanted.as_str()))
        };
        Ok(listeners.iter().any(is_heard).then_some(()))
    })
    .with_context(|| {
        format!("{:?}; {}", server.status().map(|(_, report)| report["listeners"].to_string()), server.log())
    })
}

#[test]
fn a_guest_fences_another_over_its_serial_port() -> Result<()> {
    let hypervisor = Hypervisor::new()?;
    hypervisor.write_mode(&format!("{LINES}/readme"), b"the lines of guests", 0o644)?;
    let mut libvirtd = Libvirtd::start(&hypervisor)?;
    let key = hypervisor.write("fence.key", &KEY)?;
    let mut config = Config::new(&key);
    config.uris = vec![qemu::URI.to_owned()];
    config.serial = Some(vec![("path", LINES.to_owned())]);
    config.more = GROUPS.to_owned();
    let server = Server::start(&hypervisor, &Which::ours()?, &config)?;
    let socket = format!("{LINES}/asker");
    let mut asker = LinuxGuest::boot_with_line(&libvirtd, "asker", 1, &KEY, &socket)?;
    qemu::start_idle(&libvirtd, "victim")?;
    qemu::start_idle(&libvirtd, "other")?;
    let (own, victim) = (Witness::of_qemu(&hypervisor, "asker")?, Witness::of_qemu(&hypervisor, "victim")?);
    wait_lines(&server, 1)?;

    let list = asker.fence(&by_line("list"))?;
    expect(&list, 0, "list", &server)?;
    expect_listed(&list, "victim", "on")?;
    ensure!(!list.stdout.contains("other"), "the list shows what the groups do not: {}", list.stdout);
    expect(&asker.fence(&by_line("monitor"))?, 0, "monitor", &server)?;
    expect(&asker.fence(&by_line("off").domain("other"))?, 3, "off of a domain in no group", &server)?;
    // A program of the guest writes to the port as well, and breaks off in a request.
    asker.command(&format!("printf 'login: abba\\001\\000vic' > {DEVICE}"), HEARD_WITHIN)?;
    let position = server.log_position();
    expect(&asker.fence(&by_line("off").domain("victim"))?, 0, "off", &server)?;
    ensure!(victim.is_dead()?, "the client got a success and QEMU still lives");
    let line = server.next_fence(position)?;
    ensure!(line.get("via") == Some("serial"), "{}", server.log());
    libvirtd.wait_state(qemu::URI, "victim", "shut off")?;
    expect(&asker.fence(&by_line("status").domain("victim"))?, 2, "status of a guest that is off", &server)?;
    expect(&asker.fence(&by_line("on").domain("victim"))?, 0, "on", &server)?;

    // The line outlives libvirtd, and one that was made meanwhile is found.
    libvirtd.kill()?;
    expect(&asker.fence(&by_line("status").domain("victim"))?, 0, "status without libvirtd", &server)?;
    libvirtd.go_on(qemu::URI)?;
    let victim = Witness::of_qemu(&hypervisor, "victim")?;
    expect(&asker.fence(&by_line("reboot").domain("victim"))?, 0, "reboot", &server)?;
    ensure!(victim.is_dead()?, "the client got a success and the old QEMU still lives");
    victim.wait_next(&hypervisor, "victim")?;

    // It fences itself. Its own next start is heard again.
    ensure!(!own.is_dead()?, "the client's own guest was killed");
    let position = server.log_position();
    asker.command(&format!("fence_virt -D {DEVICE} -o reboot -H asker >/dev/null 2>&1 &"), HEARD_WITHIN)?;
    let line = server.next_fence(position)?;
    ensure!(line.get("reply") == Some("none"), "{line:?}");
    own.wait_next(&hypervisor, "asker")?;
    let mut asker = LinuxGuest::connect(&hypervisor, "asker")?;
    wait_lines(&server, 1)?;
    expect(&asker.fence(&by_line("status").domain("victim"))?, 0, "status after its own reboot", &server)?;
    Ok(())
}
