//! Finds the BPF object that the daemon carries inside, and tells the compiler where it is.
//!
//! It does not build the object: that takes another toolchain, which `cargo xtask` installs and
//! drives.

use std::env;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Where the object is, if not at its usual place; also what the crate reads with `env!`.
const VARIABLE: &str = "FENCE_EBPF_OBJECT";

#[allow(clippy::print_stdout, reason = "standard output is how a build script talks to cargo")]
fn main() -> ExitCode {
    println!("cargo::rerun-if-env-changed={VARIABLE}");
    let object = match env::var_os(VARIABLE).filter(|object| !object.is_empty()) {
        Some(object) => PathBuf::from(object),
        // `cargo xtask build` leaves it under the workspace's root, wherever CARGO_TARGET_DIR
        // points.
        None => Path::new(&env::var_os("CARGO_MANIFEST_DIR").unwrap_or_default()).join("../target/bpf/fence-xdp.o"),
    };
    println!("cargo::rerun-if-changed={}", object.display());
    match object.canonicalize() {
        Ok(found) if found.is_file() => {
            println!("cargo::rustc-env={VARIABLE}={}", found.display());
            ExitCode::SUCCESS
        }
        _ => {
            println!("cargo::error=the BPF object {} is not there: run `cargo xtask build`", object.display());
            ExitCode::FAILURE
        }
    }
}
