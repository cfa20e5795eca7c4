//! The open connections to one URI, as one thing that is opened, used, lost and closed.
//!
//! # How many
//!
//! Two: one for queries, which also tells what happens to domains, and one for actions. A client library
//! from 10.4 on serves all calls over these two. Up to 10.3 it crashes when threads share a connection
//! (CVE-2024-4418): a thread that waits for an answer polls with a structure on its own stack, a call of
//! another thread interrupts that, and the structure stays registered when its thread has returned. So
//! with an older one a call never shares its connection. When calls are under way at the same time,
//! further connections are opened, and closed again when nobody has used them for [`IDLE`].
//!
//! A keepalive probe, which is sent during calls that take long, interrupts as well. So with an older
//! library a connection serves no other call after a slow one. It is replaced alone: the others stay, and
//! the one that tells of events is closed after its successor tells of them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use tokio::sync::{Notify, mpsc};
use virt::connect::Connect;
use virt::error::Error;

use super::error::CallError;
use super::ffi::{self, CloseWatch, EventWatch, News};
use super::shelf::{After, Shelf};

/// The first client library that threads may share a connection of: 10.4.0.
const SHARES_SINCE: u32 = 10_004_000;
/// How long a connection beyond the first two stays open unused.
const IDLE: Duration = Duration::from_secs(10);
/// Keepalive: a probe each so many seconds ...
const KEEPALIVE_SECONDS: i32 = 5;
/// ... and dead after so many without an answer. 15 to 20 s in all: hung calls end before the client gives up at 30 s.
const KEEPALIVE_PROBES: u32 = 3;

/// A connection over which a call has taken longer than this is not used for another: a keepalive probe may have been sent during the call.
const SLOW_CALL: Duration = Duration::from_secs(4);

/// Which threads and connections a call goes by. Each lane has threads of its own, so that calls that hang
/// in one of them keep nobody in another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lane {
    /// Questions of requests. They read only, and must never wait behind a kill.
    Query,
    /// Looks for the table. One at a domain that libvirt is busy with may take as long as that.
    Look,
    /// Kills and resets that a client waits for.
    Kill,
    /// Starts. They must not wait behind kills of what does not die.
    Start,
    /// Destroys for libvirt's own record. Nobody waits for them.
    Record,
}

impl Lane {
    /// All of them, in the order of their numbers.
    pub(crate) const ALL: [Self; 5] = [Self::Query, Self::Look, Self::Kill, Self::Start, Self::Record];

    /// Its name, for its threads.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Query => "query",
            Self::Look => "look",
            Self::Kill => "kill",
            Self::Start => "start",
            Self::Record => "record",
        }
    }

    /// How many of its calls may be under way at a time. What changes domains stays below the 20 workers of a libvirtd, all together.
    /// Each call over a remote URI may need a login of its own.
    pub(crate) fn calls(self, is_remote: bool) -> usize {
        match (self, is_remote) {
            (Self::Query, false) => 6,
            (Self::Look, false) => 6,
            (Self::Kill, false) => 12,
            (Self::Start, false) => 4,
            (Self::Record, false) => 2,
            (Self::Query, true) => 3,
            (Self::Look, true) => 1,
            (Self::Kill, true) => 4,
            (Self::Start, true) => 1,
            // No domain of a remote host is killed by its own process.
            (Self::Record, true) => 1,
        }
    }

    fn asks_only(self) -> bool {
        matches!(self, Self::Query | Self::Look)
    }
}

/// Whether a URI's hypervisor is another host's: it names one, or is reached by ssh all the same.
pub(crate) fn is_remote(uri: &str) -> bool {
    let Some((scheme, rest)) = uri.split_once("://") else { return false };
    let transport = scheme.split_once('+').map_or("", |(_, transport)| transport);
    transport.contains("ssh") || !rest.is_empty() && !rest.starts_with(['/', '?'])
}

/// Says once that a link is dead.
#[derive(Default)]
pub(crate) struct Lost {
    lost: AtomicBool,
    news: Notify,
}

impl Lost {
    pub(crate) fn say(&self) {
        self.lost.store(true, Ordering::Release);
        self.news.notify_one();
    }

    pub(crate) fn is_said(&self) -> bool {
        self.lost.load(Ordering::Acquire)
    }

    /// For the keeper, the only one that waits.
    pub(crate) async fn wait(&self) {
        while !self.is_said() {
            self.news.notified().await;
        }
    }
}

/// Where what happens to domains is told.
type Events = mpsc::UnboundedSender<News>;

/// The connections, by what may be done with them.
enum Ways {
    /// One for all calls to a driver inside our own process, which may keep its domains per connection.
    One(Connection),
    /// Two for all calls.
    Two { queries: Connection, actions: Connection },
    /// One for each call that is under way.
    Each { queries: Shelf<Connection>, actions: Shelf<Connection> },
}

/// The open connections to one URI.
pub(crate) struct Link {
    uri: Arc<str>,
    ways: Option<Ways>,
    events: Events,
    /// Whether libvirt tells of what happens to domains.
    pub(crate) told: Told,
    pub(crate) lost: Arc<Lost>,
    links: Arc<AtomicUsize>,
}

/// Of what libvirt tells.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Told {
    /// What happens to domains.
    pub(crate) changes: bool,
    /// That a domain was reset.
    pub(crate) resets: bool,
}

impl Link {
    /// Opens the first connection, and listens to what happens to domains. Blocks. The second one is opened behind that where calls do not share.
    pub(crate) fn open(uri: &Arc<str>, links: Arc<AtomicUsize>, events: Events) -> Result<Arc<Self>, CallError> {
        ffi::prepare()?;
        let shares = Connect::get_version().is_ok_and(|version| version >= SHARES_SINCE);
        Self::open_as(uri, shares && !uri.starts_with("test:"), links, events)
    }

    fn open_as(uri: &Arc<str>, shares: bool, links: Arc<AtomicUsize>, events: Events) -> Result<Arc<Self>, CallError> {
        links.fetch_add(1, Ordering::AcqRel);
        let (told, lost, uri) = (Told::default(), Arc::default(), Arc::clone(uri));
        // From here on dropping it closes what is open and counts it off.
        let mut link = Self { uri, ways: None, events, told, lost, links };
        let mut first = Connection::open(&link.uri, &link.lost)?;
        link.told = first.listen(&link.uri, link.events.clone());
        if link.uri.starts_with("test:") && !shares {
            link.ways = Some(Ways::One(first));
            return Ok(Arc::new(link));
        }
        if shares {
            let actions = Connection::open(&link.uri, &link.lost)?;
            link.ways = Some(Ways::Two { queries: first, actions });
            return Ok(Arc::new(link));
        }
        let is_remote = is_remote(&link.uri);
        let most = |asks: bool| {
            let lanes = Lane::ALL.into_iter().filter(|lane| lane.asks_only() == asks);
            lanes.map(|lane| lane.calls(is_remote)).sum()
        };
        let (queries, actions) = (Shelf::new(most(true)), Shelf::new(most(false)));
        queries.add(first);
        link.ways = Some(Ways::Each { queries, actions });
        let link = Arc::new(link);
        // At once, before it is needed: a kill does not wait for libvirt's record, and that is for nothing when it is late.
        link.another(Lane::Record);
        Ok(link)
    }

    /// Runs `call` on a connection, which no other call uses meanwhile unless the library permits that. A failure makes us look whether the
    /// connection lives, in case libvirt did not say so.
    pub(crate) fn run<T>(
        self: &Arc<Self>,
        lane: Lane,
        begin_by: Instant,
        call: impl FnOnce(&Connect) -> Result<T, CallError>,
    ) -> Result<T, CallError> {
        match &self.ways {
            Some(Ways::One(connection)) => self.run_on(connection, call),
            Some(Ways::Two { queries, .. }) if lane.asks_only() => self.run_on(queries, call),
            Some(Ways::Two { actions, .. }) => self.run_on(actions, call),
            Some(Ways::Each { .. }) | None => {
                let Some(shelf) = self.shelf(lane) else { return Err(CallError::Busy("there is no connection")) };
                let lost = || self.lost.is_said();
                let one = |connection: &Connection| {
                    let begun = Instant::now();
                    let result = self.run_on(connection, call);
                    let took = begun.elapsed();
                    let after = if took > SLOW_CALL { After::Discard } else { After::Keep };
                    (result, after)
                };
                shelf.lend(begin_by, lost, || self.another(lane), |old| self.replace(lane, old), one).flatten()
            }
        }
    }

    fn run_on<T>(
        &self,
        connection: &Connection,
        call: impl FnOnce(&Connect) -> Result<T, CallError>,
    ) -> Result<T, CallError> {
        match call(&connection.connect) {
            // Asks our side of the connection only, nothing goes over the wire.
            Err(error) if !connection.connect.is_alive().unwrap_or(false) => {
                self.lost.say();
                Err(CallError::Lost(error.to_string()))
            }
            result => result,
        }
    }

    fn shelf(&self, lane: Lane) -> Option<&Shelf<Connection>> {
        match &self.ways {
            Some(Ways::Each { queries, .. }) if lane.asks_only() => Some(queries),
            Some(Ways::Each { actions, .. }) => Some(actions),
            Some(Ways::One(_) | Ways::Two { .. }) | None => None,
        }
    }

    /// Closes what has not been used for a while. Returns at once.
    pub(crate) fn trim(&self) {
        let Some(Ways::Each { queries, actions }) = &self.ways else { return };
        let listens = |connection: &Connection| connection.events.is_some();
        let unused: Vec<_> = [queries, actions].into_iter().flat_map(|shelf| shelf.trim(IDLE, listens)).collect();
        if !unused.is_empty() {
            tracing::debug!(uri = %self.uri, count = unused.len(), "libvirt connections are closed, nobody needs them");
            close(unused, None);
        }
    }

    /// Has another connection opened for a lane, on a thread of its own. Opening can hang as long as the server does, and that must not
    /// keep what is open already from being closed.
    fn another(self: &Arc<Self>, lane: Lane) {
        let (link, lost, uri) = (Arc::downgrade(self), Arc::clone(&self.lost), Arc::clone(&self.uri));
        let open = move || {
            let opened = Connection::open(&uri, &lost);
            let Some(link) = link.upgrade() else { return opened.map_or((), Connection::close) };
            let Some(shelf) = link.shelf(lane) else { return };
            match opened {
                Ok(connection) => shelf.add(connection),
                // It may permit so many and no more. If it is gone, the others tell.
                Err(error) if shelf.refuse() => {
                    let error = error.message();
                    tracing::warn!(%uri, error, "libvirt takes no more connections: less can be done there at once");
                }
                Err(error) => {
                    tracing::debug!(%uri, error = error.message(), "another connection to libvirt fails");
                    lost.say();
                }
            }
        };
        if thread::Builder::new().name("virt-another".to_owned()).spawn(open).is_err()
            && let Some(shelf) = self.shelf(lane)
        {
            shelf.refuse();
        }
    }

    /// Closes a connection that is of no more use, on a thread of its own. What it tells of domains its successor tells before.
    fn replace(self: &Arc<Self>, lane: Lane, old: Connection) {
        tracing::debug!(uri = %self.uri, "a slow call over libvirt: its connection is replaced");
        // Where all of them are lost, the next link tells of events.
        if old.events.is_none() || self.lost.is_said() {
            return close(vec![old], None);
        }
        // As if it were open still, for whoever waits until all are closed.
        self.links.fetch_add(1, Ordering::AcqRel);
        let (link, lost, uri) = (Arc::downgrade(self), Arc::clone(&self.lost), Arc::clone(&self.uri));
        let (events, links) = (self.events.clone(), Arc::clone(&self.links));
        let renew = move || {
            match Connection::open(&uri, &lost) {
                Ok(mut successor) => {
                    successor.listen(&uri, events);
                    // Both are connected to the same server only if the old one lives still.
                    let lives = old.connect.is_alive().unwrap_or(false);
                    match link.upgrade() {
                        Some(link) if lives && successor.events.is_some() => match link.shelf(lane) {
                            Some(shelf) => shelf.add(successor),
                            None => successor.close(),
                        },
                        Some(_) | None => {
                            lost.say();
                            successor.close();
                        }
                    }
                }
                Err(error) => {
                    tracing::debug!(%uri, error = error.message(), "a connection to libvirt cannot be replaced");
                    lost.say();
                }
            }
            old.close();
            links.fetch_sub(1, Ordering::AcqRel);
        };
        if let Err(error) = thread::Builder::new().name("virt-renew".to_owned()).spawn(renew) {
            tracing::warn!(uri = %self.uri, %error, "no thread to replace a libvirt connection on");
            self.links.fetch_sub(1, Ordering::AcqRel);
            self.lost.say();
        }
    }
}

/// Closes connections on a thread of its own: closing can block on a server that hangs.
fn close(connections: Vec<Connection>, links: Option<Arc<AtomicUsize>>) {
    let close = move || {
        connections.into_iter().for_each(Connection::close);
        if let Some(links) = links {
            links.fetch_sub(1, Ordering::AcqRel);
        }
    };
    if let Err(error) = thread::Builder::new().name("virt-close".to_owned()).spawn(close) {
        tracing::warn!(%error, "no thread to close libvirt connections on: they stay open");
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        let open = match self.ways.take() {
            Some(Ways::One(connection)) => vec![connection],
            Some(Ways::Two { queries, actions }) => vec![queries, actions],
            Some(Ways::Each { queries, actions }) => queries.empty().into_iter().chain(actions.empty()).collect(),
            None => Vec::new(),
        };
        // The last user may be an async thread.
        close(open, Some(Arc::clone(&self.links)));
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
    fn listen(&mut self, uri: &str, events: Events) -> Told {
        // Fails only if nobody wants to know any more.
        let listener = Arc::new(move |news| {
            let _ = events.send(news);
        });
        match EventWatch::begin(&self.connect, listener) {
            Ok(watch) => {
                let told = Told { changes: true, resets: watch.tells_resets() };
                self.events = Some(watch);
                told
            }
            Err(error) => {
                let error = error.message();
                tracing::warn!(uri, error, "libvirt tells no events there: its domains are looked up for each request");
                Told::default()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_remote_uri_is_told_from_a_local_one() {
        for uri in ["qemu+ssh://root@host/system", "qemu://host/system", "qemu+libssh2:///system", "lxc+ssh:///"] {
            assert!(is_remote(uri), "{uri}");
        }
        for uri in ["qemu:///system", "lxc:///", "qemu+unix:///system?socket=/a", "test:///default", "qemu"] {
            assert!(!is_remote(uri), "{uri}");
        }
    }

    #[test]
    fn what_changes_domains_leaves_workers_of_libvirtd_free() {
        let acts = |is_remote| {
            let lanes = Lane::ALL.into_iter().filter(|lane| !lane.asks_only());
            lanes.map(|lane| lane.calls(is_remote)).sum::<usize>()
        };
        assert!(acts(false) < 20);
        assert!(acts(true) <= 6, "logins");
    }

    /// The driver in our own process stands for a library that permits it.
    #[test]
    fn two_connections_serve_all_calls_where_the_library_permits_that() {
        ffi::prepare().unwrap();
        let links = Arc::new(AtomicUsize::new(0));
        let (events, _told) = mpsc::unbounded_channel();
        let link = Link::open_as(&"test:///default".into(), true, Arc::clone(&links), events).unwrap();
        let soon = Instant::now() + Duration::from_secs(20);
        let all = std::sync::Barrier::new(Lane::ALL.len());
        thread::scope(|scope| {
            for lane in Lane::ALL {
                let (link, all) = (&link, &all);
                let call = move |connect: &Connect| {
                    all.wait();
                    Ok(connect.get_uri()?)
                };
                scope.spawn(move || assert_eq!(link.run(lane, soon, call), Ok("test:///default".to_owned())));
            }
        });
        assert!(matches!(link.ways, Some(Ways::Two { .. })));
        drop(link);
        while links.load(Ordering::Acquire) > 0 {
            thread::sleep(Duration::from_millis(5));
        }
    }
}
