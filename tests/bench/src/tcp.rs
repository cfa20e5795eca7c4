//! Requests by tcp: alone, fifty at once beside a silent client, and beside a thousand silent
//! connections.

use std::collections::VecDeque;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use fence_common::wire::{DEFAULT_PORT, Op};
use fence_lab::lab::HYPERVISOR_V4;
use fence_lab::peer::Peer;
use fence_lab::qemu;
use socket2::{Domain, Socket, Type};
use zerocopy::IntoBytes as _;

use super::bed::{Bed, Victim};
use super::caller::{self, Answer, PATIENCE};
use super::figures::{Contender, Figure, Part, Results, Target};
use super::stats::{Sample, Samples, Unit};

const HERE: SocketAddr = SocketAddr::new(IpAddr::V4(HYPERVISOR_V4), DEFAULT_PORT);
/// How many clients ask at once.
const CLIENTS: usize = 50;
/// How many connections each of the crowd's hundred addresses has open and says nothing on.
const EACH: usize = 10;
/// All of them.
const CROWDED: u32 = 1000;
/// How long the daemon keeps a silent connection.
const KEPT: Duration = Duration::from_secs(1);
/// How many turns the requests with and without a crowd take.
const WINDOWS: usize = 5;
/// The pause between the requests whose slowest count. The daemon's rate limit permits one sender a
/// hundred in a second.
const PAUSE: Duration = Duration::from_millis(12);

const STATUS: &str = "tcp.status";
const MULTICAST: &str = "tcp.multicast";
const SILENT: &str = "tcp.silent";
const MUTE: &str = "tcp.mute";
const QUIET: &str = "tcp.quiet.p99";
const CROWD: &str = "tcp.crowd.p99";

pub(crate) fn figures() -> Vec<Figure> {
    let figure = |id: &str, title: &str, targets: &[(Target, &'static str)]| Figure {
        id: id.to_owned(),
        part: Part::Tcp,
        title: title.to_owned(),
        unit: Unit::Time,
        targets: targets.to_vec(),
    };
    let (less, cores) = ("fewer wake-ups between request and reply", "more cores: the clients run on those there are");
    vec![
        figure(STATUS, "status by tcp, connection to reply", &[(Target::OfStock(1.0), less)]),
        figure(MULTICAST, "status by multicast, same daemon", &[]),
        figure(SILENT, "50 at once by tcp, one silent: last reply", &[(Target::Faster(20.0), cores)]),
        figure(MUTE, "the same, one silent in the exam", &[(Target::Faster(20.0), cores)]),
        figure(QUIET, "status by tcp: p99", &[]),
        figure(
            CROWD,
            "status by tcp beside 1,000 silent ones: p99",
            &[(
                Target::OfOwn(2.0, QUIET.to_owned()),
                "cheaper connections, or more cores. Tried: no count of all others at each connection",
            )],
        ),
    ]
}

/// What both contenders can do; and ours the rest: each silent connection costs fence_virtd one
/// second.
pub fn measure(bed: &Bed, contender: Contender, times: usize, results: &mut Results) -> Result<()> {
    bed.bring_up(Victim::Idle)?;
    let domain = Victim::Idle.name();
    let server = bed.serve_by_tcp(contender, qemu::URI)?;
    let peer = bed.peer()?;
    let ask = || ask(&peer, domain);
    for answer in bed.asker.space().in_network(|| (0..5 * times).map(|_| ask()).collect::<Result<Vec<_>>>())? {
        results.add(STATUS, contender, answer.took().as_secs_f64());
    }
    for (figure, is_mute) in [(SILENT, false), (MUTE, true)] {
        results.add_time(figure, contender, fifty(bed, is_mute)?, PATIENCE);
    }
    if contender == Contender::Ours {
        for _ in 0..5 * times {
            let answer = caller::ask(&peer, Op::Status, domain, PATIENCE)?;
            results.add_time(MULTICAST, contender, answer.map(|answer| answer.took()), PATIENCE);
        }
        let window = |samples: &mut Samples| {
            bed.asker.space().in_network(|| {
                for _ in 0..5 * times {
                    let value = ask()?.took().as_secs_f64();
                    samples.push(Sample { value, at_least: false });
                    std::thread::sleep(PAUSE);
                }
                Ok(())
            })
        };
        let (mut quiet, mut crowded) = (Samples::default(), Samples::default());
        // By turns, so that other load on the machine hits both.
        for _ in 0..WINDOWS {
            window(&mut quiet)?;
            beside_a_crowd(bed, || window(&mut crowded))?;
        }
        for (figure, samples) in [(QUIET, &quiet), (CROWD, &crowded)] {
            results.add(figure, contender, samples.percentile(99).context("no sample")?.value);
        }
    }
    drop(server);
    bed.remove(Victim::Idle)
}

/// Asks for a status by tcp, in the network of the calling thread.
fn ask(peer: &Peer, domain: &str) -> Result<Answer> {
    let request = peer.sign(peer.stream_request(Op::Status, domain)?)?;
    let sent = Instant::now();
    let mut connection = peer.connect_here(HERE)?;
    connection.write(request.as_bytes())?;
    let code = connection.converse()?;
    ensure!(code == 0, "status of a running machine: {code}");
    Ok(Answer { sent, replied: Instant::now(), code })
}

/// The time of fifty clients at once, to the last reply; `None` if one of them has none in the end.
/// A further client came before them, and says nothing, or sends its request and then nothing.
///
/// Behind it the kernel resets connections to fence_virtd, whose queue takes ten. Their clients
/// connect again at once.
fn fifty(bed: &Bed, is_mute: bool) -> Result<Option<Duration>> {
    let peer = bed.peer()?;
    let domain = Victim::Idle.name();
    let until_answered = || {
        let begin = Instant::now();
        while begin.elapsed() < PATIENCE {
            if let Ok(answer) = ask(&peer, domain) {
                return Some((begin, answer.replied));
            }
        }
        None
    };
    bed.asker.space().in_network(|| {
        let mut silent = peer.connect_here(HERE)?;
        if is_mute {
            silent.write(peer.sign(peer.stream_request(Op::Status, domain)?)?.as_bytes())?;
        }
        // The server is to meet it first.
        std::thread::sleep(PAUSE);
        let begin = Barrier::new(CLIENTS);
        let answers = std::thread::scope(|scope| {
            let asking: Vec<_> = (0..CLIENTS)
                .map(|_| {
                    scope.spawn(|| {
                        begin.wait();
                        until_answered()
                    })
                })
                .collect();
            let answers = asking.into_iter().map(|one| one.join().map_err(|_| anyhow!("a client panicked")));
            answers.collect::<Result<Option<Vec<_>>>>()
        })?;
        drop(silent);
        Ok(answers.and_then(|answers| {
            let first = answers.iter().map(|(begun, _)| *begun).min()?;
            let last = answers.iter().map(|(_, replied)| *replied).max()?;
            Some(last - first)
        }))
    })
}

/// Measures while a thousand connections are open that say nothing. The daemon closes each after a
/// second, and another one takes its place.
fn beside_a_crowd<T>(bed: &Bed, measured: impl FnOnce() -> Result<T>) -> Result<T> {
    let (over, full) = (AtomicBool::new(false), AtomicBool::new(false));
    let addresses = bed.crowd_addresses();
    std::thread::scope(|scope| {
        let crowd = scope.spawn(|| {
            bed.crowd.space().in_network(|| {
                let mut open = VecDeque::new();
                let from = addresses.iter().flat_map(|address| [*address; EACH]).cycle();
                for address in from.take_while(|_| !over.load(Ordering::Relaxed)) {
                    open.push_back(connect_from(address)?);
                    if open.len() > CROWDED as usize {
                        open.pop_front();
                        full.store(true, Ordering::Relaxed);
                        // Evenly: each comes when one of the others has had its second.
                        std::thread::sleep(KEPT / CROWDED);
                    }
                }
                Ok(())
            })
        });
        while !full.load(Ordering::Relaxed) && !crowd.is_finished() {
            std::thread::sleep(PAUSE);
        }
        let measured = measured();
        over.store(true, Ordering::Relaxed);
        crowd.join().map_err(|_| anyhow!("the crowd panicked"))??;
        measured
    })
}

fn connect_from(address: Ipv4Addr) -> Result<TcpStream> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    socket.bind(&SocketAddr::from((address, 0)).into())?;
    socket.connect_timeout(&HERE.into(), PATIENCE)?;
    Ok(socket.into())
}
