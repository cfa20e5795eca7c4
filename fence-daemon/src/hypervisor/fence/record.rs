//! Restarts that are still to be done, on disk: if this daemon dies the next one starts what this one has killed.
//!
//! One file per restart under a directory of `/run`, which a reboot of the host empties. It is written *before* the kill and removed when
//! the restart is done, given up or superseded; while its daemon lives it is locked, so that two daemons of one host leave each
//! other's alone. A transient domain's XML is in it, passwords included, as it is in libvirt's own files there: root's alone.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use uuid::Uuid;
use zeroize::Zeroizing;

use crate::clock::Moment;
use crate::state;

/// The form of what is written; another one is not read.
const VERSION: u32 = 1;
/// The largest file that is read, in bytes.
const SIZE_LIMIT: u64 = 8 << 20;

/// What a restart needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    version: u32,
    pub(crate) uri: String,
    pub(crate) uuid: Uuid,
    pub(crate) name: String,
    /// libvirt's number of the instance that was to be killed.
    pub(crate) instance: Option<u32>,
    /// Whether it was proven dead: until then it may have ended in another way, and must not be brought back by what is known here alone.
    #[serde(default)]
    pub(crate) killed: bool,
    /// When that was, in nanoseconds since the host's boot.
    #[serde(default)]
    pub(crate) died: Option<u64>,
    /// A transient domain's XML; a persistent one starts from its definition.
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
pub(crate) struct Kept {
    path: PathBuf,
    _lock: File,
}

impl Kept {
    /// The restart is no longer to be done.
    pub(crate) fn remove(&self) {
        if let Err(error) = fs::remove_file(&self.path) {
            let path = self.path.display();
            tracing::warn!(%path, %error, "cannot remove the record of a restart: remove it by hand, or the next daemon may do it again");
        }
    }
}

/// A record that a dead daemon has left.
#[derive(Debug)]
pub(crate) struct Inherited {
    pub(crate) record: Record,
    pub(crate) kept: Kept,
    /// How long ago it was written, by the wall clock.
    pub(crate) age: Duration,
}

/// Where records are kept.
#[derive(Debug)]
pub(crate) struct Records {
    directory: Option<PathBuf>,
}

impl Records {
    /// Keeps them in `directory`, which is made when there is something to keep; `None` keeps none.
    pub(crate) fn new(directory: Option<PathBuf>) -> Self {
        Self { directory }
    }

    /// Writes a record. Without one the restart is done all the same, as long as this daemon lives.
    pub(crate) fn write(&self, record: &Record) -> Option<Kept> {
        let directory = self.directory.as_deref()?;
        let kept = write(directory, record);
        kept.inspect_err(|error| {
            let directory = directory.display();
            tracing::warn!(%directory, %error, "this reboot will be forgotten if this daemon dies before it is done");
        })
        .ok()
    }

    /// The domain of `record`, which was written before the kill, has died at `at`.
    pub(crate) fn confirm(&self, record: Record, kept: Kept, at: Moment) -> Kept {
        // In the first one's place, or that stays.
        self.write(&record.of_dead(Some(at))).unwrap_or(kept)
    }

    /// The records that dead daemons have left, which are ours now.
    pub(crate) fn take_over(&self) -> Vec<Inherited> {
        let entries = self.directory.iter().filter_map(|directory| fs::read_dir(directory).ok()).flatten().flatten();
        let is_record = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "restart");
        let mut found = Vec::new();
        for path in entries.map(|entry| entry.path()).filter(is_record) {
            match take(&path) {
                Ok(Some(record)) => found.push(record),
                // Its daemon lives.
                Ok(None) => {}
                Err(error) => {
                    tracing::error!(path = %path.display(), %error, "a restart that another daemon has left is not done");
                    let _ = fs::remove_file(&path);
                }
            }
        }
        found
    }
}

fn write(directory: &Path, record: &Record) -> io::Result<Kept> {
    // Named by what it is about: a second record of the same domain takes the first one's place.
    let harmless = |c: char| if c.is_ascii_alphanumeric() { c } else { '_' };
    let name: String = record.uri.chars().map(harmless).take(100).collect();
    let name = format!("{}-{name}", record.uuid);
    let draft_name = format!("{name}.draft");
    let (path, draft) = (directory.join(format!("{name}.restart")), directory.join(&draft_name));
    let _ = fs::remove_file(&draft);
    let file = state::open(directory, &draft_name, OpenOptions::new().write(true).create_new(true))?;
    let fill = || -> io::Result<()> {
        flock(&file, FlockOperation::NonBlockingLockExclusive)?;
        let text = Zeroizing::new(serde_json::to_vec(record)?);
        (&file).write_all(&text)?;
        fs::rename(&draft, &path)
    };
    // Half of one may hold a password, and takes up what may be the last of the room.
    fill().inspect_err(|_| drop(fs::remove_file(&draft)))?;
    Ok(Kept { path, _lock: file })
}

fn take(path: &Path) -> io::Result<Option<Inherited>> {
    // What another user could have put there would be started as root.
    let (Some(directory), Some(name)) = (path.parent(), path.file_name().and_then(|name| name.to_str())) else {
        return Err(io::Error::other("it has a strange name"));
    };
    let file = state::open(directory, name, OpenOptions::new().read(true))?;
    let about = file.metadata()?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
        Err(error) => return Err(error.into()),
    }
    let age = SystemTime::now().duration_since(about.modified()?).unwrap_or_default();
    let mut text = Zeroizing::new(Vec::new());
    (&file).take(SIZE_LIMIT).read_to_end(&mut text)?;
    // The error's text may quote the record, which may hold passwords.
    let record: Record =
        serde_json::from_slice(&text).map_err(|_| io::Error::other("it is not a record of this daemon"))?;
    if record.version != VERSION {
        return Err(io::Error::other(format!("it is of version {}, this daemon knows {VERSION}", record.version)));
    }
    Ok(Some(Inherited { record, kept: Kept { path: path.to_owned(), _lock: file }, age }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;
    use tempfile::{TempDir, tempdir};

    fn record() -> Record {
        Record::new("qemu:///system", Uuid::from_u128(7), "node 1", Some(3), Some("<domain passwd='x'/>"))
    }

    fn records(scratch: &TempDir) -> Records {
        Records::new(Some(scratch.path().join("state")))
    }

    #[test]
    fn what_a_dead_daemon_left_is_taken_over_and_a_living_ones_is_not() {
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
        assert_eq!(fs::metadata(&kept.path).unwrap().mode() & 0o777, 0o600);
        assert_eq!(fs::metadata(kept.path.parent().unwrap()).unwrap().mode() & 0o777, 0o700);
    }

    #[test]
    fn how_old_a_record_is_is_told() {
        let scratch = tempdir().unwrap();
        let records = records(&scratch);
        let kept = records.write(&record()).unwrap();
        kept._lock.set_modified(SystemTime::now() - Duration::from_secs(3000)).unwrap();
        drop(kept);
        let age = records.take_over().remove(0).age;
        assert!(age >= Duration::from_secs(3000) && age < Duration::from_secs(3600), "{age:?}");
    }

    #[test]
    fn what_is_strange_is_told_and_removed() {
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
    fn without_a_place_nothing_is_kept_and_nothing_fails() {
        assert!(Records::new(None).write(&record()).is_none());
        let nowhere = Records::new(Some("/proc/nowhere".into()));
        assert!(nowhere.write(&record()).is_none());
        assert!(nowhere.take_over().is_empty());
    }
}
