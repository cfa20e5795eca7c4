//! The command-line files of processes, held open from scan to scan. To open such a file takes the
//! kernel longer than to read it.
//!
//! Each reading asks the kernel afresh, so a process that has become another program is seen as
//! what it is now. A held file means the process that it was opened for: when that has ended, the
//! kernel says so, also if another process has its number.
//!
//! A thread of the kernel's own has no command line, and only its `stat` tells that. To read that
//! takes ten times as long as to read the held file, and half of a host's processes are such
//! threads. So it is remembered with the held file: such a thread never becomes a program.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock, Mutex};

use fence_common::sync::lock;
use rustix::process::{Resource, getrlimit};
use rustix::system::uname;

use super::super::proc::{self, CommandLine};

/// How many files are held at most.
const HELD_MAX: usize = 4096;
/// The part of all files that this process may open, which are left for requests and domains.
const LEFT_FOR_OTHERS: u64 = 4;

/// From this version of Linux on `kernel_execve` refuses the kernel's own threads. Before it, one
/// could become a program (a user-mode helper).
const THREADS_STAY_SINCE: (u32, u32) = (5, 19);

/// Whether threads of this host's kernel stay what they are.
static THREADS_STAY: LazyLock<bool> = LazyLock::new(|| threads_stay(&uname().release().to_string_lossy()));

fn threads_stay(release: &str) -> bool {
    let mut numbers = release.split(|other: char| !other.is_ascii_digit()).map(str::parse);
    matches!((numbers.next(), numbers.next()), (Some(Ok(major)), Some(Ok(minor))) if (major, minor) >= THREADS_STAY_SINCE)
}

/// A process's command-line file. It means that process, whatever has its number later.
#[derive(Debug)]
pub(super) struct CommandLineFile {
    file: File,
    is_kernels: AtomicBool,
}

impl CommandLineFile {
    fn new(file: File) -> Arc<Self> {
        Arc::new(Self { file, is_kernels: AtomicBool::new(false) })
    }

    /// Whether the process is known as a thread of the kernel's own.
    pub(super) fn is_kernels(&self) -> bool {
        self.is_kernels.load(Ordering::Relaxed)
    }

    /// Notes that a `stat` which was read after the command line is that of a thread of the
    /// kernel's own.
    pub(super) fn note_kernels(&self) {
        // The `stat` was found by the number. The process lives, so the number is its still.
        let lives = proc::read_again(&self.file, &mut Vec::new()).is_ok();
        self.is_kernels.store(lives && *THREADS_STAY, Ordering::Relaxed);
    }
}

/// The held files, by process number.
#[derive(Debug)]
pub(super) struct CommandLines {
    held: Mutex<HashMap<i32, Arc<CommandLineFile>>>,
    most: usize,
}

impl Default for CommandLines {
    fn default() -> Self {
        let all = getrlimit(Resource::Nofile).current;
        let share = all.map_or(HELD_MAX, |all| usize::try_from(all / LEFT_FOR_OTHERS).unwrap_or(HELD_MAX));
        Self { held: Mutex::default(), most: share.min(HELD_MAX) }
    }
}

impl CommandLines {
    /// Reads the command line of a process, in this directory of `/proc`, as it is now. `None`: the
    /// process has ended.
    ///
    /// # Errors
    /// The process lives, and its command line cannot be read.
    pub(super) fn read(
        &self,
        pid: i32,
        directory: &Path,
        into: &mut Vec<u8>,
    ) -> io::Result<Option<Arc<CommandLineFile>>> {
        // Not with the lock held: a reading may take for ever.
        let held = lock(&self.held).get(&pid).cloned();
        if let Some(held) = held {
            if proc::read_again(&held.file, into).is_ok() {
                return Ok(Some(held));
            }
            // It has ended, and its number may be another's. Or this is no file of `/proc`.
            lock(&self.held).remove(&pid);
        }
        let path = directory.join("cmdline");
        let Some(file) = proc::gone_is_none(File::open(&path))? else { return Ok(None) };
        let file = CommandLineFile::new(file);
        if proc::read_again(&file.file, into).is_err() {
            return Ok(proc::read(&path, into)?.map(|()| file));
        }
        let mut held = lock(&self.held);
        if held.len() < self.most {
            held.insert(pid, Arc::clone(&file));
        }
        Ok(Some(file))
    }

    /// Closes the files of all processes but these, whose numbers are in order.
    pub(super) fn retain(&self, pids: &[i32]) {
        lock(&self.held).retain(|pid, _| pids.binary_search(pid).is_ok());
    }
}

/// What a command line says.
pub(super) enum CommandLineKind {
    Machine(CommandLine),
    Other,
    /// It is the kernel's own thread.
    Kernel,
    /// Nothing, and the process lives.
    Nothing,
    /// Nothing, as the process is dead.
    Ended,
}

impl CommandLineKind {
    pub(super) fn of(arguments: &[u8]) -> Self {
        CommandLine::of(arguments).map_or(Self::Other, Self::Machine)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::path::PathBuf;
    use std::process::{Child, Command, Stdio};
    use std::thread::sleep;
    use std::time::Duration;

    use super::*;

    fn shell(script: &str) -> (Child, i32, PathBuf) {
        let child = Command::new("sh").args(["-c", script]).stdin(Stdio::piped()).spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let directory = PathBuf::from(format!("/proc/{pid}"));
        // The kernel lets its starter go on before it has its arguments.
        while std::fs::read(directory.join("cmdline")).unwrap().is_empty() {
            sleep(Duration::from_millis(1));
        }
        (child, pid, directory)
    }

    fn end(mut child: Child) {
        child.kill().unwrap();
        child.wait().unwrap();
    }

    fn held(lines: &CommandLines) -> usize {
        lock(&lines.held).len()
    }

    #[test]
    fn a_held_file_tells_what_its_process_is_now() {
        let lines = CommandLines::default();
        let mut buffer = Vec::new();
        let (mut child, pid, directory) = shell("read line; exec sleep 3600");
        let mut line = || lines.read(pid, &directory, &mut buffer).unwrap().map(|_| buffer.clone());
        while line().unwrap() != b"sh\0-c\0read line; exec sleep 3600\0" {
            sleep(Duration::from_millis(1));
        }
        assert_eq!(held(&lines), 1);
        child.stdin.take().unwrap().write_all(b"\n").unwrap();
        while line().unwrap() != b"sleep\x003600\0" {
            sleep(Duration::from_millis(1));
        }
        end(child);
        assert_eq!((line(), held(&lines)), (None, 0));
    }

    #[test]
    fn a_file_of_an_ended_process_says_nothing_of_the_next_one_with_its_number() {
        let lines = CommandLines::default();
        let (child, _, directory) = shell("read line");
        let ended = File::open(directory.join("cmdline")).unwrap();
        end(child);
        let own = i32::try_from(std::process::id()).unwrap();
        lock(&lines.held).insert(own, CommandLineFile::new(ended));
        let mut buffer = Vec::new();
        assert!(lines.read(own, Path::new("/proc/self"), &mut buffer).unwrap().is_some());
        assert_eq!(buffer, std::fs::read("/proc/self/cmdline").unwrap());
    }

    #[test]
    fn no_more_files_are_held_than_may_be_and_none_of_the_dead() {
        let lines = CommandLines { held: Mutex::default(), most: 1 };
        let (own, mut buffer) = (i32::try_from(std::process::id()).unwrap(), Vec::new());
        let (child, pid, directory) = shell("read line");
        for (pid, directory) in [(own, Path::new("/proc/self")), (pid, &directory)] {
            assert!(lines.read(pid, directory, &mut buffer).unwrap().is_some());
            assert!(!buffer.is_empty());
        }
        assert_eq!(held(&lines), 1);
        end(child);
        lines.retain(&[own]);
        assert_eq!(held(&lines), 1);
        lines.retain(&[]);
        assert_eq!(held(&lines), 0);
    }

    #[test]
    fn a_thread_of_the_kernel_is_remembered_and_a_process_that_has_ended_is_not() {
        let lines = CommandLines::default();
        let mut buffer = Vec::new();
        let (mut child, pid, directory) = shell("read line");
        let file = lines.read(pid, &directory, &mut buffer).unwrap().unwrap();
        file.note_kernels();
        assert_eq!(file.is_kernels(), *THREADS_STAY);
        // The same file, not only the same number.
        assert_eq!(lines.read(pid, &directory, &mut buffer).unwrap().unwrap().is_kernels(), *THREADS_STAY);
        child.kill().unwrap();
        child.wait().unwrap();
        file.note_kernels();
        assert!(!file.is_kernels(), "the stat may have been another process's");
    }

    #[test]
    fn only_kernels_whose_threads_stay_threads_are_trusted_with_that() {
        for release in ["5.19.0", "6.1.0-31-amd64", "10.0", "6.18.44-fc"] {
            assert!(threads_stay(release), "{release}");
        }
        for release in ["5.18.19", "4.19.0-27-amd64", "5.4.0-200-generic", "", "x", "6"] {
            assert!(!threads_stay(release), "{release}");
        }
    }
}
