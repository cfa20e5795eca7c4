//! The way of a request, from verified to answered. Read this first.
//!
//! ```text
//! Verified        intake: form and digest are right
//!    | replay     rejects a datagram that was accepted before: its sender may lack the key
//!    | ledger     is it new, a duplicate, or does it supersede another request?
//!    | deferral   if the domain does not run here, a host that has it goes first; in a cluster the
//!    |            hosts agree on one
//!    | callback   connect back, challenge and response; by tcp and vsock on the client's own
//!    |            connection; none on a serial line, whose domain the hypervisor vouches for
//! Authenticated   the peer has the key, now (with `auth = "none"` it need not)
//!    | backlog    reads what has arrived meanwhile: a newer request may be among it
//!    | policy     groups. A denial is answered, and costs other copies of the request nothing
//! Authorized
//!    | ledger     claim: at most one copy of a request passes. Nothing happens before it.
//!    |            Later arrivals are other clients', and do not concern this peer
//!    | hypervisor kill, prove, restart; in a cluster `hosts` asks all of them
//! Outcome
//!    | ledger     no reply if the backlog has brought a request older than the authentication
//!    v callback   the reply byte
//! ```
//!
//! Each request runs as a task of its own. So a silent peer, a dead address or a slow domain delays
//! no other request. [`SERVING_MAX`] bounds their number. `answer` decides the reply, and
//! `deferral` the time.

mod answer;
mod claims;
mod deferral;
mod last_word;
mod stop;
mod unauthenticated;

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use fence_common::caller::{Address, Caller};
use fence_common::ending::Ending;
use fence_common::ledger::{Arrival, Endpoint, Ledger, NoClaim, Ticket};
use fence_common::sync::{Current, lock};
use fence_common::wire::Reply;
use fence_config::Groups;
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tracing::{debug, info, warn};

use self::answer::Answer;
pub use self::claims::Claims;
use self::deferral::{Deferral, Reached, Segment};
use self::last_word::Granted;
pub use self::stop::STOP_GRACE;
use self::stop::{Generations, Stopping, stopped};
use self::unauthenticated::{Seat, Unauthenticated};
use crate::callback::{Callback, CallbackError};
use crate::clock::Moment;
use crate::fault::{self, Point};
use crate::hosts::Hosts;
use crate::hypervisor::Hypervisors;
use crate::intake::backlog::Backlog;
use crate::intake::replay_cache::ReplayCache;
use crate::intake::request::{Incoming, Verified};
use crate::observe::limit::SourceLimit;
use crate::observe::requests::{Ended, Requests, Slot, Via};
use crate::observe::steps::Steps;

/// How many requests are served at once. A further one is rejected; its client sends it again two
/// seconds later.
pub const SERVING_MAX: usize = 1024;

/// How many of them may ask for a callback to one address. A guest's stock client does one thing at
/// a time. A guest that asks and stays silent must not use up the others' room.
pub const SERVING_MAX_PER_CALLER: usize = 64;

/// How long after its arrival a request is answered at the latest. Clients give up 30 s after their
/// first datagram, and the one that arrived may be their second, two seconds later.
pub const ANSWER_WITHIN: Duration = Duration::from_secs(25);

/// How long a request may wait in the kernel before it is served.
///
/// This is longer than the 2 s after which a client asks again, so no waiting client loses
/// anything. A stale request must not kill a domain after its client gave up, nor answer the next
/// client at the same endpoint.
pub const BEGIN_WITHIN: Duration = Duration::from_secs(5);

/// How many lines about one source the log takes at once; then one a second. A fencing is always
/// logged.
const LINES_AT_ONCE: u32 = 100;

/// Takes in verified requests and serves each of them.
pub struct Pipeline {
    shared: Arc<Shared>,
    tasks: Mutex<JoinSet<()>>,
    stopping: watch::Sender<Option<Instant>>,
    generations: Generations,
}

/// By the client's address and port: the newest request of each endpoint, and how to notify it that
/// a newer one has come.
type Newest = HashMap<Caller, Vec<(Endpoint, Arc<Notify>)>>;

struct Shared {
    callback: Callback,
    groups: Current<Groups>,
    hypervisors: Hypervisors,
    /// The hosts that answer together, if there are others.
    hosts: Option<Hosts>,
    backlog: Backlog,
    replays: Arc<ReplayCache>,
    ledger: Mutex<Ledger>,
    claims: Arc<Claims>,
    /// See [`Newest`].
    newest: Mutex<Newest>,
    unauthenticated: Unauthenticated,
    /// To be looked at from outside.
    requests: Arc<Requests>,
    /// Limits the log lines that a peer could cause often: rejected, unanswered and read-only
    /// requests.
    complaints: SourceLimit,
    /// [`deferral::DEFER`]; tests have their own.
    defer: Duration,
    segment: Segment,
}

impl Pipeline {
    /// A pipeline that acts through `hypervisors`, together with the other hosts if there are
    /// `hosts`. `backlog` belongs to the reader that calls
    /// [`Pipeline::accept`]. `requests` records what becomes of each request.
    #[must_use]
    pub fn new(
        groups: impl Into<Current<Groups>>,
        hypervisors: Hypervisors,
        hosts: Option<Hosts>,
        backlog: Backlog,
        claims: Arc<Claims>,
        replays: Arc<ReplayCache>,
        requests: Arc<Requests>,
    ) -> Self {
        let complaints = SourceLimit::new(LINES_AT_ONCE, Duration::from_secs(1));
        let newest = Mutex::default();
        let mut ledger = Ledger::default();
        let now = Moment::now();
        for id in claims.recent(now) {
            ledger.remember(now.nanos(), id);
        }
        let ledger = Mutex::new(ledger);
        let shared = Shared {
            callback: Callback::default(),
            groups: groups.into(),
            hypervisors,
            hosts,
            backlog,
            replays,
            ledger,
            claims,
            newest,
            unauthenticated: Unauthenticated::default(),
            requests,
            complaints,
            defer: deferral::DEFER,
            segment: Segment::default(),
        };
        let (tasks, stopping, generations) = (Mutex::default(), watch::channel(None).0, Generations::default());
        Self { shared: Arc::new(shared), tasks, stopping, generations }
    }

    /// Takes in a request. Returns at once; must be called within a tokio runtime.
    pub fn accept(&self, incoming: impl Into<Incoming>) {
        let incoming = incoming.into();
        let request = incoming.request();
        let mut tasks = lock(&self.tasks);
        while tasks.try_join_next().is_some() {}
        if self.stopping.borrow().is_some() {
            return self.shared.requests.reject(request.about(), "the daemon is stopping");
        }
        if self.shared.is_replay(request) {
            self.shared.requests.replay();
            return debug!(op = %request.op().name(), seqno = request.seqno(), caller = %request.caller(), "a replay");
        }
        let now = Moment::now();
        let waited = now.since(request.arrived());
        if waited > BEGIN_WITHIN {
            // Its client took over the endpoint from earlier clients, and may accept the callback
            // that is meant for them.
            self.shared.ledger().reject(request.id(), request.endpoint(), request.arrived().nanos());
            self.shared.requests.reject(request.about(), "it waited too long before it was read");
            self.shared.complain(request.caller().address(), |held_back| {
                let (op, source) = (request.op().name(), request.who());
                warn!(%op, domain = %domain(request), %source, held_back, "rejected: it waited for {waited:?} before it was read");
            });
            return;
        }
        let mut ledger = self.shared.ledger();
        let from_there = ledger.serving_at(&request.endpoint());
        let is_greedy = from_there >= SERVING_MAX_PER_CALLER;
        let finds_room = || tasks.len() < 2 * SERVING_MAX && self.shared.unauthenticated.displace();
        if is_greedy || (tasks.len() >= SERVING_MAX && !finds_room()) {
            ledger.reject(request.id(), request.endpoint(), request.arrived().nanos());
            drop(ledger);
            self.shared.requests.reject(request.about(), "too many requests are being served");
            self.shared.complain(request.caller().address(), |held_back| {
                let (op, source, all) = (request.op().name(), request.who(), tasks.len());
                let domain = domain(request);
                warn!(%op, %domain, %source, held_back, "rejected: {all} requests are being served, {from_there} of this source");
            });
            return;
        }
        let arrival = ledger.arrive(now.nanos(), request.id(), request.endpoint(), request.arrived().nanos());
        drop(ledger);
        match arrival {
            Arrival::Duplicate => {
                self.shared.requests.duplicate();
                debug!(op = %request.op().name(), seqno = request.seqno(), caller = %request.caller(), "a duplicate");
            }
            Arrival::Outdated => {
                self.shared
                    .requests
                    .reject(request.about(), "a newer request from the same address and port was read before it");
                debug!(op = %request.op().name(), seqno = request.seqno(), caller = %request.caller(), "outdated");
            }
            Arrival::Serve(ticket) => {
                let shared = Arc::clone(&self.shared);
                let stopping = self.stopping.subscribe();
                let superseded = shared.enter(request.endpoint());
                let slot = shared.requests.begin(request.about());
                let seat = shared.unauthenticated.enter();
                let (endpoint, op) = (request.endpoint(), request.op());
                let under_way = self.generations.enter();
                tasks.spawn(async move {
                    let ended = shared.serve(incoming, ticket, slot, &seat, &superseded, stopping).await;
                    shared.unauthenticated.leave(&seat);
                    shared.requests.over(slot, op, ended);
                    shared.leave(endpoint, &superseded);
                    drop(under_way);
                });
            }
        }
    }
}

/// Why there is nobody to answer to.
#[derive(Debug)]
enum NoPeer {
    /// The callback failed.
    Unreached(CallbackError, Deferral),
    /// All places were taken, and this request had waited longest without a peer.
    Displaced,
    /// Another host of the cluster calls back.
    Elsewhere,
    /// A newer request came from the same endpoint, or the daemon stops.
    Ended,
}

impl Shared {
    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        lock(&self.ledger)
    }

    fn is_replay(&self, request: &Verified) -> bool {
        let in_kernel = request.via() == Via::Kernel;
        request.datagram_id().is_some_and(|id| !self.replays.is_new(id, request.sender(), in_kernel))
    }

    /// Logs a line about a source, unless there have been too many. The line tells how many were
    /// held back.
    fn complain(&self, source: Address, line: impl FnOnce(u64)) {
        if let Some(held_back) = self.complaints.allow(source, Moment::now()) {
            line(held_back);
        }
    }

    /// Makes a request the newest of its endpoint, and notifies the one before.
    fn enter(&self, endpoint: Endpoint) -> Arc<Notify> {
        let superseded = Arc::new(Notify::new());
        let mut newest = lock(&self.newest);
        let there = newest.entry(endpoint.caller).or_default();
        for (_, older) in there.extract_if(.., |(other, _)| other.overlaps(&endpoint)) {
            older.notify_one();
        }
        there.push((endpoint, Arc::clone(&superseded)));
        superseded
    }

    /// Removes a finished request, if it is still the newest of its endpoint.
    fn leave(&self, endpoint: Endpoint, superseded: &Arc<Notify>) {
        let mut newest = lock(&self.newest);
        if let Entry::Occupied(mut there) = newest.entry(endpoint.caller) {
            there.get_mut().retain(|(_, newest)| !Arc::ptr_eq(newest, superseded));
            if there.get().is_empty() {
                there.remove();
            }
        }
    }

    async fn serve(
        &self,
        incoming: Incoming,
        ticket: Ticket,
        slot: Slot,
        seat: &Seat,
        superseded: &Notify,
        mut stopping: Stopping,
    ) -> Ended {
        fault::point(Point::AfterVerify);
        let (request, waits) = incoming.split();
        let called = tokio::select! {
            called = self.reach(&request, waits) => called,
            () = seat.displaced.notified() => Err(NoPeer::Displaced),
            () = superseded.notified() => Err(NoPeer::Ended),
            () = stopped(&mut stopping) => Err(NoPeer::Ended),
        };
        let Reached { peer, deferral, foresight } = match called {
            Ok(called) => called,
            Err(reason) => return self.give_up(&request, ticket, &reason),
        };
        // From here on the peer carries its request.
        drop(request);
        self.unauthenticated.leave(seat);
        let called_back = Moment::now();
        self.requests.called_back(slot, called_back);
        fault::point(Point::AfterAuthentication);
        self.backlog.read().await;
        let asked = peer.has_spoken().then_some(called_back.nanos());
        // Before the claim: a denied request must not use up the claim of another copy.
        let taken = match self.permit(&peer) {
            Ok(permitted) => self
                .ledger()
                .claim(called_back.nanos(), ticket, asked)
                .map(|claim| (Granted::Claim(claim), Ok(permitted))),
            Err(refused) => self.ledger().deny(ticket, asked).map(|denial| (Granted::Denial(denial), Err(refused))),
        };
        let (answer, held) = match taken {
            Ok((held, Ok(permitted))) => {
                if peer.request().op().changes_power() {
                    fault::point(Point::AfterClaim);
                    // Before the action: if the daemon dies now, the next one must not act again.
                    self.claims.note(called_back, peer.request().id());
                    fault::point(Point::AfterNote);
                }
                (self.answer(&peer, permitted, foresight, &mut stopping).await, held)
            }
            Ok((held, Err(refused))) => (refused, held),
            Err(NoClaim::Full) => (Answer::refused(Reply::Failure, NoClaim::Full.to_string()), Granted::Nothing),
            Err(reason @ (NoClaim::Taken | NoClaim::Superseded)) => return self.tell_moot(peer.request(), reason),
        };
        let steps = Steps {
            arrived: peer.request().arrived(),
            verified: peer.request().verified(),
            called_back: Some(called_back),
            dead: answer.dead,
            replied: None,
        };
        self.finish(peer, held, answer, steps, deferral).await
    }

    /// The callback came to nothing.
    fn give_up(&self, request: &Verified, ticket: Ticket, reason: &NoPeer) -> Ended {
        let (moot, copied) = {
            let mut ledger = self.ledger();
            let found = (ledger.is_moot(&ticket), ledger.has_duplicates(&ticket));
            ledger.forget(ticket);
            found
        };
        let after = Steps::elapsed(request.arrived(), Moment::now());
        let (op, domain, source) = (request.op().name(), domain(request), request.who());
        let (seqno, via) = (request.seqno(), request.way());
        let step = if request.is_connected() { "exchange" } else { "callback" };
        match (moot, reason) {
            (Some(reason), _) => return self.tell_moot(request, reason),
            // The stock client accepts one callback, and refuses or hangs up on those to its other
            // addresses.
            (None, NoPeer::Unreached(error, _)) if copied => {
                debug!(%op, %domain, %source, seqno, %via, %after, "{step} failed: {error}");
            }
            // Mostly another host was first.
            (None, NoPeer::Unreached(error, deferral)) if deferral.is_no_worry(error) => {
                self.complain(request.caller().address(), |held_back| {
                    info!(%op, %domain, %source, seqno, %via, %after, held_back, "{deferral}: {error}");
                });
            }
            (None, NoPeer::Unreached(error, deferral)) => self.complain(request.caller().address(), |held_back| {
                let doubt = deferral.doubt();
                warn!(%op, %domain, %source, seqno, %via, %after, held_back, "{step} failed{doubt}: {error}");
            }),
            (None, NoPeer::Displaced) => self.complain(request.caller().address(), |held_back| {
                warn!(%op, %domain, %source, seqno, %via, %after, held_back, "not answered: {SERVING_MAX} others are being served");
            }),
            (None, NoPeer::Elsewhere) => {
                debug!(%op, %domain, %source, seqno, %via, %after, "not answered: another host calls back");
            }
            (None, NoPeer::Ended) => {
                info!(%op, %domain, %source, seqno, %via, %after, "not answered: the daemon is stopping");
            }
        }
        match reason {
            NoPeer::Unreached(error, _) => Ended::unanswered(Ending::NoCallback, format!("{step} failed: {error}")),
            NoPeer::Displaced => Ended::unanswered(Ending::Displaced, "too many requests are being served"),
            NoPeer::Elsewhere => Ended::unanswered(Ending::Duplicate, "another host calls back"),
            NoPeer::Ended => Ended::unanswered(Ending::Stopped, "the daemon is stopping"),
        }
    }

    /// Logs a request that ends without an answer, because another one was or will be answered.
    fn tell_moot(&self, request: &Verified, reason: NoClaim) -> Ended {
        let (op, domain, source) = (request.op().name(), domain(request), request.who());
        let (seqno, via) = (request.seqno(), request.way());
        match reason {
            NoClaim::Taken | NoClaim::Full => debug!(%op, %domain, %source, seqno, %via, "not answered: {reason}"),
            NoClaim::Superseded => self.complain(request.caller().address(), |held_back| {
                info!(%op, %domain, %source, seqno, %via, held_back, "not answered: {reason}");
            }),
        }
        let result = if reason == NoClaim::Superseded { Ending::Superseded } else { Ending::Duplicate };
        Ended::unanswered(result, reason.to_string())
    }
}

fn domain(request: &Verified) -> String {
    request.target().map_or_else(|| "-".to_owned(), ToString::to_string)
}

#[cfg(test)]
mod tests;
