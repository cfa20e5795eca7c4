//! The figures in the order of the table, and their targets.

use std::collections::BTreeMap;
use std::time::Duration;

use clap::ValueEnum;

use super::stats::{Sample, Samples, Unit, three};
use super::{hosts, restart, serial, tcp, thousand};

/// A part of the bench, which can be run alone (`--only`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Part {
    /// Start to ready, memory
    Own,
    /// Wake-ups in a minute of idleness
    Asleep,
    /// The round trip of a `status`
    Status,
    /// status, off and on of a domain that is off
    Off,
    /// off and reboot of a 16 MiB QEMU guest that does nothing
    Idle,
    /// off and reboot of a booted 192 MiB Linux guest
    Booted,
    /// off and reboot of a 4 GiB guest, all of whose memory was touched
    Touched,
    /// off and reboot of an LXC container that ignores SIGTERM
    Container,
    /// off of the 16 MiB guest beside a thousand other processes
    Beside,
    /// 17 `off`s at once
    Storm17,
    /// 100 `off`s at once
    Storm100,
    /// An honest request behind callers that say nothing, or are not there
    Callers,
    /// Requests by tcp, beside silent connections
    Tcp,
    /// Requests over a serial line
    Serial,
    /// A thousand domains
    Thousand,
    /// A restart of the daemon while libvirtd hangs
    Restart,
    /// off of a machine on another host of a cluster
    Hosts,
    /// The same in groups of 3, 16 and 32 hosts
    LargeGroups,
}

impl Part {
    /// All of them, in the table's order.
    pub const ALL: [Self; 18] = [
        Self::Idle,
        Self::Booted,
        Self::Touched,
        Self::Container,
        Self::Beside,
        Self::Storm17,
        Self::Storm100,
        Self::Callers,
        Self::Tcp,
        Self::Serial,
        Self::Thousand,
        Self::Restart,
        Self::Hosts,
        Self::LargeGroups,
        Self::Status,
        Self::Off,
        Self::Own,
        Self::Asleep,
    ];
}

/// Whose measurements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Contender {
    /// `fence-daemon`.
    Ours,
    /// `fence_virtd`.
    Stock,
    /// The bench itself, without any server: SIGKILL, and libvirt's own start. No server can beat
    /// that.
    Bare,
}

impl Contender {
    /// The program's name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Ours => "fence-daemon",
            Self::Stock => "fence_virtd",
            Self::Bare => "bare limit",
        }
    }
}

/// The target of a figure.
#[derive(Clone, Debug, PartialEq)]
pub enum Target {
    /// `fence_virtd` takes at least so many times as long.
    Faster(f64),
    /// At most so many times what `fence_virtd` has.
    OfStock(f64),
    /// At most so many times the bare limit.
    OfBare(f64),
    /// At most so much.
    AtMost(f64),
    /// At most so many times another figure of ours.
    OfOwn(f64, String),
    /// At most so many times another figure of ours, and once a figure of the bare limit.
    OfOwnAndBare(f64, String, String),
}

/// Whether a target is met.
#[derive(Clone, Debug, PartialEq)]
pub struct Verdict {
    /// The target in words.
    pub wanted: String,
    /// What came out: a ratio.
    pub got: String,
    /// Whether that is good enough.
    pub met: bool,
}

/// One line of the table.
#[derive(Clone, Debug, PartialEq)]
pub struct Figure {
    /// Its name in the code.
    pub id: String,
    /// The part that it belongs to.
    pub part: Part,
    /// Its name in the table.
    pub title: String,
    /// What it counts.
    pub unit: Unit,
    /// The targets, each with what it would take to meet it.
    pub targets: Vec<(Target, &'static str)>,
}

/// How many callers are in the way, by turns.
pub const CROWDS: [usize; 3] = [1, 10, 100];

/// The name of a figure about an honest request behind `count` callers of a kind.
#[must_use]
pub fn behind(kind: &str, count: usize) -> String {
    format!("{kind}.{count}")
}

/// All figures.
#[must_use]
pub fn all() -> Vec<Figure> {
    let mut figures = Vec::new();
    let mut add = |part, id: &str, title: &str, unit, targets: &[(Target, &'static str)]| {
        figures.push(Figure { id: id.to_owned(), part, title: title.to_owned(), unit, targets: targets.to_vec() });
    };
    for (part, victim, title) in [
        (Part::Idle, "idle", "idle QEMU guest, 16 MiB"),
        (Part::Booted, "booted", "booted QEMU guest, 192 MiB"),
        (Part::Touched, "touched", "QEMU guest, 4 GiB touched"),
        (Part::Container, "container", "LXC container"),
    ] {
        let [off, reboot, again]: [&[_]; 3] = match part {
            Part::Idle => [
                &[
                    (Target::Faster(30.0), "less between datagram and kill"),
                    (Target::OfBare(3.0), "less around the kill: datagram, callback, exchange and reply"),
                ],
                &[(Target::Faster(100.0), "as for off: the reply comes at the same moment")],
                &[
                    (Target::Faster(3.0), "a faster start of QEMU by libvirt, which is nearly all of it"),
                    (
                        Target::OfBare(1.15),
                        "less between the kill and libvirt's start, or a libvirt that notices a death sooner",
                    ),
                ],
            ],
            Part::Container => {
                [&[(Target::Faster(15.0), "a way to kill a container's processes beside libvirt")], &[], &[]]
            }
            Part::Own
            | Part::Asleep
            | Part::Status
            | Part::Off
            | Part::Booted
            | Part::Touched
            | Part::Beside
            | Part::Storm17
            | Part::Storm100
            | Part::Callers
            | Part::Tcp
            | Part::Serial
            | Part::Thousand
            | Part::Restart
            | Part::Hosts
            | Part::LargeGroups => [&[], &[], &[]],
        };
        let name = |what: &str| format!("{victim}.{what}");
        add(part, &name("off.dead"), &format!("{title}: off, to dead"), Unit::Time, &[]);
        add(part, &name("off.reply"), &format!("{title}: off, to reply"), Unit::Time, off);
        add(part, &name("reboot.dead"), &format!("{title}: reboot, to dead"), Unit::Time, &[]);
        add(part, &name("reboot.reply"), &format!("{title}: reboot, to reply"), Unit::Time, reboot);
        add(part, &name("reboot.running"), &format!("{title}: reboot, to running again"), Unit::Time, again);
    }
    let look = (
        Target::OfOwn(1.5, "idle.off.reply".to_owned()),
        "a quicker look at the host's processes. Tried: files of theirs held open, room in the kernel's table for them \
         (each growth took 8 to 16 ms), no look at the kernel's own threads. Each process is still read",
    );
    let title = "idle QEMU guest beside 1,000 processes: off, to reply";
    add(Part::Beside, "beside.off.reply", title, Unit::Time, &[look]);
    for (part, count) in [(Part::Storm17, 17), (Part::Storm100, 100)] {
        let target: &[_] = if part == Part::Storm100 {
            &[
                (
                    Target::Faster(50.0),
                    "more cores: that many guests die, and that many clients run, on those there are",
                ),
                (
                    Target::OfBare(1.25),
                    "less beside the kills: callbacks, clients, libvirt's destroys and looks. Tried: room in the kernel's table \
                     of open files, no search for what dying machines were (together 302 ms to 220 ms, one sample each)",
                ),
            ]
        } else {
            &[]
        };
        add(part, &format!("storm.{count}"), &format!("{count} offs at once: to the last reply"), Unit::Time, target);
        add(part, &format!("storm.{count}.each"), &format!("{count} offs at once: each one's reply"), Unit::Time, &[]);
    }
    add(Part::Callers, &behind("silent", 0), "status, nobody in the way", Unit::Time, &[]);
    for kind in ["silent", "dead"] {
        for count in CROWDS {
            let target = (Target::OfOwn(1.2, behind("silent", 0)), "fewer callbacks at once, or more cores");
            let targets = if (kind, count) == ("silent", 100) { vec![target] } else { Vec::new() };
            let title = format!("status behind {count} {kind} caller{}", if count == 1 { "" } else { "s" });
            add(Part::Callers, &behind(kind, count), &title, Unit::Time, &targets);
        }
    }
    figures.extend(tcp::figures());
    figures.extend(serial::figures());
    figures.extend(thousand::figures());
    figures.extend(restart::figures());
    figures.extend(hosts::figures());
    let mut add = |part, id: &str, title: &str, unit, targets: &[(Target, &'static str)]| {
        figures.push(Figure { id: id.to_owned(), part, title: title.to_owned(), unit, targets: targets.to_vec() });
    };
    let (wakeups, start) = (
        "fewer wake-ups between packet and reply",
        "less to do before the first connection to libvirt, which fence_virtd does not wait for",
    );
    let (looks, starts) = (
        "fewer wake-ups in libvirt's client: each call wakes the thread of its event loop some five times, and fence_virtd \
         runs no such loop. Tried: questions while the client proves itself (1.15 to 0.97 ms)",
        "a faster start of QEMU by libvirt, which is nearly all of it",
    );
    let memory = "a smaller program and heap: of some 26 MB the daemon's program is 5.0, its heap 1.8, the kernel \
                  program's maps 0.5. Tried: own code left to be read when it is used (0.4 MB less), one heap for all \
                  threads (nothing), a program of their own for the commands (0.6 MB of code less)";
    for (part, id, title, unit, target) in [
        (Part::Status, "status.raw", "status, datagram to reply", Unit::Time, Some((1.0, wakeups))),
        (Part::Status, "status.client", "status, all of fence_xvm", Unit::Time, None),
        (Part::Off, "off.status", "alone: status of a domain that is off", Unit::Time, Some((2.0, looks))),
        (Part::Off, "off.off", "alone: off of a domain that is off", Unit::Time, Some((2.0, looks))),
        (Part::Off, "off.on", "alone: on of a domain that is off", Unit::Time, Some((1.1, starts))),
        (Part::Own, "own.ready", "start to ready", Unit::Time, Some((1.5, start))),
        (Part::Own, "own.answer", "start to the first answer", Unit::Time, None),
        (Part::Own, "own.memory", "resident memory", Unit::Memory, Some((1.0, memory))),
    ] {
        let targets: Vec<_> = target.into_iter().map(|(limit, needed)| (Target::OfStock(limit), needed)).collect();
        add(part, id, title, unit, &targets);
    }
    let awake = (Target::AtMost(1.0), "fewer timers: the heartbeat and two connections' keepalives are left");
    add(Part::Asleep, "own.wakeups", "wake-ups while idle", Unit::Rate, &[awake]);
    figures
}

/// All that was measured.
#[derive(Clone, Debug, Default)]
pub struct Results(BTreeMap<(String, Contender), Samples>);

impl Results {
    /// Adds a measurement.
    pub fn add(&mut self, figure: &str, contender: Contender, value: f64) {
        self.push(figure, contender, Sample { value, at_least: false });
    }

    /// Adds a measured time; `None` where there was no end of it before `limit`.
    pub fn add_time(&mut self, figure: &str, contender: Contender, time: Option<Duration>, limit: Duration) {
        let sample = Sample { value: time.unwrap_or(limit).as_secs_f64(), at_least: time.is_none() };
        self.push(figure, contender, sample);
    }

    fn push(&mut self, figure: &str, contender: Contender, sample: Sample) {
        self.0.entry((figure.to_owned(), contender)).or_default().push(sample);
    }

    /// The measurements of a figure and a contender; `None` where there is none.
    #[must_use]
    pub fn get(&self, figure: &str, contender: Contender) -> Option<&Samples> {
        self.0.get(&(figure.to_owned(), contender))
    }

    /// The median of a figure, if there is one.
    #[must_use]
    pub fn median(&self, figure: &str, contender: Contender) -> Option<Sample> {
        self.get(figure, contender).and_then(Samples::median)
    }

    /// fence_virtd's median divided by ours. `at_least` means that the bench gave up on
    /// fence_virtd.
    #[must_use]
    pub fn ratio(&self, figure: &str) -> Option<Sample> {
        let (ours, stock) = (self.median(figure, Contender::Ours)?, self.median(figure, Contender::Stock)?);
        (!ours.at_least && ours.value > 0.0)
            .then(|| Sample { value: stock.value / ours.value, at_least: stock.at_least })
    }

    /// What became of a figure's target; `None` where something that it takes was not measured.
    #[must_use]
    pub fn verdict(&self, figure: &Figure, target: &Target) -> Option<Verdict> {
        let ours = self.median(&figure.id, Contender::Ours)?;
        let at_most = |limit: f64, base: Sample, of: &str| {
            let got = ours.value / base.value;
            let wanted = format!("at most {limit} × {of}");
            Verdict { wanted, got: format!("{} ×", three(got)), met: !ours.at_least && got <= limit }
        };
        Some(match target {
            Target::Faster(times) => {
                let stock = self.median(&figure.id, Contender::Stock)?;
                let got = stock.value / ours.value;
                let sign = if stock.at_least { "> " } else { "" };
                let wanted = format!("at least {times} × as fast as fence_virtd");
                Verdict { wanted, got: format!("{sign}{} ×", three(got)), met: !ours.at_least && got >= *times }
            }
            Target::OfStock(limit) => at_most(*limit, self.median(&figure.id, Contender::Stock)?, "fence_virtd's"),
            Target::OfBare(limit) => at_most(*limit, self.median(&figure.id, Contender::Bare)?, "the bare limit"),
            Target::AtMost(limit) => {
                let wanted = format!("at most {}", figure.unit.show(*limit));
                let met = !ours.at_least && ours.value <= *limit;
                Verdict { wanted, got: figure.unit.show_sample(Some(ours)), met }
            }
            Target::OfOwn(limit, other) => at_most(*limit, self.median(other, Contender::Ours)?, "the undisturbed one"),
            Target::OfOwnAndBare(times, other, bare) => {
                let (other, bare) = (self.median(other, Contender::Ours)?, self.median(bare, Contender::Bare)?);
                let limit = other.value.mul_add(*times, bare.value);
                let wanted = format!("at most {times} × the local one and a network round trip");
                let met = !ours.at_least && ours.value <= limit;
                let [got, limit] = [ours.value, limit].map(|value| figure.unit.show(value));
                Verdict { wanted, got: format!("{got} of {limit}"), met }
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figure(target: Target) -> Figure {
        let (id, title) = ("x".to_owned(), "x".to_owned());
        Figure { id, part: Part::Idle, title, unit: Unit::Time, targets: vec![(target, "")] }
    }

    fn verdict(ours: f64, stock: f64, bare: f64, target: Target) -> bool {
        let mut results = Results::default();
        results.add("x", Contender::Ours, ours);
        results.add("x", Contender::Stock, stock);
        results.add("x", Contender::Bare, bare);
        results.add("y", Contender::Ours, 1.0);
        let figure = figure(target);
        results.verdict(&figure, &figure.targets[0].0).unwrap().met
    }

    #[test]
    fn targets_are_met_and_missed_at_their_limits() {
        assert!(verdict(1.0, 30.0, 1.0, Target::Faster(30.0)));
        assert!(!verdict(1.0, 29.9, 1.0, Target::Faster(30.0)));
        assert!(verdict(3.0, 1.0, 1.0, Target::OfBare(3.0)));
        assert!(!verdict(3.1, 1.0, 1.0, Target::OfBare(3.0)));
        assert!(verdict(1.0, 9.0, 9.0, Target::AtMost(1.0)) && !verdict(1.1, 9.0, 9.0, Target::AtMost(1.0)));
        assert!(verdict(1.5, 1.0, 9.0, Target::OfStock(1.5)));
        assert!(!verdict(1.6, 1.0, 9.0, Target::OfStock(1.5)));
        let with_round = |times| Target::OfOwnAndBare(times, "y".into(), "x".into());
        assert!(verdict(2.5, 1.0, 0.5, with_round(2.0)) && !verdict(2.6, 1.0, 0.5, with_round(2.0)));
        assert!(verdict(1.2, 1.0, 9.0, Target::OfOwn(1.2, "y".into())));
        assert!(!verdict(1.3, 1.0, 9.0, Target::OfOwn(1.2, "y".into())));
    }

    #[test]
    fn an_aborted_measurement_meets_no_target() {
        let mut results = Results::default();
        results.add_time("x", Contender::Ours, None, Duration::from_secs(30));
        results.add("x", Contender::Stock, 1000.0);
        let figure = figure(Target::Faster(30.0));
        assert!(!results.verdict(&figure, &figure.targets[0].0).unwrap().met);
        assert_eq!(results.ratio("x"), None);
    }

    #[test]
    fn figures_have_unique_names_and_existing_references() {
        let figures = all();
        let mut names: Vec<_> = figures.iter().map(|figure| figure.id.clone()).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), figures.len());
        for (target, needed) in figures.iter().flat_map(|figure| &figure.targets) {
            assert!(!needed.is_empty());
            let others = match target {
                Target::OfOwn(_, other) => vec![other],
                Target::OfOwnAndBare(_, other, bare) => vec![other, bare],
                Target::Faster(_) | Target::OfStock(_) | Target::OfBare(_) | Target::AtMost(_) => Vec::new(),
            };
            assert!(others.iter().all(|other| names.contains(other)), "{others:?}");
        }
        assert!(Part::ALL.iter().all(|part| figures.iter().any(|figure| figure.part == *part)));
    }
}
