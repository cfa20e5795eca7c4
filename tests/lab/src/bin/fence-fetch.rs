//! Downloads and makes what guests and cluster nodes start from, before a test needs it. `cargo
//! xtask setup --fetch` runs it.

use std::process::ExitCode;

use anyhow::{Context, Result};
use fence_lab::cluster::image::Image;
use fence_lab::debian::{Kernel, Series};
use fence_lab::program::{self, progress};

fn main() -> ExitCode {
    program::exit("fence-fetch", run().map(|()| true))
}

fn run() -> Result<()> {
    for series in Series::ALL {
        progress(&format!("Debian's Linux {} for QEMU's guests ...", series.name()));
        let kernel = Kernel::get(series).with_context(|| format!("Linux {}", series.name()))?;
        progress(&format!("  {} is there", kernel.release()));
    }
    progress("the root directory of clusters' nodes ...");
    Image::get()?;
    progress("  it is there");
    for suite in ["bookworm", "trixie"] {
        progress(&format!("the root directory of a hypervisor with {suite} ..."));
        Image::hypervisor(suite)?;
        progress("  it is there");
    }
    progress("the root directory of a machine for the tests with trixie ...");
    Image::lab("trixie")?;
    progress("  it is there");
    Ok(())
}
