//! The history of requests: what the daemon writes, one JSON object a line, and `fence-daemon
//! history` reads.
//!
//! New lines go to [`FILE`]. When that is full it becomes [`OLD_FILE`], whose contents are dropped.

use std::fs;
use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::report::Steps;

/// The file that new lines go to.
pub const FILE: &str = "history";
/// The file before.
pub const OLD_FILE: &str = "history.1";
/// The length in bytes at which a file is full. Both together have room for some 20,000 requests.
pub const FILE_MAX: u64 = 4 << 20;

/// A line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Its number. It goes on over the daemon's restarts, and begins again when the files are gone.
    pub id: u64,
    /// When it happened: of a request, when its datagram arrived.
    pub time_unix_ms: u64,
    /// What happened.
    #[serde(flatten)]
    pub event: Event,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// A signed request ended.
    Request(Asked),
    /// A daemon ended while it served a request.
    Unfinished(Unfinished),
    /// Requests came without a signature. They are named at most every ten minutes.
    Unsigned(UnsignedSender),
    /// A daemon started.
    Started {
        /// Its version.
        version: String,
        /// Its process ID.
        pid: u32,
    },
    /// Lines could not be written.
    Lost {
        /// How many.
        count: u64,
    },
}

/// A request and its end, as in the report.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Asked {
    /// The operation.
    pub op: String,
    /// The domain as the request spells it. `null` if it names none.
    pub domain: Option<String>,
    /// The client's address and port, or its domain.
    pub client: String,
    /// The client's sequence number.
    pub seqno: u32,
    /// `kernel`, `socket`, `tcp`, `vsock` or `serial`.
    pub via: String,
    /// The name of the listener's section. `null` if it has none.
    pub listener: Option<String>,
    /// How it ended.
    pub result: String,
    /// The outcome in more words, as in the log.
    pub detail: String,
    /// Its steps.
    pub steps: Steps,
}

/// A request that a daemon had begun when it ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unfinished {
    /// The operation.
    pub op: String,
    /// The domain, in small letters.
    pub domain: String,
    /// The client's sequence number.
    pub seqno: u32,
}

/// A sender of requests without a signature.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnsignedSender {
    /// Its address.
    pub address: String,
    /// Its hardware address, if known.
    pub mac: Option<String>,
    /// How many came, as far as the daemon remembers.
    pub count: u64,
}

/// Parses lines. A line that is none was cut off by a crash of the host, and is left out.
#[must_use]
pub fn parse(bytes: &[u8]) -> Vec<Record> {
    bytes.split(|byte| *byte == b'\n').filter_map(|line| serde_json::from_slice(line).ok()).collect()
}

/// Reads the history, the oldest first. Without files it is empty.
///
/// # Errors
/// A file cannot be read.
pub fn read(directory: &Path) -> io::Result<Vec<Record>> {
    let mut all = Vec::new();
    // The newer one first: what moves meanwhile is then read twice, and not missed.
    for name in [FILE, OLD_FILE] {
        match fs::read(directory.join(name)) {
            Ok(bytes) => all.extend(parse(&bytes)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    all.sort_by_key(|record: &Record| record.id);
    all.dedup_by_key(|record| record.id);
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn started(id: u64) -> Record {
        Record { id, time_unix_ms: 5, event: Event::Started { version: "1".to_owned(), pid: 7 } }
    }

    #[test]
    fn lines_that_were_cut_off_are_left_out_and_moved_ones_are_read_once() {
        let line = |id| serde_json::to_string(&started(id)).unwrap();
        assert_eq!(line(3), "{\"id\":3,\"time_unix_ms\":5,\"event\":\"started\",\"version\":\"1\",\"pid\":7}");
        let directory = tempfile::tempdir().unwrap();
        assert!(read(directory.path()).unwrap().is_empty());
        fs::write(directory.path().join(OLD_FILE), format!("{}\n{}\n", line(1), line(2))).unwrap();
        let cut = &line(4)[..20];
        fs::write(directory.path().join(FILE), format!("{}\n{cut}\n{}\n{cut}", line(2), line(3))).unwrap();
        assert_eq!(read(directory.path()).unwrap(), [started(1), started(2), started(3)]);
    }
}
