//! Builds the kernel program: `target/bpf/fence-xdp.o`.
//!
//! The BPF target has no precompiled `core`, so the compiler needs the library's source. The LLVM
//! of `bpf-linker` must read what the compiler's LLVM wrote. [`crate::setup::toolchain`] finds
//! both.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::{fs, io};

use anyhow::{Context as _, Result, bail};

use crate::progress::line;
use crate::setup::toolchain::{self, Toolchain};

/// The object's path from the workspace's root, where tests and daemon look for it.
const OBJECT: &str = "target/bpf/fence-xdp.o";

/// The program's compiler flags.
const FLAGS: [&str; 3] = [
    // Full debug information of every crate: the linker makes the maps' BTF types from it.
    "-Cdebuginfo=2",
    "-Clink-arg=--btf",
    // 32-bit arithmetic, which every kernel that can run the program has (5.1 and later). Digests
    // need it.
    "-Ctarget-cpu=v3",
];

/// The BPF target of this machine's byte order.
pub(crate) const TARGET: &str = if cfg!(target_endian = "big") { "bpfeb-unknown-none" } else { "bpfel-unknown-none" };

/// Builds the kernel program of the workspace at `root` and returns the object's path. If nothing
/// has changed, the object stays untouched.
///
/// # Errors
/// A requirement is missing (the error has the remedy), or the build fails.
pub(crate) fn build(root: &Path) -> Result<PathBuf> {
    let missing = |what| format!("{what}: `cargo xtask setup --for build` gets it, or says how");
    let linker = toolchain::bpf_linker().with_context(|| missing("no bpf-linker"))?;
    let toolchain = Toolchain::find().with_context(|| missing("no Rust compiler that can build for BPF"))?;
    let object = root.join(OBJECT);
    let target_dir = root.join("target/bpf-build");
    // BTF has the path of each source file, for bpftool.
    let mut flags = FLAGS.map(str::to_owned).to_vec();
    flags.extend(without_paths(root));
    // The linker copies the source's lines into BTF, and runs in the workspace. The last flag that
    // fits counts.
    flags.push(renamed(root, "."));
    flags.push(renamed(&toolchain.library(), "/usr/src/rust"));
    let mut cargo = toolchain.cargo(root);
    cargo
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"))
        .env(format!("CARGO_TARGET_{}_LINKER", TARGET.replace('-', "_").to_uppercase()), &linker.path)
        .args(["build", "--release", "--package", "fence-ebpf", "-Z", "build-std=core"])
        // Not the release profile, which is the daemon's and optimises for size: the verifier
        // counts instructions, and packets wait for them.
        .args(["--config", "profile.release.opt-level=3", "--config", "profile.release.lto=\"thin\""])
        .args(["--config", "profile.release.codegen-units=16"])
        .args(["--target", TARGET])
        .arg("--target-dir")
        .arg(&target_dir)
        // The first build takes a minute and shows its progress; an unchanged object is not
        // reported.
        .args(object.exists().then_some("--quiet"));
    let status = cargo.status().with_context(|| format!("cannot run {}", line(&cargo)))?;
    if !status.success() {
        bail!("building the kernel program with {} failed ({status})", toolchain.rustc.display());
    }
    let built = target_dir.join(TARGET).join("release/fence-xdp");
    let built = without_dwarf(&toolchain, &built).context("the build left no object")?;
    // A new modification time makes all crates rebuild that include the object. So it is written
    // only when its content has changed.
    if fs::read(&object).ok().is_none_or(|old| old != built) {
        let new = object.with_extension("new");
        fs::create_dir_all(root.join("target/bpf")).context("cannot make target/bpf")?;
        fs::write(&new, built).with_context(|| format!("cannot write {}", new.display()))?;
        fs::rename(&new, &object).with_context(|| format!("cannot write {}", object.display()))?;
    }
    Ok(object)
}

/// The compiler's flags that keep this machine's paths out of what it compiles: of the workspace,
/// and of cargo's directory. So the same source becomes the same bytes anywhere.
pub(crate) fn without_paths(root: &Path) -> Vec<String> {
    vec![renamed(root, "/usr/src/fence-xdp"), renamed(&toolchain::cargo_home(), "/usr/src/cargo")]
}

/// The compiler's flag that gives the files below a directory another place.
fn renamed(from: &Path, to: &str) -> String {
    format!("--remap-path-prefix={}={to}", from.display())
}

/// The object's content without DWARF, which is two thirds of it. No loader reads DWARF: the maps'
/// types and the source lines that bpftool shows are in BTF. Without `llvm-strip`, which is not
/// worth a requirement, the object stays whole.
fn without_dwarf(toolchain: &Toolchain, built: &Path) -> io::Result<Vec<u8>> {
    let stripped = built.with_extension("stripped");
    let own = PathBuf::from(format!("/usr/lib/llvm-{}/bin/llvm-strip", toolchain.llvm));
    for strip in [own, PathBuf::from("llvm-strip")] {
        let mut strip = Command::new(strip);
        strip.arg("--strip-debug").arg("-o").arg(&stripped).arg(built).stdin(Stdio::null()).stderr(Stdio::null());
        if strip.status().is_ok_and(|status| status.success()) {
            return fs::read(&stripped);
        }
    }
    fs::read(built)
}
