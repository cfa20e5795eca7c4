//! The history as a table, the oldest line first.

use fence_control::history::{Asked, Event, Record};

use super::{date_and_time, remedy};
use crate::screen::table::{Look, Screen, Table, flexible, number, text};
use crate::screen::words::{meaning, micros};

/// The whole page.
pub(super) fn render(records: &[&Record], screen: Screen) -> String {
    if records.is_empty() {
        return "nothing\n".to_owned();
    }
    let mut table = Table::new([
        number("ID"),
        text("TIME"),
        text("OP"),
        flexible("DOMAIN", 8),
        flexible("CLIENT", 12),
        text("RESULT"),
        number("TOOK"),
        flexible("DETAIL", 20),
    ]);
    for record in records {
        table.row(row(record));
    }
    table.render(screen)
}

fn row(record: &Record) -> [(Look, String); 8] {
    let plain = |text: String| (Look::Plain, text);
    let dim = |text: &str| (Look::Dim, text.to_owned());
    let (id, time) = (plain(record.id.to_string()), (Look::Dim, date_and_time(record.time_unix_ms)));
    match &record.event {
        Event::Request(asked) => {
            let took = asked.steps.replied_us.or(asked.steps.ended_us);
            [
                id,
                time,
                plain(asked.op.clone()),
                asked.domain.clone().map_or_else(|| dim("-"), plain),
                plain(asked.client.clone()),
                (look(asked), asked.result.clone()),
                took.map_or_else(|| dim("-"), |took| plain(micros(took))),
                plain(asked.detail.clone()),
            ]
        }
        Event::Unfinished(begun) => [
            id,
            time,
            plain(begun.op.clone()),
            plain(begun.domain.clone()),
            dim("-"),
            (Look::Bad, "unknown".to_owned()),
            dim("-"),
            plain("the daemon ended while it served this".to_owned()),
        ],
        Event::Unsigned(sender) => [
            id,
            time,
            dim("-"),
            dim("-"),
            plain(sender.address.clone()),
            (Look::Bad, "unsigned".to_owned()),
            dim("-"),
            plain(meaning("drop_unsigned").to_owned()),
        ],
        Event::Started { version, pid } => [
            id,
            time,
            dim("-"),
            dim("-"),
            dim("-"),
            dim("-"),
            dim("-"),
            (Look::Dim, format!("fence-daemon {version} started, process {pid}")),
        ],
        Event::Lost { count } => {
            let lost = format!("{count} lines are missing here: they could not be written in time");
            [id, time, dim("-"), dim("-"), dim("-"), (Look::Warn, "lost".to_owned()), dim("-"), plain(lost)]
        }
    }
}

/// How a result looks.
pub(super) fn look(asked: &Asked) -> Look {
    match asked.result.as_str() {
        "success" => Look::Good,
        _ if remedy::is_failure(&Event::Request(asked.clone())) => Look::Bad,
        _ => Look::Plain,
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{asked, record};
    use super::*;

    #[test]
    fn each_line_of_the_table_is_a_record() {
        let records = [
            record(1, Event::Started { version: "0.1.0".to_owned(), pid: 7 }),
            record(2, Event::Request(asked("success", "was running, destroyed"))),
            record(3, Event::Lost { count: 3 }),
        ];
        let text = render(&records.iter().collect::<Vec<_>>(), Screen::PLAIN);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 4, "{text}");
        assert!(lines[0].contains("ID") && lines[0].contains("RESULT"), "{text}");
        for word in ["2025-11-22 02:59:01Z", "off", "Node2", "192.168.122.11:1229", "success", "2.49 ms", "destroyed"] {
            assert!(lines[2].contains(word), "no {word}: {text}");
        }
        assert!(lines[3].contains("3 lines are missing"), "{text}");
        assert_eq!(render(&[], Screen::PLAIN), "nothing\n");
    }
}
