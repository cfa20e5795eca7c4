//! Fence races: guests of several hosts fence each other at once. Of two that do at most one dies.
//!
//! Every guest runs on one host. It asks the daemon of that host, which knows it by its domain, or
//! another one, which knows its Ethernet address. It may be dead before its request is looked at,
//! and its host tell so. Messages and work go on in any order. A look or an act may fail, also
//! after it has killed, and a kill may take longer than a client waits. A second host may ask on
//! behalf of a client.

use std::collections::BTreeSet;
use std::time::Duration;

use fence_common::caller::Vouched;
use fence_common::hosts::{
    ActEnd, ConfiguredHost, GroupAnswer, GuestAddress, Hosts, HostsOptions, HostsRule, Incarnation, LocalState, Look,
    Member, Output, Question,
};
use fence_common::ledger::RequestId;
use fence_common::target::Target;
use fence_common::wire::{Op, Request};
use uuid::Uuid;
use zerocopy::FromZeros;

use crate::cpg::{Cpg, Item};
use crate::driver::node;
use crate::group::{SECOND, keys};
use crate::random::Random;

/// A guest, which runs on one host.
struct Guest {
    host: usize,
    lives: bool,
}

/// What a guest asks for: another one's death.
struct Order {
    client: usize,
    victim: usize,
    request: RequestId,
    sent: u64,
    /// How long its client waits.
    patience: u64,
    /// The hosts that hear it and have not asked the group.
    heard: Vec<usize>,
    /// The hosts that have asked the group, each with its number.
    asked: Vec<(usize, u64)>,
    answer: Option<GroupAnswer>,
    /// Whether the victim died of it, proven or not.
    has_killed: bool,
}

/// What takes time at a host.
enum Work {
    Look {
        look: u64,
        guest: usize,
    },
    Kill {
        act: u64,
        request: RequestId,
        guest: usize,
        /// When it takes effect, at the earliest.
        at: u64,
    },
    Report {
        act: u64,
        end: ActEnd,
    },
    /// It tells of the guests that live.
    Tell,
}

/// What came of some schedules.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Races {
    /// Two guests that fenced each other.
    pub(crate) races: u64,
    /// Of those, races in which one died.
    pub(crate) won: u64,
    pub(crate) successes: u64,
    pub(crate) failures: u64,
}

struct RaceRun {
    now: u64,
    random: Random,
    cpg: Cpg,
    daemons: Vec<(Member, Hosts)>,
    work: Vec<Vec<Work>>,
    guests: Vec<Guest>,
    orders: Vec<Order>,
    /// Whether looks and acts may fail.
    fails: bool,
}

impl Work {
    fn is_ready(&self, now: u64) -> bool {
        !matches!(self, Self::Kill { at, .. } if *at > now)
    }
}

fn name(guest: usize) -> String {
    format!("guest{guest}")
}

fn uuid(guest: usize) -> Uuid {
    Uuid::from_u128(0x4000_8000 + u128::try_from(guest).unwrap())
}

fn mac(guest: usize) -> [u8; 6] {
    [0x52, 0x54, 0, 0, 0, u8::try_from(guest).unwrap()]
}

fn vouched(guest: usize) -> Vouched {
    Vouched { uuid: uuid(guest), name: name(guest) }
}

/// The addresses of a host's guests that live.
fn addresses(guests: &[Guest], host: usize) -> Vec<GuestAddress> {
    let here = (0..guests.len()).filter(|guest| guests[*guest].host == host && guests[*guest].lives);
    here.map(|guest| GuestAddress { mac: mac(guest), guest: vouched(guest) }).collect()
}

/// The guest that a target means.
fn guest_of(target: &Target) -> usize {
    (0..9).find(|guest| *target == Target::Name(name(*guest)) || *target == Target::Uuid(uuid(*guest))).unwrap()
}

impl RaceRun {
    fn new(seed: u64, broken: Option<HostsRule>) -> Self {
        let mut random = Random::new(seed);
        let (hosts, guests) = (2 + random.below(3), 2 + random.below(3));
        let options = HostsOptions { dangerous_broken: broken, ..HostsOptions::default() };
        let mut cpg = Cpg::new(hosts);
        let guests: Vec<_> = (0..guests).map(|_| Guest { host: random.below(hosts), lives: true }).collect();
        let daemon = |host: usize| {
            let member = Member { node: node(host), pid: 100 };
            let incarnation = Incarnation([u8::try_from(host).unwrap(); 16]);
            let mut daemon = Hosts::new(member, incarnation, keys(b"simulated"), options);
            let named = |host| ConfiguredHost { node: node(host), name: format!("host{host}") };
            daemon.configured(SECOND, (0..hosts).map(named));
            daemon.quorum(SECOND, true, &(0..hosts).map(node).collect::<Vec<_>>());
            daemon.addresses(addresses(&guests, host));
            cpg.join(host, member);
            (member, daemon)
        };
        let daemons = (0..hosts).map(daemon).collect();
        let fails = random.percent(40);
        let work = (0..hosts).map(|_| Vec::new()).collect();
        Self { now: SECOND, random, cpg, daemons, work, guests, orders: Vec::new(), fails }
    }

    fn run(mut self) -> Result<Races, String> {
        self.settle();
        for _ in 0..2 + self.random.below(4) {
            self.send();
            for _ in 0..self.random.below(40) {
                self.step();
            }
        }
        self.settle();
        for _ in 0..120 {
            self.now += SECOND / 3;
            self.tick();
            self.settle();
        }
        self.judge()
    }

    /// A guest that lives wants another one dead, if possible one that wants its own death.
    fn send(&mut self) {
        let living: Vec<_> = (0..self.guests.len()).filter(|guest| self.guests[*guest].lives).collect();
        let last = self.orders.last().map(|order| (order.victim, order.client));
        let answers = last.filter(|(client, _)| living.contains(client) && self.random.percent(70));
        let Some(client) = answers.map(|(client, _)| client).or_else(|| self.random.one_of(&living).copied()) else {
            return;
        };
        let victim = answers.map_or_else(|| self.random.below(self.guests.len()), |(_, victim)| victim);
        let mut request = Request::new_zeroed();
        request.seqno.set(u32::try_from(self.orders.len()).unwrap());
        let request = RequestId::of(Op::Off, &request);
        // Its own host, or one that hears it on a common segment.
        let home = self.guests[client].host;
        let mut heard = vec![if self.random.percent(50) { home } else { self.random.below(self.daemons.len()) }];
        if self.random.percent(10) {
            heard.push(self.random.below(self.daemons.len()));
        }
        let patience = (10 + u64::try_from(self.random.below(15)).unwrap()) * SECOND;
        let (sent, asked) = (self.now, Vec::new());
        let order = Order { client, victim, request, sent, patience, heard, asked, answer: None, has_killed: false };
        self.orders.push(order);
        if self.random.percent(60) {
            self.ask(self.orders.len() - 1);
        }
    }

    /// A host has called the client of an order back, and asks the group.
    fn ask(&mut self, order: usize) {
        let Order { client, victim, request, sent, patience, .. } = self.orders[order];
        let Some(host) = self.orders[order].heard.pop() else { return };
        let target = if self.random.percent(50) { Target::Name(name(victim)) } else { Target::Uuid(uuid(victim)) };
        // A table has the running machines alone.
        let is_known = self.guests[client].host == host && self.guests[client].lives;
        let age = self.now - sent;
        let question = Question {
            request,
            op: Op::Off,
            target: Some(target),
            client: is_known.then(|| vouched(client)),
            macs: vec![mac(client)],
            age: Duration::from_nanos(age),
            left: Duration::from_nanos(patience.saturating_sub(age)),
        };
        let question = self.daemons[host].1.ask(self.now, question);
        self.orders[order].asked.push((host, question));
        self.drain(host);
    }

    fn step(&mut self) {
        self.now += 1_000_000;
        let host = self.random.below(self.daemons.len());
        let unasked: Vec<_> = (0..self.orders.len()).filter(|order| !self.orders[*order].heard.is_empty()).collect();
        match self.random.below(3) {
            _ if !unasked.is_empty() && self.random.percent(10) => {
                let order = unasked[self.random.below(unasked.len())];
                self.ask(order);
            }
            0 => self.cpg.order(host),
            1 => {
                if let Some(item) = self.cpg.has_undelivered(host).then(|| self.cpg.deliver(host)).flatten() {
                    let daemon = &mut self.daemons[host].1;
                    // An age is known to a second.
                    let doubt = self.random.next() % SECOND;
                    match item {
                        Item::Message(from, sent, bytes) => {
                            daemon.message(self.now, from, Some(sent.saturating_sub(doubt)), &bytes);
                        }
                        Item::Membership(members) => daemon.membership(self.now, &members),
                    }
                }
            }
            _ => self.work(host),
        }
        self.tick();
        (0..self.daemons.len()).for_each(|host| self.drain(host));
    }

    fn tick(&mut self) {
        for (_, daemon) in &mut self.daemons {
            if daemon.wake().is_some_and(|at| at <= self.now) {
                daemon.tick(self.now);
            }
        }
        (0..self.daemons.len()).for_each(|host| self.drain(host));
    }

    /// Everything that is under way ends.
    fn settle(&mut self) {
        let is_busy = |run: &Self, host: usize| {
            let works = run.work[host].iter().any(|work| work.is_ready(run.now));
            run.cpg.has_unsent(host) || run.cpg.has_undelivered(host) || works
        };
        let is_open = |run: &Self| run.orders.iter().any(|order| !order.heard.is_empty());
        while is_open(self) || (0..self.daemons.len()).any(|host| is_busy(self, host)) {
            self.step();
        }
    }

    fn work(&mut self, host: usize) {
        let ready = |at: &usize| self.work[host][*at].is_ready(self.now);
        let ready: Vec<_> = (0..self.work[host].len()).filter(ready).collect();
        let Some(&at) = self.random.one_of(&ready) else { return };
        match self.work[host].swap_remove(at) {
            Work::Tell => {
                self.daemons[host].1.addresses(addresses(&self.guests, host));
            }
            Work::Look { look, guest } => {
                let here = self.guests[guest].host == host;
                let state = match (here, self.guests[guest].lives) {
                    _ if self.fails && self.random.percent(10) => LocalState::CannotTell("libvirt is silent".into()),
                    (true, true) => LocalState::RunsHere,
                    (true, false) => LocalState::DefinedHere,
                    (false, _) => LocalState::NotHere,
                };
                let (uuid, name) = (here.then(|| uuid(guest)), here.then(|| name(guest)));
                self.daemons[host].1.looked(self.now, look, Look { state, uuid, name, changes: 0 });
            }
            Work::Kill { act, request, guest, .. } => {
                let fails = self.fails && self.random.percent(30);
                // A kill that fails may have killed.
                let kills = !fails || self.random.percent(50);
                if kills && std::mem::take(&mut self.guests[guest].lives) {
                    let order = self.orders.iter_mut().find(|order| order.request == request);
                    order.into_iter().for_each(|order| order.has_killed = true);
                    self.work[host].push(Work::Tell);
                }
                let end = match fails {
                    false => ActEnd::ProvenOff,
                    true if kills || self.random.percent(50) => ActEnd::Unproven("not proven".into()),
                    true => ActEnd::Failed("nothing was done".into()),
                };
                self.work[host].push(Work::Report { act, end });
            }
            Work::Report { act, end } => self.daemons[host].1.acted(self.now, act, end, 0),
        }
    }

    /// Carries out what a daemon wants.
    fn drain(&mut self, host: usize) {
        while let Some(output) = self.daemons[host].1.poll() {
            match output {
                Output::Send(bytes) => self.cpg.send(self.now, host, self.daemons[host].0, bytes),
                Output::Look { look, target, .. } => {
                    self.work[host].push(Work::Look { look, guest: guest_of(&target) });
                }
                Output::Act(order) => {
                    let (act, request, guest) = (order.act(), order.request(), guest_of(order.target()));
                    // A process may take long to die.
                    let hangs = self.fails && self.random.percent(5);
                    let at = self.now + if hangs { self.random.next() % (30 * SECOND) } else { 0 };
                    self.work[host].push(Work::Kill { act, request, guest, at });
                }
                Output::Answer { question, answer } => {
                    let asked = |order: &&mut Order| order.asked.contains(&(host, question));
                    if let Some(order) = self.orders.iter_mut().find(asked) {
                        order.answer.get_or_insert(answer);
                    }
                }
                Output::CallBack { .. }
                | Output::List { .. }
                | Output::Check { .. }
                | Output::AskFencing { .. }
                | Output::Note(_) => {}
            }
        }
    }

    fn judge(self) -> Result<Races, String> {
        let mut sum = Races::default();
        let pairs = |one: &Order, other: &Order| {
            one.client != one.victim && (one.client, one.victim) == (other.victim, other.client)
        };
        let mut counted = BTreeSet::new();
        for (at, order) in self.orders.iter().enumerate() {
            match &order.answer {
                None => return Err(format!("{} is not answered", name(order.client))),
                Some(GroupAnswer::Success) if self.guests[order.victim].lives => {
                    return Err(format!("{} is called off, and lives", name(order.victim)));
                }
                Some(GroupAnswer::Success) => sum.successes += 1,
                Some(_) => sum.failures += 1,
            }
            let mut rivals = self.orders[at + 1..].iter().filter(|other| pairs(order, other));
            if let Some(rival) = rivals.clone().find(|rival| rival.has_killed && order.has_killed) {
                let (one, other) = (name(order.victim), name(rival.victim));
                return Err(format!("{one} and {other} have killed each other"));
            }
            let is_race = rivals.next().is_some();
            if is_race && counted.insert(order.client.min(order.victim)) {
                sum.races += 1;
                let (one, other) = (self.guests[order.client].lives, self.guests[order.victim].lives);
                sum.won += u64::from(one != other);
            }
        }
        Ok(sum)
    }
}

/// Runs so many schedules. Returns what came of them, or the first seed that breaks the promise.
pub(crate) fn races(seeds: u64, broken: Option<HostsRule>) -> Result<Races, (u64, String)> {
    let mut sum = Races::default();
    for seed in 0..seeds {
        let one = RaceRun::new(seed, broken).run().map_err(|wrong| (seed, wrong))?;
        sum.races += one.races;
        sum.won += one.won;
        sum.successes += one.successes;
        sum.failures += one.failures;
    }
    Ok(sum)
}
