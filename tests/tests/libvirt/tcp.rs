//! A real guest that nothing can reach from outside fences another by tcp.

use std::time::Duration;

use anyhow::{Result, ensure};
use fence_lab::client::Client;
use fence_lab::initramfs;
use fence_lab::lab::{HYPERVISOR_V4, Hypervisor};
use fence_lab::libvirtd::Libvirtd;
use fence_lab::qemu::{self, Extras, LinuxGuest};
use fence_lab::server::{Config, Server, Which};
use fence_lab::witness::Witness;

use super::{KEY, expect, expect_listed};

/// Lets answers in, and nothing else.
const CLOSED: &str = "nft 'table inet wall { chain input { type filter hook input priority 0; policy drop; \
                      ct state established,related accept; }; }'";
/// How long a command in the guest may take on a loaded machine.
const LIMIT: Duration = Duration::from_secs(60);

#[test]
fn a_guest_that_lets_nothing_in_fences_another_by_tcp() -> Result<()> {
    let hypervisor = Hypervisor::new()?;
    let libvirtd = Libvirtd::start(&hypervisor)?;
    let key = hypervisor.write("fence.key", &KEY)?;
    let mut config = Config::new(&key);
    config.uris = vec![qemu::URI.to_owned()];
    config.tcp = Some(vec![("address", HYPERVISOR_V4.to_string())]);
    let server = Server::start(&hypervisor, &Which::ours()?, &config)?;
    let system = initramfs::SystemExtras { firewall: true, ..initramfs::SystemExtras::default() };
    let mut asker = LinuxGuest::boot_with(&libvirtd, "asker", 1, &KEY, &Extras { system, ..Extras::default() })?;
    qemu::start_idle(&libvirtd, "victim")?;
    let (bystander, victim) = (Witness::of_qemu(&hypervisor, "asker")?, Witness::of_qemu(&hypervisor, "victim")?);
    let by_multicast = || Client::new("status", initramfs::KEY).domain("victim");
    let by_tcp = |op| Client::new(op, initramfs::KEY).tcp(&HYPERVISOR_V4.to_string());

    expect(&asker.fence(&by_multicast())?, 0, "by multicast, without a firewall", &server)?;
    let closed = asker.command(CLOSED, LIMIT)?;
    ensure!(closed.code == Some(0), "{closed:?}");
    // Multicast needs a callback, so this shows that the wall stands.
    let called_back = asker.fence(&by_multicast().timeout(6))?;
    ensure!(called_back.code != Some(0), "a callback came through the firewall: {called_back:?}; {}", server.log());

    let list = asker.fence(&by_tcp("list"))?;
    expect(&list, 0, "list", &server)?;
    expect_listed(&list, "victim", "on")?;
    expect(&asker.fence(&by_tcp("status").domain("victim"))?, 0, "status", &server)?;
    let position = server.log_position();
    expect(&asker.fence(&by_tcp("off").domain("victim"))?, 0, "off", &server)?;
    ensure!(victim.is_dead()?, "the client got a success and QEMU still lives");
    ensure!(server.next_fence(position)?.get("via") == Some("tcp"), "{}", server.log());
    libvirtd.wait_state(qemu::URI, "victim", "shut off")?;
    expect(&asker.fence(&by_tcp("status").domain("victim"))?, 2, "status of a guest that is off", &server)?;
    expect(&asker.fence(&by_tcp("on").domain("victim"))?, 0, "on", &server)?;
    let victim = Witness::of_qemu(&hypervisor, "victim")?;
    expect(&asker.fence(&by_tcp("reboot").domain("victim"))?, 0, "reboot", &server)?;
    ensure!(victim.is_dead()?, "the client got a success and the old QEMU still lives");
    victim.wait_next(&hypervisor, "victim")?;
    ensure!(!bystander.is_dead()?, "the client's own guest was killed");
    Ok(())
}
