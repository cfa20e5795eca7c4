//! The control socket: to look into the daemon while it runs, for root alone. Nothing can be changed through it.
//!
//! A UNIX socket in the state directory. A client sends one line, the question (`status`), and gets one line, a JSON object ([`view`]), and the
//! end. For people there are `fence-daemon status` and `fence-daemon top`.
//!
//! Nothing that is served waits for it: what is told is read from what others have left ([`inspector`]), clients are few at a time and have
//! little of it, and if the socket cannot be had the daemon serves without.

pub mod client;
pub mod inspector;
pub mod server;
#[cfg(test)]
pub(crate) mod tests;
pub mod view;

use std::path::{Path, PathBuf};

/// The socket's name in the state directory.
const NAME: &str = "control.sock";

/// The question that there is.
const STATUS: &str = "status";

/// The longest path of a UNIX socket, in bytes, without the NUL.
const PATH_MAX: usize = 107;

/// Where the socket of a daemon with this state directory is.
#[must_use]
pub fn path(state_directory: &Path) -> PathBuf {
    state_directory.join(NAME)
}

/// Whether the kernel cannot take a socket's path for its length.
fn is_too_long(path: &Path) -> bool {
    path.as_os_str().len() > PATH_MAX
}
