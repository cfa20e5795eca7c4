//! What the next daemon has to know of domains' images and helpers.
//!
//! It stands in one file of the state directory. A thread of its own writes the whole file again,
//! soon after a change.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::disks::Disks;
use super::helpers::Who;
use super::locks::Inode;
use crate::state::file;

/// The file's name.
const FILE: &str = "left-behind";
/// The form of what is written; another one is not read.
const VERSION: u32 = 1;
/// The largest file that is read, in bytes.
const SIZE_LIMIT: usize = 32 << 20;
/// What tells one run of the host's kernel from another.
const BOOT: &str = "/proc/sys/kernel/random/boot_id";

/// What is known of one domain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct LeftBehind {
    pub(super) uuid: Uuid,
    pub(super) name: String,
    /// What its emulators had open.
    pub(super) images: Vec<Inode>,
    pub(super) helpers: Vec<Who>,
    pub(super) disks: Option<Disks>,
}

/// The file's content.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Content {
    version: u32,
    /// Of another boot nothing is left.
    boot: String,
    domains: Vec<LeftBehind>,
}

/// Writes the file. Dropping it lets its thread end.
#[derive(Debug)]
pub(super) struct Keeper(Sender<Vec<LeftBehind>>);

impl Keeper {
    /// Starts the thread. `None`: there can be none, which is logged.
    pub(super) fn start(file: KeptFile) -> Option<Self> {
        let (sender, receiver) = mpsc::channel();
        let started = thread::Builder::new().name("left-behind".to_owned()).spawn(move || keep(&file, &receiver));
        match started {
            Ok(_) => Some(Self(sender)),
            Err(error) => {
                tracing::error!(%error, "no thread to write down what may outlive domains: the next daemon will not know");
                None
            }
        }
    }

    /// Has this written soon, unless something newer comes first.
    pub(super) fn keep(&self, domains: Vec<LeftBehind>) {
        // Fails only if the thread has ended, which it does with this.
        let _ = self.0.send(domains);
    }
}

fn keep(kept: &KeptFile, news: &Receiver<Vec<LeftBehind>>) {
    let mut written = Vec::new();
    while let Ok(mut domains) = news.recv() {
        while let Ok(newer) = news.try_recv() {
            domains = newer;
        }
        domains.sort_by_key(|domain| domain.uuid);
        if domains == written {
            continue;
        }
        match kept.write(domains.clone()) {
            Ok(()) => written = domains,
            Err(error) => {
                let file = file::path(&kept.directory, &kept.name);
                let file = file.display();
                tracing::warn!(%file, %error, "if this daemon ends, the next one will not know what dead domains may still write to");
            }
        }
    }
}

fn boot() -> io::Result<String> {
    Ok(fs::read_to_string(BOOT)?.trim().to_owned())
}

/// A file of the state directory.
#[derive(Clone, Debug)]
pub(super) struct KeptFile {
    directory: PathBuf,
    name: String,
}

impl KeptFile {
    pub(super) fn new(directory: &Path, number: usize) -> Self {
        let name = if number == 0 { FILE.to_owned() } else { format!("{FILE}-{number}") };
        Self { directory: directory.to_owned(), name }
    }

    /// What an earlier daemon has written since the host's boot. A file that cannot be read is
    /// logged.
    pub(super) fn read(&self) -> Vec<LeftBehind> {
        match self.content() {
            Ok(content) if boot().is_ok_and(|boot| boot == content.boot) => content.domains,
            Ok(_) => Vec::new(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(error) => {
                let file = file::path(&self.directory, &self.name);
                let file = file.display();
                tracing::error!(%file, %error, "what an earlier daemon knew of domains' images and helpers cannot be read");
                Vec::new()
            }
        }
    }

    fn content(&self) -> io::Result<Content> {
        let content: Content = serde_json::from_slice(&file::read(&self.directory, &self.name, SIZE_LIMIT)?)?;
        if content.version == VERSION { Ok(content) } else { Err(io::Error::other("it has an unknown form")) }
    }

    fn write(&self, domains: Vec<LeftBehind>) -> io::Result<()> {
        let content = serde_json::to_vec(&Content { version: VERSION, boot: boot()?, domains })?;
        file::replace(&self.directory, &self.name, &content).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tempfile::tempdir;

    fn kept(number: u128) -> LeftBehind {
        let images = vec!["fe:00:12".to_owned()];
        let (uuid, name) = (Uuid::from_u128(number), format!("vm{number}"));
        LeftBehind { uuid, name, images, helpers: Vec::new(), disks: Some(Disks::default()) }
    }

    #[test]
    fn the_next_daemon_knows_what_is_left_and_after_a_boot_nothing_is() {
        let scratch = tempdir().unwrap();
        let file = KeptFile::new(scratch.path(), 0);
        assert!(file.read().is_empty());
        file.write(vec![kept(1), kept(2)]).unwrap();
        assert_eq!(file.read(), [kept(1), kept(2)]);
        let path = scratch.path().join(FILE);
        let earlier = fs::read_to_string(&path).unwrap().replace(&boot().unwrap(), "another boot");
        fs::write(&path, earlier).unwrap();
        assert!(file.read().is_empty());
        fs::write(&path, "{").unwrap();
        assert!(file.read().is_empty());
        assert!(KeptFile::new(scratch.path(), 1).write(vec![kept(3)]).is_ok() && file.read().is_empty());
        assert!(KeptFile::new(Path::new("/proc/nowhere"), 0).write(Vec::new()).is_err());
    }

    #[test]
    fn the_newest_is_written() {
        let scratch = tempdir().unwrap();
        let file = KeptFile::new(scratch.path(), 0);
        let keeper = Keeper::start(file.clone()).unwrap();
        (1..=50).for_each(|number| keeper.keep(vec![kept(number)]));
        let begun = std::time::Instant::now();
        while file.read() != [kept(50)] && begun.elapsed().as_secs() < 20 {
            thread::yield_now();
        }
        assert_eq!(file.read(), [kept(50)]);
    }
}
