//! The cluster in the report: its hosts, and what is wrong with them.

use fence_common::domain_state;
use fence_control::report::{Cluster, ClusterDomain, ClusterHost};

use crate::clock::Moment;
use crate::hosts::view::{HostView, View};

/// The cluster as this host sees it at `now`.
pub(super) fn cluster(view: &View, now: Moment) -> Cluster {
    let ours = view.ours.map(|ours| ours.node);
    let ago = |moment| u64::try_from(now.since(moment).as_millis()).unwrap_or(u64::MAX);
    let host = |host: &HostView| ClusterHost {
        node: host.node,
        name: host.name.clone(),
        ours: ours == Some(host.node),
        present: host.present,
        last_heard_ms: host.heard.map(ago),
        version: host.version,
        key_agrees: host.key_agrees,
        domains: host.domains.len().try_into().unwrap_or(u64::MAX),
        domain_list: host
            .domains
            .iter()
            .map(|domain| ClusterDomain {
                name: domain.name.clone(),
                uuid: domain.uuid.to_string(),
                state: domain_state::name(domain.state).to_owned(),
                runs: domain.runs(),
            })
            .collect(),
        software: host.software.map(|software| software.to_string()),
        clock_ahead_ms: host.clock_ahead_ms,
        fenced_ms: host.fenced.map(ago),
    };
    Cluster {
        joined: ours.is_some(),
        quorate: view.quorate,
        status: status(view),
        hosts: view.hosts.iter().map(host).collect(),
        stock: view.stock.iter().map(ToString::to_string).collect(),
    }
}

fn status(view: &View) -> String {
    if view.ours.is_none() {
        return view
            .lost
            .as_ref()
            .map_or_else(|| "not connected yet".to_owned(), |why| format!("not connected: {why}"));
    }
    let present = view.hosts.iter().filter(|host| host.present).count();
    let quorum = if view.quorate { "quorate" } else { "without quorum" };
    format!("{present} of {} hosts present, {quorum}", view.hosts.len())
}

/// What is wrong, each with its remedy.
pub(super) fn problems(view: &View) -> Vec<String> {
    let mut problems = Vec::new();
    if view.ours.is_none() {
        let why = view.lost.as_deref().unwrap_or("not connected yet");
        problems.push(format!(
            "corosync is not connected ({why}): only what runs on this host can be fenced; see whether `systemctl status corosync` is well"
        ));
        return problems;
    }
    if view.hosts.is_empty() {
        problems.push(
            "corosync's node list names no host, so every question fails: write a `nodelist` into corosync.conf"
                .to_owned(),
        );
    }
    if !view.quorate {
        problems.push("this host has no quorum, and nothing is fenced: see `corosync-quorumtool`".to_owned());
    }
    for host in &view.hosts {
        let name = host.name.clone().unwrap_or_else(|| format!("node {}", host.node));
        let name = name.escape_debug();
        if !host.present {
            problems.push(format!(
                "the daemon of {name} is not in the group: what may run there is not called off; start fence-daemon there, or have \
                 Pacemaker fence that host"
            ));
        }
        if host.key_agrees == Some(false) {
            problems.push(format!("the key of {name} differs from ours: copy one key file to all hosts, and reload"));
        }
    }
    for stock in &view.stock {
        problems.push(format!(
            "fence_virtd answers in this cluster, too ({stock}), and calls machines off that run: stop it on every host"
        ));
    }
    problems
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hosts::transport::Member;

    fn host(node: u32, present: bool, key_agrees: Option<bool>) -> HostView {
        HostView { node, name: Some(format!("host{node}")), present, key_agrees, ..HostView::default() }
    }

    #[test]
    fn each_problem_of_a_cluster_is_named_and_a_well_one_has_none() {
        let ours = Some(Member { node: 1, pid: 7 });
        let hosts = vec![host(1, true, Some(true)), host(2, true, Some(true))];
        let well = View { ours, quorate: true, hosts, ..View::default() };
        assert_eq!(problems(&well), Vec::<String>::new());
        let shown = cluster(&well, Moment::now());
        assert_eq!(shown.status, "2 of 2 hosts present, quorate");
        assert_eq!(shown.hosts.iter().map(|host| host.ours).collect::<Vec<_>>(), [true, false]);
        let lost = View { lost: Some("no such library".to_owned()), ..View::default() };
        assert_eq!(cluster(&lost, Moment::now()).status, "not connected: no such library");
        let hosts = vec![host(1, true, Some(true)), host(2, false, Some(false))];
        for (view, said) in [
            (lost, &["no such library"][..]),
            (View { hosts: Vec::new(), ..well.clone() }, &["nodelist"]),
            (View { quorate: false, ..well.clone() }, &["no quorum"]),
            (View { hosts, ..well.clone() }, &["daemon of host2", "key of host2"]),
            (View { stock: vec![Member { node: 2, pid: 9 }], ..well }, &["node 2 process 9"]),
        ] {
            let problems = problems(&view);
            let all_said = problems.iter().zip(said).all(|(problem, said)| problem.contains(said));
            assert!(problems.len() == said.len() && all_said, "{problems:?} for {said:?}");
        }
    }
}
