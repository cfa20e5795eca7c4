//! QEMU's locks on its disk images: a process that has ended may still have writes under way in the kernel.
//!
//! With `io_uring` a dead process's last requests are finished or cancelled by the kernel after its pidfd says that it is dead
//! (libaio waits for them before). QEMU locks its images by open file description (OFD) locks, which go when the last reference to
//! the open file goes, and a request under way is such a reference. So: which images it has open for writing, and how many locks each of
//! them carries through it, is noted before the kill; it is over when the kernel's table has as many fewer on each.
//!
//! Counts, and not "none left": disks that are shared between guests carry other guests' locks as well.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::time::Duration;

use tokio::time::{Instant, sleep};

/// How often the kernel's table of locks is read.
const LOOK: Duration = Duration::from_millis(1);

/// `MAJOR:MINOR:INODE`, as the kernel writes it.
type Inode = String;

/// The locks of a process's images before its death.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(in super::super) struct ImageLocks {
    /// How many locks each image may have when the process's own are gone.
    others: HashMap<Inode, usize>,
}

impl ImageLocks {
    /// The locks that the process holds; empty for one that does not use io_uring, whose death is the end of its requests.
    ///
    /// # Errors
    /// It cannot be known: we may not look into the process.
    pub(in super::super) fn of(pid: i32) -> io::Result<Self> {
        let descriptors: Vec<_> = fs::read_dir(format!("/proc/{pid}/fd"))?.flatten().collect();
        let is_ring = |fd: &fs::DirEntry| {
            fs::read_link(fd.path()).is_ok_and(|target| target.as_os_str() == "anon_inode:[io_uring]")
        };
        if !descriptors.iter().any(is_ring) {
            return Ok(Self::default());
        }
        let mut own: HashMap<Inode, usize> = HashMap::new();
        for fd in descriptors {
            let about = format!("/proc/{pid}/fdinfo/{}", fd.file_name().display());
            // One that was closed meanwhile.
            let Ok(about) = fs::read_to_string(about) else { continue };
            for inode in about.lines().filter_map(|line| line.strip_prefix("lock:")).filter_map(inode) {
                *own.entry(inode).or_default() += 1;
            }
        }
        if own.is_empty() {
            return Ok(Self::default());
        }
        let all = held()?;
        let others = own.into_iter().map(|(inode, own)| {
            let all = all.get(&inode).copied().unwrap_or(own);
            (inode, all.saturating_sub(own))
        });
        Ok(Self { others: others.collect() })
    }

    /// Whether there is anything to wait for.
    pub(in super::super) fn is_empty(&self) -> bool {
        self.others.is_empty()
    }

    /// Waits until the process's locks are gone. `false`: they are not by `by`.
    pub(in super::super) async fn free(&self, by: Instant) -> bool {
        while !self.are_free() {
            if Instant::now() >= by {
                return false;
            }
            sleep(LOOK).await;
        }
        true
    }

    fn are_free(&self) -> bool {
        if self.is_empty() {
            return true;
        }
        // A table that cannot be read is no proof.
        let Ok(held) = held() else { return false };
        self.others.iter().all(|(inode, others)| held.get(inode).copied().unwrap_or(0) <= *others)
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

    #[test]
    fn only_open_file_description_locks_count() {
        assert_eq!(inode("1: OFDLCK ADVISORY  READ -1 fe:00:1234 100 101").as_deref(), Some("fe:00:1234"));
        assert_eq!(inode("\t2: OFDLCK ADVISORY  WRITE -1 00:2a:9 0 EOF").as_deref(), Some("00:2a:9"));
        assert_eq!(inode("3: POSIX  ADVISORY  WRITE 812 fe:00:77 0 EOF"), None);
        assert_eq!(inode(""), None);
    }
}
