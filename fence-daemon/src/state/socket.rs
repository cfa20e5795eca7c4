//! The files of the daemon's own UNIX sockets.
//!
//! The control socket is in the state directory, whose lock shows whether an existing socket is a
//! dead daemon's. The socket of the metrics is where the configuration says. Whether its daemon
//! lives, a connection shows.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect};

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
    directory_lock: Option<Locked>,
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
        let (mut file, listener) = Self::made(path, 0o600).map_err(failed("make the control socket"))?;
        file.directory_lock = Some(lock);
        Ok((file, listener))
    }

    /// Creates a socket at `path` for everybody who may enter its directory. Replaces a socket of
    /// root's, or of the daemon's own user, that nobody listens at any more.
    ///
    /// # Errors
    /// Something else is there, or the kernel refuses.
    pub fn bind_for_all(path: &Path) -> io::Result<(Self, UnixListener)> {
        match fs::symlink_metadata(path) {
            Ok(about) if !about.file_type().is_socket() => {
                return Err(io::Error::other("something that is no socket is there: remove it"));
            }
            Ok(about) if !super::is_trusted(about.uid()) => {
                return Err(io::Error::other("another user's socket is there: remove it"));
            }
            Ok(_) if is_deserted(path)? => fs::remove_file(path)?,
            Ok(_) => return Err(io::ErrorKind::AddrInUse.into()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        Self::made(path, 0o666)
    }

    fn made(path: &Path, mode: u32) -> io::Result<(Self, UnixListener)> {
        let listener = UnixListener::bind(path)?;
        fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
        let about = fs::symlink_metadata(path)?;
        listener.set_nonblocking(true)?;
        Ok((Self { path: path.to_owned(), made: (about.dev(), about.ino()), directory_lock: None }, listener))
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

/// Whether nobody listens at a socket. Does not wait for the listener.
fn is_deserted(path: &Path) -> io::Result<bool> {
    let (kind, flags) = (SocketType::STREAM, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK);
    let socket = rustix::net::socket_with(AddressFamily::UNIX, kind, flags, None)?;
    Ok(connect(&socket, &SocketAddrUnix::new(path)?) == Err(Errno::CONNREFUSED))
}

#[cfg(test)]
mod tests {
    use tempfile::tempdir;

    use super::*;

    #[test]
    fn a_dead_ones_socket_is_replaced_and_nothing_else_is() {
        let scratch = tempdir().unwrap();
        let path = scratch.path().join("m.sock");
        let (file, listener) = SocketFile::bind_for_all(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o666);
        assert_eq!(SocketFile::bind_for_all(&path).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        drop(file);
        assert!(!path.exists());
        drop(listener);
        drop(UnixListener::bind(&path).unwrap());
        drop(SocketFile::bind_for_all(&path).unwrap());
        fs::write(&path, "precious").unwrap();
        assert!(SocketFile::bind_for_all(&path).unwrap_err().to_string().contains("no socket"));
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }
}
