//! Until when an order may begin what cannot be undone.
//!
//! An order's steps follow one another: look-ups, the end of a migration, a reset, a kill. Each of
//! them may hang, so the time is looked at again right before every dangerous step. A client that
//! was told "failure" may act on it at once, so nothing may begin after that word. What has begun
//! before it may still come into force: no call to libvirt can be taken back.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::time::Instant;

use crate::hypervisor::libvirt::error::CallError;

/// One order's deadline. Clones are about the same order.
#[derive(Clone, Debug)]
pub struct Deadline {
    by: Instant,
    /// Set before the client is told "failure" earlier than that.
    called_off: Arc<AtomicBool>,
}

impl Deadline {
    /// No dangerous step begins at or after `by`.
    #[must_use]
    pub fn at(by: Instant) -> Self {
        Self { by, called_off: Arc::default() }
    }

    /// The client is about to be told "failure": no dangerous step begins from now on.
    pub fn call_off(&self) {
        self.called_off.store(true, Ordering::Release);
    }

    /// The same order with a deadline that is not after `by`.
    pub(crate) fn not_after(&self, by: Instant) -> Self {
        Self { by: self.by.min(by), called_off: Arc::clone(&self.called_off) }
    }

    /// When it is over, if it is not called off before.
    #[must_use]
    pub fn by(&self) -> Instant {
        self.by
    }

    /// To be asked right before each dangerous step.
    ///
    /// # Errors
    /// [`CallError::TooLate`]: the step must not begin.
    pub(crate) fn check(&self) -> Result<(), CallError> {
        if self.called_off.load(Ordering::Acquire) || Instant::now() >= self.by {
            return Err(CallError::TooLate);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn nothing_begins_after_its_time_or_when_it_is_called_off() {
        let now = Instant::now();
        assert_eq!(Deadline::at(now).check(), Err(CallError::TooLate));
        let order = Deadline::at(now + Duration::from_secs(60));
        let step = order.not_after(now + Duration::from_secs(30));
        assert_eq!((order.check(), step.check()), (Ok(()), Ok(())));
        assert_eq!(step.by(), now + Duration::from_secs(30));
        assert_eq!(order.not_after(now).check(), Err(CallError::TooLate));
        assert_eq!(order.check(), Ok(()), "another step has its own end");
        order.call_off();
        assert_eq!((order.check(), step.check()), (Err(CallError::TooLate), Err(CallError::TooLate)));
    }
}
