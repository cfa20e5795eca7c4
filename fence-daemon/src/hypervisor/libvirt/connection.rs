//! One libvirt URI: its connections, the loop that keeps them, and the threads that call.
//!
//! - A URI has two connections, and more only while more calls are under way than may share them; see
//!   [`link`](super::link). A driver inside our own process (`test:///`) has one, and may keep its
//!   domains per connection.
//! - Each [`Lane`] has a thread pool of its own ([`Pool`]): calls that hang in one keep nobody in another.
//! - One keeper task per URI opens the connections, on threads of their own because opening can hang, and opens them again when
//!   libvirt says that one is dead or a call finds it so. It backs off, but a request that needs the URI has it try at once.
//! - Nothing of libvirt is called on an async thread, closing included: a [`Link`] closes on a thread of its own when the last call
//!   that uses it has let it go.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use tokio::sync::{Notify, Semaphore, mpsc, oneshot, watch};
use tokio::time::{Instant, interval, sleep, timeout, timeout_at};
use virt::connect::Connect;
use virt::error::ErrorNumber;

use super::error::CallError;
use super::ffi::News;
use super::link::{Lane, Link, is_remote};
use super::pool::Pool;
use crate::clock::Moment;
use crate::hypervisor::known::events::follow;
use crate::hypervisor::known::listing::LISTS_AT_ONCE;
use crate::hypervisor::known::table::Table;

/// An attempt to connect that is silent for so long counts as failed in what we report, but goes on.
const OPEN_SILENCE: Duration = Duration::from_secs(5);
/// An attempt that is silent for so long is given up as stuck, and another one begins.
const OPEN_BOUND: Duration = Duration::from_secs(30);
/// Stuck attempts that may exist at a time; each costs a thread until its server answers or dies.
const STUCK_LIMIT: usize = 4;
/// The shortest time between two attempts, however much they are wanted.
const RETRY_MIN: Duration = Duration::from_millis(100);
/// The longest time between two attempts that nobody asks for.
const RETRY_MAX: Duration = Duration::from_secs(5);
/// How often connections that nobody needs any more are looked for.
const TRIM: Duration = Duration::from_secs(5);

/// What is known of the connections.
#[derive(Clone, Debug, Default)]
pub(crate) struct LinkState {
    /// Whether they are there.
    pub(crate) connected: bool,
    /// Attempts that ended, or were silent for [`OPEN_SILENCE`].
    pub(crate) tried: u64,
    /// Why they are not there, after the first attempt.
    pub(crate) error: Option<String>,
    /// Whether they are not there because libvirt has no driver for such a hypervisor.
    pub(crate) absent: bool,
    /// Whether they have been closed for good.
    pub(crate) closed: bool,
    /// Since when they are there, or are not any more.
    pub(crate) since: Option<Moment>,
    /// What went wrong last, and when.
    pub(crate) last_error: Option<(Moment, String)>,
}

impl LinkState {
    /// They are there, or are not. Whether that is news.
    fn note_connected(&mut self, connected: bool) -> bool {
        let is_news = std::mem::replace(&mut self.connected, connected) != connected;
        if is_news {
            self.since = Some(Moment::now());
        }
        is_news
    }

    /// Why they are not there.
    fn note_error(&mut self, error: String) {
        self.last_error = Some((Moment::now(), error.clone()));
        self.error = Some(error);
    }
}

/// One URI.
pub(crate) struct Uri {
    pub(crate) text: Arc<str>,
    state: watch::Sender<LinkState>,
    link: Mutex<Option<Arc<Link>>>,
    /// By lane.
    pools: [Pool; Lane::ALL.len()],
    /// Wakes the keeper out of its back-off.
    wanted: Notify,
    /// Set while the URI is connected but has not answered a query in time; the next answer clears it.
    pub(crate) silent: AtomicBool,
    /// Turns of lists of all its domains.
    pub(crate) lists: Arc<Semaphore>,
    /// Links that are not closed yet.
    links: Arc<AtomicUsize>,
    /// Its domains.
    pub(crate) table: Arc<Table>,
}

impl Uri {
    /// A URI that nobody keeps yet; `index` goes into its threads' names.
    pub(crate) fn new(text: &str, index: usize) -> Arc<Self> {
        let is_remote = is_remote(text);
        Arc::new(Self {
            text: text.into(),
            state: watch::Sender::default(),
            link: Mutex::default(),
            pools: Lane::ALL.map(|lane| Pool::new(format!("virt{index}-{}", lane.name()), lane.calls(is_remote))),
            wanted: Notify::new(),
            silent: AtomicBool::new(false),
            lists: Arc::new(Semaphore::new(LISTS_AT_ONCE)),
            links: Arc::default(),
            table: Arc::new(Table::new(text)),
        })
    }

    /// The connections' state, to look at or to wait on.
    pub(crate) fn state(&self) -> watch::Receiver<LinkState> {
        self.state.subscribe()
    }

    /// Whether it is connected and has answered lately, as far as we know.
    pub(crate) fn is_lively(&self) -> bool {
        self.state.borrow().connected && !self.silent.load(Ordering::Relaxed)
    }

    /// Whether its driver is one inside our own process, without processes, workers or monitors of its own.
    pub(crate) fn is_in_process(&self) -> bool {
        self.text.starts_with("test:")
    }

    /// Whether a connection of this URI is still open or being closed.
    pub(crate) fn has_links(&self) -> bool {
        self.links.load(Ordering::Acquire) > 0
    }

    /// Runs `call` on a thread of the lane, with a connection. It begins before `begin_by` or not at all; once begun it runs to its
    /// end, even if the returned future is dropped.
    pub(crate) async fn call<T: Send + 'static>(
        self: &Arc<Self>,
        lane: Lane,
        begin_by: Instant,
        call: impl FnOnce(&Connect) -> Result<T, CallError> + Send + 'static,
    ) -> Result<T, CallError> {
        self.ready(begin_by).await?;
        let (answer, answered) = oneshot::channel();
        let uri = Arc::clone(self);
        let run = Box::new(move || {
            // Nobody waits any more: what was not begun in time must not act later on a domain that has moved on.
            if answer.is_closed() {
                return;
            }
            let link = uri.current();
            let result = match &link {
                Some(link) => link.run(lane, begin_by.into_std(), call),
                None => Err(CallError::Lost("it was just closed".to_owned())),
            };
            if matches!(result, Err(CallError::Lost(_))) {
                uri.drop_lost();
            }
            drop(link);
            uri.silent.store(false, Ordering::Relaxed);
            // Fails only if the asker has gone.
            let _ = answer.send(result);
        });
        let [query, look, kill, start, record] = &self.pools;
        let pool = match lane {
            Lane::Query => query,
            Lane::Look => look,
            Lane::Kill => kill,
            Lane::Start => start,
            Lane::Record => record,
        };
        pool.submit(begin_by.into_std(), run).map_err(CallError::Busy)?;
        // The sender is dropped unused if the call was not begun in time (or panicked, which the pool logs).
        answered.await.unwrap_or(Err(CallError::NotBegun))
    }

    /// Waits until the URI is connected, at most until `by`. If it is not, has the keeper try at once and takes that attempt's word.
    async fn ready(&self, by: Instant) -> Result<(), CallError> {
        let mut state = self.state.subscribe();
        let seen = {
            let now = state.borrow_and_update();
            if now.connected {
                return Ok(());
            }
            if now.closed {
                return Err(CallError::NotConnected("closed".to_owned()));
            }
            now.tried
        };
        self.wanted.notify_one();
        loop {
            let changed = timeout_at(by, state.changed()).await;
            let now = state.borrow_and_update();
            if now.connected {
                return Ok(());
            }
            if now.closed || now.tried > seen || !matches!(changed, Ok(Ok(()))) {
                let reason = now.error.clone().unwrap_or_else(|| "no connection yet".to_owned());
                return Err(CallError::NotConnected(reason));
            }
        }
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

    fn current(&self) -> Option<Arc<Link>> {
        self.link.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Puts another link, or none, in the place of the present one, and makes it known.
    fn replace(&self, link: Option<Arc<Link>>, news: impl FnOnce(&mut LinkState)) {
        let mut present = self.link.lock().unwrap_or_else(PoisonError::into_inner);
        let connected = link.is_some();
        let old = std::mem::replace(&mut *present, link);
        // With the lock held: the state says "connected" only of the link that is there.
        self.state.send_modify(|state| {
            state.note_connected(connected);
            news(state);
        });
        drop(present);
        // Closes by itself, elsewhere, once no call uses it.
        drop(old);
    }

    /// Lets go of a link that is known to be lost, so that whoever needs the URI next waits for another one.
    fn drop_lost(&self) {
        let mut link = self.link.lock().unwrap_or_else(PoisonError::into_inner);
        if link.as_ref().is_some_and(|link| !link.lost.is_said()) {
            // The keeper was faster, this one is new.
            return;
        }
        let old = link.take();
        // With the lock held, as in `replace`.
        self.state.send_if_modified(|state| state.note_connected(false));
        drop(link);
        drop(old);
    }

    /// Connects, and connects again whenever the connections are lost, until `stop` says so or its sender is gone.
    pub(crate) async fn keep(self: Arc<Self>, mut stop: watch::Receiver<bool>) {
        tokio::select! {
            // An error means that the sender is gone.
            _ = stop.wait_for(|&stop| stop) => {}
            () = self.keep_connected() => {}
        }
        self.replace(None, |state| {
            state.error = Some("closed".to_owned());
            state.closed = true;
        });
    }

    async fn keep_connected(self: &Arc<Self>) {
        // Attempts report here, also those that were given up as stuck.
        let (report, mut reports) = mpsc::unbounded_channel::<Attempt>();
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
                    let lost = Arc::clone(&link.lost);
                    self.silent.store(false, Ordering::Relaxed);
                    self.table.begin_generation(link.told);
                    self.replace(Some(link), |state| {
                        state.tried += 1;
                        state.error = None;
                        state.absent = false;
                    });
                    let follow = follow(self, events);
                    tokio::pin!(follow);
                    let mut trim = interval(TRIM);
                    loop {
                        tokio::select! {
                            () = lost.wait() => break,
                            never = &mut follow => match never {},
                            _ = trim.tick() => {
                                if let Some(link) = self.current() {
                                    link.trim();
                                }
                            }
                            // A stuck attempt that came through after all: one link is enough, this one closes by itself.
                            _ = reports.recv() => under_way -= 1,
                        }
                    }
                    tracing::warn!(uri = %self.text, "libvirt connection lost");
                    self.replace(None, |state| state.note_error("connection lost".to_owned()));
                }
                Err(Failed { error, absent }) => {
                    self.failed(error, absent);
                    sleep(RETRY_MIN).await;
                    // Whoever wants the URI now cuts the rest of the pause short.
                    let _ = timeout(pause.saturating_sub(RETRY_MIN), self.wanted.notified()).await;
                    pause = (pause * 2).min(RETRY_MAX);
                }
            }
        }
    }

    /// Waits for an attempt's report; `None` once the newest is stuck. The silence in between is made known.
    async fn outcome(&self, reports: &mut mpsc::UnboundedReceiver<Attempt>) -> Option<Attempt> {
        if let Ok(attempt) = timeout(OPEN_SILENCE, reports.recv()).await {
            return attempt;
        }
        self.failed(format!("no answer to a connection attempt for {} s", OPEN_SILENCE.as_secs()), false);
        timeout(OPEN_BOUND.saturating_sub(OPEN_SILENCE), reports.recv()).await.ok().flatten()
    }

    /// Makes a failed attempt known, in the log only if the reason is news.
    fn failed(&self, error: String, absent: bool) {
        if self.state.borrow().error.as_ref() != Some(&error) {
            tracing::warn!(uri = %self.text, error, "cannot connect to libvirt; trying on");
        }
        self.state.send_modify(|state| {
            state.tried += 1;
            state.absent = absent;
            state.note_error(error);
        });
    }

    /// Tries once to open the connections, on a thread of its own, and reports.
    fn attempt(&self, report: mpsc::UnboundedSender<Attempt>) {
        let (uri, links, on_failure) = (Arc::clone(&self.text), Arc::clone(&self.links), report.clone());
        let open = move || {
            let (sender, events) = mpsc::unbounded_channel();
            let link = Link::open(&uri, links, sender);
            let attempt = link.map(|link| (link, events)).map_err(|error| Failed {
                absent: matches!(&error, CallError::Libvirt(error) if error.code() == ErrorNumber::NoConnect),
                error: error.to_string(),
            });
            // Fails only if the keeper has ended; then the link closes here and now.
            let _ = report.send(attempt);
        };
        if let Err(error) = thread::Builder::new().name("virt-open".to_owned()).spawn(open) {
            let error = format!("no thread to connect on: {error}");
            let _ = on_failure.send(Err(Failed { error, absent: false }));
        }
    }
}

/// What came of an attempt to connect.
type Attempt = Result<(Arc<Link>, mpsc::UnboundedReceiver<News>), Failed>;

/// Why an attempt has failed.
struct Failed {
    error: String,
    /// Whether libvirt says that it has no driver for such a hypervisor.
    absent: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn a_lost_link_is_replaced_and_closed_only_when_unused() {
        let uri = Uri::new("test:///default", 0);
        let (stop, stopped) = watch::channel(false);
        let keeper = tokio::spawn(Arc::clone(&uri).keep(stopped));
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
                uri.call(Lane::Query, Instant::now() + Duration::from_secs(5), call).await
            }
        });
        entered.await.unwrap();
        uri.current().unwrap().lost.say();
        uri.state().wait_for(|state| state.connected && state.tried == 2).await.unwrap();
        sleep(Duration::from_millis(100)).await;
        assert_eq!(uri.links.load(Ordering::Acquire), 2, "the link was closed under a call");
        leave.send(()).unwrap();
        assert_eq!(user.await.unwrap(), Ok("test:///default".to_owned()));
        while uri.links.load(Ordering::Acquire) != 1 {
            sleep(Duration::from_millis(5)).await;
        }
        drop(stop);
        keeper.await.unwrap();
        while uri.has_links() {
            sleep(Duration::from_millis(5)).await;
        }
    }
}
