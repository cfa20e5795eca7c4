//! A Pacemaker cluster of QEMU guests that fences by their serial ports alone, with the device of
//! `docs/guide/ways-in.md`.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use fence_lab::cluster::corosync::Member;
use fence_lab::cluster::shell::{self, Shell as _};
use fence_lab::guide::{Act, Guide, compare};
use fence_lab::lab::Hypervisor;
use fence_lab::libvirtd::Libvirtd;
use fence_lab::process::poll_until;
use fence_lab::qemu::URI;
use fence_lab::server::{Config, Server, Which};
use fence_lab::timings::Fence;
use fence_lab::witness::Witness;

use crate::guests::{Guests, Plan};
use crate::guides::{LINE_NODE, PLACES, WAYS_IN};

const KEY: [u8; 64] = [0x3d; 64];
const LINES: &str = "/run/fence";
const GROUPS: &str = "groups { group { from = \"web1\"; from = \"web2\"; uuid = \"web1\"; uuid = \"web2\"; } }\n";
/// How long a command in an emulated guest, or a fence, may take on a loaded machine.
const LIMIT: Duration = Duration::from_secs(240);

/// Waits until the victim was killed by a request over the other one's line, and by nothing else.
fn fenced_by_line(server: &Server, position: usize, machine: &Witness) -> Result<()> {
    poll_until("the node to be fenced", LIMIT, || Ok(machine.is_dead()?.then_some(())))
        .with_context(|| server.log())?;
    let killed = |line: &str| {
        Fence::parse(line).filter(|fence| fence.get("op") == Some("reboot") && fence.get("reply") == Some("success"))
    };
    let fence = server.wait_log(position, LIMIT, killed).with_context(|| server.log())?;
    let told = [fence.get("domain"), fence.get("via")];
    ensure!(told == [Some("web2"), Some("serial")], "{fence:?}: {}", server.log());
    Ok(())
}

#[test]
fn pacemaker_fences_by_serial_ports() -> Result<()> {
    let hypervisor = Hypervisor::new()?;
    let libvirtd = Libvirtd::start(&hypervisor)?;
    hypervisor.write_mode(&format!("{LINES}/readme"), b"the lines of guests", 0o644)?;
    let mut config = Config::new(&hypervisor.write("fence.key", &KEY)?);
    config.uris = vec![URI.to_owned()];
    config.serial = Some(vec![("path", LINES.to_owned())]);
    config.more = GROUPS.to_owned();
    let server = Server::start(&hypervisor, &Which::ours()?, &config)?;
    let members = [Member::new(LINE_NODE, 41, "web1"), Member::new("delta", 42, "web2")];
    let plan = Plan { members, lines: Some(LINES.to_owned()) };
    // Another key than the daemon's: nothing but a line can be answered.
    let guests = Guests::boot_as(&libvirtd, b"another key, which the daemon does not have", &plan)?;
    guests.wait_online()?;

    let [gamma, delta] = &guests.nodes;
    let (position, machine) = (server.log_position(), delta.machine()?);
    let guide = Guide::read(WAYS_IN, &PLACES)?;
    let typed = guide.steps.iter().filter(|step| step.host == LINE_NODE);
    ensure!(typed.clone().count() > 0, "{WAYS_IN} has nothing for {LINE_NODE}");
    for step in typed {
        let Act::Type(typed) = &step.act else { bail!("line {}: a file of a guest in memory", step.line) };
        let done = gamma.run(&format!("{{ {}; }} 2>&1", typed.command), LIMIT)?;
        let context = || format!("{}: {done:?}\nthe server: {}\n{}", typed.command, server.log(), guests.logs());
        ensure!(done.code == Some(0), "{}", context());
        compare(&typed.shown, &done.stdout).with_context(context)?;
    }
    // The page has the second node fenced by hand.
    fenced_by_line(&server, position, &machine)?;
    delta.wait_up()?;
    guests.wait_online()?;

    // And the cluster fences a node that has failed.
    shell::settle(gamma)?;
    let (position, machine) = (server.log_position(), delta.machine()?);
    delta.must("kill -STOP $(pidof corosync)")?;
    fenced_by_line(&server, position, &machine).with_context(|| guests.logs())
}
