//! The example role for Ansible, on a host that has never had a fencing daemon.

use anyhow::{Result, ensure};
use fence_lab::cluster::lab::KEY;

use crate::host::{CONFIG, Debian, HYPERVISOR, package};

const PLAY: &str = "LC_ALL=C.UTF-8 ansible-playbook --inventory /srv/inventory /srv/ansible/hypervisors.yml";

/// What Ansible counts for the host, such as `changed=0`.
fn counts(recap: &str, word: &str) -> bool {
    recap.lines().any(|line| line.starts_with(HYPERVISOR) && line.split_whitespace().any(|said| said == word))
}

#[test]
fn the_role_installs_a_host_and_then_has_nothing_to_do() -> Result<()> {
    let debian = Debian::without_stock(HYPERVISOR, "bookworm")?;
    debian.write_tree("dist/ansible", "/srv/ansible")?;
    debian.write("/srv/fence_xvm.key", &KEY)?;
    let deb = debian.bring(&package("fence-xdp_", ".deb")?)?;
    let inventory = format!(
        "[hypervisors]\n{HYPERVISOR} ansible_connection=local ansible_become=false\n[hypervisors:vars]\n\
         fence_xdp_package={deb}\nfence_xdp_key=/srv/fence_xvm.key\n"
    );
    debian.write("/srv/inventory", inventory.as_bytes())?;
    let said = debian.must(PLAY)?;
    ensure!(counts(&said, "failed=0"), "{said}");
    debian.fences()?;

    let process = debian.must("systemctl show --value --property=MainPID fence-daemon")?;
    let said = debian.must(PLAY)?;
    ensure!(counts(&said, "changed=0") && counts(&said, "failed=0"), "{said}");
    // A setting that takes a restart, and gets one.
    let said =
        debian.must(&format!("{PLAY} --extra-vars '{{\"fence_xdp_listener_settings\": {{\"attach\": \"off\"}}}}'"))?;
    ensure!(counts(&said, "failed=0"), "{said}");
    ensure!(debian.must("systemctl show --value --property=MainPID fence-daemon")? != process, "no restart");
    debian.fences()?;

    // A mistake is refused before the file is there.
    let before = debian.must(&format!("sha256sum {CONFIG}"))?;
    let wrong =
        debian.run(&format!("{PLAY} --extra-vars '{{\"fence_xdp_listener_settings\": {{\"hash\": \"md4\"}}}}'"))?;
    ensure!(wrong.code != Some(0) && wrong.stdout.contains("md4"), "{wrong:?}");
    ensure!(debian.must(&format!("sha256sum {CONFIG}"))? == before, "a mistake was written");
    debian.fences()
}
