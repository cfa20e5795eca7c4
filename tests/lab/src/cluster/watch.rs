//! An observer on the host that records what happens to a cluster, and in which order. It sees
//! requests and replies on the wire, deaths by its own pidfds, Pacemaker's log, and the log of the
//! service that must never run twice.
//!
//! It asks neither the server nor libvirt, and judges at once. A success while the victim lives is
//! a breach, and so is a service that starts while another may run.

use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use fence_common::wire::Op;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::time::{ClockId, clock_gettime};

use super::judge::Judge;
use super::node::Node;
use super::shell::Shell as _;
use super::wire::{Packet, Tap};
use crate::board::Board;
use crate::witness::Witness;
use crate::worker::Worker;

/// How often files are looked at.
const TICK: Timespec = Timespec { tv_sec: 0, tv_nsec: 4_000_000 };
/// How often a node that is off is looked for.
const REBIRTH: Duration = Duration::from_millis(50);
/// Where Pacemaker writes its log on a node.
const PACEMAKER_LOG: &str = "/var/log/pacemaker/pacemaker.log";

/// The time since the host's boot: one clock that nothing sets.
#[must_use]
pub fn now() -> Duration {
    let time = clock_gettime(ClockId::Boottime);
    Duration::try_from(time).unwrap_or_default()
}

/// Something that happened. Nodes are numbered as they were given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Pacemaker on this node noticed that something is wrong with the other one.
    Noticed(usize),
    /// Pacemaker on this node sees the other one again.
    Returned(usize),
    /// A node sent a request.
    Asked {
        /// Who.
        by: usize,
        /// What.
        op: Op,
        /// Of which domain.
        domain: String,
    },
    /// A node was answered.
    Replied {
        /// Who.
        to: usize,
        /// The reply's byte.
        byte: u8,
    },
    /// All processes of a node are gone.
    Died(usize),
    /// A node has a first process again.
    Born(usize),
    /// The service started.
    Started(usize),
    /// The service stopped in order.
    Stopped(usize),
    /// What must not be.
    Breach(String),
}

/// An event and when it was seen, on the clock of [`now`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// When.
    pub at: Duration,
    /// What.
    pub event: Event,
}

/// A running observer. Dropping it ends it.
#[derive(Debug)]
pub struct Watch {
    book: Board<Vec<Seen>>,
    eyes: Worker,
}

impl Watch {
    /// Begins to look at these nodes.
    pub fn start(nodes: &[Node]) -> Result<Self> {
        let book = Board::default();
        let mut eyes = Eyes::open(nodes, book.clone())?;
        let eyes = Worker::start(move |stop| {
            // The observer must run before what it observes. Without the permission it has the
            // usual priority.
            let _ = rustix::process::setpriority_process(None, -20);
            eyes.look(stop)
        });
        Ok(Self { book, eyes })
    }

    /// All that was seen so far, in order.
    #[must_use]
    pub fn seen(&self) -> Vec<Seen> {
        self.book.lock().clone()
    }

    /// The number of the first event that is `wanted`; 0 where there is none.
    #[must_use]
    pub fn position(&self, wanted: impl Fn(&Event) -> bool) -> usize {
        self.book.lock().iter().position(|one| wanted(&one.event)).unwrap_or(0)
    }

    /// Waits for the first event from number `from` on for which `wanted` returns a value.
    ///
    /// # Errors
    /// It does not come in time, or a breach comes first: the error has all that was seen.
    pub fn wait_for<T>(
        &self,
        what: &str,
        from: usize,
        limit: Duration,
        wanted: impl Fn(&Event) -> Option<T>,
    ) -> Result<T> {
        let deadline = Instant::now() + limit;
        loop {
            // Second by second: an observer that has ended sees nothing any more.
            let left = deadline.saturating_duration_since(Instant::now()).min(Duration::from_secs(1));
            let found = self.book.wait(left, |seen| {
                let breach =
                    |one: &Seen| if let Event::Breach(breach) = &one.event { Some(breach.clone()) } else { None };
                let found = || seen.iter().skip(from).find_map(|one| wanted(&one.event)).map(Ok);
                seen.iter().find_map(breach).map(Err).or_else(found)
            });
            match found {
                Some(Ok(found)) => return Ok(found),
                Some(Err(breach)) => bail!("{breach}; seen: {:#?}", self.seen()),
                None => ensure!(!left.is_zero(), "waited {limit:?} in vain for {what}; seen: {:#?}", self.seen()),
            }
            ensure!(!self.eyes.has_ended(), "the observer has ended");
        }
    }

    /// Ends it: all that it has seen.
    pub fn finish(mut self) -> Result<Vec<Seen>> {
        self.eyes.stop()?;
        let seen = self.seen();
        let breaches: Vec<_> = seen.iter().filter(|one| matches!(one.event, Event::Breach(_))).collect();
        ensure!(breaches.is_empty(), "{breaches:?}; seen: {seen:#?}");
        Ok(seen)
    }
}

/// The lines that come to a file.
#[derive(Debug)]
struct Tail {
    path: PathBuf,
    at: u64,
    rest: String,
}

impl Tail {
    fn new(path: PathBuf) -> Self {
        let at = std::fs::metadata(&path).map_or(0, |file| file.len());
        Self { path, at, rest: String::new() }
    }

    fn lines(&mut self) -> Result<Vec<String>> {
        let Ok(mut file) = File::open(&self.path) else { return Ok(Vec::new()) };
        if file.metadata()?.len() <= self.at {
            return Ok(Vec::new());
        }
        let mut bytes = Vec::new();
        file.seek(SeekFrom::Start(self.at))?;
        self.at += u64::try_from(file.read_to_end(&mut bytes)?)?;
        self.rest.push_str(&String::from_utf8_lossy(&bytes));
        let mut lines: Vec<String> = self.rest.split('\n').map(str::to_owned).collect();
        self.rest = lines.pop().unwrap_or_default();
        Ok(lines)
    }
}

/// What the observer looks with.
struct Eyes {
    nodes: Vec<Node>,
    book: Board<Vec<Seen>>,
    tap: Tap,
    /// Each node's first process, while it lives.
    alive: Vec<Option<Arc<Witness>>>,
    logs: Vec<Tail>,
    service: Tail,
    judge: Judge,
    /// Requests and replies that were seen already. They pass several interfaces, and clients
    /// repeat them.
    known: Vec<Packet>,
    looked: Instant,
}

impl Eyes {
    fn open(nodes: &[Node], book: Board<Vec<Seen>>) -> Result<Self> {
        let hypervisor = nodes.first().context("no nodes to look at")?.hypervisor();
        let alive: Vec<_> = nodes.iter().map(|node| node.witness().ok().map(Arc::new)).collect();
        let mut eyes = Self {
            tap: Tap::open(hypervisor.space())?,
            logs: nodes.iter().map(|node| Tail::new(node.outside(PACEMAKER_LOG))).collect(),
            service: Tail { path: hypervisor.outside(&hypervisor.path("shared/log")), at: 0, rest: String::new() },
            judge: Judge::default(),
            known: Vec::new(),
            looked: Instant::now(),
            nodes: nodes.to_vec(),
            alive,
            book,
        };
        // What ran before: only who runs it now counts.
        for line in eyes.service.lines()? {
            if let Some((word, node, at)) = eyes.parse(&line) {
                eyes.judge.service(word, node, at, &eyes.alive);
            }
        }
        eyes.judge.begin();
        Ok(eyes)
    }

    fn note(&self, event: Event) {
        self.book.change(|seen| seen.push(Seen { at: now(), event }));
    }

    fn look(&mut self, stop: &AtomicBool) -> Result<()> {
        while !stop.load(Ordering::Relaxed) {
            let mut wanted = vec![PollFd::new(&self.tap, PollFlags::IN)];
            let pidfds: Vec<&Witness> = self.alive.iter().flatten().map(|witness| &**witness).collect();
            wanted.extend(pidfds.iter().map(|pidfd| PollFd::new(*pidfd, PollFlags::IN)));
            match poll(&mut wanted, Some(&TICK)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error).context("waiting for something to happen"),
            }
            self.packets()?;
            self.deaths()?;
            self.files()?;
        }
        Ok(())
    }

    /// Whether the victim lives is asked in the moment that the reply is seen.
    fn packets(&mut self) -> Result<()> {
        while let Some(packet) = self.tap.next()? {
            if self.known.contains(&packet) {
                continue;
            }
            self.known.push(packet.clone());
            let number = |address| self.nodes.iter().position(|node| node.member().address == address);
            match packet {
                Packet::Request { by, op, domain, .. } => {
                    let Some(by) = number(by) else { continue };
                    let victim = self.nodes.iter().position(|node| node.member().domain == domain);
                    self.judge.asked(by, op, victim.and_then(|victim| self.alive[victim].clone()));
                    self.note(Event::Asked { by, op, domain });
                }
                Packet::Reply { to, byte, .. } => {
                    let Some(to) = number(to) else { continue };
                    // A death that is known to the kernel by now came first.
                    self.deaths()?;
                    let breach = self.judge.replied(to, byte)?;
                    self.note(Event::Replied { to, byte });
                    breach.into_iter().for_each(|breach| self.note(Event::Breach(breach)));
                }
            }
        }
        Ok(())
    }

    fn deaths(&mut self) -> Result<()> {
        for number in 0..self.alive.len() {
            if let Some(witness) = &self.alive[number]
                && witness.dies_within(Duration::ZERO)?
            {
                self.judge.died(witness, now());
                self.alive[number] = None;
                self.note(Event::Died(number));
            }
        }
        if self.looked.elapsed() < REBIRTH || self.alive.iter().all(Option::is_some) {
            return Ok(());
        }
        self.looked = Instant::now();
        for number in 0..self.alive.len() {
            // A dead node is still found for a moment, until libvirt has cleaned up.
            if self.alive[number].is_none()
                && let Ok(witness) = self.nodes[number].witness()
                && !witness.dies_within(Duration::ZERO)?
            {
                self.alive[number] = Some(Arc::new(witness));
                self.note(Event::Born(number));
            }
        }
        Ok(())
    }

    fn files(&mut self) -> Result<()> {
        for number in 0..self.logs.len() {
            for line in self.logs[number].lines()? {
                let says = |state: &str| {
                    let others = self.nodes.iter().enumerate().filter(|(other, _)| *other != number);
                    others
                        .into_iter()
                        .any(|(_, node)| line.contains(&format!("Node {} state is now {state}", node.member().name)))
                };
                if says("lost") || line.contains(" will be fenced") || is_failed_monitor(&line) {
                    self.note(Event::Noticed(number));
                } else if says("member") {
                    self.note(Event::Returned(number));
                }
            }
        }
        for line in self.service.lines()? {
            let Some((word, node, at)) = self.parse(&line) else { bail!("the service's log says {line:?}") };
            let breach = self.judge.service(word, node, at, &self.alive);
            match word {
                "start" => self.note(Event::Started(node)),
                "stop" => self.note(Event::Stopped(node)),
                _ => {}
            }
            breach.into_iter().for_each(|breach| self.note(Event::Breach(breach)));
        }
        Ok(())
    }

    /// `start alpha 123`: what, on which node, and when by the service's own word.
    fn parse<'a>(&self, line: &'a str) -> Option<(&'a str, usize, Duration)> {
        let [word, name, at] = line.split(' ').collect::<Vec<_>>().try_into().ok()?;
        let node = self.nodes.iter().position(|node| node.member().name == name)?;
        Some((word, node, Duration::from_nanos(at.parse().ok()?)))
    }
}

/// Whether Pacemaker reports a failed recurring check of the service, not the probe before the
/// first start.
fn is_failed_monitor(line: &str) -> bool {
    line.contains("Result of monitor operation for solo") && !line.contains(": ok")
}
