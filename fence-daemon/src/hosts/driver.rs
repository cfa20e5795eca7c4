//! The driver: feeds the machine that decides (`fence_common::hosts`) with what happens in the
//! group and on this host, and carries out what it decides.
//!
//! One task owns the machine. Whatever waits (libvirt, a kill, corosync) is a task of its own, and
//! reports back. So a hung libvirt keeps no message from being heard.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use fence_common::hosts::{
    ActEnd, GroupNote, GroupOrder, GuestAddress, HostDomain, Hosts as Machine, HostsOptions, Incarnation, Look,
    Member as Daemon, NoMessage, NodeId, Output, Question,
};
use fence_common::keys::Keys;
use fence_common::ledger::RequestId;
use fence_common::wire::Op;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep_until};
use tracing::{info, warn};

use super::elections::Elections;
use super::handle::{Hosts, HostsAnswer, HostsClient, HostsQuestion, Wish};
use super::local::{self, Verdict};
use super::proof::{How, LastHeard, fenced_since};
use super::transport::{Event, Member, Transport};
use super::view::Shown;
use super::watch::GroupWatch;
use crate::clock::Moment;
use crate::fault::{self, Point};
use crate::hypervisor::{Deadline, Hypervisors, Requester};
use crate::policy::Authorized;

/// The longest sleep of the driver.
const TICK: Duration = Duration::from_secs(1);

/// How much longer a sleep may take before the driver counts as stalled. What waited meanwhile is
/// too old to act on.
const STALLED: Duration = Duration::from_secs(2);

/// How long a message may wait for corosync. Its question is lost then.
const SENT_WITHIN: Duration = Duration::from_secs(5);

/// How long the domains may go on changing before the other hosts hear of it.
const TOLD_WITHIN: Duration = Duration::from_millis(250);

/// How long Pacemaker may take to say whether it has fenced a host.
const HISTORY_WITHIN: Duration = Duration::from_secs(5);

/// How much older than Pacemaker says a fencing may be: its clock has seconds, and is another
/// host's.
const HISTORY_DOUBT: Duration = Duration::from_secs(3);

/// What the driver needs of the daemon.
pub struct Parts {
    /// What acts on this host.
    pub hypervisors: Hypervisors,
    /// The accepted keys, at each moment. The first one signs.
    pub keys: Box<dyn Fn() -> Arc<Keys> + Send>,
    /// What was done a short time before the start: it is not done again.
    pub recent: Vec<RequestId>,
    /// Notes what is about to be done, so that the next daemon does not do it again.
    pub note: Box<dyn Fn(RequestId) + Send>,
    /// Whether this host's Pacemaker can say which hosts it has fenced.
    pub has_fencing: bool,
    /// Random bytes of this start.
    pub incarnation: [u8; 16],
}

impl fmt::Debug for Parts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Parts").field("has_fencing", &self.has_fencing).finish_non_exhaustive()
    }
}

/// What a task of this host has found or done.
enum HostWork {
    Looked(u64, Look),
    Listed(u64, Result<Vec<HostDomain>, String>),
    Checked(u64, Result<(), String>),
    Acted { act: u64, request: RequestId, end: ActEnd, changes: u64, verdict: Verdict },
    Fenced { node: NodeId, said: Moment, ago: Duration, stays_off: bool },
    Domains(Vec<HostDomain>),
    Addresses(Vec<GuestAddress>),
}

/// A client's request that this host has put to all.
struct Open {
    request: RequestId,
    requester: Option<Requester>,
    answer: oneshot::Sender<HostsAnswer>,
    /// What came of it here.
    here: Option<Verdict>,
}

struct HostsDriver {
    /// `None` before the first join: a machine has a node.
    machine: Option<(Daemon, Machine)>,
    parts: Parts,
    keys: Arc<Keys>,
    watch: GroupWatch,
    /// When each host was last heard, by both clocks; or else the start of this daemon.
    heard: HashMap<NodeId, LastHeard>,
    started: LastHeard,
    outbox: mpsc::UnboundedSender<Vec<u8>>,
    done: mpsc::UnboundedSender<HostWork>,
    domains: Vec<HostDomain>,
    addresses: Vec<GuestAddress>,
    elections: Elections,
    open: HashMap<u64, Open>,
}

/// Starts to answer together with the hosts that `transport` reaches. Must be called within a tokio
/// runtime. It ends with the events.
pub fn start<T: Transport>(transport: T, events: mpsc::Receiver<Event>, parts: Parts) -> Hosts {
    let shown = Shown::default();
    let (hosts, wishes) = Hosts::new(shown.clone());
    let (outbox, letters) = mpsc::unbounded_channel();
    let (done, reports) = mpsc::unbounded_channel();
    tokio::spawn(post(transport, letters));
    tokio::spawn(tell_domains(parts.hypervisors.clone(), done.clone()));
    let driver = HostsDriver {
        machine: None,
        keys: (parts.keys)(),
        watch: GroupWatch::new(shown),
        heard: HashMap::new(),
        started: LastHeard::now(),
        outbox,
        done,
        domains: Vec::new(),
        addresses: Vec::new(),
        elections: Elections::default(),
        open: HashMap::new(),
        parts,
    };
    tokio::spawn(driver.run(events, wishes, reports));
    hosts
}

/// Sends messages one after the other. One that cannot be sent is lost, and its question fails.
async fn post<T: Transport>(transport: T, mut letters: mpsc::UnboundedReceiver<Vec<u8>>) {
    while let Some(bytes) = letters.recv().await {
        if let Err(error) = transport.send(bytes, Moment::now().plus(SENT_WITHIN)).await {
            tracing::debug!(%error, "a message to the other hosts is lost");
        }
    }
}

/// Reports this host's domains whenever they have changed.
async fn tell_domains(hypervisors: Hypervisors, done: mpsc::UnboundedSender<HostWork>) {
    let mut news = hypervisors.news();
    let (mut told, mut addresses) = (None, Vec::new());
    loop {
        // First: who asks must be known when its domain is.
        let running = hypervisors.addresses();
        if addresses != running {
            addresses.clone_from(&running);
            if done.send(HostWork::Addresses(running)).is_err() {
                return;
            }
        }
        let domains = local::known(&hypervisors);
        if told.as_ref() != Some(&domains) {
            told = Some(domains.clone());
            if done.send(HostWork::Domains(domains)).is_err() {
                return;
            }
        }
        // The first change is told at once, and a burst of them together.
        let quiet = Instant::now() + TOLD_WITHIN;
        if news.changed().await.is_err() {
            return;
        }
        sleep_until(quiet).await;
    }
}

fn daemon(member: Member) -> Daemon {
    Daemon { node: NodeId(member.node), pid: member.pid }
}

impl HostsDriver {
    async fn run(
        mut self,
        mut events: mpsc::Receiver<Event>,
        mut wishes: mpsc::UnboundedReceiver<Wish>,
        mut reports: mpsc::UnboundedReceiver<HostWork>,
    ) {
        self.watch.show(self.machine.as_ref().map(|(_, machine)| machine));
        loop {
            let wake = self.machine.as_ref().and_then(|(_, machine)| machine.wake());
            let left = wake.map_or(TICK, |wake| Moment::from_ktime(wake).since(Moment::now()).min(TICK));
            let slept = Instant::now();
            tokio::select! {
                event = events.recv() => match event {
                    Some(event) if slept.elapsed() < TICK + STALLED => self.hear(event),
                    Some(event) => self.stalled(event, &mut events),
                    None => return,
                },
                Some(wish) = wishes.recv() => self.wish(wish),
                Some(done) = reports.recv() => self.report(done),
                () = sleep_until(slept + left) => {}
            }
            self.refresh_keys();
            let now = Moment::now().nanos();
            if let Some((_, machine)) = &mut self.machine {
                machine.tick(now);
            }
            while let Some(output) = self.machine.as_mut().and_then(|(_, machine)| machine.poll()) {
                self.carry_out(output);
            }
            self.watch.show(self.machine.as_ref().map(|(_, machine)| machine));
        }
    }

    /// Keys that were changed by SIGHUP.
    fn refresh_keys(&mut self) {
        let keys = (self.parts.keys)();
        if !Arc::ptr_eq(&keys, &self.keys) {
            self.keys = Arc::clone(&keys);
            if let Some((_, machine)) = &mut self.machine {
                machine.set_keys(Keys::clone(&keys));
            }
        }
    }

    /// The driver stood still: messages that waited meanwhile are dropped, and nothing else.
    fn stalled(&mut self, first: Event, events: &mut mpsc::Receiver<Event>) {
        warn!("this host's part in the cluster stood still: questions that waited so long fail");
        let mut next = Some(first);
        while let Some(event) = next {
            if !matches!(event, Event::Message { .. }) {
                self.hear(event);
            }
            next = events.try_recv().ok();
        }
        if let Some((_, machine)) = &mut self.machine {
            machine.stalled(Moment::now().nanos());
        }
    }

    /// Something happened in the group.
    fn hear(&mut self, event: Event) {
        self.watch.hear(&event);
        let now = Moment::now().nanos();
        if let Event::Joined(member) = event {
            return self.join(now, daemon(member));
        }
        if let Event::Message { from, .. } | Event::Alive(from, _) = &event {
            self.heard.insert(NodeId(from.node), LastHeard::now());
        }
        if let Event::Quorum { .. } = event {
            self.heard.extend(self.watch.ring().iter().map(|node| (*node, LastHeard::now())));
        }
        let Some((_, machine)) = &mut self.machine else { return };
        match event {
            Event::Joined(_) | Event::Alive(..) | Event::Stock(_) => {}
            Event::Lost(_) => machine.disconnected(now),
            Event::Configured(_) => machine.configured(now, self.watch.configured()),
            Event::Quorum { .. } => machine.quorum(now, self.watch.is_quorate(), self.watch.ring()),
            Event::Members { all, .. } => {
                for member in &all {
                    self.heard.insert(NodeId(member.node), LastHeard::now());
                }
                let all: Vec<_> = all.into_iter().map(daemon).collect();
                machine.membership(now, &all);
            }
            Event::Message { from, sent_after, bytes } => {
                machine.message(now, daemon(from), sent_after.map(Moment::nanos), &bytes);
            }
            Event::Stalled(_) => machine.stalled(now),
        }
    }

    /// This daemon has joined. Its number stays the same unless somebody has changed corosync's.
    fn join(&mut self, now: u64, me: Daemon) {
        if self.machine.as_ref().is_some_and(|(ours, _)| *ours == me) {
            return;
        }
        // Questions of another machine get no answer any more.
        self.open.clear();
        self.elections.clear();
        let options = HostsOptions { has_fencing: self.parts.has_fencing, ..HostsOptions::default() };
        let keys = Keys::clone(&self.keys);
        let mut machine = Machine::new(me, Incarnation(self.parts.incarnation), keys, options);
        for request in &self.parts.recent {
            machine.remember(now, *request);
        }
        machine.domains(self.domains.iter().cloned());
        machine.addresses(self.addresses.clone());
        self.machine = Some((me, machine));
    }

    /// The pipeline wants something.
    fn wish(&mut self, wish: Wish) {
        let now = Moment::now();
        // Without a machine the wish is dropped, and its channel with it. The pipeline notices.
        let Some((_, machine)) = &mut self.machine else { return };
        match wish {
            Wish::Heard(request, waits) => {
                if self.elections.wait(now, request, waits) {
                    machine.heard(now.nanos(), request);
                }
            }
            Wish::Called(request, reached) => {
                if let Some(reached) = self.elections.called(request, reached) {
                    machine.answered(request, reached);
                }
            }
            Wish::Ask(HostsQuestion { request, op, target, client, by, answer }) => {
                let HostsClient { requester, client, macs } = client;
                let left = by.saturating_duration_since(Instant::now());
                let age = requester.map(|requester| now.since(requester.arrived)).unwrap_or_default();
                let question = machine.ask(now.nanos(), Question { request, op, target, client, macs, age, left });
                self.open.insert(question, Open { request, requester, answer, here: None });
            }
        }
    }

    /// A task of this host has ended.
    fn report(&mut self, done: HostWork) {
        let now = Moment::now().nanos();
        match &done {
            HostWork::Domains(domains) => self.domains.clone_from(domains),
            HostWork::Addresses(guests) => self.addresses.clone_from(guests),
            HostWork::Looked(..)
            | HostWork::Listed(..)
            | HostWork::Checked(..)
            | HostWork::Acted { .. }
            | HostWork::Fenced { .. } => {}
        }
        let Some((_, machine)) = &mut self.machine else { return };
        match done {
            HostWork::Looked(look, found) => machine.looked(now, look, found),
            HostWork::Listed(look, list) => machine.listed(look, list),
            HostWork::Checked(look, checked) => machine.checked(look, checked),
            HostWork::Acted { act, request, end, changes, verdict } => {
                for open in self.open.values_mut().filter(|open| open.request == request) {
                    open.here = Some(verdict.clone());
                }
                machine.acted(now, act, end, changes);
            }
            HostWork::Fenced { node, said, ago, stays_off } => {
                machine.fenced(now, node, said.nanos(), ago, stays_off);
            }
            HostWork::Domains(domains) => machine.domains(domains),
            HostWork::Addresses(guests) => machine.addresses(guests),
        }
    }

    /// The machine has decided.
    fn carry_out(&mut self, output: Output) {
        let (hypervisors, done) = (self.parts.hypervisors.clone(), self.done.clone());
        // A report fails only if the driver has ended.
        match output {
            Output::Send(bytes) => drop(self.outbox.send(bytes)),
            Output::CallBack { request, is_certain } => {
                let is_wanted = self.elections.decide(Moment::now(), request, is_certain);
                if let (false, true, Some((_, machine))) = (is_wanted, is_certain, &mut self.machine) {
                    // Its copies here have given up: another host may go on.
                    machine.answered(request, false);
                }
            }
            Output::Look { look, target, op } => drop(tokio::spawn(async move {
                let found = local::look(&hypervisors, &target, op == Op::On).await;
                let _ = done.send(HostWork::Looked(look, found));
            })),
            Output::List { look } => drop(tokio::spawn(async move {
                let _ = done.send(HostWork::Listed(look, local::list(&hypervisors).await));
            })),
            Output::Check { look } => drop(tokio::spawn(async move {
                let _ = done.send(HostWork::Checked(look, local::check(&hypervisors).await));
            })),
            Output::Act(order) => self.act(&order),
            Output::Answer { question, answer } => {
                if let Some(open) = self.open.remove(&question) {
                    // The client may have gone.
                    let _ = open.answer.send(HostsAnswer { answer, here: open.here });
                }
            }
            Output::AskFencing { node, .. } => self.ask_fencing(node),
            Output::Note(note) => self.note(&note),
        }
    }

    fn act(&self, group: &GroupOrder) {
        let (hypervisors, done) = (self.parts.hypervisors.clone(), self.done.clone());
        let (act, request, op) = (group.act(), group.request(), group.op());
        // First: if this daemon dies now, the next one must not act again.
        (self.parts.note)(request);
        fault::point(Point::AfterNote);
        let deadline = Deadline::at(Instant::now() + Moment::from_ktime(group.by()).since(Moment::now()));
        let requester = self.open.values().find(|open| open.request == request).and_then(|open| open.requester);
        let order = Authorized::by_all_hosts(group);
        tokio::spawn(async move {
            // Before the act: what appears from now on changes the count.
            let changes = hypervisors.appearances(order.target());
            let outcome = hypervisors.carry_out(&order, requester, &deadline).await;
            let (end, verdict) = (local::end(op, &outcome), Verdict::from(&outcome));
            let (target, detail) = (order.target(), &verdict.detail);
            match &end {
                ActEnd::ProvenOff | ActEnd::Done => info!(op = op.name(), domain = %target, "for the hosts: {detail}"),
                ActEnd::Gone => info!(op = op.name(), domain = %target, "for the hosts, nothing to kill: {detail}"),
                ActEnd::Failed(_) | ActEnd::Unproven(_) => {
                    warn!(op = op.name(), domain = %target, "for the hosts, and failed: {detail}");
                }
            }
            let _ = done.send(HostWork::Acted { act, request, end, changes, verdict });
        });
    }

    /// Asks Pacemaker whether it has fenced a host since that was last heard.
    fn ask_fencing(&self, node: NodeId) {
        let Some(name) = self.watch.name_of(node) else { return };
        let heard = self.heard.get(&node).copied().unwrap_or(self.started);
        let done = self.done.clone();
        tokio::task::spawn_blocking(move || {
            // Before the question: what is done to the host from now on is not in the answer.
            let said = Moment::now();
            match fenced_since(&name, heard, said.plus(HISTORY_WITHIN)) {
                Ok(Some(fenced)) => {
                    let (ago, stays_off) = (fenced.ago + HISTORY_DOUBT, fenced.how == How::Off);
                    let _ = done.send(HostWork::Fenced { node, said, ago, stays_off });
                }
                Ok(None) => {}
                Err(error) => tracing::debug!(host = %name, %error, "nothing is known of its fencing"),
            }
        });
    }

    fn note(&self, note: &GroupNote) {
        match note {
            // The transport and the watch tell these, with the reason.
            GroupNote::Joined(_) | GroupNote::Left(_) => {}
            GroupNote::Fenced(node) => {
                info!(host = %self.watch.called(*node), "Pacemaker has fenced this host: its domains are off");
            }
            GroupNote::Foreign(member, trouble) => {
                let help = match trouble {
                    NoMessage::Key => "copy the key file from the other hosts, and reload",
                    NoMessage::Version(_) => "install the same version on all hosts",
                    NoMessage::Alien | NoMessage::Sender | NoMessage::Malformed => "see what runs there",
                };
                warn!(host = %self.watch.called(member.node), process = member.pid, "not understood: {trouble} ({help})");
            }
        }
    }
}
