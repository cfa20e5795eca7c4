//! What a flood costs fence-daemon and fence_virtd: an honest guest asks meanwhile, and is timed.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use fence_common::wire::{Op, Request};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use zerocopy::IntoBytes;

use crate::caller;
use crate::stats::{Sample, Samples};
use fence_lab::client::Family;
use fence_lab::flood::{Flood, datagram, elsewhere, fragment, igmp};
use fence_lab::lab::{Guest, HYPERVISOR_V4, Hypervisor};
use fence_lab::peer::Peer;
use fence_lab::program::progress;
use fence_lab::server::{Config, Server, Which};

/// A key of the length that Debian's package makes.
const KEY: [u8; 4096] = [7; 4096];
/// The domain of libvirt's test driver.
const DOMAIN: &str = "test";
/// How many requests are timed, if there is time for them.
const REQUESTS: usize = 100;
/// How long one attack lasts at most.
const LASTS: Duration = Duration::from_secs(8);
/// After this long an honest request counts as lost.
const LOST_AFTER: Duration = Duration::from_secs(4);
/// How long a flood lasts before the honest guest asks.
const BEFORE: Duration = Duration::from_millis(500);
/// Between two requests.
const PAUSE: Duration = Duration::from_millis(20);

/// How long the server is stopped for the ring buffer to fill, and how long it runs in between.
const STOPPED: Duration = Duration::from_millis(200);
const RUNS: Duration = Duration::from_millis(300);

/// What it would take to meet the target for shared processors.
const SHARED: &str = ": a waiting client needs a processor, which it gets at the next tick on a kernel \
                      without preemption (4 ms). Tried: the daemon with real-time priority (no difference)";

/// This thread.
const MYSELF: Pid = Pid::from_raw(0);

/// The packets of an attack.
enum Packets {
    /// These, over and over.
    Same(Vec<Vec<u8>>),
    /// A right request each time, whose callback port has no listener.
    Fresh,
}

/// An attack.
struct Attack {
    name: &'static str,
    packets: Packets,
    /// Whether the bench stops the server time and again, so that the ring buffer fills.
    stopped: bool,
}

/// What one server did under one attack.
struct Stand {
    /// In seconds.
    answered: Samples,
    lost: usize,
    packets_per_second: f64,
    processor: f64,
    log_per_second: f64,
}

/// What answers, and how it is measured.
struct Responder {
    server: Server,
    honest: Peer,
    attacker: Guest,
    /// The processor of the flood, if it has its own.
    flooder: Option<CpuSet>,
}

/// An attack: what it is called, and both servers.
struct Comparison {
    name: &'static str,
    /// The flooder has a processor of its own.
    apart: Stand,
    ours: Stand,
    stock: Stand,
    /// Whether an answer's time is a matter of the server and the flood alone.
    comparable: bool,
}

/// The figures of all attacks.
pub struct Floods(Vec<Comparison>);

/// Measures both servers, one after the other, each in a lab of its own.
pub fn run(ours: &Which) -> Result<Floods> {
    let everywhere = sched_getaffinity(MYSELF)?;
    let apart = one(ours, "fence-daemon, the flooder apart", Some(halves(&everywhere)?));
    sched_setaffinity(MYSELF, &everywhere)?;
    let (apart, ours, stock) = (apart?, one(ours, "fence-daemon", None)?, one(&Which::Stock, "fence_virtd", None)?);
    let rows = apart.into_iter().zip(ours).zip(stock).map(|(((attack, apart), (_, ours)), (_, stock))| {
        let Attack { name, stopped, .. } = attack;
        Comparison { name, apart, ours, stock, comparable: !stopped }
    });
    Ok(Floods(rows.collect()))
}

/// The first processor, for the flooder, and the others.
fn halves(all: &CpuSet) -> Result<(CpuSet, CpuSet)> {
    let (mut flooder, mut others) = (CpuSet::new(), CpuSet::new());
    for (at, cpu) in (0..CpuSet::count()).filter(|cpu| all.is_set(*cpu).unwrap_or(false)).enumerate() {
        if at == 0 { flooder.set(cpu)? } else { others.set(cpu)? }
    }
    ensure!(others != CpuSet::new(), "the flooder's own processor takes a machine with two");
    Ok((flooder, others))
}

/// `apart`: the processor of the flooder, and those of server and honest guest.
fn one(which: &Which, called: &str, apart: Option<(CpuSet, CpuSet)>) -> Result<Vec<(Attack, Stand)>> {
    if let Some((_, others)) = &apart {
        // The server and all its threads inherit it.
        sched_setaffinity(MYSELF, others)?;
    }
    let hypervisor = Hypervisor::new()?;
    let (attacker, honest) = (hypervisor.guest(1)?, hypervisor.guest(2)?);
    let key = hypervisor.write("fence.key", &KEY)?;
    let attacks = attacks(&attacker, &honest)?;
    let server = Server::start(&hypervisor, which, &Config::new(&key))?;
    let honest = Peer::new(&honest, &KEY, Family::V4)?;
    let mut bed = Responder { server, honest, attacker, flooder: apart.map(|(flooder, _)| flooder) };
    let mut stands = Vec::new();
    for attack in attacks {
        progress(&format!("{called}: {} ...", attack.name));
        let stand = bed.stand(&attack)?;
        stands.push((attack, stand));
    }
    Ok(stands)
}

fn attacks(attacker: &Guest, honest: &Guest) -> Result<Vec<Attack>> {
    let peer = Peer::new(attacker, &KEY, Family::V4)?;
    let right = peer.sign(peer.request(Op::Status, DOMAIN)?)?;
    let mut wrong = right;
    wrong.hash[3] ^= 1;
    let forged = |n: u16| {
        let source = elsewhere(n);
        let mut request = wrong;
        fence_lab::peer::set_address(&mut request, source);
        let std::net::IpAddr::V4(source) = source else { return datagram(attacker.v4, &[]) };
        datagram(source, request.as_bytes())
    };
    let fragments = (0..2000).flat_map(|n| [(n, true), (n, false)]);
    let fragments = fragments.map(|(n, first)| fragment(attacker.v4, n, first, &[0; 800]));
    let noise = igmp::noise(&[attacker.v4, honest.v4, HYPERVISOR_V4])?;
    let same = |name, packets| Attack { name, packets: Packets::Same(packets), stopped: false };
    Ok(vec![
        same("nothing", Vec::new()),
        same("wrong digests from one source", vec![datagram(attacker.v4, wrong.as_bytes())?]),
        same("wrong digests from 10,000 forged sources", (0..10_000).map(forged).collect::<Result<_>>()?),
        same("one recorded request, over and over", vec![datagram(attacker.v4, right.as_bytes())?]),
        Attack { name: "right requests, each a new one", packets: Packets::Fresh, stopped: false },
        same("datagrams of 1400 bytes", vec![datagram(attacker.v4, &[0; 1400])?]),
        same("fragments", fragments.collect::<Result<_>>()?),
        same("IGMP in everybody's name", noise),
        Attack { name: "right requests, and nobody who takes them", packets: Packets::Fresh, stopped: true },
    ])
}

/// Right requests without an end.
fn fresh(attacker: &Guest) -> Result<impl Iterator<Item = Vec<u8>> + Send + use<>> {
    let (peer, source) = (Peer::new(attacker, &KEY, Family::V4)?, attacker.v4);
    let one = move || {
        let request = Request { port: 9.into(), ..peer.request(Op::Status, DOMAIN).ok()? };
        datagram(source, peer.sign(request).ok()?.as_bytes()).ok()
    };
    Ok(std::iter::from_fn(one))
}

/// The packets, whose sender moves to this processor with the first one.
fn placed<P>(mut processor: Option<CpuSet>, packets: impl Iterator<Item = P>) -> impl Iterator<Item = P> {
    packets.inspect(move |_| {
        if let Some(processor) = processor.take() {
            let _ = sched_setaffinity(MYSELF, &processor);
        }
    })
}

impl Responder {
    fn stand(&mut self, attack: &Attack) -> Result<Stand> {
        let flood = match &attack.packets {
            Packets::Same(packets) => {
                let packets = packets.clone();
                Flood::of(
                    &self.attacker,
                    placed(self.flooder, (0..packets.len()).cycle().map(move |at| packets[at].clone())),
                )?
            }
            Packets::Fresh => Flood::of(&self.attacker, placed(self.flooder, fresh(&self.attacker)?))?,
        };
        std::thread::sleep(BEFORE);
        let (used, log, sent) = (self.server.process().processor_time()?, self.server.log().len(), flood.sent());
        let begun = Instant::now();
        let (mut answered, mut lost) = (Samples::default(), 0);
        while answered.len() + lost < REQUESTS && begun.elapsed() < LASTS {
            let asked = if attack.stopped { self.ask_while_stopped()? } else { self.ask() };
            match asked {
                Some(answer) => answered.push(Sample { value: answer.as_secs_f64(), at_least: false }),
                None => lost += 1,
            }
            std::thread::sleep(if attack.stopped { RUNS } else { PAUSE });
        }
        let took = begun.elapsed().as_secs_f64();
        #[allow(clippy::cast_precision_loss, reason = "these are for people")]
        let per_second = |count: u64| count as f64 / took;
        let packets_per_second = per_second(flood.sent() - sent);
        let used = self.server.process().processor_time()?.saturating_sub(used);
        let log_per_second = per_second((self.server.log().len() - log) as u64);
        flood.stop()?;
        Ok(Stand { answered, lost, packets_per_second, processor: used.as_secs_f64() / took, log_per_second })
    }

    /// How long an answer takes. A conversation that breaks off is as good as none.
    fn ask(&self) -> Option<Duration> {
        let answer = caller::ask(&self.honest, Op::Status, DOMAIN, LOST_AFTER).ok().flatten();
        answer.map(|answer| answer.took())
    }

    /// The same, asked while the server stands still.
    fn ask_while_stopped(&mut self) -> Result<Option<Duration>> {
        self.server.process().signal(Signal::SIGSTOP)?;
        let asked = std::thread::scope(|scope| {
            let asking = scope.spawn(|| caller::ask(&self.honest, Op::Status, DOMAIN, LOST_AFTER).ok().flatten());
            std::thread::sleep(STOPPED);
            let gone_on = self.server.process().signal(Signal::SIGCONT);
            gone_on.map(|()| asking.join().ok().flatten())
        });
        Ok(asked?.map(|answer| answer.took()))
    }
}

impl Floods {
    /// The table, and what was wanted.
    #[must_use]
    pub fn table(&self) -> String {
        let p99 = |stand: &Stand| stand.answered.p99().map(|sample| sample.value);
        let mut text = String::from(
            "| the flood | packets/s | honest requests lost | p99 | processor | log |\n|---|--:|--:|--:|--:|--:|\n",
        );
        for row in &self.0 {
            let _ = writeln!(text, "| {} | | | | | |", row.name);
            for (who, stand) in [
                ("fence-daemon, the flooder apart", &row.apart),
                ("fence-daemon", &row.ours),
                ("fence_virtd", &row.stock),
            ] {
                let p99 = p99(stand).map_or_else(|| "-".to_owned(), |p99| format!("{:.2} ms", p99 * 1e3));
                let _ = writeln!(
                    text,
                    "| – {who} | {:.0} | {} of {} | {p99} | {:.1} % | {:.1} kB/s |",
                    stand.packets_per_second,
                    stand.lost,
                    stand.lost + stand.answered.len(),
                    stand.processor * 100.0,
                    stand.log_per_second / 1e3,
                );
            }
        }
        let lost: usize = self.0.iter().map(|row| row.ours.lost + row.apart.lost).sum();
        let met = |is: bool| if is { "met" } else { "**missed**" };
        let _ = writeln!(text, "\n| target | wanted | got | |\n|---|--:|--:|---|");
        let _ = writeln!(text, "| honest requests lost | 0 | {lost} | {} |", met(lost == 0));
        let places = [
            ("the flooder has its own processor", 2.0, (|row| &row.apart) as fn(&Comparison) -> &Stand, ""),
            ("they share processors", 3.0, |row| &row.ours, SHARED),
        ];
        for (place, limit, of, needed) in places {
            let compared = self.0.iter().skip(1).filter(|row| row.comparable);
            let worst = compared.filter_map(|row| p99(of(row))).reduce(f64::max);
            if let (Some(quiet), Some(worst)) = (self.0.first().and_then(|row| p99(of(row))), worst) {
                let (ratio, what) = (worst / quiet, "p99 under the worst flood, beside a quiet one");
                let reason = if ratio <= limit { "" } else { needed };
                let met = met(ratio <= limit);
                let _ = writeln!(text, "| {what}, {place} | at most {limit} × | {ratio:.1} × | {met}{reason} |");
            }
        }
        text
    }
}
