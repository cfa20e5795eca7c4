//! Builds the report for the control socket. It reads the state that other parts keep, and asks the
//! kernel for its counters and for where the interfaces lead.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fence_common::verdict::Counters;
use fence_config::{Alone, Multicast};
use fence_control::report::{
    Bucket, Daemon, Domain, Health, Interface, Kernel, Latency, Listener, RejectedSource, Report, Request,
    Requests as RequestsView, Restart, SCHEMA, Source, Steps, Uri,
};
use fence_net::way_out;
use tokio::sync::watch;

use super::tcp;
use crate::clock::Moment;
use crate::hypervisor::{DomainState, DomainView, Hypervisors, UriView};
use crate::intake::kernel::CounterReader;
use crate::intake::listener::Heard;
use crate::intake::listening::HeardInterface;
use crate::intake::socket::RequestSocket;
use crate::intake::tcp::Intake;
use crate::observe::requests::{Recent, Requests, Timed};
use crate::observe::sources::{self, RejectedView, SourceView};

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

/// What can be looked at.
pub struct Inspector {
    started: Moment,
    listener: Listener,
    alone: Alone,
    /// Whether there is to be a kernel program.
    program_wanted: bool,
    /// Not kept: the membership goes with it.
    socket: Weak<RequestSocket>,
    hypervisors: Hypervisors,
    requests: Arc<Requests>,
    phase: AtomicU8,
    heard: OnceLock<watch::Receiver<Heard>>,
    kernel: OnceLock<CounterReader>,
    sources: OnceLock<sources::Provider>,
    rejected: OnceLock<sources::RejectedProvider>,
    tcp: OnceLock<Arc<Intake>>,
}

impl Inspector {
    /// An inspector of a daemon that is starting.
    #[must_use]
    pub fn new(
        multicast: &Multicast,
        socket: &Arc<RequestSocket>,
        hypervisors: Hypervisors,
        program_wanted: bool,
    ) -> Self {
        let listener = Listener {
            group: multicast.group.to_string(),
            port: multicast.port,
            hash: multicast.hash.name().to_owned(),
            auth: multicast.auth.name().to_owned(),
            attach: multicast.attach.name().to_owned(),
            alone: <&str>::from(multicast.alone).to_owned(),
            hears: false,
            status: String::new(),
            interfaces: Vec::new(),
        };
        Self {
            started: Moment::now(),
            listener,
            alone: multicast.alone,
            program_wanted,
            socket: Arc::downgrade(socket),
            hypervisors,
            requests: Arc::default(),
            phase: AtomicU8::new(Phase::Starting as u8),
            heard: OnceLock::new(),
            kernel: OnceLock::new(),
            sources: OnceLock::new(),
            rejected: OnceLock::new(),
            tcp: OnceLock::new(),
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

    /// Where the listener says what it hears.
    pub fn set_heard(&self, heard: watch::Receiver<Heard>) {
        let _ = self.heard.set(heard);
    }

    /// The kernel program's counters, once it is loaded.
    pub fn set_kernel(&self, kernel: CounterReader) {
        let _ = self.kernel.set(kernel);
    }

    /// The kernel program's sources, once it is loaded.
    pub fn set_sources(&self, sources: sources::Provider) {
        let _ = self.sources.set(sources);
    }

    /// The senders that the kernel program rejected, once it is loaded.
    pub fn set_rejected(&self, rejected: sources::RejectedProvider) {
        let _ = self.rejected.set(rejected);
    }

    /// The tcp listener, if one is configured.
    pub fn set_tcp(&self, tcp: Arc<Intake>) {
        let _ = self.tcp.set(tcp);
    }

    /// The sources whose requests were rejected before any digest, the latest one first.
    #[must_use]
    pub fn rejected(&self) -> Vec<RejectedView> {
        let in_kernel = self.rejected.get().map(|rejected| rejected()).unwrap_or_default();
        let at_socket = self.socket.upgrade().map(|socket| socket.rejected()).unwrap_or_default();
        RejectedView::together(in_kernel.into_iter().chain(at_socket))
    }

    /// How it is now.
    #[must_use]
    pub fn report(&self) -> Report {
        let now = ReportTime {
            moment: Moment::now(),
            wall: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default(),
        };
        let heard = self.heard.get().map(|heard| heard.borrow().clone()).unwrap_or_default();
        let phase = self.phase.load(Ordering::Relaxed);
        let listener = self.listener(&heard);
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
        let program_missing =
            self.program_wanted && !heard.loading && heard.interfaces.iter().any(|one| one.mode.is_none());
        let tcp = self.tcp.get().map(|intake| tcp::view(intake));
        let mut problems = problems(&listener, program_missing, &uris, &restarts);
        problems.extend(tcp.as_ref().and_then(tcp::problem));
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
            listener,
            tcp,
            kernel: self.kernel.get().map(|kernel| Kernel { counters: kernel.counters().ok().map(by_name) }),
            socket: self.socket.upgrade().map(|socket| by_name(socket.counters())).unwrap_or_default(),
            requests: self.requests_view(&now),
            sources: self
                .sources
                .get()
                .map_or_else(Vec::new, |sources| sources().into_iter().map(|source| now.source(source)).collect()),
            rejected_sources: self.rejected().into_iter().map(|view| now.rejected_source(view)).collect(),
            uris,
            restarts,
            latency: self.requests.times().into_iter().map(latency).collect(),
        }
    }

    fn listener(&self, heard: &Heard) -> Listener {
        let interface = |one: &HeardInterface| {
            let way_out = way_out(one.interface.index);
            Interface {
                name: one.interface.name.clone(),
                program: one.mode.map(|mode| mode.to_string()),
                program_id: heard.programs.get(&one.interface.index).copied(),
                reason: one.reason.clone().map(clip),
                alone: match self.alone {
                    Alone::Auto => way_out.is_none(),
                    Alone::Yes => true,
                    Alone::No => false,
                },
                way_out,
            }
        };
        let interfaces: Vec<_> = heard.interfaces.iter().map(interface).collect();
        let mut status =
            if heard.status.is_empty() { "looking for interfaces".to_owned() } else { heard.status.clone() };
        if !interfaces.is_empty() && interfaces.iter().all(|interface| interface.alone) {
            status.push_str(", alone");
        }
        Listener { hears: heard.hears, status, interfaces, ..self.listener.clone() }
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
            recent: self.requests.recent().into_iter().rev().map(|recent| now.request(recent)).collect(),
        }
    }
}

/// The first way out of an interface, in words, as the kernel sees it now.
fn way_out(interface: u32) -> Option<String> {
    match way_out::of(interface) {
        Ok(ways) => ways.first().map(ToString::to_string),
        Err(error) => Some(format!("an unknown way (the kernel does not say: {error})")),
    }
}

/// What is wrong, and what to do about it.
fn problems(listener: &Listener, program_missing: bool, uris: &[Uri], restarts: &[Restart]) -> Vec<String> {
    let mut problems = Vec::new();
    if !listener.hears {
        problems.push(format!("no request is heard: {}", listener.status));
    }
    if program_missing {
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

fn latency(timed: Timed) -> Latency {
    let times = &timed.times;
    Latency {
        op: timed.op.name().to_owned(),
        step: timed.step.to_owned(),
        count: times.count(),
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

fn clip(text: String) -> String {
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
        let listener = Listener { hears: true, ..report.listener };
        let told = |waiting_ms, pause_ms| {
            let restart = Restart { waiting_ms, pause_ms, ..report.restarts[0].clone() };
            problems(&listener, false, &[], &[restart])
        };
        assert!(told(9_000, 0).is_empty() && told(42_000, 40_000).is_empty());
        for (waiting_ms, pause_ms) in [(11_000, 0), (51_000, 40_000)] {
            let told = told(waiting_ms, pause_ms);
            assert!(told[0].contains("node3 was rebooted and is not started again"), "{told:?}");
        }
    }
}
