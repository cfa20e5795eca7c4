//! `corosync/quorum.h`: the hosts of corosync's ring, and whether it has quorum.

use std::cell::RefCell;
use std::ffi::{c_int, c_uint};
use std::marker::PhantomData;
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

thread_local! {
    /// Where the callback leaves the ring, for the thread that dispatches. As for messages, no
    /// pointer of ours goes through C.
    static RING: RefCell<Option<Vec<u32>>> = const { RefCell::new(None) };
}

/// Brings the ring. Its quorum is asked for after each dispatch, which is never older.
extern "C" fn on_quorum(_: u64, _: u32, _: u64, count: u32, nodes: *const u32) {
    let ring = if nodes.is_null() || count == 0 {
        Vec::new()
    } else {
        // SAFETY: needed because the list comes as pointer and length. Sound because libquorum
        // lends that many numbers for the time of the callback, and they are copied here.
        unsafe { std::slice::from_raw_parts(nodes, count as usize) }.to_vec()
    };
    RING.with(|place| {
        if let Ok(mut place) = place.try_borrow_mut() {
            *place = Some(ring);
        }
    });
}

/// A connection to corosync's quorum service. It belongs to one thread, that of its callbacks.
pub(in crate::hosts::corosync) struct Votes {
    quorum: Functions,
    handle: u64,
    has_provider: bool,
    /// Keeps the value on its thread.
    _thread: PhantomData<*const ()>,
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
        let votes = Self { quorum, handle, has_provider: kind == 1, _thread: PhantomData };
        RING.take();
        // SAFETY: needed to call C. Sound because the handle is open. 3 is `CS_TRACK_CURRENT` and
        // `CS_TRACK_CHANGES`.
        done("quorum_trackstart", unsafe { (quorum.quorum_trackstart)(handle, 3) })?;
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

    /// Takes what has come, at most one ring: its hosts.
    pub(in crate::hosts::corosync) fn dispatch(&self) -> Result<Option<Vec<u32>>, NoGroup> {
        // SAFETY: needed to call C. Sound because the handle is this thread's own; the callback
        // only writes to this thread's place.
        let status = unsafe { (self.quorum.quorum_dispatch)(self.handle, ONE) };
        let ring = RING.take();
        // "Try again" means that there was nothing.
        if status != TRY_AGAIN {
            done("quorum_dispatch", status)?;
        }
        Ok(ring)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ring_is_copied() {
        on_quorum(0, 1, 7, 3, [1, 2, 5].as_ptr());
        assert_eq!(RING.take(), Some(vec![1, 2, 5]));
        on_quorum(0, 0, 8, 3, std::ptr::null());
        assert_eq!((RING.take(), RING.take()), (Some(Vec::new()), None));
    }
}
