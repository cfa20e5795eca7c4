//! The control protocol: what `fence-daemon status` and `top` ask the daemon, and what it answers.
//! Also the form of the [`history`], which the daemon writes and the client reads.
//!
//! The daemon listens on a UNIX socket in its state directory. A client sends one line, the
//! question (`status`). The daemon answers with one line, a JSON object ([`report`]), and closes
//! the connection.

pub mod client;
pub mod history;
pub mod report;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};

/// The socket's name in the state directory.
const NAME: &str = "control.sock";

/// The only question so far.
pub const STATUS: &str = "status";

/// The longest path of a UNIX socket, in bytes, without the NUL.
pub const PATH_MAX: usize = 107;

/// The socket of a daemon with this state directory.
#[must_use]
pub fn path(state_directory: &Path) -> PathBuf {
    state_directory.join(NAME)
}

/// Whether the path is longer than the kernel allows for a socket.
#[must_use]
pub fn is_too_long(path: &Path) -> bool {
    path.as_os_str().len() > PATH_MAX
}
