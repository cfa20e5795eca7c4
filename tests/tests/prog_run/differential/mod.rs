//! The kernel program and user space on mutated real frames: some thousand new ones in every run,
//! and every kept case.
//!
//! * `case`: one case, and its text form.
//! * `make`: cases from the golden datagrams, mutated before and after signing.
//! * `pair`: runs both on a case.

mod case;
mod make;
mod pair;

use std::path::Path;
use std::thread;

use fence_common::verdict::Verdict;

use case::Case;
use pair::{Coverage, Pair, run};

use crate::program::require_root;

/// Verdicts that no generated frame can get: no other program runs here, the rings are read, and
/// the daemon shows signs of life.
const NEVER: [Verdict; 4] = [Verdict::RingFull, Verdict::RingReserve, Verdict::Busy, Verdict::Stale];

#[test]
fn kernel_and_user_space_agree_on_every_kept_case() {
    require_root();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus/program");
    let mut pair = Pair::load().expect("the program");
    let mut seen = 0;
    for entry in folder.read_dir().expect("the kept cases") {
        let path = entry.expect("a kept case").path();
        let text = std::fs::read_to_string(&path).expect("a case is text");
        let case = Case::parse(&text).unwrap_or_else(|error| panic!("{}: {error:#}", path.display()));
        let verdict = pair.run(&case).unwrap_or_else(|error| panic!("{}: {error:#}", path.display()));
        let stated = text.lines().find_map(|line| line.strip_prefix("verdict="));
        assert_eq!(stated, Some(format!("{verdict:?}").as_str()), "{}", path.display());
        seen += 1;
    }
    assert!(seen >= 19, "only {seen} cases in {}", folder.display());
}

/// One fixed seed, so each run gives the same verdicts: every verdict that a frame can get.
#[test]
fn known_frames_come_to_every_verdict_and_the_same_from_both() {
    require_root();
    let coverage = run(1, 20_000).unwrap_or_else(|error| panic!("{error:#}"));
    for verdict in Verdict::COUNTED.into_iter().chain([Verdict::NotOurs]) {
        let reached = coverage.of(verdict) > 0;
        assert_eq!(reached, !NEVER.contains(&verdict), "{verdict:?}: {} cases", coverage.of(verdict));
    }
}

/// A number that `cargo xtask fuzz program` gives.
fn given(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|number| number.parse().unwrap_or_else(|error| panic!("{name}: {error}")))
}

#[test]
#[allow(clippy::print_stdout, reason = "`cargo xtask fuzz program` shows what was covered")]
fn new_frames_have_the_same_verdict_from_both() {
    require_root();
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("a time since 1970");
    let chance = u64::from(now.subsec_nanos()) << 16 ^ u64::from(std::process::id());
    let (seed, cases) = (given("FENCE_SEED").unwrap_or(chance), given("FENCE_CASES").unwrap_or(20_000));
    let threads = thread::available_parallelism().map_or(1, |count| count.get() as u64);
    let one = |number: u64| {
        let share = cases / threads + u64::from(number < cases % threads);
        run(seed.wrapping_add(number << 48), share).unwrap_or_else(|error| panic!("from seed {seed}: {error:#}"))
    };
    let mut all = Coverage::default();
    thread::scope(|scope| {
        let running: Vec<_> = (0..threads).map(|number| scope.spawn(move || one(number))).collect();
        running.into_iter().for_each(|thread| all.merge(thread.join().expect("no difference")));
    });
    for (name, count) in all.iter() {
        println!("{name:<12} {count:>10}");
    }
}
