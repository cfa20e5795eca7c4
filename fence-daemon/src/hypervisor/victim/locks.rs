//! QEMU's locks on its disk images: a process that has ended may still have writes under way in the kernel.
//!
//! With `io_uring` a dead process's last requests are finished or cancelled by the kernel after its pidfd says that it is dead
//! (libaio waits for them before). QEMU locks its images by open file description (OFD) locks, which go when the last reference to
//! the open file goes, and a request under way is such a reference. So: which images it has locked is noted before the kill, and it is
//! over when each lock on them is one of a process that lives: another guest's, which shares the disk.
//!
//! The kernel's table is read in pieces, between which it may change, so that one reading can miss locks that are held all the time. It
//! takes several readings in a row that find none.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io;
use std::time::Duration;

use tokio::time::{Instant, sleep};

/// How often the kernel's table of locks is read.
const LOOK: Duration = Duration::from_millis(1);
/// How many readings in a row must find the images free.
const AGREE: u32 = 3;

/// `MAJOR:MINOR:INODE`, as the kernel writes it.
type Inode = String;

/// The images that a process had locked before its death.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(in super::super) struct ImageLocks {
    images: HashSet<Inode>,
}

impl ImageLocks {
    /// The images that the process has locked; none for one that does not use io_uring, whose death is the end of its requests.
    ///
    /// # Errors
    /// It cannot be known: we may not look into the process.
    pub(in super::super) fn of(pid: i32) -> io::Result<Self> {
        let descriptors = descriptors(pid)?;
        for fd in &descriptors {
            let target = gone_is_none(fs::read_link(format!("/proc/{pid}/fd/{fd}")))?;
            if target.is_some_and(|target| target.as_os_str() == "anon_inode:[io_uring]") {
                return Ok(Self { images: carried(pid, &descriptors)?.into_keys().collect() });
            }
        }
        Ok(Self::default())
    }

    /// Whether there is anything to wait for.
    pub(in super::super) fn is_empty(&self) -> bool {
        self.images.is_empty()
    }

    /// Waits until the dead process's locks are gone. `false`: they are not by `by`.
    pub(in super::super) async fn free(&self, by: Instant) -> bool {
        let mut agreed = 0;
        while agreed < AGREE && !self.is_empty() {
            agreed = if self.are_free() { agreed + 1 } else { 0 };
            if agreed < AGREE {
                if Instant::now() >= by {
                    return false;
                }
                sleep(LOOK).await;
            }
        }
        true
    }

    /// Whether one reading finds no lock but those of living processes. What cannot be read is no proof.
    fn are_free(&self) -> bool {
        let Ok(mut held) = held() else { return false };
        held.retain(|inode, _| self.images.contains(inode));
        if held.is_empty() {
            return true;
        }
        // Somebody shares the disk, or it is not over.
        let Ok(others) = of_the_living() else { return false };
        held.iter().all(|(inode, held)| others.get(inode).copied().unwrap_or(0) >= *held)
    }
}

/// The locks that living emulators carry, on each file. One that ends while it is looked at has no more of them.
fn of_the_living() -> io::Result<HashMap<Inode, usize>> {
    let mut all: HashMap<Inode, usize> = HashMap::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
        // A process that has ended has no descriptors, whatever the kernel still does for it.
        let Ok(descriptors) = descriptors(pid) else { continue };
        let Ok(own) = carried(pid, &descriptors) else { continue };
        for (inode, count) in own {
            *all.entry(inode).or_default() += count;
        }
    }
    Ok(all)
}

fn descriptors(pid: i32) -> io::Result<Vec<String>> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd"))?.flatten();
    Ok(entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect())
}

/// How many open-file-description locks a process's descriptors carry on each file.
fn carried(pid: i32, descriptors: &[String]) -> io::Result<HashMap<Inode, usize>> {
    let mut own: HashMap<Inode, usize> = HashMap::new();
    for fd in descriptors {
        let Some(about) = gone_is_none(fs::read_to_string(format!("/proc/{pid}/fdinfo/{fd}")))? else { continue };
        for inode in about.lines().filter_map(|line| line.strip_prefix("lock:")).filter_map(inode) {
            *own.entry(inode).or_default() += 1;
        }
    }
    Ok(own)
}

/// A descriptor that was closed, or a process that ended, while it was looked at; any other error stays one.
fn gone_is_none<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) if error.raw_os_error() == Some(nix::libc::ESRCH) => Ok(None),
        Err(error) => Err(error),
    }
}

/// How many open-file-description locks there are on each file.
fn held() -> io::Result<HashMap<Inode, usize>> {
    let mut held: HashMap<Inode, usize> = HashMap::new();
    for inode in fs::read_to_string("/proc/locks")?.lines().filter_map(inode) {
        *held.entry(inode).or_default() += 1;
    }
    Ok(held)
}

/// The file of a line of `/proc/locks` or of a `lock:` line in fdinfo, if it is an OFD lock:
/// `1: OFDLCK ADVISORY  READ -1 fe:00:1234 100 101`.
fn inode(line: &str) -> Option<Inode> {
    let mut words = line.split_whitespace().skip_while(|word| *word != "OFDLCK").skip(4);
    words.next().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Locks this byte for reading, as QEMU does.
    fn lock(file: &fs::File, byte: i64) {
        let (l_type, l_whence) = (nix::libc::F_RDLCK.try_into().unwrap(), nix::libc::SEEK_SET.try_into().unwrap());
        let lock = nix::libc::flock { l_type, l_whence, l_start: byte, l_len: 1, l_pid: 0 };
        nix::fcntl::fcntl(file, nix::fcntl::FcntlArg::F_OFD_SETLK(&lock)).unwrap();
    }

    /// A process whose standard input is this open file.
    fn holder(file: &fs::File) -> std::process::Child {
        std::process::Command::new("sleep").arg("600").stdin(file.try_clone().unwrap()).spawn().unwrap()
    }

    #[test]
    fn a_dead_processs_locks_are_waited_for_and_a_living_ones_are_not() {
        let scratch = crate::scratch::Scratch::new();
        let path = scratch.path().join("image");
        fs::write(&path, [0; 512]).unwrap();
        let open = || fs::File::options().read(true).write(true).open(&path).unwrap();
        let (shared, own) = (open(), open());
        lock(&shared, 100);
        lock(&own, 101);
        lock(&own, 201);
        let (mut sharer, mut victim) = (holder(&shared), holder(&own));
        let pid = i32::try_from(victim.id()).unwrap();
        let now = || carried(pid, &descriptors(pid).unwrap()).unwrap();
        // Until it has become `sleep` it has everything that we have.
        let begun = std::time::Instant::now();
        while now().values().sum::<usize>() != 2 && begun.elapsed() < Duration::from_secs(20) {
            std::thread::yield_now();
        }
        let carried = now();
        assert_eq!(carried.values().copied().collect::<Vec<_>>(), [2], "{carried:?}");
        assert!(ImageLocks::of(pid).unwrap().is_empty(), "without io_uring its death is all that is waited for");
        let locks = ImageLocks { images: carried.into_keys().collect() };
        drop(shared);

        // A request under way keeps the open file without any process that has it: a descriptor on its way through a socket does, too.
        let (to, from) = std::os::unix::net::UnixStream::pair().unwrap();
        send(&to, &own);
        drop(own);
        victim.kill().unwrap();
        victim.wait().unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let free =
            |within: u64| runtime.block_on(async { locks.free(Instant::now() + Duration::from_millis(within)).await });
        assert!(!free(20), "it is dead, and its file is open still");
        drop((to, from));
        assert!(free(20_000), "the sharer's locks are not waited for");
        sharer.kill().unwrap();
        sharer.wait().unwrap();
        assert!(free(20_000));
    }

    fn send(socket: &std::os::unix::net::UnixStream, file: &fs::File) {
        use std::os::fd::AsRawFd;
        let fds = [file.as_raw_fd()];
        let rights = [nix::sys::socket::ControlMessage::ScmRights(&fds)];
        let bytes = [io::IoSlice::new(b"x")];
        let flags = nix::sys::socket::MsgFlags::empty();
        nix::sys::socket::sendmsg::<()>(socket.as_raw_fd(), &bytes, &rights, flags, None).unwrap();
    }

    #[test]
    fn what_may_not_be_looked_at_is_an_error_and_what_is_gone_is_not() {
        let with = |kind: io::ErrorKind| gone_is_none::<()>(Err(kind.into()));
        assert!(matches!(with(io::ErrorKind::NotFound), Ok(None)));
        assert!(with(io::ErrorKind::PermissionDenied).is_err());
        assert!(ImageLocks::of(i32::MAX).is_err());
    }

    #[test]
    fn only_open_file_description_locks_count() {
        assert_eq!(inode("1: OFDLCK ADVISORY  READ -1 fe:00:1234 100 101").as_deref(), Some("fe:00:1234"));
        assert_eq!(inode("\t2: OFDLCK ADVISORY  WRITE -1 00:2a:9 0 EOF").as_deref(), Some("00:2a:9"));
        assert_eq!(inode("3: POSIX  ADVISORY  WRITE 812 fe:00:77 0 EOF"), None);
        assert_eq!(inode(""), None);
    }
}
