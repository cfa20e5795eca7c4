//! The hosts of a cluster, on the page.

use fence_control::report::Cluster;

use super::page::{dim, plain};
use crate::screen::table::{Look, Table, flexible, number, text};
use crate::screen::words::span;

/// The hosts of a cluster.
pub(super) fn table(cluster: &Cluster) -> Table {
    let mut table = Table::new([
        text("HOST"),
        number("NODE"),
        text("DAEMON"),
        text("LAST HEARD"),
        text("KEY"),
        number("DOMAINS"),
        flexible("", 12),
    ]);
    for host in &cluster.hosts {
        let daemon = match (host.present, host.ours) {
            (true, true) => (Look::Good, "this one".to_owned()),
            (true, false) => (Look::Good, "present".to_owned()),
            (false, _) => (Look::Bad, "absent".to_owned()),
        };
        let key = match host.key_agrees {
            Some(true) => plain("agrees"),
            Some(false) => (Look::Bad, "differs".to_owned()),
            None => dim("-"),
        };
        let stock = format!("node {} ", host.node);
        let stock = cluster.stock.iter().find(|there| there.starts_with(&stock));
        let note = stock.map_or_else(String::new, |there| format!("fence_virtd answers there as well: {there}"));
        table.row([
            host.name.as_ref().map_or_else(|| dim("-"), plain),
            plain(host.node.to_string()),
            daemon,
            host.last_heard_ms.map_or_else(|| dim("never"), |ago| plain(format!("{} ago", span(ago)))),
            key,
            plain(host.domains.to_string()),
            (Look::Bad, note),
        ]);
    }
    table
}
