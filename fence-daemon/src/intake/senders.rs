//! The trusted senders, kept for the next daemon: it serves them even in a flood of unknown ones.
//!
//! They are one file in the state directory, `trusted`, of [`TRUSTED_MAX`] records. Each sender
//! keeps its record. Newcomers are limited as in [`fence_common::rate_limit`]. So a holder of the
//! key that makes up addresses needs an hour to push out a quiet sender.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::time::Duration;

use fence_common::rate_limit::{NEWCOMERS, Sender, TRUSTED_MAX};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::clock::Moment;
use crate::state::file::Locked;

/// The name of the file.
pub(crate) const FILE: &str = "trusted";

/// How old a record's time may get before it is rewritten. No sender is pushed out within a minute.
const REWRITE: Duration = Duration::from_secs(60);

/// A sender in the file. All zero is none.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct SenderRecord {
    at: [u8; 8],
    sender: Sender,
}

const LEN: usize = size_of::<SenderRecord>();

/// The trusted senders.
#[derive(Debug, Default)]
pub(crate) struct Senders {
    /// Each sender's record, and the time in it.
    known: BTreeMap<Sender, (usize, u64)>,
    newcomers_full_at: u64,
    file: Option<Locked>,
    complained: bool,
}

impl Senders {
    /// Opens the file and takes over the records of this boot.
    ///
    /// # Errors
    /// The file cannot be opened or read.
    pub(crate) fn open(directory: &Path, now: Moment) -> io::Result<Self> {
        let (file, bytes) = Locked::open_beside(directory, FILE, TRUSTED_MAX * LEN)?;
        let (records, _) = bytes.as_chunks::<LEN>();
        let mut known = BTreeMap::new();
        for (place, bytes) in records.iter().enumerate() {
            let record: SenderRecord = zerocopy::transmute!(*bytes);
            let at = u64::from_le_bytes(record.at);
            if at != 0 && at <= now.nanos() && record.sender.family != 0 {
                known.insert(record.sender, (place, at));
            }
        }
        Ok(Self { known, file: Some(file), ..Self::default() })
    }

    /// Records that a sender's digest was right, at a time on the monotonic clock.
    pub(crate) fn saw(&mut self, sender: Sender, now: u64) {
        let place = match self.known.get(&sender) {
            Some((_, at)) if Duration::from_nanos(now.saturating_sub(*at)) < REWRITE => return,
            Some((place, _)) => *place,
            None if !NEWCOMERS.allows(self.newcomers_full_at, now) => return,
            None => {
                self.newcomers_full_at = NEWCOMERS.draw(self.newcomers_full_at, now);
                self.free()
            }
        };
        self.known.insert(sender, (place, now));
        let record = SenderRecord { at: now.to_le_bytes(), sender };
        let Some(file) = &self.file else { return };
        if let Err(error) = file.write_at(record.as_bytes(), place * LEN)
            && !std::mem::replace(&mut self.complained, true)
        {
            tracing::warn!(%error, "a trusted sender is not stored: the next daemon will not trust it in a flood");
        }
    }

    /// A record that nobody has any more.
    fn free(&mut self) -> usize {
        if self.known.len() >= TRUSTED_MAX
            && let Some(oldest) = self.known.iter().min_by_key(|(_, (_, at))| *at).map(|(sender, _)| *sender)
            && let Some((place, _)) = self.known.remove(&oldest)
        {
            return place;
        }
        let mut taken: Vec<_> = self.known.values().map(|(place, _)| *place).collect();
        taken.sort_unstable();
        taken.iter().enumerate().find(|(number, place)| number != *place).map_or(taken.len(), |(number, _)| number)
    }

    /// All senders with their times, the latest one last.
    pub(crate) fn all(&self) -> Vec<(Sender, u64)> {
        let mut all: Vec<_> = self.known.iter().map(|(sender, (_, at))| (*sender, *at)).collect();
        all.sort_by_key(|(_, at)| *at);
        all
    }
}
