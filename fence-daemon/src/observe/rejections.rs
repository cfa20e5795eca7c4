//! The log line about senders whose requests are rejected before the digest: misconfigured guests.
//!
//! A datagram causes no line. About every ten seconds the daemon looks at the senders that were
//! rejected before their digest was checked. At most one line in ten minutes names the latest of
//! them, whatever the number of datagrams.

use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

use fence_common::words::counted;
use tokio::sync::Notify;

use super::sources::RejectedView;
use crate::clock::Moment;

/// The least time between two lines.
const BETWEEN: Duration = Duration::from_secs(600);
/// How many senders a line names.
const NAMED: usize = 4;

/// Reads the `rejected` senders at each `look` and logs, for as long as it is polled. `told` takes
/// the senders that a line is about.
pub async fn watch(look: Arc<Notify>, rejected: impl Fn() -> Vec<RejectedView>, told: impl Fn(Vec<RejectedView>)) {
    let mut lines = Lines::default();
    loop {
        look.notified().await;
        let rejected = rejected();
        let last = lines.0;
        if let Some(line) = lines.line(&rejected, Moment::now()) {
            tracing::warn!("{line}");
            told(rejected.into_iter().filter(|one| is_new(one, last)).collect());
        }
    }
}

/// Whether a sender is worth a line, and came after the last one.
fn is_new(one: &RejectedView, last: Option<Moment>) -> bool {
    last.is_none_or(|last| one.last_seen > last) && one.verdict.cause().is_some()
}

/// When the last line was logged.
#[derive(Debug, Default)]
struct Lines(Option<Moment>);

impl Lines {
    /// The line to log, if there is news and it is time.
    fn line(&mut self, rejected: &[RejectedView], now: Moment) -> Option<String> {
        let new: Vec<_> = rejected.iter().filter(|one| is_new(one, self.0)).collect();
        if new.is_empty() || self.0.is_some_and(|last| now.since(last) < BETWEEN) {
            return None;
        }
        self.0 = Some(now);
        let mut line = String::from("rejected before the digest:");
        for one in new.iter().take(NAMED) {
            let mac = one.mac.map(|mac| mac.map(|byte| format!("{byte:02x}")).join(":"));
            let mac = mac.map(|mac| format!(" ({mac})")).unwrap_or_default();
            let cause = one.verdict.cause().unwrap_or_default();
            let _ = write!(line, " {} of {}{mac}: {cause};", counted(one.count, "request"), one.address);
        }
        match new.len().checked_sub(NAMED).filter(|more| *more > 0) {
            Some(more) => {
                let _ = write!(line, " and {}", counted(more, "more sender"));
            }
            None => {
                line.pop();
            }
        }
        line.push_str(" (`fence-daemon status` has them all; no further line for ten minutes)");
        Some(line)
    }
}

/// The target of these lines.
#[cfg(test)]
pub(super) const TARGET: &str = module_path!();

#[cfg(test)]
mod tests {
    use fence_common::verdict::Verdict;

    use super::*;

    fn at(seconds: u64) -> Moment {
        Moment::from_ktime(seconds * 1_000_000_000)
    }

    fn rejected(last: u8, verdict: Verdict, seconds: u64) -> RejectedView {
        let mac = (last == 11).then_some([2, 0, 0, 0, 0, 11]);
        RejectedView {
            address: std::net::IpAddr::from([192, 168, 122, last]).into(),
            mac,
            verdict,
            count: 3,
            last_seen: at(seconds),
        }
    }

    #[test]
    fn a_line_names_the_guests_and_there_is_one_in_ten_minutes() {
        let mut lines = Lines::default();
        assert_eq!(lines.line(&[], at(100)), None);
        // What no client sends is not worth a line.
        assert_eq!(lines.line(&[rejected(9, Verdict::Op, 90)], at(100)), None);
        let line =
            lines.line(&[rejected(11, Verdict::Unsigned, 95), rejected(12, Verdict::HashWeak, 94)], at(100)).unwrap();
        assert!(line.contains("3 requests of 192.168.122.11 (02:00:00:00:00:0b): they have no digest"), "{line}");
        assert!(line.contains("192.168.122.12: their digest is weaker") && !line.contains("more senders"), "{line}");
        let again = [rejected(11, Verdict::Unsigned, 110)];
        assert_eq!(lines.line(&again, at(120)), None);
        assert_eq!(lines.line(&again, at(699)), None);
        assert!(lines.line(&again, at(700)).is_some());
        // Nothing has come since.
        assert_eq!(lines.line(&again, at(9000)), None);
        let crowd: Vec<_> = (1..=20).map(|last| rejected(last, Verdict::Unsigned, 9001)).collect();
        let line = lines.line(&crowd, at(9002)).unwrap();
        assert!(line.contains("and 16 more senders") && line.matches("192.168").count() == 4, "{line}");
    }
}
