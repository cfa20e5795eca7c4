//! The end of the daemon, for requests that are under way.
//!
//! A stop first waits for the requests of its moment, while this daemon still serves new ones. Then
//! nobody serves until the next daemon does, so the rest gets a short time. A client with a claimed
//! request then receives "failure". Its claim is on record, so the next daemon does not act again,
//! and what has begun takes effect. A client without a connection asks again.

use std::convert::Infallible;
use std::sync::Mutex;
use std::time::Duration;

use fence_common::sync::lock;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until, timeout};

use super::Pipeline;

/// How long callbacks and answers may take once nothing is served any more. An honest exchange
/// takes milliseconds. A connected client does not ask again: if it is cut off it reports a failed
/// fence.
pub const STOP_GRACE: Duration = Duration::from_millis(250);

/// Tells that nothing is served any more, and the deadline for all answers.
pub(super) type Stopping = watch::Receiver<Option<Instant>>;

/// Waits until the daemon stops and its grace period is over.
pub(super) async fn stopped(stopping: &mut Stopping) {
    // An error means that the pipeline is gone, and its tasks with it.
    let by = stopping.wait_for(Option::is_some).await.ok().and_then(|by| *by);
    if let Some(by) = by {
        sleep_until(by).await;
    }
}

/// What a request holds while it is served.
pub(super) type UnderWay = mpsc::Sender<Infallible>;

/// Knows when the requests of a moment are over.
#[derive(Debug)]
pub(super) struct Generations(Mutex<(UnderWay, mpsc::Receiver<Infallible>)>);

impl Default for Generations {
    fn default() -> Self {
        Self(Mutex::new(mpsc::channel(1)))
    }
}

impl Generations {
    /// One more request is served, until the result is dropped.
    pub(super) fn enter(&self) -> UnderWay {
        lock(&self.0).0.clone()
    }

    /// Waits until all requests of this moment are over. Later ones do not count.
    async fn over(&self) {
        let (ours, mut over) = std::mem::replace(&mut *lock(&self.0), mpsc::channel(1));
        drop(ours);
        // Nothing is ever sent: it ends with the last sender.
        let _ = over.recv().await;
    }
}

impl Pipeline {
    /// Waits until the requests of this moment are over, at most for `bound`. The pipeline goes on
    /// to take in requests.
    pub async fn settle(&self, bound: Duration) {
        let _ = timeout(bound, self.generations.over()).await;
    }

    /// Waits until all requests are answered, at most for `bound`. Returns how many are still
    /// unanswered then.
    ///
    /// After [`STOP_GRACE`] it drops unclaimed requests, since a client without a connection asks
    /// again. It answers the claimed ones with failure.
    pub async fn shutdown(&self, bound: Duration) -> usize {
        self.stopping.send_replace(Some(Instant::now() + STOP_GRACE));
        let mut tasks = std::mem::take(&mut *lock(&self.tasks));
        let all = async { while tasks.join_next().await.is_some() {} };
        let _ = timeout(bound, all).await;
        let left = tasks.len();
        tasks.abort_all();
        left
    }
}
