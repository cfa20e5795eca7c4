//! The kernel program and user space on mutated real frames: some thousand new ones in every run,
//! and every kept case.

use std::path::Path;

use fence_common::verdict::Verdict;
use fence_lab::differential::case::Case;
use fence_lab::differential::{Pair, run};

use crate::program::require_root;

/// Verdicts that no generated frame can get: no other program runs here, the rings are read, and
/// the daemon shows signs of life.
const NEVER: [Verdict; 4] = [Verdict::RingFull, Verdict::RingReserve, Verdict::Busy, Verdict::Stale];

#[test]
fn every_kept_case_has_its_verdict_from_both() {
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

#[test]
fn new_frames_have_the_same_verdict_from_both() {
    require_root();
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("a time since 1970");
    let seed = u64::from(now.subsec_nanos()) << 32 | u64::from(std::process::id());
    run(seed, 20_000).unwrap_or_else(|error| panic!("from seed {seed}: {error:#}"));
}
