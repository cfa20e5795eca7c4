//! The queue of requests that clients bring over connections of their own, whichever way.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::awake::Awake;
use super::request::Incoming;
use crate::clock::Moment;

/// How many verified requests wait for the reader. It takes each within microseconds.
const QUEUE: usize = 64;

/// What a listener puts its requests into.
pub(super) type Feed = mpsc::Sender<Incoming>;

/// The queue.
#[derive(Debug)]
pub struct Arrivals {
    feed: Feed,
    queue: mpsc::Receiver<Incoming>,
    awake: Arc<Awake>,
}

/// The way into the queue, for listeners that begin at any time.
#[derive(Clone, Debug)]
pub struct Inlets {
    /// Does not keep the queue open.
    feed: mpsc::WeakSender<Incoming>,
    awake: Arc<Awake>,
}

/// A listener's end of the queue, and the listener's tasks. Dropping it ends them, and not the
/// connections that they have accepted.
#[derive(Debug)]
pub struct Inlet {
    feed: Feed,
    awake: Arc<Awake>,
    tasks: JoinSet<()>,
}

impl Default for Arrivals {
    fn default() -> Self {
        let (feed, queue) = mpsc::channel(QUEUE);
        Self { feed, queue, awake: Arc::new(Awake::since(Moment::now())) }
    }
}

impl Inlets {
    /// The end for another listener.
    #[must_use]
    pub fn inlet(&self) -> Inlet {
        // Nobody reads any more after the end of the queue.
        let feed = self.feed.upgrade().unwrap_or_else(|| mpsc::channel(1).0);
        Inlet { feed, awake: Arc::clone(&self.awake), tasks: JoinSet::new() }
    }
}

impl Inlet {
    /// Runs a listener, which gets its end of the queue. Must be called within a tokio runtime.
    pub(super) fn listen<L: Future<Output = ()> + Send + 'static>(&mut self, listener: impl FnOnce(Feed) -> L) {
        self.tasks.spawn(listener(self.feed()));
    }

    /// The queue's end for a listener that runs tasks of its own.
    pub(super) fn feed(&self) -> Feed {
        self.feed.clone()
    }

    /// What knows whether the daemon stood still.
    pub(super) fn awake(&self) -> Arc<Awake> {
        Arc::clone(&self.awake)
    }
}

impl Arrivals {
    /// The way into the queue.
    #[must_use]
    pub fn inlets(&self) -> Inlets {
        Inlets { feed: self.feed.downgrade(), awake: Arc::clone(&self.awake) }
    }

    /// Notes a heartbeat. Returns how long the daemon stood still before it, if it did.
    pub fn beat(&self) -> Option<Duration> {
        self.awake.beat(Moment::now())
    }

    /// Hands on what clients send that have connected before, within `bound`. To be called when the
    /// listeners have ended.
    pub async fn drain(self, bound: Duration, mut each: impl FnMut(Incoming)) {
        let Self { feed, mut queue, .. } = self;
        drop(feed);
        // The last connection's end of the queue ends it.
        let all = async {
            while let Some(incoming) = queue.recv().await {
                each(incoming);
            }
        };
        let _ = timeout(bound, all).await;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_queue_ends_with_the_last_connection_and_listeners_keep_it_from_nothing() {
        let arrivals = Arrivals::default();
        let inlets = arrivals.inlets();
        let mut inlet = inlets.inlet();
        let connection = inlet.feed();
        inlet.listen(|feed| async move {
            feed.closed().await;
        });
        drop(inlet);
        let soon = Duration::from_secs(20);
        let drained = tokio::spawn(arrivals.drain(soon, |_| {}));
        tokio::task::yield_now().await;
        assert!(!drained.is_finished(), "a connection is still there");
        drop(connection);
        timeout(soon / 2, drained).await.unwrap().unwrap();
        // A listener that begins after the end feeds nobody.
        assert!(inlets.inlet().feed().is_closed());
    }
}
