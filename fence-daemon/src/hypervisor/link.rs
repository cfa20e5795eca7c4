//! The open connections to one URI, as one thing that is opened, used, lost and closed.
//!
//! # One call at a time
//!
//! A thread never shares its connection with another. libvirt permits that, but up to 10.3 its client crashes by it (CVE-2024-4418): whoever
//! waits for an answer polls with a structure on its own stack, a call of another thread interrupts that, and the structure stays
//! registered when its thread has returned. A keepalive probe, which is sent during calls that take long, interrupts as well: so
//! a connection is thrown away after such a call.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use tokio::sync::{Notify, mpsc};
use virt::connect::Connect;
use virt::error::Error;

use super::error::CallError;
use super::ffi::{self, CloseWatch, EventWatch, News};

/// Threads for queries, each with a connection of its own.
pub(super) const QUERY_THREADS: usize = 6;
/// Threads for actions, likewise: so many kills at a time, near libvirtd's own 20 workers.
pub(super) const ACTION_THREADS: usize = 12;
/// Keepalive: a probe each so many seconds ...
const KEEPALIVE_SECONDS: i32 = 5;
/// ... and dead after so many without an answer. 15 to 20 s in all: hung calls end before the client gives up at 30 s.
const KEEPALIVE_PROBES: u32 = 3;

/// A connection over which a call has taken longer than this is not used for another: a keepalive probe may have been sent during the call.
const SLOW_CALL: Duration = Duration::from_secs(4);

/// Which pool and connection a call goes by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lane {
    /// Reads only; must never wait behind a kill.
    Query,
    /// Kills and starts.
    Act,
}

/// Says once that a link is dead.
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

/// The open connections to one URI.
pub(super) struct Link {
    /// The first ones are for queries, the rest for actions. A single one serves all.
    connections: Vec<Connection>,
    pub(super) lost: Arc<Lost>,
    links: Arc<AtomicUsize>,
}

impl Link {
    /// Opens them all, and listens to what happens to domains. Blocks.
    pub(super) fn open(
        uri: &str,
        links: Arc<AtomicUsize>,
        events: mpsc::UnboundedSender<News>,
    ) -> Result<Self, CallError> {
        ffi::prepare()?;
        links.fetch_add(1, Ordering::AcqRel);
        let in_process = uri.starts_with("test:");
        let wanted = if in_process { 1 } else { QUERY_THREADS + ACTION_THREADS };
        // From here on dropping it closes what is open and counts it off.
        let mut link = Self { connections: Vec::with_capacity(wanted), lost: Arc::default(), links };
        for _ in 0..wanted {
            let connection = Connection::open(uri, &link.lost)?;
            link.connections.push(connection);
        }
        if let Some(first) = link.connections.first_mut() {
            first.listen(uri, events);
        }
        Ok(link)
    }

    /// Runs `call` on the thread's connection. A failure makes us look whether the connection lives, in case libvirt did not say so.
    pub(super) fn run<T>(
        &self,
        lane: Lane,
        thread: usize,
        call: impl FnOnce(&Connect) -> Result<T, CallError>,
    ) -> Result<T, CallError> {
        let number = match lane {
            Lane::Query => thread,
            Lane::Act => QUERY_THREADS + thread,
        };
        let Some(connection) = self.connections.get(number).or(self.connections.first()) else {
            return Err(CallError::NotConnected("no connection".to_owned()));
        };
        let begun = Instant::now();
        let result = call(&connection.connect);
        if begun.elapsed() > SLOW_CALL && self.connections.len() > 1 {
            // Closes when the calls beside it have ended; the next one is opened meanwhile.
            tracing::debug!(took = ?begun.elapsed(), "a slow call over libvirt: its connections are renewed");
            self.lost.say();
        }
        match result {
            // Asks our side of the connection only, nothing goes over the wire.
            Err(error) if !connection.connect.is_alive().unwrap_or(false) => {
                self.lost.say();
                Err(CallError::Lost(error.to_string()))
            }
            result => result,
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        let (connections, links) = (std::mem::take(&mut self.connections), Arc::clone(&self.links));
        let close = move || {
            connections.into_iter().for_each(Connection::close);
            links.fetch_sub(1, Ordering::AcqRel);
        };
        // On a thread of its own because closing can block on a server that hangs, and the last user may be an async thread.
        if let Err(error) = thread::Builder::new().name("virt-close".to_owned()).spawn(close) {
            tracing::warn!(%error, "no thread to close libvirt connections on: they stay open");
        }
    }
}

/// One connection with its close callback.
struct Connection {
    connect: Connect,
    watch: Option<CloseWatch>,
    events: Option<EventWatch>,
}

impl Connection {
    fn open(uri: &str, lost: &Arc<Lost>) -> Result<Self, Error> {
        let connect = Connect::open(Some(uri))?;
        // Refused by drivers in our own process, which need none. Elsewhere calls still end when the kernel ends the connection.
        if let Err(error) = connect.set_keep_alive(KEEPALIVE_SECONDS, KEEPALIVE_PROBES) {
            tracing::debug!(uri, error = error.message(), "no keepalive");
        }
        let notice = Arc::clone(lost);
        let watch = CloseWatch::begin(&connect, Box::new(move || notice.say()))
            .inspect_err(|error| tracing::debug!(uri, error = error.message(), "no close callback"))
            .ok();
        Ok(Self { connect, watch, events: None })
    }

    /// Sends the UUIDs of domains that something happens to, as long as the connection lasts.
    fn listen(&mut self, uri: &str, events: mpsc::UnboundedSender<News>) {
        // Fails only if nobody wants to know any more.
        let listener = Arc::new(move |news| {
            let _ = events.send(news);
        });
        match EventWatch::begin(&self.connect, listener) {
            Ok(watch) => self.events = Some(watch),
            Err(error) => {
                let error = error.message();
                tracing::warn!(uri, error, "libvirt tells no events there: domains are looked up for each request");
            }
        }
    }

    fn close(mut self) {
        if let Some(events) = self.events.take() {
            events.end(&self.connect);
        }
        if let Some(watch) = self.watch.take() {
            watch.end(&self.connect);
        }
        match self.connect.close() {
            Ok(0) => {}
            Ok(left) => tracing::debug!(left, "a closed libvirt connection is still referred to"),
            Err(error) => tracing::debug!(error = error.message(), "closing a libvirt connection"),
        }
    }
}
