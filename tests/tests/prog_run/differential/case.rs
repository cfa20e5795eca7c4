//! A case: a frame and the program's settings, as text that a person can read and edit.

use std::fmt;
use std::fmt::Write as _;

use anyhow::{Context, Result, ensure};
use fence_common::admit::Rules;
use fence_common::boundary::{Config, Listener};
use fence_common::hash::HashKind;
use fence_common::rate_limit::{Limit, Limits};
use fence_common::wire::{DEFAULT_GROUP_V4, DEFAULT_GROUP_V6, DEFAULT_PORT};
use fence_lab::loaded::SHORTEST;

/// What the program is set to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Setting {
    /// Which of the fixtures' keys: its length.
    pub(super) key: usize,
    /// The weakest digest that is taken.
    pub(super) min_hash: HashKind,
    /// Whether an IPv4 callback address must be the datagram's source.
    pub(super) strict_source: bool,
    /// Whether a sender may do a few things only, and nothing twice.
    pub(super) bounded: bool,
}

/// A small number that never refills during a run, so the rest does not depend on the clock.
const FEW: Limits = {
    const HOUR: u64 = 3_600_000_000_000;
    const fn only(burst: u64) -> Limit {
        Limit { every_ns: 10 * HOUR, ahead_ns: 10 * HOUR * (burst - 1) }
    }
    Limits { failures: only(1), strangers: only(12), deliveries: only(6), replay_window_ns: HOUR }
};

impl Default for Setting {
    fn default() -> Self {
        Self { key: 115, min_hash: HashKind::Sha256, strict_source: true, bounded: false }
    }
}

impl Setting {
    /// In the program's own form.
    #[must_use]
    pub(super) fn config(&self) -> Config {
        Config::new(&Listener {
            group_v4: Some(DEFAULT_GROUP_V4),
            group_v6: Some(DEFAULT_GROUP_V6),
            port: DEFAULT_PORT,
            rules: Rules { min_hash: self.min_hash, strict_source: self.strict_source },
            limits: if self.bounded { FEW } else { Limits::NONE },
        })
    }
}

/// A frame, and what the program is set to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Case {
    /// What the program is set to.
    pub(super) setting: Setting,
    /// The frame, at least an Ethernet header long: the kernel's test run takes nothing shorter.
    pub(super) frame: Vec<u8>,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Setting { key, min_hash, strict_source, bounded } = self.setting;
        let mut frame = String::new();
        for byte in &self.frame {
            write!(frame, "{byte:02x}")?;
        }
        write!(f, "key={key} min_hash={} strict_source={strict_source} ", min_hash.name())?;
        write!(f, "bounded={bounded} frame={frame}")
    }
}

impl Case {
    /// Reads what [`Display`](fmt::Display) writes; lines that begin with `#` are for people.
    pub(super) fn parse(text: &str) -> Result<Self> {
        let words = || text.lines().filter(|line| !line.starts_with('#')).flat_map(str::split_whitespace);
        let value = |name: &str| {
            let mut values = words().filter_map(|word| word.strip_prefix(name)?.strip_prefix('='));
            values.next().with_context(|| format!("no {name}="))
        };
        let hex = value("frame")?;
        ensure!(hex.len() % 2 == 0 && hex.is_ascii(), "the frame is not in pairs of hexadecimal digits");
        let frame: Result<Vec<u8>, _> =
            (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16)).collect();
        let frame = frame.context("the frame's digits")?;
        ensure!(frame.len() >= SHORTEST, "the kernel's test run takes no frame of {} bytes", frame.len());
        let setting = Setting {
            key: value("key")?.parse().context("the key's length")?,
            min_hash: HashKind::from_name(value("min_hash")?).context("no such digest")?,
            strict_source: value("strict_source")?.parse().context("strict_source")?,
            bounded: value("bounded")?.parse().context("bounded")?,
        };
        Ok(Self { setting, frame })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_case_reads_back_as_it_was_written() {
        let case = Case { setting: Setting::default(), frame: (0..=255).collect() };
        assert_eq!(Case::parse(&format!("# what it is\n{case}\n")).unwrap(), case);
        for wrong in [
            "",
            "key=1 min_hash=sha256 strict_source=true bounded=false frame=00",
            "key=1 min_hash=md5 strict_source=true",
        ] {
            assert!(Case::parse(wrong).is_err(), "{wrong}");
        }
    }
}
