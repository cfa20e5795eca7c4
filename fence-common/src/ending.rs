//! How a request ended: the word for it in the report, and after `reply=` in the log.

use crate::wire::Reply;

macro_rules! endings {
    ($($(#[doc = $doc:literal])+ $ending:ident = $name:literal,)+) => {
        /// How a request ended.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Ending {
            $($(#[doc = $doc])+ $ending,)+
        }

        impl Ending {
            /// Every ending.
            pub const ALL: &[Self] = &[$(Self::$ending,)+];

            /// The word for it.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$ending => $name,)+
                }
            }
        }
    };
}

endings! {
    /// The client received "success".
    Success = "success",
    /// The client received "failure".
    Failure = "failure",
    /// The client received "off".
    Off = "off",
    /// The client received "permission denied".
    PermissionDenied = "permission denied",
    /// The callback failed.
    NoCallback = "no callback",
    /// It was carried out, and the client was gone.
    Undelivered = "undelivered",
    /// It was carried out and not answered: a newer request came from the same address and port, or
    /// the domain has fenced itself.
    Unsent = "none",
    /// Nothing was done: a newer request came from the same address and port.
    Superseded = "superseded",
    /// A duplicate of it was served.
    Duplicate = "duplicate",
    /// It was not begun.
    Rejected = "rejected",
    /// It made room for another request.
    Displaced = "displaced",
    /// Its key was dropped before the daemon read it.
    RetiredKey = "retired key",
    /// The daemon was stopped.
    Stopped = "stopped",
}

impl From<Reply> for Ending {
    fn from(reply: Reply) -> Self {
        match reply {
            Reply::Success => Self::Success,
            Reply::Failure => Self::Failure,
            Reply::Off => Self::Off,
            Reply::PermissionDenied => Self::PermissionDenied,
        }
    }
}
