//! Why the connection to the group is lost, or was never made.

use std::ffi::c_int;
use std::time::Duration;

/// A connection that cannot be made or kept.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum NoGroup {
    /// The package is not installed.
    #[error("corosync's libraries cannot be loaded: {0}")]
    NoLibrary(String),
    /// corosync does not run, has just ended, or refuses.
    #[error("{}: {call} returned {status}", meaning(*status))]
    Call {
        /// The function.
        call: &'static str,
        /// Its `cs_error_t`.
        status: c_int,
    },
    /// corosync has ended.
    #[error("corosync has closed the connection")]
    Closed,
    /// It joined, and nothing came.
    #[error("the group is joined, but nothing was heard for {0:?}")]
    Deaf(Duration),
    /// A call into corosync hangs.
    #[error("corosync did not answer for {0:?}")]
    Hangs(Duration),
    /// The daemon does not take its events.
    #[error("the daemon has not taken {0} events of the group")]
    Full(usize),
    /// A change of membership does not have this daemon.
    #[error("corosync says that this daemon has left the group")]
    NotMember,
    /// The system refuses what the thread needs.
    #[error("{0}")]
    System(String),
    /// Nobody wants the events any more.
    #[error("the daemon ends")]
    Ended,
}

/// `cs_error_t` in words.
fn meaning(status: c_int) -> &'static str {
    match status {
        2 => "corosync does not run, or has ended",
        5 => "corosync did not answer",
        6 => "corosync is busy or starting",
        8 | 18 => "corosync lacks memory or files",
        9 => "corosync has ended the connection",
        11 | 100 => "corosync refuses this process",
        12 => "corosync does not have it",
        15 | 23 => "corosync's queue is full",
        _ => "corosync failed",
    }
}

impl From<rustix::io::Errno> for NoGroup {
    fn from(error: rustix::io::Errno) -> Self {
        Self::System(error.to_string())
    }
}
