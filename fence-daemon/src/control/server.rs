//! The daemon's end of the control socket.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use fence_control::report::SCHEMA;
use fence_control::{PATH_MAX, STATUS, is_too_long};
use serde::Serialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

use super::inspector::Inspector;
use crate::state::socket::{ControlSocketError, SocketFile};

/// How many clients there may be at a time: an administrator or two, and the monitoring.
pub const CLIENTS_MAX: usize = 8;
/// The longest question, in bytes.
const QUESTION_MAX: usize = 64;
/// How long a client may take over its question.
const ASK_WITHIN: Duration = Duration::from_secs(2);
/// How long it may take to read the answer. Shorter than the time for which other clients ask again
/// ([`ANSWER_WITHIN`](fence_control::client::ANSWER_WITHIN)).
const READ_WITHIN: Duration = Duration::from_secs(2);
/// How long to wait after the socket itself failed.
const AFTER_ERROR: Duration = Duration::from_millis(100);

/// Why there is no control socket. No error keeps the daemon from serving.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The administrator's: the kernel has room for 107 bytes.
    #[error("the path {} is too long for a socket (more than {PATH_MAX} bytes): choose a shorter `state_directory`", .0.display())]
    TooLong(PathBuf),
    /// The socket's file cannot be had.
    #[error(transparent)]
    File(#[from] ControlSocketError),
    /// The runtime cannot watch it.
    #[error("cannot watch the control socket: {0}")]
    Watch(#[source] io::Error),
}

/// The control socket. Dropping it removes its file.
#[derive(Debug)]
pub struct Control {
    task: JoinHandle<()>,
    _file: SocketFile,
}

impl Control {
    /// Creates the socket in `directory` (and that, if need be) and answers from then on. Must be
    /// called within a tokio runtime.
    ///
    /// # Errors
    /// See [`ControlError`].
    pub fn open(directory: &Path, inspector: Arc<Inspector>) -> Result<Self, ControlError> {
        let path = fence_control::path(directory);
        if is_too_long(&path) {
            return Err(ControlError::TooLong(path));
        }
        let (file, listener) = SocketFile::bind(directory, &path)?;
        let listener = UnixListener::from_std(listener).map_err(ControlError::Watch)?;
        Ok(Self { task: tokio::spawn(serve(listener, inspector)), _file: file })
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve(listener: UnixListener, inspector: Arc<Inspector>) {
    let places = Arc::new(Semaphore::new(CLIENTS_MAX));
    // One report at a time, since each costs a processor a moment.
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
                &NoReport { again: true, ..NoReport::new("too many clients look at once: try again in some seconds") },
            );
            continue;
        };
        let (inspector, turn) = (Arc::clone(&inspector), Arc::clone(&turn));
        tokio::spawn(async move {
            // A client that has gone meanwhile loses nothing.
            let _ = converse(stream, inspector, &turn).await;
            drop(place);
        });
    }
}

async fn converse(mut stream: UnixStream, inspector: Arc<Inspector>, turn: &Semaphore) -> io::Result<()> {
    if !is_permitted(stream.peer_cred()?.uid()) {
        refuse(&stream, &NoReport::new("only root may look inside"));
        return Ok(());
    }
    let Ok(question) = timeout(ASK_WITHIN, question(&mut stream)).await else { return Ok(()) };
    let answer = match question?.as_deref() {
        Some(STATUS) => {
            let _turn = turn.acquire().await.map_err(io::Error::other)?;
            // On a blocking thread: it asks the kernel for its counters, and there may be many
            // domains.
            let told = tokio::task::spawn_blocking(move || line(&inspector.report()));
            told.await.map_err(io::Error::other)?
        }
        Some(_) | None => line(&NoReport::new("the one question is `status`, and a line end")),
    };
    let said = async {
        stream.write_all(&answer).await?;
        stream.shutdown().await
    };
    timeout(READ_WITHIN, said).await.unwrap_or(Ok(()))
}

/// Root, or the daemon's own user.
fn is_permitted(uid: u32) -> bool {
    uid == 0 || uid == rustix::process::geteuid().as_raw()
}

/// The line that a client sends; `None` if there is none, or it is too long.
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

/// The answer to a client that gets no report.
#[derive(Serialize)]
struct NoReport {
    schema: u32,
    error: &'static str,
    /// Whether asking again in a moment can help.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    again: bool,
}

impl NoReport {
    fn new(error: &'static str) -> Self {
        Self { schema: SCHEMA, error, again: false }
    }
}

/// Says no without waiting for anybody.
fn refuse(stream: &UnixStream, why: &NoReport) {
    let _ = stream.try_write(&line(why));
}

/// As one line.
fn line(what: &impl Serialize) -> Vec<u8> {
    // Cannot fail: all keys of its maps are text, and the writer is a `Vec`.
    let mut bytes = serde_json::to_vec(what).unwrap_or_default();
    bytes.push(b'\n');
    bytes
}
