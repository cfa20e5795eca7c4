//! The queue of requests that clients bring over connections of their own, whichever way.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::awake::Awake;
use super::request::Incoming;
use crate::clock::Moment;

/// How many verified requests wait for the reader. It takes each within microseconds.
const QUEUE: usize = 64;

/// What a listener puts its requests into.
pub(super) type Feed = mpsc::Sender<Incoming>;

/// The queue, and the listeners that feed it. Dropping it ends them.
#[derive(Debug)]
pub struct Arrivals {
    feed: Feed,
    queue: mpsc::Receiver<Incoming>,
    listeners: JoinSet<()>,
    awake: Arc<Awake>,
}

impl Default for Arrivals {
    fn default() -> Self {
        let (feed, queue) = mpsc::channel(QUEUE);
        Self { feed, queue, listeners: JoinSet::new(), awake: Arc::new(Awake::since(Moment::now())) }
    }
}

impl Arrivals {
    /// Runs a listener, which gets its end of the queue. Must be called within a tokio runtime.
    pub(super) fn listen<L: Future<Output = ()> + Send + 'static>(&mut self, listener: impl FnOnce(Feed) -> L) {
        self.listeners.spawn(listener(self.feed.clone()));
    }

    /// The queue's end for a listener that runs tasks of its own.
    pub(super) fn feed(&self) -> Feed {
        self.feed.clone()
    }

    /// What knows whether the daemon stood still.
    pub(super) fn awake(&self) -> Arc<Awake> {
        Arc::clone(&self.awake)
    }

    /// Notes a heartbeat. Returns how long the daemon stood still before it, if it did.
    pub fn beat(&self) -> Option<Duration> {
        self.awake.beat(Moment::now())
    }

    /// The next verified request. Dropping the future loses none.
    pub async fn next(&mut self) -> Incoming {
        match self.queue.recv().await {
            Some(incoming) => incoming,
            // Never: one end of the queue is here.
            None => std::future::pending().await,
        }
    }
}
