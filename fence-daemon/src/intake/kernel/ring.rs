//! The ring buffer through which the kernel program delivers requests.

use std::fmt;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

use aya::maps::{MapData, RingBuf};
use fence_common::boundary::{Event, EventError};

use super::memory::Heart;
use crate::clock::Moment;

/// Verified requests from the kernel program. Readable (`poll`, `AsyncFd`) when there is one.
pub struct Ring {
    pub(super) ring: RingBuf<MapData>,
    pub(super) heart: Heart,
}

impl Ring {
    /// Tells the program that this ring buffer is being read, at this time on the monotonic clock.
    ///
    /// After [`STALE_AFTER_NS`](fence_common::rate_limit::STALE_AFTER_NS) without this sign of
    /// life, the program passes requests to the socket.
    pub fn beat(&mut self, now: Moment) {
        self.heart.beat(now.nanos());
    }

    /// The next request, if there is one now. After readiness, call it until it returns `None`.
    ///
    /// An error is a record that our program did not write. It is consumed; the next call goes on
    /// behind it.
    #[allow(clippy::should_implement_trait, reason = "an empty ring is not the end of it")]
    pub fn next(&mut self) -> Option<Result<Event, EventError>> {
        self.ring.next().map(|record| Event::decode(&record))
    }
}

impl AsRawFd for Ring {
    fn as_raw_fd(&self) -> RawFd {
        self.ring.as_raw_fd()
    }
}

impl AsFd for Ring {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.ring.as_fd()
    }
}

impl fmt::Debug for Ring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Ring").field(&self.as_raw_fd()).finish()
    }
}
