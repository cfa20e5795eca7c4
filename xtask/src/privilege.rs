//! Root: whether we are, and the way there (sudo) if not.

use std::ffi::OsStr;
use std::fs;
use std::io::{self, IsTerminal as _};
use std::os::unix::fs::MetadataExt as _;
use std::process::{Command, Stdio};

/// How a command gets root's rights on this machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Privilege {
    /// We are root.
    Root,
    /// Through sudo, which asks for nothing, or has a terminal to ask on.
    Sudo,
    /// There is no way: say what root would have to run.
    None,
}

impl Privilege {
    /// What this process has.
    pub(crate) fn of_this_process() -> Self {
        if is_root() {
            Self::Root
        } else if sudo_asks_nothing() || (io::stdin().is_terminal() && crate::setup::tool("sudo").is_some()) {
            Self::Sudo
        } else {
            Self::None
        }
    }

    /// `program` with root's rights; `None` where there is no way to them.
    ///
    /// sudo forgets the environment: what the program needs of it must be in its arguments.
    pub(crate) fn command(self, program: impl AsRef<OsStr>) -> Option<Command> {
        match self {
            Self::Root => Some(Command::new(program)),
            Self::Sudo => {
                let mut sudo = Command::new("sudo");
                sudo.arg("--").arg(program);
                Some(sudo)
            }
            Self::None => None,
        }
    }
}

/// Whether this process runs as root: /proc/self belongs to its effective user.
fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|me| me.uid() == 0)
}

fn sudo_asks_nothing() -> bool {
    let mut sudo = Command::new("sudo");
    sudo.args(["-n", "true"]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    matches!(sudo.status(), Ok(status) if status.success())
}
