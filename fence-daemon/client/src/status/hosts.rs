//! The hosts of a cluster, on a page: for `status` and `top`.

use fence_control::report::{Cluster, ClusterHost};

use super::page::{dim, plain};
use crate::screen::table::{Look, Table, flexible, number, text};
use crate::screen::words::{micros, span};

/// How far two clocks may be apart: a fencing of a host is recognised by the time of day.
pub const CLOCKS_AGREE_MS: u64 = 1_000;

/// The title of [`table`].
#[must_use]
pub fn title(cluster: &Cluster) -> String {
    format!("Hosts that answer together: {}", cluster.status)
}

/// The hosts of a cluster.
#[must_use]
pub fn table(cluster: &Cluster) -> Table {
    let mut table = Table::new([
        text("HOST"),
        number("NODE"),
        text("DAEMON"),
        text("LAST HEARD"),
        text("KEY"),
        text("VERSION"),
        text("CLOCK"),
        number("RUNNING"),
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
        table.row([
            host.name.as_ref().map_or_else(|| dim("-"), plain),
            plain(host.node.to_string()),
            daemon,
            host.last_heard_ms.map_or_else(|| dim("never"), |ago| plain(format!("{} ago", span(ago)))),
            key,
            host.software.as_ref().map_or_else(|| dim("-"), plain),
            clock(host),
            plain(host.domain_list.iter().filter(|domain| domain.runs).count().to_string()),
            plain(host.domains.to_string()),
            notes(cluster, host),
        ]);
    }
    table
}

fn clock(host: &ClusterHost) -> (Look, String) {
    match host.clock_ahead_ms {
        None => dim("-"),
        Some(ahead) if ahead.unsigned_abs() <= CLOCKS_AGREE_MS => plain("agrees"),
        Some(ahead) => (Look::Warn, clock_gap(ahead)),
    }
}

/// A difference of clocks in words.
#[must_use]
pub fn clock_gap(ahead_ms: i64) -> String {
    let far = micros(ahead_ms.unsigned_abs().saturating_mul(1_000));
    format!("{far} {}", if ahead_ms > 0 { "ahead" } else { "behind" })
}

/// What is special about a host.
fn notes(cluster: &Cluster, host: &ClusterHost) -> (Look, String) {
    let mut notes = Vec::new();
    // What was before its daemon came back proves nothing any more.
    if let (false, Some(ago)) = (host.present, host.fenced_ms) {
        notes.push(format!("fenced {} ago", span(ago)));
    }
    let stock = format!("node {} ", host.node);
    let stock = cluster.stock.iter().find(|there| there.starts_with(&stock));
    notes.extend(stock.map(|there| format!("fence_virtd answers there as well: {there}")));
    (if stock.is_some() { Look::Bad } else { Look::Plain }, notes.join(", "))
}

/// The domains of the hosts that `is_shown` wants, as each host has told of them.
#[must_use]
pub fn domains(cluster: &Cluster, is_shown: impl Fn(&ClusterHost) -> bool) -> Table {
    let mut table = Table::new([text("HOST"), flexible("NAME", 12), text("STATE"), flexible("UUID", 8), text("")]);
    for host in cluster.hosts.iter().filter(|host| is_shown(host)) {
        for domain in &host.domain_list {
            let state = if domain.runs { plain(&domain.state) } else { dim(&domain.state) };
            let note = match (host.present, domain.runs) {
                (false, true) => (Look::Warn, "its host is absent: it may run".to_owned()),
                (false, false) => dim("its host is absent"),
                (true, _) => plain(""),
            };
            table.row([plain(name(host)), plain(&domain.name), state, dim(&domain.uuid), note]);
        }
    }
    table
}

/// A host's name, for people.
#[must_use]
pub fn name(host: &ClusterHost) -> String {
    host.name.clone().unwrap_or_else(|| format!("node {}", host.node))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::example::example;
    use crate::screen::table::Screen;

    fn rows(table: &Table) -> Vec<Vec<String>> {
        let page = table.render(Screen::PLAIN);
        let words =
            |line: &str| line.split("  ").map(str::trim).filter(|word| !word.is_empty()).map(str::to_owned).collect();
        page.lines().skip(1).map(words).collect()
    }

    #[test]
    fn a_host_has_its_clock_its_version_and_the_proof_of_its_fencing() {
        let mut cluster = example().cluster.unwrap();
        let shown = rows(&table(&cluster));
        assert_eq!(shown[0][3..], ["0 s ago", "agrees", "0.1.0", "-", "2", "3"]);
        assert_eq!(shown[1][2..], ["present", "0 s ago", "agrees", "0.1.0", "3.40 s ahead", "1", "2"]);
        assert!(shown[2].last().unwrap().starts_with("fenced 4 s ago, fence_virtd answers there"), "{shown:?}");
        cluster.hosts[1].clock_ahead_ms = Some(-61_000);
        assert_eq!(rows(&table(&cluster))[1][6], "61.0 s behind");
        cluster.hosts[1].clock_ahead_ms = Some(-900);
        assert_eq!(rows(&table(&cluster))[1][6], "agrees");
        // It is there again.
        (cluster.hosts[2].present, cluster.stock) = (true, Vec::new());
        assert!(!rows(&table(&cluster))[2].concat().contains("fenced"));
    }

    #[test]
    fn the_domains_of_an_absent_host_may_run() {
        let mut cluster = example().cluster.unwrap();
        let others = rows(&domains(&cluster, |host| !host.ours));
        assert_eq!(others[0][..3], ["host2", "node4", "running"]);
        assert_eq!(others[1][..3], ["host2", "node5", "shut off"]);
        assert_eq!(rows(&domains(&cluster, |_| true)).len(), 5);
        (cluster.hosts[1].present, cluster.hosts[1].name) = (false, None);
        let others = rows(&domains(&cluster, |host| !host.ours));
        assert_eq!((others[0][0].as_str(), others[0][4].as_str()), ("node 2", "its host is absent: it may run"));
        assert_eq!(others[1][4], "its host is absent");
    }
}
