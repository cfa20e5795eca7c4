//! A guest that lives in memory: it boots, runs its script, and ends.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use fence_lab::archive::{self, Archive};
use fence_lab::debian::Kernel;
use fence_lab::server::commands_beside;
use fence_lab::{initramfs, tools};

/// The kernel modules of the lab's network, in the order of loading.
const MODULES: [&str; 8] = [
    "net/llc/llc.ko",
    "net/802/stp.ko",
    "net/bridge/bridge.ko",
    "drivers/net/veth.ko",
    "net/802/garp.ko",
    "net/802/mrp.ko",
    "net/8021q/8021q.ko",
    "drivers/net/macvlan.ko",
];
/// The host's programs that the lab uses beside busybox. A shell is among them: busybox's shell
/// prefers its own applets.
const PROGRAMS: [&str; 6] = ["sh", "fence_xvm", "ip", "bpftool", "unshare", "tini"];
/// The time limit of all steps of a guest on a loaded machine. An idle one takes about a minute,
/// and longer if it runs another guest.
const LIMIT: Duration = Duration::from_secs(1200);

/// A step in the guest: a command line, and the number of its tests if it is a test program.
#[derive(Clone, Debug)]
pub(crate) struct Step {
    pub(crate) name: &'static str,
    pub(crate) command: String,
}

/// What a guest has beside the lab's network and the tests' own programs.
#[derive(Default)]
pub(crate) struct Extra {
    /// Kernel modules, in the order of loading.
    pub(crate) modules: &'static [&'static str],
    /// Programs of the host.
    pub(crate) programs: &'static [&'static str],
    /// Libraries of the host that programs load at run time.
    pub(crate) libraries: Vec<PathBuf>,
    /// Files of the guest's own.
    pub(crate) files: Vec<(&'static str, String)>,
    /// Files of the host, and where the guest has them.
    pub(crate) copies: Vec<(PathBuf, &'static str)>,
}

/// A step's output and exit code.
#[derive(Debug)]
pub(crate) struct Done {
    pub(crate) output: Vec<String>,
    pub(crate) code: i32,
    pub(crate) took: Duration,
}

/// The initial file system: the host's programs with their libraries, at the host's paths, without
/// symbols.
pub(crate) fn initrd(
    kernel: &Kernel,
    own: &[(&str, PathBuf)],
    extra: &Extra,
    steps: &[Step],
    scratch: &Path,
) -> Result<Vec<u8>> {
    let modules = [&MODULES, extra.modules].concat();
    let mut archive = Archive::default();
    archive.file("init", 0o755, init(&modules, steps).as_bytes());
    archive.copy(&tools::find("busybox")?, "/bin/busybox", 0o755)?;
    archive.modules(kernel, &modules)?;
    let mut libraries = BTreeSet::new();
    for program in PROGRAMS.iter().chain(extra.programs).copied() {
        let path = tools::find(program)?;
        // A script's interpreter would be missing.
        ensure!(std::fs::read(&path)?.starts_with(b"\x7fELF"), "{} is no program", path.display());
        archive.copy(&path, &format!("/usr/bin/{program}"), 0o755)?;
        let needed = archive::libraries(&path)?;
        if program == "fence_xvm" {
            libraries.extend(initramfs::nss(&needed)?);
        }
        libraries.extend(needed);
    }
    for (name, path) in own {
        libraries.extend(archive::libraries(path)?);
        let stripped = scratch.join(name);
        tools::output("strip", &["-o", &stripped.to_string_lossy(), &path.to_string_lossy()], Path::new("/"))?;
        archive.copy(&stripped, &format!("/usr/bin/{name}"), 0o755)?;
    }
    for library in &extra.libraries {
        libraries.extend(archive::libraries(library)?);
        libraries.insert(library.clone());
    }
    for (path, content) in &extra.files {
        archive.file(path, 0o600, content.as_bytes());
    }
    for (path, place) in &extra.copies {
        archive.copy(path, place, 0o644)?;
    }
    for library in libraries {
        archive.copy(&library, &library.to_string_lossy(), 0o755)?;
    }
    archive.copy(&object()?, OBJECT, 0o644)?;
    archive.file("/etc/passwd", 0o644, b"root:x:0:0:root:/root:/bin/sh\n");
    archive.file("/etc/group", 0o644, b"root:x:0:\n");
    for directory in ["proc", "sys", "dev", "tmp", "run", "root", "var/run"] {
        archive.directory(directory);
    }
    Ok(archive.finish())
}

/// Our executables, by their names in the guest.
pub(crate) fn executables() -> Result<[(&'static str, PathBuf); 2]> {
    let daemon =
        std::env::var_os("FENCE_DAEMON_BIN").context("FENCE_DAEMON_BIN is not set: run `cargo xtask test kernels`")?;
    let commands = commands_beside(Path::new(&daemon));
    Ok([("fence-daemon", daemon.into()), ("fence-daemon-commands", commands)])
}

/// The kernel program's path in the guest.
const OBJECT: &str = "/fence-xdp.o";

fn object() -> Result<PathBuf> {
    std::env::var_os("FENCE_EBPF_OBJECT")
        .map(PathBuf::from)
        .context("FENCE_EBPF_OBJECT is not set: `cargo xtask test kernels` does it")
}

fn init(modules: &[&str], steps: &[Step]) -> String {
    let modules: String = modules
        .iter()
        .filter_map(|module| module.rsplit('/').next())
        .fold(String::new(), |text, name| text + &format!("insmod /modules/{name}\n"));
    let steps = steps.iter().fold(String::new(), |mut text, Step { name, command }| {
        let _ = writeln!(text, "echo '@begin {name}'\n{command} 2>&1\necho \"@end {name} $?\"");
        text
    });
    format!(
        "#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/usr/bin:/bin HOME=/root RUST_BACKTRACE=0
export FENCE_DAEMON_BIN=/usr/bin/fence-daemon FENCE_EBPF_OBJECT={OBJECT}
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t tmpfs tmpfs /tmp
mount -t tmpfs tmpfs /run
{modules}ip link set lo up
{steps}echo '@over'
poweroff -f
"
    )
}

/// QEMU, killed when this is dropped.
struct Machine(Child);

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Boots the guest and follows its steps.
pub(crate) fn run(kernel: &Kernel, initrd: &Path, steps: &[Step]) -> Result<Vec<Done>> {
    let mut qemu = Command::new(tools::find("qemu-system-x86_64")?);
    // One processor: with several, each emulated by its own thread, a kernel sometimes hangs in its
    // first second.
    qemu.args(["-accel", "tcg", "-m", "1536", "-nodefaults", "-no-reboot", "-display", "none", "-serial", "stdio"]);
    qemu.args(["-append", "console=ttyS0 panic=-1 mitigations=off tsc=unstable cryptomgr.notests quiet"]);
    qemu.arg("-kernel").arg(&kernel.image).arg("-initrd").arg(initrd);
    let mut child = qemu.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::inherit()).spawn()?;
    let console = child.stdout.take().context("no pipe")?;
    let _machine = Machine(child);
    let (lines, read) = mpsc::channel();
    std::thread::spawn(move || {
        for line in BufReader::new(console).split(b'\n').map_while(Result::ok) {
            if lines.send(String::from_utf8_lossy(&line).trim_end().to_owned()).is_err() {
                break;
            }
        }
    });

    let deadline = Instant::now() + LIMIT;
    let (mut done, mut all, mut output, mut began) = (Vec::new(), String::new(), Vec::new(), Instant::now());
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let Ok(line) = read.recv_timeout(left) else {
            bail!("the guest's steps are not over within {LIMIT:?}, or it died; its console: {all}");
        };
        let _ = writeln!(all, "{line}");
        if line.contains("@begin ") {
            (output, began) = (Vec::new(), Instant::now());
        } else if let Some((_, end)) = line.split_once("@end ") {
            let step = steps.get(done.len()).with_context(|| format!("one step too many: {all}"))?;
            let code = end.strip_prefix(step.name).and_then(|code| code.trim().parse().ok());
            let code = code.with_context(|| format!("{end} is not the end of {}: {all}", step.name))?;
            done.push(Done { output: std::mem::take(&mut output), code, took: began.elapsed() });
        } else if line.contains("@over") {
            ensure!(done.len() == steps.len(), "a step is missing: {all}");
            return Ok(done);
        } else {
            output.push(line);
        }
    }
}
