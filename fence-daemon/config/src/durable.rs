//! Files that are there whole or not at all: the configuration and the key, as `-c` and `keygen`
//! write them.
//!
//! The new content goes into a file of its own in the same directory, under a name that nobody can
//! guess and with mode 0600, then to the disk, and only then takes the old one's place in one step.
//! Whatever goes wrong before leaves the old file as it was.

use std::fs::{File, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::sys::signal::{SigSet, Signal};
use tempfile::{Builder, NamedTempFile};

/// Why a file is not written.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// It may not be overwritten.
    #[error("{} exists already", .0.display())]
    Exists(PathBuf),
    /// It would have no place.
    #[error("there is no directory {dir}: make it first (mkdir -p {dir})", dir = .0.display())]
    NoDirectory(PathBuf),
    /// A directory, a device or the like is in its place.
    #[error("{} is not a regular file: name another one", .0.display())]
    NotAFile(PathBuf),
    /// A symbolic link in its place leads nowhere.
    #[error("{} is a symbolic link that leads nowhere: remove it", .0.display())]
    LeadsNowhere(PathBuf),
    /// A symbolic link in its place may be a trap.
    #[error("{} is a symbolic link of the user with ID {uid}, who chooses what is overwritten: remove it", path.display())]
    ForeignLink {
        /// The link.
        path: PathBuf,
        /// Its owner.
        uid: u32,
    },
    /// The system refuses to read it.
    #[error("cannot read {}: {error}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        error: io::Error,
    },
    /// The system refuses to write it.
    #[error("cannot write {}: {error}; all is as it was{remedy}", path.display(), remedy = remedy(error))]
    Unwritable {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        error: io::Error,
    },
    /// It is written, but the directory's disk failed.
    #[error("{} is written, but may be lost if the power fails now: {error}", path.display())]
    Unsynced {
        /// The file.
        path: PathBuf,
        /// Why.
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

/// A file that grows beyond a limit is an error to be told from now on, and no reason to die
/// halfway and leave a half behind.
///
/// # Errors
/// The kernel refuses.
pub fn fail_instead_of_dying() -> io::Result<()> {
    [Signal::SIGXFSZ].into_iter().collect::<SigSet>().thread_block().map_err(io::Error::from)
}

/// A file to be written, found through symbolic links: a link stays, what it leads to is replaced.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The name that was given.
    pub named: PathBuf,
    /// The file itself.
    pub file: PathBuf,
    /// Whether it is there.
    pub exists: bool,
}

impl Place {
    /// Follows `path`.
    ///
    /// # Errors
    /// What is there is no file, or a symbolic link that should not be followed.
    pub fn find(path: &Path) -> Result<Self, FileError> {
        let unreadable = |error| FileError::Unreadable { path: path.to_owned(), error };
        let absent = Self { named: path.to_owned(), file: path.to_owned(), exists: false };
        let about = match path.symlink_metadata() {
            Ok(about) => about,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(absent),
            Err(error) => return Err(unreadable(error)),
        };
        let file = if about.is_symlink() {
            // In a directory where others may make links, following them is a way to have root
            // overwrite anything.
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

    /// Whether a symbolic link leads there.
    #[must_use]
    pub fn is_linked(&self) -> bool {
        self.named != self.file
    }

    /// The file's bytes, `limit` and one more of them at most; `None` where there is no file.
    ///
    /// # Errors
    /// It cannot be read.
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

    /// Puts a file with these bytes there, mode 0600, in the place of one that is there already.
    ///
    /// # Errors
    /// It cannot be written: nothing has changed then.
    pub fn replace(&self, bytes: &[u8]) -> Result<(), FileError> {
        let new = written(&self.file, bytes)?;
        let unwritable = |error| FileError::Unwritable { path: self.file.clone(), error };
        new.persist(&self.file).map_err(|error| unwritable(error.error))?;
        sync_directory(&self.file)
    }
}

/// Makes a file with these bytes, mode 0600. Never in the place of another one, nor of a symbolic
/// link.
///
/// # Errors
/// There is something of that name, or it cannot be written: nothing has changed then.
pub fn create(path: &Path, bytes: &[u8]) -> Result<(), FileError> {
    // Told before anything is written; what appears in the meantime is told below.
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

/// The content on the disk, under a name of its own beside `path`. Dropping it removes it.
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
    // Whatever the umask took away or left.
    new.as_file().set_permissions(Permissions::from_mode(0o600)).map_err(unwritable)?;
    new.as_file().sync_all().map_err(unwritable)?;
    Ok(new)
}

/// A new name is only safe from a power cut once its directory is on the disk.
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
        Place::find(&path).unwrap().replace(b"new").unwrap();
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
        // Nor of one that came in the meantime.
        let late = dir.path().join("late");
        let new = written(&late, b"ours").unwrap();
        std::fs::write(&late, "theirs").unwrap();
        assert!(matches!(take_free_place(new, &late), Err(FileError::Exists(_))));
        assert_eq!(std::fs::read(&late).unwrap(), b"theirs");
        std::fs::remove_file(&late).unwrap();
        // Not even of a link that leads nowhere, which O_CREAT alone would follow.
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
        let place = Place::find(&link).unwrap();
        assert!(place.is_linked() && place.exists);
        place.replace(b"new").unwrap();
        assert!(link.symlink_metadata().unwrap().is_symlink());
        assert_eq!((std::fs::read(&file).unwrap(), names(&dir)), (b"new".to_vec(), vec!["file".into(), "link".into()]));
    }

    #[test]
    fn what_is_no_file_is_left_alone() {
        let dir = tempdir().unwrap();
        symlink("nowhere", dir.path().join("link")).unwrap();
        assert!(matches!(Place::find(&dir.path().join("link")), Err(FileError::LeadsNowhere(_))));
        for path in [dir.path(), Path::new("/dev/null")] {
            assert!(matches!(Place::find(path), Err(FileError::NotAFile(_))), "{}", path.display());
        }
        // Unless this is root's there is no way to make another user's link.
        if nix::unistd::geteuid().is_root() {
            let theirs = dir.path().join("theirs");
            std::fs::write(dir.path().join("victim"), "x").unwrap();
            symlink("victim", &theirs).unwrap();
            std::os::unix::fs::lchown(&theirs, Some(12345), None).unwrap();
            assert!(matches!(Place::find(&theirs), Err(FileError::ForeignLink { uid: 12345, .. })));
        }
        let absent = Place::find(&dir.path().join("absent")).unwrap();
        assert_eq!((absent.exists, absent.read(10).unwrap()), (false, None));
    }

    #[test]
    fn a_bare_name_is_in_the_working_directory() {
        assert_eq!(directory(Path::new("f")), Path::new("."));
        assert_eq!(directory(Path::new("a/f")), Path::new("a"));
        assert_eq!(directory(Path::new("/f")), Path::new("/"));
    }
}
