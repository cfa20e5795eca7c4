//! One schedule: what happens, in which order, and whether the promises hold.

mod chance;

use std::collections::{BTreeMap, VecDeque};

use fence_common::hosts::{GroupAnswer, HostsOptions, HostsRule, NodeId};
use fence_common::ledger::RequestId;
use fence_common::wire::{Op, Request};
use zerocopy::FromZeros;

use crate::cpg::Cpg;
use crate::driver::{Daemon, Deed};
use crate::random::Random;
use crate::world::{Birth, Instance, NAME, World};

const SECOND: u64 = 1_000_000_000;

/// How long a client waits.
const PATIENCE: u64 = 25 * SECOND;

/// A client and its one request.
#[derive(Debug)]
struct Client {
    op: Op,
    request: RequestId,
    /// The hosts that hear it.
    hears: Vec<usize>,
    sent: u64,
    /// When a host has asked the group for it first.
    asked: Option<u64>,
    is_called: bool,
    answer: Option<GroupAnswer>,
}

/// An open question: whose, and since when.
#[derive(Debug)]
struct Open {
    client: usize,
    asked: u64,
}

/// What happens often in a schedule, beside everything else. Chance alone would meet it seldom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Theme {
    /// Nothing.
    Any,
    /// Several clients want a domain on at once.
    Starts,
    /// Machines that move at once.
    Moves,
    /// A machine whose host is cut off before it has told of it, while the machine leaves it.
    Arrivals,
    /// Two copies of a machine, and reboots.
    Twins,
    /// A libvirt that falls silent.
    Doubts,
}

impl Theme {
    fn of(seed: u64) -> Self {
        // Of random numbers of its own, so that it changes nothing else of the schedule.
        match Random::new(!seed).below(100) {
            0..15 => Self::Starts,
            15..30 => Self::Moves,
            30..45 => Self::Arrivals,
            45..55 => Self::Twins,
            55..60 => Self::Doubts,
            _ => Self::Any,
        }
    }
}

/// What a schedule came to.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Tally {
    pub(crate) successes: u64,
    pub(crate) failures: u64,
    pub(crate) acts: u64,
    /// Second copies of a running machine, on hosts that were cut off.
    pub(crate) copies_excused: u64,
    pub(crate) steps: u64,
}

/// A promise that was broken.
pub(crate) type Broken = String;

pub(crate) struct Run {
    now: u64,
    random: Random,
    hosts: usize,
    options: HostsOptions,
    cpg: Cpg,
    world: World,
    daemons: Vec<Option<Daemon>>,
    /// Whether each host had quorum since its last deeds, by what corosync has told its daemon.
    quorum: Vec<bool>,
    /// Whether it has quorum now.
    quorum_now: Vec<bool>,
    /// What it will tell each host: its rings, and whether they have quorum.
    news: Vec<VecDeque<(bool, Vec<NodeId>)>>,
    parts: Vec<usize>,
    clients: Vec<Client>,
    open: BTreeMap<(usize, u64), Open>,
    acts: BTreeMap<(usize, RequestId), u64>,
    /// The rings in which hosts have decided to act.
    rings: BTreeMap<(usize, RequestId), u32>,
    proven: BTreeMap<RequestId, u64>,
    copies: bool,
    /// Whether this schedule is about hosts that are fenced and boot.
    boots: bool,
    theme: Theme,
    tally: Tally,
    trace: Option<Vec<String>>,
}

impl Run {
    pub(crate) fn new(seed: u64, broken: Option<HostsRule>, is_traced: bool) -> Self {
        let mut random = Random::new(seed);
        let hosts = 2 + random.below(4);
        let has_fencing = random.percent(60);
        let options = HostsOptions { has_fencing, dangerous_broken: broken, ..HostsOptions::default() };
        let world = World::new(hosts, &mut random);
        let mut run = Self {
            // Past the time when a fencing would count that never was.
            now: 10 * SECOND,
            hosts,
            options,
            cpg: Cpg::new(hosts),
            world,
            daemons: (0..hosts).map(|_| None).collect(),
            quorum: vec![false; hosts],
            quorum_now: vec![false; hosts],
            news: vec![VecDeque::new(); hosts],
            parts: vec![0; hosts],
            clients: Vec::new(),
            open: BTreeMap::new(),
            acts: BTreeMap::new(),
            rings: BTreeMap::new(),
            proven: BTreeMap::new(),
            copies: random.percent(15) || Theme::of(seed) == Theme::Twins,
            boots: random.percent(25),
            theme: Theme::of(seed),
            tally: Tally::default(),
            trace: is_traced.then(Vec::new),
            random,
        };
        if matches!(run.theme, Theme::Starts | Theme::Arrivals) {
            run.world.instances.clear();
        }
        if run.theme != Theme::Any {
            run.world.machines.iter_mut().for_each(|machine| machine.is_defined = true);
        }
        for host in 0..hosts {
            if run.random.percent(95) {
                run.start_daemon(host);
            }
        }
        run
    }

    fn note(&mut self, line: impl FnOnce(&Self) -> String) {
        if self.trace.is_some() {
            let text = format!("{:>9.3} {}", self.now as f64 / 1e9, line(self)).replace("\\x00", "");
            self.trace.iter_mut().for_each(|trace| trace.push(text.clone()));
        }
    }

    pub(crate) fn trace(self) -> Vec<String> {
        self.trace.unwrap_or_default()
    }

    /// Runs the schedule. At its end all is mended, and an `off` must work.
    pub(crate) fn run(&mut self) -> Result<Tally, Broken> {
        let steps = 100 + self.random.below(300);
        if self.random.percent(70) {
            self.settle()?;
        }
        for _ in 0..steps {
            self.step()?;
        }
        self.mend()?;
        Ok(self.tally)
    }

    fn step(&mut self) -> Result<(), Broken> {
        self.tally.steps += 1;
        self.now += u64::try_from(self.random.below(3_000_000)).unwrap();
        let host = self.random.below(self.hosts);
        if self.boots && self.random.percent(4) {
            match self.random.below(4) {
                0 => self.fence(host),
                1 => self.now += 7 * SECOND,
                _ => self.boot(host),
            }
        }
        if self.theme != Theme::Any && self.random.percent(4) {
            self.themed(host)?;
        }
        match self.random.below(1000) {
            0..=249 => self.cpg.order(host),
            250..=579 => self.deliver(host),
            580..=829 => self.work(host),
            830..=859 => self.any_client(),
            860..=874 => self.repeat(),
            875..=884 => self.now += u64::try_from(self.random.below(3_000_000_000)).unwrap(),
            885..=904 => self.regroup(),
            905..=924 => self.tell_quorum(host),
            925..=929 => self.stop_daemon(host),
            930..=939 => self.start_daemon(host),
            940..=944 => self.stand_or_go(host),
            945..=959 => self.migrate(),
            960..=964 => self.world.machines[host].libvirt_answers ^= true,
            965..=969 => self.fence(host),
            970..=979 => self.boot(host),
            980..=984 => self.start_outside(host),
            985..=989 => self.lose_power(host),
            _ => self.tell_domains(host),
        }
        self.tick(host);
        self.judge()
    }

    /// What all daemons have done since.
    fn judge(&mut self) -> Result<(), Broken> {
        for host in 0..self.hosts {
            while let Some(daemon) = &mut self.daemons[host] {
                daemon.drain(self.now, &mut self.cpg, &mut self.world);
                let deeds = std::mem::take(&mut daemon.deeds);
                if deeds.is_empty() {
                    break;
                }
                for deed in deeds {
                    self.note(|_| format!("host{host}: {deed:?}"));
                    self.deed(host, deed)?;
                }
            }
            self.quorum[host] = self.quorum_now[host];
        }
        Ok(())
    }

    fn deed(&mut self, host: usize, deed: Deed) -> Result<(), Broken> {
        match deed {
            Deed::CalledBack(request) => self.call_back(host, request),
            Deed::Acts(request) => {
                self.tally.acts += 1;
                if !self.quorum[host] {
                    return Err(format!("host{host} acts without quorum for {request:?}"));
                }
                self.rings.insert((host, request), self.cpg.ring_number(host));
                let acts = self.acts.entry((host, request)).or_default();
                *acts += 1;
                if *acts > 1 && self.world.machines[host].claims.contains(&request) {
                    return Err(format!("host{host} acts twice for {request:?}"));
                }
            }
            Deed::Proved(request) => *self.proven.entry(request).or_default() += 1,
            Deed::Started(request) => self.started(host, request)?,
            Deed::Answered(question, answer) => self.answered(host, question, answer)?,
        }
        Ok(())
    }

    /// A client mostly accepts one callback.
    fn call_back(&mut self, host: usize, request: RequestId) {
        let Some(at) = self.clients.iter().position(|client| client.request == request) else { return };
        let accepts = !self.clients[at].is_called || self.random.percent(10);
        let left = PATIENCE.saturating_sub(self.now - self.clients[at].sent);
        let Some(daemon) = &mut self.daemons[host] else { return };
        if !accepts || left == 0 {
            return daemon.hosts.answered(request, false);
        }
        self.clients[at].is_called = true;
        let question = daemon.ask(self.now, request, self.clients[at].op, left);
        // All coordinators of a request answer for one act: what counts is the first question.
        let asked = *self.clients[at].asked.get_or_insert(self.now);
        self.open.insert((host, question), Open { client: at, asked });
    }

    /// An instance that the group has started must be the only one.
    fn started(&mut self, host: usize, request: RequestId) -> Result<(), Broken> {
        let op = self.clients.iter().find(|client| client.request == request).map(|client| client.op);
        let asked = self.open.values().filter(|open| self.clients[open.client].request == request);
        let asked = asked.map(|open| open.asked).max().unwrap_or(self.now);
        // Where a ring breaks, each part may restart its copy.
        let ring = self.rings.get(&(host, request));
        let has_restarted = |other: usize| ring.is_some() && self.rings.get(&(other, request)) == ring;
        let mut others = self.world.living().filter(|one| one.host != host);
        let wrong = others.find(|one| match (op, one.birth) {
            (Some(Op::On), Birth::Ours(_)) => true,
            (Some(Op::On), Birth::Outside) => one.born < asked,
            (_, Birth::Ours(by)) => by == request && has_restarted(one.host),
            (_, Birth::Outside) => false,
        });
        wrong.map_or(Ok(()), |one| Err(format!("host{host} starts it, and it runs on host{}: {one:?}", one.host)))
    }

    fn answered(&mut self, host: usize, question: u64, answer: GroupAnswer) -> Result<(), Broken> {
        let Some(open) = self.open.remove(&(host, question)) else { return Ok(()) };
        let (op, request) = (self.clients[open.client].op, self.clients[open.client].request);
        let says_off = match (op, &answer) {
            (Op::Off | Op::Reboot, GroupAnswer::Success) | (Op::Status, GroupAnswer::Off) => true,
            (Op::HostList, GroupAnswer::List(lists)) if lists.len() < self.hosts => {
                return Err(format!("a list of {} hosts of {}", lists.len(), self.hosts));
            }
            _ => false,
        };
        match answer {
            GroupAnswer::Failure(_) => self.tally.failures += 1,
            _ if !self.quorum[host] => return Err(format!("host{host} says {answer:?} without quorum")),
            GroupAnswer::Success | GroupAnswer::Off | GroupAnswer::List(_) => self.tally.successes += 1,
        }
        if says_off {
            let view = self.daemons[host].as_ref().map(|daemon| daemon.hosts.view().hosts).unwrap_or_default();
            let has_missing = view.iter().any(|one| one.daemons.is_empty());
            // What this reboot has started for another coordinator is no false word.
            let is_old = |one: &&Instance| one.born < open.asked && one.birth != Birth::Ours(request);
            let older: Vec<_> = self.world.living().filter(is_old).collect();
            let is_killed = self.proven.contains_key(&request);
            let is_excused = self.copies && is_killed && has_missing;
            if !older.is_empty() && !is_excused {
                return Err(format!("host{host} says off ({}), and it lives: {older:?}", op.name()));
            }
            self.tally.copies_excused += u64::from(!older.is_empty());
        }
        if let Some(daemon) = &mut self.daemons[host] {
            daemon.hosts.answered(request, true);
        }
        self.clients[open.client].answer.get_or_insert(answer);
        Ok(())
    }

    fn request(&mut self, op: Op) -> RequestId {
        let mut request = Request::new_zeroed();
        request.seqno.set(u32::try_from(self.clients.len()).unwrap());
        request.domain[..NAME.len()].copy_from_slice(NAME.as_bytes());
        RequestId::of(op, &request)
    }

    fn any_client(&mut self) {
        let ops = [
            Op::Off,
            Op::Off,
            Op::Off,
            Op::Reboot,
            Op::Reboot,
            Op::On,
            Op::On,
            Op::Status,
            Op::HostList,
            Op::DevStatus,
        ];
        let op = *self.random.one_of(&ops).unwrap();
        self.new_client(op);
    }

    fn new_client(&mut self, op: Op) {
        let hears: Vec<_> = (0..self.hosts).filter(|_| self.random.percent(60)).collect();
        self.client_of(op, hears);
    }

    /// Each of two hosts has a client that wants the domain on.
    fn several_starts(&mut self) {
        let first = self.random.below(self.hosts);
        let second = (first + 1 + self.random.below(self.hosts - 1)) % self.hosts;
        self.client_of(Op::On, vec![first]);
        self.client_of(Op::On, vec![second]);
    }

    fn client_of(&mut self, op: Op, hears: Vec<usize>) {
        let request = self.request(op);
        self.note(|_| format!("a client: {} to {hears:?}", op.name()));
        self.clients.push(Client { op, request, hears, sent: self.now, asked: None, is_called: false, answer: None });
        self.hear(self.clients.len() - 1);
    }

    /// A client sends its request again.
    fn repeat(&mut self) {
        let waits = |at: &usize| self.clients[*at].answer.is_none() && self.now - self.clients[*at].sent < PATIENCE;
        let waiting: Vec<_> = (0..self.clients.len()).filter(waits).collect();
        if let Some(&at) = self.random.one_of(&waiting) {
            // It may have lost its connection.
            self.clients[at].is_called &= self.random.percent(50);
            self.hear(at);
        }
    }

    fn hear(&mut self, at: usize) {
        for host in self.clients[at].hears.clone() {
            if let Some(daemon) = self.daemons[host].as_mut().filter(|daemon| daemon.stands.is_none()) {
                daemon.hosts.heard(self.now, self.clients[at].request);
            }
        }
    }
}
