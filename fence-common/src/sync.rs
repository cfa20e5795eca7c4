//! Locks of the standard library without poisoning.
//!
//! A thread that panics with a lock poisons it. This project ignores that: the data under its locks
//! is consistent between any two statements. A daemon that stops fencing after one panic would be
//! worse.

use std::sync::{Arc, LockResult, Mutex, MutexGuard, PoisonError, RwLock};

/// Locks a mutex.
pub fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    unpoisoned(mutex.lock())
}

/// The value of a lock, or of a wait for one.
pub fn unpoisoned<T>(result: LockResult<T>) -> T {
    result.unwrap_or_else(PoisonError::into_inner)
}

/// A setting that a reload may replace. Clones are the same one.
#[derive(Debug, Default)]
pub struct Current<T>(Arc<RwLock<Arc<T>>>);

impl<T> Current<T> {
    /// A setting with this value.
    pub fn new(value: T) -> Self {
        Self(Arc::new(RwLock::new(Arc::new(value))))
    }

    /// The value of this moment.
    #[must_use]
    pub fn now(&self) -> Arc<T> {
        let value = unpoisoned(self.0.read());
        Arc::clone(&value)
    }

    /// Replaces the value. Who has the old one keeps it.
    pub fn set(&self, value: T) {
        *unpoisoned(self.0.write()) = Arc::new(value);
    }
}

impl<T> Clone for Current<T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<T> From<T> for Current<T> {
    fn from(value: T) -> Self {
        Self::new(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clones_of_a_setting_are_one() {
        let (one, other) = {
            let one = Current::new(1);
            (one.clone(), one)
        };
        let before = other.now();
        one.set(2);
        assert_eq!((*before, *other.now()), (1, 2));
    }

    #[test]
    fn a_panic_of_another_thread_keeps_nobody_from_locking() {
        let number = Mutex::new(1);
        let panicked = std::thread::scope(|scope| {
            let dies = || {
                let _held = lock(&number);
                std::panic::resume_unwind(std::boxed::Box::new("on purpose"));
            };
            scope.spawn(dies).join().is_err()
        });
        assert!(panicked && number.is_poisoned());
        *lock(&number) += 1;
        assert_eq!(unpoisoned(number.into_inner()), 2);
    }
}
