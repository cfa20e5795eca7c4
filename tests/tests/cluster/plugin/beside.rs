//! A site that keeps `external/libvirt`, and libvirtd's TCP port for it, can use fence-daemon for
//! the same containers.

use std::time::Duration;

use anyhow::{Result, ensure};
use fence_lab::container::URI;
use fence_lab::process::poll_until;

use super::{LIMIT, PluginScene, VICTIMS};

/// The configuration of the old guide.
const TCP: &str = "listen_tls = 0\nlisten_tcp = 1\nauth_tcp = \"none\"\n";
/// One of the two victims, by its own name.
const VICTIM: &str = VICTIMS[0];

impl PluginScene {
    fn by_libvirt(&self, operation: &str) -> String {
        format!(
            "stonith -t external/libvirt hostlist={VICTIM} hypervisor_uri=lxc+tcp://192.168.122.1/ -T {operation} {VICTIM}"
        )
    }

    fn by_daemon(&self, operation: &str) -> String {
        format!("fence_xvm -H {VICTIM} -o {operation}")
    }

    /// Waits until the daemon answers with this code.
    fn daemon_says(&self, code: i32) -> Result<()> {
        poll_until(&format!("status {code}"), LIMIT, || {
            Ok((self.run(&self.by_daemon("status"))?.code == Some(code)).then_some(()))
        })
    }

    /// The number of the victim's controllers in the lab.
    fn instances(&self) -> Result<usize> {
        let listed = self.hypervisor.space().must("ps", &["-eo", "args"])?.stdout;
        Ok(listed
            .lines()
            .filter(|line| line.contains("libvirt_lxc") && line.contains(&format!("--name {VICTIM} ")))
            .count())
    }

    fn succeeds_in(&self, script: &str) -> Result<()> {
        let done = self.fence(VICTIM, script)?;
        ensure!(done.code == Some(0), "{script}: {done:?}; the server: {}", self.server.log());
        Ok(())
    }
}

#[test]
fn external_libvirt_and_the_daemon_serve_the_same_containers() -> Result<()> {
    let scene = PluginScene::with_libvirtd(TCP, &["--listen"])?;
    let (off, reset) = (scene.by_libvirt("off"), scene.by_libvirt("reset"));

    // In turn: each sees the other's work.
    scene.succeeds_in(&off)?;
    ensure!(scene.run(&scene.by_daemon("status"))?.code == Some(2), "the daemon does not see the other's `off`");
    scene.succeeds_in(&scene.by_daemon("off"))?;
    ensure!(scene.run(&scene.by_daemon("on"))?.code == Some(0));
    scene.libvirtd.wait_state(URI, VICTIM, "running")?;
    scene.succeeds_in(&reset)?;
    scene.daemon_says(0)?;
    scene.succeeds_in(&scene.by_daemon("reboot"))?;
    scene.libvirtd.wait_state(URI, VICTIM, "running")?;
    scene.succeeds_in(&reset)?;
    // The new instance, killed by its own process.
    scene.daemon_says(0)?;
    scene.succeeds_in(&scene.by_daemon("off"))?;
    scene.succeeds_in(&off)?;
    ensure!(scene.run(&scene.by_libvirt("on"))?.code == Some(0));
    scene.daemon_says(0)?;

    // At the same time: after a success the instance at the time of the request is dead. There are
    // never two instances.
    for (theirs, ours) in [("reset", "reboot"), ("off", "off")] {
        let script = format!(
            "{} & theirs=$!; {}; ours=$?; wait $theirs && [ $ours -eq 0 ]",
            scene.by_libvirt(theirs),
            scene.by_daemon(ours)
        );
        let done = scene.fence(VICTIM, &script)?;
        let most = poll_until("no more than one", Duration::from_secs(1), || Ok(Some(scene.instances()?)))?;
        ensure!(most <= 1, "{theirs} and {ours}: {most} instances; {done:?}");
        ensure!(scene.run(&scene.by_daemon("on"))?.code == Some(0), "{}", scene.server.log());
        poll_until("it to run, once", LIMIT, || {
            let runs = scene.state(VICTIM)? == "running" && scene.instances()? == 1;
            Ok(runs.then_some(()))
        })?;
        scene.daemon_says(0)?;
    }
    Ok(())
}
