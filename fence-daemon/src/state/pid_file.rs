//! The PID file: it keeps a second daemon from running, and tells others the daemon's process ID.

use std::fs::{File, OpenOptions, Permissions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg, OFlag};

/// How often the open is repeated if the file is exchanged meanwhile.
const ATTEMPTS: usize = 5;

/// Why this daemon must not run, or cannot write its process ID.
#[derive(Debug, thiserror::Error)]
pub enum PidFileError {
    /// Another daemon holds the file.
    #[error("already running{} (PID file {})", pid.map(|pid| format!(" as pid {pid}")).unwrap_or_default(), path.display())]
    AlreadyRunning {
        /// The PID file.
        path: PathBuf,
        /// Its process ID, if the file says it.
        pid: Option<u32>,
    },
    /// Writing through a link could destroy the file behind it.
    #[error("the PID file {} is a symbolic link: remove it", .0.display())]
    SymbolicLink(PathBuf),
    /// A directory, a device, or a file with another name elsewhere.
    #[error("the PID file {} is not a plain file of that one name: remove it, or name another one with -p", .0.display())]
    NotAFile(PathBuf),
    /// Another user's file: that user could write anything into it and hold its lock.
    #[error("the PID file {} belongs to the user with ID {uid}: remove it, or name another one with -p", path.display())]
    Foreign {
        /// The PID file.
        path: PathBuf,
        /// Its owner.
        uid: u32,
    },
    /// It cannot be written.
    #[error("cannot write the PID file {}: {error}", path.display())]
    Unwritable {
        /// The PID file.
        path: PathBuf,
        /// Why not.
        #[source]
        error: io::Error,
    },
}

/// A PID file that this process holds: locked as long as this value lives, removed when it is
/// dropped.
#[derive(Debug)]
pub struct PidFile {
    path: PathBuf,
    lock: Flock<File>,
    pid: u32,
}

impl PidFile {
    /// Takes a PID file and writes this process's ID into it. In the background, call it after
    /// [`crate::process::daemonise`]. A crashed daemon's file is taken over.
    ///
    /// # Errors
    /// Another daemon runs, stock ones included; or the file cannot or should not be written.
    pub fn take(path: &Path) -> Result<Self, PidFileError> {
        for _ in 0..ATTEMPTS {
            if let Some(taken) = Self::attempt(path)? {
                return Ok(taken);
            }
        }
        Err(PidFileError::Unwritable { path: path.to_owned(), error: io::Error::other("it keeps being exchanged") })
    }

    /// `None` if the file was removed or exchanged between opening and locking: a lock on a file
    /// without a name protects nothing.
    fn attempt(path: &Path) -> Result<Option<Self>, PidFileError> {
        let unwritable = |error| PidFileError::Unwritable { path: path.to_owned(), error };
        let file = open(path)?;
        let about = file.metadata().map_err(unwritable)?;
        // A second name could be one that an attacker gave to another file.
        if !about.is_file() || about.nlink() > 1 {
            return Err(PidFileError::NotAFile(path.to_owned()));
        }
        if !super::is_trusted(about.uid()) {
            return Err(PidFileError::Foreign { path: path.to_owned(), uid: about.uid() });
        }
        let mut lock = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => lock,
            Err((mut file, Errno::EWOULDBLOCK)) => {
                return Err(PidFileError::AlreadyRunning { path: path.to_owned(), pid: pid_in(&mut file) });
            }
            Err((_, error)) => return Err(unwritable(error.into())),
        };
        if !is_at(&lock, path) {
            return Ok(None);
        }
        // A stock server doesn't lock its file.
        if let Some(pid) = pid_in(&mut lock).filter(|pid| is_stock_server(*pid)) {
            return Err(PidFileError::AlreadyRunning { path: path.to_owned(), pid: Some(pid) });
        }
        let pid = std::process::id();
        let written = lock
            .set_len(0)
            .and_then(|()| lock.rewind())
            .and_then(|()| writeln!(lock, "{pid}"))
            // Whatever the umask: others may know the process ID.
            .and_then(|()| lock.set_permissions(Permissions::from_mode(0o644)));
        written.map_err(unwritable)?;
        Ok(Some(Self { path: path.to_owned(), lock, pid }))
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        // Only the creator removes the file: no child's copy of this value does, and a file that
        // somebody else put there stays.
        if self.pid == std::process::id() && is_at(&self.lock, &self.path) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn open(path: &Path) -> Result<File, PidFileError> {
    // The file is truncated only under our lock. O_NONBLOCK keeps a FIFO from hanging the start.
    let flags = OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o644).custom_flags(flags.bits());
    options.open(path).map_err(|error| match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::ELOOP) => PidFileError::SymbolicLink(path.to_owned()),
        Some(Errno::EISDIR | Errno::ENXIO) => PidFileError::NotAFile(path.to_owned()),
        _ => PidFileError::Unwritable { path: path.to_owned(), error },
    })
}

/// Whether the path still names this open file.
fn is_at(file: &File, path: &Path) -> bool {
    let id = |about: std::fs::Metadata| (about.dev(), about.ino());
    match (file.metadata(), std::fs::symlink_metadata(path)) {
        (Ok(open), Ok(named)) => id(open) == id(named),
        _ => false,
    }
}

fn pid_in(file: &mut File) -> Option<u32> {
    let mut text = String::new();
    file.rewind().ok()?;
    file.take(32).read_to_string(&mut text).ok()?;
    text.trim().parse().ok()
}

fn is_stock_server(pid: u32) -> bool {
    std::fs::read(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim_ascii_end() == b"fence_virtd")
}

#[cfg(test)]
mod tests {
    use super::*;
    use tempfile::tempdir;

    #[test]
    fn one_daemon_at_a_time() {
        let dir = tempdir().unwrap();
        let path = dir.path().join("x.pid");
        let first = PidFile::take(&path).unwrap();
        let pid = std::process::id();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), format!("{pid}\n"));
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o7777, 0o644);
        let second = PidFile::take(&path).unwrap_err();
        assert!(second.to_string().starts_with(&format!("already running as pid {pid} (")), "{second}");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), format!("{pid}\n"), "the loser leaves the file alone");
        drop(first);
        assert!(!path.exists());
        PidFile::take(&path).unwrap();
    }

    #[test]
    fn a_stale_file_is_taken_over_whatever_is_in_it() {
        let dir = tempdir().unwrap();
        let path = dir.path().join("x.pid");
        for stale in [&b"1\n"[..], b"", b"not a number", b"99999999999999999999", &[0xff; 5000]] {
            std::fs::write(&path, stale).unwrap();
            let taken = PidFile::take(&path).unwrap();
            assert_eq!(std::fs::read_to_string(&path).unwrap(), format!("{}\n", std::process::id()));
            drop(taken);
        }
    }

    #[test]
    fn links_and_other_files_are_refused_and_left_alone() {
        let dir = tempdir().unwrap();
        let (path, precious) = (dir.path().join("x.pid"), dir.path().join("precious"));
        std::fs::write(&precious, "precious").unwrap();
        std::os::unix::fs::symlink(&precious, &path).unwrap();
        assert!(matches!(PidFile::take(&path), Err(PidFileError::SymbolicLink(_))));
        std::fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink(dir.path().join("nowhere"), &path).unwrap();
        assert!(matches!(PidFile::take(&path), Err(PidFileError::SymbolicLink(_))));
        std::fs::remove_file(&path).unwrap();
        std::fs::hard_link(&precious, &path).unwrap();
        assert!(matches!(PidFile::take(&path), Err(PidFileError::NotAFile(_))));
        assert_eq!(std::fs::read_to_string(&precious).unwrap(), "precious");
        std::fs::remove_file(&path).unwrap();
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(matches!(PidFile::take(&path), Err(PidFileError::NotAFile(_))));
        assert!(matches!(PidFile::take(dir.path()), Err(PidFileError::NotAFile(_))));
        let missing = PidFile::take(&dir.path().join("missing/x.pid")).unwrap_err();
        assert!(matches!(missing, PidFileError::Unwritable { .. }), "{missing}");
    }

    #[test]
    fn a_file_of_another_user_is_refused() {
        if !nix::unistd::geteuid().is_root() {
            // Nobody else can give a file away.
            return;
        }
        let dir = tempdir().unwrap();
        let path = dir.path().join("x.pid");
        std::fs::write(&path, "1\n").unwrap();
        std::os::unix::fs::chown(&path, Some(12345), None).unwrap();
        assert!(matches!(PidFile::take(&path), Err(PidFileError::Foreign { uid: 12345, .. })));
    }

    #[test]
    fn a_file_that_is_no_longer_ours_stays() {
        let dir = tempdir().unwrap();
        let path = dir.path().join("x.pid");
        let taken = PidFile::take(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "somebody else's").unwrap();
        drop(taken);
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "somebody else's");
    }
}
