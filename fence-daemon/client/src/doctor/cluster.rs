//! Checks what `backend = "cpg"` needs: corosync, its quorum, its node list, the daemons of the
//! other hosts, and the fencing of hosts.
//!
//! corosync is asked by the doctor itself. What the other hosts are like is the running daemon's
//! word: only a member of its group hears them.

use std::path::Path;
use std::time::Duration;

use fence_config::{Config, Listener, key};
use fence_control::report::{Cluster, ClusterHost, Report};

use super::finding::Finding;
use super::host::SET_CLOCK;
use super::key::fingerprint;
use super::program::{self, Silence};
use crate::probe::{NoRing, Probe, Ring, RingNode};
use crate::status::hosts::{CLOCKS_AGREE_MS, clock_gap, name};

/// How long corosync may take. It answers from memory.
const BOUND: Duration = Duration::from_secs(5);
/// Pacemaker's tool that says which fence devices it has. The daemon asks the same one for proofs.
const STONITH_ADMIN: &str = "stonith_admin";

/// All checks. `report` is the running daemon's.
#[must_use]
pub fn check(config: &Config, report: Option<&Report>, probe: &dyn Probe) -> Vec<Finding> {
    let cluster = report.and_then(|report| report.cluster.as_ref());
    let ring = probe.ring(BOUND);
    let mut findings = vec![corosync(&ring, cluster)];
    if let Ok(ring) = &ring {
        findings.push(quorum(ring));
        findings.extend(nodes(ring));
    }
    findings.push(fencing(&devices()));
    match (report, cluster) {
        (Some(report), Some(cluster)) if cluster.joined => {
            findings.extend(hosts(cluster, &report.daemon.version, &ours(config)));
            findings.extend(clocks(cluster));
        }
        _ => {
            let remedy = "only a daemon in the group hears the others: mend what is wrong above";
            findings.push(Finding::unknown("hosts", "what the other hosts' daemons are like", remedy));
        }
    }
    findings
}

/// Whether corosync runs, and the daemon is connected to it.
fn corosync(ring: &Result<Ring, NoRing>, cluster: Option<&Cluster>) -> Finding {
    const CHECK: &str = "corosync";
    const ALONE: &str = "until then this host fences only what runs on it";
    match ring {
        Err(NoRing::NoLibrary(why)) => {
            let seen = format!("its libraries cannot be loaded: {why}");
            Finding::wrong(CHECK, seen, format!("install corosync; {ALONE}"))
                .command("apt-get install corosync || dnf install corosync")
        }
        Err(NoRing::Failed(why)) => {
            let remedy = format!("start it, and see why it stops if it does (`journalctl -u corosync`); {ALONE}");
            Finding::wrong(CHECK, why, remedy).command("systemctl enable --now corosync")
        }
        Err(NoRing::Overdue) => {
            let seen = format!("it does not answer within {} s", BOUND.as_secs());
            Finding::wrong(CHECK, seen, format!("it hangs; {ALONE}")).command("systemctl restart corosync")
        }
        Ok(ring) => match cluster {
            Some(cluster) if !cluster.joined => {
                let seen = format!("it answers here, but not to the daemon: {}", cluster.status);
                let remedy = "the daemon tries again each second: ask again; if it stays so, its log says more";
                Finding::wrong(CHECK, seen, remedy).command("journalctl -u fence-daemon -n 20")
            }
            Some(_) | None => Finding::ok(CHECK, format!("it runs: this is {}", called(ring, ring.ours))),
        },
    }
}

/// A node, for people.
fn called(ring: &Ring, id: u32) -> String {
    let name = ring.nodes.iter().find(|node| node.id == id).and_then(|node| node.name.as_ref());
    name.map_or_else(|| format!("node {id}"), |name| format!("{name} (node {id})"))
}

fn quorum(ring: &Ring) -> Finding {
    const CHECK: &str = "quorum";
    if !ring.has_provider {
        let remedy = "write `provider: corosync_votequorum` into the section `quorum` of /etc/corosync/corosync.conf \
                      on all hosts: without it nobody is fenced through the group. Then restart corosync on each";
        return Finding::wrong(CHECK, "corosync.conf has no quorum provider", remedy)
            .command("systemctl restart corosync");
    }
    if !ring.quorate {
        let remedy = "nobody is fenced from here: start corosync on more hosts, or mend the network between them";
        return Finding::wrong(CHECK, "this host's part of the cluster has no quorum", remedy)
            .command("corosync-quorumtool -s");
    }
    Finding::ok(CHECK, "this host's part of the cluster has it")
}

/// The node list against the hosts that corosync sees.
fn nodes(ring: &Ring) -> Vec<Finding> {
    const CHECK: &str = "node list";
    if ring.nodes.is_empty() {
        let remedy = "write a `nodelist` with `nodeid`, `name` and `ring0_addr` of each host into \
                      /etc/corosync/corosync.conf on all hosts: nobody knows all hosts without it, and every question fails";
        let seen = "corosync.conf has none, or one of its nodes has no `nodeid`";
        return vec![Finding::wrong(CHECK, seen, remedy).command("corosync-cfgtool -R")];
    }
    let mut findings = Vec::new();
    let is_seen = |node: &&RingNode| ring.seen.contains(&node.id);
    for node in ring.nodes.iter().filter(|node| !is_seen(node)) {
        let seen = format!("corosync does not see {}", called(ring, node.id));
        let remedy = "what may run there is not called off: start corosync there, or mend the network; have Pacemaker fence a dead \
                      host, and take one that is gone for good out of the list";
        findings.push(Finding::wrong(CHECK, seen, remedy).command("corosync-cfgtool -s"));
    }
    for node in ring.nodes.iter().filter(|node| node.name.is_none()) {
        let seen = format!("node {} has no name", node.id);
        let remedy = "Pacemaker's fencings name hosts, so one of this host proves nothing: give it Pacemaker's name (`name:`) on all hosts";
        findings.push(Finding::warning(CHECK, seen, remedy).command("corosync-cfgtool -R"));
    }
    for id in ring.seen.iter().filter(|id| !ring.nodes.iter().any(|node| node.id == **id)) {
        let seen = format!("node {id} is there, and not in the list here");
        let remedy = "corosync.conf differs between the hosts: copy it to all of them, and have it read";
        findings.push(Finding::wrong(CHECK, seen, remedy).command("corosync-cfgtool -R"));
    }
    if findings.is_empty() {
        let names: Vec<_> = ring.nodes.iter().map(|node| called(ring, node.id)).collect();
        findings.push(Finding::ok(CHECK, format!("corosync sees all of it: {}", names.join(", "))));
    }
    findings
}

/// How many fence devices Pacemaker has on this host.
fn devices() -> Result<usize, Silence> {
    let said = program::run(STONITH_ADMIN, &["--list-registered"], BOUND)?;
    if said.code == Some(0) {
        return Ok(said.stdout.lines().map(found).sum());
    }
    let error = std::io::Error::other(said.first_line().to_owned());
    Err(Silence::Broken { program: STONITH_ADMIN.to_owned(), error })
}

/// The number in `2 fence devices found`.
fn found(line: &str) -> usize {
    let words: Vec<_> = line.split_whitespace().collect();
    match words.as_slice() {
        [number, "fence", "device" | "devices", "found"] => number.parse().unwrap_or(0),
        _ => 0,
    }
}

/// Whether a dead host can be proven dead.
fn fencing(devices: &Result<usize, Silence>) -> Finding {
    const CHECK: &str = "host fencing";
    const MEANS: &str =
        "machines of a dead host never count as off: make the hosts a Pacemaker cluster that fences them";
    match devices {
        Ok(0) => {
            Finding::warning(CHECK, "Pacemaker has no fence device on this host", MEANS).command("pcs stonith status")
        }
        Ok(count) => Finding::ok(CHECK, format!("Pacemaker runs here and has {count} fence device(s) for hosts")),
        Err(Silence::Missing(_)) => Finding::warning(CHECK, "Pacemaker is not installed on this host", MEANS)
            .command("apt-get install pacemaker pcs || dnf install pacemaker pcs"),
        Err(silence) => Finding::warning(CHECK, format!("Pacemaker does not answer: {silence}"), MEANS)
            .command("systemctl enable --now pacemaker"),
    }
}

/// The fingerprints of the keys that sign here.
fn ours(config: &Config) -> Vec<String> {
    let files = config.listeners.iter().filter_map(Listener::key_files).take(1);
    let load = |path: &Path| key::load(path, &mut fence_config::Warnings::default()).ok();
    files.filter_map(|files| load(&files.first)).map(|found| fingerprint(&found.key)).collect()
}

/// The daemons of the other hosts.
fn hosts(cluster: &Cluster, version: &str, fingerprints: &[String]) -> Vec<Finding> {
    const CHECK: &str = "hosts";
    let mut findings = Vec::new();
    for host in cluster.hosts.iter().filter(|host| !host.ours) {
        findings.extend(host_findings(host, version, fingerprints));
    }
    for stock in &cluster.stock {
        let seen = format!("fence_virtd runs with backend \"cpg\" in this cluster: {stock}");
        let remedy = "it calls machines off that run: stop it on every host";
        findings.push(Finding::wrong(CHECK, seen, remedy).command("systemctl disable --now fence_virtd"));
    }
    if findings.is_empty() {
        let count = cluster.hosts.len();
        findings.push(Finding::ok(CHECK, format!("all {count} have a daemon of this version with this key")));
    }
    findings
}

fn host_findings(host: &ClusterHost, version: &str, fingerprints: &[String]) -> Vec<Finding> {
    const CHECK: &str = "hosts";
    let called = name(host);
    if !host.present {
        let fenced = host.fenced_ms.map(|_| ", and was fenced").unwrap_or_default();
        let seen = format!("the daemon of {called} is not in the group{fenced}");
        let remedy = "what may run there is not called off, and list and monitor fail: start it there";
        return vec![Finding::wrong(CHECK, seen, remedy).command(on(host, "systemctl start fence-daemon"))];
    }
    let mut findings = Vec::new();
    if host.key_agrees == Some(false) {
        let ours = fingerprints.first().map_or_else(|| "unknown".to_owned(), Clone::clone);
        let seen = format!("the key of {called} differs from ours, whose fingerprint is {ours}");
        let remedy = "its word does not count: copy one key file to all hosts, reload, and compare fingerprints (`fence-daemon doctor` there)";
        findings.push(Finding::wrong(CHECK, seen, remedy).command(on(host, "systemctl reload fence-daemon")));
    }
    match &host.software {
        Some(theirs) if theirs != version => {
            let seen = format!("{called} has version {theirs}, this host {version}");
            let remedy = "hosts understand each other while the version of their messages is the same: install one version on all, host by host";
            findings.push(Finding::warning(CHECK, seen, remedy));
        }
        Some(_) | None => {}
    }
    if let (Some(theirs), Some(false) | None) = (host.version, host.key_agrees) {
        let seen = format!("{called} speaks version {theirs} of the messages, which this host does not understand");
        findings.push(Finding::wrong(CHECK, seen, "its word does not count: install one version on all hosts"));
    }
    findings
}

/// A command on another host.
fn on(host: &ClusterHost, command: &str) -> String {
    host.name.as_ref().map_or_else(|| format!("ssh HOST {command}"), |name| format!("ssh {name} {command}"))
}

/// Clocks of other hosts that differ from this one's.
fn clocks(cluster: &Cluster) -> Vec<Finding> {
    const CHECK: &str = "clock";
    let differs = |host: &&ClusterHost| host.clock_ahead_ms.is_some_and(|ahead| ahead.unsigned_abs() > CLOCKS_AGREE_MS);
    let told = |host: &ClusterHost| {
        let seen = format!(
            "the clock of {} is {} of this one's",
            name(host),
            clock_gap(host.clock_ahead_ms.unwrap_or_default())
        );
        let remedy =
            "a fencing of a host is recognised by the time of day: have both kept by chrony or systemd-timesyncd";
        Finding::warning(CHECK, seen, remedy).command(SET_CLOCK)
    };
    cluster.hosts.iter().filter(differs).map(told).collect()
}

#[cfg(test)]
mod tests {
    use super::super::finding::State;
    use super::*;
    use crate::example::example;

    fn states(findings: &[Finding]) -> Vec<State> {
        findings.iter().map(|finding| finding.state).collect()
    }

    fn ring() -> Ring {
        let node = |id| RingNode { id, name: Some(format!("host{id}")) };
        Ring { ours: 1, has_provider: true, quorate: true, nodes: vec![node(1), node(2)], seen: vec![1, 2] }
    }

    /// Two hosts that are well.
    fn cluster() -> Cluster {
        let mut cluster = example().cluster.unwrap();
        cluster.hosts.truncate(2);
        cluster.stock.clear();
        cluster.hosts[1].clock_ahead_ms = Some(-700);
        cluster
    }

    #[test]
    fn a_corosync_that_does_not_serve_is_told_by_what_it_lacks() {
        let of = |ring: Result<Ring, NoRing>| corosync(&ring, None);
        assert_eq!(of(Ok(ring())).seen, "it runs: this is host1 (node 1)");
        for (why, command) in [
            (
                NoRing::NoLibrary("libcpg.so.4: cannot open".to_owned()),
                "apt-get install corosync || dnf install corosync",
            ),
            (NoRing::Failed("corosync does not run".to_owned()), "systemctl enable --now corosync"),
            (NoRing::Overdue, "systemctl restart corosync"),
        ] {
            let found = of(Err(why));
            assert_eq!((found.state, found.commands.as_slice()), (State::Wrong, &[command.to_owned()][..]));
        }
        let mut apart = cluster();
        apart.joined = false;
        assert!(corosync(&Ok(ring()), Some(&apart)).seen.contains("not to the daemon"));
        assert_eq!(corosync(&Ok(ring()), Some(&cluster())).state, State::Ok);
    }

    #[test]
    fn quorum_needs_votes_and_somebody_who_counts_them() {
        assert_eq!(quorum(&ring()).state, State::Ok);
        let without = quorum(&Ring { quorate: false, ..ring() });
        assert!(without.state == State::Wrong && without.commands == ["corosync-quorumtool -s"], "{without:?}");
        let uncounted = quorum(&Ring { quorate: false, has_provider: false, ..ring() });
        assert!(uncounted.remedy.as_ref().unwrap().contains("corosync_votequorum"), "{uncounted:?}");
    }

    #[test]
    fn the_node_list_is_held_against_what_corosync_sees() {
        assert_eq!(states(&nodes(&ring())), [State::Ok]);
        let lost = nodes(&Ring { seen: vec![1], ..ring() });
        assert!(states(&lost) == [State::Wrong] && lost[0].seen.contains("host2 (node 2)"), "{lost:?}");
        let stranger = nodes(&Ring { seen: vec![1, 2, 9], ..ring() });
        assert!(states(&stranger) == [State::Wrong] && stranger[0].seen.contains("node 9"), "{stranger:?}");
        let mut nameless = ring();
        nameless.nodes[1].name = None;
        assert_eq!(states(&nodes(&nameless)), [State::Warning]);
        assert_eq!(states(&nodes(&Ring { nodes: Vec::new(), ..ring() })), [State::Wrong]);
    }

    #[test]
    fn hosts_whose_daemons_differ_are_named_with_what_to_type() {
        let told = |change: fn(&mut Cluster)| {
            let mut cluster = cluster();
            change(&mut cluster);
            hosts(&cluster, "0.1.0", &["188a cbb0".to_owned()])
        };
        assert_eq!(states(&told(|_| {})), [State::Ok]);
        let absent = told(|cluster| cluster.hosts[1].present = false);
        assert!(absent[0].state == State::Wrong && absent[0].commands == ["ssh host2 systemctl start fence-daemon"]);
        let key = told(|cluster| (cluster.hosts[1].key_agrees, cluster.hosts[1].version) = (Some(false), None));
        assert!(states(&key) == [State::Wrong] && key[0].seen.contains("fingerprint is 188a cbb0"), "{key:?}");
        let old = told(|cluster| cluster.hosts[1].software = Some("0.0.9".to_owned()));
        assert!(states(&old) == [State::Warning] && old[0].seen.contains("version 0.0.9"), "{old:?}");
        let alien = told(|cluster| (cluster.hosts[1].version, cluster.hosts[1].key_agrees) = (Some(7), None));
        assert!(states(&alien) == [State::Wrong] && alien[0].seen.contains("version 7 of the messages"), "{alien:?}");
        let stock = told(|cluster| cluster.stock = vec!["node 2 process 9".to_owned()]);
        assert!(states(&stock) == [State::Wrong] && stock[0].commands[0].contains("fence_virtd"), "{stock:?}");
        // This host's own clock, key and version are other checks' business.
        assert_eq!(states(&told(|cluster| cluster.hosts[0].software = None)), [State::Ok]);
    }

    #[test]
    fn clocks_that_differ_by_more_than_a_second_are_told() {
        assert_eq!(clocks(&cluster()), []);
        let mut apart = cluster();
        apart.hosts[1].clock_ahead_ms = Some(-61_000);
        let told = clocks(&apart);
        assert!(states(&told) == [State::Warning] && told[0].seen.contains("host2 is 61.0 s behind"), "{told:?}");
    }

    #[test]
    fn without_fencing_of_hosts_a_dead_one_stays_in_doubt() {
        let lines = "power1\npower2\n2 fence devices found\n";
        assert_eq!(lines.lines().map(found).sum::<usize>(), 2);
        assert_eq!(("1 fence device found", "No fence devices found").0.lines().map(found).sum::<usize>(), 1);
        assert_eq!(found("No fence devices found"), 0);
        assert_eq!(fencing(&Ok(2)).state, State::Ok);
        assert_eq!(fencing(&Ok(0)).state, State::Warning);
        let none = fencing(&Err(Silence::Missing(STONITH_ADMIN.to_owned())));
        assert!(none.state == State::Warning && none.seen.contains("not installed"), "{none:?}");
        let silent = Silence::Overdue { program: STONITH_ADMIN.to_owned(), limit: BOUND };
        assert!(fencing(&Err(silent)).commands[0].contains("pacemaker"));
    }
}
