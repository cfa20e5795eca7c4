//! The Linux system that QEMU guests boot: Debian's cloud kernel, and a busybox initramfs with the stock client inside.
//!
//! The initramfs is made from the host's own busybox and `fence_xvm`, so it is what Debian ships.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Write;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::archive::{self, Archive};
use crate::debian::Kernel;
use crate::tools;

/// What a virtio network card needs, in the order of loading, relative to the modules' `kernel` directory.
pub(crate) const MODULES: [&str; 8] = [
    "drivers/virtio/virtio_ring.ko",
    "drivers/virtio/virtio.ko",
    "drivers/virtio/virtio_pci_modern_dev.ko",
    "drivers/virtio/virtio_pci_legacy_dev.ko",
    "drivers/virtio/virtio_pci.ko",
    "net/core/failover.ko",
    "drivers/net/net_failover.ko",
    "drivers/net/virtio_net.ko",
];
/// What NSS (the client's cryptography) loads at run time, so that `ldd` does not show it. The `.chk` files are its
/// signatures of itself.
const NSS: [&str; 6] =
    ["libsoftokn3.so", "libsoftokn3.chk", "libfreebl3.so", "libfreebl3.chk", "libfreeblpriv3.so", "libfreeblpriv3.chk"];
/// Where the guest finds its key.
pub const KEY: &str = "/etc/cluster/fence_xvm.key";

/// What a guest is to be.
#[derive(Clone, Debug)]
pub struct System<'a> {
    /// IPv4 address of its `eth0`.
    pub address: Ipv4Addr,
    /// The key for the client, at [`KEY`].
    pub key: &'a [u8],
}

/// Builds an initramfs.
///
/// # Errors
/// A file that belongs into it is missing on the host.
pub fn build(kernel: &Kernel, system: &System<'_>) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    archive.file("init", 0o755, init(system.address).as_bytes());
    archive.file(KEY, 0o600, system.key);
    archive.copy(&tools::find("busybox")?, "/bin/busybox", 0o755)?;
    for module in MODULES {
        let name = module.rsplit('/').next().unwrap_or(module);
        archive.file(&format!("/modules/{name}"), 0o644, &kernel.module(module)?);
    }
    let client = tools::find("fence_xvm")?;
    archive.copy(&client, "/usr/sbin/fence_xvm", 0o755)?;
    let mut libraries = archive::libraries(&client)?;
    libraries.extend(nss(&libraries)?);
    for library in libraries {
        archive.copy(&library, &library.to_string_lossy(), 0o755)?;
    }
    archive.directory("proc");
    archive.directory("sys");
    archive.directory("dev");
    archive.directory("tmp");
    Ok(archive.finish())
}

/// What NSS loads at run time, with libraries of its own; `libraries` are those of the client.
///
/// # Errors
/// A file is missing on the host.
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

/// The guest's first program: brings up the network, then runs the commands that come over the second serial port. Each is a
/// line "NUMBER COMMAND"; the answer is a line "lab NUMBER CODE STDOUT STDERR", the last two in base64 (`-` where empty).
fn init(address: Ipv4Addr) -> String {
    let modules: String = MODULES
        .iter()
        .filter_map(|module| Path::new(module).file_name())
        .map(|name| format!("insmod /modules/{}\n", name.to_string_lossy()))
        .collect();
    format!(
        "#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin:/usr/sbin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
{modules}ip link set lo up
ip link set eth0 up
ip addr add {address}/24 dev eth0
ip route add 224.0.0.0/4 dev eth0
stty -F /dev/ttyS1 raw -echo
exec 3<>/dev/ttyS1
while read -r number line <&3; do
    sh -c \"$line\" >/tmp/out 2>/tmp/err </dev/null
    code=$?
    out=$(base64 -w0 /tmp/out)
    err=$(base64 -w0 /tmp/err)
    echo \"lab $number $code ${{out:--}} ${{err:--}}\" >&3
done
"
    )
}

/// Writes an initramfs to a file of the caller's.
///
/// # Errors
/// As [`build`], or it could not be written.
pub fn write(kernel: &Kernel, system: &System<'_>, into: &Path) -> Result<()> {
    let archive = build(kernel, system)?;
    File::create(into)?.write_all(&archive).with_context(|| format!("writing {}", into.display()))
}
