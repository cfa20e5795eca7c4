//! The executable of the commands: `status`, `doctor`, `-c`, `--help` and all that is not the
//! daemon itself.
//!
//! They are a program of their own so that the process that fences has no code of theirs in its
//! memory. It is the daemon's program that people start, which is why it hands over to the other
//! one. The other way round each start of the daemon would load that code first.

use std::env;
use std::fmt::Write as _;
use std::io;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The executable's name.
pub const PROGRAM: &str = "fence-daemon-commands";

/// Where it is installed: `/usr/libexec/fence-xdp` for a daemon in `/usr/sbin`. A build has both in
/// one directory.
const LIBEXEC: &str = "libexec/fence-xdp";

/// The directory of the daemon's executable, where the kernel does not say which it is.
const INSTALLED: &str = "/usr/sbin";

/// Why the commands' executable does not run.
#[derive(Debug, thiserror::Error)]
pub enum CommandsError {
    /// It is at none of its places.
    #[error(
        "{PROGRAM} is missing, which has the commands, the help and the words about a wrong command line: it is not at \
         {} (install it there, from the daemon's package or build)",
        listed(.0)
    )]
    Missing(Vec<PathBuf>),
    /// The kernel refuses to run it.
    #[error("cannot run {}: {error} (install it again, from the daemon's package or build)", path.display())]
    Refused {
        /// Its path.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        error: io::Error,
    },
}

fn listed(paths: &[PathBuf]) -> String {
    paths.iter().enumerate().fold(String::new(), |mut text, (index, path)| {
        let _ = write!(text, "{}{}", if index == 0 { "" } else { " or " }, path.display());
        text
    })
}

/// Becomes the commands' program, with this process's own command line. Returns only if that fails.
#[must_use]
pub fn become_them() -> CommandsError {
    let mut words = env::args_os();
    // Its usage has the name that was typed.
    let name = words.next().unwrap_or_else(|| "fence-daemon".into());
    let own = env::current_exe().ok();
    let places = places(own.as_deref().and_then(Path::parent).unwrap_or(Path::new(INSTALLED)));
    let arguments: Vec<_> = words.collect();
    for path in &places {
        let error = Command::new(path).arg0(&name).args(&arguments).exec();
        if error.kind() != io::ErrorKind::NotFound {
            return CommandsError::Refused { path: path.clone(), error };
        }
    }
    CommandsError::Missing(places)
}

/// Its possible paths, if the daemon's executable is in `directory`.
#[must_use]
pub fn places(directory: &Path) -> Vec<PathBuf> {
    let libexec = directory.parent().map(|above| above.join(LIBEXEC));
    [Some(directory.to_owned()), libexec].into_iter().flatten().map(|place| place.join(PROGRAM)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn they_are_beside_the_daemon_or_in_libexec() {
        for (directory, libexec) in [("/usr/sbin", "/usr/libexec"), ("/usr/local/sbin", "/usr/local/libexec")] {
            let expected =
                [format!("{directory}/fence-daemon-commands"), format!("{libexec}/fence-xdp/fence-daemon-commands")];
            assert_eq!(places(Path::new(directory)), expected.map(PathBuf::from));
        }
        assert_eq!(places(Path::new("/")).len(), 1);
    }
}
