//! What is taken for a call and put back after it: the connections of one lane.

use std::panic::{self, AssertUnwindSafe};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::error::CallError;

/// How often whoever waits looks whether there is anything to wait for.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// Things that serve one call at a time each.
pub(super) struct Stock<C> {
    shelf: Mutex<Shelf<C>>,
    news: Condvar,
    most: usize,
}

struct Shelf<C> {
    free: Vec<C>,
    /// All that there are, taken or not.
    count: usize,
}

impl<C> Stock<C> {
    /// An empty one, for `most` calls at a time.
    pub(super) fn new(most: usize) -> Self {
        Self { shelf: Mutex::new(Shelf { free: Vec::new(), count: 0 }), news: Condvar::new(), most }
    }

    fn shelf(&self) -> MutexGuard<'_, Shelf<C>> {
        // Nothing that can panic is done with the lock held.
        self.shelf.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts in a new one.
    pub(super) fn add(&self, new: C) {
        let mut shelf = self.shelf();
        shelf.free.push(new);
        shelf.count += 1;
        drop(shelf);
        self.news.notify_one();
    }

    /// Whether there are as many as there may be calls.
    pub(super) fn is_full(&self) -> bool {
        self.shelf().count >= self.most
    }

    /// Makes a call with one that nobody else has meanwhile, when one is free.
    ///
    /// # Errors
    /// None was free by `begin_by`, or before `hopeless`: then more calls are made than there are connections yet, and nothing was sent.
    pub(super) fn lend<T>(
        &self,
        begin_by: Instant,
        hopeless: impl Fn() -> bool,
        call: impl FnOnce(&C) -> T,
    ) -> Result<T, CallError> {
        let what = self.take(begin_by, hopeless)?;
        // Whatever comes of the call, what it was made with is good for the next.
        let result = panic::catch_unwind(AssertUnwindSafe(|| call(&what)));
        self.shelf().free.push(what);
        self.news.notify_one();
        result.map_err(|cause| panic::resume_unwind(cause))
    }

    fn take(&self, begin_by: Instant, hopeless: impl Fn() -> bool) -> Result<C, CallError> {
        let mut shelf = self.shelf();
        loop {
            if let Some(what) = shelf.free.pop() {
                return Ok(what);
            }
            if hopeless() {
                return Err(CallError::Lost("it was lost before the call".to_owned()));
            }
            let left = begin_by.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(CallError::NotBegun);
            }
            let waited = self.news.wait_timeout(shelf, left.min(LOOK_AGAIN));
            shelf = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Takes all that are not taken.
    pub(super) fn empty(&self) -> Vec<C> {
        std::mem::take(&mut self.shelf().free)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NO_TIME: Duration = Duration::from_millis(20);

    fn in_a_while() -> Instant {
        Instant::now() + Duration::from_secs(20)
    }

    #[test]
    fn each_serves_one_call_at_a_time() {
        let stock = Stock::new(2);
        assert!(!stock.is_full());
        assert!(matches!(stock.lend(Instant::now() + NO_TIME, || false, |_| ()), Err(CallError::NotBegun)));
        stock.add('a');
        stock.add('b');
        assert!(stock.is_full());
        let lent = stock.lend(
            in_a_while(),
            || false,
            |first| {
                let inner = stock.lend(
                    in_a_while(),
                    || false,
                    |second| {
                        assert_ne!(first, second);
                        assert!(matches!(stock.lend(in_a_while(), || true, |_| ()), Err(CallError::Lost(_))));
                        assert!(stock.empty().is_empty());
                    },
                );
                inner.unwrap();
                assert_eq!(stock.lend(in_a_while(), || true, |second| second != first).ok(), Some(true));
            },
        );
        lent.unwrap();
        assert_eq!(stock.empty().len(), 2);
    }

    #[test]
    fn who_waits_gets_what_comes() {
        let stock = Stock::new(2);
        let wait = || stock.lend(in_a_while(), || false, |what| *what).ok();
        std::thread::scope(|scope| {
            let waits = scope.spawn(wait);
            stock.add('a');
            assert_eq!(waits.join().unwrap(), Some('a'));
            let waits = stock.lend(in_a_while(), || false, |_| scope.spawn(wait)).unwrap();
            assert_eq!(waits.join().unwrap(), Some('a'));
        });
    }

    #[test]
    fn a_call_that_panics_puts_it_back() {
        let stock = Stock::new(1);
        stock.add('a');
        let call = || stock.lend(in_a_while(), || false, |_| panic!("on purpose"));
        assert!(panic::catch_unwind(AssertUnwindSafe(call)).is_err());
        assert_eq!(stock.empty(), ['a']);
    }
}
