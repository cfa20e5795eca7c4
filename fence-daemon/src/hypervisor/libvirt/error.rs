//! Why a libvirt call said nothing useful.

use std::fmt;

use virt::error::{Error, ErrorNumber};

/// Why a call to one URI did not do its work. Whatever it is, it says nothing about a domain: every one of these is a doubt.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    /// There is no connection.
    #[error("not connected: {0}")]
    NotConnected(String),
    /// The connection was lost during the call, so that it is not known what came of it.
    #[error("connection lost: {0}")]
    Lost(String),
    /// libvirt's own error.
    #[error("{0}")]
    Libvirt(LibvirtError),
    /// No answer in the time that we give it; the call may still be under way.
    #[error("no answer in time")]
    Overdue,
    /// The call had no turn in time and was not made.
    #[error("no turn in time, nothing was sent")]
    NotBegun,
    /// The deadline passed before the dangerous step, which was not begun.
    #[error("its time was over before anything was done to it")]
    TooLate,
    /// It was not made: libvirt calls the domain off, and on this host something of it lives or may live.
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
    /// The error with a text of our own, where libvirt's might quote from a domain's XML, which may hold passwords.
    pub(crate) fn without_text(error: &Error) -> Self {
        Self { code: error.code(), message: "libvirt's text is withheld, it may quote the domain's XML".to_owned() }
    }

    /// libvirt's code.
    #[must_use]
    pub fn code(&self) -> ErrorNumber {
        self.code
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

/// Whether libvirt positively says that there is no such domain. By the code, never by the text.
pub(crate) fn is_no_domain(error: &Error) -> bool {
    error.code() == ErrorNumber::NoDomain
}
