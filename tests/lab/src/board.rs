//! A value that one thread changes while others wait for what becomes of it.

use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use fence_common::sync::{lock, unpoisoned};

/// The value. Clones share it.
#[derive(Debug, Default)]
pub struct Board<T>(Arc<(Mutex<T>, Condvar)>);

impl<T> Clone for Board<T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<T> Board<T> {
    /// The value, for a look or for a change that nobody waits for.
    pub fn lock(&self) -> MutexGuard<'_, T> {
        lock(&self.0.0)
    }

    /// Changes the value and wakes the waiting threads.
    pub fn change(&self, change: impl FnOnce(&mut T)) {
        change(&mut self.lock());
        self.0.1.notify_all();
    }

    /// Waits until `wanted` returns something; `None` means timeout.
    pub fn wait<R>(&self, limit: Duration, wanted: impl Fn(&T) -> Option<R>) -> Option<R> {
        let deadline = Instant::now() + limit;
        let mut value = self.lock();
        loop {
            if let Some(found) = wanted(&value) {
                return Some(found);
            }
            let left = deadline.checked_duration_since(Instant::now())?;
            value = unpoisoned(self.0.1.wait_timeout(value, left)).0;
        }
    }
}
