//! The report as a page: problems first, then the present state, then the counts.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use fence_common::words::counted;
use fence_config::Attach;
use fence_control::report::{Domain, Health, Listener, Report, Request, Steps, Uri};

use super::{hosts, sources};
use crate::screen::bars;
use crate::screen::table::{Look, Screen, Table, flexible, number, text};
use crate::screen::words::{counters, meaning, micros, span, time_of_day, wrapped};

/// The most requests shown. The JSON has all that are remembered.
const REQUESTS: usize = 20;

pub(super) fn plain(text: impl Into<String>) -> (Look, String) {
    (Look::Plain, text.into())
}

pub(super) fn dim(text: impl Into<String>) -> (Look, String) {
    (Look::Dim, text.into())
}

/// The time of a step, or a mark that it was not reached.
fn step(time: Option<u64>) -> (Look, String) {
    time.map_or_else(|| dim("-"), |time| plain(micros(time)))
}

/// How a daemon's health looks.
#[must_use]
pub fn look_of(health: Health) -> Look {
    match health {
        Health::Serving => Look::Good,
        Health::Starting | Health::Stopping => Look::Warn,
        Health::Degraded => Look::Bad,
    }
}

/// The whole page.
#[must_use]
pub fn render(report: &Report, screen: Screen) -> String {
    let mut page = headline(report, screen);
    for problem in &report.problems {
        page.push_str(&in_full(problem, screen));
    }
    let mut section = |title: String, table: Table| {
        if !table.is_empty() {
            page.push('\n');
            page.push_str(&screen.line(Look::Heading, &title));
            page.push_str(&table.render(screen));
        }
    };
    for listener in &report.listeners {
        let of = listener.name.as_ref().map(|name| format!(" \"{name}\"")).unwrap_or_default();
        if listener.is_multicast() {
            let title = format!(
                "Listening{of} to {} port {} (digest: {} or stronger, callback: {})",
                listener.address, listener.port, listener.hash, listener.auth
            );
            section(title, interfaces(listener));
        } else if listener.kind == "serial" {
            section(format!("Listening{of} to serial lines in {}", listener.address), state(listener));
        } else {
            let title = format!(
                "Listening{of} to {} connections at {} port {} (digest: {} or stronger)",
                listener.kind, listener.address, listener.port, listener.hash
            );
            section(title, state(listener));
        }
    }
    if let Some(cluster) = &report.cluster {
        section(hosts::title(cluster), hosts::table(cluster));
    }
    section("libvirt".to_owned(), uris(report));
    section("To be started again after a reboot".to_owned(), restarts(report));
    section("Domains".to_owned(), domains(report));
    if let Some(cluster) = &report.cluster {
        section("Domains of the other hosts".to_owned(), hosts::domains(cluster, |host| !host.ours));
    }
    let known = report.requests.recent.len();
    let shown = if known > REQUESTS { format!(", {REQUESTS} of {known}") } else { String::new() };
    section(
        format!("Recent requests (times count from the datagram's arrival{shown})"),
        requests(report, REQUESTS, &STEPS, 8),
    );
    section("Requests since the start".to_owned(), tally(report));
    section("Datagrams since the start".to_owned(), datagrams(report));
    for listener in report.listeners.iter().filter(|listener| !listener.is_multicast()) {
        let what = if listener.kind == "serial" { "Requests" } else { "Connections" };
        section(format!("{what} by {} since the start", listener.label()), connections(listener));
    }
    section("Sources of datagrams".to_owned(), sources::senders(report));
    section("Rejected before the digest, the last ones".to_owned(), sources::rejected(report));
    section("How long it took, from the datagram's arrival".to_owned(), latency(report, screen));
    page
}

fn headline(report: &Report, screen: Screen) -> String {
    let daemon = &report.daemon;
    let rest = format!(
        "  fence-daemon {}, process {}, up {}; {}",
        daemon.version,
        daemon.pid,
        span(daemon.uptime_ms),
        report.status()
    );
    let health = report.health.name();
    let rest = screen.width.map_or(rest.clone(), |width| screen.cut(&rest, width.saturating_sub(health.len())));
    format!("{}{rest}\n", screen.paint(look_of(report.health), health))
}

/// A problem in full, on as many lines as needed: the remedy stands at its end.
fn in_full(problem: &str, screen: Screen) -> String {
    let room = screen.width.unwrap_or(usize::MAX).max(20) - 2;
    let marks = ["! "].into_iter().chain(std::iter::repeat("  "));
    let lines = marks.zip(wrapped(problem, room));
    lines.map(|(mark, line)| screen.line(Look::Bad, &format!("{mark}{line}"))).collect()
}

/// The state of a listener that has no interfaces of its own.
fn state(listener: &Listener) -> Table {
    let look = if listener.hears { Look::Plain } else { Look::Bad };
    let state = (look, listener.status.clone());
    if listener.kind == "serial" {
        let mut table = Table::new([flexible("STATE", 16)]);
        table.row([state]);
        return table;
    }
    let mut table = Table::new([text("INTERFACE"), flexible("STATE", 16)]);
    table.row([plain(listener.interface.as_deref().unwrap_or("any")), state]);
    table
}

fn interfaces(listener: &Listener) -> Table {
    let mut table = Table::new([text("INTERFACE"), text("PROGRAM"), number("ID"), text("ALONE"), text("")]);
    for interface in &listener.interfaces {
        let id = interface.program_id.map_or_else(|| "-".to_owned(), |id| id.to_string());
        let (program, hint) = match &interface.program {
            Some(mode) => {
                let kind = if mode == "tcx" { "" } else { "xdp " };
                (plain(format!("{kind}{mode}")), dim(format!("bpftool prog show id {id}")))
            }
            None if listener.attach.as_deref() == Some(Attach::Off.name()) => {
                (dim("none"), plain("through the socket alone (attach is off, or a group has its own key)"))
            }
            None => (dim("none"), plain("through the socket alone")),
        };
        let alone = match (interface.alone, &interface.way_out) {
            (true, None) => "yes: leads nowhere".to_owned(),
            (true, Some(way)) => format!("yes, as configured; leads out by {way}"),
            (false, None) => "no, as configured".to_owned(),
            (false, Some(way)) => format!("no: leads out by {way}"),
        };
        let hint = match &interface.reason {
            Some(reason) => plain(format!("{} ({reason})", hint.1)),
            None => hint,
        };
        table.row([plain(&interface.name), program, plain(id), plain(alone), hint]);
    }
    table
}

fn uris(report: &Report) -> Table {
    let mut table = Table::new([
        flexible("URI", 16),
        text("CONNECTION"),
        text("FOR"),
        number("DOMAINS"),
        number("ACTIVE"),
        flexible("LAST ERROR", 12),
    ]);
    for uri in &report.uris {
        let error = match (&uri.last_error, uri.last_error_ms) {
            (Some(error), Some(ago)) if uri.connected => dim(format!("{} ago: {error}", span(ago))),
            (Some(error), _) => plain(error),
            (None, _) => plain(""),
        };
        table.row([
            plain(&uri.uri),
            connection(uri),
            plain(uri.for_ms.map_or_else(|| "-".to_owned(), span)),
            plain(uri.domains.len().to_string()),
            plain(uri.domains.iter().filter(|domain| is_active(domain)).count().to_string()),
            error,
        ]);
    }
    table
}

fn is_active(domain: &Domain) -> bool {
    !matches!(domain.state.as_str(), "shut off" | "moved away" | "dead")
}

fn restarts(report: &Report) -> Table {
    let mut table = Table::new([flexible("DOMAIN", 12), flexible("URI", 12), text("WAITING FOR"), text("")]);
    for restart in &report.restarts {
        let pause = restart.pause_ms.saturating_sub(restart.waiting_ms);
        let look = if pause > 0 { Look::Dim } else { Look::Warn };
        let mut notes = Vec::new();
        if pause > 0 {
            notes.push(format!("paused for another {}", span(pause)));
        }
        if restart.inherited {
            notes.push("left by an earlier daemon".to_owned());
        }
        if restart.held && restart.inherited {
            notes.push("not started unasked: fence it with `on` or `off`".to_owned());
        }
        match &restart.reason {
            Some(reason) if restart.held && !restart.inherited => notes.push(format!("start it by hand: {reason}")),
            Some(reason) => notes.push(format!("tried {}: {reason}", counted(restart.attempts, "time"))),
            None => {}
        }
        table.row([plain(&restart.name), plain(&restart.uri), (look, span(restart.waiting_ms)), dim(notes.join(", "))]);
    }
    table
}

fn domains(report: &Report) -> Table {
    let mut table = Table::new([
        flexible("NAME", 12),
        text("STATE"),
        number("PROCESS"),
        text("FENCED BY"),
        flexible("URI", 8),
        flexible("UUID", 8),
        flexible("", 0),
    ]);
    for (uri, domain) in report.uris.iter().flat_map(|uri| uri.domains.iter().map(move |domain| (uri, domain))) {
        let active = is_active(domain);
        let by = match domain.pid {
            Some(_) => plain("its process"),
            None if !active => dim("-"),
            None if uri.local => (Look::Warn, "libvirt".to_owned()),
            None => plain("libvirt"),
        };
        let look = match domain.state.as_str() {
            "dying" | "lost" => Look::Bad,
            _ if active => Look::Plain,
            _ => Look::Dim,
        };
        let mut notes = Vec::new();
        if !domain.orphans.is_empty() {
            notes.push(format!("libvirt has lost {:?}", domain.orphans));
        }
        if !domain.unseen.is_empty() {
            notes.push(format!("writes cannot be seen: {}", domain.unseen.join("; ")));
        }
        if !domain.persistent {
            notes.push("transient".to_owned());
        }
        if !domain.fresh {
            notes.push("not seen since the connection was lost".to_owned());
        }
        table.row([
            plain(&domain.name),
            (look, domain.state.clone()),
            domain.pid.map_or_else(|| dim("-"), |pid| plain(pid.to_string())),
            by,
            plain(&uri.uri),
            dim(&domain.uuid),
            plain(notes.join(", ")),
        ]);
    }
    table
}

/// A step of a request as a column: its name, and when it was taken.
pub type Step = (&'static str, fn(&Steps) -> Option<u64>);

/// The steps that the page shows.
const STEPS: [Step; 4] = [
    ("VERIFIED", |steps| Some(steps.verified_us)),
    ("CALLED BACK", |steps| steps.called_back_us),
    ("DEAD", |steps| steps.dead_us),
    ("REPLIED", |steps| steps.replied_us),
];

/// The newest `most` requests, with these steps. The reason of the outcome may be cut to `why`
/// columns.
#[must_use]
pub fn requests(report: &Report, most: usize, shown: &[Step], why: usize) -> Table {
    let mut columns =
        vec![text("TIME"), text("OP"), flexible("DOMAIN", 8), flexible("CLIENT", 8), text("VIA"), text("RESULT")];
    columns.extend(shown.iter().map(|(name, _)| number(name)));
    columns.push(flexible("WHY", why));
    let mut table = Table::new(columns);
    for request in report.requests.recent.iter().take(most) {
        let about = [
            dim(time_of_day(request.arrived_unix_ms)),
            plain(&request.op),
            request.domain.as_ref().map_or_else(|| dim("-"), plain),
            plain(client(request)),
            dim(request
                .listener
                .as_ref()
                .map_or_else(|| request.via.clone(), |name| format!("{}:{name}", request.via))),
            result(request),
        ];
        let taken = shown.iter().map(|(_, time)| step(time(&request.steps)));
        let detail = dim(request.detail.clone().unwrap_or_default());
        table.row(about.into_iter().chain(taken).chain([detail]));
    }
    table
}

/// The state of a connection.
#[must_use]
pub fn connection(uri: &Uri) -> (Look, String) {
    let (look, word) = match (uri.connected, uri.silent) {
        (true, false) => (Look::Good, "connected"),
        (true, true) => (Look::Bad, "silent"),
        (false, _) => (Look::Bad, "not connected"),
    };
    (look, word.to_owned())
}

/// The client's address. Its port is nearly always the same.
fn client(request: &Request) -> String {
    request.client.parse::<SocketAddr>().map_or_else(|_| request.client.clone(), |client| client.ip().to_string())
}

/// The outcome of a request, or how far it is.
fn result(request: &Request) -> (Look, String) {
    let Some(result) = &request.result else {
        let doing = if request.steps.called_back_us.is_some() { "in progress" } else { "calling back" };
        return (Look::Warn, doing.to_owned());
    };
    let look = match result.as_str() {
        "success" => Look::Good,
        "off" => Look::Plain,
        "duplicate" | "superseded" => Look::Dim,
        _ => Look::Bad,
    };
    (look, result.clone())
}

fn tally(report: &Report) -> Table {
    let mut table = Table::new([text("REQUESTS"), number("COUNT"), flexible("", 20)]);
    let requests = &report.requests;
    for (name, count, what) in [
        ("in progress", requests.in_progress, "being called back, or carried out"),
        ("answered", requests.answered, "whatever the answer"),
        ("unanswered", requests.unanswered, "the callback failed, or something newer was asked"),
        ("rejected", requests.rejected, "too many at once, or read too late: their clients ask again"),
        ("duplicates", requests.duplicates, "of other addresses of the client, or sent again"),
        (
            "replays",
            requests.replays,
            "datagrams that had come before, bit for bit: recorded and sent by somebody else?",
        ),
        ("retired key", requests.retired_key, "signed with a key that is no longer accepted"),
    ] {
        if count > 0 {
            table.row([plain(name), plain(count.to_string()), dim(what)]);
        }
    }
    table
}

fn datagrams(report: &Report) -> Table {
    let mut table = Table::new([text("COUNTER"), number("KERNEL"), number("SOCKET"), flexible("", 20)]);
    let nothing = BTreeMap::new();
    let kernel = report.kernel.as_ref().and_then(|kernel| kernel.counters.as_ref()).unwrap_or(&nothing);
    let known: Vec<&str> = counters().collect();
    let unknown = kernel.keys().chain(report.socket.keys()).map(String::as_str).filter(|name| !known.contains(name));
    for name in known.iter().copied().chain(unknown) {
        let [in_kernel, in_socket] = [kernel, &report.socket].map(|counters| counters.get(name).copied().unwrap_or(0));
        if in_kernel + in_socket > 0 {
            table.row([plain(name), plain(in_kernel.to_string()), plain(in_socket.to_string()), dim(meaning(name))]);
        }
    }
    table
}

fn connections(listener: &Listener) -> Table {
    let mut table = Table::new([text("COUNTER"), number("COUNT"), flexible("", 20)]);
    for (name, count) in listener.counters.iter().filter(|(_, count)| **count > 0) {
        let meaning =
            if name == "drop_length" { "no request within 1 s, or pushed out by others" } else { meaning(name) };
        table.row([plain(name), plain(count.to_string()), dim(meaning)]);
    }
    table
}

fn latency(report: &Report, screen: Screen) -> Table {
    let axis = bars::Axis::of(report.latency.iter().flat_map(|latency| &latency.buckets));
    let mut table = Table::new([
        text("OP"),
        text("STEP"),
        number("COUNT"),
        number("P50"),
        number("P99"),
        number("MAX"),
        text("DISTRIBUTION"),
    ]);
    for latency in &report.latency {
        table.row([
            plain(&latency.op),
            plain(latency.step.replace('_', " ")),
            plain(latency.count.to_string()),
            plain(micros(latency.p50_us)),
            plain(micros(latency.p99_us)),
            plain(micros(latency.max_us)),
            plain(axis.bars(&latency.buckets, screen.unicode)),
        ]);
    }
    if !table.is_empty() {
        let nothing = || plain("");
        table.row([nothing(), nothing(), nothing(), nothing(), nothing(), nothing(), dim(axis.name())]);
    }
    table
}

#[cfg(test)]
mod tests {
    use unicode_width::UnicodeWidthStr;

    use super::*;
    use crate::example::example;

    /// The lines of a section, its title and its head left out.
    fn section<'p>(page: &'p str, title: &str) -> Vec<&'p str> {
        page.lines().skip_while(|line| !line.starts_with(title)).skip(2).take_while(|line| !line.is_empty()).collect()
    }

    fn words(line: &str) -> Vec<&str> {
        line.split("  ").map(str::trim).filter(|word| !word.is_empty()).collect()
    }

    #[test]
    fn problems_come_first_and_uncut() {
        let report = example();
        for width in [None, Some(60), Some(200)] {
            let page = render(&report, Screen { width, ..Screen::PLAIN });
            let mut lines = page.lines();
            assert!(lines.next().is_some_and(|line| line.starts_with("degraded  fence-daemon 0.1.0, process 1847")));
            let problem: Vec<_> = lines.take_while(|line| !line.is_empty()).map(str::trim).collect();
            assert_eq!(problem.join(" "), format!("! {}", report.problems[0]), "{width:?}");
        }
    }

    #[test]
    fn each_section_shows_its_content() {
        let page = render(&example(), Screen::PLAIN);
        let rows = |title| section(&page, title).into_iter().map(words).collect::<Vec<_>>();
        assert_eq!(rows("Listening")[0][..4], ["virbr0", "xdp generic", "1716", "yes: leads nowhere"]);
        let reason =
            "bpftool prog show id 1717 (XDP cannot tell the VLANs of interface br0 apart (its vlan_filtering is on))";
        assert_eq!(rows("Listening")[1], ["br0", "tcx", "1717", "no: leads out by eno1", reason]);
        let uris = rows("libvirt");
        assert_eq!(uris[0], ["qemu:///system", "connected", "3 h 12 min", "3", "2", "3 h 12 min ago: connection lost"]);
        assert_eq!(uris[1][..3], ["lxc:///system", "not connected", "-"]);
        let hosts = rows("Hosts that answer together: 2 of 3 hosts present, quorate");
        assert_eq!(hosts[0], ["host1", "1", "this one", "0 s ago", "agrees", "0.1.0", "-", "2", "3"]);
        assert_eq!(hosts[2][..9], ["-", "3", "absent", "never", "-", "-", "-", "0", "0"]);
        assert_eq!(rows("Domains of the other hosts")[0][..3], ["host2", "node4", "running"]);
        let why = "tried 2 times: Failed to get shared \"write\" lock (InternalError)";
        assert_eq!(rows("To be started again")[0], ["node3", "qemu:///system", "0 s", why]);
        let domains = rows("Domains");
        assert_eq!(domains[0][..4], ["node1", "running", "20117", "its process"]);
        assert_eq!(domains[1][..4], ["node2", "shut off", "-", "-"]);
        assert_eq!(domains[2][..4], ["scratch", "running", "-", "libvirt"]);
        assert!(domains[2][6].contains("[31007]") && domains[2][6].contains("transient"), "{domains:?}");
        let requests = rows("Recent requests");
        assert_eq!(
            requests[0][1..10],
            ["reboot", "node3", "192.168.122.12", "kernel", "in progress", "71 us", "402 us", "-", "-"]
        );
        let off = [
            "02:59:01Z",
            "off",
            "node2",
            "192.168.122.11",
            "kernel",
            "success",
            "68 us",
            "311 us",
            "2.43 ms",
            "2.49 ms",
        ];
        assert_eq!(requests[1][..10], off);
        assert_eq!(requests[2][1..6], ["list", "-", "fd00:122::11", "socket", "no callback"]);
        let tally = rows("Requests since");
        assert_eq!(
            tally.iter().map(|row| row[0]).collect::<Vec<_>>(),
            ["in progress", "answered", "unanswered", "duplicates"]
        );
        let datagrams = rows("Datagrams");
        // None that is zero, in the order of the judgement.
        let counted: Vec<_> = datagrams.iter().map(|row| row[..3].to_vec()).collect();
        let expected = [
            ["delivered", "41", "6"],
            ["drop_length", "3", "0"],
            ["drop_hash_weak", "0", "2"],
            ["drop_digest", "90214", "0"],
        ];
        assert_eq!(counted, expected);
        assert!(datagrams.iter().all(|row| row.len() == 4), "each has its meaning");
        let sources = rows("Sources");
        assert_eq!(sources[0], ["192.168.122.11", "52:54:00:12:34:56", "yes", "40", "0", "0", "5 s ago"]);
        assert_eq!(sources[1], ["192.168.122.66", "-", "no", "0", "90214", "88190", "-"]);
        let refused = rows("Rejected before the digest");
        assert_eq!(refused[0][..4], ["192.168.122.13", "52:54:00:12:34:13", "17", "2 s ago"]);
        assert!(refused[0][4].contains("key file is missing"), "{refused:?}");
        let latency = rows("How long");
        assert_eq!(latency[1][..6], ["off", "replied", "30", "2.55 ms", "31.2 ms", "31.2 ms"]);
    }

    #[test]
    fn lines_fit_the_terminal_and_control_characters_are_escaped() {
        let mut report = example();
        report.uris[0].domains[0].name = "evil\x1b[2J\r\n".repeat(20);
        report.requests.recent[0].domain = Some("日本語".repeat(30));
        report.problems.push("x\x1b]0;title\x07".repeat(9));
        for width in [1, 20, 40, 80, 132, 300] {
            for colours in [false, true] {
                let screen = Screen { width: Some(width), colours, unicode: true };
                let page = render(&report, screen);
                // What we paint ourselves, and nothing else.
                let mut text = page.clone();
                for code in ["1;31", "31", "32", "33", "2", "1", "0"] {
                    text = text.replace(&format!("\x1b[{code}m"), "");
                }
                assert!(!text.chars().any(|c| c.is_control() && c != '\n'), "{text:?}");
                let is_problem = |line: &str| line.starts_with('!') || line.starts_with("  ");
                let widest =
                    text.lines().filter(|line| width >= 20 || !is_problem(line)).map(UnicodeWidthStr::width).max();
                assert!(widest <= Some(width.max(8)), "{width}: {widest:?}");
                assert_eq!(page.contains('\x1b'), colours);
            }
        }
    }

    #[test]
    fn a_restart_that_pauses_says_for_how_long() {
        let mut report = example();
        let [restart] = report.restarts.as_mut_slice() else { panic!("one restart") };
        (restart.waiting_ms, restart.pause_ms, restart.inherited) = (12_000, 42_000, true);
        (restart.attempts, restart.reason) = (0, None);
        let page = render(&report, Screen::PLAIN);
        let row = words(section(&page, "To be started again")[0]).join("|");
        assert_eq!(row, "node3|qemu:///system|12 s|paused for another 30 s, left by an earlier daemon");
    }

    #[test]
    fn a_restart_says_why_it_has_failed_and_who_has_to_see_to_it() {
        let mut report = example();
        let [restart] = report.restarts.as_mut_slice() else { panic!("one restart") };
        (restart.held, restart.inherited, restart.attempts) = (true, true, 3);
        restart.reason = Some("no storage".to_owned());
        let page = render(&report, Screen { width: Some(200), ..Screen::PLAIN });
        let row = words(section(&page, "To be started again")[0]).join("|");
        assert!(row.ends_with("not started unasked: fence it with `on` or `off`, tried 3 times: no storage"), "{row}");
    }

    #[test]
    fn the_tcp_listener_has_its_state_and_its_counters() {
        let mut report = example();
        let page = render(&report, Screen::PLAIN);
        assert_eq!(
            words(section(&page, "Listening \"guests\" to tcp connections at 192.168.122.1 port 1229")[0]),
            ["any", "listening"]
        );
        let counted = section(&page, "Connections by tcp");
        assert_eq!(counted.iter().map(|row| words(row)[1]).collect::<Vec<_>>(), ["3", "1"]);
        let tcp = report.listeners.last_mut().unwrap();
        (tcp.hears, tcp.status, tcp.interface) =
            (false, "TCP port 1229 is taken".to_owned(), Some("virbr0".to_owned()));
        let page = render(&report, Screen::PLAIN);
        assert_eq!(words(section(&page, "Listening \"guests\" to tcp")[0]), ["virbr0", "TCP port 1229 is taken"]);
    }

    #[test]
    fn an_empty_report_is_a_short_page() {
        let mut report = example();
        report.problems.clear();
        report.health = Health::Serving;
        report.listeners.truncate(1);
        report.listeners[0].interfaces.clear();
        for list in [&mut report.socket, &mut report.kernel.as_mut().unwrap().counters.clone().unwrap()] {
            list.clear();
        }
        (report.kernel, report.cluster) = (None, None);
        (report.uris, report.restarts, report.latency, report.sources) = Default::default();
        report.rejected_sources.clear();
        let requests = &mut report.requests;
        requests.recent.clear();
        (requests.in_progress, requests.answered, requests.unanswered, requests.duplicates) = Default::default();
        assert_eq!(render(&report, Screen::PLAIN).lines().count(), 1);
    }
}
