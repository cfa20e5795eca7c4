//! What was answered, and what must not have been.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use fence_common::sync::lock;
use fence_common::wire::Op;
use fence_lab::observer::FalseSuccess;

use super::faults::FaultKind;
use crate::stats::{Sample, Samples};

/// By which way, and with whose client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum WayIn {
    StockMulticast,
    OwnMulticast,
    StockTcp,
    OwnTcp,
    StockLine,
    OwnLine,
    /// Ours by multicast, about a domain that no other process is needed for.
    Probe,
}

impl fmt::Display for WayIn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::StockMulticast => "multicast, `fence_xvm`",
            Self::OwnMulticast => "multicast, our client",
            Self::StockTcp => "tcp, `fence_virt`",
            Self::OwnTcp => "tcp, our client",
            Self::StockLine => "serial line, `fence_virt`",
            Self::OwnLine => "serial line, our client",
            Self::Probe => "multicast, probes",
        })
    }
}

/// What a client was told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Told {
    Success,
    Failure,
    /// The status of a domain that is off.
    Off,
    Denied,
    /// No answer came.
    Nothing,
}

impl Told {
    /// What a server's byte means; another one is no answer.
    pub(super) fn of_reply(reply: u8) -> Self {
        match reply {
            0 => Self::Success,
            1 => Self::Failure,
            2 => Self::Off,
            3 => Self::Denied,
            _ => Self::Nothing,
        }
    }

    /// Whether it says that the domain is dead.
    pub(super) fn means_death(self, op: Op) -> bool {
        match op {
            Op::Off | Op::Reboot => self == Self::Success,
            Op::Status => self == Self::Off,
            Op::Null | Op::On | Op::DevStatus | Op::HostList => false,
        }
    }
}

/// When the daemon or the libvirtd of a hypervisor was away, or hung.
#[derive(Debug, Default)]
pub(super) struct Outages(Mutex<Vec<(FaultKind, Instant, Option<Instant>)>>);

impl Outages {
    /// One begins now.
    pub(super) fn begin(&self, kind: FaultKind) {
        lock(&self.0).push((kind, Instant::now(), None));
    }

    /// All end now.
    pub(super) fn end(&self) {
        let now = Instant::now();
        lock(&self.0).iter_mut().for_each(|(_, _, end)| *end = Some(end.unwrap_or(now)));
    }

    /// Whether one of these was under way at some moment since then.
    pub(super) fn since(&self, then: Instant, is_one: impl Fn(FaultKind) -> bool) -> bool {
        // Newest first: a run of an hour has hundreds.
        let outages = lock(&self.0);
        outages.iter().rev().any(|&(kind, _, end)| is_one(kind) && end.is_none_or(|end| end >= then))
    }
}

/// The requests of one kind of client.
#[derive(Clone, Debug, Default)]
pub(super) struct Asked {
    pub(super) all: usize,
    pub(super) answered: usize,
    /// Of those during which the daemon was never away.
    pub(super) undisturbed: usize,
    pub(super) undisturbed_answered: usize,
    /// Seconds of those that were answered and undisturbed.
    pub(super) took: Samples,
}

/// A fault, and how long it took until the daemon answered again.
#[derive(Clone, Debug, Default)]
pub(super) struct Done {
    pub(super) count: usize,
    /// In seconds.
    pub(super) recovered: Samples,
}

/// Everything that was noted.
#[derive(Clone, Debug, Default)]
pub(super) struct Notes {
    pub(super) asked: BTreeMap<WayIn, Asked>,
    pub(super) told: BTreeMap<(&'static str, Told), usize>,
    pub(super) faults: BTreeMap<FaultKind, Done>,
    /// Successes that mean a death while a process of the domain lived when it was asked for.
    pub(super) kills: usize,
    /// Lists that were compared.
    pub(super) lists: usize,
    /// Domains that were looked at again after an `off` or `on`.
    pub(super) stayed: usize,
    /// Migrations that ended well, and that a fence ended.
    pub(super) migrations: (usize, usize),
    pub(super) flooded: u64,
    /// Domains that the exam has fenced and started.
    pub(super) examined: usize,
    /// Libvirtds that held one of them for ever, and were started again.
    pub(super) wedged: usize,
    pub(super) violations: Vec<String>,
}

/// One answered or unanswered request.
pub(super) struct Request<'r> {
    pub(super) way: WayIn,
    pub(super) op: Op,
    pub(super) told: Told,
    pub(super) sent: Instant,
    pub(super) outages: &'r Outages,
    /// How many processes of its domain lived when it was sent.
    pub(super) victims: usize,
}

/// What all threads report to.
#[derive(Debug)]
pub(super) struct Judge {
    notes: Mutex<Notes>,
    begun: Instant,
}

impl Judge {
    pub(super) fn new() -> Self {
        Self { notes: Mutex::default(), begun: Instant::now() }
    }

    /// What must not happen. It ends the run.
    pub(super) fn violation(&self, what: impl fmt::Display) {
        let at = self.begun.elapsed().as_secs_f64();
        lock(&self.notes).violations.push(format!("after {at:.1} s: {what}"));
    }

    /// Takes an error of the observer for a violation, if it says so. Any other error is the lab's,
    /// such as a process that ended while it was looked for: the request is then not judged.
    pub(super) fn is_violation(&self, host: usize, error: &anyhow::Error) -> bool {
        let is_one = error.downcast_ref::<FalseSuccess>().is_some();
        if is_one {
            self.violation(format!("hypervisor {}: {error:#}", host + 1));
        }
        is_one
    }

    /// Whether there is no violation.
    pub(super) fn is_clean(&self) -> bool {
        lock(&self.notes).violations.is_empty()
    }

    pub(super) fn note(&self, change: impl FnOnce(&mut Notes)) {
        change(&mut lock(&self.notes));
    }

    /// A request has ended now.
    pub(super) fn ended(&self, request: &Request<'_>) {
        let Request { way, op, told, sent, outages, victims } = *request;
        let took = sent.elapsed().as_secs_f64();
        let is_undisturbed = !outages.since(sent, FaultKind::is_of_daemon);
        let is_answered = told != Told::Nothing;
        self.note(|notes| {
            *notes.told.entry((op.name(), told)).or_default() += 1;
            notes.kills += usize::from(victims > 0 && told.means_death(op));
            let asked = notes.asked.entry(way).or_default();
            asked.all += 1;
            asked.answered += usize::from(is_answered);
            if is_undisturbed {
                asked.undisturbed += 1;
                asked.undisturbed_answered += usize::from(is_answered);
                if is_answered {
                    asked.took.push(Sample { value: took, at_least: false });
                }
            }
        });
    }

    /// A fault is over, and the daemon has answered again after this time.
    pub(super) fn recovered(&self, kind: FaultKind, took: Option<Duration>) {
        self.note(|notes| {
            let done = notes.faults.entry(kind).or_default();
            done.count += 1;
            if let Some(took) = took {
                done.recovered.push(Sample { value: took.as_secs_f64(), at_least: false });
            }
        });
    }

    /// A line about the progress.
    pub(super) fn summary(&self) -> String {
        let notes = lock(&self.notes);
        let sum = |of: fn(&Asked) -> usize| notes.asked.values().map(of).sum::<usize>();
        format!(
            "{} requests, {} answered, {} kills judged, {} faults, {} violations",
            sum(|asked| asked.all),
            sum(|asked| asked.answered),
            notes.kills,
            notes.faults.values().map(|done| done.count).sum::<usize>(),
            notes.violations.len(),
        )
    }

    pub(super) fn into_notes(self) -> Notes {
        fence_common::sync::unpoisoned(self.notes.into_inner())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outage_is_seen_by_what_overlaps_it() {
        let outages = Outages::default();
        let before = Instant::now();
        outages.begin(FaultKind::DaemonKill);
        assert!(outages.since(Instant::now(), FaultKind::is_of_daemon), "it is under way");
        outages.end();
        assert!(outages.since(before, FaultKind::is_of_daemon));
        assert!(!outages.since(before, FaultKind::is_of_libvirt));
        std::thread::sleep(Duration::from_millis(2));
        assert!(!outages.since(Instant::now(), FaultKind::is_of_daemon), "it is over");
    }

    #[test]
    fn only_the_observers_word_is_a_violation() {
        let judge = Judge::new();
        assert!(!judge.is_violation(0, &anyhow::anyhow!("a process has ended")) && judge.is_clean());
        let victim = fence_lab::witness::Witness::of_pid(std::process::id()).unwrap();
        let error = fence_lab::observer::judge_now("off of me", true, &[victim]).unwrap_err();
        assert!(judge.is_violation(1, &error.context("asking")) && !judge.is_clean());
        let told = judge.into_notes().violations.remove(0);
        assert!(told.contains("hypervisor 2") && told.contains("FALSE SUCCESS: off of me"), "{told}");
    }

    #[test]
    fn answers_are_counted_apart_where_the_daemon_was_away() {
        let (judge, outages) = (Judge::new(), Outages::default());
        let ask = |told| {
            let sent = Instant::now();
            judge.ended(&Request { way: WayIn::OwnTcp, op: Op::Off, told, sent, outages: &outages, victims: 1 });
        };
        ask(Told::Success);
        outages.begin(FaultKind::DaemonStop);
        ask(Told::Nothing);
        let notes = judge.into_notes();
        let asked = &notes.asked[&WayIn::OwnTcp];
        assert_eq!((asked.all, asked.answered, asked.undisturbed, asked.undisturbed_answered), (2, 1, 1, 1));
        assert_eq!(notes.kills, 1);
    }
}
