//! A block device on a file of the lab: a loop device. Its writes wait as long as the file's server
//! does.

use std::fs::File;
use std::process::Command;

use anyhow::{Context, Result};
use fence_lab::lab::{COMMAND_LIMIT, Hypervisor};
use fence_lab::process::{Finished, run};

/// A loop device. The kernel detaches it at the last close, however this process ends.
#[derive(Debug)]
pub(super) struct Block {
    path: String,
    /// Keeps it attached.
    _open: File,
}

impl Block {
    /// A device with the content of the file at `path` in the lab.
    pub(super) fn on(hypervisor: &Hypervisor, path: &str) -> Result<Self> {
        let losetup = |arguments: &[&str]| {
            run(hypervisor.space(), Command::new("losetup").args(arguments), COMMAND_LIMIT).and_then(Finished::success)
        };
        let device = losetup(&["--find", "--show", path])?.stdout.trim().to_owned();
        let open = File::options().read(true).write(true).open(hypervisor.outside(&device));
        // It is in use, so this takes effect when the last one closes it.
        losetup(&["--detach", &device])?;
        Ok(Self { _open: open.with_context(|| device.clone())?, path: device })
    }

    /// The device's path, in the lab and on the host.
    #[must_use]
    pub(super) fn path(&self) -> &str {
        &self.path
    }
}
