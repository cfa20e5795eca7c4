//! One host's daemon: the real state machine, and a model of the driver around it.

use std::time::Duration;

use fence_common::hosts::{
    ActEnd, ConfiguredHost, GroupAnswer, Hosts, HostsOptions, Incarnation, Look, Member, NodeId, Output, Question,
};
use fence_common::key::Key;
use fence_common::keys::{KeyPair, Keys};
use fence_common::ledger::RequestId;
use fence_common::target::Target;
use fence_common::wire::Op;

use crate::cpg::{Cpg, Item};
use crate::random::Random;
use crate::world::{Birth, NAME, World};

/// Something that takes time. It is begun at one moment, and reported at a later one.
#[derive(Clone, Debug)]
enum Task {
    Look { look: u64, found: Option<Look> },
    Tell { look: u64, lists: bool },
    Act { order: Ordered, end: Option<(ActEnd, u64)> },
    CallBack { request: RequestId },
    AskFencing { node: NodeId, found: Option<Found> },
}

/// An act, and what was on the host when it was ordered.
#[derive(Clone, Debug)]
struct Ordered {
    act: u64,
    request: RequestId,
    op: Op,
    by: u64,
    seen: Vec<usize>,
    /// Whether the look has found a copy on its way in.
    arrival_seen: bool,
}

/// What the history of fencings says: when it was asked, how long ago the host was fenced, and
/// whether it was left off.
type Found = (u64, u64, bool);

/// What the daemon did that somebody must judge.
#[derive(Debug)]
pub(crate) enum Deed {
    /// It calls a client back.
    CalledBack(RequestId),
    /// It is about to act.
    Acts(RequestId),
    /// An act has ended as proven off.
    Proved(RequestId),
    /// It has started the domain, or has started it again.
    Started(RequestId),
    Answered(u64, GroupAnswer),
}

pub(crate) struct Daemon {
    pub(crate) hosts: Hosts,
    pub(crate) member: Member,
    host: usize,
    tasks: Vec<Task>,
    /// How often the domain had appeared when a look found a copy on its way in last.
    arrival_at: Option<u64>,
    /// Since when it stands still.
    pub(crate) stands: Option<u64>,
    pub(crate) deeds: Vec<Deed>,
}

impl std::fmt::Debug for Daemon {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Daemon").field("hosts", &self.hosts).field("tasks", &self.tasks).finish_non_exhaustive()
    }
}

pub(crate) fn node(host: usize) -> NodeId {
    NodeId(u32::try_from(host).unwrap() + 1)
}

impl Daemon {
    pub(crate) fn new(now: u64, host: usize, options: HostsOptions, world: &World, random: &mut Random) -> Self {
        // A process ID comes again, an incarnation does not.
        let member = Member { node: node(host), pid: 100 + u32::try_from(random.below(3)).unwrap() };
        let mut incarnation = [0; 16];
        incarnation[..8].copy_from_slice(&random.next().to_le_bytes());
        let keys = Keys::from(KeyPair::from(Key::new(b"simulated").unwrap()));
        let mut hosts = Hosts::new(member, Incarnation(incarnation), keys, options);
        let names =
            (0..world.machines.len()).map(|host| ConfiguredHost { node: node(host), name: format!("host{host}") });
        hosts.configured(now, names);
        hosts.domains(world.table(host));
        for request in &world.machines[host].claims {
            hosts.remember(now, *request);
        }
        Self { hosts, member, host, tasks: Vec::new(), arrival_at: None, stands: None, deeds: Vec::new() }
    }

    pub(crate) fn has_tasks(&self) -> bool {
        !self.tasks.is_empty()
    }

    pub(crate) fn take(&mut self, now: u64, item: Item) {
        match item {
            Item::Message(from, sent, bytes) => self.hosts.message(now, from, Some(sent), &bytes),
            Item::Membership(members) => self.hosts.membership(now, &members),
        }
    }

    pub(crate) fn ask(&mut self, now: u64, request: RequestId, op: Op, left: u64) -> u64 {
        let target = op.names_a_domain().then(|| Target::Name(NAME.into()));
        self.hosts.ask(
            now,
            Question {
                request,
                op,
                target,
                client: None,
                macs: Vec::new(),
                age: Duration::ZERO,
                left: Duration::from_nanos(left),
            },
        )
    }

    /// Carries out what the machine wants.
    pub(crate) fn drain(&mut self, now: u64, cpg: &mut Cpg, world: &mut World) {
        while let Some(output) = self.hosts.poll() {
            match output {
                Output::Send(bytes) => cpg.send(now, self.host, self.member, bytes),
                Output::CallBack { request, .. } => self.tasks.push(Task::CallBack { request }),
                Output::Look { look, .. } => self.tasks.push(Task::Look { look, found: None }),
                Output::List { look } => self.tasks.push(Task::Tell { look, lists: true }),
                Output::Check { look } => self.tasks.push(Task::Tell { look, lists: false }),
                Output::Act(order) => {
                    let (act, request, op, by) = (order.act(), order.request(), order.op(), order.by());
                    world.machines[self.host].claims.insert(request);
                    self.deeds.push(Deed::Acts(request));
                    // A copy that comes in, and whose migration then fails, leaves nothing to see.
                    let runs_here = |at: &usize| world.instances[*at].host == self.host;
                    let seen: Vec<_> = world.here(self.host).filter(runs_here).collect();
                    let arrival_seen = seen.is_empty() && self.arrival_at == Some(world.changes(self.host));
                    let order = Ordered { act, request, op, by, seen, arrival_seen };
                    self.tasks.push(Task::Act { order, end: None });
                }
                Output::Answer { question, answer } => self.deeds.push(Deed::Answered(question, answer)),
                Output::AskFencing { node, .. } => self.tasks.push(Task::AskFencing { node, found: None }),
                Output::Note(_) => {}
            }
        }
    }

    /// One step of one task.
    pub(crate) fn work(&mut self, now: u64, world: &mut World, random: &mut Random) {
        let at = random.below(self.tasks.len());
        let task = self.tasks.swap_remove(at);
        match task {
            Task::Look { look, found: None } => {
                let found = Some(world.look(self.host, random));
                self.arrival_at = world.comes_in(self.host).then(|| world.changes(self.host));
                self.tasks.push(Task::Look { look, found });
            }
            Task::Look { look, found: Some(found) } => self.hosts.looked(now, look, found),
            Task::Tell { look, .. } if !world.machines[self.host].libvirt_answers => {
                self.hosts.checked(look, Err("libvirt is silent".into()));
            }
            Task::Tell { look, lists: true } => self.hosts.listed(look, Ok(world.table(self.host))),
            Task::Tell { look, lists: false } => self.hosts.checked(look, Ok(())),
            Task::Act { order, end: None } => {
                let changes = world.changes(self.host);
                let end = if order.by < now {
                    ActEnd::Failed("too late".into())
                } else if order.op == Op::On {
                    self.start(now, order.request, world, random)
                } else {
                    let Ordered { op, request, ref seen, arrival_seen, .. } = order;
                    world.off(self.host, op, request, seen, arrival_seen, random)
                };
                self.tasks.push(Task::Act { order, end: Some((end, changes)) });
            }
            Task::Act { order, end: Some((end, changes)) } => {
                if end == ActEnd::ProvenOff {
                    self.deeds.push(Deed::Proved(order.request));
                }
                self.hosts.acted(now, order.act, end, changes);
            }
            Task::CallBack { request } => self.deeds.push(Deed::CalledBack(request)),
            Task::AskFencing { node, found: None } => {
                let found = history(now, node, world, random);
                self.tasks.extend(found.map(|found| Task::AskFencing { node, found: Some(found) }));
            }
            Task::AskFencing { node, found: Some((said, ago, stays_off)) } => {
                self.hosts.fenced(now, node, said, Duration::from_nanos(ago), stays_off);
            }
        }
    }

    fn start(&mut self, now: u64, request: RequestId, world: &mut World, random: &mut Random) -> ActEnd {
        if random.percent(5) {
            return ActEnd::Failed("libvirt is silent".into());
        }
        if world.here(self.host).next().is_none() {
            world.start(now, self.host, Birth::Ours(request));
            self.deeds.push(Deed::Started(request));
        }
        ActEnd::Done
    }

    /// Starts what a reboot owes.
    pub(crate) fn start_again(&mut self, now: u64, world: &mut World) {
        let Some(request) = world.machines[self.host].owes else { return };
        if world.here(self.host).next().is_none() {
            world.start(now, self.host, Birth::Ours(request));
            self.deeds.push(Deed::Started(request));
        }
        world.machines[self.host].owes = None;
    }
}

/// The history of fencings, whose times are known to a second or two.
fn history(now: u64, node: NodeId, world: &World, random: &mut Random) -> Option<Found> {
    let host = usize::try_from(node.0).unwrap() - 1;
    let (at, stays_off) = world.machines[host].fenced?;
    Some((now, now.saturating_sub(at) + random.next() % 2_000_000_000, stays_off))
}
