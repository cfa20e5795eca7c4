//! The control socket's file in the state directory. Its lock, the directory's, says whether a socket that is found is a dead daemon's.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use super::StateError;
use super::file::{Locked, lock_directory};

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// The administrator's: another daemon has the same state directory.
    #[error("another daemon has its control socket in {}: give each daemon a `state_directory` of its own", .0.display())]
    Living(PathBuf),
    /// Somebody's: what is in the place of the socket is none, and is not ours to remove.
    #[error("{} is no socket: remove it, or choose another `state_directory`", .0.display())]
    NotASocket(PathBuf),
    /// Others could put a socket of theirs there, or the directory or the socket cannot be had.
    #[error(transparent)]
    State(#[from] StateError),
}

/// A socket's file, as long as it is kept. The file goes with it.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    /// Device and number of the socket's file: what another one has put there stays.
    made: (u64, u64),
    /// Whoever finds it free may remove what a dead daemon has left.
    _directory: Locked,
}

impl SocketFile {
    /// Makes a socket at `path`, in `directory`, for its owner alone. The directory is made if need be.
    ///
    /// # Errors
    /// See [`SocketError`].
    pub fn bind(directory: &Path, path: &Path) -> Result<(Self, UnixListener), SocketError> {
        let lock = lock_directory(directory)?.ok_or_else(|| SocketError::Living(directory.to_owned()))?;
        let failed = |what| StateError::kernel(what, path);
        match fs::symlink_metadata(path) {
            Ok(about) if !about.file_type().is_socket() => return Err(SocketError::NotASocket(path.to_owned())),
            // A dead daemon's: a living one would have the lock.
            Ok(_) => fs::remove_file(path).map_err(failed("remove"))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed("look at")(error).into()),
        }
        let listener = UnixListener::bind(path).map_err(failed("make the control socket"))?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(failed("keep others from"))?;
        let about = fs::symlink_metadata(path).map_err(failed("look at"))?;
        listener.set_nonblocking(true).map_err(failed("watch"))?;
        let made = (about.dev(), about.ino());
        Ok((Self { path: path.to_owned(), made, _directory: lock }, listener))
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if fs::symlink_metadata(&self.path).is_ok_and(|about| (about.dev(), about.ino()) == self.made) {
            // A file that stays is taken for a dead daemon's, which is right.
            let _ = fs::remove_file(&self.path);
        }
    }
}
