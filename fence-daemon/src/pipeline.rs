//! The way of a request, from verified to answered. Read this first.
//!
//! ```text
//! Verified        intake: form and digest are right
//!    | replay     is it this very datagram again? then somebody without the key may have sent it
//!    | ledger     is it new? is it a copy? does it overtake another?
//!    | callback   connect back, challenge and response
//! Authenticated   the peer has the key, now
//!    | backlog    what has arrived meanwhile is taken in: something newer from the same place may be among it
//!    | ledger     claim: at most one copy of a request gets further, and only from here on may anything happen
//!    | policy     groups
//! Authorized
//!    | hypervisor kill, prove, restart
//! Outcome
//!    | ledger     overtaken meanwhile (the backlog again)? then silence
//!    v callback   the reply byte
//! ```
//!
//! Every request runs as a task of its own, so that a silent peer, a dead address or a slow domain costs nobody else
//! anything. How many run at once is bounded ([`SERVING_MAX`]).

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use fence_common::ledger::{Arrival, Claim, Ledger, NoClaim, Ticket};
use fence_common::replay::Replays;
use fence_common::wire::{HOST_LIST, HostRecord, Op, Reply};
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tracing::{debug, info, warn};
use zerocopy::IntoBytes;

use crate::callback::{Authenticated, Callback, CallbackError};
use crate::clock::Moment;
use crate::config::Groups;
use crate::hypervisor::{Hypervisors, Outcome};
use crate::intake::Verified;
use crate::intake::backlog::Backlog;
use crate::observe::limit::LogLimit;
use crate::observe::steps::Steps;
use crate::policy::{self, Authorized};

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
/// same place an answer.
pub const BEGIN_WITHIN: Duration = Duration::from_secs(5);

/// How long a stop waits for call-backs. An honest exchange takes milliseconds, and a client that has been connected to does not ask
/// again: cut off in the middle it reports a failed fence.
pub const STOP_GRACE: Duration = Duration::from_secs(1);

/// Takes in verified requests and sees each of them through.
pub struct Pipeline {
    shared: Arc<Shared>,
    tasks: Mutex<JoinSet<()>>,
    stopping: watch::Sender<bool>,
}

struct Shared {
    callback: Callback,
    groups: Groups,
    hypervisors: Hypervisors,
    backlog: Backlog,
    replays: Mutex<Replays>,
    ledger: Mutex<Ledger>,
    /// By call-back address and port, how to tell the newest request of each that it is overtaken.
    newest: Mutex<HashMap<SocketAddr, Arc<Notify>>>,
    /// For lines about peers that do not answer or may not: they could be made to come often.
    complaints: LogLimit,
}

impl Pipeline {
    /// A pipeline that answers through `callback` and acts through `hypervisors`. `backlog` is what whoever calls
    /// [`Pipeline::accept`] listens to.
    #[must_use]
    pub fn new(callback: Callback, groups: Groups, hypervisors: Hypervisors, backlog: Backlog) -> Self {
        let complaints = LogLimit::new(20, Duration::from_secs(1));
        let (replays, ledger, newest) = (Mutex::default(), Mutex::default(), Mutex::default());
        let shared = Shared { callback, groups, hypervisors, backlog, replays, ledger, newest, complaints };
        Self { shared: Arc::new(shared), tasks: Mutex::default(), stopping: watch::channel(false).0 }
    }

    /// A request came in. Returns at once; must be called within a tokio runtime.
    pub fn accept(&self, request: Verified) {
        let mut tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        while tasks.try_join_next().is_some() {}
        if *self.stopping.borrow() {
            return;
        }
        if self.shared.is_replay(&request) {
            return debug!(op = %request.op().name(), seqno = request.seqno(), caller = %request.caller(), "a replay");
        }
        let now = Moment::now();
        let waited = now.since(request.arrived());
        if waited > BEGIN_WITHIN {
            self.shared.complain(|held_back| {
                let (op, source) = (request.op().name(), request.caller());
                warn!(%op, domain = %domain(&request), %source, held_back, "not begun, as it waited for {waited:?} before it was read");
            });
            return;
        }
        let mut ledger = self.shared.ledger();
        let from_there = ledger.serving_at(request.caller().ip());
        if tasks.len() >= SERVING_MAX || from_there >= SERVING_MAX_PER_CALLER {
            ledger.turn_away(request.id(), request.caller());
            drop(ledger);
            self.shared.complain(|held_back| {
                let (op, source, all) = (request.op().name(), request.caller(), tasks.len());
                let domain = domain(&request);
                warn!(%op, %domain, %source, held_back, "not begun: {all} are being served, {from_there} of this source");
            });
            return;
        }
        let arrival = ledger.arrive(now.nanos(), request.id(), request.caller());
        drop(ledger);
        match arrival {
            Arrival::Duplicate => {
                debug!(op = %request.op().name(), seqno = request.seqno(), caller = %request.caller(), "a copy");
            }
            Arrival::Serve(ticket) => {
                let shared = Arc::clone(&self.shared);
                let stopping = self.stopping.subscribe();
                let overtaken = shared.enter(request.caller());
                tasks.spawn(async move {
                    let caller = request.caller();
                    shared.serve(request, ticket, &overtaken, stopping).await;
                    shared.leave(caller, &overtaken);
                });
            }
        }
    }

    /// Lets go of what is not claimed within [`STOP_GRACE`] (a client that nobody has connected to asks again) and waits for the
    /// rest, at most `bound`.
    /// Returns how many requests were still unanswered then.
    pub async fn shutdown(&self, bound: Duration) -> usize {
        self.stopping.send_replace(true);
        let mut tasks = std::mem::take(&mut *self.tasks.lock().unwrap_or_else(PoisonError::into_inner));
        let all = async { while tasks.join_next().await.is_some() {} };
        let _ = tokio::time::timeout(bound, all).await;
        let left = tasks.len();
        tasks.abort_all();
        left
    }
}

/// What is said to the peer in the end.
#[derive(Debug)]
struct Answer {
    bytes: Vec<u8>,
    result: &'static str,
    detail: String,
    dead: Option<Moment>,
}

impl Answer {
    fn reply(reply: Reply, detail: impl Into<String>) -> Self {
        Self { bytes: vec![reply.to_wire()], result: reply.name(), detail: detail.into(), dead: None }
    }

    fn outcome(outcome: &Outcome) -> Self {
        let detail = match &outcome.domain {
            Some(domain) => format!("{}: {domain}", outcome.detail),
            None => outcome.detail.to_string(),
        };
        Self { dead: outcome.proven_off, ..Self::reply(outcome.reply, detail) }
    }
}

impl Shared {
    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_replay(&self, request: &Verified) -> bool {
        let mut replays = self.replays.lock().unwrap_or_else(PoisonError::into_inner);
        request.mark().is_some_and(|mark| !replays.is_new(mark))
    }

    fn complain(&self, line: impl FnOnce(u64)) {
        if let Some(held_back) = self.complaints.allow(Moment::now()) {
            line(held_back);
        }
    }

    /// Makes a request the newest of its place: whatever was is told so.
    fn enter(&self, place: SocketAddr) -> Arc<Notify> {
        let overtaken = Arc::new(Notify::new());
        let mut newest = self.newest.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(older) = newest.insert(place, Arc::clone(&overtaken)) {
            older.notify_one();
        }
        overtaken
    }

    /// A request is over; if it is still the newest of its place there is none any more.
    fn leave(&self, place: SocketAddr, overtaken: &Arc<Notify>) {
        let mut newest = self.newest.lock().unwrap_or_else(PoisonError::into_inner);
        if newest.get(&place).is_some_and(|newest| Arc::ptr_eq(newest, overtaken)) {
            newest.remove(&place);
        }
    }

    async fn serve(&self, request: Verified, ticket: Ticket, overtaken: &Notify, mut stopping: watch::Receiver<bool>) {
        let stopped = async {
            let _ = stopping.wait_for(|stopping| *stopping).await;
            tokio::time::sleep(STOP_GRACE).await;
        };
        let called = tokio::select! {
            called = self.callback.call(&request) => Some(called),
            () = overtaken.notified() => None,
            () = stopped => None,
        };
        let peer = match called {
            Some(Ok(peer)) => peer,
            Some(Err(error)) => return self.give_up(&request, ticket, Some(&error)),
            None => return self.give_up(&request, ticket, None),
        };
        let called_back = Moment::now();
        self.backlog.read().await;
        let claimed = self.ledger().claim(called_back.nanos(), ticket);
        let (answer, claim) = match claimed {
            Ok(claim) => (self.answer(&request, &peer).await, Some(claim)),
            Err(NoClaim::Full) => (Answer::reply(Reply::Failure, NoClaim::Full.to_string()), None),
            Err(reason @ (NoClaim::Taken | NoClaim::Superseded)) => return self.tell_moot(&request, reason),
        };
        let steps = Steps {
            arrived: request.arrived(),
            verified: request.verified(),
            called_back: Some(called_back),
            dead: answer.dead,
            replied: None,
        };
        self.finish(&request, peer, claim, answer, steps).await;
    }

    /// The call-back came to nothing. `error` is what went wrong, if anything did.
    fn give_up(&self, request: &Verified, ticket: Ticket, error: Option<&CallbackError>) {
        let (moot, copied) = {
            let mut ledger = self.ledger();
            let found = (ledger.is_moot(&ticket), ledger.has_copies(&ticket));
            ledger.forget(ticket);
            found
        };
        let after = Steps::elapsed(request.arrived(), Moment::now());
        let (op, domain, source) = (request.op().name(), domain(request), request.caller().ip());
        let (seqno, via) = (request.seqno(), request.via());
        match (moot, error) {
            (Some(reason), _) => self.tell_moot(request, reason),
            // The stock client takes one call-back, and refuses or hangs up on the ones to its other addresses.
            (None, Some(error)) if copied => {
                debug!(%op, %domain, %source, seqno, %via, %after, "call-back failed: {error}");
            }
            (None, Some(error)) => self.complain(|held_back| {
                warn!(%op, %domain, %source, seqno, %via, %after, held_back, "call-back failed: {error}");
            }),
            (None, None) => info!(%op, %domain, %source, seqno, %via, %after, "not answered: the daemon is stopping"),
        }
    }

    /// A request that is closed without an answer, because another one was or will be answered.
    fn tell_moot(&self, request: &Verified, reason: NoClaim) {
        let (op, domain, source) = (request.op().name(), domain(request), request.caller().ip());
        let (seqno, via) = (request.seqno(), request.via());
        match reason {
            NoClaim::Taken | NoClaim::Full => debug!(%op, %domain, %source, seqno, %via, "not answered: {reason}"),
            NoClaim::Superseded => self.complain(|held_back| {
                info!(%op, %domain, %source, seqno, %via, held_back, "not answered: {reason}");
            }),
        }
    }

    /// Says the answer, unless something newer was asked from the same place, and tells the log.
    async fn finish(
        &self,
        request: &Verified,
        peer: Authenticated,
        claim: Option<Claim>,
        answer: Answer,
        mut steps: Steps,
    ) {
        self.backlog.read().await;
        let superseded = claim.as_ref().is_some_and(|claim| self.ledger().is_claim_superseded(claim));
        let sent = if superseded { None } else { Some(peer.reply(&answer.bytes).await) };
        let now = Moment::now();
        if let Some(claim) = claim {
            self.ledger().answered(now.nanos(), claim);
        }
        steps.replied = sent.as_ref().is_some_and(Result::is_ok).then_some(now);
        let (reply, note) = told(answer.result, sent.as_ref());
        info!(
            op = %request.op().name(),
            domain = %domain(request),
            source = %request.caller().ip(),
            seqno = request.seqno(),
            via = %request.via(),
            reply = %reply.replace(' ', "-"),
            verified = %steps.since_arrival(Some(steps.verified)),
            called_back = %steps.since_arrival(steps.called_back),
            dead = %steps.since_arrival(steps.dead),
            replied = %steps.since_arrival(steps.replied),
            "{}{note}", answer.detail,
        );
    }

    async fn answer(&self, request: &Verified, peer: &Authenticated) -> Answer {
        match request.op() {
            Op::Null => Answer::reply(Reply::Failure, "null is always answered with failure"),
            Op::DevStatus if self.hypervisors.any_connected() => {
                Answer::reply(Reply::Success, "a hypervisor is connected")
            }
            Op::DevStatus => Answer::reply(Reply::Failure, "no hypervisor is connected"),
            Op::HostList => self.host_list(peer).await,
            Op::Off | Op::Reboot | Op::On | Op::Status => {
                let Some(target) = request.target() else {
                    return Answer::reply(Reply::Failure, "the request names no domain");
                };
                match policy::authorize(&self.groups, peer, request.op(), target.clone()) {
                    Ok(order) => self.carry_out(order, request.arrived()).await,
                    Err(denied) => Answer::reply(Reply::PermissionDenied, denied.to_string()),
                }
            }
        }
    }

    async fn carry_out(&self, order: Authorized, arrived: Moment) -> Answer {
        let left = ANSWER_WITHIN.saturating_sub(Moment::now().since(arrived));
        if left.is_zero() {
            return Answer::reply(Reply::Failure, "the call-back took too long: nothing was begun");
        }
        let hypervisors = self.hypervisors.clone();
        // A task of its own: when the time for the answer is over the client is told, and the kill stays in force.
        let action = tokio::spawn(async move { hypervisors.carry_out(&order).await });
        match tokio::time::timeout(left, action).await {
            Ok(Ok(outcome)) => Answer::outcome(&outcome),
            Ok(Err(_)) => Answer::reply(Reply::Failure, "the action broke off: a bug of ours"),
            Err(_) => Answer::reply(
                Reply::Failure,
                format!("not done {} s after it was asked; what was begun goes on", ANSWER_WITHIN.as_secs()),
            ),
        }
    }

    async fn host_list(&self, peer: &Authenticated) -> Answer {
        let listing = self.hypervisors.list().await;
        let mut bytes = vec![HOST_LIST];
        let mut count = 0;
        for domain in listing.domains.iter().filter(|d| policy::may_see(&self.groups, peer, &d.name, d.uuid)) {
            let record = HostRecord::new(&domain.name, &domain.uuid.to_string(), domain.state);
            bytes.extend_from_slice(record.as_bytes());
            count += 1;
        }
        bytes.extend_from_slice(HostRecord::END.as_bytes());
        bytes.push(Reply::Success.to_wire());
        let mut detail = format!("{count} domains");
        for (uri, error) in &listing.failed {
            detail.push_str(&format!("; none of {uri}: {error}"));
        }
        Answer { bytes, result: Reply::Success.name(), detail, dead: None }
    }
}

/// What the log says that the peer was told, and why if that is nothing: nobody may read a success there that was never said.
fn told(result: &'static str, sent: Option<&io::Result<()>>) -> (&'static str, String) {
    match sent {
        Some(Ok(())) => (result, String::new()),
        Some(Err(error)) => ("undelivered", format!("; the answer could not be delivered: {error}")),
        None => ("none", "; not answered: something newer was asked from the same address and port".to_owned()),
    }
}

fn domain(request: &Verified) -> String {
    request.target().map_or_else(|| "-".to_owned(), ToString::to_string)
}

#[cfg(test)]
mod tests;
