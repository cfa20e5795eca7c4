//! Root's rights: whether this process has them, and how to get them (sudo).

use std::ffi::OsStr;
use std::fs;
use std::io::{self, IsTerminal as _};
use std::os::unix::fs::MetadataExt as _;
use std::process::{Command, Stdio};

/// The way to root's rights on this machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Privilege {
    /// This process is root.
    Root,
    /// sudo, without a password or with a terminal to ask on.
    Sudo,
    /// No way: the task prints the command for root.
    None,
}

impl Privilege {
    /// The way that this process has.
    pub(crate) fn of_this_process() -> Self {
        if is_root() {
            Self::Root
        } else if sudo_asks_nothing() || (io::stdin().is_terminal() && crate::setup::tool("sudo").is_some()) {
            Self::Sudo
        } else {
            Self::None
        }
    }

    /// `program` with root's rights; `None` without a way to them.
    ///
    /// sudo drops the environment, so variables for the program must be in its arguments.
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
