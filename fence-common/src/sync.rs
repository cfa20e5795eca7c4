//! Locks of the standard library without poisoning.
//!
//! A thread that panics with a lock poisons it. This project ignores that: the data under its locks
//! is consistent between any two statements. A daemon that stops fencing after one panic would be
//! worse.

use std::sync::{LockResult, Mutex, MutexGuard, PoisonError};

/// Locks a mutex.
pub fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    unpoisoned(mutex.lock())
}

/// The value of a lock, or of a wait for one.
pub fn unpoisoned<T>(result: LockResult<T>) -> T {
    result.unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

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
