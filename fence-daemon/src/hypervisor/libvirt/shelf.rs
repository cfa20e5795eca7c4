//! Connections that serve one call at a time each: taken for a call, and put back after it.
//!
//! Few are open while little happens. When a call finds none free, it asks for another one, which
//! is opened beside it: opening can hang, and a call must not. What has not been used for a while
//! is given back, to be closed.

use std::panic::{self, AssertUnwindSafe};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::error::CallError;

/// How often a call that waits looks whether there is anything to wait for.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// How long no other one is asked for after one could not be opened.
const REFUSED: Duration = Duration::from_secs(5);

/// Things that serve one call at a time each.
pub(crate) struct Shelf<C> {
    state: Mutex<State<C>>,
    news: Condvar,
    most: usize,
}

struct State<C> {
    /// Those that nobody uses, and since when. The one that was used last is taken next.
    free: Vec<(C, Instant)>,
    /// All that are open, used or not.
    count: usize,
    /// Whether one is being opened: one at a time, so that a crowd of calls does not open a crowd
    /// of them.
    opening: bool,
    /// When one could not be opened.
    refused: Option<Instant>,
}

/// What becomes of a connection after a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum After {
    /// It serves the next call.
    Keep,
    /// It serves no other.
    Discard,
}

impl<C> Shelf<C> {
    /// An empty one, for `most` calls at a time.
    pub(crate) fn new(most: usize) -> Self {
        let state = State { free: Vec::new(), count: 0, opening: false, refused: None };
        Self { state: Mutex::new(state), news: Condvar::new(), most }
    }

    fn state(&self) -> MutexGuard<'_, State<C>> {
        // Nothing that can panic is done with the lock held.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts in a new one, whether it was asked for or not.
    pub(crate) fn add(&self, new: C) {
        let mut state = self.state();
        state.free.push((new, Instant::now()));
        state.count += 1;
        state.opening = false;
        drop(state);
        self.news.notify_all();
    }

    /// The one that was asked for cannot be had. Whether there is any at all.
    pub(crate) fn refuse(&self) -> bool {
        let mut state = self.state();
        state.opening = false;
        state.refused = Some(Instant::now());
        state.count > 0
    }

    /// Makes a call with one that no other call uses meanwhile, as soon as one is free. `open` has
    /// another one opened, and does not wait for it. The call's result says what becomes of the
    /// connection; one that is to be discarded is given to `discard`.
    ///
    /// # Errors
    /// None was free by `begin_by`, or before `hopeless`: nothing was sent.
    pub(crate) fn lend<T>(
        &self,
        begin_by: Instant,
        hopeless: impl Fn() -> bool,
        open: impl Fn(),
        discard: impl FnOnce(C),
        call: impl FnOnce(&C) -> (T, After),
    ) -> Result<T, CallError> {
        let what = self.take(begin_by, hopeless, open)?;
        let result = panic::catch_unwind(AssertUnwindSafe(|| call(&what)));
        // After a panic it is not known how far the call has come.
        let after = result.as_ref().map_or(After::Discard, |(_, after)| *after);
        let mut state = self.state();
        match after {
            After::Keep => {
                state.free.push((what, Instant::now()));
                drop(state);
            }
            After::Discard => {
                state.count -= 1;
                drop(state);
                discard(what);
            }
        }
        self.news.notify_one();
        result.map(|(result, _)| result).map_err(|cause| panic::resume_unwind(cause))
    }

    fn take(&self, begin_by: Instant, hopeless: impl Fn() -> bool, open: impl Fn()) -> Result<C, CallError> {
        let mut state = self.state();
        loop {
            if let Some((what, _)) = state.free.pop() {
                return Ok(what);
            }
            if hopeless() {
                return Err(CallError::Lost("it was lost before the call".to_owned()));
            }
            let now = Instant::now();
            let left = begin_by.saturating_duration_since(now);
            if left.is_zero() {
                return Err(CallError::NotBegun);
            }
            let refused = state.refused.is_some_and(|at| now.duration_since(at) < REFUSED);
            if state.count < self.most && !state.opening && !refused {
                state.opening = true;
                drop(state);
                open();
                state = self.state();
                continue;
            }
            let waited = self.news.wait_timeout(state, left.min(LOOK_AGAIN));
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Takes out those that nobody has used for `idle`, longest unused first, but for one and for
    /// what is to be kept in any case.
    pub(crate) fn trim(&self, idle: Duration, keep: impl Fn(&C) -> bool) -> Vec<C> {
        let mut state = self.state();
        let now = Instant::now();
        let mut unused = Vec::new();
        let mut index = 0;
        while state.count > 1 && index < state.free.len() {
            let (what, since) = &state.free[index];
            if now.duration_since(*since) < idle || keep(what) {
                index += 1;
                continue;
            }
            unused.push(state.free.remove(index).0);
            state.count -= 1;
        }
        unused
    }

    /// Takes all that are not used.
    pub(crate) fn empty(&self) -> Vec<C> {
        std::mem::take(&mut self.state().free).into_iter().map(|(what, _)| what).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NO_TIME: Duration = Duration::from_millis(20);

    fn in_a_while() -> Instant {
        Instant::now() + Duration::from_secs(20)
    }

    /// A call that keeps what it was made with, and opens nothing.
    fn lend<T>(shelf: &Shelf<char>, by: Instant, hopeless: bool, call: impl FnOnce(char) -> T) -> Result<T, CallError> {
        shelf.lend(by, || hopeless, || (), |_| (), |what| (call(*what), After::Keep))
    }

    #[test]
    fn each_serves_one_call_at_a_time() {
        let shelf = Shelf::new(2);
        assert!(matches!(lend(&shelf, Instant::now() + NO_TIME, false, |_| ()), Err(CallError::NotBegun)));
        shelf.add('a');
        shelf.add('b');
        let lent = lend(&shelf, in_a_while(), false, |first| {
            let inner = lend(&shelf, in_a_while(), false, |second| {
                assert_ne!(first, second);
                assert!(matches!(lend(&shelf, in_a_while(), true, |_| ()), Err(CallError::Lost(_))));
                assert!(shelf.empty().is_empty());
            });
            inner.unwrap();
            assert_eq!(lend(&shelf, in_a_while(), true, |second| second != first).ok(), Some(true));
        });
        lent.unwrap();
        assert_eq!(shelf.empty().len(), 2);
    }

    #[test]
    fn another_one_is_opened_when_none_is_free_and_never_too_many() {
        let shelf = Shelf::new(2);
        let opened = std::cell::Cell::new(0);
        let open = || {
            opened.set(opened.get() + 1);
            shelf.add('x');
        };
        let call = |inner: &dyn Fn()| shelf.lend(in_a_while(), || false, open, |_| (), |_| (inner(), After::Keep));
        call(&|| ()).unwrap();
        call(&|| ()).unwrap();
        assert_eq!(opened.get(), 1, "one call at a time needs one");
        call(&|| {
            call(&|| {
                let third = shelf.lend(Instant::now() + NO_TIME, || false, open, |_| (), |_| ((), After::Keep));
                assert!(matches!(third, Err(CallError::NotBegun)));
            })
            .unwrap();
        })
        .unwrap();
        assert_eq!(opened.get(), 2);
    }

    #[test]
    fn what_cannot_be_opened_is_not_asked_for_all_the_time() {
        let shelf = Shelf::<char>::new(2);
        let asked = std::cell::Cell::new(0);
        let open = || {
            asked.set(asked.get() + 1);
            assert!(!shelf.refuse(), "there is none");
        };
        let by = Instant::now() + 4 * LOOK_AGAIN;
        assert!(matches!(shelf.lend(by, || false, open, |_| (), |_| ((), After::Keep)), Err(CallError::NotBegun)));
        assert_eq!(asked.get(), 1);
    }

    #[test]
    fn what_is_not_needed_any_more_is_given_back() {
        let shelf = Shelf::new(4);
        for what in ['a', 'b', 'c'] {
            shelf.add(what);
        }
        assert!(shelf.trim(Duration::from_secs(60), |_| false).is_empty(), "just used");
        assert_eq!(shelf.trim(Duration::ZERO, |what| *what == 'a'), ['b', 'c']);
        assert!(shelf.trim(Duration::ZERO, |_| false).is_empty(), "the last one stays");
        assert_eq!(shelf.empty(), ['a']);
    }

    #[test]
    fn what_is_discarded_serves_no_other_call() {
        let shelf = Shelf::new(2);
        shelf.add('a');
        let mut discarded = None;
        let lent = shelf.lend(in_a_while(), || false, || (), |what| discarded = Some(what), |_| ((), After::Discard));
        lent.unwrap();
        assert_eq!((discarded, shelf.empty().len()), (Some('a'), 0));
        let opened = shelf.lend(in_a_while(), || false, || shelf.add('b'), |_| (), |what| (*what, After::Keep));
        assert_eq!(opened.ok(), Some('b'));
    }

    #[test]
    fn who_waits_gets_what_comes() {
        let shelf = Shelf::new(2);
        let wait = || lend(&shelf, in_a_while(), false, |what| what).ok();
        std::thread::scope(|scope| {
            let waits = scope.spawn(wait);
            shelf.add('a');
            assert_eq!(waits.join().unwrap(), Some('a'));
            let waits = lend(&shelf, in_a_while(), false, |_| scope.spawn(wait)).unwrap();
            assert_eq!(waits.join().unwrap(), Some('a'));
        });
    }

    #[test]
    fn a_call_that_panics_costs_its_connection_and_no_other() {
        let shelf = Shelf::new(1);
        shelf.add('a');
        let call = || shelf.lend(in_a_while(), || false, || (), |_| (), |_| -> ((), After) { panic!("on purpose") });
        assert!(panic::catch_unwind(AssertUnwindSafe(call)).is_err());
        assert!(shelf.empty().is_empty());
        assert_eq!(
            shelf.lend(in_a_while(), || false, || shelf.add('b'), |_| (), |b| (*b, After::Keep)).ok(),
            Some('b')
        );
    }
}
