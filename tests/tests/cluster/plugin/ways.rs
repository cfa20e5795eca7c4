//! The ways in that the plugin can take beside multicast.

use anyhow::{Result, ensure};
use fence_lab::cluster::shell::Shell as _;
use fence_lab::lab::HYPERVISOR_V4;
use fence_lab::server::{Server, Which};

use super::{HOSTLIST, LIMIT, PLUGIN, PluginScene, URI, VICTIMS};

#[test]
fn the_plugin_fences_by_tcp() -> Result<()> {
    let mut scene = PluginScene::new()?;
    // Nothing gets in, so nothing can call back.
    let closed = "table inet t { chain c { type filter hook input priority 0; policy drop; \
                  ct state established,related accept; }; }";
    scene.node.must(&format!("nft '{closed}'"))?;
    let by_tcp = format!("{HOSTLIST} ipaddr={HYPERVISOR_V4}");
    let stonith = |scene: &PluginScene, arguments: &str| {
        let line = format!("stonith -t external/fence-xdp {by_tcp} {arguments}");
        // After these, the victim must be dead.
        let kills = arguments.contains("-T off") || arguments.contains("-T reset");
        if kills { scene.fence(VICTIMS[0], &line) } else { scene.run(&line) }
    };
    let succeeds = |scene: &PluginScene, arguments: &str, state: &str| {
        let done = stonith(scene, arguments)?;
        ensure!(done.code == Some(0), "{arguments}: {done:?}; the server: {}", scene.server.log());
        scene.libvirtd.wait_state(URI, VICTIMS[0], state)
    };
    succeeds(&scene, "-S", "running")?;
    let position = scene.server.log_position();
    succeeds(&scene, "-T off one", "shut off")?;
    ensure!(scene.server.next_fence(position)?.get("via") == Some("tcp"), "{}", scene.server.log());
    succeeds(&scene, "-T on one", "running")?;
    let running = scene.witness(VICTIMS[0])?;
    succeeds(&scene, "-T reset one", "running")?;
    ensure!(running.is_dead()?);

    // Nobody listens while the daemon is restarted. The plugin waits for it.
    scene.server.crash()?;
    let nobody = stonith(&scene, "timeout=3 -T off one")?;
    ensure!(nobody.code != Some(0) && nobody.stderr.contains("Unable to connect"), "{nobody:?}");
    let begin = format!("{by_tcp} {PLUGIN} off one > /tmp/said 2>&1; echo $? > /tmp/code");
    scene.node.must(&format!("rm -f /tmp/code; ({begin}) > /dev/null 2>&1 & sleep 1"))?;
    scene.server = Server::start(&scene.hypervisor, &Which::ours()?, &scene.config)?;
    let told = scene.node.run("until [ -s /tmp/code ]; do sleep 0.1; done; cat /tmp/said >&2; cat /tmp/code", LIMIT)?;
    ensure!(told.stdout == "0\n", "{told:?}: {}", scene.server.log());
    scene.libvirtd.wait_state(URI, VICTIMS[0], "shut off")
}

/// The client is a stand-in that says what it was called with: a test must not open a vsock.
#[test]
fn the_client_gets_each_way_as_it_understands_it() -> Result<()> {
    let scene = PluginScene::new()?;
    scene.node.write("/fake/fence_virt", b"#!/bin/sh\necho \"$*\" > /tmp/called\n", 0o755)?;
    for (parameters, expected) in [
        ("vsock=2", "-o off -t 30 -H web-one -S2 -p 1229 -k /etc/cluster/fence_xvm.key\n"),
        (
            "vsock=17 ipport=7 hash=sha512",
            "-o off -t 30 -H web-one -S17 -p 7 -c sha512 -k /etc/cluster/fence_xvm.key\n",
        ),
        // A key is of no use there.
        ("serial_device=/dev/null key_file=/nowhere", "-o off -t 30 -H web-one -D /dev/null\n"),
        ("ipaddr=fd00::1 timeout=9", "-o off -t 9 -H web-one -T fd00::1 -p 1229 -k /etc/cluster/fence_xvm.key\n"),
    ] {
        let done = scene.run(&format!("{HOSTLIST} {parameters} PATH=/fake:$PATH {PLUGIN} off one"))?;
        ensure!(done.code == Some(0), "{parameters}: {done:?}");
        let called = scene.node.must("cat /tmp/called")?;
        ensure!(called == expected, "{parameters}: {called} instead of {expected}");
    }
    Ok(())
}
