//! The way of a request, from verified to answered. Read this first.
//!
//! ```text
//! Verified        intake: form and digest are right
//!    | replay     is it this very datagram again? then somebody without the key may have sent it
//!    | ledger     is it new? is it a copy? does it overtake another?
//!    | deferral   does the domain run here? if not, the host that has it goes first
//!    | callback   connect back, challenge and response
//! Authenticated   the peer has the key, now
//!    | backlog    what has arrived meanwhile is taken in: something newer from the same endpoint may be among it
//!    | policy     groups. What they deny is told to the peer and takes nothing from other copies of the request
//! Authorized
//!    | ledger     claim: at most one copy of a request gets further, and only from here on may anything happen; what arrives from here on
//!    |            is another client's, and does not concern this peer
//!    | hypervisor kill, prove, restart
//! Outcome
//!    | ledger     has something turned up that had arrived before the authentication (the backlog again)? then silence
//!    v callback   the reply byte
//! ```
//!
//! Every request runs as a task of its own, so that a silent peer, a dead address or a slow domain costs nobody else
//! anything. How many run at once is bounded ([`SERVING_MAX`]). What is answered is in `answer`, when in `deferral`.

mod answer;
mod claims;
mod deferral;
mod last_word;
mod places;
mod stop;

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use fence_common::ledger::{Arrival, Endpoint, Ledger, NoClaim, Ticket};
use fence_common::sync::lock;
use fence_common::wire::Reply;
use fence_config::Groups;
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tracing::{debug, info, warn};

use self::answer::Answer;
pub use self::claims::Claims;
use self::deferral::Deferral;
use self::last_word::Held;
use self::places::{Seat, Unproven};
pub use self::stop::STOP_GRACE;
use self::stop::{Stopping, stopped};
use crate::callback::{Callback, CallbackError};
use crate::clock::Moment;
use crate::fault::{self, Point};
use crate::hypervisor::Hypervisors;
use crate::intake::backlog::Backlog;
use crate::intake::replay_cache::ReplayCache;
use crate::intake::request::Verified;
use crate::observe::limit::SourceLimit;
use crate::observe::requests::{Ended, Requests, Slot, Via};
use crate::observe::steps::Steps;

/// How many requests are served at once. A further one is not begun: its client sends it again two seconds later.
pub const SERVING_MAX: usize = 1024;

/// How many of them may ask to be called back at one address. The stock client of a guest does one thing at a time; a guest that asks
/// and then stays silent must not use up what the others need.
pub const SERVING_MAX_PER_CALLER: usize = 64;

/// How long after its arrival a request is answered at the latest. Clients give up 30 s after they began to ask, and the
/// datagram that was seen may be the second of theirs, two seconds into it.
pub const ANSWER_WITHIN: Duration = Duration::from_secs(25);

/// How long a request may have waited in the kernel before it is begun. Longer than its client takes to ask again (2 s), so nobody
/// who still waits loses anything; whoever does not wait any more must not find a domain dead later on, nor the next client at the
/// same endpoint an answer.
pub const BEGIN_WITHIN: Duration = Duration::from_secs(5);

/// How many lines about one source the log takes at once; then one a second. What was fenced is always told.
const LINES_AT_ONCE: u32 = 100;

/// Takes in verified requests and sees each of them through.
pub struct Pipeline {
    shared: Arc<Shared>,
    tasks: Mutex<JoinSet<()>>,
    stopping: watch::Sender<Option<Instant>>,
}

/// By callback address and port, the newest request of each endpoint there, and how it learns that it is overtaken.
type Newest = HashMap<SocketAddr, Vec<(Endpoint, Arc<Notify>)>>;

struct Shared {
    callback: Callback,
    groups: Groups,
    hypervisors: Hypervisors,
    backlog: Backlog,
    replays: Arc<ReplayCache>,
    ledger: Mutex<Ledger>,
    claims: Claims,
    /// By callback address and port, how to tell the newest request of each that it is overtaken.
    newest: Mutex<Newest>,
    unproven: Unproven,
    /// To be looked at from outside.
    requests: Arc<Requests>,
    /// For lines about what is refused, goes unanswered or only asks: a peer could make them come often.
    complaints: SourceLimit,
    /// [`deferral::DEFER`]; tests have their own.
    defer: Duration,
}

impl Pipeline {
    /// A pipeline that answers through `callback` and acts through `hypervisors`. `backlog` is what whoever calls
    /// [`Pipeline::accept`] listens to. What becomes of requests is noted in `requests`.
    #[must_use]
    pub fn new(
        callback: Callback,
        groups: Groups,
        hypervisors: Hypervisors,
        backlog: Backlog,
        claims: Claims,
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
            callback,
            groups,
            hypervisors,
            backlog,
            replays,
            ledger,
            claims,
            newest,
            unproven: Unproven::default(),
            requests,
            complaints,
            defer: deferral::DEFER,
        };
        Self { shared: Arc::new(shared), tasks: Mutex::default(), stopping: watch::channel(None).0 }
    }

    /// A request came in. Returns at once; must be called within a tokio runtime.
    pub fn accept(&self, request: Verified) {
        let mut tasks = lock(&self.tasks);
        while tasks.try_join_next().is_some() {}
        if self.stopping.borrow().is_some() {
            return;
        }
        if self.shared.is_replay(&request) {
            self.shared.requests.replay();
            return debug!(op = %request.op().name(), seqno = request.seqno(), caller = %request.caller(), "a replay");
        }
        let now = Moment::now();
        let waited = now.since(request.arrived());
        if waited > BEGIN_WITHIN {
            // Whoever sent it took the place of those who were there before, and may take the callback that is meant for them.
            self.shared.ledger().reject(request.id(), request.endpoint(), request.arrived().nanos());
            self.shared.requests.turn_away(request.about(), "it had waited too long before it was read");
            self.shared.complain(request.caller(), |held_back| {
                let (op, source) = (request.op().name(), request.caller());
                warn!(%op, domain = %domain(&request), %source, held_back, "not begun, as it waited for {waited:?} before it was read");
            });
            return;
        }
        let mut ledger = self.shared.ledger();
        let from_there = ledger.serving_at(request.caller().ip());
        let is_greedy = from_there >= SERVING_MAX_PER_CALLER;
        let finds_room = || tasks.len() < 2 * SERVING_MAX && self.shared.unproven.displace();
        if is_greedy || (tasks.len() >= SERVING_MAX && !finds_room()) {
            ledger.reject(request.id(), request.endpoint(), request.arrived().nanos());
            drop(ledger);
            self.shared.requests.turn_away(request.about(), "too many are being served");
            self.shared.complain(request.caller(), |held_back| {
                let (op, source, all) = (request.op().name(), request.caller(), tasks.len());
                let domain = domain(&request);
                warn!(%op, %domain, %source, held_back, "not begun: {all} are being served, {from_there} of this source");
            });
            return;
        }
        let arrival = ledger.arrive(now.nanos(), request.id(), request.endpoint(), request.arrived().nanos());
        drop(ledger);
        match arrival {
            Arrival::Duplicate => {
                self.shared.requests.copy();
                debug!(op = %request.op().name(), seqno = request.seqno(), caller = %request.caller(), "a copy");
            }
            Arrival::Outdated => {
                self.shared
                    .requests
                    .turn_away(request.about(), "something later from the same address and port was read before it");
                debug!(op = %request.op().name(), seqno = request.seqno(), caller = %request.caller(), "outdated");
            }
            Arrival::Serve(ticket) => {
                let shared = Arc::clone(&self.shared);
                let stopping = self.stopping.subscribe();
                let overtaken = shared.enter(request.endpoint());
                let slot = shared.requests.begin(request.about());
                let seat = shared.unproven.enter();
                tasks.spawn(async move {
                    let (endpoint, op) = (request.endpoint(), request.op());
                    let ended = shared.serve(request, ticket, slot, &seat, &overtaken, stopping).await;
                    shared.unproven.leave(&seat);
                    shared.requests.over(slot, op, ended);
                    shared.leave(endpoint, &overtaken);
                });
            }
        }
    }

    /// Waits until all is answered, at most for `bound`. After [`STOP_GRACE`] it lets go of what is not claimed, as a client that nobody
    /// has connected to asks again, and answers with failure what is.
    /// Returns how many requests were still unanswered in the end.
    pub async fn shutdown(&self, bound: Duration) -> usize {
        self.stopping.send_replace(Some(Instant::now() + STOP_GRACE));
        let mut tasks = std::mem::take(&mut *lock(&self.tasks));
        let all = async { while tasks.join_next().await.is_some() {} };
        let _ = tokio::time::timeout(bound, all).await;
        let left = tasks.len();
        tasks.abort_all();
        left
    }
}

/// Why there is nobody to answer to.
#[derive(Debug)]
enum NoPeer {
    /// The callback failed.
    Unreached(CallbackError, Deferral),
    /// It had waited longest without a peer when all places were taken.
    Displaced,
    /// It was ended: something newer was asked from the same endpoint, or the daemon stops.
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

    /// Logs a line about a source, with how many about it were held back, unless there have been too many.
    fn complain(&self, source: SocketAddr, line: impl FnOnce(u64)) {
        if let Some(held_back) = self.complaints.allow(source.ip().to_canonical(), Moment::now()) {
            line(held_back);
        }
    }

    /// Makes a request the newest of its endpoint: whatever was is told so.
    fn enter(&self, endpoint: Endpoint) -> Arc<Notify> {
        let overtaken = Arc::new(Notify::new());
        let mut newest = lock(&self.newest);
        let there = newest.entry(endpoint.address).or_default();
        for (_, older) in there.extract_if(.., |(other, _)| other.overlaps(&endpoint)) {
            older.notify_one();
        }
        there.push((endpoint, Arc::clone(&overtaken)));
        overtaken
    }

    /// A request is over; if it is still the newest of its endpoint there is none any more.
    fn leave(&self, endpoint: Endpoint, overtaken: &Arc<Notify>) {
        let mut newest = lock(&self.newest);
        if let Entry::Occupied(mut there) = newest.entry(endpoint.address) {
            there.get_mut().retain(|(_, newest)| !Arc::ptr_eq(newest, overtaken));
            if there.get().is_empty() {
                there.remove();
            }
        }
    }

    async fn serve(
        &self,
        request: Verified,
        ticket: Ticket,
        slot: Slot,
        seat: &Seat,
        overtaken: &Notify,
        mut stopping: Stopping,
    ) -> Ended {
        fault::point(Point::AfterVerify);
        let called = tokio::select! {
            called = self.call_back(&request) => called,
            () = seat.displaced.notified() => Err(NoPeer::Displaced),
            () = overtaken.notified() => Err(NoPeer::Ended),
            () = stopped(&mut stopping) => Err(NoPeer::Ended),
        };
        let (peer, deferral) = match called {
            Ok(called) => called,
            Err(reason) => return self.give_up(&request, ticket, &reason),
        };
        // From here on the peer carries its request.
        drop(request);
        self.unproven.leave(seat);
        let called_back = Moment::now();
        self.requests.called_back(slot, called_back);
        fault::point(Point::AfterAuthentication);
        self.backlog.read().await;
        let asked = peer.has_spoken().then_some(called_back.nanos());
        // Before the claim: what is denied must not use up what another copy of the request may.
        let taken = match self.permit(&peer) {
            Ok(permitted) => {
                self.ledger().claim(called_back.nanos(), ticket, asked).map(|claim| (Held::Claim(claim), Ok(permitted)))
            }
            Err(refused) => self.ledger().deny(ticket, asked).map(|denial| (Held::Denial(denial), Err(refused))),
        };
        let (answer, held) = match taken {
            Ok((held, Ok(permitted))) => {
                if peer.request().op().changes_power() {
                    fault::point(Point::AfterClaim);
                    // Before anything is done: if we die now, the next daemon must not do it again.
                    self.claims.note(called_back, peer.request().id());
                    fault::point(Point::AfterNote);
                }
                (self.answer(&peer, permitted, &mut stopping).await, held)
            }
            Ok((held, Err(refused))) => (refused, held),
            Err(NoClaim::Full) => (Answer::refused(Reply::Failure, NoClaim::Full.to_string()), Held::Nothing),
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
        let (op, domain, source) = (request.op().name(), domain(request), request.caller().ip());
        let (seqno, via) = (request.seqno(), request.via());
        match (moot, reason) {
            (Some(reason), _) => return self.tell_moot(request, reason),
            // The stock client takes one callback, and refuses or hangs up on the ones to its other addresses.
            (None, NoPeer::Unreached(error, _)) if copied => {
                debug!(%op, %domain, %source, seqno, %via, %after, "callback failed: {error}");
            }
            // As a rule another host was first.
            (None, NoPeer::Unreached(error, deferral)) if deferral.is_no_worry(error) => {
                self.complain(request.caller(), |held_back| {
                    info!(%op, %domain, %source, seqno, %via, %after, held_back, "{deferral}: {error}");
                });
            }
            (None, NoPeer::Unreached(error, deferral)) => self.complain(request.caller(), |held_back| {
                let doubt = deferral.doubt();
                warn!(%op, %domain, %source, seqno, %via, %after, held_back, "callback failed{doubt}: {error}");
            }),
            (None, NoPeer::Displaced) => self.complain(request.caller(), |held_back| {
                warn!(%op, %domain, %source, seqno, %via, %after, held_back, "not answered: {SERVING_MAX} others are being served");
            }),
            (None, NoPeer::Ended) => {
                info!(%op, %domain, %source, seqno, %via, %after, "not answered: the daemon is stopping");
            }
        }
        match reason {
            NoPeer::Unreached(error, _) => Ended::unanswered("no callback", format!("callback failed: {error}")),
            NoPeer::Displaced => Ended::unanswered("displaced", "too many are being served"),
            NoPeer::Ended => Ended::unanswered("stopped", "the daemon is stopping"),
        }
    }

    /// A request that is closed without an answer, because another one was or will be answered.
    fn tell_moot(&self, request: &Verified, reason: NoClaim) -> Ended {
        let (op, domain, source) = (request.op().name(), domain(request), request.caller().ip());
        let (seqno, via) = (request.seqno(), request.via());
        match reason {
            NoClaim::Taken | NoClaim::Full => debug!(%op, %domain, %source, seqno, %via, "not answered: {reason}"),
            NoClaim::Superseded => self.complain(request.caller(), |held_back| {
                info!(%op, %domain, %source, seqno, %via, held_back, "not answered: {reason}");
            }),
        }
        let result = if reason == NoClaim::Superseded { "superseded" } else { "copy" };
        Ended::unanswered(result, reason.to_string())
    }
}

fn domain(request: &Verified) -> String {
    request.target().map_or_else(|| "-".to_owned(), ToString::to_string)
}

#[cfg(test)]
mod tests;
