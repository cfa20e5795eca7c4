//! The daemon's end of the control socket.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};
use serde::Serialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

use super::inspector::Inspector;
use super::view::SCHEMA;
use super::{PATH_MAX, STATUS, is_too_long};
use crate::state::{self, StateError};

/// How many clients there may be at a time: a person's or two, and what watches.
pub const CLIENTS_MAX: usize = 8;
/// The longest question, in bytes.
const QUESTION_MAX: usize = 64;
/// How long a client may take over its question.
const ASK_WITHIN: Duration = Duration::from_secs(2);
/// How long it may take to read the answer. Shorter than others ask again for a place ([`ANSWER_WITHIN`](super::client::ANSWER_WITHIN)).
const READ_WITHIN: Duration = Duration::from_secs(2);
/// How long to wait after the socket itself failed.
const AFTER_ERROR: Duration = Duration::from_millis(100);

/// Why there is no control socket. None of these keeps the daemon from serving.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The administrator's: another daemon has the same state directory.
    #[error("another daemon has its control socket in {}: give each daemon a `state_directory` of its own", .0.display())]
    Living(PathBuf),
    /// The administrator's: the kernel has room for 107 bytes.
    #[error("the path {} is too long for a socket (more than {PATH_MAX} bytes): choose a shorter `state_directory`", .0.display())]
    TooLong(PathBuf),
    /// Somebody's: what is in the place of the socket is none, and is not ours to remove.
    #[error("{} is no socket: remove it, or choose another `state_directory`", .0.display())]
    NotASocket(PathBuf),
    /// Others could put a socket of theirs there, or the directory cannot be had.
    #[error(transparent)]
    State(#[from] StateError),
    /// The socket cannot be made.
    #[error("cannot {what} {}: {error} (is the `state_directory` on a file system that can be written, and root's?)", path.display())]
    Kernel {
        /// What was tried.
        what: &'static str,
        /// With what.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        error: io::Error,
    },
}

/// The control socket, as long as it is kept. Its file goes with it.
#[derive(Debug)]
pub struct Control {
    path: PathBuf,
    /// Device and number of the socket's file: what another one has put there stays.
    made: (u64, u64),
    /// Locked as long as this daemon lives: whoever finds it free may remove what a dead one has left.
    _directory: File,
    task: JoinHandle<()>,
}

impl Control {
    /// Makes the socket in `directory` (and that, if need be) and answers from then on. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// See [`ControlError`].
    pub fn open(directory: &Path, inspector: Arc<Inspector>) -> Result<Self, ControlError> {
        let path = super::path(directory);
        if is_too_long(&path) {
            return Err(ControlError::TooLong(path));
        }
        let kept = keep(directory)?;
        match fs::symlink_metadata(&path) {
            Ok(about) if !about.file_type().is_socket() => return Err(ControlError::NotASocket(path)),
            // A dead daemon's: a living one would have the lock.
            Ok(_) => fs::remove_file(&path).map_err(failed("remove", &path))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed("look at", &path)(error)),
        }
        let listener = UnixListener::bind(&path).map_err(failed("make the control socket", &path))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).map_err(failed("keep others from", &path))?;
        let about = fs::symlink_metadata(&path).map_err(failed("look at", &path))?;
        let made = (about.dev(), about.ino());
        Ok(Self { path, made, _directory: kept, task: tokio::spawn(serve(listener, inspector)) })
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        self.task.abort();
        if fs::symlink_metadata(&self.path).is_ok_and(|about| (about.dev(), about.ino()) == self.made) {
            // A file that stays is taken for a dead daemon's, which is right.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// The state directory, made if need be and locked.
fn keep(directory: &Path) -> Result<File, ControlError> {
    let kept = state::directory(directory)?;
    match flock(&kept, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(kept),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(ControlError::Living(directory.to_owned())),
        Err(error) => Err(failed("lock", directory)(error.into())),
    }
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ControlError {
    let path = path.to_owned();
    move |error| ControlError::Kernel { what, path, error }
}

async fn serve(listener: UnixListener, inspector: Arc<Inspector>) {
    let places = Arc::new(Semaphore::new(CLIENTS_MAX));
    // One report at a time: it costs a processor for a moment, whoever asks.
    let turn = Arc::new(Semaphore::new(1));
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::debug!("the control socket: {error}");
                sleep(AFTER_ERROR).await;
                continue;
            }
        };
        let Ok(place) = Arc::clone(&places).try_acquire_owned() else {
            refuse(
                &stream,
                &Refused { again: true, ..Refused::new("too many clients look at once: try again in some seconds") },
            );
            continue;
        };
        let (inspector, turn) = (Arc::clone(&inspector), Arc::clone(&turn));
        tokio::spawn(async move {
            // A client that has gone meanwhile is nobody's loss.
            let _ = converse(stream, inspector, &turn).await;
            drop(place);
        });
    }
}

async fn converse(mut stream: UnixStream, inspector: Arc<Inspector>, turn: &Semaphore) -> io::Result<()> {
    if !is_permitted(stream.peer_cred()?.uid()) {
        refuse(&stream, &Refused::new("only root may look inside"));
        return Ok(());
    }
    let Ok(question) = timeout(ASK_WITHIN, question(&mut stream)).await else { return Ok(()) };
    let answer = match question?.as_deref() {
        Some(STATUS) => {
            let _turn = turn.acquire().await.map_err(io::Error::other)?;
            // Beside what is served: it asks the kernel for its counters, and there may be many domains to be told of.
            let told = tokio::task::spawn_blocking(move || line(&inspector.report()));
            told.await.map_err(io::Error::other)?
        }
        Some(_) | None => line(&Refused::new("the one question is `status`, and a line end")),
    };
    let said = async {
        stream.write_all(&answer).await?;
        stream.shutdown().await
    };
    timeout(READ_WITHIN, said).await.unwrap_or(Ok(()))
}

/// Root, or whoever the daemon itself runs as.
fn is_permitted(uid: u32) -> bool {
    uid == 0 || uid == rustix::process::geteuid().as_raw()
}

/// The line that a client sends; `None` where it is none, or too long.
async fn question(stream: &mut UnixStream) -> io::Result<Option<String>> {
    let mut bytes = [0; QUESTION_MAX];
    let mut len = 0;
    while let Some(room) = bytes.get_mut(len..).filter(|room| !room.is_empty()) {
        let count = stream.read(room).await?;
        if count == 0 {
            return Ok(None);
        }
        len += count;
        let so_far = bytes.get(..len).unwrap_or_default();
        if let Some(end) = so_far.iter().position(|byte| *byte == b'\n') {
            return Ok(std::str::from_utf8(&so_far[..end]).ok().map(|line| line.trim().to_owned()));
        }
    }
    Ok(None)
}

/// What is said to whoever gets no report.
#[derive(Serialize)]
struct Refused {
    schema: u32,
    error: &'static str,
    /// Whether it is worth asking again in a moment.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    again: bool,
}

impl Refused {
    fn new(error: &'static str) -> Self {
        Self { schema: SCHEMA, error, again: false }
    }
}

/// Says no without waiting for anybody.
fn refuse(stream: &UnixStream, why: &Refused) {
    let _ = stream.try_write(&line(why));
}

/// As one line.
fn line(what: &impl Serialize) -> Vec<u8> {
    // Cannot fail: there are no maps with other keys than texts in it, and no writer that fails.
    let mut bytes = serde_json::to_vec(what).unwrap_or_default();
    bytes.push(b'\n');
    bytes
}
