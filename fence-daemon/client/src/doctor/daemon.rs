//! Checks what the running daemon reports: its health, its kernel program, and recent requests.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use fence_common::ending::Ending;
use fence_common::verdict::Verdict;
use fence_common::words::counted;
use fence_config::Attach;
use fence_control::client::ClientError;
use fence_control::report::{Health, Listener, RejectedSource, Report};

use super::finding::Finding;
use crate::probe::Obstacle;

const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Checks whether the daemon runs and is healthy.
#[must_use]
pub fn check(answer: &Result<Report, ClientError>, has_systemd: bool) -> Vec<Finding> {
    const CHECK: &str = "daemon";
    let report = match answer {
        Ok(report) => report,
        Err(error @ ClientError::NotThere { .. }) => {
            let remedy = "this host fences nobody: start the daemon; if it stops again, its log says why (`journalctl -u fence-daemon`)";
            let start = if has_systemd { "systemctl start fence-daemon" } else { "fence-daemon" };
            return vec![Finding::wrong(CHECK, error.to_string(), remedy).command(start)];
        }
        Err(error @ ClientError::Silent(_)) => {
            let finding = Finding::wrong(
                CHECK,
                error.to_string(),
                "start it again; requests that it has claimed are not carried out twice",
            );
            return vec![finding.command("systemctl restart fence-daemon")];
        }
        Err(error) => {
            return vec![Finding::unknown(CHECK, error.to_string(), "without its answer its state is unknown")];
        }
    };
    let daemon = &report.daemon;
    let about = format!(
        "process {}, version {}, up {}: {}",
        daemon.pid,
        daemon.version,
        crate::screen::words::span(daemon.uptime_ms),
        report.health.name()
    );
    let mut findings = vec![match report.health {
        Health::Serving => Finding::ok(CHECK, about),
        Health::Starting | Health::Stopping => Finding::warning(CHECK, about, report.status()),
        Health::Degraded => Finding::wrong(CHECK, about, report.problems.join("; ")),
    }];
    if daemon.version != VERSION {
        let seen = format!("the daemon is version {}, this program {VERSION}", daemon.version);
        let remedy =
            "the program was updated, and the old daemon still runs: restart it (guests that ask meanwhile ask again)";
        findings.push(Finding::warning(CHECK, seen, remedy).command("systemctl restart fence-daemon"));
    }
    findings
}

/// Checks whether a listener's kernel program is where the configuration wants it. `obstacle` finds
/// what is in its way on an interface.
#[must_use]
pub fn program(attach: Attach, listener: &Listener, obstacle: impl Fn(&str) -> Option<Obstacle>) -> Vec<Finding> {
    const CHECK: &str = "program";
    if attach == Attach::Off {
        let seen = "off by configuration (`attach = \"off\"`, or a group has its own key): requests come through the socket, and the firewall counts";
        return vec![Finding::ok(CHECK, seen)];
    }
    let judge = |interface: &fence_control::report::Interface| {
        let name = &interface.name;
        match &interface.program {
            Some(mode) => {
                let hidden = if mode == Attach::Tcx.name() {
                    String::new()
                } else {
                    // XDP runs before packet sockets get their copy, tcx after.
                    format!(
                        "; `tcpdump -i {name}` does not show them (a guest's port does, and docs/reference/inspect.md says more)"
                    )
                };
                let id = interface.program_id.map(|id| format!(", id {id}")).unwrap_or_default();
                Finding::ok(
                    CHECK,
                    format!(
                        "attached to {name} ({mode}{id}): requests reach it before any firewall of this host{hidden}"
                    ),
                )
            }
            None => {
                let there = obstacle(name);
                let why = match &there {
                    Some(Obstacle::Occupant(other)) => format!("another XDP program is on it: {other}"),
                    Some(Obstacle::Sharer(other)) => format!("what it takes out would be missed by {other}"),
                    None => (interface.reason.clone()).unwrap_or_else(|| "the daemon's log says why".to_owned()),
                };
                let remedy = format!(
                    "{why}. The same requests get the same answers through the socket, but a flood costs the daemon's time, and the host's firewall counts"
                );
                let finding = Finding::warning(
                    CHECK,
                    format!("not attached to {name} (`attach = \"{}\"`)", attach.name()),
                    remedy,
                );
                match there {
                    Some(Obstacle::Occupant(_)) => finding.command(format!("bpftool net show dev {name}")),
                    Some(Obstacle::Sharer(_)) => finding.command("ip -d link show"),
                    None => finding.command("journalctl -u fence-daemon"),
                }
            }
        }
    };
    listener.interfaces.iter().map(judge).collect()
}

/// Checks recent requests and senders.
#[must_use]
pub fn requests(report: &Report) -> Vec<Finding> {
    const CHECK: &str = "requests";
    let mut findings = Vec::new();
    for source in report.sources.iter().filter(|source| source.failures > 0) {
        let (address, delivered) = (&source.address, source.delivered);
        let (wrong, right) = (counted(source.failures, "datagram"), counted(delivered, "datagram"));
        let (seen, remedy) = if delivered == 0 && !source.trusted {
            let seen = format!("{address} sent {wrong} with a wrong digest, and none that was right");
            (
                seen,
                "it has another key (compare fingerprints: `fence-daemon doctor --from-guest` there), or somebody forges: copy the key there",
            )
        } else {
            let seen = format!("{address} sent {wrong} with a wrong digest, and {right} with a right one");
            (seen, "two programs there have different keys, or another host forges requests in its name")
        };
        findings.push(Finding::warning(CHECK, seen, remedy));
    }
    findings.extend(report.rejected_sources.iter().filter(|source| !is_mended(report, source)).filter_map(rejection));
    // Only the newest request of each client counts: the client may have been repaired since.
    let mut newest = BTreeMap::new();
    for request in &report.requests.recent {
        let client = request
            .client
            .parse::<SocketAddr>()
            .map_or_else(|_| request.client.clone(), |client| client.ip().to_string());
        newest.entry(client).or_insert(request);
    }
    for (client, request) in newest {
        if request.result.as_deref() == Some(Ending::NoCallback.name()) {
            let why = request.detail.as_deref().unwrap_or("unknown");
            let seen = format!("{client} asked ({}) and could not be called back: {why}", request.op);
            let remedy = "its firewall must let TCP from this host to the port in; where it was a failed exchange, its `-C` differs from `auth` here: \
                          `fence-daemon doctor --from-guest` there tells more";
            findings.push(Finding::warning(CHECK, seen, remedy));
        }
    }
    if findings.is_empty() {
        let answered = report.requests.answered;
        findings.push(Finding::ok(
            CHECK,
            if answered == 0 { "none yet".to_owned() } else { format!("{answered} answered, no sender in doubt") },
        ));
    }
    findings
}

/// Whether a later request of this sender was correct.
fn is_mended(report: &Report, rejected: &RejectedSource) -> bool {
    let last = report.daemon.now_unix_ms.saturating_sub(rejected.last_seen_ms);
    report.requests.recent.iter().any(|request| {
        let client = request.client.parse::<SocketAddr>();
        request.arrived_unix_ms > last && client.is_ok_and(|client| client.ip().to_string() == rejected.address)
    })
}

/// A finding about a guest with a wrong setup. Datagrams that no client sends give none.
fn rejection(rejected: &RejectedSource) -> Option<Finding> {
    let verdict = Verdict::COUNTED.into_iter().find(|one| one.counter_name() == Some(rejected.counter.as_str()))?;
    let cause = verdict.cause()?;
    let requests = counted(rejected.count, "request");
    let address = &rejected.address;
    let remedy = if verdict == Verdict::Unsigned {
        format!("{cause}: copy the key there (`fence-daemon doctor --from-guest` there tells more)")
    } else {
        cause.to_owned()
    };
    Some(Finding::warning("requests", format!("{requests} of {address} rejected (`{}`)", rejected.counter), remedy))
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::super::finding::State;
    use super::*;
    use crate::example::example;

    fn states(findings: &[Finding]) -> Vec<State> {
        findings.iter().map(|finding| finding.state).collect()
    }

    fn healthy() -> Report {
        let mut report = example();
        report.health = Health::Serving;
        report.problems.clear();
        report.daemon.version = VERSION.to_owned();
        report
    }

    #[test]
    fn a_daemon_is_told_by_its_health() {
        assert_eq!(states(&check(&Ok(healthy()), true)), [State::Ok]);
        let degraded =
            check(&Ok(Report { health: Health::Degraded, problems: vec!["a: do b".to_owned()], ..healthy() }), true);
        assert!(degraded[0].state == State::Wrong && degraded[0].remedy.as_deref() == Some("a: do b"), "{degraded:?}");
        let mut old = healthy();
        old.daemon.version = "0.0.1".to_owned();
        assert_eq!(states(&check(&Ok(old), true)), [State::Ok, State::Warning]);
    }

    #[test]
    fn a_missing_daemon_is_wrong_and_a_forbidden_one_unknown() {
        let nobody = ClientError::NotThere { path: PathBuf::from("/s"), error: std::io::ErrorKind::NotFound.into() };
        let nobody = check(&Err(nobody), true);
        assert_eq!(
            (states(&nobody), nobody[0].commands.clone()),
            (vec![State::Wrong], vec!["systemctl start fence-daemon".to_owned()])
        );
        assert_eq!(states(&check(&Err(ClientError::Silent(PathBuf::from("/s"))), false)), [State::Wrong]);
        assert_eq!(states(&check(&Err(ClientError::NotPermitted(PathBuf::from("/s"))), false)), [State::Unknown]);
    }

    #[test]
    fn a_program_that_is_missing_is_reported_with_who_is_in_its_place() {
        let mut report = healthy();
        let nobody = |_: &str| None;
        assert!(states(&program(Attach::Auto, &report.listeners[0], nobody)).iter().all(|state| *state == State::Ok));
        report.listeners[0].interfaces.truncate(1);
        for (mode, hides) in [("tcx", false), ("generic", true), ("native", true)] {
            report.listeners[0].interfaces[0].program = Some(mode.to_owned());
            let told = program(Attach::Auto, &report.listeners[0], nobody);
            assert_eq!(told[0].seen.contains("`tcpdump -i virbr0` does not show them"), hides, "{told:?}");
        }
        report.listeners[0].interfaces[0].program = None;
        let missing = program(Attach::Auto, &report.listeners[0], |_| {
            Some(Obstacle::Occupant("xdp_dispatcher (id 7)".to_owned()))
        });
        assert_eq!(states(&missing), [State::Warning]);
        assert!(missing[0].remedy.as_ref().unwrap().contains("xdp_dispatcher"), "{missing:?}");
        assert_eq!(states(&program(Attach::Off, &report.listeners[0], nobody)), [State::Ok]);
    }

    #[test]
    fn only_the_newest_word_of_a_client_counts() {
        let mut report = healthy();
        report.sources.clear();
        report.rejected_sources.clear();
        let mut failed = report.requests.recent[0].clone();
        failed.client = "192.168.122.99:1229".to_owned();
        failed.result = Some(Ending::NoCallback.name().to_owned());
        let mut served = failed.clone();
        served.result = Some("success".to_owned());
        report.requests.recent = vec![failed.clone(), served.clone()];
        assert_eq!(states(&requests(&report)), [State::Warning]);
        report.requests.recent = vec![served, failed];
        assert_eq!(states(&requests(&report)), [State::Ok]);
    }

    #[test]
    fn a_sender_with_another_key_is_named() {
        let mut report = healthy();
        report.requests.recent.clear();
        report.rejected_sources.clear();
        report.sources.truncate(1);
        report.sources[0].failures = 3;
        report.sources[0].delivered = 0;
        report.sources[0].trusted = false;
        let told = requests(&report);
        assert!(told[0].state == State::Warning && told[0].seen.contains("none that was right"), "{told:?}");
        report.sources[0].delivered = 1;
        assert!(requests(&report)[0].seen.contains("1 datagram with a right one"));
        report.sources[0].failures = 0;
        assert_eq!(states(&requests(&report)), [State::Ok]);
    }

    #[test]
    fn a_guest_without_its_key_is_named_until_it_asks_with_one() {
        let mut report = healthy();
        report.sources.clear();
        report.requests.recent.truncate(1);
        let told = requests(&report);
        assert_eq!(states(&told), [State::Warning]);
        assert!(told[0].seen.contains("17 requests of 192.168.122.13 rejected (`drop_unsigned`)"), "{told:?}");
        assert!(told[0].remedy.as_ref().unwrap().contains("fence_xvm.key is missing"), "{told:?}");
        // What no client sends names nobody.
        report.rejected_sources[0].counter = "drop_operation".to_owned();
        assert_eq!(states(&requests(&report)), [State::Ok]);
        report.rejected_sources[0].counter = "drop_unsigned".to_owned();
        report.requests.recent[0].client = "192.168.122.13:1229".to_owned();
        report.requests.recent[0].arrived_unix_ms = report.daemon.now_unix_ms;
        assert_eq!(states(&requests(&report)), [State::Ok]);
    }
}
