//! The measurement.

use std::hint::black_box;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use fence_common::admit::Rules;
use fence_common::boundary::{Config, KEY_SLOT_ACTIVE, Listener};
use fence_common::digest::PreparedKey;
use fence_common::hash::HashKind;
use fence_common::key::Key;
use fence_common::rate_limit::Limits;
use fence_common::wire::{DEFAULT_GROUP_V4, DEFAULT_GROUP_V6, DEFAULT_PORT, Request};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

use super::frames;
use super::verifier::{self, Effort};
use fence_lab::loaded::{self, Loaded, Size, XDP_DROP, XDP_PASS, object_path};

/// How often a program runs for one sample.
pub const REPEAT: u32 = 1_000_000;

/// What a frame's cost is compared with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Other traffic: beside the empty program.
    Ordinary,
    /// A request to the daemon with a fault other than its digest.
    Refused,
    /// A wrong digest: beside portable code.
    Digest,
}

/// What a frame costs, in nanoseconds.
#[derive(Clone, Debug)]
pub struct Cost {
    /// What it is.
    pub name: &'static str,
    /// What it is compared with.
    pub kind: Kind,
    /// A sample for each round.
    pub samples: Vec<f64>,
}

impl Cost {
    /// The sample in the middle.
    #[must_use]
    pub fn median(&self) -> f64 {
        let mut sorted = self.samples.clone();
        sorted.sort_by(f64::total_cmp);
        sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
    }
}

/// All that was measured.
#[derive(Clone, Debug)]
pub struct Figures {
    /// The empty program.
    pub empty: Cost,
    /// Three compressions of SHA-256 by the `sha2` crate, without the processor's SHA instructions.
    pub portable: Cost,
    /// Ours, by frame.
    pub frames: Vec<Cost>,
    /// How large the program is.
    pub size: Size,
    /// What the verifier did.
    pub effort: Effort,
    /// How long verifying and compiling it took.
    pub load_time: Duration,
}

/// The time that this thread has had a processor: what others had meanwhile does not count.
fn processor_time() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(u64::try_from(now.tv_sec).unwrap_or(0), u32::try_from(now.tv_nsec).unwrap_or(0))
}

/// What one of [`REPEAT`] runs took, in nanoseconds.
fn per_run(work: impl FnOnce() -> Result<()>) -> Result<f64> {
    let begin = processor_time();
    work()?;
    Ok((processor_time() - begin).as_secs_f64() * 1e9 / f64::from(REPEAT))
}

/// Stays on one processor: the last of those allowed, as the first has the interrupts.
fn stay() -> Result<()> {
    let me = Pid::from_raw(0);
    let allowed = sched_getaffinity(me)?;
    let last = (0..CpuSet::count()).rev().find(|cpu| allowed.is_set(*cpu).unwrap_or(false));
    let mut one = CpuSet::new();
    one.set(last.context("no processor")?)?;
    sched_setaffinity(me, &one).context("staying on one processor")
}

/// A key as long as the one of Debian's package. With it, a request needs three more blocks of
/// SHA-256.
fn key() -> Result<Key> {
    let bytes: Vec<u8> = (0..=u8::MAX).cycle().map(|byte| byte.wrapping_mul(37)).take(4096).collect();
    Key::new(&bytes).context("a key")
}

type Given = (&'static str, Kind, Vec<u8>, u32);

/// The frames, each with the answer that it must get.
fn given(key: &Key) -> Result<Vec<Given>> {
    let wrong = |kind, spoil: fn(&mut Request)| {
        let mut request = frames::request(key, kind);
        spoil(&mut request);
        frames::to_group(&request)
    };
    let forged = |kind| wrong(kind, |request| request.hash[3] ^= 1);
    Ok(vec![
        ("TCP over IPv4, 1502 bytes", Kind::Ordinary, frames::tcp()?, XDP_PASS),
        ("TCP over IPv6, 1502 bytes", Kind::Ordinary, frames::tcp_v6()?, XDP_PASS),
        ("ARP", Kind::Ordinary, frames::arp(), XDP_PASS),
        ("multicast DNS", Kind::Ordinary, frames::mdns()?, XDP_PASS),
        ("unknown operation", Kind::Refused, wrong(HashKind::Sha256, |request| request.op = 9)?, XDP_DROP),
        ("wrong SHA-256", Kind::Digest, forged(HashKind::Sha256)?, XDP_DROP),
        ("wrong SHA-1", Kind::Digest, forged(HashKind::Sha1)?, XDP_DROP),
        ("wrong SHA-512", Kind::Digest, forged(HashKind::Sha512)?, XDP_DROP),
    ])
}

/// Measures so many rounds.
pub fn run(rounds: usize) -> Result<Figures> {
    // On a thread of its own: what stays on one processor would have the floods and both servers
    // stay there, too.
    std::thread::scope(|scope| scope.spawn(|| on_one_processor(rounds)).join())
        .map_err(|_| anyhow!("a thread panicked"))?
}

fn on_one_processor(rounds: usize) -> Result<Figures> {
    stay()?;
    let mut fence = Loaded::fence()?;
    let empty_program = Loaded::empty()?;
    let config = Config::new(&Listener {
        group_v4: Some(DEFAULT_GROUP_V4),
        group_v6: Some(DEFAULT_GROUP_V6),
        port: DEFAULT_PORT,
        rules: Rules { min_hash: HashKind::Sha1, strict_source: true },
        // A sender is never stopped, or a million wrong digests would not be looked at.
        limits: Limits::NONE,
    });
    loaded::configure(&mut fence.ebpf, config)?;
    let key = key()?;
    loaded::set_slot(&mut fence.ebpf, KEY_SLOT_ACTIVE, Some(&PreparedKey::new(&key)))?;
    let given = given(&key)?;
    let cost = |name, kind| Cost { name, kind, samples: Vec::new() };
    let mut figures = Figures {
        empty: cost("an empty program", Kind::Ordinary),
        portable: cost("three compressions in portable Rust", Kind::Digest),
        frames: given.iter().map(|(name, kind, ..)| cost(name, *kind)).collect(),
        size: fence.size()?,
        effort: verifier::ask(&object_path())?,
        load_time: fence.load_time,
    };
    let frame = frames::tcp()?;
    for _ in 0..rounds {
        figures.empty.samples.push(per_run(|| answered(&empty_program, &frame, XDP_PASS))?);
        for ((.., frame, answer), cost) in given.iter().zip(&mut figures.frames) {
            cost.samples.push(per_run(|| answered(&fence, frame, *answer))?);
        }
        figures.portable.samples.push(per_run(|| {
            let blocks = [[0x5a_u8; 64].into(), [0x33; 64].into(), [0; 64].into()];
            let mut state = [1_u32; 8];
            for _ in 0..REPEAT {
                sha2_portable::compress256(&mut state, black_box(&blocks));
            }
            black_box(state);
            Ok(())
        })?);
    }
    Ok(figures)
}

fn answered(program: &Loaded, frame: &[u8], expected: u32) -> Result<()> {
    let (answer, _) = program.run(frame, REPEAT)?;
    ensure!(answer == expected, "the answer to a frame is {answer}, not {expected}");
    Ok(())
}
