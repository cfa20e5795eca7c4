//! Why a libvirt call said nothing useful.

use std::fmt;

use virt::error::{Error, ErrorNumber};

use crate::hypervisor::deadline::TooLate;

/// Why a call to one URI did not do its work. None of these says anything about a domain: each is
/// a doubt.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    /// There is no connection.
    #[error("not connected: {0}")]
    NotConnected(String),
    /// The connection was lost during the call. Its result is not known.
    #[error("connection lost: {0}")]
    Lost(String),
    /// libvirt's own error.
    #[error("{0}")]
    Libvirt(LibvirtError),
    /// No answer within our limit. The call may still be under way.
    #[error("no answer in time")]
    Overdue,
    /// The call had no turn in time and was not made.
    #[error("no turn in time, nothing was sent")]
    NotBegun,
    /// The deadline passed before the dangerous step, which was not begun.
    #[error("its time was over before anything was done to it")]
    TooLate,
    /// The start was not made: libvirt calls the domain off, and this host may have something of
    /// it.
    #[error("libvirt calls it off, and this host does not: {0}; `off` ends that")]
    Lives(String),
    /// The call could not be queued.
    #[error("{0}")]
    Busy(&'static str),
}

/// An error as libvirt reported it.
#[derive(Clone, PartialEq, Eq)]
pub struct LibvirtError {
    /// libvirt's code: the only part that decides anything.
    code: ErrorNumber,
    /// libvirt's text, for people.
    message: String,
}

impl LibvirtError {
    /// The error with a text of our own. libvirt's text might quote from a domain's XML, which may
    /// hold passwords.
    pub(super) fn without_text(error: &Error) -> Self {
        Self { code: error.code(), message: "libvirt's text is withheld, it may quote the domain's XML".to_owned() }
    }

    /// Whether libvirt has no driver for such a hypervisor.
    pub(super) fn is_no_driver(&self) -> bool {
        self.code == ErrorNumber::NoConnect
    }
}

impl fmt::Display for LibvirtError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The text can quote names from outside: it must not shape a log line.
        write!(f, "{} ({:?})", self.message.escape_debug(), self.code)
    }
}

impl fmt::Debug for LibvirtError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl From<Error> for CallError {
    fn from(error: Error) -> Self {
        Self::Libvirt(LibvirtError { code: error.code(), message: error.message().to_owned() })
    }
}

impl From<TooLate> for CallError {
    fn from(_: TooLate) -> Self {
        Self::TooLate
    }
}

/// `None` for libvirt's "no such domain", by its code alone. Every other error stays one.
pub(super) fn known<T>(result: Result<T, Error>) -> Result<Option<T>, CallError> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.code() == ErrorNumber::NoDomain => Ok(None),
        Err(error) => Err(error.into()),
    }
}
