//! Section `fence_virtd { rate_limit { } }`.

use std::time::Duration;

use fence_common::rate_limit::{Limit, Limits};

use super::contents::{Contents, Findings, Scope};
use super::error::Mistake;
use super::raw::clip;
use super::resolved::read;

pub(super) const RATE_LIMIT: Scope<'static> = Scope {
    named: &[],
    keys: &["failure_rate", "failure_burst", "stranger_rate", "request_rate", "request_burst", "replay_window"],
    lists: &[],
    numbered: &[],
    sections: &[],
    repeated: &[],
    unread: &[],
};

/// The rate limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RateLimit {
    /// Wrong digests per second from one sender; 0 for no limit.
    pub failure_rate: u32,
    /// Their burst.
    pub failure_burst: u32,
    /// Wrong digests per second from all untrusted senders together; 0 for no limit.
    pub stranger_rate: u32,
    /// Requests per second from one sender; 0 for no limit.
    pub request_rate: u32,
    /// Their burst.
    pub request_burst: u32,
    /// How long the replay cache remembers a datagram.
    pub replay_window: Duration,
}

impl Default for RateLimit {
    fn default() -> Self {
        Self {
            failure_rate: 1000,
            failure_burst: 2000,
            stranger_rate: 10_000,
            request_rate: 100,
            request_burst: 512,
            replay_window: Duration::from_secs(24 * 3600),
        }
    }
}

impl RateLimit {
    /// The limits as the kernel program and the socket take them.
    #[must_use]
    pub fn limits(&self) -> Limits {
        Limits {
            failures: Limit::per_second(self.failure_rate, self.failure_burst),
            strangers: Limit::per_second(self.stranger_rate, self.stranger_rate),
            deliveries: Limit::per_second(self.request_rate, self.request_burst),
            replay_window_ns: u64::try_from(self.replay_window.as_nanos()).unwrap_or(u64::MAX),
        }
    }

    /// Keys and values as in the configuration file.
    #[must_use]
    pub fn pairs(&self) -> [(&'static str, String); 6] {
        [
            ("failure_rate", self.failure_rate.to_string()),
            ("failure_burst", self.failure_burst.to_string()),
            ("stranger_rate", self.stranger_rate.to_string()),
            ("request_rate", self.request_rate.to_string()),
            ("request_burst", self.request_burst.to_string()),
            ("replay_window", span(self.replay_window)),
        ]
    }
}

/// Reads the section.
pub(super) fn rate_limit(section: &Contents<'_>, findings: &mut Findings<'_>) -> RateLimit {
    let default = RateLimit::default();
    let mut number = |key, least, default| {
        read(section.get(key), default, findings, |text| {
            let number = text.trim().parse().ok().filter(|number| (least..=MOST).contains(number));
            number.ok_or_else(|| Mistake::Number { key, value: clip(text), least, most: MOST })
        })
    };
    let failure_rate = number("failure_rate", 0, default.failure_rate);
    let failure_burst = number("failure_burst", 1, default.failure_burst);
    let stranger_rate = number("stranger_rate", 0, default.stranger_rate);
    let request_rate = number("request_rate", 0, default.request_rate);
    let request_burst = number("request_burst", 1, default.request_burst);
    let replay_window = read(section.get("replay_window"), default.replay_window, findings, |text| {
        parse_span(text.trim()).ok_or_else(|| Mistake::Span { key: "replay_window", value: clip(text) })
    });
    RateLimit { failure_rate, failure_burst, stranger_rate, request_rate, request_burst, replay_window }
}

/// More datagrams than any network card receives in a second.
const MOST: u32 = 1_000_000_000;
/// In seconds. fence_xvm resends for half a minute, and a restarted daemon reads what has queued
/// up.
const SHORTEST: u64 = 60;
/// A year, in seconds: longer than the replay cache lasts anywhere.
const LONGEST: u64 = 366 * 24 * 3600;

const UNITS: [(&str, u64); 4] = [("d", 24 * 3600), ("h", 3600), ("m", 60), ("s", 1)];

fn parse_span(text: &str) -> Option<Duration> {
    let found = UNITS.iter().find_map(|(unit, seconds)| Some((text.strip_suffix(unit)?, *seconds)));
    let (number, seconds) = found.unwrap_or((text, 1));
    let seconds = number.trim_end().parse::<u64>().ok()?.checked_mul(seconds)?;
    (SHORTEST..=LONGEST).contains(&seconds).then(|| Duration::from_secs(seconds))
}

/// A duration in the largest unit without a remainder, except days.
fn span(duration: Duration) -> String {
    let seconds = duration.as_secs();
    let unit = UNITS.iter().skip(1).find(|(_, unit)| seconds.is_multiple_of(*unit));
    unit.map_or_else(|| format!("{seconds}s"), |(name, unit)| format!("{}{name}", seconds / unit))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_are_read_and_written() {
        for (text, seconds) in [("60", 60), ("90s", 90), ("5m", 300), ("24h", 86_400), ("2 d", 172_800)] {
            assert_eq!(parse_span(text), Some(Duration::from_secs(seconds)), "{text}");
            assert_eq!(parse_span(&span(Duration::from_secs(seconds))), Some(Duration::from_secs(seconds)));
        }
        for text in ["", "h", "59", "0", "-5m", "1w", "1.5h", "367d", "99999999999999999999", "18446744073709551615d"] {
            assert_eq!(parse_span(text), None, "{text}");
        }
        assert_eq!(span(Duration::from_secs(86_400)), "24h");
    }

    #[test]
    fn the_defaults_are_those_of_the_program() {
        assert_eq!(RateLimit::default().limits(), Limits::default());
    }
}
