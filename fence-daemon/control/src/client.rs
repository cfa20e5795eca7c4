//! The client of the control socket: asks for the report, and explains why there is none.

use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde::Deserialize;
use socket2::{Domain, SockAddr, Socket, Type};

use super::report::{Report, SCHEMA};
use super::{STATUS, is_too_long};

/// How long the daemon may take to answer. It answers within milliseconds, or hangs.
pub const ANSWER_WITHIN: Duration = Duration::from_secs(5);
/// The pause before the next attempt where the daemon serves too many clients.
const AGAIN: Duration = Duration::from_millis(100);
/// The longest answer, in bytes. Ten thousand domains need less.
const ANSWER_MAX: u64 = 64 << 20;

/// Why the daemon's report is not available.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No daemon listens on this control socket.
    #[error(
        "no daemon answers at {} ({error}): is it running? `systemctl status fence-daemon` or `pgrep -a fence-daemon`; one with another \
         configuration is asked with -f FILE, and where it could not make the socket its log says so (\"control socket\")",
        path.display()
    )]
    NotThere {
        /// The socket's path.
        path: PathBuf,
        /// The kernel's error.
        #[source]
        error: io::Error,
    },
    /// The user is not root.
    #[error("only root may look inside ({}: permission denied): try with sudo", .0.display())]
    NotPermitted(PathBuf),
    /// No UNIX socket can have this path: it is too long.
    #[error("the path {} is too long for a socket: the daemon has none there (choose a shorter `state_directory`)", .0.display())]
    TooLong(PathBuf),
    /// The daemon accepts the connection and does not answer.
    #[error(
        "the daemon at {} does not answer within {} s: it hangs, or the host does (`journalctl -u fence-daemon`, `uptime`)",
        .0.display(), ANSWER_WITHIN.as_secs()
    )]
    Silent(PathBuf),
    /// The connection failed in between.
    #[error("cannot ask the daemon at {}: {error}", path.display())]
    Broken {
        /// The socket's path.
        path: PathBuf,
        /// The kernel's error.
        #[source]
        error: io::Error,
    },
    /// The daemon rejects the request, for this reason.
    #[error("the daemon says: {0}")]
    Refused(String),
    /// The daemon's report has another version.
    #[error(
        "the daemon speaks version {0} of the status, this program version {SCHEMA}: one of them was updated; restart the daemon, or read --json"
    )]
    Schema(u32),
    /// The answer is no report.
    #[error("the daemon's answer is not understood: {0}")]
    Strange(#[source] serde_json::Error),
}

impl ClientError {
    /// Whether this error proves that no daemon runs. Other errors leave it open.
    #[must_use]
    pub fn is_nobody(&self) -> bool {
        matches!(self, Self::NotThere { .. })
    }
}

/// The fields that an answer of every version has.
#[derive(Deserialize)]
struct Head {
    schema: u32,
    error: Option<String>,
    /// Whether the client should ask again in a moment.
    #[serde(default)]
    again: bool,
}

/// Asks for the report and returns it as sent. While the daemon serves too many clients, this
/// function tries again: the daemon soon disconnects a client that hangs.
///
/// # Errors
/// See [`ClientError`].
pub fn ask(path: &Path) -> Result<String, ClientError> {
    if is_too_long(path) {
        return Err(ClientError::TooLong(path.to_owned()));
    }
    let failed = |error: io::Error| {
        let path = path.to_owned();
        let is = |kinds: &[io::ErrorKind]| kinds.contains(&error.kind());
        if is(&[io::ErrorKind::NotFound, io::ErrorKind::ConnectionRefused]) {
            ClientError::NotThere { path, error }
        } else if is(&[io::ErrorKind::PermissionDenied]) {
            ClientError::NotPermitted(path)
        } else if is(&[io::ErrorKind::WouldBlock, io::ErrorKind::TimedOut]) {
            ClientError::Silent(path)
        } else {
            ClientError::Broken { path, error }
        }
    };
    let until = Instant::now() + ANSWER_WITHIN;
    let mut answer = String::new();
    loop {
        exchange(path, &mut answer).map_err(failed)?;
        let again = serde_json::from_str(&answer).is_ok_and(|head: Head| head.again);
        if !again || Instant::now() >= until {
            break;
        }
        answer.clear();
        sleep(AGAIN);
    }
    if answer.is_empty() {
        let error = io::Error::new(io::ErrorKind::UnexpectedEof, "it closed the connection without an answer");
        return Err(ClientError::Broken { path: path.to_owned(), error });
    }
    Ok(answer)
}

fn exchange(path: &Path, answer: &mut String) -> io::Result<()> {
    // `UnixStream::connect` would block forever if the daemon hangs.
    let mut socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.set_write_timeout(Some(ANSWER_WITHIN))?;
    socket.set_read_timeout(Some(ANSWER_WITHIN))?;
    socket.connect(&SockAddr::unix(path)?)?;
    // The daemon may have rejected the client and closed already: its answer is still there to be
    // read.
    let sent = socket.write_all(format!("{STATUS}\n").as_bytes());
    match socket.take(ANSWER_MAX).read_to_string(answer) {
        Ok(_) => {}
        // The connection was reset after a complete answer.
        Err(_) if answer.ends_with('\n') => {}
        Err(error) => return Err(error),
    }
    if answer.is_empty() { sent } else { Ok(()) }
}

/// Parses an answer.
///
/// # Errors
/// [`ClientError::Refused`], [`ClientError::Schema`], [`ClientError::Strange`].
pub fn parse(answer: &str) -> Result<Report, ClientError> {
    let head: Head = serde_json::from_str(answer).map_err(ClientError::Strange)?;
    if let Some(error) = head.error {
        return Err(ClientError::Refused(error));
    }
    if head.schema != SCHEMA {
        return Err(ClientError::Schema(head.schema));
    }
    serde_json::from_str(answer).map_err(ClientError::Strange)
}
