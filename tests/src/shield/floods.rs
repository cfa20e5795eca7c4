//! What a flood costs this daemon and stock's: an honest guest asks meanwhile, and is timed.

use std::fmt::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use fence_common::wire::Op;
use zerocopy::IntoBytes;

use crate::bench::caller;
use crate::bench::progress;
use crate::client::Family;
use crate::flood::{Flood, Rounds, datagram, elsewhere};
use crate::lab::{Guest, Hypervisor};
use crate::peer::Peer;
use crate::server::{Config, Server, Which};

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
/// How long a flood goes on before somebody asks.
const BEFORE: Duration = Duration::from_millis(500);
/// Between two requests.
const PAUSE: Duration = Duration::from_millis(20);

/// What it is called, and the packets.
type Attack = (&'static str, Vec<Vec<u8>>);

/// What one server did under one attack.
struct Stand {
    answered: Vec<Duration>,
    lost: usize,
    packets_per_second: f64,
    processor: f64,
    log_per_second: f64,
}

impl Stand {
    fn p99(&self) -> Option<Duration> {
        let mut sorted = self.answered.clone();
        sorted.sort_unstable();
        sorted.get((sorted.len() * 99).div_ceil(100).checked_sub(1)?).copied()
    }
}

/// An attack: what it is called, and both servers.
struct Row {
    name: &'static str,
    ours: Stand,
    stock: Stand,
}

/// The figures of all attacks.
pub struct Floods(Vec<Row>);

/// Measures both servers, one after the other, each in a lab of its own.
///
/// # Errors
/// The lab fails.
pub fn run(daemon: &Path) -> Result<Floods> {
    let ours = one(&Which::Ours(daemon.to_owned()), "fence-daemon")?;
    let stock = one(&Which::Stock, "fence_virtd")?;
    let rows = ours.into_iter().zip(stock).map(|((name, ours), (_, stock))| Row { name, ours, stock });
    Ok(Floods(rows.collect()))
}

fn one(which: &Which, called: &str) -> Result<Vec<(&'static str, Stand)>> {
    let hypervisor = Hypervisor::new()?;
    let (attacker, honest) = (hypervisor.guest(1)?, hypervisor.guest(2)?);
    let key = hypervisor.write("fence.key", &KEY)?;
    let mut server = Server::start(&hypervisor, which, &Config::new(&key))?;
    let peer = Peer::new(&honest, &KEY, Family::V4)?;
    let mut stands = Vec::new();
    for (name, packets) in attacks(&attacker)? {
        progress(&format!("{called}: {name} ..."));
        stands.push((name, stand(&mut server, &peer, &attacker, packets)?));
    }
    Ok(stands)
}

/// What is sent, over and over.
fn attacks(attacker: &Guest) -> Result<Vec<Attack>> {
    let peer = Peer::new(attacker, &KEY, Family::V4)?;
    let right = peer.sign(peer.request(Op::Status, DOMAIN)?)?;
    let mut wrong = right;
    wrong.hash[3] ^= 1;
    let forged = |n: u16| {
        let source = elsewhere(n);
        let mut request = wrong;
        crate::peer::set_address(&mut request, source);
        let std::net::IpAddr::V4(source) = source else { return datagram(attacker.v4, &[]) };
        datagram(source, request.as_bytes())
    };
    Ok(vec![
        ("nothing", Vec::new()),
        ("wrong digests from one source", vec![datagram(attacker.v4, wrong.as_bytes())?]),
        ("wrong digests from 10,000 forged sources", (0..10_000).map(forged).collect::<Result<_>>()?),
        ("one recorded request, over and over", vec![datagram(attacker.v4, right.as_bytes())?]),
        ("datagrams of 1400 bytes", vec![datagram(attacker.v4, &[0; 1400])?]),
    ])
}

fn stand(server: &mut Server, peer: &Peer, attacker: &Guest, packets: Vec<Vec<u8>>) -> Result<Stand> {
    let flood = Flood::start(attacker, packets, Rounds::Endless)?;
    std::thread::sleep(BEFORE);
    let (begun, used, log, sent) = (Instant::now(), processor_time(server)?, server.log().len(), flood.sent());
    let mut answered = Vec::new();
    let mut lost = 0;
    while answered.len() + lost < REQUESTS && begun.elapsed() < LASTS {
        // A conversation that breaks off is as good as none.
        match caller::ask(peer, Op::Status, DOMAIN, LOST_AFTER).ok().flatten() {
            Some(answer) => answered.push(answer.took()),
            None => lost += 1,
        }
        std::thread::sleep(PAUSE);
    }
    let took = begun.elapsed().as_secs_f64();
    #[allow(clippy::cast_precision_loss, reason = "these are for people")]
    let per_second = |count: u64| count as f64 / took;
    let packets_per_second = per_second(flood.sent() - sent);
    let processor = processor_time(server)?.saturating_sub(used).as_secs_f64() / took;
    let log_per_second = per_second((server.log().len() - log) as u64);
    flood.stop()?;
    Ok(Stand { answered, lost, packets_per_second, processor, log_per_second })
}

/// How long the server has been computing since it was started.
fn processor_time(server: &mut Server) -> Result<Duration> {
    let path = format!("/proc/{}/stat", server.process().id());
    let stat = std::fs::read_to_string(&path).with_context(|| path.clone())?;
    // Behind the name, which may hold anything: state, ten others, user and system time in hundredths of a second.
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks = |index: usize| fields.get(index).and_then(|field| field.parse::<u64>().ok());
    let (user, system) = ticks(11).zip(ticks(12)).with_context(|| stat.clone())?;
    Ok(Duration::from_millis(10 * (user + system)))
}

impl Floods {
    /// The table, and what was wanted.
    #[must_use]
    pub fn table(&self) -> String {
        let mut text = String::from(
            "| the flood | packets/s | honest requests lost | p99 | processor | log |\n|---|--:|--:|--:|--:|--:|\n",
        );
        for row in &self.0 {
            let _ = writeln!(text, "| {} | | | | | |", row.name);
            for (who, stand) in [("fence-daemon", &row.ours), ("fence_virtd", &row.stock)] {
                let p99 =
                    stand.p99().map_or_else(|| "-".to_owned(), |p99| format!("{:.2} ms", p99.as_secs_f64() * 1e3));
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
        let quiet = self.0.first().and_then(|row| row.ours.p99());
        let lost: usize = self.0.iter().map(|row| row.ours.lost).sum();
        let worst = self.0.iter().skip(1).filter_map(|row| row.ours.p99()).max();
        let met = |is: bool| if is { "met" } else { "**missed**" };
        let _ = writeln!(text, "\n| target | wanted | got | |\n|---|--:|--:|---|");
        let _ = writeln!(text, "| honest requests lost | 0 | {lost} | {} |", met(lost == 0));
        if let (Some(quiet), Some(worst)) = (quiet, worst) {
            let ratio = worst.as_secs_f64() / quiet.as_secs_f64();
            let _ = writeln!(
                text,
                "| p99 under the worst flood, beside a quiet one | at most 2 × | {ratio:.1} × | {} |",
                met(ratio <= 2.0)
            );
        }
        text
    }
}
