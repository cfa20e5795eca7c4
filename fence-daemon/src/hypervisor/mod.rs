//! Hypervisors behind libvirt URIs: the orders that exist. This module alone uses libvirt, and
//! alone kills.
//!
//! # The rooms
//!
//! | room | what it does | what it may import |
//! |---|---|---|
//! | `fence` | carries orders out, and starts domains again | `known`, `libvirt`, `process` |
//! | `known` | knows what libvirt and this host said of domains, and asks them | `libvirt`, `process` |
//! | `libvirt` | calls libvirt; only this room names `virt` | none |
//! | `process` | finds, holds and kills processes of this host | none |
//!
//! # The rules
//!
//! - **No false success.** A domain counts as off in one of two ways. Its own process is dead by
//!   its pidfd, with no migration under way. Or libvirt positively says so when asked afresh: "shut
//!   off", or "no such domain" of a transient domain that we destroyed. libvirt's word that a
//!   destroy succeeded is not enough. An error, a timeout or a lost connection is a failure. "No
//!   such domain" comes from libvirt's error code alone. Nor does an "off" pass while this host has
//!   a living process of the domain, a helper of it, or a write of it under way.
//! - **Two answers have less behind them.** A domain of a URI without a local driver is no process
//!   of this host: libvirt's word alone counts. A reboot by reset (`fence::reset`) is a success
//!   when libvirt tells that it was done: its process lives on.
//! - **A domain is unknown only if every URI says so.** A domain that is found nowhere while a URI
//!   could not say is a failure, for `status` too. If a URI knows it, that word counts, and with it
//!   the last word of each URI that does not answer (`known::last_words` has the table of cases).
//! - **Every running instance is meant** if several URIs know the name or UUID: all must be proven
//!   off.
//! - **A domain that moved to another host** ("shut off (migrated)") is not off by our word. `off`
//!   and `reboot` fail and `on` starts no second copy, unless another of our URIs has it.
//! - **Of two guests in a fence race at most one dies**: see `fence::fence_race`.
//! - **In order per domain**, by name or by UUID (`fence::locks`). Orders for different domains,
//!   and questions, do not wait for each other. A dead or hung URI costs the others nothing.
//! - **Answers are in time**: `Limits::act` for everything. One [`Deadline`] goes all the way down.
//!   No destroy, kill, reset or start begins after `Limits::begin`, nor after the client was
//!   answered "failure". A step that has begun stays in force. Its domain is not started until the
//!   step ends, so a late kill cannot hit what a later request has started.
//! - **A reboot's restart** happens in the background (`fence::restart`), not before its `pause` is
//!   over. An `off` that comes later ends it.

mod deadline;
mod fence;
mod known;
mod libvirt;
mod probe;
mod process;
#[cfg(test)]
mod tests;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use fence_common::caller::Vouched;
use fence_common::hosts::GuestAddress;
use fence_common::sync::Current;
use fence_common::target::Target;
use fence_config::Options;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout_at};
use uuid::Uuid;

pub use self::deadline::Deadline;
pub use self::fence::{Detail, Foresight, Outcome, Presence, Requester, Standing, Unproven};
pub use self::known::view::{DomainState, DomainView, UriView};
pub use self::known::{DomainSocket, Identity, Listed, Listing};
pub use self::libvirt::{CallError, LibvirtError, SocketKind, State};
pub use self::probe::probe;
pub use self::process::Left;

use self::fence::{
    FenceRaces, Fenced, Locks, Orders, Pending, Records, Restarter, Restarts, Settling, farewell, is_defined, standing,
    status,
};
use self::known::{Known, Uri, last_words, view};
use self::libvirt::LinkState;
use crate::clock::Moment;
use crate::policy::Authorized;

/// How long things may take.
#[derive(Clone, Copy, Debug)]
struct Limits {
    /// A look-up or a list, see [`Known`].
    look_up: Duration,
    /// A connected URI once another one knows the domain, see [`Known`].
    grace: Duration,
    /// Until when an order's call must have begun. A later one cannot be proven in time.
    begin: Duration,
    /// An order as a whole. The client gives up at 30 s, and needs some of them for the callback
    /// and its challenge.
    act: Duration,
    /// A reset, until the event that says that it was done.
    reset: Duration,
    /// The longest pause between two attempts to start a domain again after a reboot.
    restart_pause: Duration,
    /// How long a stop is put off for a restart that is on no record. Requests are served
    /// meanwhile.
    unrecorded: Duration,
}

/// The limits of the daemon.
const LIMITS: Limits = Limits {
    look_up: Duration::from_secs(5),
    grace: Duration::from_millis(500),
    begin: Duration::from_secs(15),
    act: Duration::from_secs(20),
    reset: Duration::from_secs(3),
    restart_pause: Duration::from_secs(60),
    unrecorded: Duration::from_secs(5),
};

/// How long libvirt may take to say which domain asks. A client waits for 30 s.
const VOUCHED_WITHIN: Duration = Duration::from_secs(3);

/// How often a shutdown looks whether all has ended.
const SHUTDOWN_LOOK: Duration = Duration::from_millis(10);

/// How long the end waits, when nothing is served any more, for a restart that is on no record. A
/// reboot that was answered in the last moment gets an attempt.
const LAST_ATTEMPT: Duration = Duration::from_millis(700);

/// The hypervisors of this host, each behind a libvirt URI. Clones are the same hypervisors.
#[derive(Clone)]
pub struct Hypervisors {
    limits: Limits,
    known: Arc<Known>,
    orders: Arc<Orders>,
    /// Ends the keepers; so does its drop.
    stop: Arc<watch::Sender<bool>>,
}

impl Hypervisors {
    /// Starts to connect to each of `uris`, and returns at once. Must be called within a tokio
    /// runtime.
    #[must_use]
    pub fn start(uris: &[String], options: Options) -> Self {
        Self::with_limits(uris, LIMITS, options)
    }

    fn with_limits(uris: &[String], limits: Limits, options: Options) -> Self {
        Self::with_races(uris, limits, options, FenceRaces::default())
    }

    fn with_races(uris: &[String], limits: Limits, options: Options, races: FenceRaces) -> Self {
        let (stop, stopped) = watch::channel(false);
        let uris: Vec<_> = uris.iter().enumerate().map(|(index, text)| Uri::new(text, index)).collect();
        let state = options.state.clone();
        let options = Current::new(options);
        if let Some(directory) = &state {
            recall(&uris, directory);
        }
        for uri in &uris {
            tokio::spawn(Arc::clone(uri).keep(stopped.clone()));
        }
        tokio::spawn(last_words::keep(uris.clone(), state.clone(), stopped));
        let known = Known::new(uris, limits.look_up, limits.grace);
        let (locks, settling) = (Arc::<Locks>::default(), Arc::<Settling>::default());
        let restarts = Arc::<Restarts>::default();
        let restarter = Arc::new(Restarter {
            known: Arc::clone(&known),
            restarts: Arc::clone(&restarts),
            records: Records::new(state),
            locks: Arc::clone(&locks),
            settling: Arc::clone(&settling),
            options: options.clone(),
            attempt_pause_max: limits.restart_pause,
        });
        restarter.inherit();
        let orders = Orders {
            known: Arc::clone(&known),
            locks,
            settling,
            restarts,
            restarter,
            races: Arc::new(races),
            options,
            reset: limits.reset,
        };
        Self { limits, known, orders: Arc::new(orders), stop: Arc::new(stop) }
    }

    /// Kills and reboots like this from now on. The directory of pending restarts stays.
    pub fn set_options(&self, options: Options) {
        let state = self.orders.options.now().state.clone();
        self.orders.options.set(Options { state, ..options });
    }

    /// Waits until every URI is connected. Waits for ever for one that never is.
    pub async fn wait_connected(&self) {
        self.wait_each(|state| state.connected).await;
    }

    /// Waits until each URI has been tried once: it is connected, has failed, or has been silent
    /// for some seconds.
    pub async fn first_round(&self) {
        self.wait_each(|state| state.tried > 0).await;
    }

    async fn wait_each(&self, wanted: fn(&LinkState) -> bool) {
        for uri in &self.known.uris {
            // Cannot fail while we hold the URI, which holds the sender.
            let _ = uri.state().wait_for(wanted).await;
        }
    }

    /// Waits until all domains of each connected URI were seen once, at most for `bound`.
    pub(crate) async fn filled_within(&self, bound: Duration) {
        let by = Instant::now() + bound;
        for uri in self.known.uris.iter().filter(|uri| uri.is_lively()) {
            let mut news = uri.table.news();
            while !uri.table.is_filled() && matches!(timeout_at(by, news.changed()).await, Ok(Ok(()))) {}
        }
    }

    /// The URIs in the configuration's order, each with its domains.
    #[must_use]
    pub fn view(&self) -> Vec<UriView> {
        self.known.uris.iter().map(|uri| view::view(uri)).collect()
    }

    /// The pending restarts, the oldest first.
    pub(crate) fn restarts(&self) -> Vec<Pending> {
        self.orders.restarts.all()
    }

    /// Whether at least one URI is connected, which is what `monitor` asks.
    #[must_use]
    pub fn any_connected(&self) -> bool {
        self.known.uris.iter().any(|uri| uri.state().borrow().connected)
    }

    /// Whether a URI is connected, or is within `bound`. While libvirtd is restarted no URI is, and
    /// that is over soon.
    pub async fn any_connected_within(&self, bound: Duration) -> bool {
        let by = Instant::now() + bound;
        let mut tried = JoinSet::new();
        for uri in self.known.uris.iter().filter(|_| !self.any_connected()) {
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

    /// Carries out an off, on, reboot or status. Every doubt is
    /// [`Reply::Failure`](fence_common::wire::Reply::Failure), with a reason. The order of a
    /// `requester` that is being fenced itself is carried out only if that fence fails.
    ///
    /// No dangerous step begins after `deadline`. Once begun the work goes on even if the returned
    /// future is dropped. A caller that answers "failure" before it is over calls the deadline off
    /// first.
    pub async fn carry_out(&self, order: &Authorized, requester: Option<Requester>, deadline: &Deadline) -> Outcome {
        self.carry_out_foreseen(order, requester, None, deadline).await
    }

    /// The same. `foresight` is about the order's own target.
    pub async fn carry_out_foreseen(
        &self,
        order: &Authorized,
        requester: Option<Requester>,
        foresight: Option<Foresight>,
        deadline: &Deadline,
    ) -> Outcome {
        let (op, target) = (order.op(), order.target().clone());
        let begun = Instant::now();
        let answer_by = begun + self.limits.act;
        let step = deadline.not_after(begun + self.limits.begin);
        let (answer, answered) = oneshot::channel();
        let orders = Arc::clone(&self.orders);
        tokio::spawn(async move {
            let shown = target.clone();
            let outcome = orders.perform(op, target, requester, foresight, step).await;
            if let Err(late) = answer.send(outcome) {
                let (took, detail) = (begun.elapsed(), &late.detail);
                tracing::warn!(op = op.name(), domain = %shown, ?took, %detail, "ended after the client was answered");
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
        status::presence(&self.known, &self.orders.restarts, target, Moment::now()).await
    }

    /// What the domain is to this host, for the other hosts of its cluster. One that is on its way
    /// between two hosts is waited for until `by`.
    pub async fn standing(&self, target: &Target, by: Instant) -> Standing {
        standing(&self.known, &self.orders.restarts, target, by).await
    }

    /// Whether a domain that is off here has a definition to start it from. A doubt counts as yes.
    pub async fn is_defined(&self, uuid: Uuid) -> bool {
        is_defined(&self.known, uuid).await
    }

    /// The domain of this host that a client runs in, if one alone can be meant, and the client's
    /// Ethernet addresses. It may have been fenced since the client asked.
    #[must_use]
    pub fn client(&self, requester: Requester) -> (Option<Vouched>, Vec<[u8; 6]>) {
        let tables = || self.known.uris.iter().map(|uri| &uri.table);
        let macs = self.orders.races.macs_of(requester);
        let mut uuids: Vec<_> = requester.domain.into_iter().collect();
        uuids.extend(macs.iter().flat_map(|mac| tables().flat_map(|table| table.running_with(*mac))));
        let first = uuids.first().copied().filter(|first| uuids.iter().all(|uuid| uuid == first));
        let name = first.and_then(|uuid| tables().find_map(|table| table.get(uuid))).map(|entry| entry.name);
        let client = first.zip(name).map(|(uuid, name)| Vouched { name, uuid });
        // An address that several machines have names none of them.
        let has_ended =
            || self.orders.races.victim_of(requester, &macs).filter(|_| uuids.is_empty() || first.is_some());
        let client = client.or_else(|| has_ended().map(|Fenced { uuid, name, .. }| Vouched { name, uuid }));
        (client, macs)
    }

    /// The Ethernet addresses of all machines that run here, by the tables.
    #[must_use]
    pub fn addresses(&self) -> Vec<GuestAddress> {
        self.known.uris.iter().flat_map(|uri| uri.table.addresses()).collect()
    }

    /// Whether the domain was rebooted here, and is started again only if somebody decides so.
    #[must_use]
    pub fn is_restart_held(&self, uuid: Uuid) -> bool {
        self.orders.restarts.of(&Target::Uuid(uuid)).iter().any(|plan| plan.held)
    }

    /// How often the target has appeared on this host: by a start, an arrival or a resume. It may
    /// be too high, and never falls. A new connection to libvirt counts as well, since nobody knows
    /// what was before it.
    #[must_use]
    pub fn appearances(&self, target: &Target) -> u64 {
        let of = |uri: &Arc<Uri>| uri.table.appearances.of(target).saturating_add(uri.table.generation());
        self.known.uris.iter().map(of).fold(0, u64::saturating_add)
    }

    /// Tells when something about domains may have changed. Must be called within a tokio runtime.
    #[must_use]
    pub fn news(&self) -> watch::Receiver<()> {
        self.known.news_of_sockets()
    }

    /// Whether the tables alone say that the domain is known here and off. Waits for nobody, and is
    /// no answer: the tables may be a moment behind.
    pub(crate) fn is_off_by_tables(&self, target: &Target) -> bool {
        status::is_off_by_tables(&self.known, &self.orders.restarts, target, Moment::now())
    }

    /// Begins to ask what an answer about a domain that is off takes. `None`: the tables do not say
    /// that it is off. Must be called within a tokio runtime.
    pub(crate) fn foresee(&self, target: &Target) -> Option<Foresight> {
        Foresight::begin(&self.known, &self.orders.restarts, target)
    }

    /// The sockets of running domains' devices of this kind, of all URIs or of one.
    #[must_use]
    pub fn sockets(&self, kind: SocketKind, of: Option<&str>) -> Vec<DomainSocket> {
        self.known.sockets(kind, of)
    }

    /// Whether a socket is its domain's, by libvirt's word at this moment. Every doubt means no.
    pub async fn has_socket(&self, uuid: Uuid, path: &str) -> bool {
        self.known.has_socket(uuid, path).await
    }

    /// Tells when sockets may have come or gone. Must be called within a tokio runtime.
    #[must_use]
    pub fn news_of_sockets(&self) -> watch::Receiver<()> {
        self.known.news_of_sockets()
    }

    /// The running domain of this host with this vsock number, asked afresh. `None`: there is none,
    /// or any doubt about it.
    pub async fn domain_of_cid(&self, cid: u32) -> Option<Vouched> {
        let by = Instant::now() + VOUCHED_WITHIN;
        timeout_at(by, self.known.domain_of_cid(cid, by)).await.ok().flatten()
    }

    /// All domains of all URIs.
    pub async fn list(&self) -> Listing {
        self.known.list().await
    }

    /// Waits for pending restarts before a stop, while requests are still served. No other daemon
    /// knows of a restart without a record. So it is waited for, for a few seconds at most, and its
    /// pause is cut short. One on record that is due now is waited for as long as `bound`.
    pub async fn start_pending(&self, bound: Duration) {
        let begun = Instant::now();
        let restarts = &self.orders.restarts;
        restarts.end_pauses(begun);
        let is_worth_it = |pending: &Pending| match &pending.plan.kept {
            _ if pending.plan.held => false,
            Some(_) => begun.elapsed() < bound && pending.not_before <= Moment::now(),
            None => true,
        };
        let started = async {
            while restarts.all().iter().any(is_worth_it) {
                sleep(SHUTDOWN_LOOK).await;
            }
        };
        let _ = timeout_at(begun + self.limits.unrecorded, started).await;
    }

    /// Waits for pending restarts, then closes the connections; at most for `bound`. To be called
    /// when no order is in flight.
    ///
    /// The next daemon can do restarts on record as well, so one that pauses is left to it. A
    /// restart without a record is waited for a little longer (see [`Self::start_pending`]), and
    /// its pause is cut short.
    pub async fn shutdown(&self, bound: Duration) {
        let begun = Instant::now();
        let by = begun + bound;
        let restarts = &self.orders.restarts;
        restarts.end_pauses(begun);
        // A held restart is for somebody else to decide.
        let to_be_started = || restarts.all().into_iter().filter(|pending| !pending.plan.held);
        let worth_waiting_for = |pending: Pending| match &pending.plan.kept {
            Some(_) => Instant::now() < by && pending.not_before <= Moment::now(),
            None => true,
        };
        let restarted = async {
            while to_be_started().any(worth_waiting_for) {
                sleep(SHUTDOWN_LOOK).await;
            }
        };
        let _ = timeout_at(begun + bound.max(LAST_ATTEMPT), restarted).await;
        let now = Moment::now();
        for Pending { plan, .. } in to_be_started() {
            let pause = self.orders.options.now().reboot_pause;
            let next = farewell(plan.kept.is_some(), plan.died, pause, now);
            tracing::error!(domain = %plan.domain, "fenced, but not started again before this daemon ends: {next}");
        }
        self.stop.send_replace(true);
        let closed = async {
            while self.known.uris.iter().any(|uri| uri.is_open()) {
                sleep(SHUTDOWN_LOOK).await;
            }
        };
        if timeout_at(by, closed).await.is_err() {
            tracing::warn!("libvirt connections that do not close are left to the process's end");
        }
    }
}

/// Gives each URI what an earlier daemon knew, before anything is asked.
fn recall(uris: &[Arc<Uri>], directory: &Path) {
    last_words::recall(uris, directory);
    // The system's QEMU driver is one, however many URIs lead to it.
    let machines = uris.iter().filter(|uri| uri.table.runs_machines()).enumerate();
    machines.for_each(|(number, uri)| uri.table.belongings.keep_in(directory, number));
}
