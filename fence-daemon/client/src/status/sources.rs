//! Who sends, and who is rejected, on the page.

use fence_control::report::Report;

use super::page::{dim, plain};
use crate::screen::table::{Look, Table, flexible, number, text};
use crate::screen::words::{meaning, span};

pub(super) fn senders(report: &Report) -> Table {
    let mut table = Table::new([
        text("ADDRESS"),
        text("HARDWARE"),
        text("TRUSTED"),
        number("DELIVERED"),
        number("WRONG"),
        number("TOO MANY"),
        text("LAST SEEN"),
    ]);
    for source in &report.sources {
        let counted = |count: u64| if count == 0 { dim("0") } else { (Look::Warn, count.to_string()) };
        table.row([
            plain(&source.address),
            source.mac.as_ref().map_or_else(|| dim("-"), plain),
            if source.trusted { (Look::Good, "yes".to_owned()) } else { dim("no") },
            plain(source.delivered.to_string()),
            counted(source.failures),
            counted(source.limited),
            source.last_seen_ms.map_or_else(|| dim("-"), |ago| plain(format!("{} ago", span(ago)))),
        ]);
    }
    table
}

pub(super) fn rejected(report: &Report) -> Table {
    let mut table =
        Table::new([text("ADDRESS"), text("HARDWARE"), number("COUNT"), text("LAST SEEN"), flexible("WHY", 20)]);
    for rejected in &report.rejected_sources {
        table.row([
            plain(&rejected.address),
            rejected.mac.as_ref().map_or_else(|| dim("-"), plain),
            (Look::Warn, rejected.count.to_string()),
            plain(format!("{} ago", span(rejected.last_seen_ms))),
            plain(meaning(&rejected.counter)),
        ]);
    }
    table
}
