//! The files of the state directory: opened, locked, read and written only here.
//!
//! There are three kinds. A [`Locked`] file is written in place by the one daemon that holds its
//! lock. A [`LineFile`] file grows until it is full, and then makes room for a new one. A whole
//! file is written beside the old one and then replaces it in one step ([`replace`]). So a reader
//! finds the complete new file or the old one.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use rustix::fs::{FlockOperation, flock};

use super::open;

/// How much of a file of lines is read at the start, in bytes: some hundred requests.
const TAIL: usize = 256 << 10;

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
        let file = locked(directory, name)?;
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

/// A file of lines, and the one before.
#[derive(Debug)]
pub struct LineFile {
    directory: PathBuf,
    name: &'static str,
    old_name: &'static str,
    most: u64,
    file: File,
    len: u64,
}

impl LineFile {
    /// Opens the file `name` of `directory`, creates it if need be, and reads its last lines, also
    /// of `old_name` if it has few. It is full at `most` bytes.
    ///
    /// # Errors
    /// It is unsafe, cannot be opened, or another daemon has it.
    pub fn open(
        directory: &Path,
        name: &'static str,
        old_name: &'static str,
        most: u64,
    ) -> io::Result<(Self, Vec<u8>)> {
        let file = locked_name(directory, name)?;
        let mut bytes = tail(&file)?;
        let mut lines =
            Self { directory: directory.to_owned(), name, old_name, most, len: file.metadata()?.len(), file };
        if bytes.last().is_some_and(|last| *last != b'\n') {
            // A host died in the middle of a line.
            lines.append(b"\n")?;
        }
        if bytes.len() < TAIL {
            let old = open(directory, old_name, File::options().read(true));
            let mut old = old.map_err(io::Error::from).and_then(|old| tail(&old)).unwrap_or_default();
            old.append(&mut bytes);
            bytes = old;
        }
        Ok((lines, bytes))
    }

    /// Appends all of it or nothing. A file that somebody has removed is made again.
    ///
    /// # Errors
    /// The kernel refuses; the file is as it was.
    pub fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        let more = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        if self.len > 0 && self.len.saturating_add(more) > self.most {
            match fs::rename(self.directory.join(self.name), self.directory.join(self.old_name)) {
                // The attempt before may have come this far only.
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                Ok(()) | Err(_) => self.renew()?,
            }
        } else if self.file.metadata()?.nlink() == 0 {
            self.renew()?;
        }
        self.file.write_all_at(bytes, self.len).inspect_err(|_| drop(self.file.set_len(self.len)))?;
        self.len = self.len.saturating_add(more);
        Ok(())
    }

    /// Goes on in the file of this name, which it makes.
    fn renew(&mut self) -> io::Result<()> {
        let file = locked_name(&self.directory, self.name)?;
        self.len = file.metadata()?.len();
        self.file = file;
        Ok(())
    }

    /// Waits until all of it is on the disk.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }
}

/// Opens a file that is to be this daemon's alone.
fn locked(directory: &Path, name: &str) -> io::Result<File> {
    let file = opened(directory, name)?;
    lock(&file)?.ok_or_else(|| io::Error::other("another daemon uses it"))?;
    Ok(file)
}

/// Opens such a file, whose name is on the disk before its first line.
fn locked_name(directory: &Path, name: &str) -> io::Result<File> {
    let file = locked(directory, name)?;
    super::directory(directory)?.sync_all()?;
    Ok(file)
}

fn opened(directory: &Path, name: &str) -> io::Result<File> {
    let mut options = OpenOptions::new();
    Ok(open(directory, name, options.read(true).write(true).create(true).truncate(false))?)
}

/// The last bytes of a file.
fn tail(file: &File) -> io::Result<Vec<u8>> {
    let len = file.metadata()?.len();
    let from = len.saturating_sub(u64::try_from(TAIL).unwrap_or(u64::MAX));
    let mut bytes = vec![0; usize::try_from(len - from).unwrap_or(TAIL)];
    file.read_exact_at(&mut bytes, from)?;
    Ok(bytes)
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
    fn a_full_file_of_lines_makes_room_and_is_kept_once() {
        let dir = tempdir().unwrap();
        let open = || LineFile::open(dir.path(), "history", "history.1", 10);
        let (mut lines, found) = open().unwrap();
        assert!(found.is_empty() && open().is_err(), "two daemons share one file");
        for line in [b"1234\n", b"5678\n", b"abcd\n"] {
            lines.append(line).unwrap();
        }
        lines.sync().unwrap();
        let text = |name: &str| fs::read_to_string(dir.path().join(name)).unwrap();
        assert_eq!((text("history.1"), text("history")), ("1234\n5678\n".into(), "abcd\n".into()));
        assert!(open().is_err(), "the new file is not locked");
        lines.append(b"efgh\n").unwrap();
        lines.append(b"half").unwrap();
        assert_eq!((text("history.1"), text("history")), ("abcd\nefgh\n".into(), "half".into()));
        drop(lines);
        // What follows a line that was cut off is a line of its own.
        let (mut lines, found) = open().unwrap();
        assert_eq!(found, b"abcd\nefgh\nhalf");
        lines.append(b"more\n").unwrap();
        assert_eq!(text("history"), "half\nmore\n");
        drop(lines);
        fs::write(dir.path().join("history"), "").unwrap();
        assert_eq!(open().unwrap().1, b"abcd\nefgh\n", "numbers would begin again");
    }

    #[test]
    fn a_file_of_lines_that_is_gone_is_made_again() {
        let dir = tempdir().unwrap();
        let file = dir.path().join("history");
        let (mut lines, _) = LineFile::open(dir.path(), "history", "history.1", 10).unwrap();
        lines.append(b"1234\n").unwrap();
        fs::remove_file(&file).unwrap();
        lines.append(b"5678\n").unwrap();
        assert_eq!(fs::read(&file).unwrap(), b"5678\n");
        // It is full, and the move to the other name has happened in an attempt that then failed.
        lines.append(b"abcd\n").unwrap();
        fs::rename(&file, dir.path().join("history.1")).unwrap();
        lines.append(b"efgh\n").unwrap();
        assert_eq!(fs::read(&file).unwrap(), b"efgh\n");
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
