//! `fence-daemon history`: what was asked, by whom, and what came of it. It reads the daemon's
//! files, so it also works while no daemon runs.

mod list;
mod remedy;
mod show;

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fence_config as config;
use fence_control::history::{self, Event, Record};

use crate::screen;

/// Which requests are wanted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Query {
    /// Not before this time, in milliseconds since 1970.
    pub since: Option<u64>,
    /// About this domain, in any case of its letters.
    pub domain: Option<String>,
    /// Of the client with this address or name.
    pub source: Option<String>,
    /// Only those that did not succeed.
    pub failed: bool,
}

impl Query {
    fn wants(&self, record: &Record) -> bool {
        let is_late = self.since.is_none_or(|since| record.time_unix_ms >= since);
        let is_about = self.domain.as_deref().is_none_or(|domain| match &record.event {
            Event::Request(asked) => asked.domain.as_deref().is_some_and(|one| one.eq_ignore_ascii_case(domain)),
            Event::Unfinished(begun) => begun.domain.eq_ignore_ascii_case(domain),
            Event::Unsigned(_) | Event::Started { .. } | Event::Lost { .. } => false,
        });
        let is_of = self.source.as_deref().is_none_or(|source| match &record.event {
            Event::Request(asked) => is_client(&asked.client, source),
            Event::Unsigned(sender) => sender.address == source || sender.mac.as_deref() == Some(source),
            Event::Unfinished(_) | Event::Started { .. } | Event::Lost { .. } => false,
        });
        is_late && is_about && is_of && (!self.failed || remedy::is_failure(&record.event))
    }
}

/// Whether a client is the wanted one: an address and its port, or the name of a domain and more.
fn is_client(client: &str, wanted: &str) -> bool {
    match client.parse::<SocketAddr>() {
        Ok(address) => address.ip().to_string() == wanted || client == wanted,
        Err(_) => client == wanted || client.split([' ', '(', ',']).any(|word| word == wanted),
    }
}

/// Parses a time in the past: how long ago (`2h`, `3 days`), or a date, or date and time, in UTC.
///
/// # Errors
/// It is neither.
pub fn since(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let at = match humantime::parse_duration(text) {
        Ok(ago) => SystemTime::now().checked_sub(ago),
        Err(_) => {
            let whole = if text.contains(':') { text.to_owned() } else { format!("{text} 00:00:00") };
            humantime::parse_rfc3339_weak(&whole).ok()
        }
    };
    let at = at.ok_or_else(|| {
        "write how long ago (`2h`, `3days`) or a time in UTC (`2026-11-30`, `2026-11-30 09:15:00`)".to_owned()
    })?;
    Ok(u64::try_from(at.duration_since(UNIX_EPOCH).unwrap_or_default().as_millis()).unwrap_or(u64::MAX))
}

/// A time in UTC, to the second: `2026-11-30 09:15:00Z`.
fn date_and_time(unix_ms: u64) -> String {
    let at = UNIX_EPOCH.checked_add(Duration::from_millis(unix_ms)).unwrap_or(UNIX_EPOCH);
    humantime::format_rfc3339_seconds(at).to_string().replace('T', " ")
}

/// The directory of the history, by this configuration. If that is unreadable, the default place.
fn directory(config: &Path) -> PathBuf {
    let configured = config::load(config).ok().and_then(|(config, _)| config.history);
    configured.unwrap_or_else(|| config::DEFAULT_STATE_DIRECTORY.into())
}

fn records(config: &Path) -> Result<Vec<Record>, u8> {
    let directory = directory(config);
    history::read(&directory).map_err(|error| {
        screen::complain(format_args!("fence-daemon: cannot read the history in {}: {error}", directory.display()));
        1
    })
}

/// Lists the history, and returns the exit code.
#[must_use]
pub fn run(config: &Path, query: &Query, json: bool) -> u8 {
    let all = match records(config) {
        Ok(all) => all,
        Err(code) => return code,
    };
    let wanted: Vec<_> = all.iter().filter(|record| query.wants(record)).collect();
    let text = if json {
        wanted.iter().fold(String::new(), |mut text, record| {
            // Cannot fail: all keys of its maps are text.
            let _ = writeln!(text, "{}", serde_json::to_string(record).unwrap_or_default());
            text
        })
    } else {
        list::render(&wanted, screen::screen())
    };
    u8::from(!screen::print(&text))
}

/// Shows one request, and returns the exit code.
#[must_use]
pub fn show(config: &Path, id: u64, json: bool) -> u8 {
    let all = match records(config) {
        Ok(all) => all,
        Err(code) => return code,
    };
    let Some(record) = all.iter().find(|record| record.id == id) else {
        let range = all.first().zip(all.last()).map_or_else(
            || "the history is empty".to_owned(),
            |(first, last)| format!("the history has {} to {}", first.id, last.id),
        );
        screen::complain(format_args!("fence-daemon: there is no number {id}: {range}"));
        return 1;
    };
    let text = if json {
        format!("{}\n", serde_json::to_string(record).unwrap_or_default())
    } else {
        show::render(record, &key_file(config), screen::screen())
    };
    u8::from(!screen::print(&text))
}

/// The key file that guests need a copy of.
fn key_file(config: &Path) -> PathBuf {
    let configured = config::load(config).ok();
    let multicast = configured.as_ref().and_then(|(config, _)| config.multicast());
    multicast.map_or_else(|| config::DEFAULT_KEY_FILE.into(), |multicast| multicast.key_file.clone())
}

#[cfg(test)]
mod tests {
    use fence_control::history::{Asked, Unfinished, UnsignedSender};
    use fence_control::report::Steps;

    use super::*;

    pub(super) fn asked(result: &str, detail: &str) -> Asked {
        Asked {
            op: "off".to_owned(),
            domain: Some("Node2".to_owned()),
            client: "192.168.122.11:1229".to_owned(),
            seqno: 117_428,
            via: "kernel".to_owned(),
            listener: None,
            result: result.to_owned(),
            detail: detail.to_owned(),
            steps: Steps {
                verified_us: 68,
                called_back_us: Some(311),
                dead_us: Some(2431),
                replied_us: Some(2498),
                ended_us: Some(2502),
            },
        }
    }

    pub(super) fn record(id: u64, event: Event) -> Record {
        Record { id, time_unix_ms: 1_763_780_341_004 + id, event }
    }

    fn all() -> Vec<Record> {
        let begun = Unfinished { op: "off".to_owned(), domain: "node3".to_owned(), seqno: 5 };
        let sender = UnsignedSender {
            address: "192.168.122.13".to_owned(),
            mac: Some("52:54:00:00:00:13".to_owned()),
            count: 17,
        };
        vec![
            record(1, Event::Started { version: "0.1.0".to_owned(), pid: 7 }),
            record(2, Event::Request(asked("success", "was running, destroyed"))),
            record(3, Event::Request(asked("failure", "no such domain"))),
            record(4, Event::Request(Asked { op: "status".to_owned(), ..asked("off", "is off") })),
            record(5, Event::Unfinished(begun)),
            record(6, Event::Unsigned(sender)),
        ]
    }

    #[test]
    fn each_record_has_the_documented_form() {
        let schema = include_str!("../../../../docs/reference/history.schema.json");
        let schema = jsonschema::validator_for(&serde_json::from_str(schema).unwrap()).unwrap();
        for record in all() {
            let value = serde_json::to_value(&record).unwrap();
            assert!(schema.is_valid(&value), "{value}");
            let mut more = value.clone();
            more["of_tomorrow"] = 1.into();
            assert!(!schema.is_valid(&more), "{more}");
        }
    }

    #[test]
    fn a_query_finds_what_it_names() {
        let found = |query: Query| all().iter().filter(|one| query.wants(one)).map(|one| one.id).collect::<Vec<_>>();
        let text = |text: &str| Some(text.to_owned());
        assert_eq!(found(Query::default()), [1, 2, 3, 4, 5, 6]);
        assert_eq!(found(Query { failed: true, ..Query::default() }), [3, 5, 6]);
        assert_eq!(found(Query { domain: text("node2"), ..Query::default() }), [2, 3, 4]);
        assert_eq!(found(Query { domain: text("node3"), failed: true, ..Query::default() }), [5]);
        assert_eq!(found(Query { source: text("192.168.122.11"), ..Query::default() }), [2, 3, 4]);
        assert_eq!(found(Query { source: text("192.168.122.1"), ..Query::default() }), [0_u64; 0]);
        assert_eq!(found(Query { source: text("192.168.122.13"), ..Query::default() }), [6]);
        assert_eq!(found(Query { since: Some(1_763_780_341_008), ..Query::default() }), [4, 5, 6]);
        assert!(is_client("node1 (cid 12)", "node1") && is_client("[fd00::1]:1229", "fd00::1"));
    }

    #[test]
    fn a_time_is_an_age_or_a_date() {
        let now = u64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis()).unwrap();
        let two_hours = now - since("2h").unwrap();
        assert!((7_199_000..7_260_000).contains(&two_hours), "{two_hours}");
        for text in ["2025-11-22", "2025-11-22 00:00:00", "2025-11-22T00:00:00Z"] {
            assert_eq!(date_and_time(since(text).unwrap()), "2025-11-22 00:00:00Z");
        }
        for text in ["", "yesterday", "2025-13-01", "12:00"] {
            assert!(since(text).is_err(), "{text}");
        }
    }
}
