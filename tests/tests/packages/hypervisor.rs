//! The package for hypervisors, over a configured fence_virtd and on a system without it.

use anyhow::{Result, ensure};

use crate::host::{CONFIG, Debian, HYPERVISOR, package};

/// From fence_virtd to fence-xdp and back, as the page has it. Configuration and key are the same
/// all the way.
fn there_and_back(suite: &str) -> Result<()> {
    let debian = Debian::with_stock(suite)?;
    debian.wait_answer()?;
    let settings = debian.settings()?;
    for step in debian.steps()? {
        debian.step(&step)?;
        ensure!(debian.settings()? == settings, "the settings of fence_virtd have changed");
        if step.types("fence-daemon status") {
            is_in_place_of_fence_virtd(&debian)?;
            is_upgraded(&debian)?;
        }
        if step.types("apt-get remove -y fence-xdp") {
            leaves_nothing(&debian)?;
            ensure!(debian.settings()? == settings, "a purge removes what it has not made");
        }
    }
    ensure!(debian.is_installed("fence-virtd")? && !debian.is_installed("fence-xdp")?, "the page leads elsewhere");
    debian.wait_answer()
}

fn is_in_place_of_fence_virtd(debian: &Debian) -> Result<()> {
    ensure!(!debian.is_installed("fence-virtd")? && debian.is_installed("fence-xdp")?);
    ensure!(!debian.is_active("fence_virtd")?, "both run");
    debian.must("systemctl is-enabled fence-daemon")?;
    ensure!(debian.run("systemctl is-enabled fence-daemon.socket")?.code != Some(0), "nobody asked for the socket");
    let differs = debian.must("dpkg --verify fence-xdp")?;
    ensure!(differs.is_empty(), "not as packed: {differs}");
    ensure!(debian.must("fence_virtd -V")?.contains("fence-daemon"), "the old name is not ours");
    debian.fences()?;
    debian.must("systemctl reload fence-daemon")?;
    debian.fences()
}

/// An upgrade to another version runs the same scripts.
fn is_upgraded(debian: &Debian) -> Result<()> {
    const PROCESS: &str = "systemctl show --value --property=MainPID fence-daemon";
    debian.must("echo 'FENCE_VIRTD_ARGS=\"-w -d9\"' > /etc/default/fence_virtd")?;
    let before = debian.must(PROCESS)?;
    let told = debian.apt(&format!("install --reinstall {}", debian.bring(&package("fence-xdp_", ".deb")?)?))?;
    ensure!(told.contains("FENCE_VIRTD_ARGS=-w -d9"), "nothing about flags that nobody reads: {told}");
    debian.wait_serving()?;
    ensure!(debian.must(PROCESS)? != before, "still the old daemon");
    debian.fences()
}

/// Nothing is left after a removal and a purge.
fn leaves_nothing(debian: &Debian) -> Result<()> {
    ensure!(!debian.is_active("fence-daemon")?, "it still runs");
    for program in ["/usr/sbin/fence-daemon", "/usr/sbin/fence_virtd"] {
        ensure!(!debian.has(program), "{program} is left");
    }
    debian.apt("purge fence-xdp")?;
    let places = "/etc /usr/bin /usr/lib /usr/libexec /usr/sbin /usr/share /var/lib";
    let names = r"\( -name '*fence-xdp*' -o -name '*fence-daemon*' \)";
    let left = debian.run(&format!("find {places} -xdev {names}"))?.stdout;
    ensure!(left.is_empty() && !debian.has("/run/fence-xdp"), "left after a purge: {left}");
    Ok(())
}

#[test]
fn debian_12_from_fence_virtd_and_back() -> Result<()> {
    there_and_back("bookworm")
}

#[test]
fn debian_13_from_fence_virtd_and_back() -> Result<()> {
    there_and_back("trixie")
}

/// The package makes a configuration and a key, serves, and takes both along when it is purged.
#[test]
fn a_system_without_fence_virtd_gets_a_configuration() -> Result<()> {
    const KEY: &str = "/etc/cluster/fence_xvm.key";
    let debian = Debian::without_stock(HYPERVISOR, "bookworm")?;
    let deb = debian.bring(&package("fence-xdp_", ".deb")?)?;
    debian.apt(&format!("install {deb}"))?;
    debian.wait_serving()?;
    ensure!(debian.must(&format!("stat --format=%a:%s {KEY}"))?.trim() == "600:4096");
    debian.must("fence-daemon check-config")?;

    // Nothing that is there is made again.
    let made = debian.must(&format!("sha256sum {CONFIG} {KEY}"))?;
    debian.apt(&format!("install --reinstall {deb}"))?;
    debian.apt("remove fence-xdp")?;
    ensure!(debian.must(&format!("sha256sum {CONFIG} {KEY}"))? == made, "another configuration or key");
    debian.apt("purge fence-xdp")?;
    ensure!(!debian.has(CONFIG) && !debian.has(KEY), "what the package made is left");
    Ok(())
}
