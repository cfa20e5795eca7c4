//! Reads a file that another process may be writing: all of it, or nothing.
//!
//! A half-written key looks like any other key, but no other host has it. So a file counts only
//! when no process has it open for writing. The kernel proves this by granting a lease. Where it
//! grants none (network file systems, another user's file), the file must stay the same for a
//! moment.

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::Duration;

use fence_common::wire::KEY_MAX;
use nix::fcntl::OFlag;
use nix::libc;
use zeroize::Zeroizing;

/// The pause before an unsettled file is read again.
const AGAIN: Duration = Duration::from_millis(100);
/// The most attempts. After them the daemon no longer waits for the writer.
const LOOKS: u32 = 20;

/// The beginning of a file, at most as many bytes as a key has.
pub(super) struct FileBytes {
    /// On the heap: a moved value leaves copies on the stack.
    bytes: Zeroizing<Vec<u8>>,
    len: usize,
    /// The file's metadata.
    pub(super) about: Metadata,
}

impl FileBytes {
    pub(super) fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }
}

/// The result of an attempt to read.
pub(super) enum Reading {
    /// The path leads to no regular file.
    NotAFile,
    /// A process writes the file and did not finish.
    Unsettled,
    /// The whole file, as one writer left it.
    Settled(Box<FileBytes>),
}

/// Reads a file while no process writes it. Waits a little for a writer.
///
/// # Errors
/// The file cannot be opened or read.
pub(super) fn read(path: &Path) -> io::Result<Reading> {
    let mut before: Option<FileBytes> = None;
    for look in 0..LOOKS {
        if look > 0 {
            std::thread::sleep(AGAIN);
        }
        // Opened each time: a writer that replaces the file makes another one of the same
        // name.
        let file = open(path)?;
        if !file.metadata()?.is_file() {
            return Ok(Reading::NotAFile);
        }
        let writers = Writers::of(&file);
        if writers == Writers::Some {
            before = None;
            continue;
        }
        let Some(contents) = read_once(&file)? else { continue };
        let same = |earlier: &FileBytes| {
            stamp(&earlier.about) == stamp(&contents.about) && earlier.bytes() == contents.bytes()
        };
        if writers == Writers::None || before.as_ref().is_some_and(same) {
            return Ok(Reading::Settled(Box::new(contents)));
        }
        before = Some(contents);
    }
    Ok(Reading::Unsettled)
}

fn open(path: &Path) -> io::Result<File> {
    // Without O_NONBLOCK a FIFO in the key's place would block the start.
    let flags = OFlag::O_NONBLOCK | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
    OpenOptions::new().read(true).custom_flags(flags.bits()).open(path)
}

/// Reads the beginning of a file. `None` if the file changed meanwhile.
fn read_once(mut file: &File) -> io::Result<Option<FileBytes>> {
    let about = file.metadata()?;
    // Allocated at its final size: a buffer that grows leaves copies behind.
    let mut bytes = Zeroizing::new(vec![0; KEY_MAX]);
    let mut len = 0_usize;
    while let Some(rest) = bytes.get_mut(len..).filter(|rest| !rest.is_empty()) {
        match file.read(rest) {
            Ok(0) => break,
            Ok(read) => len = len.saturating_add(read),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    let whole = usize::try_from(about.len()).is_ok_and(|size| size.min(KEY_MAX) == len);
    let same = stamp(&about) == stamp(&file.metadata()?);
    Ok((whole && same).then_some(FileBytes { bytes, len, about }))
}

/// What changes when a file is replaced or written to.
fn stamp(about: &Metadata) -> (u64, u64, u64, i64, i64, i64, i64) {
    let written = (about.mtime(), about.mtime_nsec(), about.ctime(), about.ctime_nsec());
    (about.dev(), about.ino(), about.len(), written.0, written.1, written.2, written.3)
}

/// Whether any process has a file open for writing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Writers {
    None,
    Some,
    /// The kernel does not say.
    Unknown,
}

/// The number of `F_SETSIG`, which the `libc` crate does not have for every C library.
const F_SETSIG: libc::c_int = 10;

impl Writers {
    /// After [`Writers::None`] the kernel makes writers wait as long as the file is open here.
    fn of(file: &impl AsFd) -> Self {
        let fd = file.as_fd().as_raw_fd();
        // The kernel announces a waiting writer by a signal. The default, SIGIO, would end the
        // process; SIGURG is ignored unless a handler is set.
        // SAFETY: needed because no safe wrapper knows these commands. Sound because the descriptor
        // is open for as long as `file` is borrowed, and the command takes a number and touches no
        // memory.
        if unsafe { libc::fcntl(fd, F_SETSIG, libc::SIGURG) } < 0 {
            return Self::Unknown;
        }
        // SAFETY: as above.
        if unsafe { libc::fcntl(fd, libc::F_SETLEASE, libc::F_RDLCK) } == 0 {
            return Self::None;
        }
        match io::Error::last_os_error().raw_os_error() {
            Some(libc::EAGAIN) => Self::Some,
            // The file system or the process's rights allow no lease.
            _ => Self::Unknown,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::os::unix::fs::FileExt;

    use super::*;
    use tempfile::tempdir;

    fn settled(path: &Path) -> Option<Vec<u8>> {
        match read(path).unwrap() {
            Reading::Settled(contents) => Some(contents.bytes().to_vec()),
            Reading::Unsettled => None,
            Reading::NotAFile => panic!("it is one"),
        }
    }

    #[test]
    fn a_file_that_is_being_written_is_waited_for_or_left_alone() {
        let dir = tempdir().unwrap();
        let path = dir.path().join("key");
        let mut writer = File::create(&path).unwrap();
        writer.write_all(b"the first half").unwrap();
        assert_eq!(settled(&path), None, "half of it was taken");
        let writing = std::thread::spawn(move || {
            std::thread::sleep(3 * AGAIN);
            writer.write_all(b" and the second one").unwrap();
        });
        assert_eq!(settled(&path).as_deref(), Some(&b"the first half and the second one"[..]));
        writing.join().unwrap();
    }

    #[test]
    fn a_file_that_is_replaced_is_the_old_one_or_the_new_one() {
        let dir = tempdir().unwrap();
        let (path, other) = (dir.path().join("key"), dir.path().join("other"));
        std::fs::write(&path, [1; 2000]).unwrap();
        let replacing = std::thread::spawn({
            let path = path.clone();
            move || {
                for round in 0..200_u8 {
                    std::fs::write(&other, vec![round; 100 + usize::from(round)]).unwrap();
                    std::fs::rename(&other, &path).unwrap();
                }
            }
        });
        while !replacing.is_finished() {
            let found = settled(&path).unwrap();
            let expected = if found.len() == 2000 { 2000 } else { 100 + usize::from(found[0]) };
            assert!(found.len() == expected && found.iter().all(|byte| *byte == found[0]), "{} bytes", found.len());
        }
        replacing.join().unwrap();
    }

    #[test]
    fn nothing_is_left_in_the_way_of_the_next_writer() {
        let dir = tempdir().unwrap();
        let path = dir.path().join("key");
        std::fs::write(&path, "one").unwrap();
        assert_eq!(settled(&path).as_deref(), Some(&b"one"[..]));
        let writer = OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK).open(&path).unwrap();
        writer.write_all_at(b"two", 0).unwrap();
        drop(writer);
        assert_eq!(settled(&path).as_deref(), Some(&b"two"[..]));
    }

    #[test]
    fn a_file_that_changes_while_it_is_read_is_seen() {
        let dir = tempdir().unwrap();
        let path = dir.path().join("key");
        std::fs::write(&path, [7; 100]).unwrap();
        let file = open(&path).unwrap();
        let earlier = read_once(&file).unwrap().unwrap();
        OpenOptions::new().write(true).open(&path).unwrap().set_len(50).unwrap();
        let later = read_once(&open(&path).unwrap()).unwrap().unwrap();
        assert_ne!(stamp(&earlier.about), stamp(&later.about));
        assert_eq!((earlier.bytes().len(), later.bytes().len()), (100, 50));
    }
}
