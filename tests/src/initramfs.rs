//! The Linux system that QEMU guests boot: Debian's cloud kernel, and a busybox initramfs with the stock client inside.
//!
//! The kernel comes from Debian's archive through `apt-get download` and is kept in cargo's target directory. The initramfs
//! is made from the host's own busybox and `fence_xvm`, so it is what Debian ships.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Write;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::tools;

/// Which series of Debian's cloud kernels is taken: that of Debian 12.
const SERIES: &str = "linux-image-6.1.0-";
const FLAVOUR: &str = "-cloud-amd64";
/// What a virtio network card needs, in the order of loading, relative to the modules' `kernel` directory.
const MODULES: [&str; 8] = [
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

/// A kernel with its modules, unpacked.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// The kernel image.
    pub image: PathBuf,
    modules: PathBuf,
}

impl Kernel {
    /// The cached kernel; downloads it the first time.
    ///
    /// # Errors
    /// Debian's archive cannot be reached, or does not have such a kernel.
    pub fn get() -> Result<Self> {
        let cache = tools::target_directory().join("lab-cache");
        std::fs::create_dir_all(&cache)?;
        // Tests run at the same time: one downloads, the others wait.
        let lock = File::create(cache.join("lock"))?;
        lock.lock().context("locking the lab's cache")?;
        let unpacked = cache.join("kernel");
        if !unpacked.is_dir() {
            download(&cache, &unpacked)?;
        }
        let boot = only_entry(&unpacked.join("boot"), "vmlinuz-")?;
        let modules = only_entry(&unpacked.join("lib/modules"), "")?.join("kernel");
        Ok(Self { image: boot, modules })
    }
}

/// The one entry of a directory whose name begins with `prefix`.
fn only_entry(directory: &Path, prefix: &str) -> Result<PathBuf> {
    let entries = std::fs::read_dir(directory).with_context(|| format!("reading {}", directory.display()))?;
    entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(prefix)))
        .with_context(|| format!("nothing like {prefix}* in {}", directory.display()))
}

fn command(program: &str, arguments: &[&str], directory: &Path) -> Result<String> {
    let output = Command::new(tools::find(program)?).args(arguments).current_dir(directory).output()?;
    if !output.status.success() {
        bail!("{program} {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn download(cache: &Path, into: &Path) -> Result<()> {
    let known = command("apt-cache", &["pkgnames", SERIES], cache)?;
    // The number in the name is the ABI's: the highest is the newest.
    let abi = |name: &str| name.strip_prefix(SERIES)?.strip_suffix(FLAVOUR)?.parse::<u32>().ok();
    let newest = known.lines().filter_map(|name| Some((abi(name)?, name))).max().map(|(_, name)| name);
    let newest = newest.with_context(|| {
        format!("apt knows no {SERIES}*{FLAVOUR} (QEMU guests boot Debian 12's cloud kernel): run `apt-get update`")
    })?;
    let work = cache.join("download");
    if work.exists() {
        std::fs::remove_dir_all(&work)?;
    }
    std::fs::create_dir_all(&work)?;
    command("apt-get", &["download", newest], &work).context("downloading the guests' kernel")?;
    let package = only_entry(&work, SERIES)?;
    command("dpkg-deb", &["-x", &package.to_string_lossy(), "unpacked"], &work)?;
    // Last, and in one step: what is there under this name is complete.
    std::fs::rename(work.join("unpacked"), into)?;
    std::fs::remove_dir_all(&work)?;
    Ok(())
}

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
        let path = kernel.modules.join(module);
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        archive.copy(&path, &format!("/modules/{name}"), 0o644)?;
    }
    let client = tools::find("fence_xvm")?;
    archive.copy(&client, "/usr/sbin/fence_xvm", 0o755)?;
    let mut libraries = libraries(&client)?;
    let nss = libraries.iter().find(|path| path.ends_with("libnss3.so")).context("fence_xvm without NSS")?.clone();
    for name in NSS {
        let path = beside(&nss, name)?;
        if path.extension().is_some_and(|extension| extension == "so") {
            libraries.extend(self::libraries(&path)?);
        }
        libraries.insert(path);
    }
    for library in libraries {
        archive.copy(&library, &library.to_string_lossy(), 0o755)?;
    }
    archive.directory("proc");
    archive.directory("sys");
    archive.directory("dev");
    archive.directory("tmp");
    Ok(archive.finish())
}

/// A file next to a library, or in its `nss` directory, where some releases keep these.
fn beside(library: &Path, name: &str) -> Result<PathBuf> {
    let directory = library.parent().unwrap_or(Path::new("/"));
    [directory.join(name), directory.join("nss").join(name)]
        .into_iter()
        .find(|path| path.exists())
        .with_context(|| format!("{name} is missing (Debian package libnss3): run `cargo xtask setup --for test`"))
}

/// The shared libraries of a program, its loader included, by the paths at which the loader looks for them.
fn libraries(program: &Path) -> Result<BTreeSet<PathBuf>> {
    let listed = command("ldd", &[&program.to_string_lossy()], Path::new("/"))?;
    let path = |line: &str| line.split_whitespace().find(|word| word.starts_with('/')).map(PathBuf::from);
    Ok(listed.lines().filter_map(path).collect())
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

/// A cpio archive of the kernel's kind ("newc").
#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    directories: BTreeSet<String>,
    entries: u32,
}

impl Archive {
    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.entries += 1;
        let size = u32::try_from(content.len()).unwrap_or(u32::MAX);
        let name_size = u32::try_from(name.len() + 1).unwrap_or(u32::MAX);
        // Magic, inode, mode, owner, group, links, time, size, four device numbers, the name's size, no checksum.
        let fields = [self.entries, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    /// A directory and those above it, each once.
    fn directory(&mut self, path: &str) {
        let path = path.trim_matches('/');
        if path.is_empty() || self.directories.contains(path) {
            return;
        }
        if let Some((above, _)) = path.rsplit_once('/') {
            self.directory(above);
        }
        self.directories.insert(path.to_owned());
        self.entry(path, 0o040_755, b"");
    }

    fn file(&mut self, path: &str, permissions: u32, content: &[u8]) {
        let path = path.trim_start_matches('/');
        if let Some((directory, _)) = path.rsplit_once('/') {
            self.directory(directory);
        }
        self.entry(path, 0o100_000 | permissions, content);
    }

    fn copy(&mut self, from: &Path, path: &str, permissions: u32) -> Result<()> {
        let content = std::fs::read(from).with_context(|| format!("reading {} for a guest", from.display()))?;
        self.file(path, permissions, &content);
        Ok(())
    }

    fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, b"");
        self.bytes
    }
}

/// Writes an initramfs to a file of the caller's.
///
/// # Errors
/// As [`build`], or it could not be written.
pub fn write(kernel: &Kernel, system: &System<'_>, into: &Path) -> Result<()> {
    let archive = build(kernel, system)?;
    File::create(into)?.write_all(&archive).with_context(|| format!("writing {}", into.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_is_what_cpio_reads() {
        let mut archive = Archive::default();
        archive.file("/etc/deep/file", 0o600, b"hello");
        archive.file("/etc/other", 0o644, b"");
        let bytes = archive.finish();
        assert_eq!(bytes.len() % 4, 0);
        let names: Vec<_> = ["etc\0", "etc/deep\0", "etc/deep/file\0", "etc/other\0", "TRAILER!!!\0"].into();
        let mut at = 0;
        for name in names {
            at += bytes[at..].windows(name.len()).position(|window| window == name.as_bytes()).expect(name);
        }
        assert_eq!(bytes.windows(6).filter(|window| window == b"070701").count(), 5);
    }
}
