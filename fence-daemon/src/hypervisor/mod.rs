//! The only user of libvirt, and the only place that kills.
//!
//! # The rules
//!
//! - **No false success.** A domain counts as off only if libvirt positively says so when asked afresh: "shut off", or, for a transient
//!   domain that we destroyed, "no such domain". libvirt's word that a destroy succeeded is not enough, and an error, a timeout or
//!   a lost connection is a failure. "No such domain" is told by libvirt's error code alone.
//!   None of these words passes while this host has a living process of the domain (`host`, `presumed`).
//! - **A domain is unknown only if every URI says so.** Found nowhere while some URI could not say: failure, for `status` too. Found
//!   somewhere: that word counts, and with it the last word of each URI that does not answer (`last_words` has the table of cases).
//! - **Every running instance is meant** if several URIs know the name or UUID: all must be proven off.
//! - **A domain that moved to another host** ("shut off (migrated)") is not off by our word: `off` and `reboot` fail, `on` starts no
//!   second copy, unless another of our URIs has it.
//! - **Of two guests that have each other fenced, one dies**: see [`fence_race`](fence::fence_race).
//! - **In order per domain**, by name or by UUID (`locks`); different domains, and everything that only asks, do not wait for
//!   each other. A dead or hung URI costs the others nothing (`connection`).
//! - **Answers are in time**: `Limits::act` for everything. One [`Deadline`] goes all the way down: no
//!   destroy, kill, reset or start begins after `Limits::begin`, nor after the client was told "failure".
//!   A step that has begun stays in force. Its domain is not started until the step ends (`locks`), so a
//!   late kill cannot hit what a later request has started.
//! - **A reboot's restart** happens in the background (`restart`), not before its `pause` is over; an `off` that comes later ends it.

mod deadline;
mod fence;
mod known;
mod libvirt;
mod process;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Duration;

use fence_common::target::Target;
use fence_config::{Kill, Options, RebootMethod, RebootReply};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout_at};
use uuid::Uuid;

pub use self::deadline::Deadline;
pub use self::fence::fence_race::Asker;
use self::fence::fence_race::Duels;
use self::fence::locks::{Locks, Settling};
pub use self::fence::outcome::{Detail, Identity, Outcome};
use self::fence::record::Records;
use self::fence::restart::{Plan, Restarts, Waiting};
use self::fence::{act, inherit, status};
use self::known::table::Instance;
pub use self::known::view::{DomainState, DomainView, RestartView, UriView};
use self::known::{last_words, listing, presumed};
use self::libvirt::connection::{LinkState, Uri};
pub use self::libvirt::domain::{State, Unproven};
pub use self::libvirt::error::{CallError, LibvirtError};
pub use self::libvirt::probe::probe;
pub use self::process::host::Left;
use self::process::host::{self, Host};
use crate::clock::Moment;
use crate::policy::Authorized;

/// How long things may take.
#[derive(Clone, Copy, Debug)]
struct Limits {
    /// A look-up or a list: a local libvirtd answers within a millisecond, a busy remote one within this.
    look_up: Duration,
    /// What a URI that is connected gets to answer once another one knows the domain.
    grace: Duration,
    /// Until when an order's call must have begun: one that begins later cannot be proven in time.
    begin: Duration,
    /// An order as a whole. The client gives up at 30 s, and needs some of them to be called back and to challenge us.
    act: Duration,
    /// A reset, until the event that says that it was done.
    reset: Duration,
    /// The longest pause between two attempts to start a domain again after a reboot.
    restart_pause: Duration,
    /// How long the end of the daemon waits for a restart that is on no record.
    unrecorded: Duration,
}

/// The limits of the real thing.
const LIMITS: Limits = Limits {
    look_up: Duration::from_secs(5),
    grace: Duration::from_millis(500),
    begin: Duration::from_secs(15),
    act: Duration::from_secs(20),
    reset: Duration::from_secs(3),
    restart_pause: Duration::from_secs(60),
    unrecorded: Duration::from_secs(5),
};

/// How often the end of things is looked for while shutting down.
const SHUTDOWN_LOOK: Duration = Duration::from_millis(10);

/// The hypervisors of this host, each behind a libvirt URI. Clones are the same hypervisors.
#[derive(Clone)]
pub struct Hypervisors {
    inner: Arc<Inner>,
}

/// What clones share.
struct Inner {
    uris: Vec<Arc<Uri>>,
    limits: Limits,
    kill: Kill,
    reboot_method: RebootMethod,
    reboot_reply: RebootReply,
    reboot_pause: Duration,
    records: Records,
    locks: Locks,
    settling: Arc<Settling>,
    restarts: Restarts,
    duels: Arc<Duels>,
    /// What this host itself says of domains.
    host: Host,
    /// Ends the keepers; so does its drop.
    stop: watch::Sender<bool>,
}

/// A URI's connection, for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UriHealth {
    /// The URI.
    pub uri: Arc<str>,
    /// Whether it is connected.
    pub connected: bool,
    /// Why not; `None` while it is connected or the first attempt is under way.
    pub error: Option<String>,
}

/// What a domain is to this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Presence {
    /// It runs here, or did a moment ago and is about to again.
    Runs,
    /// It is known here and shut off, or has been waiting for its restart here for a while: it may run on another host, or nowhere.
    Defined,
    /// Nothing here can say anything good of it: nobody knows it, or it has moved to another host, or is on its way here from one, or libvirt is silent.
    Unknown,
}

/// One domain of a [`Listing`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// Its name.
    pub name: String,
    /// Its UUID.
    pub uuid: Uuid,
    /// libvirt's `virDomainState`.
    pub state: u8,
    /// Where.
    pub uri: Arc<str>,
}

/// All domains, as far as they are known.
#[derive(Clone, Debug, Default)]
pub struct Listing {
    /// The domains, in the order of the configured URIs.
    pub domains: Vec<Listed>,
    /// The URIs that did not answer, and why: their domains are here as they were last known.
    pub remembered: Vec<(Arc<str>, CallError)>,
    /// The URIs that did not answer, and why, of whose domains nothing is known.
    pub failed: Vec<(Arc<str>, CallError)>,
}

impl Inner {
    /// Whether the instance that a restart is about still lives, as far as it can be known: its own process where there is one at hand, else
    /// by libvirt's word that brought us here.
    fn lives_on(&self, plan: &Plan) -> bool {
        let Some(table) = self.uris.get(plan.place).map(|uri| &uri.table) else { return false };
        let instance = table.get(plan.domain.uuid).and_then(|entry| entry.instance);
        // Killed and not dead yet: it must come back when it is.
        let lives = |known: &Instance| known.living().is_some_and(|victim| !victim.is_doomed());
        table.driver.is_none() || instance.is_some_and(|known| Some(known.id) == plan.dead && lives(&known))
    }
}

impl Hypervisors {
    /// Starts to connect to each of `uris`, and returns at once. Must be called within a tokio runtime.
    #[must_use]
    pub fn start(uris: &[String], options: Options) -> Self {
        Self::with_limits(uris, LIMITS, options)
    }

    fn with_limits(uris: &[String], limits: Limits, options: Options) -> Self {
        Self::with_duels(uris, limits, options, Duels::default())
    }

    fn with_duels(uris: &[String], limits: Limits, options: Options, duels: Duels) -> Self {
        let (stop, stopped) = watch::channel(false);
        let uris: Vec<_> = uris.iter().enumerate().map(|(index, text)| Uri::new(text, index)).collect();
        let (locks, restarts) = (Locks::default(), Restarts::default());
        let Options { kill, reboot_method, reboot_reply, reboot_pause, state } = options;
        if let Some(directory) = &state {
            last_words::recall(&uris, directory);
            host::recall(&uris, directory);
        }
        for uri in &uris {
            tokio::spawn(Arc::clone(uri).keep(stopped.clone()));
        }
        tokio::spawn(last_words::keep(uris.clone(), state.clone(), stopped));
        let records = Records::new(state);
        let host = Host::of(&uris);
        let inner = Inner {
            host,
            uris,
            limits,
            kill,
            reboot_method,
            reboot_reply,
            reboot_pause,
            records,
            locks,
            settling: Arc::default(),
            restarts,
            duels: Arc::new(duels),
            stop,
        };
        let inner = Arc::new(inner);
        inherit::inherit(&inner);
        Self { inner }
    }

    /// Waits until every URI is connected. Waits for ever for one that never is.
    pub async fn wait_connected(&self) {
        self.wait_each(|state| state.connected).await;
    }

    /// Waits until each URI has been tried once: it is connected, has failed, or has been silent for some seconds.
    pub async fn first_round(&self) {
        self.wait_each(|state| state.tried > 0).await;
    }

    async fn wait_each(&self, wanted: fn(&LinkState) -> bool) {
        for uri in &self.inner.uris {
            // Cannot fail while we hold the URI, which holds the sender.
            let _ = uri.state().wait_for(wanted).await;
        }
    }

    /// How each URI's connection is.
    #[must_use]
    pub fn health(&self) -> Vec<UriHealth> {
        let health = |uri: &Arc<Uri>| {
            let LinkState { connected, error, .. } = uri.state().borrow().clone();
            UriHealth { uri: Arc::clone(&uri.text), connected, error }
        };
        self.inner.uris.iter().map(health).collect()
    }

    /// Whether at least one URI is connected, which is what `monitor` asks.
    #[must_use]
    pub fn any_connected(&self) -> bool {
        self.inner.uris.iter().any(|uri| uri.state().borrow().connected)
    }

    /// Whether a URI is connected, or is within `bound`. While libvirtd is restarted no URI is, and that is over soon.
    pub async fn any_connected_within(&self, bound: Duration) -> bool {
        let by = Instant::now() + bound;
        let mut tried = JoinSet::new();
        for uri in self.inner.uris.iter().filter(|_| !self.any_connected()) {
            let uri = Arc::clone(uri);
            tried.spawn(async move { uri.connected_by(by).await });
        }
        while let Some(connected) = tried.join_next().await {
            if matches!(connected, Ok(true)) {
                return true;
            }
        }
        self.any_connected()
    }

    /// Carries out an off, on, reboot or status. Every doubt is [`Reply::Failure`](fence_common::wire::Reply::Failure), with a reason.
    /// What an `asker` wants that is being fenced itself is not done, unless that fence fails.
    ///
    /// No dangerous step begins after `deadline`. Once begun the work goes on even if the returned future is
    /// dropped; whoever tells the client "failure" before it is over calls the deadline off first.
    pub async fn carry_out(&self, order: &Authorized, asker: Option<Asker>, deadline: &Deadline) -> Outcome {
        let (op, target) = (order.op(), order.target().clone());
        let begun = Instant::now();
        let answer_by = begun + self.inner.limits.act;
        let step = deadline.not_after(begun + self.inner.limits.begin);
        let (answer, answered) = oneshot::channel();
        let inner = Arc::clone(&self.inner);
        tokio::spawn(async move {
            let shown = target.clone();
            let outcome = act::perform(inner, op, target, asker, step).await;
            if let Err(late) = answer.send(outcome) {
                let (took, detail) = (begun.elapsed(), &late.detail);
                tracing::warn!(op = op.name(), domain = %shown, ?took, %detail, "ended after nobody waited for it any more");
            }
        });
        match timeout_at(answer_by, answered).await {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(_)) => Outcome::failure(Detail::Broken),
            Err(_) => {
                deadline.call_off();
                Outcome::failure(Detail::Late)
            }
        }
    }

    /// What the domain is to this host.
    pub async fn presence(&self, target: &Target) -> Presence {
        status::presence(&self.inner, target, Moment::now()).await
    }

    /// All domains of all URIs.
    pub async fn list(&self) -> Listing {
        let mut listing = listing::list(&self.inner.uris, &self.inner.limits).await;
        presumed::correct(&self.inner, &mut listing).await;
        listing
    }

    /// Waits for pending restarts, then closes the connections; at most for `bound`. To be called when nothing else is in flight.
    ///
    /// Restarts on record are the next daemon's as well: one that pauses is left to it. One that is on no record is waited for longer,
    /// and its pause is cut short, as nobody else would ever start it.
    pub async fn shutdown(&self, bound: Duration) {
        let begun = Instant::now();
        let by = begun + bound;
        self.inner.restarts.end_pauses(begun);
        // What is held is for somebody else to decide.
        let to_be_started = || self.inner.restarts.waits().into_iter().filter(|waiting| !waiting.plan.held);
        let worth_waiting_for = |waiting: Waiting| match &waiting.plan.kept {
            Some(_) => Instant::now() < by && waiting.not_before <= Moment::now(),
            None => true,
        };
        let restarted = async {
            while to_be_started().any(worth_waiting_for) {
                sleep(SHUTDOWN_LOOK).await;
            }
        };
        let _ = timeout_at(begun + bound.max(self.inner.limits.unrecorded), restarted).await;
        let now = Moment::now();
        for Waiting { domain, plan, .. } in to_be_started() {
            let next = inherit::farewell(plan.kept.is_some(), plan.died, self.inner.reboot_pause, now);
            tracing::error!(%domain, "fenced, but not started again before we end: {next}");
        }
        self.inner.stop.send_replace(true);
        let closed = async {
            while self.inner.uris.iter().any(|uri| uri.has_links()) {
                sleep(SHUTDOWN_LOOK).await;
            }
        };
        if timeout_at(by, closed).await.is_err() {
            tracing::warn!("libvirt connections that do not close are left to the process's end");
        }
    }
}
