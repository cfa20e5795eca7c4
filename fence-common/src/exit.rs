//! The program's exit codes, for scripts and systemd.

/// Wrong usage or a wrong configuration, as with stock servers.
pub const EXIT_USAGE: u8 = 255;
/// The start failed for another reason, such as a running daemon, as with stock servers.
pub const EXIT_START: u8 = 1;
/// `status`: the daemon runs, and something is missing.
pub const EXIT_DEGRADED: u8 = 1;
/// `status`, `top`: no daemon answers. The Linux Standard Base's code for "not running".
pub const EXIT_NOBODY: u8 = 3;
/// `status`, `top`: the daemon's state is unknown. The Linux Standard Base's code too.
pub const EXIT_UNKNOWN: u8 = 4;
