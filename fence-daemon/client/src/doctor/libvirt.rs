//! Checks libvirt: whether each URI answers, here and to the daemon, and whether a cluster can use
//! the domains' names.
//!
//! The daemon's systemd unit leaves it fewer rights than a shell has. So the daemon's own
//! connections count more than what can be reached from here.

use std::collections::BTreeMap;
use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use fence_common::domain_state;
use fence_common::target::Target;
use fence_common::wire::DOMAIN_LEN;
use fence_common::words::counted;
use fence_config::{Doubt, Groups, Unmatched};
use fence_control::report::{Report, Uri};
use rustix::thread::CapabilitySet;

use super::finding::Finding;
use crate::probe::{Domain, Probe, Unanswered};

/// How long libvirt may take: as long as the daemon allows it for a request.
const BOUND: Duration = Duration::from_secs(5);

/// How long the daemon may take to connect to a URI that answers here. It tries again every few
/// seconds.
const CATCHES_UP_WITHIN: Duration = Duration::from_secs(6);

/// The interval between two looks at the daemon's connections.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// Checks each URI, and the daemon's connection to it. `ask` gets the daemon's report, if it runs.
/// Compares `groups` with the domains.
#[must_use]
pub fn check(uris: &[String], groups: &Groups, probe: &dyn Probe, ask: impl Fn() -> Option<Report>) -> Vec<Finding> {
    let probed = probe.domains(uris, BOUND);
    let answering: Vec<&str> =
        probed.iter().filter(|(_, answer)| answer.is_ok()).map(|(uri, _)| uri.as_str()).collect();
    let report = caught_up(&answering, ask);
    let judged = |(uri, answer): &(String, Result<Vec<Domain>, Unanswered>)| {
        let refused = report.as_ref().and_then(|report| Some((report.daemon.pid, unconnected(report, uri)?)));
        match refused {
            Some((pid, there)) if answer.is_ok() => refused_to_daemon(there, &rights(pid)),
            Some(_) | None => judge(uri, answer),
        }
    };
    let mut findings: Vec<_> = probed.iter().map(judged).collect();
    let domains: Vec<_> = probed.iter().filter_map(|(_, answer)| answer.as_ref().ok()).flatten().collect();
    let doubts = names(&domains);
    if doubts.is_empty() && !domains.is_empty() {
        findings.push(Finding::ok(
            "domains",
            format!("{} with names that a cluster can use", counted(domains.len(), "domain")),
        ));
    }
    findings.extend(doubts);
    // If a URI does not answer, the domain may be there.
    if probed.iter().all(|(_, answer)| answer.is_ok()) {
        findings.extend(unmatched(groups, &domains));
    }
    findings
}

/// The entries of groups that no domain has.
fn unmatched(groups: &Groups, domains: &[&Domain]) -> Vec<Finding> {
    let domains: Vec<_> = domains.iter().map(|domain| (domain.name.as_str(), domain.uuid)).collect();
    let unmatched = groups.unmatched(&domains).into_iter();
    let doubts = unmatched.map(|Unmatched { group, entry }| Doubt::NoSuchDomain { group, entry });
    doubts.map(|doubt| Finding::warning("domains", doubt.to_string(), doubt.help())).collect()
}

/// The daemon's report, once it is connected to all these URIs or the time is over.
fn caught_up(uris: &[&str], ask: impl Fn() -> Option<Report>) -> Option<Report> {
    let until = Instant::now() + CATCHES_UP_WITHIN;
    loop {
        let report = ask()?;
        let behind = uris.iter().any(|uri| unconnected(&report, uri).is_some());
        if !behind || Instant::now() >= until {
            return Some(report);
        }
        thread::sleep(LOOK_AGAIN);
    }
}

/// The daemon's view of a URI to which it is not connected. If it does not know the URI, it has not
/// read this configuration.
fn unconnected<'r>(report: &'r Report, uri: &str) -> Option<&'r Uri> {
    report.uris.iter().find(|there| there.uri == uri && !there.connected)
}

/// A URI answers here, but not to the daemon. `rights` is a prefix that runs a command with the
/// daemon's rights.
fn refused_to_daemon(there: &Uri, rights: &str) -> Finding {
    let uri = &there.uri;
    let error = there.last_error.as_deref().unwrap_or("it does not say why");
    let remedy = "the daemon has fewer rights than this shell, and another environment: `systemctl daemon-reload` and \
                  a restart give it what its configuration takes (`fence-daemon drop-in`). Compare its unit with dist/fence-daemon.service, and see whether root's ssh key and known_hosts do without questions. This tries it with the \
                  daemon's rights";
    Finding::wrong("libvirt", format!("{uri} answers here, but not to the daemon: {error}"), remedy)
        .command(format!("{rights}{}", try_it(uri)))
}

/// A prefix that runs a command with the rights and the file system of a process.
fn rights(pid: u32) -> String {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    confine(pid, &status).unwrap_or_default()
}

fn confine(pid: u32, status: &str) -> Option<String> {
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    let left = CapabilitySet::from_bits_retain(u64::from_str_radix(field("CapBnd:")?, 16).ok()?);
    let names: String = left.iter_names().map(|(name, _)| format!(",+{}", name.to_ascii_lowercase())).collect();
    let privileges = if field("NoNewPrivs:") == Some("1") { " --no-new-privs" } else { "" };
    Some(format!("nsenter --target {pid} --mount -- setpriv{privileges} --bounding-set=-all{names} "))
}

fn try_it(uri: &str) -> String {
    format!("virsh -c '{uri}' list --all")
}

fn judge(uri: &str, answer: &Result<Vec<Domain>, Unanswered>) -> Finding {
    const CHECK: &str = "libvirt";
    let try_it = try_it(uri);
    match answer {
        Ok(domains) if domains.is_empty() => {
            let remedy = "it has no domains: are the guests at another URI (`lxc:///`, or a user's own: `qemu:///session?socket=/run/user/UID/libvirt/libvirt-sock`)?";
            Finding::warning(CHECK, format!("{uri} has no domains"), remedy).command(try_it)
        }
        Ok(domains) => {
            let running = domains.iter().filter(|domain| domain.state == domain_state::RUNNING).count();
            Finding::ok(CHECK, format!("{uri} answers: {}, {running} running", counted(domains.len(), "domain")))
        }
        Err(Unanswered::Overdue) => {
            let remedy = "it hangs: only domains whose process the daemon knows can be fenced";
            Finding::wrong(CHECK, format!("{uri} does not answer within {} s", BOUND.as_secs()), remedy).command(try_it)
        }
        Err(Unanswered::Failed(error)) => {
            let remedy = "its domains cannot be fenced, or only those whose process the daemon knows already: see whether libvirt's daemon runs \
                          (libvirtd, or virtqemud and virtlxcd), and whether the URI is right (`backends { libvirt { uri`)";
            Finding::wrong(CHECK, format!("{uri}: {error}"), remedy).command(try_it)
        }
    }
}

/// Names that a cluster cannot use, or only with care.
fn names(domains: &[&Domain]) -> Vec<Finding> {
    const CHECK: &str = "domains";
    let mut findings = Vec::new();
    let mut namesakes: BTreeMap<&str, Vec<&Domain>> = BTreeMap::new();
    for &domain in domains {
        namesakes.entry(&domain.name).or_default().push(domain);
        if let Some((what, remedy)) = doubt(&domain.name) {
            let seen = format!("{} ({}, {}): {what}", domain.name, domain.uuid, domain.uri);
            let finding = Finding::warning(CHECK, seen, remedy);
            findings.push(finding.command(format!("virsh -c '{}' domrename {} NEW-NAME", domain.uri, domain.uuid)));
        }
    }
    for (name, same) in namesakes.iter().filter(|(_, same)| same.len() > 1) {
        let places: Vec<_> = same.iter().map(|domain| domain.uri.as_str()).collect();
        let seen = format!("{name} exists {} times: {}", same.len(), places.join(", "));
        let remedy = "a fence by name means all of them, and succeeds when each of them is off: rename one, or fence by UUID \
                      (`pcmk_host_map=\"NODE:UUID\"`)";
        findings.push(Finding::warning(CHECK, seen, remedy));
    }
    findings
}

/// What is doubtful about a name, and the remedy. Renaming is the best one.
fn doubt(name: &str) -> Option<(&'static str, &'static str)> {
    const BY_UUID: &str = "Pacemaker leaves it out of what the device can fence: rename the domain while it is off, or map the node to its \
                           UUID (`pcmk_host_map=\"NODE:UUID\"`)";
    if name.len() >= DOMAIN_LEN {
        let remedy = "a request has room for 63 bytes: rename it while it is off, or fence it by UUID (`pcmk_host_map=\"NODE:UUID\"`)";
        return Some(("its name is longer than a request allows", remedy));
    }
    if matches!(Target::parse(name.as_bytes()), Some(Target::Uuid(_))) {
        let remedy = "a request with it means a UUID, and finds another domain or none: rename it while it is off";
        return Some(("its name looks like a UUID", remedy));
    }
    if name.eq_ignore_ascii_case("on") || name.eq_ignore_ascii_case("off") {
        return Some(("in a host list its name reads as a state", BY_UUID));
    }
    if name.contains(|c: char| matches!(c, ':' | ';' | ',') || c.is_whitespace()) {
        return Some(("`pcmk_host_map` and `pcmk_host_list` split at blanks and at `:`, `;` and `,`", BY_UUID));
    }
    let usable = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if !name.chars().all(usable) {
        return Some(("it has other characters than letters, digits, `.`, `_` and `-`", BY_UUID));
    }
    None
}

#[cfg(test)]
mod tests {
    use super::super::finding::State;
    use super::*;

    fn domain(name: &str, uri: &str) -> Domain {
        Domain { name: name.to_owned(), uuid: uuid::Uuid::nil(), state: 1, uri: uri.into() }
    }

    #[test]
    fn names_that_a_cluster_can_use_are_not_spoken_of() {
        for name in ["node1", "web.example", "A_b-c", "on1", &"x".repeat(63)] {
            assert_eq!(doubt(name), None, "{name}");
        }
        let many = [domain("node1", "a:"), domain("node2", "a:"), domain("node3", "b:")];
        assert_eq!(names(&many.iter().collect::<Vec<_>>()), []);
    }

    #[test]
    fn names_that_it_cannot_use_are_reported_with_the_reason() {
        for (name, part) in [
            ("on", "as a state"),
            ("OFF", "as a state"),
            ("my node", "split"),
            ("a:b", "split"),
            ("a;b", "split"),
            ("a,b", "split"),
            ("käse", "other characters"),
            ("a/b", "other characters"),
            ("4417ce60-1b43-4d3a-8f0e-95d6c2f0e0b1", "looks like a UUID"),
            (&"x".repeat(64), "longer than"),
        ] {
            let told = names(&[&domain(name, "a:")]);
            assert!(
                told.len() == 1 && told[0].state == State::Warning && told[0].seen.contains(part),
                "{name}: {told:?}"
            );
        }
        let twice = names(&[&domain("node1", "qemu:///system"), &domain("node1", "lxc:///")]);
        assert!(twice.len() == 1 && twice[0].seen.contains("qemu:///system, lxc:///"), "{twice:?}");
    }

    #[test]
    fn a_command_gets_the_rights_of_the_daemon() {
        let status = "Name:\tfence-daemon\nCapBnd:\t0000000000800020\nNoNewPrivs:\t1\n";
        let expected = "nsenter --target 7 --mount -- setpriv --no-new-privs --bounding-set=-all,+kill,+sys_nice ";
        assert_eq!(confine(7, status).as_deref(), Some(expected));
        assert_eq!(confine(7, ""), None);
    }

    #[test]
    fn a_uri_is_judged_by_its_answer() {
        assert_eq!(judge("a:", &Ok(vec![domain("x", "a:")])).state, State::Ok);
        assert_eq!(judge("a:", &Ok(vec![])).state, State::Warning);
        assert_eq!(judge("a:", &Err(Unanswered::Overdue)).state, State::Wrong);
        assert_eq!(judge("a:", &Err(Unanswered::Failed("no turn".to_owned()))).state, State::Wrong);
    }
}
