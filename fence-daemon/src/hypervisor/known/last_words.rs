//! The last word of a URI that does not answer.
//!
//! A domain can be known at several URIs, and run at one of them only. When that one falls silent,
//! the others say truthfully "shut off", and the domain runs. So the last word of a silent URI
//! counts, as long as it is silent:
//!
//! | last word of the silent URI | another URI says "shut off" | another URI runs it |
//! |---|---|---|
//! | none: it never knew the domain | off; `on` starts it there | killed there, success |
//! | shut off, or no such domain | off; `on` starts it there | killed there, success |
//! | active, and its process lives here | on; killed by its process | both killed |
//! | active, and its process is dead here | off; `on` starts it there | killed there, success |
//! | active; a container's, and this host has no process of it | off; `on` starts it there | killed there, success |
//! | active; a machine's, likewise, and libvirt's record here has it, without a migration | off; `on` starts it there | killed there, success |
//! | active, and none of these | failure of `status`, `off`, `on` | `off`: killed there, and failure |
//! | moved to another host, or stopped for a migration | failure of `status`, `off` | killed there, success |
//!
//! - The veto ends when the URI answers, whatever it says then. An administrator who knows that the
//!   silent host is dead removes its URI from the configuration.
//! - A URI that never knew the domain has no veto: an unused `lxc:///` must not keep every QEMU
//!   guest from being fenced.
//! - "Moved away" at the silent URI is no veto once the domain runs at another URI: it went there.
//! - The words outlive this daemon. They stand in one file of the state directory ([`FILE`]). The
//!   whole file is written soon after the table changes, and never during a fence.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use fence_common::sync::lock;
use fence_common::target::Target;
use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, watch};
use tokio::time::sleep;
use uuid::Uuid;

use super::Uri;
use crate::hypervisor::libvirt::{Power, State};
use crate::state::file;

/// The file in the state directory.
const FILE: &str = "last-known";
/// The form of what is written; another one is not read.
const VERSION: u32 = 1;
/// The largest file that is read, in bytes.
const SIZE_LIMIT: usize = 8 << 20;
/// For how long changes are gathered before they are written: a hundred starting guests are one
/// change.
const GATHER: Duration = Duration::from_millis(50);

/// The last word of a URI about a domain, if it counts while the URI is silent: active, or moved
/// away.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Word {
    pub(crate) name: String,
    pub(crate) power: Power,
}

/// What an earlier daemon knew of a URI's domains. A word goes when this daemon has seen the
/// domain.
#[derive(Debug, Default)]
pub(crate) struct Recalled(Mutex<HashMap<Uuid, Word>>);

impl Recalled {
    fn words(&self) -> MutexGuard<'_, HashMap<Uuid, Word>> {
        lock(&self.0)
    }

    pub(crate) fn find(&self, target: &Target) -> Option<(Uuid, Word)> {
        let words = self.words();
        let found = match target {
            Target::Uuid(uuid) => words.get_key_value(uuid),
            Target::Name(name) => words.iter().find(|(_, word)| word.name == *name),
        };
        found.map(|(uuid, word)| (*uuid, word.clone()))
    }

    pub(crate) fn all(&self) -> Vec<(Uuid, Word)> {
        self.words().iter().map(|(uuid, word)| (*uuid, word.clone())).collect()
    }

    pub(crate) fn forget(&self, uuid: Uuid) {
        self.words().remove(&uuid);
    }
}

/// The file's content.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct StoredWords {
    version: u32,
    domains: Vec<StoredWord>,
}

/// One word in the file.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
struct StoredWord {
    uri: String,
    uuid: Uuid,
    name: String,
    /// libvirt's `virDomainState` of an active domain. `null`: it has moved away.
    state: Option<u8>,
}

/// Gives each URI what an earlier daemon knew, before anything is asked.
pub(crate) fn recall(uris: &[Arc<Uri>], directory: &Path) {
    let lines = match read(directory) {
        Ok(lines) => lines,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return,
        Err(error) => {
            let directory = directory.display();
            tracing::error!(%directory, %error, "cannot read what an earlier daemon knew of domains: a silent URI has no last word");
            return;
        }
    };
    for StoredWord { uri, uuid, name, state } in lines {
        let Some(uri) = uris.iter().find(|known| *known.text == *uri) else { continue };
        let power = state.map_or(Power::MovedAway, |state| Power::Active(State(state)));
        uri.table.recalled.words().insert(uuid, Word { name, power });
    }
}

/// Follows all tables as long as the daemon lives, and keeps the file as they are.
pub(crate) async fn keep(uris: Vec<Arc<Uri>>, directory: Option<PathBuf>, mut stopped: watch::Receiver<bool>) {
    let changed = Arc::new(Notify::new());
    for uri in &uris {
        let (mut news, mut state, changed) = (uri.table.news(), uri.state(), Arc::clone(&changed));
        tokio::spawn(async move {
            loop {
                // An error means that the URI is gone.
                let more = tokio::select! {
                    more = news.changed() => more,
                    more = state.changed() => more,
                };
                if more.is_err() {
                    return;
                }
                changed.notify_one();
            }
        });
    }
    let mut written = lines(&uris);
    let mut ends = false;
    while !ends {
        tokio::select! {
            // An error means that the sender is gone. The rest is written then.
            _ = stopped.wait_for(|&stop| stop) => ends = true,
            () = changed.notified() => {}
        }
        if !ends {
            sleep(GATHER).await;
        }
        settle(&uris);
        let Some(directory) = &directory else { continue };
        let now = lines(&uris);
        if now == written {
            continue;
        }
        let (place, kept) = (directory.clone(), StoredWords { version: VERSION, domains: now.clone() });
        // On a thread of its own: the file system may hang.
        let write = tokio::task::spawn_blocking(move || write(&place, &kept));
        match write.await.unwrap_or_else(|error| Err(error.into())) {
            Ok(()) => written = now,
            Err(error) => {
                let directory = directory.display();
                tracing::warn!(%directory, %error, "if this daemon ends, the next one will not know what runs at a URI that is silent then");
            }
        }
    }
}

/// A domain that runs at a URI has arrived there. That it moved away from a silent URI is obsolete.
fn settle(uris: &[Arc<Uri>]) {
    let running: Vec<_> = uris.iter().filter(|uri| uri.is_lively()).flat_map(|uri| uri.table.running()).collect();
    for uri in uris.iter().filter(|uri| !uri.state().borrow().connected) {
        running.iter().for_each(|uuid| uri.table.note_found(*uuid));
    }
}

/// All words that the next daemon must know. What lives inside this process dies with it.
fn lines(uris: &[Arc<Uri>]) -> Vec<StoredWord> {
    let mut lines: Vec<_> = uris
        .iter()
        .filter(|uri| !uri.is_in_process())
        .flat_map(|uri| uri.table.last_words().into_iter().map(|word| (uri.text.to_string(), word)))
        .map(|(uri, (uuid, Word { name, power }))| {
            let state = if let Power::Active(State(state)) = power { Some(state) } else { None };
            StoredWord { uri, uuid, name, state }
        })
        .collect();
    lines.sort_unstable();
    lines
}

fn read(directory: &Path) -> io::Result<Vec<StoredWord>> {
    let kept: StoredWords = serde_json::from_slice(&file::read(directory, FILE, SIZE_LIMIT)?)?;
    if kept.version == VERSION { Ok(kept.domains) } else { Err(io::Error::other("it has an unknown form")) }
}

fn write(directory: &Path, kept: &StoredWords) -> io::Result<()> {
    file::replace(directory, FILE, &serde_json::to_vec(kept)?).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tempfile::tempdir;

    const URI: &str = "qemu+unix:///system?socket=/nonexistent/socket";

    fn line(number: u128, state: Option<u8>) -> StoredWord {
        StoredWord { uri: URI.to_owned(), uuid: Uuid::from_u128(number), name: format!("vm{number}"), state }
    }

    #[test]
    fn the_next_daemon_knows_the_last_words() {
        let scratch = tempdir().unwrap();
        let directory = scratch.path().join("state");
        let domains = vec![line(1, Some(1)), line(2, None)];
        write(&directory, &StoredWords { version: VERSION, domains: domains.clone() }).unwrap();
        let uris = [Uri::new(URI, 0), Uri::new("lxc:///", 1)];
        recall(&uris, &directory);
        assert_eq!(lines(&uris), domains);
        assert!(uris[1].table.last_words().is_empty());
        let word = uris[0].table.last_word(&Target::Name("vm1".to_owned()));
        assert_eq!(word.map(|(_, word)| word.power), Some(Power::Active(State(1))));
        assert_eq!(uris[0].table.last_word(&Target::Uuid(Uuid::from_u128(3))), None);
        // libvirt says that there is no such domain: that is the last word now.
        uris[0].table.put(Uuid::from_u128(1), None);
        assert_eq!(lines(&uris), [line(2, None)]);
    }

    #[test]
    fn a_file_that_cannot_be_read_is_no_obstacle() {
        let scratch = tempdir().unwrap();
        let uris = [Uri::new(URI, 0)];
        for bytes in [&b"{"[..], br#"{"version":2,"domains":[]}"#, b""] {
            std::fs::write(scratch.path().join(FILE), bytes).unwrap();
            recall(&uris, scratch.path());
            assert!(lines(&uris).is_empty());
        }
        assert!(write(Path::new("/proc/nowhere"), &StoredWords::default()).is_err());
    }
}
