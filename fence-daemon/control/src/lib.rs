//! The control protocol: what `fence-daemon status` and `top` ask the daemon, and what it answers.
//!
//! A UNIX socket in the state directory. A client sends one line, the question (`status`), and gets
//! one line, a JSON object ([`report`]), and the end.

pub mod client;
pub mod report;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};

/// The socket's name in the state directory.
const NAME: &str = "control.sock";

/// The question that there is.
pub const STATUS: &str = "status";

/// The longest path of a UNIX socket, in bytes, without the NUL.
pub const PATH_MAX: usize = 107;

/// Where the socket of a daemon with this state directory is.
#[must_use]
pub fn path(state_directory: &Path) -> PathBuf {
    state_directory.join(NAME)
}

/// Whether the kernel cannot take a socket's path for its length.
#[must_use]
pub fn is_too_long(path: &Path) -> bool {
    path.as_os_str().len() > PATH_MAX
}
