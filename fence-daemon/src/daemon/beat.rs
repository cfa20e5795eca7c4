//! The clock of the heartbeat: a timer of the kernel's, which wakes an idle daemon once a beat.
//!
//! tokio's own timer wakes twice or three times for one of some seconds: it sorts far timers by
//! coarse slots first.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::io::read;
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, timerfd_create, timerfd_settime};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Ticks regularly.
#[derive(Debug)]
pub(super) struct Beat(AsyncFd<OwnedFd>);

impl Beat {
    /// Ticks after each `interval`. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// The kernel gives no timer.
    pub(super) fn every(interval: Duration) -> io::Result<Self> {
        let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC)?;
        let interval = interval.try_into().map_err(io::Error::other)?;
        let each = Itimerspec { it_interval: interval, it_value: interval };
        timerfd_settime(&timer, TimerfdTimerFlags::empty(), &each)?;
        // SAFETY: needed because tokio has no safe way to watch a descriptor. Sound because the
        // watch owns the descriptor, which stays open and the same until the watch is dropped.
        Ok(Self(unsafe { AsyncFd::register_with_interest(timer, Interest::READABLE) }?))
    }

    /// Waits for the next tick. Ticks that were missed count as one.
    ///
    /// # Errors
    /// The timer cannot be read; the runtime is shutting down.
    pub(super) async fn tick(&self) -> io::Result<()> {
        loop {
            let mut ready = self.0.readable().await?;
            // The number of ticks since the last reading.
            match ready.try_io(|timer| Ok(read(timer.get_ref(), &mut [0; 8])?)) {
                Ok(ticked) => return ticked.map(drop),
                Err(_would_block) => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_timer_ticks_regularly_and_never_early() {
        let interval = Duration::from_millis(20);
        let begun = std::time::Instant::now();
        let beat = Beat::every(interval).unwrap();
        for ticks in 1..4 {
            beat.tick().await.unwrap();
            assert!(begun.elapsed() >= interval * ticks);
        }
    }
}
