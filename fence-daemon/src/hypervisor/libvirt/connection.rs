//! One open connection to libvirt.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use tokio::sync::{Notify, mpsc};
use virt::connect::Connect as Handle;

use super::{CallError, News, Told, ffi, ffi::Watch};

/// What a call gets: an open connection.
pub(crate) type Connect = Handle;

/// The first client library that lets threads share a connection: 10.4.0.
const SHARES_SINCE: u32 = 10_004_000;
/// Keepalive: a probe after so many silent seconds. libvirtd sends its own after 5 s. As long as
/// it does, none of ours is needed, and an idle connection wakes the daemon once and not twice.
const KEEPALIVE_SECONDS: i32 = 6;
/// A connection is dead after so many probes without an answer. In all 18 s: hung calls end before
/// the client gives up at 30 s.
const KEEPALIVE_PROBES: u32 = 2;

/// Whether a URI's driver is one inside our own process, which may keep its domains per connection.
pub(super) fn is_in_process(uri: &str) -> bool {
    uri.starts_with("test:")
}

/// Whether threads may share a connection to this URI.
pub(super) fn may_be_shared(uri: &str) -> bool {
    is_in_process(uri) || Handle::get_version().is_ok_and(|version| version >= SHARES_SINCE)
}

/// Says once that all connections of a link are lost.
#[derive(Default)]
pub(super) struct Lost {
    lost: AtomicBool,
    news: Notify,
}

impl Lost {
    pub(super) fn say(&self) {
        self.lost.store(true, Ordering::Release);
        self.news.notify_one();
    }

    pub(super) fn is_said(&self) -> bool {
        self.lost.load(Ordering::Acquire)
    }

    /// For the keeper, the only one that waits.
    pub(super) async fn wait(&self) {
        while !self.is_said() {
            self.news.notified().await;
        }
    }
}

/// What the connections of one link have in common.
pub(super) struct Common {
    pub(super) uri: Arc<str>,
    pub(super) lost: Lost,
    /// Where news of domains goes.
    pub(super) events: mpsc::UnboundedSender<News>,
    /// How many connections to the URI are open, over all links.
    pub(super) open: Arc<AtomicUsize>,
}

/// A connection with its callbacks. It closes when it is dropped, which can block.
pub(super) struct Connection {
    common: Arc<Common>,
    connect: Connect,
    watch: Watch,
    /// Whether it tells what happens to domains.
    pub(super) listens: bool,
}

impl Connection {
    /// Opens a connection. Can hang as long as the server does.
    pub(super) fn open(common: &Arc<Common>) -> Result<Self, CallError> {
        let uri = &common.uri;
        ffi::prepare()?;
        let connect = Handle::open(Some(uri))?;
        common.open.fetch_add(1, Ordering::AcqRel);
        // Drivers in our own process refuse it, and need none. Elsewhere calls still end when the
        // kernel ends the connection.
        if let Err(error) = connect.set_keep_alive(KEEPALIVE_SECONDS, KEEPALIVE_PROBES) {
            tracing::debug!(%uri, error = error.message(), "no keepalive");
        }
        let known = Arc::clone(common);
        let listener = move |news| match news {
            News::Closed => known.lost.say(),
            // Fails only if nobody wants to know any more.
            News::Changed(_) | News::Appeared(..) | News::Reset(_) | News::Leaving(_) => drop(known.events.send(news)),
        };
        let watch = Watch::begin(&connect, Arc::new(listener));
        Ok(Self { common: Arc::clone(common), connect, watch, listens: false })
    }

    /// Tells what happens to domains, as long as it is open.
    pub(super) fn listen(&mut self) -> Told {
        let told = self.watch.listen(&self.connect);
        self.listens = told.changes;
        if !told.changes {
            tracing::warn!(uri = %self.common.uri, "libvirt tells no events there: its domains are looked up for each request");
        }
        told
    }

    /// Runs a call. After a failure it looks whether the connection lives, in case libvirt did not
    /// say so.
    pub(super) fn run<T>(&self, call: impl FnOnce(&Connect) -> Result<T, CallError>) -> Result<T, CallError> {
        match call(&self.connect) {
            Err(error) if !self.is_alive() => {
                self.common.lost.say();
                Err(CallError::Lost(error.to_string()))
            }
            result => result,
        }
    }

    /// Asks our side of the connection only: nothing goes over the wire.
    fn is_alive(&self) -> bool {
        self.connect.is_alive().unwrap_or(false)
    }

    /// Replaces a connection that serves no further call. Its successor tells of events before it
    /// is closed. `None`: no successor is needed, or there can be none and the link is lost.
    pub(super) fn renew(&self) -> Option<Self> {
        let common = &self.common;
        tracing::debug!(uri = %common.uri, "a slow call over libvirt: its connection is replaced");
        // If all connections are lost, the next link tells of events.
        if !self.listens || common.lost.is_said() {
            return None;
        }
        match Self::open(common) {
            Ok(mut successor) => {
                successor.listen();
                // Both are connected to the same server only if the old one still lives.
                if successor.listens && self.is_alive() {
                    return Some(successor);
                }
            }
            Err(error) => tracing::debug!(uri = %common.uri, %error, "a connection to libvirt cannot be replaced"),
        }
        common.lost.say();
        None
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.watch.end(&self.connect);
        match self.connect.close() {
            Ok(0) => {}
            Ok(left) => tracing::debug!(left, "a closed libvirt connection is still referred to"),
            Err(error) => tracing::debug!(error = error.message(), "closing a libvirt connection"),
        }
        self.common.open.fetch_sub(1, Ordering::AcqRel);
    }
}

/// One look at a URI from outside of the daemon, over a connection of its own.
pub(super) fn once<T>(uri: &str, call: impl FnOnce(&Connect) -> Result<T, CallError>) -> Result<T, CallError> {
    ffi::prepare()?;
    let mut connect = Handle::open(Some(uri))?;
    let said = call(&connect);
    // What it has said counts, however the connection is closed.
    let _ = connect.close();
    said
}
