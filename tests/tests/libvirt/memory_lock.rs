//! A process whose memory the kernel keeps locked (its `mmap_lock`) for as long as the test wants.
//!
//! The process maps a file whose storage does not answer ([`fuse`](crate::fuse)). A thread of ours
//! reads that mapping through `/proc/PID/mem`: the kernel fetches the page with the lock held for
//! reading. A second thread wants the lock for writing, so all later readers queue behind it. Then
//! `/proc/PID/cmdline` hangs, and so does the end of the process: each of its threads needs the
//! lock to let go of the memory. A driver that is stuck in a page fault looks like that.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fence_lab::process::poll_until;

use crate::fuse::Disk;

/// How long a command line may take that can be read.
const READABLE: Duration = Duration::from_millis(500);
/// How long the second thread may take to queue for the lock.
const QUEUED: Duration = Duration::from_secs(20);

/// A process's memory, locked. Dropping it releases the lock.
pub(super) struct MemoryLock<'a> {
    disk: &'a Disk,
    threads: Vec<JoinHandle<()>>,
}

impl<'a> MemoryLock<'a> {
    /// Locks the memory of a process that maps this disk, until its command line cannot be read.
    ///
    /// # Errors
    /// It has no such mapping, or its command line can be read all the same.
    pub(super) fn hold(pid: u32, disk: &'a Disk) -> Result<Self> {
        let at = mapping(pid, &disk.path())?;
        let memory = File::open(format!("/proc/{pid}/mem")).context("its memory")?;
        let read = move || {
            // Not before the disk holds its answers; what is read does not matter.
            thread::sleep(Duration::from_millis(200));
            let _ = memory.read_at(&mut [0], at);
        };
        let mut lock = Self { disk, threads: vec![thread::spawn(read)] };
        disk.hold()?;
        let write = move || drop(fs::write(format!("/proc/{pid}/clear_refs"), "1"));
        lock.threads.push(thread::spawn(write));
        poll_until("a command line that cannot be read", QUEUED, || Ok((!is_readable(pid)?).then_some(())))?;
        Ok(lock)
    }
}

impl Drop for MemoryLock<'_> {
    fn drop(&mut self) {
        self.disk.release();
        for thread in self.threads.drain(..) {
            // It has nothing to say.
            let _ = thread.join();
        }
    }
}

/// Whether the command line of a process can be read.
///
/// # Errors
/// The process has ended.
pub(super) fn is_readable(pid: u32) -> Result<bool> {
    let (sender, receiver) = mpsc::channel();
    // It stays behind if the reading does not end.
    thread::spawn(move || sender.send(fs::read(format!("/proc/{pid}/cmdline")).map(drop)));
    match receiver.recv_timeout(READABLE) {
        Ok(read) => read.map(|()| true).context("its command line"),
        Err(RecvTimeoutError::Timeout) => Ok(false),
        Err(RecvTimeoutError::Disconnected) => anyhow::bail!("the thread that reads has ended"),
    }
}

/// Where a process has mapped a file of the lab.
fn mapping(pid: u32, file: &str) -> Result<u64> {
    // The lab's mounts are not ours, so its paths need not begin as the lab writes them.
    let end = file.rsplitn(3, '/').take(2).collect::<Vec<_>>();
    ensure!(end.len() == 2, "{file} has no directory");
    let end = format!("{}/{}", end[1], end[0]);
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let line = maps.lines().find(|line| line.ends_with(&end)).with_context(|| format!("no {end} in {maps}"))?;
    let start = line.split('-').next().context("no address")?;
    u64::from_str_radix(start, 16).context("no address")
}
