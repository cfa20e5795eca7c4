//! The command-line files of processes, held open from scan to scan. To open such a file takes the
//! kernel longer than to read it.
//!
//! Each reading asks the kernel afresh, so a process that has become another program is seen as
//! what it is now. A held file means the process that it was opened for: when that has ended, the
//! kernel says so, also if another process has its number.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex};

use fence_common::sync::lock;
use rustix::process::{Resource, getrlimit};

use super::super::proc;

/// How many files are held at most.
const HELD_MAX: usize = 4096;
/// The part of all files that this process may open, which are left for requests and domains.
const LEFT_FOR_OTHERS: u64 = 4;

/// The held files, by process number.
#[derive(Debug)]
pub(super) struct CommandLines {
    held: Mutex<HashMap<i32, Arc<File>>>,
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
    pub(super) fn read(&self, pid: i32, directory: &Path, into: &mut Vec<u8>) -> io::Result<Option<()>> {
        // Not with the lock held: a reading may take for ever.
        let held = lock(&self.held).get(&pid).cloned();
        if let Some(held) = held {
            if proc::read_again(&held, into).is_ok() {
                return Ok(Some(()));
            }
            // It has ended, and its number may be another's. Or this is no file of `/proc`.
            lock(&self.held).remove(&pid);
        }
        let path = directory.join("cmdline");
        let Some(file) = proc::gone_is_none(File::open(&path))? else { return Ok(None) };
        if proc::read_again(&file, into).is_err() {
            return proc::read(&path, into);
        }
        let mut held = lock(&self.held);
        if held.len() < self.most {
            held.insert(pid, Arc::new(file));
        }
        Ok(Some(()))
    }

    /// Closes the files of all processes but these, whose numbers are in order.
    pub(super) fn retain(&self, pids: &[i32]) {
        lock(&self.held).retain(|pid, _| pids.binary_search(pid).is_ok());
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
        let mut line = || lines.read(pid, &directory, &mut buffer).unwrap().map(|()| buffer.clone());
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
        lock(&lines.held).insert(own, Arc::new(ended));
        let mut buffer = Vec::new();
        assert_eq!(lines.read(own, Path::new("/proc/self"), &mut buffer).unwrap(), Some(()));
        assert_eq!(buffer, std::fs::read("/proc/self/cmdline").unwrap());
    }

    #[test]
    fn no_more_files_are_held_than_may_be_and_none_of_the_dead() {
        let lines = CommandLines { held: Mutex::default(), most: 1 };
        let (own, mut buffer) = (i32::try_from(std::process::id()).unwrap(), Vec::new());
        let (child, pid, directory) = shell("read line");
        for (pid, directory) in [(own, Path::new("/proc/self")), (pid, &directory)] {
            assert_eq!(lines.read(pid, directory, &mut buffer).unwrap(), Some(()));
            assert!(!buffer.is_empty());
        }
        assert_eq!(held(&lines), 1);
        end(child);
        lines.retain(&[own]);
        assert_eq!(held(&lines), 1);
        lines.retain(&[]);
        assert_eq!(held(&lines), 0);
    }
}
