//! The open connections to one URI, as one thing that is opened, used, lost and closed.
//!
//! # One call at a time
//!
//! A call never shares its connection with another. libvirt permits that, but up to 10.3 its client crashes by it (CVE-2024-4418): whoever
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
use super::stock::Stock;

/// Threads for queries, each with a connection of its own.
pub(super) const QUERY_THREADS: usize = 6;
/// Threads for actions, likewise: so many kills at a time, near libvirtd's own 20 workers.
pub(super) const ACTION_THREADS: usize = 12;
/// How long after the first two connections the others are opened.
const FILL_AFTER: Duration = Duration::from_millis(300);
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
    /// One for each call that may be under way, by lane.
    queries: Stock<Connection>,
    actions: Stock<Connection>,
    /// The one for all calls to a driver inside our own process, which may keep its domains per connection.
    shared: Option<Connection>,
    pub(super) lost: Arc<Lost>,
    links: Arc<AtomicUsize>,
}

impl Link {
    /// Opens the first, and listens to what happens to domains. Blocks. The others are opened behind that, by a thread of their own: one for
    /// actions at once, the rest soon, as they are needed only when much happens at once.
    pub(super) fn open(
        uri: &str,
        links: Arc<AtomicUsize>,
        events: mpsc::UnboundedSender<News>,
    ) -> Result<Arc<Self>, CallError> {
        ffi::prepare()?;
        links.fetch_add(1, Ordering::AcqRel);
        // From here on dropping it closes what is open and counts it off.
        let mut link = Self {
            queries: Stock::new(QUERY_THREADS),
            actions: Stock::new(ACTION_THREADS),
            shared: None,
            lost: Arc::default(),
            links,
        };
        let mut first = Connection::open(uri, &link.lost)?;
        first.listen(uri, events);
        if uri.starts_with("test:") {
            link.shared = Some(first);
            return Ok(Arc::new(link));
        }
        link.queries.add(first);
        let link = Arc::new(link);
        fill(&link, uri)?;
        Ok(link)
    }

    /// Runs `call` on a connection that nobody else uses meanwhile. A failure makes us look whether the connection lives, in case libvirt did not
    /// say so.
    pub(super) fn run<T>(
        &self,
        lane: Lane,
        begin_by: Instant,
        call: impl FnOnce(&Connect) -> Result<T, CallError>,
    ) -> Result<T, CallError> {
        match &self.shared {
            Some(shared) => self.run_on(shared, call),
            None => {
                let lost = || self.lost.is_said();
                self.stock(lane).lend(begin_by, lost, |connection| self.run_on(connection, call)).flatten()
            }
        }
    }

    fn run_on<T>(
        &self,
        connection: &Connection,
        call: impl FnOnce(&Connect) -> Result<T, CallError>,
    ) -> Result<T, CallError> {
        let begun = Instant::now();
        let result = call(&connection.connect);
        if begun.elapsed() > SLOW_CALL && self.shared.is_none() {
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
        let (queries, actions, shared) = (self.queries.empty(), self.actions.empty(), self.shared.take());
        let links = Arc::clone(&self.links);
        let close = move || {
            queries.into_iter().chain(actions).chain(shared).for_each(Connection::close);
            links.fetch_sub(1, Ordering::AcqRel);
        };
        // On a thread of its own because closing can block on a server that hangs, and the last user may be an async thread.
        if let Err(error) = thread::Builder::new().name("virt-close".to_owned()).spawn(close) {
            tracing::warn!(%error, "no thread to close libvirt connections on: they stay open");
        }
    }
}

/// Has the rest of the connections opened, soon.
fn fill(link: &Arc<Link>, uri: &str) -> Result<(), CallError> {
    // Opening can hang as long as the server does; that must not keep what is open already from being closed.
    let (link, lost, uri) = (Arc::downgrade(link), Arc::clone(&link.lost), uri.to_owned());
    let mut is_first = true;
    let open = move || {
        while let Some(lane) = link.upgrade().and_then(|link| link.lacking()) {
            if lost.is_said() {
                return;
            }
            let connection = match Connection::open(&uri, &lost) {
                Ok(connection) => connection,
                Err(error) if is_first => {
                    tracing::debug!(uri, error = error.message(), "a second connection to libvirt fails");
                    return lost.say();
                }
                // It may permit so many and no more. If it is gone, the others tell.
                Err(error) => {
                    let error = error.message();
                    tracing::warn!(uri, error, "libvirt takes no more connections: less can be done there at once");
                    return;
                }
            };
            match link.upgrade() {
                Some(link) => link.stock(lane).add(connection),
                None => return connection.close(),
            }
            if std::mem::take(&mut is_first) {
                // Whoever has just connected has better things to do with the processors.
                thread::sleep(FILL_AFTER);
            }
        }
    };
    match thread::Builder::new().name("virt-fill".to_owned()).spawn(open) {
        Ok(_) => Ok(()),
        Err(_) => Err(CallError::Busy("no thread could be started to connect on")),
    }
}

impl Link {
    fn stock(&self, lane: Lane) -> &Stock<Connection> {
        match lane {
            Lane::Query => &self.queries,
            Lane::Act => &self.actions,
        }
    }

    /// What it has not enough connections for.
    fn lacking(&self) -> Option<Lane> {
        // Those for actions first: many deaths at once are what this is for.
        [Lane::Act, Lane::Query].into_iter().find(|lane| !self.stock(*lane).is_full())
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
