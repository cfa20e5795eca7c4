//! Atomic writes of the configuration and the key, for `-c` and `keygen`: a file is complete or
//! unchanged.
//!
//! The new content goes into a temporary file in the same directory, with an unguessable name and
//! mode 0600. It is synced to the disk, and then renamed over the old file. A failure before that
//! leaves the old file unchanged.

use std::fs::{File, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::sys::signal::{SigSet, Signal};
use tempfile::{Builder, NamedTempFile};

/// Why a file was not written.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The file exists and may not be overwritten.
    #[error("{} exists already", .0.display())]
    Exists(PathBuf),
    /// The directory is missing.
    #[error("there is no directory {dir}: make it first (mkdir -p {dir})", dir = .0.display())]
    NoDirectory(PathBuf),
    /// The path leads to a directory, a device or the like.
    #[error("{} is not a regular file: name another one", .0.display())]
    NotAFile(PathBuf),
    /// A dangling symbolic link is in the way.
    #[error("{} is a symbolic link that leads nowhere: remove it", .0.display())]
    LeadsNowhere(PathBuf),
    /// Another user's symbolic link is in the way: it may be a trap.
    #[error("{} is a symbolic link of the user with ID {uid}, who chooses what is overwritten: remove it", path.display())]
    ForeignLink {
        /// The link.
        path: PathBuf,
        /// Its owner.
        uid: u32,
    },
    /// The file cannot be read.
    #[error("cannot read {}: {error}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The system's error.
        #[source]
        error: io::Error,
    },
    /// The file cannot be written.
    #[error("cannot write {}: {error}; all is as it was{remedy}", path.display(), remedy = remedy(error))]
    Unwritable {
        /// The file.
        path: PathBuf,
        /// The system's error.
        #[source]
        error: io::Error,
    },
    /// The file is written, but its directory could not be synced.
    #[error("{} is written, but may be lost if the power fails now: {error}", path.display())]
    Unsynced {
        /// The file.
        path: PathBuf,
        /// The system's error.
        #[source]
        error: io::Error,
    },
}

fn remedy(error: &io::Error) -> &'static str {
    let kind = error.kind();
    if kind == io::ErrorKind::PermissionDenied {
        " (run it as root)"
    } else if matches!(kind, io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) {
        " (make room on that disk)"
    } else {
        ""
    }
}

/// Makes a write beyond the file size limit fail with an error. By default the signal SIGXFSZ ends
/// the process halfway.
///
/// # Errors
/// The kernel refuses.
pub fn fail_instead_of_dying() -> io::Result<()> {
    [Signal::SIGXFSZ].into_iter().collect::<SigSet>().thread_block().map_err(io::Error::from)
}

/// Where to write a file: symbolic links stay, and the file that they lead to is replaced.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Destination {
    /// The path as given.
    pub named: PathBuf,
    /// The file that the path leads to.
    pub file: PathBuf,
    /// Whether the file exists.
    pub exists: bool,
}

impl Destination {
    /// Follows `path`.
    ///
    /// # Errors
    /// The path leads to something other than a file, or over a symbolic link that must not be
    /// followed.
    pub fn find(path: &Path) -> Result<Self, FileError> {
        let unreadable = |error| FileError::Unreadable { path: path.to_owned(), error };
        let absent = Self { named: path.to_owned(), file: path.to_owned(), exists: false };
        let about = match path.symlink_metadata() {
            Ok(about) => about,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(absent),
            Err(error) => return Err(unreadable(error)),
        };
        let file = if about.is_symlink() {
            // Another user's link could make root overwrite any file.
            if about.uid() != 0 && about.uid() != nix::unistd::geteuid().as_raw() {
                return Err(FileError::ForeignLink { path: path.to_owned(), uid: about.uid() });
            }
            match path.canonicalize() {
                Ok(file) => file,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    return Err(FileError::LeadsNowhere(path.to_owned()));
                }
                Err(error) => return Err(unreadable(error)),
            }
        } else {
            path.to_owned()
        };
        if !file.metadata().map_err(unreadable)?.is_file() {
            return Err(FileError::NotAFile(path.to_owned()));
        }
        Ok(Self { file, exists: true, ..absent })
    }

    /// Whether the path is a symbolic link.
    #[must_use]
    pub fn is_linked(&self) -> bool {
        self.named != self.file
    }

    /// The file's bytes, at most `limit` and one more; `None` if there is no file.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn read(&self, limit: usize) -> Result<Option<Vec<u8>>, FileError> {
        let unreadable = |error| FileError::Unreadable { path: self.file.clone(), error };
        let file = match File::open(&self.file) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(unreadable(error)),
        };
        let mut bytes = Vec::new();
        let limit = u64::try_from(limit).unwrap_or(u64::MAX).saturating_add(1);
        file.take(limit).read_to_end(&mut bytes).map_err(unreadable)?;
        Ok(Some(bytes))
    }

    /// Writes a file with these bytes and mode 0600 in place of an existing one.
    ///
    /// # Errors
    /// The file cannot be written, and nothing has changed.
    pub fn replace(&self, bytes: &[u8]) -> Result<(), FileError> {
        let new = written(&self.file, bytes)?;
        let unwritable = |error| FileError::Unwritable { path: self.file.clone(), error };
        new.persist(&self.file).map_err(|error| unwritable(error.error))?;
        sync_directory(&self.file)
    }
}

/// Creates a file with these bytes and mode 0600. Replaces neither a file nor a symbolic link.
///
/// # Errors
/// The name is taken, or the file cannot be written; nothing has changed.
pub fn create(path: &Path, bytes: &[u8]) -> Result<(), FileError> {
    // Checked before anything is written. The rename below catches a file that appears meanwhile.
    if path.symlink_metadata().is_ok() {
        return Err(FileError::Exists(path.to_owned()));
    }
    take_free_place(written(path, bytes)?, path)
}

fn take_free_place(new: NamedTempFile, path: &Path) -> Result<(), FileError> {
    new.persist_noclobber(path).map_err(|error| {
        let (path, error) = (path.to_owned(), error.error);
        let exists = error.kind() == io::ErrorKind::AlreadyExists;
        if exists { FileError::Exists(path) } else { FileError::Unwritable { path, error } }
    })?;
    sync_directory(path)
}

/// The directory of a file; `.` for a bare name.
#[must_use]
pub fn directory(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
        Some(parent) => parent,
        None => Path::new("/"),
    }
}

/// Writes the content to a temporary file beside `path` and syncs it. Dropping it removes the file.
fn written(path: &Path, bytes: &[u8]) -> Result<NamedTempFile, FileError> {
    let unwritable = |error| FileError::Unwritable { path: path.to_owned(), error };
    let dir = directory(path);
    if !dir.exists() {
        return Err(FileError::NoDirectory(dir.to_owned()));
    }
    let mut builder = Builder::new();
    builder.prefix(".fence-daemon-").rand_bytes(12);
    let mut new = builder.tempfile_in(dir).map_err(unwritable)?;
    new.write_all(bytes).map_err(unwritable)?;
    // Independent of the umask.
    new.as_file().set_permissions(Permissions::from_mode(0o600)).map_err(unwritable)?;
    new.as_file().sync_all().map_err(unwritable)?;
    Ok(new)
}

/// A new name survives a power cut only once its directory is synced.
fn sync_directory(path: &Path) -> Result<(), FileError> {
    let synced = File::open(directory(path)).and_then(|dir| dir.sync_all());
    synced.map_err(|error| FileError::Unsynced { path: path.to_owned(), error })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;
    use tempfile::{TempDir, tempdir};

    fn names(dir: &TempDir) -> Vec<String> {
        let entries = std::fs::read_dir(dir.path()).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    fn mode(path: &Path) -> u32 {
        path.metadata().unwrap().mode() & 0o7777
    }

    #[test]
    fn a_file_is_replaced_whole_and_nothing_stays_beside_it() {
        let dir = tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, "old and long").unwrap();
        std::fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
        let before = path.metadata().unwrap().ino();
        Destination::find(&path).unwrap().replace(b"new").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"new");
        assert_eq!((mode(&path), names(&dir)), (0o600, vec!["f".to_owned()]));
        assert_ne!(path.metadata().unwrap().ino(), before, "written in place: a reader could see half of it");
    }

    #[test]
    fn a_new_file_takes_nobodys_place() {
        let dir = tempdir().unwrap();
        let path = dir.path().join("f");
        create(&path, b"one").unwrap();
        assert!(matches!(create(&path, b"two"), Err(FileError::Exists(_))));
        assert_eq!((std::fs::read(&path).unwrap(), mode(&path)), (b"one".to_vec(), 0o600));
        // Nor that of a file that appears meanwhile.
        let late = dir.path().join("late");
        let new = written(&late, b"ours").unwrap();
        std::fs::write(&late, "theirs").unwrap();
        assert!(matches!(take_free_place(new, &late), Err(FileError::Exists(_))));
        assert_eq!(std::fs::read(&late).unwrap(), b"theirs");
        std::fs::remove_file(&late).unwrap();
        // Nor that of a dangling link, which O_CREAT alone would follow.
        symlink(dir.path().join("elsewhere"), dir.path().join("link")).unwrap();
        assert!(matches!(create(&dir.path().join("link"), b"x"), Err(FileError::Exists(_))));
        assert_eq!(names(&dir), ["f", "link"]);
        let nowhere = create(&dir.path().join("no/f"), b"x").unwrap_err();
        assert!(nowhere.to_string().contains("mkdir -p "), "{nowhere}");
    }

    #[test]
    fn a_link_stays_and_what_it_leads_to_is_replaced() {
        let dir = tempdir().unwrap();
        let (file, link) = (dir.path().join("file"), dir.path().join("link"));
        std::fs::write(&file, "old").unwrap();
        symlink("file", &link).unwrap();
        let place = Destination::find(&link).unwrap();
        assert!(place.is_linked() && place.exists);
        place.replace(b"new").unwrap();
        assert!(link.symlink_metadata().unwrap().is_symlink());
        assert_eq!((std::fs::read(&file).unwrap(), names(&dir)), (b"new".to_vec(), vec!["file".into(), "link".into()]));
    }

    #[test]
    fn only_a_regular_file_is_a_destination() {
        let dir = tempdir().unwrap();
        symlink("nowhere", dir.path().join("link")).unwrap();
        assert!(matches!(Destination::find(&dir.path().join("link")), Err(FileError::LeadsNowhere(_))));
        for path in [dir.path(), Path::new("/dev/null")] {
            assert!(matches!(Destination::find(path), Err(FileError::NotAFile(_))), "{}", path.display());
        }
        // Only root can make another user's link.
        if nix::unistd::geteuid().is_root() {
            let theirs = dir.path().join("theirs");
            std::fs::write(dir.path().join("victim"), "x").unwrap();
            symlink("victim", &theirs).unwrap();
            std::os::unix::fs::lchown(&theirs, Some(12345), None).unwrap();
            assert!(matches!(Destination::find(&theirs), Err(FileError::ForeignLink { uid: 12345, .. })));
        }
        let absent = Destination::find(&dir.path().join("absent")).unwrap();
        assert_eq!((absent.exists, absent.read(10).unwrap()), (false, None));
    }

    #[test]
    fn a_bare_name_is_in_the_working_directory() {
        assert_eq!(directory(Path::new("f")), Path::new("."));
        assert_eq!(directory(Path::new("a/f")), Path::new("a"));
        assert_eq!(directory(Path::new("/f")), Path::new("/"));
    }
}
