//! Until when an order may begin what cannot be undone. All rooms stand on this file.
//!
//! An order's steps follow one another: look-ups, the end of a migration, a reset, a kill. Each of
//! them may hang, so the deadline is checked again right before every dangerous step. A client that
//! was answered "failure" may act on it at once, so no step may begin after that answer. A step
//! that has begun before it may still take effect: no call to libvirt can be taken back.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::time::Instant;

/// The deadline has passed, or was called off: the step must not begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TooLate;

/// One order's deadline. Clones are about the same order.
#[derive(Clone, Debug)]
pub struct Deadline {
    by: Instant,
    /// Set before the client is answered "failure" earlier than that.
    called_off: Arc<AtomicBool>,
}

impl Deadline {
    /// No dangerous step begins at or after `by`.
    #[must_use]
    pub fn at(by: Instant) -> Self {
        Self { by, called_off: Arc::default() }
    }

    /// The client is about to be answered "failure": no dangerous step begins from now on.
    pub fn call_off(&self) {
        self.called_off.store(true, Ordering::Release);
    }

    /// The same order with a deadline that is not after `by`.
    pub(super) fn not_after(&self, by: Instant) -> Self {
        Self { by: self.by.min(by), called_off: Arc::clone(&self.called_off) }
    }

    /// When it is over, if it is not called off before.
    #[must_use]
    pub fn by(&self) -> Instant {
        self.by
    }

    /// Checks it right before a dangerous step.
    ///
    /// # Errors
    /// The step must not begin.
    pub(super) fn check(&self) -> Result<(), TooLate> {
        if self.called_off.load(Ordering::Acquire) || Instant::now() >= self.by {
            return Err(TooLate);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn nothing_begins_after_the_deadline_or_a_cancellation() {
        let now = Instant::now();
        assert_eq!(Deadline::at(now).check(), Err(TooLate));
        let order = Deadline::at(now + Duration::from_secs(60));
        let step = order.not_after(now + Duration::from_secs(30));
        assert_eq!((order.check(), step.check()), (Ok(()), Ok(())));
        assert_eq!(step.by(), now + Duration::from_secs(30));
        assert_eq!(order.not_after(now).check(), Err(TooLate));
        assert_eq!(order.check(), Ok(()), "another step has its own end");
        order.call_off();
        assert_eq!((order.check(), step.check()), (Err(TooLate), Err(TooLate)));
    }
}
