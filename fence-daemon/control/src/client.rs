//! The other end of the control socket: asks, and says what it means when there is no answer.

use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde::Deserialize;
use socket2::{Domain, SockAddr, Socket, Type};

use super::report::{Report, SCHEMA};
use super::{STATUS, is_too_long};

/// How long the daemon may take. It answers within milliseconds, or hangs.
pub const ANSWER_WITHIN: Duration = Duration::from_secs(5);
/// How long to wait before asking again where too many others look.
const AGAIN: Duration = Duration::from_millis(100);
/// More than ten thousand domains make, in bytes.
const ANSWER_MAX: u64 = 64 << 20;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No daemon, or none with a control socket there.
    #[error(
        "no daemon answers at {} ({error}): is it running? `systemctl status fence-daemon` or `pgrep -a fence-daemon`; one with another \
         configuration is asked with -f FILE, and where it could not make the socket its log says so (\"control socket\")",
        path.display()
    )]
    NotThere {
        /// Where it was looked for.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        error: io::Error,
    },
    /// Not root.
    #[error("only root may look inside ({}: permission denied): try with sudo", .0.display())]
    NotPermitted(PathBuf),
    /// The path cannot be one of a socket.
    #[error("the path {} is too long for a socket: the daemon has none there (choose a shorter `state_directory`)", .0.display())]
    TooLong(PathBuf),
    /// It is there and says nothing.
    #[error(
        "the daemon at {} does not answer within {} s: it hangs, or the host does (`journalctl -u fence-daemon`, `uptime`)",
        .0.display(), ANSWER_WITHIN.as_secs()
    )]
    Silent(PathBuf),
    /// Something went wrong in between.
    #[error("cannot ask the daemon at {}: {error}", path.display())]
    Broken {
        /// Where.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        error: io::Error,
    },
    /// It says no.
    #[error("the daemon says: {0}")]
    Refused(String),
    /// It speaks another version.
    #[error(
        "the daemon speaks version {0} of the status, this program version {SCHEMA}: one of them was updated; restart the daemon, or read --json"
    )]
    Schema(u32),
    /// What it says is not understood.
    #[error("the daemon's answer is not understood: {0}")]
    Strange(#[source] serde_json::Error),
}

impl ClientError {
    /// Whether it says that no daemon runs, and not that this is unknown.
    #[must_use]
    pub fn is_nobody(&self) -> bool {
        matches!(self, Self::NotThere { .. })
    }
}

/// What every answer has, of whatever version.
#[derive(Deserialize)]
struct Head {
    schema: u32,
    error: Option<String>,
    /// Whether to ask again in a moment.
    #[serde(default)]
    again: bool,
}

/// Asks for the report, and returns it as the daemon said it. Where too many others look, it is
/// asked again for a while: who hangs there is soon cut off.
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
        let error = io::Error::new(io::ErrorKind::UnexpectedEof, "it hung up without a word");
        return Err(ClientError::Broken { path: path.to_owned(), error });
    }
    Ok(answer)
}

fn exchange(path: &Path, answer: &mut String) -> io::Result<()> {
    // Not the standard library's, whose `connect` would wait for ever for a daemon that hangs.
    let mut socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.set_write_timeout(Some(ANSWER_WITHIN))?;
    socket.set_read_timeout(Some(ANSWER_WITHIN))?;
    socket.connect(&SockAddr::unix(path)?)?;
    // It may have said no already, and hung up: what it said is read all the same.
    let sent = socket.write_all(format!("{STATUS}\n").as_bytes());
    match socket.take(ANSWER_MAX).read_to_string(answer) {
        Ok(_) => {}
        // A reset behind an answer that came whole.
        Err(_) if answer.ends_with('\n') => {}
        Err(error) => return Err(error),
    }
    if answer.is_empty() { sent } else { Ok(()) }
}

/// Reads an answer.
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
