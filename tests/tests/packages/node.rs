//! The package for cluster nodes.

use anyhow::{Result, ensure};

use crate::host::{Debian, NODE, package};

#[test]
fn a_node_can_be_examined_from_inside() -> Result<()> {
    let debian = Debian::without_stock(NODE, "bookworm")?;
    for step in debian.steps()? {
        debian.step(&step)?;
    }
    ensure!(debian.is_installed("fence-xdp-node")?, "the page installs something else");
    // A guest has no libvirt.
    let depends = debian.must("dpkg-query --show --showformat='${Depends}' fence-xdp-node")?;
    ensure!(!depends.contains("libvirt") && depends.contains("libc6"), "{depends}");

    let asked = debian.run("fence-daemon doctor --from-guest")?;
    ensure!(asked.code == Some(1) && asked.stdout.contains("WRONG") && asked.stdout.contains("key"), "{asked:?}");
    let asked = debian.run("fence-daemon status")?;
    ensure!(asked.code == Some(255) && asked.stderr.contains("package fence-xdp"), "{asked:?}");
    let plugin = debian.must("stat --format=%a /usr/lib/stonith/plugins/external/fence-xdp")?;
    ensure!(plugin.trim() == "755", "{plugin}");

    // A host may be a node: its package has the same, and takes the place of this one.
    let host = debian.bring(&package("fence-xdp_", ".deb")?)?;
    debian.apt(&format!("install {host}"))?;
    ensure!(!debian.is_installed("fence-xdp-node")?, "both are installed");
    debian.wait_serving()?;
    debian.must("test -x /usr/lib/stonith/plugins/external/fence-xdp")?;
    Ok(())
}
