//! The control socket's file in the state directory. The directory's lock shows whether an existing
//! socket belongs to a dead daemon.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use super::StateError;
use super::file::{Locked, lock_directory};

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
pub enum ControlSocketError {
    /// The administrator's: another daemon has the same state directory.
    #[error("another daemon has its control socket in {}: give each daemon a `state_directory` of its own", .0.display())]
    Living(PathBuf),
    /// The path names something other than a socket, which is not ours to remove.
    #[error("{} is no socket: remove it, or choose another `state_directory`", .0.display())]
    NotASocket(PathBuf),
    /// Others could put their own socket there, or the directory or the socket cannot be created.
    #[error(transparent)]
    State(#[from] StateError),
}

/// A socket's file. Dropping this value removes it.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    /// Device and inode of the socket's file: another process's file stays.
    made: (u64, u64),
    /// The directory's lock: its holder may remove a dead daemon's socket.
    _directory: Locked,
}

impl SocketFile {
    /// Creates a socket at `path`, in `directory`, for its owner alone. Creates the directory if
    /// need be.
    ///
    /// # Errors
    /// See [`ControlSocketError`].
    pub fn bind(directory: &Path, path: &Path) -> Result<(Self, UnixListener), ControlSocketError> {
        let lock = lock_directory(directory)?.ok_or_else(|| ControlSocketError::Living(directory.to_owned()))?;
        let failed = |what| StateError::kernel(what, path);
        match fs::symlink_metadata(path) {
            Ok(about) if !about.file_type().is_socket() => return Err(ControlSocketError::NotASocket(path.to_owned())),
            // A dead daemon's: a living one would hold the lock.
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
            // A leftover file counts as a dead daemon's, which is right.
            let _ = fs::remove_file(&self.path);
        }
    }
}
