//! Reads the daemon's log line about a fence. Only this module knows its form: `key=value` words,
//! among them `op=` and `reply=`. Values with blanks are quoted.

use std::collections::BTreeMap;
use std::time::Duration;

/// One answered request as the daemon logged it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fence(BTreeMap<String, String>);

impl Fence {
    /// The steps in their order: packet in the kernel, digest verified, callback done, old machine
    /// dead, reply sent.
    pub const STEPS: [&str; 5] = ["kernel", "verified", "called_back", "dead", "replied"];

    /// Reads a log line; `None` if it is about something else.
    #[must_use]
    pub fn parse(line: &str) -> Option<Self> {
        let fields: BTreeMap<_, _> = words(line)
            .into_iter()
            .filter_map(|word| {
                let (key, value) = word.split_once('=')?;
                Some((key.to_owned(), value.to_owned()))
            })
            .collect();
        (fields.contains_key("op") && fields.contains_key("reply")).then_some(Self(fields))
    }

    /// A field, if the line has it.
    #[must_use]
    pub fn get(&self, field: &str) -> Option<&str> {
        self.0.get(field).map(String::as_str)
    }

    /// A step's time after the packet's arrival in the kernel, if the request had that step.
    #[must_use]
    pub fn step(&self, step: &str) -> Option<Duration> {
        self.get(step).and_then(duration)
    }
}

/// Splits at blanks that are not inside double quotes, and takes the quotes away.
fn words(line: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut quoted = false;
    for character in line.chars() {
        match character {
            '"' => quoted = !quoted,
            blank if blank.is_whitespace() && !quoted => words.push(String::new()),
            other => {
                if let Some(word) = words.last_mut() {
                    word.push(other);
                }
            }
        }
    }
    words
}

/// Parses `+2.1ms`, `+12us` or `0.000000s`; `None` for anything else (`-` means that the step did
/// not happen).
fn duration(text: &str) -> Option<Duration> {
    let text = text.trim_start_matches('+');
    let unit_at = text.find(|character: char| !character.is_ascii_digit() && character != '.')?;
    let (number, unit) = text.split_at(unit_at);
    let seconds = match unit {
        "s" => 1.0,
        "ms" => 1e-3,
        "us" | "µs" => 1e-6,
        "ns" => 1e-9,
        _ => return None,
    };
    Duration::try_from_secs_f64(number.parse::<f64>().ok()? * seconds).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_about_a_fence_is_read_and_others_are_not() {
        let fence = Fence::parse(
            "2026-11-22T11:30:00Z  INFO fenced op=off domain=\"vm 1\" source=192.168.122.11 via=kernel reply=success \
             kernel=0.000000s verified=+12us called_back=+310us dead=+2.1ms replied=+2.2ms",
        )
        .unwrap();
        assert_eq!(fence.get("domain"), Some("vm 1"));
        assert_eq!(fence.get("via"), Some("kernel"));
        assert_eq!(fence.step("kernel"), Some(Duration::ZERO));
        assert_eq!(fence.step("verified"), Some(Duration::from_micros(12)));
        assert_eq!(fence.step("dead"), Some(Duration::from_micros(2100)));
        assert_eq!(fence.step("absent"), None);
        assert_eq!(Fence::parse("ready interface=virbr0"), None);
        assert_eq!(duration("-"), None);
        assert_eq!(duration("+1.5s"), Some(Duration::from_millis(1500)));
    }
}
