//! Recent requests, their counts, and the duration of each step since the start, for the report.
//!
//! The cost for a request is two or three short locks.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock};

use fence_common::caller::{Caller, Who};
use fence_common::ending::Ending;
use fence_common::sync::lock;
use fence_common::target::Target;
use fence_common::wire::Op;

use super::histogram::Histogram;
use super::results::{ResultTally, Results};
use super::steps::Steps;
use crate::clock::Moment;

/// How many requests are remembered.
pub const RECENT: usize = 64;

/// The operations, in the order in which they are shown.
pub const OPS: [Op; 7] = [Op::Off, Op::Reboot, Op::On, Op::Status, Op::HostList, Op::DevStatus, Op::Null];

/// The timed steps, from the arrival of the datagram.
pub const STEPS: [&str; 4] = ["verified", "called_back", "dead", "replied"];

/// Why a request with a retired key is not served.
pub const RETIRED_KEY: &str = "signed with a key that is no longer accepted";

/// A request that is being served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    number: u64,
    /// Its listener's place in [`Results`].
    came_by: usize,
}

/// The way that a request came in by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, strum::Display)]
#[strum(serialize_all = "lowercase")]
pub enum Via {
    /// Through the kernel program and its ring buffer, whether attached as XDP or as tc.
    Kernel,
    /// Through the UDP socket.
    Socket,
    /// Over a TCP connection of its client.
    Tcp,
    /// Over a vsock connection of its client.
    Vsock,
    /// Over a serial line of the client's domain.
    Serial,
}

impl Via {
    /// The kind of listener, as the configuration names it.
    #[must_use]
    pub fn listener(self) -> &'static str {
        match self {
            Self::Kernel | Self::Socket => "multicast",
            Self::Tcp => "tcp",
            Self::Vsock => "vsock",
            Self::Serial => "serial",
        }
    }
}

/// What is noted of a request.
#[derive(Clone, Copy, Debug)]
pub struct About<'r> {
    /// What is asked.
    pub op: Op,
    /// Of which domain.
    pub target: Option<&'r Target>,
    /// Where it is answered.
    pub client: Caller,
    /// The client as the log knows it.
    pub who: Who<'r>,
    /// The client's number for it.
    pub seqno: u32,
    /// How it came.
    pub via: Via,
    /// The name of the listener's section, if it has one.
    pub listener: Option<&'r str>,
    /// When its datagram arrived.
    pub arrived: Moment,
    /// When its digest was known to be right.
    pub verified: Moment,
}

/// What came of a request.
#[derive(Clone, Debug)]
pub struct Ended {
    /// What the client received, or why it received nothing.
    pub result: Ending,
    /// The whole of it, as in the log.
    pub detail: String,
    /// The steps that it took, if it was answered.
    pub steps: Option<Steps>,
}

impl Ended {
    /// Without an answer.
    #[must_use]
    pub fn unanswered(result: Ending, detail: impl Into<String>) -> Self {
        Self { result, detail: detail.into(), steps: None }
    }
}

/// One request as it is remembered.
#[derive(Clone, Debug)]
pub struct Recent {
    /// Its number since the daemon's start.
    pub number: u64,
    /// What was asked.
    pub op: Op,
    /// Of which domain, escaped.
    pub domain: Option<String>,
    /// The callback's address and port, or the domain and how it is known.
    pub client: String,
    /// The client's number for it.
    pub seqno: u32,
    /// How it came.
    pub via: Via,
    /// The name of the listener's section, if it has one.
    pub listener: Option<String>,
    /// Its steps so far.
    pub steps: Steps,
    /// Its result and its end; `None` while it is being served.
    pub end: Option<(Moment, Ending, String)>,
}

/// How many requests there were.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Being served.
    pub in_progress: u64,
    /// Answered, whatever the answer.
    pub answered: u64,
    /// Begun, and not answered.
    pub unanswered: u64,
    /// Rejected: too late, or too many at once.
    pub rejected: u64,
    /// Duplicates of a request that is being served or was answered: from other addresses, or sent
    /// again.
    pub duplicates: u64,
    /// Datagrams that had come before, bit for bit.
    pub replays: u64,
    /// Signed with a key that is no longer accepted.
    pub retired_key: u64,
}

/// The times of one operation's step.
#[derive(Clone, Debug)]
pub struct Timed {
    /// The operation.
    pub op: Op,
    /// The step, one of [`STEPS`].
    pub step: &'static str,
    /// Its times since the arrival.
    pub times: Histogram,
}

/// Takes each request that has ended.
pub type EndedSink = Box<dyn Fn(Recent) + Send + Sync>;

/// All of it.
pub struct Requests {
    kept: Mutex<Kept>,
    /// Told of each end. Until it is there, nothing is kept for it.
    sink: OnceLock<EndedSink>,
    duplicates: AtomicU64,
    replays: AtomicU64,
}

#[derive(Debug)]
struct Kept {
    recent: VecDeque<Recent>,
    next: u64,
    tally: Tally,
    times: Vec<[Histogram; STEPS.len()]>,
    /// Those that are being served, for the sink: `recent` may have dropped them at their end.
    served: HashMap<u64, Recent>,
    results: Results,
}

impl Default for Requests {
    fn default() -> Self {
        let times = OPS.iter().map(|_| std::array::from_fn(|_| Histogram::default())).collect();
        let recent = VecDeque::with_capacity(RECENT);
        let (served, results) = (HashMap::new(), Results::default());
        let kept = Kept { recent, next: 0, tally: Tally::default(), times, served, results };
        let (duplicates, replays) = (AtomicU64::new(0), AtomicU64::new(0));
        Self { kept: Mutex::new(kept), sink: OnceLock::new(), duplicates, replays }
    }
}

impl fmt::Debug for Requests {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Requests").field("kept", &self.kept).finish_non_exhaustive()
    }
}

impl Kept {
    fn enter(&mut self, request: About<'_>, end: Option<(Moment, Ending, String)>) -> Slot {
        let domain = request.target.map(ToString::to_string);
        let client = match request.client {
            Caller::Ip(address) => address.to_string(),
            Caller::Vsock { .. } | Caller::Line { .. } => request.who.to_string(),
        };
        let number = self.next;
        self.next += 1;
        let came_by = self.results.listener(request.via.listener(), request.listener);
        if let Some((at, ending, _)) = &end {
            self.results.count(came_by, request.op, *ending, *at);
        }
        if self.recent.len() >= RECENT {
            self.recent.pop_front();
        }
        self.recent.push_back(Recent {
            number,
            op: request.op,
            domain,
            client,
            seqno: request.seqno,
            via: request.via,
            listener: request.listener.map(str::to_owned),
            steps: Steps {
                arrived: request.arrived,
                verified: request.verified,
                called_back: None,
                dead: None,
                replied: None,
            },
            end,
        });
        Slot { number, came_by }
    }

    /// The entry of a request, if it still exists.
    fn entry(&mut self, slot: Slot) -> Option<&mut Recent> {
        let first = self.recent.front()?.number;
        self.recent.get_mut(usize::try_from(slot.number.checked_sub(first)?).ok()?)
    }

    fn time(&mut self, op: Op, steps: &Steps) {
        let Some(times) = OPS.iter().position(|known| *known == op).and_then(|index| self.times.get_mut(index)) else {
            return;
        };
        let passed = [Some(steps.verified), steps.called_back, steps.dead, steps.replied];
        for (times, moment) in times.iter_mut().zip(passed) {
            if let Some(moment) = moment {
                times.record(u64::try_from(moment.since(steps.arrived).as_micros()).unwrap_or(u64::MAX));
            }
        }
    }
}

impl Requests {
    fn kept(&self) -> MutexGuard<'_, Kept> {
        lock(&self.kept)
    }

    /// From here on `sink` takes each request that has ended. It must not wait.
    pub fn tell(&self, sink: EndedSink) {
        let _ = self.sink.set(sink);
    }

    /// A request begins to be served.
    #[must_use]
    pub fn begin(&self, request: About<'_>) -> Slot {
        let mut kept = self.kept();
        kept.tally.in_progress += 1;
        let slot = kept.enter(request, None);
        if self.sink.get().is_some()
            && let Some(begun) = kept.recent.back().cloned()
        {
            kept.served.insert(slot.number, begun);
        }
        slot
    }

    /// Records a request that ended before it was served.
    fn ended_at_once(&self, mut kept: MutexGuard<'_, Kept>, request: About<'_>, ending: Ending, why: &'static str) {
        kept.enter(request, Some((Moment::now(), ending, why.to_owned())));
        let ended = kept.recent.back().cloned();
        drop(kept);
        if let Some((sink, ended)) = self.sink.get().zip(ended) {
            sink(ended);
        }
    }

    /// The client has authenticated, and the action is about to begin.
    pub fn called_back(&self, slot: Slot, at: Moment) {
        if let Some(entry) = self.kept().entry(slot) {
            entry.steps.called_back = Some(at);
        }
    }

    /// It is over.
    pub fn over(&self, slot: Slot, op: Op, ended: Ended) {
        let at = Moment::now();
        let mut kept = self.kept();
        kept.tally.in_progress = kept.tally.in_progress.saturating_sub(1);
        if let Some(steps) = &ended.steps {
            kept.time(op, steps);
        }
        kept.results.count(slot.came_by, op, ended.result, at);
        match ended.steps.and_then(|steps| steps.replied) {
            Some(_) => kept.tally.answered += 1,
            None => kept.tally.unanswered += 1,
        }
        let fill = |entry: &mut Recent, detail: String| {
            if let Some(steps) = ended.steps {
                entry.steps = steps;
            }
            entry.end.replace((at, ended.result, detail))
        };
        let served = kept.served.remove(&slot.number);
        let detail = served.as_ref().map(|_| ended.detail.clone());
        let old = kept.entry(slot).and_then(|entry| fill(entry, ended.detail));
        drop(kept);
        drop(old);
        if let (Some(sink), Some(mut served), Some(detail)) = (self.sink.get(), served, detail) {
            fill(&mut served, detail);
            sink(served);
        }
    }

    /// Records a request that was rejected.
    pub fn reject(&self, request: About<'_>, why: &'static str) {
        let mut kept = self.kept();
        kept.tally.rejected += 1;
        self.ended_at_once(kept, request, Ending::Rejected, why);
    }

    /// Records a request whose key was dropped after the kernel program had verified it.
    pub fn retired_key(&self, request: About<'_>) {
        let mut kept = self.kept();
        kept.tally.retired_key += 1;
        self.ended_at_once(kept, request, Ending::RetiredKey, RETIRED_KEY);
    }

    /// A duplicate came.
    pub fn duplicate(&self) {
        self.duplicates.fetch_add(1, Ordering::Relaxed);
    }

    /// A replay came.
    pub fn replay(&self) {
        self.replays.fetch_add(1, Ordering::Relaxed);
    }

    /// How many there were.
    #[must_use]
    pub fn tally(&self) -> Tally {
        let (duplicates, replays) = (self.duplicates.load(Ordering::Relaxed), self.replays.load(Ordering::Relaxed));
        Tally { duplicates, replays, ..self.kept().tally }
    }

    /// How many ended in each way, of each operation and listener; only ways in which some did.
    #[must_use]
    pub fn counted(&self) -> Vec<ResultTally> {
        self.kept().results.counted()
    }

    /// When each operation succeeded last, of those that did.
    #[must_use]
    pub fn successes(&self) -> Vec<(Op, Moment)> {
        self.kept().results.successes()
    }

    /// Those of late, the oldest first.
    #[must_use]
    pub fn recent(&self) -> Vec<Recent> {
        self.kept().recent.iter().cloned().collect()
    }

    /// The times of each operation's steps that were taken at least once.
    #[must_use]
    pub fn times(&self) -> Vec<Timed> {
        let kept = self.kept();
        let of_op = |(op, times): (&Op, &[Histogram; STEPS.len()])| {
            let op = *op;
            let taken = STEPS.into_iter().zip(times.clone()).filter(|(_, times)| times.count() > 0);
            taken.map(move |(step, times)| Timed { op, step, times }).collect::<Vec<_>>()
        };
        OPS.iter().zip(&kept.times).flat_map(of_op).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;
    use std::time::Duration;

    use super::*;

    fn request(op: Op, target: &Target) -> About<'_> {
        let (client, now) = (Caller::from(SocketAddr::from(([192, 168, 122, 11], 1229))), Moment::now());
        let who = Who::of(client.address(), 0);
        let (via, listener) = (Via::Socket, None);
        About { op, target: Some(target), client, who, seqno: 7, via, listener, arrived: now, verified: now }
    }

    fn answered(request: About<'_>, dead: u64, replied: u64) -> Ended {
        let after = |micros| Some(request.arrived.plus(Duration::from_micros(micros)));
        let steps = Steps {
            arrived: request.arrived,
            verified: request.arrived.plus(Duration::from_micros(50)),
            called_back: after(300),
            dead: after(dead),
            replied: after(replied),
        };
        Ended { result: Ending::Success, detail: "was running, destroyed".to_owned(), steps: Some(steps) }
    }

    #[test]
    fn a_request_is_seen_from_its_beginning_to_its_end() {
        let requests = Requests::default();
        let target = Target::Name("node\n1".to_owned());
        let off = request(Op::Off, &target);
        let slot = requests.begin(off);
        requests.called_back(slot, Moment::now());
        let seen = requests.recent().remove(0);
        assert_eq!(
            (seen.op, seen.domain.as_deref(), seen.client.as_str()),
            (Op::Off, Some("node\\n1"), "192.168.122.11:1229")
        );
        assert!(seen.end.is_none() && seen.steps.called_back.is_some() && seen.steps.replied.is_none());
        assert_eq!(requests.tally(), Tally { in_progress: 1, ..Tally::default() });

        requests.over(slot, Op::Off, answered(off, 2000, 2100));
        let seen = requests.recent().remove(0);
        assert!(matches!(seen.end, Some((_, Ending::Success, _))), "{seen:?}");
        let (kind, name, ending) = ("multicast", None, Ending::Success);
        assert_eq!(requests.counted(), [ResultTally { kind, name, op: Op::Off, ending, count: 1 }]);
        assert_eq!(requests.successes().iter().map(|(op, _)| *op).collect::<Vec<_>>(), [Op::Off]);
        assert_eq!(requests.tally(), Tally { answered: 1, ..Tally::default() });
        let times: Vec<_> = requests.times().iter().map(|timed| (timed.op, timed.step, timed.times.max())).collect();
        assert_eq!(
            times,
            [
                (Op::Off, "verified", 50),
                (Op::Off, "called_back", 300),
                (Op::Off, "dead", 2000),
                (Op::Off, "replied", 2100)
            ]
        );
    }

    #[test]
    fn only_the_last_ones_are_remembered_and_all_are_counted() {
        let requests = Requests::default();
        let target = Target::Name("x".to_owned());
        let status = request(Op::Status, &target);
        let slots: Vec<_> = (0..RECENT + 10).map(|_| requests.begin(status)).collect();
        // The first entries are gone already: their end is counted, and changes no other entry.
        for slot in &slots[..20] {
            requests.over(*slot, Op::Status, Ended::unanswered(Ending::NoCallback, "nobody there"));
        }
        requests.reject(status, "too late");
        requests.duplicate();
        requests.replay();
        requests.replay();
        let recent = requests.recent();
        assert_eq!(recent.len(), RECENT);
        assert!(recent.iter().map(|recent| recent.number).eq(11..75));
        let over = |recent: &Recent| recent.end.is_some();
        assert_eq!(recent.iter().map(over).collect::<Vec<_>>().iter().filter(|over| **over).count(), 9 + 1);
        assert!(recent[..9].iter().all(over) && over(&recent[RECENT - 1]));
        let tally = requests.tally();
        assert_eq!((tally.in_progress, tally.unanswered, tally.rejected), (54, 20, 1));
        assert_eq!((tally.duplicates, tally.replays, tally.answered), (1, 2, 0));
        assert!(requests.times().is_empty(), "what was not answered has no times");
        assert!(requests.successes().is_empty());
        let counted: Vec<_> = requests.counted().into_iter().map(|one| (one.ending, one.count)).collect();
        assert_eq!(counted, [(Ending::NoCallback, 20), (Ending::Rejected, 1)]);
    }

    #[test]
    fn each_end_is_told_also_of_requests_that_are_not_remembered() {
        let (requests, told) = (Requests::default(), std::sync::Arc::new(Mutex::new(Vec::new())));
        let target = Target::Name("x".to_owned());
        let off = request(Op::Off, &target);
        let unnoticed = requests.begin(off);
        let list = std::sync::Arc::clone(&told);
        requests.tell(Box::new(move |ended| lock(&list).push(ended)));
        let slots: Vec<_> = (0..RECENT + 10).map(|_| requests.begin(off)).collect();
        for slot in &slots {
            requests.over(*slot, Op::Off, answered(off, 2000, 2100));
        }
        requests.over(unnoticed, Op::Off, answered(off, 1, 2));
        requests.reject(off, "too late");
        let told = lock(&told);
        assert_eq!(told.len(), RECENT + 10 + 1);
        assert!(told.iter().take(RECENT + 10).all(|one| one.steps.dead.is_some()), "{told:?}");
        assert!(told.iter().map(|one| one.number).eq((1..).take(told.len())));
        assert_eq!(told.last().and_then(|one| one.end.as_ref()).map(|end| end.1), Some(Ending::Rejected));
        assert!(requests.kept().served.is_empty());
    }

    #[test]
    fn requests_are_counted_by_listener_operation_and_result() {
        let requests = Requests::default();
        let target = Target::Name("x".to_owned());
        let by = |via, listener| About { via, listener, ..request(Op::Reboot, &target) };
        for (about, result) in [
            (by(Via::Kernel, Some("dmz")), Ending::Failure),
            (by(Via::Socket, Some("dmz")), Ending::Failure),
            (by(Via::Tcp, Some("dmz")), Ending::Failure),
            (by(Via::Serial, None), Ending::NoCallback),
        ] {
            requests.over(requests.begin(about), Op::Reboot, Ended::unanswered(result, ""));
        }
        requests.retired_key(by(Via::Kernel, None));
        let counted: Vec<_> =
            requests.counted().into_iter().map(|one| (one.kind, one.name, one.ending.name(), one.count)).collect();
        let dmz = || Some("dmz".to_owned());
        assert_eq!(
            counted,
            [
                ("multicast", dmz(), "failure", 2),
                ("tcp", dmz(), "failure", 1),
                ("serial", None, "no callback", 1),
                ("multicast", None, "retired key", 1),
            ]
        );
    }
}
