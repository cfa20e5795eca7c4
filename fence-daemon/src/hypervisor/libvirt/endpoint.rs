//! One libvirt URI: the loop that keeps it connected, and the way for calls.
//!
//! - Each URI has two [pools](super::pool) of threads. A driver inside our own process (`test:///`)
//!   has one connection for both.
//! - One keeper task per URI opens the first connection, on a thread of its own because opening can
//!   hang. It connects again when libvirt says that the connection is dead, or a call finds it so.
//!   It backs off, but a request that needs the URI has it try at once.
//! - No async thread calls libvirt, not even to close: each thread closes the connection that it
//!   owns.

use std::convert::Infallible;
use std::future::Future;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::thread;
use std::time::Duration;

use fence_common::sync::lock;
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::connection::{Common, Connection, Lost, is_in_process, may_be_shared};
use super::pool::{Pool, Supply};
use super::{CallError, Connect, Lane, News, Told};
use crate::clock::Moment;

/// An attempt to connect that is silent for so long counts as failed in reports, but goes on.
const OPEN_SILENCE: Duration = Duration::from_secs(5);
/// An attempt that is silent for so long is given up as stuck, and another one begins.
const OPEN_BOUND: Duration = Duration::from_secs(30);
/// Stuck attempts that may exist at a time. Each costs a thread until its server answers or dies.
const STUCK_LIMIT: usize = 4;
/// The shortest time between two attempts, however much they are wanted.
const RETRY_MIN: Duration = Duration::from_millis(100);
/// The longest time between two attempts that nobody asks for.
const RETRY_MAX: Duration = Duration::from_secs(5);

/// What is known of the connection to a URI.
#[derive(Clone, Debug, Default)]
pub(crate) struct LinkState {
    /// Whether it is connected.
    pub(crate) connected: bool,
    /// Attempts that ended, or were silent for [`OPEN_SILENCE`].
    pub(crate) tried: u64,
    /// Why it is not connected, after the first attempt.
    pub(crate) error: Option<String>,
    /// Whether it is not connected because libvirt has no driver for such a hypervisor.
    pub(crate) absent: bool,
    /// Whether it is closed for good.
    pub(crate) closed: bool,
    /// Since when it is connected, or is not any more.
    pub(crate) since: Option<Moment>,
    /// What went wrong last, and when.
    pub(crate) last_error: Option<(Moment, String)>,
}

impl LinkState {
    /// Notes whether it is connected. Returns whether that is news.
    fn note_connected(&mut self, connected: bool) -> bool {
        let is_news = std::mem::replace(&mut self.connected, connected) != connected;
        if is_news {
            self.since = Some(Moment::now());
        }
        is_news
    }

    fn note_error(&mut self, error: String) {
        self.last_error = Some((Moment::now(), error.clone()));
        self.error = Some(error);
    }
}

/// The open connections to a URI, which are lost together. Dropping it closes each of them when its
/// thread has ended its call.
struct OpenConnections {
    common: Arc<Common>,
    queries: Pool<Arc<Connection>>,
    actions: Pool<Arc<Connection>>,
    /// What libvirt tells.
    told: Told,
}

impl OpenConnections {
    fn pool(&self, lane: Lane) -> &Pool<Arc<Connection>> {
        if lane.asks_only() { &self.queries } else { &self.actions }
    }
}

/// Opens connections for a pool.
struct Connections {
    common: Arc<Common>,
    /// The one that all threads share, if they may.
    shared: Option<Arc<Mutex<Weak<Connection>>>>,
}

impl Supply<Arc<Connection>> for Connections {
    fn open(&self) -> Result<Arc<Connection>, String> {
        let open = || Connection::open(&self.common).map(Arc::new).map_err(|error| error.to_string());
        let Some(shared) = &self.shared else { return open() };
        let mut shared = lock(shared);
        if let Some(connection) = shared.upgrade() {
            return Ok(connection);
        }
        let connection = open()?;
        *shared = Arc::downgrade(&connection);
        Ok(connection)
    }

    fn renew(&self, old: &Arc<Connection>) -> Option<Arc<Connection>> {
        // A shared one outlives the panic of a call.
        if self.shared.is_some() { Some(Arc::clone(old)) } else { old.renew().map(Arc::new) }
    }

    fn stays(&self, one: &Arc<Connection>) -> bool {
        one.listens
    }

    fn is_shared(&self) -> bool {
        self.shared.is_some()
    }

    fn failed(&self) {
        self.common.lost.say();
    }
}

/// A URI, and the way for calls to it.
pub(crate) struct Endpoint {
    pub(crate) text: Arc<str>,
    index: usize,
    /// Whether threads may share a connection.
    shares: bool,
    state: watch::Sender<LinkState>,
    link: Mutex<Option<OpenConnections>>,
    /// Wakes the keeper out of its back-off.
    wanted: Notify,
    /// Set while the URI is connected but has not answered a query in time. The next answer clears
    /// it.
    pub(crate) silent: AtomicBool,
    /// Connections that are not closed yet.
    open: Arc<AtomicUsize>,
}

impl Endpoint {
    /// A URI that nobody keeps yet. `index` goes into its threads' names.
    pub(crate) fn new(text: &str, index: usize) -> Arc<Self> {
        Self::with(text, index, may_be_shared(text))
    }

    fn with(text: &str, index: usize, shares: bool) -> Arc<Self> {
        Arc::new(Self {
            text: text.into(),
            index,
            shares,
            state: watch::Sender::default(),
            link: Mutex::default(),
            wanted: Notify::new(),
            silent: AtomicBool::new(false),
            open: Arc::default(),
        })
    }

    /// The connection's state, to look at or to wait on.
    pub(crate) fn state(&self) -> watch::Receiver<LinkState> {
        self.state.subscribe()
    }

    /// Whether it is connected, and has answered the last query in time.
    pub(crate) fn is_lively(&self) -> bool {
        self.state.borrow().connected && !self.silent.load(Ordering::Relaxed)
    }

    /// Whether its driver is one inside our own process, without processes or monitors of its own.
    pub(crate) fn is_in_process(&self) -> bool {
        is_in_process(&self.text)
    }

    /// Whether its domains run on another host.
    pub(crate) fn is_remote(&self) -> bool {
        is_remote(&self.text)
    }

    /// Whether a connection is still open or being closed.
    pub(crate) fn is_open(&self) -> bool {
        self.open.load(Ordering::Acquire) > 0
    }

    /// Runs `call` on a thread of the lane, with a connection. It begins before `begin_by` or not
    /// at all. Once begun it runs to its end, even if the returned future is dropped.
    pub(crate) async fn call<T: Send + 'static>(
        self: &Arc<Self>,
        lane: Lane,
        begin_by: Instant,
        call: impl FnOnce(&Connect) -> Result<T, CallError> + Send + 'static,
    ) -> Result<T, CallError> {
        self.ready(begin_by).await?;
        let (answer, mut answered) = oneshot::channel();
        let endpoint = Arc::clone(self);
        let lost = || CallError::Lost("it was just closed".to_owned());
        let run = move |connection: Option<&Arc<Connection>>| {
            // Nobody waits any more. The call must not act late on a domain that has moved on.
            if answer.is_closed() {
                return;
            }
            let result = connection.map_or_else(|| Err(lost()), |connection| connection.run(call));
            if matches!(result, Err(CallError::Lost(_))) {
                endpoint.drop_lost();
            }
            endpoint.silent.store(false, Ordering::Relaxed);
            // Fails only if the caller has gone.
            let _ = answer.send(result);
        };
        let queued = match self.link().as_ref() {
            Some(link) => link.pool(lane).submit(lane, begin_by.into_std(), Box::new(run)).map_err(CallError::Busy)?,
            None => return Err(lost()),
        };
        // The sender is dropped unused if the call was not begun in time, or panicked.
        match timeout_at(begin_by, &mut answered).await {
            Ok(answer) => answer.unwrap_or(Err(CallError::NotBegun)),
            Err(_) if queued.withdraw() => Err(CallError::NotBegun),
            Err(_) => answered.await.unwrap_or(Err(CallError::NotBegun)),
        }
    }

    /// Waits until the URI is connected, at most until `by`. If it is not, the keeper tries at
    /// once, and that attempt's word counts.
    async fn ready(&self, by: Instant) -> Result<(), CallError> {
        let mut state = self.state.subscribe();
        let (seen, connected, closed) = {
            let now = state.borrow_and_update();
            (now.tried, now.connected, now.closed)
        };
        if !connected && !closed {
            self.wanted.notify_one();
            // An error means that the time is over: what is known then counts.
            let _ = timeout_at(by, state.wait_for(|now| now.connected || now.closed || now.tried > seen)).await;
        }
        let now = state.borrow();
        if now.connected { Ok(()) } else { Err(now.not_connected()) }
    }

    /// Waits until the URI is connected, at most until `by`, and has the keeper try all the while.
    pub(crate) async fn connected_by(self: &Arc<Self>, by: Instant) -> bool {
        loop {
            match self.ready(by).await {
                Ok(()) => return true,
                Err(_) if self.state.borrow().closed || Instant::now() >= by => return false,
                // It has tried and failed, and pauses.
                Err(_) => {}
            }
        }
    }

    fn link(&self) -> std::sync::MutexGuard<'_, Option<OpenConnections>> {
        lock(&self.link)
    }

    /// Puts another link, or none, in the place of the present one, and makes it known.
    fn replace(&self, link: Option<OpenConnections>, news: impl FnOnce(&mut LinkState)) {
        let mut present = self.link();
        let connected = link.is_some();
        let old = std::mem::replace(&mut *present, link);
        // With the lock held: the state says "connected" only of the link that is there.
        self.state.send_modify(|state| {
            state.note_connected(connected);
            news(state);
        });
        drop(present);
        // Without the lock: the calls that still wait there fail.
        drop(old);
    }

    /// Lets go of a link that is known to be lost. The next call waits for another one.
    fn drop_lost(&self) {
        let mut link = self.link();
        // Else the keeper was faster, and this link is new.
        let old = link.take_if(|link| link.common.lost.is_said());
        if old.is_some() {
            // With the lock held, as in `replace`.
            self.state.send_if_modified(|state| state.note_connected(false));
        }
        drop(link);
        drop(old);
    }

    /// Connects, and connects again whenever the connection is lost, until `stop` says so or its
    /// sender is gone. `follow` is run while there is a connection: it gets what libvirt tells.
    pub(crate) async fn keep<F: Future<Output = Infallible>>(
        self: Arc<Self>,
        mut stop: watch::Receiver<bool>,
        follow: impl Fn(Told, mpsc::UnboundedReceiver<News>) -> F,
    ) {
        tokio::select! {
            // An error means that the sender is gone.
            _ = stop.wait_for(|&stop| stop) => {}
            () = self.keep_connected(follow) => {}
        }
        self.replace(None, |state| {
            state.error = Some("closed".to_owned());
            state.closed = true;
        });
    }

    async fn keep_connected<F: Future<Output = Infallible>>(
        self: &Arc<Self>,
        follow: impl Fn(Told, mpsc::UnboundedReceiver<News>) -> F,
    ) {
        // All attempts report here, also those that were given up as stuck.
        let (report, mut reports) = mpsc::unbounded_channel::<ConnectAttempt>();
        let mut under_way = 0_usize;
        let mut pause = RETRY_MIN;
        loop {
            if under_way < STUCK_LIMIT {
                under_way += 1;
                self.attempt(report.clone());
            }
            let Some(attempt) = self.outcome(&mut reports).await else { continue };
            under_way -= 1;
            match attempt {
                Ok((link, events)) => {
                    tracing::info!(uri = %self.text, "connected to libvirt");
                    pause = RETRY_MIN;
                    self.silent.store(false, Ordering::Relaxed);
                    let (common, told) = (Arc::clone(&link.common), link.told);
                    // Before the connection is known: it makes what an earlier one said obsolete.
                    let follow = follow(told, events);
                    self.replace(Some(link), |state| {
                        state.tried += 1;
                        state.error = None;
                        state.absent = false;
                    });
                    let lost = common.lost.wait();
                    tokio::pin!(follow, lost);
                    loop {
                        tokio::select! {
                            () = &mut lost => break,
                            never = &mut follow => match never {},
                            // A stuck attempt that came through after all. One link is enough: this
                            // one closes by itself.
                            _ = reports.recv() => under_way -= 1,
                        }
                    }
                    tracing::warn!(uri = %self.text, "libvirt connection lost");
                    self.replace(None, |state| state.note_error("connection lost".to_owned()));
                }
                Err(Failed { error, absent }) => {
                    self.failed(error, absent);
                    sleep(RETRY_MIN).await;
                    // A request that needs the URI cuts the rest of the pause short.
                    let _ = timeout(pause.saturating_sub(RETRY_MIN), self.wanted.notified()).await;
                    pause = (pause * 2).min(RETRY_MAX);
                }
            }
        }
    }

    /// Waits for an attempt's report, and makes a silence known. `None`: the newest attempt is
    /// stuck.
    async fn outcome(&self, reports: &mut mpsc::UnboundedReceiver<ConnectAttempt>) -> Option<ConnectAttempt> {
        if let Ok(attempt) = timeout(OPEN_SILENCE, reports.recv()).await {
            return attempt;
        }
        self.failed(format!("no answer to a connection attempt for {} s", OPEN_SILENCE.as_secs()), false);
        timeout(OPEN_BOUND.saturating_sub(OPEN_SILENCE), reports.recv()).await.ok().flatten()
    }

    /// Makes a failed attempt known. The log gets it only if the reason is news.
    fn failed(&self, error: String, absent: bool) {
        if self.state.borrow().error.as_ref() != Some(&error) {
            tracing::warn!(uri = %self.text, error, "cannot connect to libvirt; the daemon tries again");
        }
        self.state.send_modify(|state| {
            state.tried += 1;
            state.absent = absent;
            state.note_error(error);
        });
    }

    /// Tries once to connect, on a thread of its own, and reports. The thread serves queries then.
    fn attempt(&self, report: mpsc::UnboundedSender<ConnectAttempt>) {
        let (uri, open, index, shares) = (Arc::clone(&self.text), Arc::clone(&self.open), self.index, self.shares);
        let on_failure = report.clone();
        let connect = move || {
            let (events, received) = mpsc::unbounded_channel();
            let common = Arc::new(Common { uri, lost: Lost::default(), events, open });
            if let Err(error) = connect(&common, index, shares, |link| drop(report.send(Ok((link, received))))) {
                let absent = matches!(&error, CallError::Libvirt(error) if error.is_no_driver());
                // Fails only if the keeper has ended.
                let _ = report.send(Err(Failed { error: error.to_string(), absent }));
            }
        };
        if let Err(error) = thread::Builder::new().name(format!("virt{index}-query")).spawn(connect) {
            let error = format!("no thread to connect on: {error}");
            let _ = on_failure.send(Err(Failed { error, absent: false }));
        }
    }
}

impl LinkState {
    fn not_connected(&self) -> CallError {
        CallError::NotConnected(self.error.clone().unwrap_or_else(|| "no connection yet".to_owned()))
    }
}

/// Opens the first connection, hands out the link, and serves queries over the connection.
fn connect(
    common: &Arc<Common>,
    index: usize,
    shares: bool,
    hand_out: impl FnOnce(OpenConnections),
) -> Result<(), CallError> {
    let mut first = Connection::open(common)?;
    let told = first.listen();
    let first = Arc::new(first);
    let is_remote = is_remote(&common.uri);
    let pool = |name: &str, shared: Option<Weak<Connection>>| {
        let shared = shared.filter(|_| shares).map(|shared| Arc::new(Mutex::new(shared)));
        let supply = Connections { common: Arc::clone(common), shared };
        Pool::new(format!("virt{index}-{name}"), is_remote, Box::new(supply))
    };
    let queries = pool("query", Some(Arc::downgrade(&first)));
    let own = if is_in_process(&common.uri) { Arc::downgrade(&first) } else { Weak::new() };
    let actions = pool("act", Some(own));
    // At once: a kill does not wait for libvirt's own destroy, which is of no use when it is late.
    actions.warm();
    queries.adopt(first, |queries| hand_out(OpenConnections { common: Arc::clone(common), queries, actions, told }));
    Ok(())
}

/// Whether a URI's hypervisor is another host's: it names one, or is reached by ssh.
fn is_remote(uri: &str) -> bool {
    let Some((scheme, rest)) = uri.split_once("://") else { return false };
    let transport = scheme.split_once('+').map_or("", |(_, transport)| transport);
    transport.contains("ssh") || !rest.is_empty() && !rest.starts_with(['/', '?'])
}

/// What came of an attempt to connect.
type ConnectAttempt = Result<(OpenConnections, mpsc::UnboundedReceiver<News>), Failed>;

/// Why an attempt has failed.
struct Failed {
    error: String,
    /// Whether libvirt has no driver for such a hypervisor.
    absent: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Keeps a URI connected, and follows nothing.
    fn keep(uri: &Arc<Endpoint>) -> (watch::Sender<bool>, tokio::task::JoinHandle<()>) {
        let (stop, stopped) = watch::channel(false);
        let follow = |_, events| async move {
            let _events = events;
            std::future::pending::<Infallible>().await
        };
        (stop, tokio::spawn(Arc::clone(uri).keep(stopped, follow)))
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(20)
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_lost_connection_is_replaced_and_closed_only_when_unused() {
        let uri = Endpoint::new("test:///default", 0);
        let (stop, keeper) = keep(&uri);
        uri.state().wait_for(|state| state.connected).await.unwrap();
        let (enter, entered) = oneshot::channel();
        let (leave, left) = std::sync::mpsc::channel::<()>();
        let user = tokio::spawn({
            let uri = Arc::clone(&uri);
            async move {
                let call = move |connect: &Connect| {
                    enter.send(()).unwrap();
                    left.recv().unwrap();
                    // The handle that this call began with must still be good.
                    Ok(connect.get_uri()?)
                };
                uri.call(Lane::Query, soon(), call).await
            }
        });
        entered.await.unwrap();
        uri.link().as_ref().unwrap().common.lost.say();
        uri.state().wait_for(|state| state.connected && state.tried == 2).await.unwrap();
        sleep(Duration::from_millis(100)).await;
        assert_eq!(uri.open.load(Ordering::Acquire), 2, "the connection was closed under a call");
        leave.send(()).unwrap();
        assert_eq!(user.await.unwrap(), Ok("test:///default".to_owned()));
        while uri.open.load(Ordering::Acquire) != 1 {
            sleep(Duration::from_millis(5)).await;
        }
        drop(stop);
        keeper.await.unwrap();
        while uri.is_open() {
            sleep(Duration::from_millis(5)).await;
        }
    }

    /// The driver in our own process stands for a library that permits it.
    #[tokio::test(flavor = "multi_thread")]
    async fn one_connection_serves_calls_of_all_lanes_at_once_where_the_library_permits_that() {
        let uri = Endpoint::new("test:///default", 0);
        let (_stop, _keeper) = keep(&uri);
        let all = Arc::new(std::sync::Barrier::new(Lane::ALL.len()));
        let calls: Vec<_> = Lane::ALL
            .into_iter()
            .map(|lane| {
                let (uri, all) = (Arc::clone(&uri), Arc::clone(&all));
                let call = move |connect: &Connect| {
                    all.wait();
                    Ok(connect.get_uri()?)
                };
                tokio::spawn(async move { uri.call(lane, soon(), call).await })
            })
            .collect();
        for call in calls {
            assert_eq!(call.await.unwrap(), Ok("test:///default".to_owned()));
        }
        assert_eq!(uri.open.load(Ordering::Acquire), 1);
    }

    async fn is_open(uri: &Endpoint, wanted: usize) -> bool {
        for _ in 0..1000 {
            if uri.open.load(Ordering::Acquire) == wanted {
                return true;
            }
            sleep(Duration::from_millis(5)).await;
        }
        false
    }

    /// As with a library that does not permit it.
    #[tokio::test(flavor = "multi_thread")]
    async fn where_calls_do_not_share_two_connections_are_enough_and_a_slow_call_renews_its_own() {
        let uri = Endpoint::with("test:///default", 0, false);
        let (_stop, _keeper) = keep(&uri);
        uri.state().wait_for(|state| state.connected).await.unwrap();
        assert!(is_open(&uri, 2).await, "one for queries and one for actions");
        for lane in [Lane::Query, Lane::Look, Lane::Kill, Lane::Start, Lane::Record] {
            // A call that finds its thread busy, if only with getting ready, opens another one.
            while !uri.link().as_ref().unwrap().pool(lane).is_idle() {
                sleep(Duration::from_millis(5)).await;
            }
            uri.call(lane, soon(), |connect| Ok(connect.get_uri()?)).await.unwrap();
        }
        assert!(is_open(&uri, 2).await, "{:?}", uri.open);
        let slow = |lane| {
            let slow = |_: &Connect| {
                thread::sleep(Duration::from_millis(4200));
                Ok(())
            };
            let uri = Arc::clone(&uri);
            tokio::spawn(async move { uri.call(lane, soon(), slow).await })
        };
        let (query, kill) = (slow(Lane::Query), slow(Lane::Kill));
        sleep(Duration::from_millis(100)).await;
        let begun = Instant::now();
        for lane in [Lane::Query, Lane::Kill] {
            uri.call(lane, soon(), |connect| Ok(connect.get_uri()?)).await.unwrap();
        }
        assert!(begun.elapsed() < Duration::from_secs(2), "they wait for the slow ones");
        assert!(query.await.unwrap().is_ok() && kill.await.unwrap().is_ok());
        // The listening one has a successor, the other one needs none as there is a third.
        assert!(is_open(&uri, 3).await, "{:?}", uri.open);
        assert_eq!(uri.state().borrow().tried, 1, "the URI was lost");
    }

    #[test]
    fn a_remote_uri_is_told_from_a_local_one() {
        for uri in ["qemu+ssh://root@host/system", "qemu://host/system", "qemu+libssh2:///system", "lxc+ssh:///"] {
            assert!(is_remote(uri), "{uri}");
        }
        for uri in ["qemu:///system", "lxc:///", "qemu+unix:///system?socket=/a", "test:///default", "qemu"] {
            assert!(!is_remote(uri), "{uri}");
        }
    }
}
