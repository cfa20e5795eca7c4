//! `corosync/quorum.h`: whether this host's part of the cluster has quorum.

use std::ffi::{c_int, c_uint};
use std::os::fd::{BorrowedFd, RawFd};

use super::super::no_group::NoGroup;
use super::{Libraries, ONE, TRY_AGAIN, descriptor, done, functions, said};

/// `quorum_callbacks_t`.
#[repr(C)]
struct QuorumCallbacks {
    notify: extern "C" fn(u64, u32, u64, u32, *const u32),
}

functions! { Functions from "libquorum.so.5":
    quorum_initialize(*mut u64, *const QuorumCallbacks, *mut u32);
    quorum_finalize(u64);
    quorum_fd_get(u64, *mut RawFd);
    quorum_dispatch(u64, c_int);
    quorum_trackstart(u64, c_uint);
    quorum_getquorate(u64, *mut c_int);
}

/// Nothing: the state is asked for after each dispatch.
extern "C" fn on_quorum(_: u64, _: u32, _: u64, _: u32, _: *const u32) {}

/// A connection to corosync's quorum service.
pub(in crate::hosts::corosync) struct Votes {
    quorum: Functions,
    handle: u64,
    has_provider: bool,
}

impl Votes {
    /// # Errors
    /// corosync does not run, or has no quorum service.
    pub(in crate::hosts::corosync) fn connect(libraries: Libraries) -> Result<Self, NoGroup> {
        let quorum = libraries.quorum;
        let callbacks = QuorumCallbacks { notify: on_quorum };
        let (mut handle, mut kind) = (0, 0);
        // SAFETY: needed to call C. Sound because the places live during the call, and the library
        // copies the callbacks.
        let status = unsafe { (quorum.quorum_initialize)(&raw mut handle, &raw const callbacks, &raw mut kind) };
        done("quorum_initialize", status)?;
        // `QUORUM_SET`; `QUORUM_FREE` means that nobody counts votes and all is called quorate.
        let votes = Self { quorum, handle, has_provider: kind == 1 };
        // SAFETY: needed to call C. Sound because the handle is open. 2 is `CS_TRACK_CHANGES`.
        done("quorum_trackstart", unsafe { (quorum.quorum_trackstart)(handle, 2) })?;
        Ok(votes)
    }

    /// Whether somebody counts votes at all.
    pub(in crate::hosts::corosync) fn has_provider(&self) -> bool {
        self.has_provider
    }

    /// Whether this host's part of the cluster has quorum now.
    pub(in crate::hosts::corosync) fn is_quorate(&self) -> Result<bool, NoGroup> {
        let mut quorate = 0;
        // SAFETY: needed to call C. Sound because the place lives during the call.
        done("quorum_getquorate", unsafe { (self.quorum.quorum_getquorate)(self.handle, &raw mut quorate) })?;
        Ok(self.has_provider && quorate == 1)
    }

    /// Takes what has come.
    pub(in crate::hosts::corosync) fn dispatch(&self) -> Result<(), NoGroup> {
        // SAFETY: needed to call C. Sound because the callback does nothing.
        let status = unsafe { (self.quorum.quorum_dispatch)(self.handle, ONE) };
        if status == TRY_AGAIN { Ok(()) } else { done("quorum_dispatch", status) }
    }

    /// Readable when there is something to dispatch.
    pub(in crate::hosts::corosync) fn descriptor(&self) -> Result<BorrowedFd<'_>, NoGroup> {
        descriptor("quorum_fd_get", self, self.quorum.quorum_fd_get, self.handle)
    }
}

impl Drop for Votes {
    fn drop(&mut self) {
        // SAFETY: needed to close the connection. Sound because nobody else has the handle.
        let _ = unsafe { (self.quorum.quorum_finalize)(self.handle) };
    }
}
