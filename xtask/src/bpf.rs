//! Compiles the XDP program for the BPF target.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context as _;

use crate::progress;
use crate::setup::toolchain::{self, Toolchain};

/// Builds the BPF object of the workspace at `root`; returns its absolute path, `target/bpf/fence-xdp.o`.
///
/// # Errors
/// If there is no toolchain for the BPF target, or it refuses the program.
pub(crate) fn build(root: &Path) -> anyhow::Result<PathBuf> {
    let toolchain = Toolchain::find()
        .context("no Rust toolchain with the library's source: run `cargo xtask setup --for build`")?;
    let target = root.join("target/bpf");
    let path = env::var_os("PATH").unwrap_or_default();
    let path =
        env::join_paths(env::split_paths(&path).chain([toolchain::cargo_bin()])).context("PATH has an odd entry")?;
    let mut cargo = Command::new(&toolchain.cargo);
    cargo.current_dir(root).args(["build", "--quiet", "--release", "--package", "fence-ebpf"]);
    cargo.args(["--target", "bpfel-unknown-none", "-Z", "build-std=core", "--target-dir"]).arg(&target);
    cargo.env("RUSTC", &toolchain.rustc).env("RUSTC_BOOTSTRAP", "1").env("PATH", path);
    for inherited in ["RUSTUP_TOOLCHAIN", "RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS"] {
        cargo.env_remove(inherited);
    }
    progress::shown("building the BPF program", cargo)?;
    let object = target.join("fence-xdp.o");
    let built = target.join("bpfel-unknown-none/release/fence-xdp");
    fs::copy(&built, &object).with_context(|| format!("cannot copy {}", built.display()))?;
    Ok(object)
}
