//! A Pacemaker cluster that fences by tcp alone, with the device of `docs/guide/ways-in.md`.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fence_lab::cluster::lab::{Cluster, SERVICE};
use fence_lab::cluster::shell::{self, Shell as _};
use fence_lab::guide::Guide;
use fence_lab::guide::stage::Stage;
use fence_lab::lab::HYPERVISOR_V4;
use fence_lab::process::poll_until;
use fence_lab::server::Which;
use fence_lab::timings::Fence;

use crate::guides::{CLUSTER_NODE, WAYS_IN};

/// How long a fence and what follows may take on a loaded machine.
const LIMIT: Duration = Duration::from_secs(120);

/// Successful reboots since this position of the server's log.
fn reboots(cluster: &Cluster, position: usize) -> Vec<Fence> {
    let log = cluster.server.log();
    let fences = log.lines().skip(position).filter_map(Fence::parse);
    fences.filter(|fence| fence.get("op") == Some("reboot") && fence.get("reply") == Some("success")).collect()
}

/// Checks that one node had this domain killed, and by tcp.
fn asked_by_tcp(cluster: &Cluster, position: usize, domain: &str, source: &str) -> Result<()> {
    let told = reboots(cluster, position);
    let expected = [(Some(domain), Some("tcp"), Some(source))];
    let seen: Vec<_> = told.iter().map(|fence| (fence.get("domain"), fence.get("via"), fence.get("source"))).collect();
    ensure!(seen == expected, "{seen:?} instead of {expected:?}: {}", cluster.server.log());
    Ok(())
}

#[test]
fn pacemaker_fences_by_tcp() -> Result<()> {
    let which = Which::ours()?;
    let mut cluster = Cluster::start(&which)?;
    cluster.config.tcp = Some(vec![("address", HYPERVISOR_V4.to_string())]);
    cluster.reconfigure_server(&which, &[])?;
    let alpha = cluster.node(0)?.clone();
    alpha
        .must("crm -F configure delete --force fence || { crm resource stop fence; crm -F configure delete fence; }")?;

    let mut stage = Stage::default();
    stage.add_container(CLUSTER_NODE, &cluster.hypervisor, &alpha.member().domain);
    let guide = Guide::read(WAYS_IN, &crate::guides::PLACES)?;
    let (position, beta) = (cluster.server.log_position(), cluster.node(1)?.clone());
    let machine = beta.witness()?;
    let typed = guide.steps.iter().filter(|step| step.host == CLUSTER_NODE);
    ensure!(typed.clone().count() > 0, "{WAYS_IN} has nothing for {CLUSTER_NODE}");
    for step in typed {
        stage.step(step).with_context(|| format!("the server: {}", cluster.server.log()))?;
    }
    // The page has the second node fenced by hand.
    ensure!(machine.is_dead()?, "the cluster received that beta is dead, and it lives");
    asked_by_tcp(&cluster, position, &beta.member().domain, &alpha.member().address.to_string())?;
    cluster.wait_online()?;

    // And the cluster fences a node that has failed.
    shell::wait_started(&alpha, "fence_host1")?;
    shell::settle(&alpha)?;
    let active = cluster.number(&shell::wait_started(&alpha, SERVICE)?)?;
    let (victim, survivor) = (cluster.node(active)?, cluster.node(1 - active)?);
    let (position, machine) = (cluster.server.log_position(), victim.witness()?);
    victim.signal("STOP", "corosync")?;
    poll_until("the service on the other node", LIMIT, || {
        let status = shell::status(survivor)?;
        Ok((shell::runs_on(&status, SERVICE) == Some(survivor.member().name.as_str())).then_some(()))
    })
    .with_context(|| format!("the server: {}", cluster.server.log()))?;
    ensure!(machine.is_dead()?, "the service went to the other node while the first one lived");
    asked_by_tcp(&cluster, position, &victim.member().domain, &survivor.member().address.to_string())?;
    cluster.wait_online()
}
