//! Restarts that are still to be done, on disk. If this daemon dies, the next one starts what this
//! one has killed.
//!
//! Each restart has one file in a directory of `/run`, which a reboot of the host empties. The file
//! is written *before* the kill, and removed when the restart is done, given up or superseded. It
//! is locked while its daemon lives, so that two daemons of one host leave each other's alone. It
//! holds a transient domain's XML, passwords included, as libvirt's own files there do: only root
//! can read it.

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use uuid::Uuid;
use zeroize::Zeroizing;

use crate::clock::Moment;
use crate::state::file::{self, Locked};

/// How the files' names end.
const ENDING: &str = "restart";
/// The form of what is written; another one is not read.
const VERSION: u32 = 1;
/// The largest file that is read, in bytes.
const SIZE_LIMIT: usize = 8 << 20;

/// What a restart needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    version: u32,
    pub(crate) uri: String,
    pub(crate) uuid: Uuid,
    pub(crate) name: String,
    /// libvirt's number of the instance that was to be killed.
    pub(crate) instance: Option<u32>,
    /// Whether it was proven dead. Until then it may have ended in another way, and what is known
    /// here alone must not bring it back.
    #[serde(default)]
    pub(crate) killed: bool,
    /// When that was, in nanoseconds since the host's boot.
    #[serde(default)]
    pub(crate) died: Option<u64>,
    /// A transient domain's XML. A persistent one starts from its definition.
    pub(crate) xml: Option<Zeroizing<String>>,
}

impl Record {
    pub(crate) fn new(uri: &str, uuid: Uuid, name: &str, instance: Option<u32>, xml: Option<&str>) -> Self {
        let (uri, name, xml) = (uri.to_owned(), name.to_owned(), xml.map(|xml| Zeroizing::new(xml.to_owned())));
        Self { version: VERSION, uri, uuid, name, instance, killed: false, died: None, xml }
    }

    /// The same of a domain that has died at `at`.
    pub(crate) fn of_dead(mut self, at: Option<Moment>) -> Self {
        self.killed = true;
        self.died = at.map(Moment::nanos);
        self
    }
}

/// A record on disk, and the lock that says that its daemon lives.
#[derive(Debug)]
pub(crate) struct RecordFile {
    directory: PathBuf,
    name: String,
    _lock: Locked,
}

impl RecordFile {
    /// The restart is no longer to be done.
    pub(crate) fn remove(&self) {
        if let Err(error) = file::remove(&self.directory, &self.name) {
            let path = file::path(&self.directory, &self.name);
            tracing::warn!(path = %path.display(), %error, "cannot remove the record of a restart: remove it by hand, or the next daemon may do it again");
        }
    }
}

/// A record that a dead daemon has left.
#[derive(Debug)]
pub(crate) struct Inherited {
    pub(crate) record: Record,
    pub(crate) kept: RecordFile,
    /// How long ago it was written, by the wall clock.
    pub(crate) age: Duration,
}

/// Where records are kept.
#[derive(Debug)]
pub(crate) struct Records {
    directory: Option<PathBuf>,
}

impl Records {
    /// Keeps them in `directory`, which is made when it is needed. `None` keeps none.
    pub(crate) fn new(directory: Option<PathBuf>) -> Self {
        Self { directory }
    }

    /// Writes a record. If that fails, the restart is done all the same while this daemon lives.
    pub(crate) fn write(&self, record: &Record) -> Option<RecordFile> {
        let directory = self.directory.as_deref()?;
        let kept = write(directory, record);
        kept.inspect_err(|error| {
            let directory = directory.display();
            tracing::warn!(%directory, %error, "this reboot will be forgotten if this daemon dies before it is done");
        })
        .ok()
    }

    /// The domain of `record`, which was written before the kill, has died at `at`.
    pub(crate) fn confirm(&self, record: Record, kept: RecordFile, at: Moment) -> RecordFile {
        // It takes the first one's place, or the first one stays.
        self.write(&record.of_dead(Some(at))).unwrap_or(kept)
    }

    /// The records that dead daemons have left, which are ours now.
    pub(crate) fn take_over(&self) -> Vec<Inherited> {
        let Some(directory) = &self.directory else { return Vec::new() };
        let mut found = Vec::new();
        for name in file::names(directory, ENDING) {
            match take(directory, &name) {
                Ok(Some(record)) => found.push(record),
                // Its daemon lives.
                Ok(None) => {}
                Err(error) => {
                    let path = file::path(directory, &name);
                    tracing::error!(path = %path.display(), %error, "cannot read the record of a restart that another daemon has left: it is not done");
                    let _ = file::remove(directory, &name);
                }
            }
        }
        found
    }
}

fn write(directory: &Path, record: &Record) -> io::Result<RecordFile> {
    // Named by the domain: a second record of it takes the first one's place.
    let harmless = |c: char| if c.is_ascii_alphanumeric() { c } else { '_' };
    let uri: String = record.uri.chars().map(harmless).take(100).collect();
    let name = format!("{}-{uri}.{ENDING}", record.uuid);
    let text = Zeroizing::new(serde_json::to_vec(record)?);
    let _lock = file::replace(directory, &name, &text)?;
    Ok(RecordFile { directory: directory.to_owned(), name, _lock })
}

fn take(directory: &Path, name: &str) -> io::Result<Option<Inherited>> {
    let Some(left) = file::take_over(directory, name, SIZE_LIMIT)? else { return Ok(None) };
    let text = Zeroizing::new(left.bytes);
    let age = SystemTime::now().duration_since(left.written).unwrap_or_default();
    // The error's text may quote the record, which may hold passwords.
    let record: Record =
        serde_json::from_slice(&text).map_err(|_| io::Error::other("it is not a record of this daemon"))?;
    if record.version != VERSION {
        return Err(io::Error::other(format!("it is of version {}, this daemon knows {VERSION}", record.version)));
    }
    let kept = RecordFile { directory: directory.to_owned(), name: name.to_owned(), _lock: left.lock };
    Ok(Some(Inherited { record, kept, age }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::MetadataExt;
    use tempfile::{TempDir, tempdir};

    fn record() -> Record {
        Record::new("qemu:///system", Uuid::from_u128(7), "node 1", Some(3), Some("<domain passwd='x'/>"))
    }

    fn records(scratch: &TempDir) -> Records {
        Records::new(Some(scratch.path().join("state")))
    }

    #[test]
    fn only_a_dead_daemons_file_is_taken_over() {
        let scratch = tempdir().unwrap();
        let kept = records(&scratch).write(&record()).unwrap();
        assert!(records(&scratch).take_over().is_empty(), "its daemon lives");
        // As when the process dies: the lock goes, the file stays.
        drop(kept);
        let mut left = records(&scratch).take_over();
        assert_eq!(left.len(), 1);
        let Inherited { record: found, kept, .. } = left.remove(0);
        assert_eq!(found, record());
        assert!(records(&scratch).take_over().is_empty(), "it is ours now");
        kept.remove();
        drop(kept);
        assert!(records(&scratch).take_over().is_empty());
    }

    #[test]
    fn records_are_for_root_alone() {
        let scratch = tempdir().unwrap();
        let kept = records(&scratch).write(&record()).unwrap();
        assert_eq!(fs::metadata(kept.directory.join(&kept.name)).unwrap().mode() & 0o777, 0o600);
        assert_eq!(fs::metadata(&kept.directory).unwrap().mode() & 0o777, 0o700);
    }

    #[test]
    fn a_record_knows_its_age() {
        let scratch = tempdir().unwrap();
        let records = records(&scratch);
        let kept = records.write(&record()).unwrap();
        let file = fs::File::options().write(true).open(kept.directory.join(&kept.name)).unwrap();
        file.set_modified(SystemTime::now() - Duration::from_secs(3000)).unwrap();
        drop(kept);
        let age = records.take_over().remove(0).age;
        assert!(age >= Duration::from_secs(3000) && age < Duration::from_secs(3600), "{age:?}");
    }

    #[test]
    fn strange_records_are_reported_and_removed() {
        let scratch = tempdir().unwrap();
        let records = records(&scratch);
        let directory = scratch.path().join("state");
        fs::create_dir(&directory).unwrap();
        fs::write(directory.join("a.restart"), b"{").unwrap();
        fs::write(directory.join("b.restart"), serde_json::to_vec(&Record { version: 2, ..record() }).unwrap())
            .unwrap();
        std::os::unix::fs::symlink("/etc/passwd", directory.join("c.restart")).unwrap();
        fs::write(directory.join("other"), b"not ours").unwrap();
        assert!(records.take_over().is_empty());
        let left: Vec<_> = fs::read_dir(&directory).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["other"]);
    }

    #[test]
    fn without_a_directory_nothing_is_stored_and_nothing_fails() {
        assert!(Records::new(None).write(&record()).is_none());
        let nowhere = Records::new(Some("/proc/nowhere".into()));
        assert!(nowhere.write(&record()).is_none());
        assert!(nowhere.take_over().is_empty());
    }
}
