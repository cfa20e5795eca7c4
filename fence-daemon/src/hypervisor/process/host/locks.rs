//! The kernel's locks on disk images, and whether a living process carries them.
//!
//! QEMU locks each image by open file description (OFD) locks. Such a lock ends with the last
//! reference to the open file. A write under way in the kernel is such a reference, also after the
//! death of the process. So a lock that no living process carries is an *orphan*: a write under
//! way. (With `io_uring` the pidfd tells a death before the last writes are over. libaio and plain
//! threads wait for them.)
//!
//! The kernel's table names a lock's file by the inode of what was opened. For a block device that
//! is the inode of the device *node*. libvirt gives each machine a `/dev` of its own, with nodes
//! that nobody else has.
//!
//! The table is read in pieces and may change in between. So one reading can miss a lock that is
//! held all the time.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read};
use std::mem::MaybeUninit;

use rustix::fs::{Dir, Mode, OFlags, readlinkat_raw};

use super::super::proc::gone_is_none;

/// `MAJOR:MINOR:INODE`, as the kernel writes it. The device is the file system's.
pub(crate) type Inode = String;

/// The first bytes of the ranges that QEMU locks (`RAW_LOCK_PERM_BASE`, `RAW_LOCK_SHARED_BASE`).
const QEMUS: [u64; 2] = [100, 200];
/// How many bytes of each QEMU may lock: one for each permission, and there are fewer.
const PERMISSIONS: u64 = 10;

/// How much of the kernel's table is asked for at a time, in bytes. The kernel gives about a page,
/// as it was at one moment.
const PIECE: usize = 64 * 1024;

/// What the kernel calls a descriptor of io_uring.
const RING: &[u8] = b"anon_inode:[io_uring]";

/// An OFD lock.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Lock {
    pub(super) inode: Inode,
    /// `READ` or `WRITE`.
    kind: String,
    start: String,
    end: String,
}

impl Lock {
    /// Reads a line of `/proc/locks` or a `lock:` line of fdinfo, if it is about an OFD lock:
    /// `1: OFDLCK ADVISORY  READ -1 fe:00:1234 100 101`.
    fn of(line: &str) -> Option<Self> {
        let mut words = line.split_whitespace().skip_while(|word| *word != "OFDLCK").skip(2).map(str::to_owned);
        let (kind, _pid) = (words.next()?, words.next()?);
        Some(Self { kind, inode: words.next()?, start: words.next()?, end: words.next()? })
    }

    /// Whether it is on bytes that QEMU locks.
    pub(super) fn is_qemus(&self) -> bool {
        let (Ok(start), Ok(end)) = (self.start.parse::<u64>(), self.end.parse::<u64>()) else { return false };
        QEMUS.iter().any(|first| start >= *first && end < first + PERMISSIONS)
    }
}

/// Locks, each with how many times it is held.
pub(super) type FileLocks = BTreeMap<Lock, usize>;

/// All OFD locks of the host, and whether the table was read in one piece: then none is missing.
///
/// # Errors
/// The kernel's table cannot be read.
pub(super) fn held() -> io::Result<(FileLocks, bool)> {
    let mut table = fs::File::open("/proc/locks")?;
    let (mut bytes, mut pieces) = (Vec::new(), 0);
    loop {
        let filled = bytes.len();
        bytes.resize(filled + PIECE, 0);
        let count = table.read(&mut bytes[filled..])?;
        bytes.truncate(filled + count);
        if count == 0 {
            break;
        }
        pieces += 1;
    }
    let mut held = FileLocks::new();
    for lock in String::from_utf8_lossy(&bytes).lines().filter_map(Lock::of) {
        *held.entry(lock).or_default() += 1;
    }
    Ok((held, pieces <= 1))
}

/// The locks that a process carries. Several descriptors that show one lock count once: they may
/// be one open file.
///
/// # Errors
/// We may not look into the process, or it has ended.
pub(super) fn carried(pid: i32) -> io::Result<FileLocks> {
    let mut carried = FileLocks::new();
    for fd in descriptors(pid)? {
        let Some(about) = gone_is_none(fs::read_to_string(format!("/proc/{pid}/fdinfo/{fd}")))? else { continue };
        let locks = about.lines().filter_map(|line| line.strip_prefix("lock:")).filter_map(Lock::of);
        carried.extend(locks.map(|lock| (lock, 1)));
    }
    Ok(carried)
}

/// Of `suspects`, those that no living process carries.
///
/// # Errors
/// The processes cannot be listed.
pub(super) fn orphans(mut suspects: FileLocks) -> io::Result<Vec<Lock>> {
    for entry in fs::read_dir("/proc")?.flatten() {
        if suspects.is_empty() {
            break;
        }
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
        // A process that has ended has no descriptors, whatever the kernel still does for it.
        let Ok(carried) = carried(pid) else { continue };
        for lock in carried.into_keys() {
            if let Some(count) = suspects.get_mut(&lock) {
                *count -= 1;
                if *count == 0 {
                    suspects.remove(&lock);
                }
            }
        }
    }
    Ok(suspects.into_keys().collect())
}

/// Whether a process uses io_uring. Without it no write is under way once the process is dead.
///
/// # Errors
/// We may not look into the process, or it has ended.
pub(super) fn has_ring(pid: i32) -> io::Result<bool> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = rustix::fs::open(format!("/proc/{pid}/fd"), flags, Mode::empty())?;
    let mut target = [MaybeUninit::uninit(); RING.len() + 1];
    // By their names in the open directory: a QEMU has dozens, and each fence asks.
    for descriptor in Dir::read_from(&directory)? {
        let descriptor = descriptor?;
        let name = descriptor.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        let (target, _) = match gone_is_none(readlinkat_raw(&directory, name, &mut target).map_err(io::Error::from))? {
            Some(read) => read,
            None => continue,
        };
        if target == RING {
            return Ok(true);
        }
    }
    Ok(false)
}

fn descriptors(pid: i32) -> io::Result<Vec<String>> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd"))?.flatten();
    Ok(entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    /// Locks this byte for reading, as QEMU does.
    pub(crate) fn lock(file: &fs::File, byte: i64) {
        let (l_type, l_whence) = (nix::libc::F_RDLCK.try_into().unwrap(), nix::libc::SEEK_SET.try_into().unwrap());
        let lock = nix::libc::flock { l_type, l_whence, l_start: byte, l_len: 1, l_pid: 0 };
        nix::fcntl::fcntl(file, nix::fcntl::FcntlArg::F_OFD_SETLK(&lock)).unwrap();
    }

    /// The inode of a file that has a lock, as the kernel's table has it.
    pub(crate) fn inode_of(file: &fs::File) -> Inode {
        use std::os::fd::AsRawFd;
        let about = fs::read_to_string(format!("/proc/self/fdinfo/{}", file.as_raw_fd())).unwrap();
        about.lines().filter_map(|line| line.strip_prefix("lock:")).find_map(Lock::of).unwrap().inode
    }

    /// A process whose standard input is this open file.
    pub(crate) fn holder(file: &fs::File) -> std::process::Child {
        std::process::Command::new("sleep").arg("600").stdin(file.try_clone().unwrap()).spawn().unwrap()
    }

    /// A file on its way through a socket is open without any process that has it. So is a file
    /// that the kernel writes to.
    pub(crate) fn in_flight(file: &fs::File) -> (UnixStream, UnixStream) {
        use std::os::fd::AsRawFd;
        let (to, from) = UnixStream::pair().unwrap();
        let fds = [file.as_raw_fd()];
        let rights = [nix::sys::socket::ControlMessage::ScmRights(&fds)];
        let bytes = [io::IoSlice::new(b"x")];
        let flags = nix::sys::socket::MsgFlags::empty();
        nix::sys::socket::sendmsg::<()>(to.as_raw_fd(), &bytes, &rights, flags, None).unwrap();
        (to, from)
    }

    /// Until a new process has become its program it has everything that we have.
    pub(crate) fn wait_carried(pid: i32, count: usize) -> FileLocks {
        let begun = std::time::Instant::now();
        loop {
            let carried = carried(pid).unwrap();
            if carried.len() == count || begun.elapsed() > Duration::from_secs(20) {
                return carried;
            }
            std::thread::yield_now();
        }
    }

    #[test]
    fn only_open_file_description_locks_count() {
        let inode = |line: &str| Lock::of(line).map(|lock| lock.inode);
        assert_eq!(inode("1: OFDLCK ADVISORY  READ -1 fe:00:1234 100 101").as_deref(), Some("fe:00:1234"));
        assert_eq!(inode("\t2: OFDLCK ADVISORY  WRITE -1 00:2a:9 0 EOF").as_deref(), Some("00:2a:9"));
        assert_eq!(inode("3: POSIX  ADVISORY  WRITE 812 fe:00:77 0 EOF"), None);
        assert_eq!(inode(""), None);
    }

    #[test]
    fn qemus_locks_are_told_by_their_bytes() {
        for (bytes, is_qemus) in [
            ("100 101", true),
            ("103 103", true),
            ("201 203", true),
            ("0 EOF", false),
            ("100 200", false),
            ("110 110", false),
        ] {
            let lock = Lock::of(&format!("1: OFDLCK ADVISORY  READ -1 fe:00:1234 {bytes}")).unwrap();
            assert_eq!(lock.is_qemus(), is_qemus, "{bytes}");
        }
    }

    #[test]
    fn a_lock_is_an_orphan_when_nobody_who_lives_carries_it() {
        let _own = crate::hypervisor::tests::ORPHANS.blocking_lock();
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("image");
        fs::write(&path, [0; 512]).unwrap();
        let open = || fs::File::options().read(true).write(true).open(&path).unwrap();
        let (shared, own) = (open(), open());
        for file in [&shared, &own] {
            lock(file, 100);
            lock(file, 201);
        }
        let (mut sharer, mut victim) = (holder(&shared), holder(&own));
        let pid = i32::try_from(victim.id()).unwrap();
        let carried = wait_carried(pid, 2);
        assert_eq!(carried.len(), 2, "{carried:?}");
        assert!(carried.keys().all(Lock::is_qemus), "{carried:?}");
        wait_carried(i32::try_from(sharer.id()).unwrap(), 2);
        assert!(!has_ring(pid).unwrap());
        let under_way = in_flight(&own);
        drop((shared, own));
        let left = || {
            let (held, _) = held().unwrap();
            let image = carried.keys().next().unwrap().inode.clone();
            orphans(held.into_iter().filter(|(lock, _)| lock.inode == image).collect()).unwrap()
        };
        assert!(left().is_empty(), "both live");
        victim.kill().unwrap();
        victim.wait().unwrap();
        assert_eq!(left().len(), 2, "the same locks as the sharer's, once more");
        drop(under_way);
        assert!(left().is_empty());
        sharer.kill().unwrap();
        sharer.wait().unwrap();
        assert!(super::carried(i32::MAX).is_err() && has_ring(i32::MAX).is_err());
    }
}
