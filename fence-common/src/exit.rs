//! What the program exits with. Scripts and systemd go by these numbers.

/// The exit code after wrong usage or a wrong configuration, as with stock servers.
pub const EXIT_USAGE: u8 = 255;
/// The exit code where the start failed for another reason, such as another daemon that runs already; as with stock servers.
pub const EXIT_START: u8 = 1;
/// `status`: the daemon runs, and something is missing.
pub const EXIT_DEGRADED: u8 = 1;
/// `status`, `top`: no daemon answers. As the Linux Standard Base has it for "not running".
pub const EXIT_NOBODY: u8 = 3;
/// `status`, `top`: it cannot be told how the daemon is. As there, too.
pub const EXIT_UNKNOWN: u8 = 4;
