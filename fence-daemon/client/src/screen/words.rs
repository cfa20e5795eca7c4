//! Numbers, times and counters in words.

use fence_common::verdict::{Counters, Verdict};

/// A time between two steps: `96 us`, `1.21 ms`, `12.3 s`.
#[must_use]
pub fn micros(micros: u64) -> String {
    match micros {
        0..1_000 => format!("{micros} us"),
        1_000..1_000_000 => in_three_digits(micros, 1_000, "ms"),
        _ => in_three_digits(micros, 1_000_000, "s"),
    }
}

/// `value` in a unit, with as many decimals as make three digits.
fn in_three_digits(value: u64, unit: u64, name: &str) -> String {
    let (whole, rest) = (value / unit, value % unit);
    match whole {
        0..10 => format!("{whole}.{:02} {name}", rest * 100 / unit),
        10..100 => format!("{whole}.{} {name}", rest * 10 / unit),
        _ => format!("{whole} {name}"),
    }
}

/// How long something has lasted: `3 s`, `4 min`, `3 h 12 min`, `5 d 4 h`.
#[must_use]
pub fn span(millis: u64) -> String {
    let seconds = millis / 1000;
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    match seconds {
        0..60 => format!("{seconds} s"),
        60..600 => format!("{minutes} min {} s", seconds % 60),
        600..3600 => format!("{minutes} min"),
        3600..86_400 => format!("{hours} h {} min", minutes % 60),
        _ => format!("{days} d {} h", hours % 24),
    }
}

/// The time of day of a time since 1970, in UTC as in the log: `02:59:07Z`.
#[must_use]
pub fn time_of_day(unix_millis: u64) -> String {
    let seconds = unix_millis / 1000 % 86_400;
    format!("{:02}:{:02}:{:02}Z", seconds / 3600, seconds / 60 % 60, seconds % 60)
}

/// A text on one line, in which nothing can control the terminal.
#[must_use]
pub fn harmless(text: &str) -> String {
    let is_harmless = |character: char| !character.is_control() && !is_direction(character);
    if text.chars().all(is_harmless) {
        return text.to_owned();
    }
    text.chars()
        .map(
            |character| {
                if is_harmless(character) { character.to_string() } else { character.escape_default().to_string() }
            },
        )
        .collect()
}

/// A harmless text in lines of at most `room` characters. A longer word has its own line.
#[must_use]
pub fn wrapped(text: &str, room: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in harmless(text).split(' ') {
        match lines.last_mut() {
            Some(line) if line.chars().count() + 1 + word.chars().count() <= room => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

/// Whether a character changes the direction of the text, or is invisible.
fn is_direction(character: char) -> bool {
    matches!(character, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
}

/// The names of the counters, in the order of the checks on a datagram.
pub fn counters() -> impl Iterator<Item = &'static str> {
    Counters::NAMES.into_iter()
}

/// What a counter counts, in a line; empty for an unknown counter.
#[must_use]
pub fn meaning(counter: &str) -> &'static str {
    let verdict = Verdict::COUNTED.into_iter().find(|verdict| verdict.counter_name() == Some(counter));
    verdict.map_or("", told)
}

fn told(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Delivered => "right in every respect: handed to the daemon",
        Verdict::RingFull => {
            "right, but the ring buffer was full: went to the socket (is the daemon kept from running?)"
        }
        Verdict::Stale => "right, but the daemon showed no sign of life: went to the socket",
        Verdict::SourceLimit => "not looked at: too many wrong digests from that sender (`failure_rate`)",
        Verdict::GlobalLimit => {
            "not looked at: too many wrong digests from senders that were never right (`stranger_rate`)"
        }
        Verdict::Replay => "a replay: this datagram was accepted before, and somebody has sent it again",
        Verdict::DeliveryLimit => "right, but one request too many from that sender (`request_rate`)",
        Verdict::RingReserve => "right, but the rest of the ring buffer is for other senders",
        Verdict::Busy => "the program interrupted itself on this CPU: went to the socket",
        Verdict::Options => "with IPv4 options: went to the socket",
        Verdict::Fragment => "in fragments: went to the socket",
        Verdict::Extension => "with IPv6 extension headers: went to the socket",
        Verdict::Malformed => "lengths that contradict each other: left to the network stack",
        Verdict::Gso => "several datagrams in one frame: went to the socket",
        Verdict::Martian => "a source address that no host has: left to the network stack",
        Verdict::ForeignVlan => "of another VLAN: passed to the listener there",
        Verdict::Length => "not 176 bytes long: no request of fence_xvm",
        Verdict::Op => "an operation that does not exist",
        Verdict::HashUnknown => "a kind of digest that does not exist",
        Verdict::Unsigned => "no digest: a guest's key file is missing, or it asks with `fence_xvm -c none`",
        Verdict::HashWeak => "a weaker digest than `hash` demands: see `fence_xvm -c` in the guest",
        Verdict::Domain => "a domain without end",
        Verdict::Port => "callback port 0",
        Verdict::Family => "a callback address of another family than the datagram's",
        Verdict::Address => "a callback address that no host has",
        Verdict::Loopback => "a loopback address as callback address, from another host",
        Verdict::Source => "the callback address is not the source: NAT? then `strict_source = \"no\";`",
        Verdict::Digest => {
            "wrong digest: another key in the guest, or forged; or a group's key from outside that group"
        }
        Verdict::NotOurs => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_short_and_exact_enough() {
        let expected = ["0 us", "999 us", "1.00 ms", "2.08 ms", "12.3 ms", "999 ms", "1.00 s", "25.0 s", "3600 s"];
        let micros_of = [0, 999, 1_000, 2_087, 12_345, 999_999, 1_000_000, 25_000_000, 3_600_000_000];
        assert_eq!(micros_of.map(micros), expected);
        assert!(!micros(u64::MAX).is_empty());
    }

    #[test]
    fn spans_have_two_units_at_most() {
        let seconds = [0, 59, 60, 754, 3600, 11_520, 86_400, 446_400];
        let expected = ["0 s", "59 s", "1 min 0 s", "12 min", "1 h 0 min", "3 h 12 min", "1 d 0 h", "5 d 4 h"];
        assert_eq!(seconds.map(|seconds| span(seconds * 1000)), expected);
        assert_eq!(time_of_day(1_763_780_347_999), "02:59:07Z");
    }

    #[test]
    fn control_characters_are_escaped() {
        assert_eq!(harmless("node-1 é"), "node-1 é");
        assert_eq!(harmless("a\x1b[31m\n\u{202e}b"), "a\\u{1b}[31m\\n\\u{202e}b");
    }

    #[test]
    fn each_counter_is_explained_in_a_line_of_its_own() {
        let mut seen = std::collections::BTreeSet::new();
        for name in counters() {
            let meaning = meaning(name);
            assert!(!meaning.is_empty() && meaning.len() <= 100 && seen.insert(meaning), "{name}: {meaning}");
        }
        assert_eq!(meaning("of_tomorrow"), "");
    }
}
