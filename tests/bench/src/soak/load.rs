//! The honest load: each client asks for one thing after the other.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use fastrand::Rng;
use fence_common::sync::lock;
use fence_common::wire::Op;

use super::client::{Asker, Said, Turn};
use super::judge::{Judge, Request, Told, WayIn};
use super::site::{Domain, Hold, Host, NOBODY, PROBE, PROTECTED, World};
use super::{Pace, SoakPlan, rest};

/// How long what libvirt still had to do may take after an outage.
pub(super) const AFTERMATH: Duration = Duration::from_secs(5);
/// How long after an `off` its domain is looked at again.
const AGAIN: Duration = Duration::from_millis(400);
/// The longest pause between two probes.
const PROBING: Duration = Duration::from_secs(1);
/// How often the lab's own troubles may keep a request from being judged, one after the other.
const TROUBLES: usize = 20;

/// What is asked next.
enum Wish<'w> {
    /// The order, and the right to give it.
    Order(Op, &'w Domain, Hold<'w>),
    /// About a domain that must not be fenced.
    Refused(Op, &'static str),
    List,
    Monitor,
    Probe,
}

/// A client and what it needs.
pub(super) struct Worker<'w> {
    number: usize,
    host: &'w Host,
    judge: &'w Judge,
    asker: Asker,
    rng: Rng,
    pause: Duration,
}

impl<'w> Worker<'w> {
    /// All clients of both hypervisors.
    pub(super) fn all(world: &'w World, judge: &'w Judge, pace: Pace, rng: &mut Rng) -> Result<Vec<Self>> {
        let mut workers = Vec::new();
        for (number, host) in world.hosts.iter().enumerate() {
            let [stock, own, tcp, probing] = host.guests.as_slice() else { anyhow::bail!("four guests are needed") };
            let (port, line) = lock(&host.lines).take().context("the lines are taken")?;
            let askers = [
                Asker::StockMulticast(stock.clone()),
                Asker::OwnMulticast(own.clone()),
                Asker::Tcp(tcp.clone(), Turn::Stock),
                Asker::StockLine(port, host.hypervisor.space().clone()),
                Asker::OwnLine(line, 0),
                Asker::Probe(probing.clone()),
            ];
            workers.extend(askers.into_iter().map(|asker| {
                let pause = if matches!(asker, Asker::Probe(_)) { PROBING } else { pace.client };
                Self { number, host, judge, asker, rng: rng.fork(), pause }
            }));
        }
        Ok(workers)
    }

    /// Asks until it is over.
    pub(super) fn work(mut self, over: &AtomicBool) -> Result<()> {
        let mut troubles = 0;
        while !over.load(Ordering::Relaxed) {
            let pause = SoakPlan::up_to(&mut self.rng, self.pause);
            rest(over, pause);
            let Some(wish) = self.wish() else { continue };
            match self.ask(wish) {
                Ok(()) => troubles = 0,
                Err(error) if self.judge.is_violation(self.number, &error) => return Ok(()),
                Err(error) => {
                    troubles += 1;
                    ensure!(troubles < TROUBLES, "hypervisor {}: {error:#}", self.number + 1);
                }
            }
        }
        Ok(())
    }

    /// `None` where others hold all domains.
    fn wish(&mut self) -> Option<Wish<'w>> {
        let way = self.asker.way();
        if way == WayIn::Probe {
            return Some(Wish::Probe);
        }
        let refused = [Op::Off, Op::Reboot, Op::On, Op::Status];
        let mut pick = |ops: &[Op]| ops.get(self.rng.usize(..ops.len())).copied().unwrap_or(Op::Status);
        let order = [Op::Off, Op::Off, Op::Off, Op::On, Op::On, Op::On, Op::Reboot, Op::Reboot, Op::Status];
        let (refused, order) = (pick(&refused), pick(&order));
        match self.rng.u32(..100) {
            ..6 => Some(Wish::Refused(refused, PROTECTED)),
            6..12 => Some(Wish::Refused(refused, NOBODY)),
            // Our own clients read no lists.
            12..18 if matches!(way, WayIn::StockMulticast | WayIn::StockTcp | WayIn::StockLine) => Some(Wish::List),
            12..24 => Some(Wish::Monitor),
            _ => {
                let host = self.host;
                let first = self.rng.usize(..host.domains.len());
                let mut domains = host.domains.iter().cycle().skip(first).take(host.domains.len());
                domains.find_map(|domain| Some(Wish::Order(order, domain, domain.hold()?)))
            }
        }
    }

    fn ask(&mut self, wish: Wish<'_>) -> Result<()> {
        match wish {
            Wish::Order(op, domain, hold) => return self.order(op, domain, hold),
            Wish::Refused(op, domain) => {
                let Said { told, .. } = self.one(op, domain, &[])?;
                // As with fence_virtd, the status of a domain that does not exist is "off".
                let is_off = told == Told::Off && domain == PROTECTED;
                if told == Told::Success || is_off {
                    self.violation(format_args!("{} of {domain} was answered with {told:?}", op.name()));
                }
            }
            Wish::List => {
                let Said { told, printed } = self.one(Op::HostList, "", &[])?;
                if told == Told::Success {
                    self.judge_list(&printed);
                }
            }
            Wish::Monitor => drop(self.one(Op::DevStatus, "", &[])?),
            Wish::Probe => drop(self.one(Op::Status, PROBE, &[])?),
        }
        Ok(())
    }

    /// One request, which is noted.
    fn one(&mut self, op: Op, domain: &str, victims: &[fence_lab::witness::Witness]) -> Result<Said> {
        let (sent, way, outages) = (Instant::now(), self.asker.way(), &self.host.outages);
        let said = self.asker.ask(self.host, op, domain, victims);
        // What cannot be judged has had no answer that counts.
        let told = said.as_ref().map_or(Told::Nothing, |said| said.told);
        self.judge.ended(&Request { way, op, told, sent, outages, victims: victims.len() });
        said
    }

    fn order(&mut self, op: Op, domain: &Domain, hold: Hold<'_>) -> Result<()> {
        let sent = Instant::now();
        let victims = domain.living(&self.host.hypervisor)?;
        let Said { told, .. } = self.one(op, &domain.name, &victims)?;
        let Hold::Alone(mut ordered) = hold else { return Ok(()) };
        let before = *ordered;
        if op != Op::Status {
            *ordered = sent;
        }
        if told == Told::Success && matches!(op, Op::Off | Op::On) {
            self.look_again(op, domain, before)?;
        }
        Ok(())
    }

    /// Nobody else gives orders: what is off stays off, and what is on runs.
    fn look_again(&self, op: Op, domain: &Domain, before: Instant) -> Result<()> {
        if op == Op::Off {
            std::thread::sleep(AGAIN);
        }
        let living = domain.living(&self.host.hypervisor)?;
        // libvirt may still carry out what it was asked for in an outage.
        let since = before.checked_sub(AFTERMATH).unwrap_or(before);
        if self.host.outages.since(since, |_| true) {
            return Ok(());
        }
        self.judge.note(|notes| notes.stayed += 1);
        if living.is_empty() == (op == Op::On) {
            let is = living.first().map_or_else(|| "nothing of it lives".to_owned(), |one| one.describe());
            self.violation(format_args!("after the success of {} of {}: {is}", op.name(), domain.name));
        }
        Ok(())
    }

    /// A list that lacks a domain makes a cluster forget it.
    fn judge_list(&self, printed: &str) {
        self.judge.note(|notes| notes.lists += 1);
        let has = |name: &&str| printed.lines().any(|line| line.split_whitespace().next() == Some(name));
        let missing: Vec<_> = self.host.listed().filter(|name| !has(name)).collect();
        if !missing.is_empty() {
            self.violation(format_args!("a list is a success and lacks {}: {printed}", missing.join(", ")));
        }
    }

    fn violation(&self, what: std::fmt::Arguments<'_>) {
        self.judge.violation(format_args!("hypervisor {}: by {}: {what}", self.number + 1, self.asker.way()));
    }
}
