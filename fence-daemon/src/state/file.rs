//! The files of the state directory: opened, locked, read and written only here.
//!
//! There are two kinds. A [`Locked`] file is written in place by the one daemon that holds its
//! lock. A whole file is written beside the old one and then replaces it in one step ([`replace`]).
//! So a reader finds the complete new file or the old one.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use rustix::fs::{FlockOperation, flock};

use super::open;

/// A file that only this daemon uses, as long as this value lives.
#[derive(Debug)]
pub struct Locked(File);

impl Locked {
    /// Opens the file `name` of `directory`, creates it if need be, and reads at most `limit`
    /// bytes.
    ///
    /// # Errors
    /// It is unsafe, cannot be opened, or another daemon has it.
    pub fn open(directory: &Path, name: &str, limit: usize) -> io::Result<(Self, Vec<u8>)> {
        let file = opened(directory, name)?;
        lock(&file)?.ok_or_else(|| io::Error::other("another daemon uses it"))?;
        let bytes = content(&file, limit)?;
        Ok((Self(file), bytes))
    }

    /// As [`Locked::open`], for a file that another file's lock protects.
    ///
    /// # Errors
    /// It is unsafe, or cannot be opened.
    pub fn open_beside(directory: &Path, name: &str, limit: usize) -> io::Result<(Self, Vec<u8>)> {
        let file = opened(directory, name)?;
        let bytes = content(&file, limit)?;
        Ok((Self(file), bytes))
    }

    /// Writes at an offset, in bytes from the file's beginning.
    ///
    /// # Errors
    /// The kernel refuses. Part of it may be written.
    pub fn write_at(&self, bytes: &[u8], at: usize) -> io::Result<()> {
        self.0.write_all_at(bytes, u64::try_from(at).map_err(io::Error::other)?)
    }

    /// Appends all of it or nothing. A file of `most` bytes starts again from empty.
    ///
    /// # Errors
    /// The kernel refuses; the file is as it was.
    pub fn append(&self, bytes: &[u8], most: u64) -> io::Result<()> {
        let mut len = self.0.metadata()?.len();
        if len >= most {
            self.0.set_len(0)?;
            len = 0;
        }
        // Half a record would shift all that follow.
        self.0.write_all_at(bytes, len).inspect_err(|_| drop(self.0.set_len(len)))
    }

    /// Cuts the file.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn truncate(&self, len: usize) -> io::Result<()> {
        self.0.set_len(u64::try_from(len).map_err(io::Error::other)?)
    }
}

fn opened(directory: &Path, name: &str) -> io::Result<File> {
    let mut options = OpenOptions::new();
    Ok(open(directory, name, options.read(true).write(true).create(true).truncate(false))?)
}

fn content(file: &File, limit: usize) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.take(u64::try_from(limit).unwrap_or(u64::MAX)).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Locks a file, or a directory; `None` if another process has it.
fn lock(file: &File) -> io::Result<Option<()>> {
    match flock(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(())),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Opens and locks the directory itself; `None` if another daemon has it.
///
/// # Errors
/// It is unsafe, or cannot be opened.
pub fn lock_directory(directory: &Path) -> Result<Option<Locked>, super::StateError> {
    let file = super::directory(directory)?;
    let locked = lock(&file).map_err(super::StateError::kernel("lock", directory))?;
    Ok(locked.map(|()| Locked(file)))
}

/// Reads a whole file, of which at most `limit` bytes count.
///
/// # Errors
/// It is unsafe, not there, or cannot be read.
pub fn read(directory: &Path, name: &str, limit: usize) -> io::Result<Vec<u8>> {
    content(&open(directory, name, File::options().read(true))?, limit)
}

/// Replaces a file. The lock on the new one lasts as long as the returned value.
///
/// # Errors
/// It cannot be written; the old one is still there.
pub fn replace(directory: &Path, name: &str, bytes: &[u8]) -> io::Result<Locked> {
    let draft_name = format!("{name}.draft");
    let (path, draft) = (directory.join(name), directory.join(&draft_name));
    let _ = fs::remove_file(&draft);
    let file = open(directory, &draft_name, File::options().write(true).create_new(true))?;
    let fill = || -> io::Result<()> {
        lock(&file)?.ok_or_else(|| io::Error::other("another daemon uses it"))?;
        (&file).write_all(bytes)?;
        fs::rename(&draft, &path)
    };
    // A partial file may hold a password, and may take the last room on the disk.
    fill().inspect_err(|_| drop(fs::remove_file(&draft)))?;
    Ok(Locked(file))
}

/// A file that another daemon has left.
#[derive(Debug)]
pub struct LeftFile {
    /// Its lock, which is ours now.
    pub lock: Locked,
    /// Its first bytes.
    pub bytes: Vec<u8>,
    /// When it was written, by the wall clock.
    pub written: SystemTime,
}

/// Takes over a file that a dead daemon has left; `None` if its daemon lives.
///
/// # Errors
/// It is unsafe, or cannot be read.
pub fn take_over(directory: &Path, name: &str, limit: usize) -> io::Result<Option<LeftFile>> {
    let file = open(directory, name, File::options().read(true))?;
    let Some(()) = lock(&file)? else { return Ok(None) };
    let (bytes, written) = (content(&file, limit)?, file.metadata()?.modified()?);
    Ok(Some(LeftFile { lock: Locked(file), bytes, written }))
}

/// The names of the directory's files with this ending; none if there is no directory.
#[must_use]
pub fn names(directory: &Path, ending: &str) -> Vec<String> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    names.filter(|name| Path::new(name).extension().is_some_and(|extension| extension == ending)).collect()
}

/// Removes a file.
///
/// # Errors
/// The kernel refuses.
pub fn remove(directory: &Path, name: &str) -> io::Result<()> {
    fs::remove_file(directory.join(name))
}

/// Where a file is, for messages.
#[must_use]
pub fn path(directory: &Path, name: &str) -> PathBuf {
    directory.join(name)
}

#[cfg(test)]
mod tests {
    use tempfile::tempdir;

    use super::*;

    #[test]
    fn a_locked_file_is_one_daemons() {
        let dir = tempdir().unwrap();
        let (one, found) = Locked::open(dir.path(), "claims", 100).unwrap();
        assert_eq!(found, b"");
        assert!(Locked::open(dir.path(), "claims", 100).is_err());
        one.append(b"12345", 10).unwrap();
        one.append(b"67890", 10).unwrap();
        assert_eq!(read(dir.path(), "claims", 100).unwrap(), b"1234567890");
        one.append(b"abc", 10).unwrap();
        one.write_at(b"X", 1).unwrap();
        assert_eq!(read(dir.path(), "claims", 100).unwrap(), b"aXc");
        one.truncate(2).unwrap();
        drop(one);
        assert_eq!(Locked::open(dir.path(), "claims", 100).unwrap().1, b"aX");
        assert_eq!(Locked::open(dir.path(), "claims", 1).unwrap().1, b"a");
    }

    #[test]
    fn a_whole_file_is_the_old_one_or_the_new_one() {
        let dir = tempdir().unwrap();
        assert_eq!(read(dir.path(), "x", 9).unwrap_err().kind(), io::ErrorKind::NotFound);
        drop(replace(dir.path(), "x", b"old").unwrap());
        let held = replace(dir.path(), "x", b"new").unwrap();
        assert_eq!(read(dir.path(), "x", 9).unwrap(), b"new");
        assert!(take_over(dir.path(), "x", 9).unwrap().is_none(), "its daemon lives");
        drop(held);
        let left = take_over(dir.path(), "x", 9).unwrap().unwrap();
        assert_eq!(left.bytes, b"new");
        drop(replace(dir.path(), "a.restart", b"").unwrap());
        assert_eq!((names(dir.path(), "restart"), names(dir.path(), "draft")), (vec!["a.restart".to_owned()], vec![]));
        remove(dir.path(), "a.restart").unwrap();
        assert!(names(dir.path(), "restart").is_empty() && names(Path::new("/no/such"), "restart").is_empty());
    }
}
