//! corosync's libraries, loaded at run time: hosts without corosync need nothing installed.
//!
//! All `unsafe` code of this room is here. The types are those of corosync's headers, which
//! corosync 2 and 3 share; a file name has the version of its interface.

mod cmap;
mod cpg;
mod quorum;

use std::ffi::c_int;
use std::os::fd::{BorrowedFd, RawFd};
use std::sync::OnceLock;

pub(super) use self::cmap::{Map, Value};
pub(super) use self::cpg::{Groups, Raw, Sent};
pub(super) use self::quorum::Votes;
use super::no_group::NoGroup;

/// `cs_error_t`: success, and what is no failure everywhere.
const OK: c_int = 1;
const TRY_AGAIN: c_int = 6;
const NOT_EXIST: c_int = 12;
const NO_SECTIONS: c_int = 27;
/// `CS_DISPATCH_ONE_NONBLOCKING`.
const ONE: c_int = 4;

/// A table of a library's functions, by their names.
macro_rules! functions {
    ($table:ident from $file:literal: $($name:ident($($argument:ty),*);)*) => {
        #[derive(Clone, Copy)]
        pub(super) struct $table {
            $($name: unsafe extern "C" fn($($argument),*) -> c_int,)*
        }

        impl $table {
            pub(super) fn load() -> Result<Self, String> {
                // SAFETY: needed because loading runs the library's own start-up code. Sound
                // because corosync's libraries only register themselves with libqb's log there.
                let library = unsafe { libloading::Library::new($file) }.map_err(|error| said(&error))?;
                // Never unloaded: the functions below, and libqb's exit handlers, stay valid.
                let library: &'static libloading::Library = Box::leak(Box::new(library));
                $(
                    // SAFETY: needed because a symbol has no type. Sound because the type is that
                    // of corosync's header, and the file name has the version of its interface.
                    let $name = *unsafe {
                        library.get::<unsafe extern "C" fn($($argument),*) -> c_int>(
                            concat!(stringify!($name), "\0").as_bytes(),
                        )
                    }
                    .map_err(|error| said(&error))?;
                )*
                Ok(Self { $($name,)* })
            }
        }
    };
}

use functions;

/// The loader's words.
fn said(error: &dyn std::error::Error) -> String {
    error.source().map_or_else(|| error.to_string(), ToString::to_string)
}

/// The libraries. They are loaded once; a failure is tried again, as a package may come later.
#[derive(Clone, Copy)]
pub(super) struct Libraries {
    cpg: cpg::Functions,
    quorum: quorum::Functions,
    cmap: cmap::Functions,
}

impl Libraries {
    /// The loaded libraries.
    ///
    /// # Errors
    /// One is not there, or lacks a function.
    pub(super) fn load() -> Result<Self, NoGroup> {
        static LOADED: OnceLock<Libraries> = OnceLock::new();
        if let Some(loaded) = LOADED.get() {
            return Ok(*loaded);
        }
        let load = || {
            Ok(Self {
                cpg: cpg::Functions::load()?,
                quorum: quorum::Functions::load()?,
                cmap: cmap::Functions::load()?,
            })
        };
        let loaded = load().map_err(|error: String| NoGroup::NoLibrary(error))?;
        Ok(*LOADED.get_or_init(|| loaded))
    }
}

/// A call's result.
fn done(call: &'static str, status: c_int) -> Result<(), NoGroup> {
    if status == OK { Ok(()) } else { Err(NoGroup::Call { call, status }) }
}

/// The descriptor of a connection, lent as long as the connection lives.
fn descriptor<'a, T>(
    call: &'static str,
    _connection: &'a T,
    get: unsafe extern "C" fn(u64, *mut RawFd) -> c_int,
    handle: u64,
) -> Result<BorrowedFd<'a>, NoGroup> {
    let mut fd = -1;
    // SAFETY: needed to call C. Sound because the place lives during the call.
    done(call, unsafe { get(handle, &raw mut fd) })?;
    if fd < 0 {
        return Err(NoGroup::Call { call, status: 0 });
    }
    // SAFETY: needed because C gives a number. Sound because the library keeps the descriptor open
    // until the connection is finalized, and the borrow of the connection prevents that.
    Ok(unsafe { BorrowedFd::borrow_raw(fd) })
}
