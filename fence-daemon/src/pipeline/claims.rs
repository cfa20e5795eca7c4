//! Stores which requests were claimed: if this daemon dies in the middle of one, the next daemon
//! does not carry it out again.
//!
//! The claims are one file in the state directory under `/run`, appended to before any action. A
//! claim has 80 bytes: the time, the request's identity, and whether another host asked for it. The
//! time is on the monotonic clock, which counts from the host's boot, and `/run` is empty then too.
//! Only requests that change a domain's power are kept, and only while their client could still be
//! asking.
//!
//! The replay cache cannot replace this file: it knows the bytes of a datagram. A client with
//! several addresses, or one that asks again, sends other bytes for the same request.

use std::io;
use std::path::Path;
use std::sync::Mutex;
use std::time::Duration;

use fence_common::ledger::{ID_LEN, RequestId};
use fence_common::sync::lock;

use crate::clock::Moment;
use crate::state::file::Locked;

/// The length of one claim in the file.
const LEN: usize = 80;
/// Where it says whether another host of the cluster asked: not zero.
const FOR_HOSTS: usize = 8 + ID_LEN;
/// How long a claim matters: a client asks for 30 s, and is answered within 25.
const RECENT: Duration = Duration::from_secs(60);
/// The length in bytes at which the file starts again: more claims than are remembered at a time.
const FILE_MAX: usize = LEN * 16_384;

/// The file, if there is one.
#[derive(Debug)]
pub struct Claims {
    file: Option<Mutex<Locked>>,
    found: Vec<Found>,
}

/// A claim of an earlier daemon.
#[derive(Clone, Copy, Debug)]
struct Found {
    at: Moment,
    id: RequestId,
    for_hosts: bool,
}

impl Claims {
    /// Keeps nothing.
    #[must_use]
    pub fn none() -> Self {
        Self { file: None, found: Vec::new() }
    }

    /// Opens the file in `directory`, creates both if need be, and reads an earlier daemon's
    /// claims. If that fails, it is logged and no claim is stored.
    #[must_use]
    pub fn open(directory: &Path) -> Self {
        match open(directory) {
            Ok((file, found)) => Self { file: Some(Mutex::new(file)), found },
            Err(error) => {
                let directory = directory.display();
                tracing::warn!(%directory, %error, "claims are not stored: a daemon that starts after a crash may carry out a request again");
                Self::none()
            }
        }
    }

    /// The claims that an earlier daemon made a short time before `now`.
    pub fn recent(&self, now: Moment) -> impl Iterator<Item = RequestId> + '_ {
        // A time in the future comes from another boot or a damaged record.
        let is_recent = move |at: Moment| at <= now && now.since(at) <= RECENT;
        self.found.iter().filter(move |found| is_recent(found.at)).map(|found| found.id)
    }

    /// All claims of requests that this host's clients sent to an earlier daemon, with their
    /// moments.
    pub fn of_clients(&self) -> impl Iterator<Item = (Moment, RequestId)> + '_ {
        let now = Moment::now();
        let of_clients = self.found.iter().filter(move |found| !found.for_hosts && found.at <= now);
        of_clients.map(|found| (found.at, found.id))
    }

    /// Stores the claim of a client's request. A failure only loses the record: fencing goes on.
    pub fn note(&self, at: Moment, id: RequestId) {
        self.store(at, id, false);
    }

    /// Stores the claim of a request that all hosts of the cluster carry out. Its client may be
    /// another host's.
    pub fn note_for_hosts(&self, at: Moment, id: RequestId) {
        self.store(at, id, true);
    }

    fn store(&self, at: Moment, id: RequestId, for_hosts: bool) {
        let Some(file) = &self.file else { return };
        let mut bytes = [0; LEN];
        bytes[..8].copy_from_slice(&at.nanos().to_le_bytes());
        bytes[8..FOR_HOSTS].copy_from_slice(&id.to_bytes());
        bytes[FOR_HOSTS] = u8::from(for_hosts);
        let written = lock(file).append(&bytes, u64::try_from(FILE_MAX).unwrap_or(u64::MAX));
        if let Err(error) = written {
            tracing::warn!(%error, "a claim is not stored: a daemon that starts after a crash may carry out this request again");
        }
    }
}

fn open(directory: &Path) -> io::Result<(Locked, Vec<Found>)> {
    let (file, bytes) = Locked::open(directory, "claims", 2 * FILE_MAX)?;
    let (claims, rest) = bytes.as_chunks::<LEN>();
    if !rest.is_empty() {
        // A daemon died in the middle of writing: what follows would be read shifted.
        file.truncate(bytes.len().saturating_sub(rest.len()))?;
    }
    Ok((file, claims.iter().filter_map(read).collect()))
}

fn read(bytes: &[u8; LEN]) -> Option<Found> {
    let (at, rest) = bytes.split_first_chunk::<8>()?;
    let (id, rest) = rest.split_first_chunk::<ID_LEN>()?;
    Some(Found {
        at: Moment::from_ktime(u64::from_le_bytes(*at)),
        id: RequestId::from_bytes(id),
        for_hosts: *rest.first()? != 0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use fence_common::replay_cache::DatagramId;
    use fence_common::wire::{Op, Request};
    use std::fs::{self, File, OpenOptions};
    use std::io::Write as _;
    use tempfile::tempdir;
    use zerocopy::FromZeros;

    fn id(seqno: u32) -> RequestId {
        let mut request = Request::new_zeroed();
        request.seqno = seqno.into();
        RequestId::of(Op::Off, &request)
    }

    fn recent(claims: &Claims, now: Moment) -> Vec<RequestId> {
        claims.recent(now).collect()
    }

    #[test]
    fn the_next_daemon_knows_recent_claims() {
        let scratch = tempdir().unwrap();
        let now = Moment::now();
        let first = Claims::open(scratch.path());
        assert!(recent(&first, now).is_empty());
        first.note(now.before(Duration::from_secs(61)), id(1));
        first.note(now.before(Duration::from_secs(10)), id(2));
        first.note(now.plus(Duration::from_secs(10)), id(3));
        assert!(recent(&Claims::open(scratch.path()), now).is_empty(), "two daemons share one file");
        drop(first);
        // One that was cut off in the middle.
        let file = scratch.path().join("claims");
        OpenOptions::new().append(true).open(&file).unwrap().write_all(&[7; 30]).unwrap();
        let second = Claims::open(scratch.path());
        assert_eq!(recent(&second, now), [id(2)]);
        second.note(now, id(4));
        drop(second);
        assert_eq!(recent(&Claims::open(scratch.path()), now), [id(2), id(4)]);
    }

    /// Shows why the replay cache, which also outlives the daemon, is not enough.
    #[test]
    fn only_the_claims_know_another_datagram_of_a_claimed_request() {
        let signed = |address: u8, digest: u8| {
            let mut request = Request::new_zeroed();
            request.hash_kind = 2;
            request.address[0] = address;
            request.hash = [digest; 64];
            request
        };
        let (one, other) = (signed(1, 1), signed(2, 2));
        assert_ne!(DatagramId::of(&one), DatagramId::of(&other));
        assert_eq!(RequestId::of(Op::Off, &one), RequestId::of(Op::Off, &other));
    }

    #[test]
    fn a_claim_for_other_hosts_is_no_clients() {
        let scratch = tempdir().unwrap();
        let (claims, now) = (Claims::open(scratch.path()), Moment::now());
        claims.note(now, id(1));
        claims.note_for_hosts(now, id(2));
        drop(claims);
        let claims = Claims::open(scratch.path());
        assert_eq!(recent(&claims, now), [id(1), id(2)]);
        assert!(claims.of_clients().eq([(now, id(1))]));
    }

    #[test]
    fn the_file_stays_small() {
        let scratch = tempdir().unwrap();
        let claims = Claims::open(scratch.path());
        let file = scratch.path().join("claims");
        File::options().write(true).open(&file).unwrap().set_len(FILE_MAX as u64).unwrap();
        claims.note(Moment::now(), id(1));
        assert_eq!(fs::metadata(&file).unwrap().len(), LEN as u64);
    }

    #[test]
    fn without_a_directory_no_claim_is_stored() {
        let claims = Claims::open(Path::new("/proc/nowhere"));
        claims.note(Moment::now(), id(1));
        assert!(recent(&claims, Moment::now()).is_empty());
    }
}
