//! Builds the report for the control socket. It reads the state that other parts keep, and asks the
//! kernel for its counters and for where the interfaces lead.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fence_common::sync::Current;
use fence_common::verdict::Counters;
use fence_common::wire::Op;
use fence_control::report::{
    Bucket, Daemon, Domain, Health, Kernel, Latency, Listener, RejectedSource, Report, Request,
    Requests as RequestsView, Restart, ResultCount, SCHEMA, Source, Steps, Uri,
};

use super::multicast::Watched;
use super::{cluster, serial, tcp, vsock};
use crate::clock::Moment;
use crate::hosts::Hosts;
use crate::hypervisor::{DomainState, DomainView, Hypervisors, UriView};
use crate::intake::judge::Judge;
use crate::intake::serial::LineIntake;
use crate::intake::tcp::TcpIntake;
use crate::intake::vsock::VsockIntake;
use crate::observe::requests::{Recent, Requests, Timed};
use crate::observe::results::ResultTally;
use crate::observe::sources::{RejectedView, SourceView};

/// A restart that takes longer, without its pause, is reported as a problem: libvirt usually needs
/// less than a second.
const RESTART_SLOW: Duration = Duration::from_secs(10);

/// Words that a log line may have more of.
const DETAIL_MAX: usize = 300;

/// How far the daemon has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Not ready yet.
    Starting = 0,
    /// Ready.
    Serving = 1,
    /// Asked to stop.
    Stopping = 2,
}

/// The listeners that can be looked at.
#[derive(Clone, Default)]
pub struct ListenerViews {
    /// Those of multicast groups.
    pub multicasts: Vec<Arc<Watched>>,
    /// Those of TCP ports.
    pub tcps: Vec<Arc<TcpIntake>>,
    /// Those of vsock ports.
    pub vsocks: Vec<Arc<VsockIntake>>,
    /// Those of serial lines.
    pub serials: Vec<Arc<LineIntake>>,
}

/// What can be looked at.
pub struct Inspector {
    started: Moment,
    listeners: Current<ListenerViews>,
    judge: Judge,
    hypervisors: Hypervisors,
    requests: Arc<Requests>,
    phase: AtomicU8,
    hosts: OnceLock<Hosts>,
}

impl Inspector {
    /// An inspector of a daemon that is starting. `judge` is that of any listener.
    #[must_use]
    pub fn new(multicasts: Vec<Arc<Watched>>, judge: Judge, hypervisors: Hypervisors) -> Self {
        Self {
            started: Moment::now(),
            listeners: ListenerViews { multicasts, ..ListenerViews::default() }.into(),
            judge,
            hypervisors,
            requests: Arc::default(),
            phase: AtomicU8::new(Phase::Starting as u8),
            hosts: OnceLock::new(),
        }
    }

    /// Where requests are to be noted.
    #[must_use]
    pub fn requests(&self) -> Arc<Requests> {
        Arc::clone(&self.requests)
    }

    /// The daemon has come so far.
    pub fn enter(&self, phase: Phase) {
        self.phase.store(phase as u8, Ordering::Relaxed);
    }

    /// The listeners.
    #[must_use]
    pub fn listeners(&self) -> Arc<ListenerViews> {
        self.listeners.now()
    }

    /// These are the listeners from now on.
    pub fn set_listeners(&self, listeners: ListenerViews) {
        self.listeners.set(listeners);
    }

    /// The hosts that answer together.
    pub fn set_hosts(&self, hosts: Hosts) {
        let _ = self.hosts.set(hosts);
    }

    /// The sources whose requests were rejected before any digest, the latest one first.
    #[must_use]
    pub fn rejected(&self) -> Vec<RejectedView> {
        let listeners = self.listeners();
        let in_kernel = listeners.multicasts.iter().flat_map(|multicast| multicast.rejected());
        RejectedView::together(in_kernel.chain(self.judge.rejected()))
    }

    /// The counters of all kernel programs: `None` without any, and `None` within if the kernel
    /// does not tell.
    fn in_kernel(&self) -> Option<Option<Counters>> {
        let listeners = self.listeners();
        let mut each = listeners.multicasts.iter().filter_map(|multicast| multicast.in_kernel()).peekable();
        each.peek()?;
        Some(each.try_fold(Counters::default(), |all, one| Some(sum(all, one?))))
    }

    /// How it is now.
    #[must_use]
    pub fn report(&self) -> Report {
        let now = ReportTime {
            moment: Moment::now(),
            wall: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default(),
        };
        let phase = self.phase.load(Ordering::Relaxed);
        let watched = self.listeners();
        let ListenerViews { multicasts, tcps, vsocks, serials } = &*watched;
        let views = multicasts.iter().map(|multicast| multicast.view());
        let tcps = tcps.iter().map(|intake| tcp::view(intake));
        let vsocks = vsocks.iter().map(|intake| vsock::view(intake));
        let serials = serials.iter().map(|intake| serial::view(intake));
        let listeners: Vec<_> = views.chain(tcps).chain(vsocks).chain(serials).collect();
        let (uris, restarts) = (self.hypervisors.view(), self.hypervisors.restarts());
        let uris: Vec<_> = uris.into_iter().map(|uri| now.uri(uri)).collect();
        let restarts: Vec<_> = restarts
            .into_iter()
            .map(|restart| Restart {
                uri: restart.plan.domain.uri.to_string(),
                name: restart.plan.domain.name.clone(),
                uuid: restart.plan.domain.uuid.to_string(),
                waiting_ms: now.ago(restart.since),
                pause_ms: millis(restart.not_before.since(restart.since)),
                inherited: restart.plan.inherited,
                held: restart.plan.held,
                attempts: restart.attempts,
                reason: restart.reason.map(clip),
            })
            .collect();
        let lacks_program = multicasts.iter().any(|multicast| multicast.lacks_program());
        let hosts = self.hosts.get().map(Hosts::view);
        let mut problems = problems(&listeners, lacks_program, &uris, &restarts);
        problems.extend(hosts.iter().flat_map(cluster::problems));
        let health = match phase {
            0 => Health::Starting,
            1 if problems.is_empty() => Health::Serving,
            1 => Health::Degraded,
            _ => Health::Stopping,
        };
        Report {
            schema: SCHEMA,
            health,
            problems,
            daemon: Daemon {
                version: env!("CARGO_PKG_VERSION").to_owned(),
                pid: std::process::id(),
                uptime_ms: now.ago(self.started),
                now_unix_ms: millis(now.wall),
            },
            listeners,
            kernel: self.in_kernel().map(|counters| Kernel { counters: counters.map(by_name) }),
            socket: multicasts
                .iter()
                .map(|multicast| multicast.at_socket())
                .reduce(sum)
                .map(by_name)
                .unwrap_or_default(),
            requests: self.requests_view(&now),
            sources: multicasts
                .iter()
                .flat_map(|multicast| multicast.sources())
                .map(|source| now.source(source))
                .collect(),
            rejected_sources: self.rejected().into_iter().map(|view| now.rejected_source(view)).collect(),
            uris,
            restarts,
            cluster: hosts.map(|view| cluster::cluster(&view, now.moment)),
            latency: self.requests.times().into_iter().map(latency).collect(),
        }
    }

    fn requests_view(&self, now: &ReportTime) -> RequestsView {
        let tally = self.requests.tally();
        RequestsView {
            in_progress: tally.in_progress,
            answered: tally.answered,
            unanswered: tally.unanswered,
            rejected: tally.rejected,
            duplicates: tally.duplicates,
            replays: tally.replays,
            retired_key: tally.retired_key,
            results: self.requests.counted().into_iter().map(result_count).collect(),
            last_success_unix_ms: self.requests.successes().into_iter().map(|(op, at)| now.success(op, at)).collect(),
            recent: self.requests.recent().into_iter().rev().map(|recent| now.request(recent)).collect(),
        }
    }
}

fn sum(mut one: Counters, other: Counters) -> Counters {
    one.add(&other);
    one
}

/// What is wrong, and what to do about it.
fn problems(listeners: &[Listener], lacks_program: bool, uris: &[Uri], restarts: &[Restart]) -> Vec<String> {
    let mut problems = Vec::new();
    for listener in listeners.iter().filter(|listener| !listener.hears) {
        let status = &listener.status;
        problems.push(match (listener.is_multicast(), listeners.len()) {
            (true, 1) => format!("no request is heard: {status}"),
            (true, _) => format!("no request is heard by {}: {status}", listener.label()),
            (false, _) => format!("no client can connect by {}: {status}", listener.label()),
        });
    }
    if lacks_program {
        problems.push(
            "the kernel program is not attached, and requests come through the socket alone: the same answers, but a flood costs the \
             daemon's time; its log says why (\"serving without the kernel program\")"
                .to_owned(),
        );
    }
    for uri in uris {
        let name = &uri.uri;
        if !uri.connected {
            let known = match (uri.local, uri.domains.iter().any(|domain| domain.pid.is_some())) {
                (true, true) => "domains whose process is known can be fenced all the same",
                _ => "its domains cannot be fenced",
            };
            let why = uri.last_error.as_deref().unwrap_or("not connected yet");
            problems
                .push(format!("{name} is not connected ({why}): {known}; see whether `virsh -c {name} list` works"));
        } else if uri.silent {
            problems.push(format!("{name} is connected and does not answer: see whether `virsh -c {name} list` does"));
        }
        for domain in uri.domains.iter().filter(|domain| !domain.orphans.is_empty()) {
            let pids: Vec<_> = domain.orphans.iter().map(ToString::to_string).collect();
            problems.push(format!(
                "{} runs on although libvirt has lost it (process {}): `off` ends it",
                domain.name.escape_debug(),
                pids.join(", ")
            ));
        }
    }
    let is_slow =
        |restart: &&Restart| u128::from(restart.waiting_ms.saturating_sub(restart.pause_ms)) > RESTART_SLOW.as_millis();
    for restart in restarts.iter().filter(is_slow) {
        let (name, seconds, uri) = (restart.name.escape_debug(), restart.waiting_ms / 1000, &restart.uri);
        let why = restart.reason.as_ref().map(|why| format!(" ({why})")).unwrap_or_default();
        if restart.held && !restart.inherited {
            problems.push(format!("{name} was rebooted and cannot be started again{why}: start it by hand"));
            continue;
        }
        if restart.held {
            problems.push(format!(
                "{name} was killed for a reboot {seconds} s ago by an earlier daemon, too long ago to start it unasked: see that it runs \
                 nowhere else, then fence it with `on` (or with `off`, and it stays off)"
            ));
            continue;
        }
        problems.push(format!(
            "{name} was rebooted and is not started again since {seconds} s{why}, which is tried on: see whether `virsh -c {uri} start \
             {name}` works"
        ));
    }
    problems
}

pub(super) fn by_name(counters: Counters) -> BTreeMap<String, u64> {
    counters.iter().map(|(name, value)| (name.to_owned(), value)).collect()
}

fn result_count(counted: ResultTally) -> ResultCount {
    ResultCount {
        listener: counted.kind.to_owned(),
        name: counted.name,
        op: counted.op.name().to_owned(),
        result: counted.ending.name().to_owned(),
        count: counted.count,
    }
}

fn latency(timed: Timed) -> Latency {
    let times = &timed.times;
    Latency {
        op: timed.op.name().to_owned(),
        step: timed.step.to_owned(),
        count: times.count(),
        sum_us: times.sum(),
        p50_us: times.quantile(500),
        p99_us: times.quantile(990),
        max_us: times.max(),
        buckets: times.buckets().map(|(le_us, count)| Bucket { le_us, count }).collect(),
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// The moment of the report, by both clocks.
struct ReportTime {
    moment: Moment,
    wall: Duration,
}

impl ReportTime {
    /// How long ago, in milliseconds.
    fn ago(&self, when: Moment) -> u64 {
        millis(self.moment.since(when))
    }

    fn success(&self, op: Op, at: Moment) -> (String, u64) {
        (op.name().to_owned(), millis(self.wall.saturating_sub(self.moment.since(at))))
    }

    fn uri(&self, view: UriView) -> Uri {
        let (last_error_at, last_error) = view.last_error.unzip();
        Uri {
            uri: view.uri.to_string(),
            connected: view.connected,
            silent: view.silent,
            for_ms: view.since.map(|since| self.ago(since)),
            last_error: last_error.map(clip),
            last_error_ms: last_error_at.map(|at| self.ago(at)),
            local: view.local,
            domains: view.domains.into_iter().map(domain).collect(),
        }
    }

    fn request(&self, recent: Recent) -> Request {
        let after = |moment: Moment| u64::try_from(moment.since(recent.steps.arrived).as_micros()).unwrap_or(u64::MAX);
        let steps = Steps {
            verified_us: after(recent.steps.verified),
            called_back_us: recent.steps.called_back.map(after),
            dead_us: recent.steps.dead.map(after),
            replied_us: recent.steps.replied.map(after),
            ended_us: recent.end.as_ref().map(|(at, _, _)| after(*at)),
        };
        let (result, detail) = recent.end.map(|(_, result, detail)| (result.name().to_owned(), clip(detail))).unzip();
        let age = self.moment.since(recent.steps.arrived);
        Request {
            number: recent.number,
            arrived_unix_ms: millis(self.wall.saturating_sub(age)),
            op: recent.op.name().to_owned(),
            domain: recent.domain,
            client: recent.client,
            seqno: recent.seqno,
            via: recent.via.to_string(),
            listener: recent.listener,
            result,
            detail,
            steps,
        }
    }

    fn rejected_source(&self, view: RejectedView) -> RejectedSource {
        RejectedSource {
            address: view.address.to_string(),
            mac: view.mac.map(in_text),
            counter: view.verdict.counter_name().unwrap_or_default().to_owned(),
            count: view.count,
            last_seen_ms: self.ago(view.last_seen),
        }
    }

    fn source(&self, view: SourceView) -> Source {
        Source {
            address: view.address.to_string(),
            mac: view.mac.map(in_text),
            trusted: view.trusted,
            failures: view.failures,
            delivered: view.delivered,
            limited: view.limited,
            last_seen_ms: view.last_seen.map(|seen| self.ago(seen)),
        }
    }
}

fn state_in_words(state: DomainState) -> String {
    let word = match state {
        DomainState::Active(state) => return state,
        DomainState::Off => "shut off",
        DomainState::MovedAway => "moved away",
        DomainState::Dying => "dying",
        DomainState::Dead => "dead",
        DomainState::Lost => "lost",
    };
    word.to_owned()
}

fn domain(view: DomainView) -> Domain {
    Domain {
        name: view.name,
        uuid: view.uuid.to_string(),
        state: state_in_words(view.state),
        pid: view.pid,
        persistent: view.persistent,
        fresh: view.fresh,
        orphans: view.orphans,
        unseen: view.unseen,
    }
}

pub(super) fn clip(text: String) -> String {
    match text.char_indices().nth(DETAIL_MAX) {
        Some((at, _)) => format!("{}…", text.get(..at).unwrap_or_default()),
        None => text,
    }
}

/// An Ethernet address as people write it.
fn in_text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// libvirt's own states have libvirt's names.
    #[test]
    fn the_reference_explains_each_state_of_a_domain_that_is_ours() {
        let (page, schema) = (
            include_str!("../../../docs/reference/inspect.md"),
            include_str!("../../../docs/reference/status.schema.json"),
        );
        let (_, page) = page.split_once("### Domains").unwrap();
        let (_, schema) = schema.split_once("\"state\": {").unwrap();
        let (page, schema) = (page.split_once("\n### ").unwrap().0, schema.split_once('}').unwrap().0);
        for state in
            [DomainState::Off, DomainState::MovedAway, DomainState::Dying, DomainState::Dead, DomainState::Lost]
        {
            let word = format!("`{}`", state_in_words(state));
            assert!(page.contains(&word) && schema.contains(&word), "{word}");
        }
    }

    #[test]
    fn a_restart_is_slow_when_it_is_late_after_its_pause() {
        let report = fence_control::client::parse(include_str!("../../../docs/reference/status.example.json")).unwrap();
        let listeners = [Listener { hears: true, ..report.listeners[0].clone() }];
        let told = |waiting_ms, pause_ms| {
            let restart = Restart { waiting_ms, pause_ms, ..report.restarts[0].clone() };
            problems(&listeners, false, &[], &[restart])
        };
        assert!(told(9_000, 0).is_empty() && told(42_000, 40_000).is_empty());
        for (waiting_ms, pause_ms) in [(11_000, 0), (51_000, 40_000)] {
            let told = told(waiting_ms, pause_ms);
            assert!(told[0].contains("node3 was rebooted and is not started again"), "{told:?}");
        }
    }
}
