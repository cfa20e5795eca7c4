//! Building the kernel program: `target/bpf/fence-xdp.o`.
//!
//! The BPF target has no precompiled `core`, so a compiler is needed whose library source is installed, and `bpf-linker`, whose
//! LLVM must read what the compiler's LLVM wrote. Debian's packages and rustup both can have that: whichever is there is taken.

use std::env;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

/// Where the object lies, from the workspace's root. Tests and daemon look there.
pub const OBJECT: &str = "target/bpf/fence-xdp.o";

/// The oldest compiler that is tried: the workspace's `rust-version`.
const OLDEST: (u32, u32) = (1, 95);

const TARGET: &str = if cfg!(target_endian = "big") { "bpfeb-unknown-none" } else { "bpfel-unknown-none" };

/// What an outer cargo (or the environment of one) would spoil a build for another target and by another compiler with.
const NOT_INHERITED: [&str; 14] = [
    "CARGO",
    "CARGO_BUILD_RUSTFLAGS",
    "CARGO_BUILD_TARGET",
    "CARGO_BUILD_TARGET_DIR",
    "CARGO_ENCODED_RUSTFLAGS",
    "CARGO_MAKEFLAGS",
    "CARGO_TARGET_DIR",
    "LD_LIBRARY_PATH",
    "MAKEFLAGS",
    "RUSTC_WORKSPACE_WRAPPER",
    "RUSTC_WRAPPER",
    "RUSTDOCFLAGS",
    "RUSTFLAGS",
    "RUSTUP_TOOLCHAIN",
];

/// A compiler with its cargo.
struct Toolchain {
    rustc: PathBuf,
    cargo: PathBuf,
}

/// Builds the kernel program of the workspace at `root` and says where the object is. Does nothing worth mentioning, and leaves
/// the object untouched, where nothing has changed.
///
/// # Errors
/// What is missing, with the remedy; or that the build failed.
pub fn build(root: &Path) -> Result<PathBuf> {
    let linker = linker()?;
    let toolchain = toolchain()?;
    let object = root.join(OBJECT);
    let target_dir = root.join("target/bpf-build");
    let mut cargo = Command::new(&toolchain.cargo);
    for name in NOT_INHERITED {
        cargo.env_remove(name);
    }
    let status = cargo
        .current_dir(root)
        .env("RUSTC", &toolchain.rustc)
        // Stable compilers refuse `-Z` without it; `core` is built from their own source, so nothing unstable gets in.
        .env("RUSTC_BOOTSTRAP", "1")
        // Full debug information of every crate: the linker makes the maps' BTF types from it.
        .env("CARGO_ENCODED_RUSTFLAGS", ["-Cdebuginfo=2", "-Clink-arg=--btf"].join("\x1f"))
        .env(format!("CARGO_TARGET_{}_LINKER", TARGET.replace('-', "_").to_uppercase()), &linker)
        .args(["build", "--release", "--package", "fence-ebpf", "-Z", "build-std=core"])
        .args(["--target", TARGET])
        .arg("--target-dir")
        .arg(&target_dir)
        // The first build takes a minute and shows it; that nothing has changed is not worth a line.
        .args(object.exists().then_some("--quiet"))
        .status()
        .with_context(|| format!("cannot run {}", toolchain.cargo.display()))?;
    if !status.success() {
        bail!("building the kernel program with {} failed ({status})", toolchain.rustc.display());
    }
    let built = fs::read(target_dir.join(TARGET).join("release/fence-xdp")).context("the build left no object")?;
    // Whatever includes the object is rebuilt when its time changes: only touch it when its content does.
    if fs::read(&object).ok().is_none_or(|old| old != built) {
        let new = object.with_extension("new");
        fs::create_dir_all(root.join("target/bpf")).context("cannot make target/bpf")?;
        fs::write(&new, built).with_context(|| format!("cannot write {}", new.display()))?;
        fs::rename(&new, &object).with_context(|| format!("cannot write {}", object.display()))?;
    }
    Ok(object)
}

/// `bpf-linker`, from the `PATH` or from where `cargo install` puts it.
fn linker() -> Result<PathBuf> {
    const NAME: &str = "bpf-linker";
    let cargo_home = env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| env::var_os("HOME").map(|home| Path::new(&home).join(".cargo")));
    env::var_os("PATH")
        .iter()
        .flat_map(env::split_paths)
        .chain(cargo_home.map(|home| home.join("bin")))
        .map(|directory| directory.join(NAME))
        .find(|path| path.is_file())
        .context(
            "bpf-linker is missing. Remedy: `cargo xtask setup`, or by hand, with the LLVM of the compiler that builds the program:\n    \
             LLVM_PREFIX=/usr/lib/llvm-22 cargo install bpf-linker --version 0.13.0 --no-default-features --features llvm-22",
        )
}

/// The first toolchain that can build for BPF: Debian's own, then rustup's.
fn toolchain() -> Result<Toolchain> {
    let mut looked_at = String::new();
    for rustc in compilers() {
        match usable(&rustc) {
            Ok(toolchain) => return Ok(toolchain),
            Err(why_not) => {
                let _ = write!(looked_at, "\n    {}: {why_not}", rustc.display());
            }
        }
    }
    if looked_at.is_empty() {
        looked_at.push_str("\n    none");
    }
    bail!(
        "no Rust compiler here can build for BPF. Compilers looked at:{looked_at}\n\
         Remedy: `cargo xtask setup`, or by hand\n    \
         on Debian and Ubuntu: apt-get install rustc-web cargo-web rust-web-src llvm-22-dev\n    \
         with rustup:          rustup component add rust-src"
    )
}

/// Every compiler worth a look, the distribution's first.
fn compilers() -> Vec<PathBuf> {
    let mut found = vec![PathBuf::from("/usr/bin/rustc")];
    let sysroots = lines(Command::new("rustup").args(["toolchain", "list"]))
        .into_iter()
        .filter_map(|line| line.split_whitespace().next().map(|name| format!("+{name}")))
        .map(|plus| lines(Command::new("rustc").args([plus.as_str(), "--print", "sysroot"])));
    let default = [lines(Command::new("rustc").args(["--print", "sysroot"]))];
    for sysroot in sysroots.chain(default).flatten() {
        let rustc = Path::new(&sysroot).join("bin/rustc");
        if !found.contains(&rustc) {
            found.push(rustc);
        }
    }
    found.retain(|rustc| rustc.is_file());
    found
}

/// The toolchain of a compiler, or what it lacks.
fn usable(rustc: &Path) -> Result<Toolchain, String> {
    let version = lines(Command::new(rustc).arg("--version")).pop().unwrap_or_default();
    if version_of(&version).is_none_or(|version| version < OLDEST) {
        return Err(format!("{version:?} is older than {}.{}", OLDEST.0, OLDEST.1));
    }
    let sysroot = lines(Command::new(rustc).args(["--print", "sysroot"])).pop().unwrap_or_default();
    let sysroot = Path::new(&sysroot);
    if !sysroot.join("lib/rustlib/src/rust/library/core/Cargo.toml").is_file() {
        return Err("the library's source (rust-src) is missing".to_owned());
    }
    let cargo = sysroot.join("bin/cargo");
    if !cargo.is_file() {
        return Err(format!("its cargo is missing ({})", cargo.display()));
    }
    Ok(Toolchain { rustc: rustc.to_owned(), cargo })
}

/// Major and minor number in `rustc 1.96.0 (...)`.
fn version_of(version: &str) -> Option<(u32, u32)> {
    let mut numbers = version.split_whitespace().nth(1)?.split('.');
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// What a command prints, line by line; nothing where it fails or is missing.
fn lines(command: &mut Command) -> Vec<String> {
    for name in NOT_INHERITED {
        command.env_remove(name);
    }
    match command.output() {
        Ok(output) if output.status.success() => {
            String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect()
        }
        Ok(_) | Err(_) => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::version_of;

    #[test]
    fn versions_are_read_and_compared() {
        assert_eq!(version_of("rustc 1.96.0 (ac68faa20 2026-05-25)"), Some((1, 96)));
        assert_eq!(version_of("rustc 1.98.0-nightly (abc 2026-06-01)"), Some((1, 98)));
        assert_eq!(version_of("something else"), None);
    }
}
