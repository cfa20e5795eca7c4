//! One request with its steps as a small timeline.

use std::fmt::Write as _;
use std::path::Path;

use fence_control::history::{Asked, Event, Record};

use super::{date_and_time, list, remedy};
use crate::screen::table::{Look, Screen};
use crate::screen::words::{harmless, micros, wrapped};

/// The width of the timeline, in columns.
const WIDTH: u64 = 40;
/// The width of a text if the terminal does not say.
const ROOM: usize = 78;

/// The whole page. `key_file` is what guests need a copy of.
pub(super) fn render(record: &Record, key_file: &Path, screen: Screen) -> String {
    let mut page = String::new();
    let time = date_and_time(record.time_unix_ms);
    let number = record.id;
    match &record.event {
        Event::Request(asked) => request(&mut page, record, asked, screen),
        Event::Unfinished(begun) => {
            let title = format!("{number}: {} of {}, begun {time}", begun.op, begun.domain);
            page.push_str(&screen.line(Look::Heading, &title));
        }
        Event::Unsigned(sender) => {
            page.push_str(
                &screen.line(Look::Heading, &format!("{number}: unsigned requests of {}, last {time}", sender.address)),
            );
        }
        Event::Started { version, pid } => {
            page.push_str(
                &screen
                    .line(Look::Heading, &format!("{number}: fence-daemon {version} started, process {pid}, {time}")),
            );
        }
        Event::Lost { count } => {
            page.push_str(&screen.line(Look::Heading, &format!("{number}: {count} lines are missing here, {time}")));
        }
    }
    if let Some((why, commands)) = remedy::of(&record.event, key_file) {
        page.push('\n');
        text(&mut page, "why", &why, screen);
        page.push_str(&screen.line(Look::Plain, "what to type:"));
        for command in commands {
            page.push_str(&screen.line(Look::Plain, &format!("    {command}")));
        }
    }
    page
}

fn request(page: &mut String, record: &Record, asked: &Asked, screen: Screen) {
    let of = asked.domain.as_ref().map(|domain| format!(" of {domain}")).unwrap_or_default();
    let title = format!("{}: {}{of}, {}", record.id, asked.op, date_and_time(record.time_unix_ms));
    page.push_str(&screen.line(Look::Heading, &title));
    let listener = asked.listener.as_ref().map(|name| format!(", listener {name}")).unwrap_or_default();
    text(page, "asked by", &format!("{} (seqno {}), by {}{listener}", asked.client, asked.seqno, asked.via), screen);
    let _ = write!(page, "{}", screen.line(list::look(asked), &format!("{:<9} {}", "result", asked.result)));
    if remedy::of(&record.event, Path::new("")).is_none() && !asked.detail.is_empty() {
        text(page, "detail", &asked.detail, screen);
    }
    page.push('\n');
    for line in timeline(asked, screen.unicode) {
        page.push_str(&screen.line(Look::Plain, &line));
    }
}

/// A text behind its name, wrapped.
fn text(page: &mut String, name: &str, text: &str, screen: Screen) {
    let room = screen.width.unwrap_or(ROOM).saturating_sub(10).max(20);
    for (number, line) in wrapped(&harmless(text), room).into_iter().enumerate() {
        let name = if number == 0 { name } else { "" };
        page.push_str(&screen.line(Look::Plain, &format!("{name:<9} {line}")));
    }
}

/// The steps, each with its time since the arrival, and a bar from the step before to this one.
fn timeline(asked: &Asked, unicode: bool) -> Vec<String> {
    let steps = &asked.steps;
    let passed = [
        ("verified", Some(steps.verified_us)),
        ("called back", steps.called_back_us),
        ("dead", steps.dead_us),
        ("replied", steps.replied_us),
        ("ended", steps.ended_us.filter(|_| steps.replied_us.is_none())),
    ];
    let passed: Vec<_> = passed.into_iter().filter_map(|(name, at)| Some((name, at?))).collect();
    let whole = passed.iter().map(|(_, at)| *at).max().unwrap_or(0).max(1);
    let bar = if unicode { "█" } else { "#" };
    let column = |at: u64| usize::try_from(u128::from(at) * u128::from(WIDTH) / u128::from(whole)).unwrap_or(0);
    let mut before = 0;
    passed
        .into_iter()
        .map(|(name, at)| {
            let (from, to) = (column(before.min(at)), column(at));
            before = at;
            // A short step has a mark as well.
            let from = from.min(to.saturating_sub(1));
            let bars = bar.repeat((to - from).max(1));
            format!("{:>9}  {name:<11}  {}{bars}", micros(at), " ".repeat(from))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use fence_control::history::UnsignedSender;

    use super::super::tests::{asked, record};
    use super::*;

    #[test]
    fn a_fence_is_a_timeline() {
        let page = render(
            &record(2, Event::Request(asked("success", "was running, destroyed"))),
            Path::new("/k"),
            Screen::PLAIN,
        );
        let expected = "\
2: off of Node2, 2025-11-22 02:59:01Z
asked by  192.168.122.11:1229 (seqno 117428), by kernel
result    success
detail    was running, destroyed

    68 us  verified     #
   311 us  called back   ####
  2.43 ms  dead              ##################################
  2.49 ms  replied                                             #
";
        let squeezed = |text: &str| {
            text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect::<Vec<_>>()
        };
        let words =
            |text: &str| squeezed(text).iter().map(|line| line.trim_end_matches('#').to_owned()).collect::<Vec<_>>();
        assert_eq!(words(&page), words(expected), "{page}");
        assert!(!page.contains("what to type"), "{page}");
        // Each bar begins where the one before ends.
        let bars: Vec<(usize, usize)> =
            page.lines().filter_map(|line| Some((line.find('#')?, line.rfind('#')? + 1))).collect();
        assert_eq!(bars.len(), 4, "{page}");
        assert!(bars.windows(2).all(|pair| pair[1].0 <= pair[0].1 && pair[0].1 <= pair[1].1), "{page}");
    }

    #[test]
    fn a_failure_says_why_and_what_to_type() {
        let page =
            render(&record(3, Event::Request(asked("failure", "no such domain"))), Path::new("/k"), Screen::PLAIN);
        assert!(page.contains("why       the client was told that it failed: no such domain\n"), "{page}");
        assert!(page.contains("what to type:\n    virsh domstate Node2 "), "{page}");
        let sender = UnsignedSender { address: "192.168.122.13".to_owned(), mac: None, count: 17 };
        let page = render(&record(6, Event::Unsigned(sender)), Path::new("/k"), Screen::PLAIN);
        assert!(page.contains("17 requests of 192.168.122.13 had no signature"), "{page}");
        assert!(page.contains("    scp /k root@192.168.122.13:/etc/cluster/fence_xvm.key"), "{page}");
    }
}
