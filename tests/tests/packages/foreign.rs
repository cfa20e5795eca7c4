//! What the packages bring for other systems' tools: rpm and firewalld.

use anyhow::{Context, Result, ensure};
use fence_lab::cluster::image::Image;

use crate::host::package;
use crate::layer;

/// Debian's rpm installs the package into Debian's system, with a database of its own. That system
/// has no packages in this database, so dependencies do not count.
const INSTALL: &str = r#"
rpm() { command rpm --root "$root" --dbpath /var/lib/rpm-of-a-test "$@"; }
settings=$root/etc/fence_virt.conf
echo mine > "$settings"
rpm --install --nodeps "$package"
echo "verified: $(rpm --verify --nodeps fence-xdp)"
echo "settings: $(cat "$settings" | tr '\n' ' ')"
echo "started by: $(ls "$root/etc/systemd/system/multi-user.target.wants" | tr '\n' ' ')"
echo "others': $(rpm --query --queryformat '[%{FILEUSERNAME}:%{FILEGROUPNAME} %{FILENAMES}\n]' fence-xdp | grep -v '^root:root ' || true)"
echo "version: $(chroot "$root" fence_virtd -V)"
echo "units: $(ls "$root/usr/lib/systemd/system" | grep fence-daemon | tr '\n' ' ')"
echo broken > "$root/usr/lib/systemd/system/fence-daemon.socket"
echo "differs: $(rpm --verify --nodeps fence-xdp || true)"
# A later version: old and new scripts.
rpm --upgrade --force --nodeps "$package"
echo "repaired: $(rpm --verify --nodeps fence-xdp)"
rpm --erase --nodeps fence-xdp
echo "left: $(find "$root/usr" "$root/etc" -name '*fence-xdp*' -o -name '*fence-daemon*' | tr '\n' ' ')"
echo "settings at the end: $(cat "$settings")"
"#;

/// A line of what a script prints.
fn said<'a>(text: &'a str, name: &str) -> Result<&'a str> {
    let mut lines = text.lines().filter_map(|line| line.strip_prefix(name)?.strip_prefix(":"));
    lines.next().map(str::trim).with_context(|| format!("no line {name}: {text}"))
}

#[test]
fn rpm_installs_verifies_upgrades_and_removes() -> Result<()> {
    let text = layer::run(&Image::hypervisor("bookworm")?, &package("fence-xdp-0", ".rpm")?, INSTALL)?;
    ensure!(said(&text, "verified")?.is_empty() && said(&text, "repaired")?.is_empty(), "{text}");
    ensure!(said(&text, "differs")?.contains("/usr/lib/systemd/system/fence-daemon.socket"), "{text}");
    ensure!(said(&text, "settings")? == "mine" && said(&text, "settings at the end")? == "mine", "{text}");
    // What Debian's own preset says is done: start it at each boot.
    ensure!(said(&text, "started by")?.contains("fence-daemon.service"), "no script has run: {text}");
    ensure!(said(&text, "others'")?.is_empty(), "{text}");
    ensure!(said(&text, "version")?.contains("fence-daemon"), "{text}");
    ensure!(said(&text, "units")? == "fence-daemon.service fence-daemon.socket", "{text}");
    ensure!(said(&text, "left")?.is_empty(), "{text}");
    Ok(())
}

/// firewalld reads the services and opens their ports.
#[test]
fn firewalld_knows_the_services() -> Result<()> {
    const SCRIPT: &str = r#"
dpkg-deb --fsys-tarfile "$package" | tar -x -C "$root" --wildcards './usr/lib/firewalld/*'
for service in fence-xdp fence-xdp-guest; do
    chroot "$root" firewall-offline-cmd --info-service "$service" | sed -n "s/^ *ports/$service/p"
    chroot "$root" firewall-offline-cmd --zone public --add-service "$service" > /dev/null
done
echo "open: $(chroot "$root" firewall-offline-cmd --zone public --list-services)"
chroot "$root" firewall-offline-cmd --check-config
"#;
    let text = layer::run(&Image::get()?, &package("fence-xdp_", ".deb")?, SCRIPT)?;
    ensure!(said(&text, "fence-xdp")? == "1229/udp" && said(&text, "fence-xdp-guest")? == "1229/tcp", "{text}");
    let open = said(&text, "open")?;
    for service in ["fence-xdp", "fence-xdp-guest"] {
        ensure!(open.split_whitespace().any(|one| one == service), "{text}");
    }
    Ok(())
}
