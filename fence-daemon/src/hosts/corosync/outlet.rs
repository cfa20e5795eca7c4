//! The way of events from the thread that talks to corosync to the daemon, and the watch over that
//! thread.
//!
//! A call into corosync's libraries has no time limit: a corosync that is stopped holds the thread.
//! The watch notices it and reports the connection as lost. What the thread brings afterwards
//! belongs to that connection and is discarded; the thread connects again.

use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use fence_common::sync::lock;
use tokio::sync::mpsc::Sender;
use tokio::sync::mpsc::error::TrySendError;

use super::super::transport::{Event, Member};
use super::no_group::NoGroup;
use crate::clock::Moment;

/// How many events may wait for the daemon.
pub(super) const WAITING: usize = 4096;
/// How long one call may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often the same outage may be logged with other words.
const REPEAT: Duration = Duration::from_secs(60);

/// Where events go.
pub(super) struct Outlet {
    events: Sender<Event>,
    state: Mutex<ThreadState>,
}

#[derive(Default)]
struct ThreadState {
    /// Since when the thread has been in corosync's libraries.
    inside: Option<Moment>,
    /// The group is joined, and not given up by the watch.
    is_joined: bool,
    /// The watch has given the connection up.
    is_cut: bool,
    /// The last words about an outage, and when.
    logged: Option<(String, Moment)>,
}

impl Outlet {
    pub(super) fn new(events: Sender<Event>) -> Self {
        Self { events, state: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, ThreadState> {
        lock(&self.state)
    }

    /// Whether the group is joined.
    pub(super) fn is_joined(&self) -> bool {
        self.state().is_joined
    }

    /// Whether nobody takes events any more.
    pub(super) fn is_closed(&self) -> bool {
        self.events.is_closed()
    }

    /// The thread is about to call corosync.
    pub(super) fn enter(&self) {
        self.state().inside.get_or_insert_with(Moment::now);
    }

    /// The thread is about to wait by itself.
    ///
    /// # Errors
    /// The watch has given the connection up.
    pub(super) fn leave(&self) -> Result<(), NoGroup> {
        let mut state = self.state();
        state.inside = None;
        if state.is_cut { Err(NoGroup::Hangs(PATIENCE)) } else { Ok(()) }
    }

    /// The group is joined.
    pub(super) fn joined(&self, ours: Member) -> Result<(), NoGroup> {
        self.emit(Event::Joined(ours))?;
        let mut state = self.state();
        state.is_joined = !state.is_cut;
        state.logged = None;
        Ok(())
    }

    /// Passes an event on.
    ///
    /// # Errors
    /// The watch has given the connection up, or the daemon does not take its events.
    pub(super) fn emit(&self, event: Event) -> Result<(), NoGroup> {
        // With the lock held: nothing of a connection comes after its loss.
        let state = self.state();
        if state.is_cut {
            return Err(NoGroup::Hangs(PATIENCE));
        }
        self.events.try_send(event).map_err(|error| match error {
            TrySendError::Full(_) => NoGroup::Full(WAITING),
            TrySendError::Closed(_) => NoGroup::Ended,
        })
    }

    /// The connection is lost, or could not be made: the event goes out once for each outage. Waits
    /// for the daemon if it has not taken its events.
    pub(super) fn lost(&self, why: &NoGroup) {
        let mut state = self.state();
        let is_news = !state.is_cut && (state.is_joined || state.logged.is_none());
        *state = ThreadState { logged: state.logged.take(), ..ThreadState::default() };
        drop(state);
        self.log(why);
        if is_news {
            // A failure means that the daemon ends.
            let _ = self.events.blocking_send(Event::Lost(why.to_string()));
        }
    }

    /// One line for each outage, and one more when its reason changes, but not often.
    fn log(&self, why: &NoGroup) {
        let (now, why) = (Moment::now(), why.to_string());
        let mut state = self.state();
        if let Some((logged, at)) = &state.logged
            && (*logged == why || now.since(*at) < REPEAT)
        {
            return;
        }
        state.logged = Some((why.clone(), now));
        drop(state);
        tracing::warn!(
            why,
            "the other hosts cannot be asked: only machines that run here are fenced until corosync is back"
        );
    }

    /// Looks at the thread: a call that takes too long is the end of its connection.
    pub(super) fn watch(&self, now: Moment) {
        let mut state = self.state();
        let hangs = state.inside.is_some_and(|since| now.since(since) > PATIENCE);
        if !hangs || state.is_cut {
            return;
        }
        let why = NoGroup::Hangs(PATIENCE);
        let is_news = state.is_joined || state.logged.is_none();
        if is_news {
            // Where the daemon does not take its events, it does not need this one either: the next
            // look tries again.
            let Ok(()) = self.events.try_send(Event::Lost(why.to_string())) else { return };
        }
        state.is_cut = true;
        state.is_joined = false;
        drop(state);
        self.log(&why);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OURS: Member = Member { node: 1, pid: 2 };

    #[test]
    fn an_outage_is_reported_once() {
        let (events, mut taken) = tokio::sync::mpsc::channel(WAITING);
        let outlet = Outlet::new(events);
        outlet.lost(&NoGroup::Closed);
        outlet.lost(&NoGroup::Closed);
        outlet.lost(&NoGroup::NotMember);
        assert!(matches!(taken.try_recv(), Ok(Event::Lost(_))));
        assert!(taken.try_recv().is_err() && !outlet.is_joined());
        outlet.joined(OURS).expect("joined");
        assert!(outlet.is_joined());
        outlet.lost(&NoGroup::Closed);
        assert_eq!(taken.try_recv(), Ok(Event::Joined(OURS)));
        assert!(matches!(taken.try_recv(), Ok(Event::Lost(_))));
        assert!(!outlet.is_joined());
    }

    #[test]
    fn nothing_comes_of_a_connection_that_hung() {
        let (events, mut taken) = tokio::sync::mpsc::channel(WAITING);
        let outlet = Outlet::new(events);
        outlet.joined(OURS).expect("joined");
        outlet.enter();
        outlet.watch(Moment::now().plus(PATIENCE / 2));
        assert!(outlet.is_joined());
        outlet.watch(Moment::now().plus(PATIENCE * 2));
        outlet.watch(Moment::now().plus(PATIENCE * 2));
        assert!(!outlet.is_joined());
        assert_eq!(outlet.emit(Event::Quorum { quorate: true, ring: vec![1] }), Err(NoGroup::Hangs(PATIENCE)));
        assert_eq!(outlet.leave(), Err(NoGroup::Hangs(PATIENCE)));
        outlet.lost(&NoGroup::Hangs(PATIENCE));
        assert_eq!(taken.try_recv(), Ok(Event::Joined(OURS)));
        assert!(matches!(taken.try_recv(), Ok(Event::Lost(_))));
        assert!(taken.try_recv().is_err(), "the loss is reported once");
        // The next connection is a new one.
        assert_eq!((outlet.leave(), outlet.joined(OURS)), (Ok(()), Ok(())));
        assert!(outlet.is_joined());
    }

    #[test]
    fn a_daemon_that_takes_nothing_loses_the_connection() {
        let (events, taken) = tokio::sync::mpsc::channel(1);
        let outlet = Outlet::new(events);
        outlet.joined(OURS).expect("joined");
        assert_eq!(outlet.emit(Event::Quorum { quorate: true, ring: vec![1] }), Err(NoGroup::Full(WAITING)));
        drop(taken);
        assert_eq!(outlet.emit(Event::Quorum { quorate: true, ring: vec![1] }), Err(NoGroup::Ended));
        assert!(outlet.is_closed());
    }
}
