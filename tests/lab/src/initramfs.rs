//! The Linux system of QEMU guests: Debian's cloud kernel, and a busybox initramfs with the stock
//! client.
//!
//! The initramfs has the host's own busybox and stock client (`fence_xvm` and `fence_virt`), so
//! it is what Debian ships.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::archive::{self, Archive};
use crate::debian::Kernel;
use crate::tools;

/// The modules of a virtio network card, in loading order, relative to the modules' `kernel`
/// directory.
pub const MODULES: [&str; 8] = [
    "drivers/virtio/virtio_ring.ko",
    "drivers/virtio/virtio.ko",
    "drivers/virtio/virtio_pci_modern_dev.ko",
    "drivers/virtio/virtio_pci_legacy_dev.ko",
    "drivers/virtio/virtio_pci.ko",
    "net/core/failover.ko",
    "drivers/net/net_failover.ko",
    "drivers/net/virtio_net.ko",
];
/// The modules of a firewall that knows connections, in loading order.
const FIREWALL: [&str; 7] = [
    "lib/libcrc32c.ko",
    "net/netfilter/nfnetlink.ko",
    "net/ipv4/netfilter/nf_defrag_ipv4.ko",
    "net/ipv6/netfilter/nf_defrag_ipv6.ko",
    "net/netfilter/nf_conntrack.ko",
    "net/netfilter/nf_tables.ko",
    "net/netfilter/nft_ct.ko",
];
/// Libraries that NSS (the client's cryptography) loads at run time, which `ldd` does not list. The
/// `.chk` files are its signatures of itself.
const NSS: [&str; 6] =
    ["libsoftokn3.so", "libsoftokn3.chk", "libfreebl3.so", "libfreebl3.chk", "libfreeblpriv3.so", "libfreeblpriv3.chk"];
/// Where the guest finds its key.
pub const KEY: &str = "/etc/cluster/fence_xvm.key";

/// The properties of a guest.
#[derive(Clone, Debug)]
pub struct System<'a> {
    /// IPv4 address of its `eth0`.
    pub address: Ipv4Addr,
    /// The key for the client, at [`KEY`].
    pub key: &'a [u8],
    /// The number of the serial port that its commands come by.
    pub console: u8,
    /// More that it has.
    pub extras: SystemExtras<'a>,
}

/// What only some guests have.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemExtras<'a> {
    /// Whether it has `nft`, and a kernel with what that needs.
    pub firewall: bool,
    /// A script at [`PLUGIN`], and `flock`, which busybox has without a time limit.
    pub plugin: Option<&'a [u8]>,
}

/// Where the guest has the plugin.
pub const PLUGIN: &str = "/usr/lib/stonith/plugins/external/fence-xdp";

/// Builds an initramfs.
pub fn build(kernel: &Kernel, system: &System<'_>) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    let mut modules = archive.modules(kernel, &MODULES)?;
    archive.file(KEY, 0o600, system.key);
    archive.copy(&tools::find("busybox")?, "/bin/busybox", 0o755)?;
    let client = tools::find("fence_virt")?;
    archive.copy(&client, "/usr/sbin/fence_virt", 0o755)?;
    archive.link("/usr/sbin/fence_xvm", "fence_virt");
    let mut libraries = archive::libraries(&client)?;
    libraries.extend(nss(&libraries)?);
    if let Some(plugin) = system.extras.plugin {
        archive.file(PLUGIN, 0o755, plugin);
        let flock = tools::find("flock")?;
        archive.copy(&flock, "/usr/sbin/flock", 0o755)?;
        libraries.extend(archive::libraries(&flock)?);
    }
    if system.extras.firewall {
        modules.extend(archive.modules(kernel, &FIREWALL)?);
        let nft = tools::find("nft")?;
        archive.copy(&nft, "/usr/sbin/nft", 0o755)?;
        libraries.extend(archive::libraries(&nft)?);
    }
    archive.file("init", 0o755, init(system.address, system.console, &modules).as_bytes());
    for library in libraries {
        archive.copy(&library, &library.to_string_lossy(), 0o755)?;
    }
    archive.directory("proc");
    archive.directory("sys");
    archive.directory("dev");
    archive.directory("tmp");
    archive.directory("run");
    Ok(archive.finish())
}

/// What NSS loads at run time, with libraries of its own; `libraries` are those of the client.
pub fn nss(libraries: &BTreeSet<PathBuf>) -> Result<BTreeSet<PathBuf>> {
    let nss = libraries.iter().find(|path| path.ends_with("libnss3.so")).context("fence_xvm without NSS")?;
    let mut found = BTreeSet::new();
    for name in NSS {
        let path = beside(nss, name)?;
        if path.extension().is_some_and(|extension| extension == "so") {
            found.extend(archive::libraries(&path)?);
        }
        found.insert(path);
    }
    Ok(found)
}

/// A file next to a library, or in its `nss` directory, where some releases keep these.
fn beside(library: &Path, name: &str) -> Result<PathBuf> {
    let directory = library.parent().unwrap_or(Path::new("/"));
    [directory.join(name), directory.join("nss").join(name)]
        .into_iter()
        .find(|path| path.exists())
        .with_context(|| format!("{name} is missing (Debian package libnss3): run `cargo xtask setup --for test`"))
}

/// The guest's first program (see the script).
fn init(address: Ipv4Addr, console: u8, modules: &[&str]) -> String {
    let modules: String = modules.iter().map(|name| format!("insmod /modules/{name}\n")).collect();
    include_str!("assets/guest-init.sh")
        .replace("@MODULES@\n", &modules)
        .replace("@ADDRESS@", &address.to_string())
        .replace("@CONSOLE@", &format!("/dev/ttyS{console}"))
}
