//! The plugin, configured by crmsh and run by Pacemaker.

use anyhow::{Context, Result, ensure};
use fence_lab::cluster::lab::{Cluster, SERVICE};
use fence_lab::cluster::shell::{self, Shell as _};
use fence_lab::process::poll_until;
use fence_lab::server::Which;

use super::{LIMIT, plugin};

#[test]
fn pacemaker_fences_by_the_plugin_as_crmsh_configures_it() -> Result<()> {
    let cluster = Cluster::start(&Which::ours()?)?;
    let plugin = plugin()?;
    for node in &cluster.nodes {
        node.write(plugin.path, &plugin.content, plugin.mode)?;
    }
    let runner = cluster.wait_ready()?;
    let survivor = cluster.node(1 - runner)?;
    let victim = cluster.node(runner)?;
    let names = [victim.member(), survivor.member()].map(|member| (member.name.clone(), member.domain.clone()));

    let about = survivor.must("crm ra info stonith:external/fence-xdp")?;
    ensure!(about.contains("hostlist* (string)") && about.contains("key_file (string"), "{about}");
    // One device for each node, banned from that node. Parameters of external/libvirt stay
    // unchanged.
    survivor
        .must("crm -F configure delete --force fence || { crm resource stop fence; crm -F configure delete fence; }")?;
    for (name, domain) in &names {
        survivor.must(&format!(
            "crm configure primitive p_fence_{name} stonith:external/fence-xdp \
             params hostlist={name}:{domain} hypervisor_uri=lxc+tcp://192.168.122.1/ op monitor interval=60 && \
             crm configure location l_fence_{name} p_fence_{name} -inf: {name}"
        ))?;
    }
    for (name, _) in &names {
        shell::wait_started(survivor, &format!("p_fence_{name}"))?;
    }

    let (name, domain) = &names[0];
    let witness = victim.witness()?;
    let position = cluster.server.log_position();
    victim.signal("STOP", "corosync")?;
    let line = cluster.server.wait_log(position, LIMIT, |line| {
        (line.contains(&format!("domain={domain}")) && line.contains("op=reboot")).then(|| line.to_owned())
    });
    let line = line.with_context(|| format!("no node was fenced: {}", cluster.server.log()))?;
    ensure!(line.contains("reply=success") && witness.is_dead()?, "{line}");
    poll_until("Pacemaker to know of it", LIMIT, || {
        let history = survivor.must(&format!("stonith_admin --history={name}"))?;
        Ok(history.contains(&format!("reboot of {name} successful")).then_some(()))
    })?;
    // The plugin has written to the node's log.
    let told = format!("notice: {name} (domain {domain}) was powered off and is started again");
    poll_until("the plugin's line in the log", LIMIT, || {
        let log = survivor.must(
            "journalctl --no-pager --identifier='external/fence-xdp' || journalctl --no-pager | grep fence-xdp",
        )?;
        Ok(log.contains(&told).then_some(()))
    })?;
    poll_until("the service on the other node", LIMIT, || {
        let status = shell::status(survivor)?;
        Ok((shell::runs_on(&status, SERVICE) == Some(names[1].0.as_str())).then_some(()))
    })?;
    // The hypervisor has started the node again.
    cluster.wait_online()
}
