//! The proof that a host is dead, from a real Pacemaker: its fencing history.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use fence_lab::cluster::lab::Cluster;
use fence_lab::cluster::node::Node;
use fence_lab::cluster::shell::Shell as _;
use fence_lab::process::poll_until;
use fence_lab::server::Which;

/// Where the node has the daemon's part that asks.
const PROGRAM: &str = "/usr/local/sbin/fence-daemon-group";
const START: &str =
    "mkfifo /run/commands && { nohup fence-daemon-group /run/commands > /run/said 2> /run/logged < /dev/null & }";
/// How long an answer may take on a loaded machine.
const LIMIT: Duration = Duration::from_secs(60);

/// Whether the cluster's node `name` is proven dead, if it was last heard so many seconds ago.
fn fenced(node: &Node, name: &str, seconds: u64) -> Result<String> {
    let answers = || -> Result<Vec<String>> {
        let said = node.must("cat /run/said")?;
        Ok(said.lines().filter(|line| line.starts_with("fenced")).map(str::to_owned).collect())
    };
    let before = answers()?.len();
    node.must(&format!("echo 'fenced {name} {seconds}' > /run/commands"))?;
    poll_until("an answer", LIMIT, || Ok(answers()?.get(before).cloned()))
}

#[test]
fn pacemakers_history_proves_that_a_host_was_fenced() -> Result<()> {
    let Which::Ours(daemon) = Which::ours()? else { anyhow::bail!("no daemon of ours") };
    let program = daemon.with_file_name("fence-daemon-group");
    let program =
        std::fs::read(&program).with_context(|| format!("{}: run `cargo xtask test cluster`", program.display()))?;
    let cluster = Cluster::start(&Which::ours()?)?;
    let node = cluster.node(0)?;
    node.write(PROGRAM, &program, 0o755)?;
    node.must(START)?;
    // The node's own corosync takes it into the group.
    poll_until("the join", LIMIT, || Ok(node.must("cat /run/said")?.contains("joined 1:").then_some(())))?;
    ensure!(fenced(node, "beta", 3600)? == "fenced: no proof");

    node.must("stonith_admin --reboot beta --timeout 60")?;
    let history = node.must("stonith_admin --history '*' --verbose --output-as=xml")?;
    let proof = fenced(node, "beta", 600)?;
    ensure!(proof.starts_with("fenced Reboot "), "{proof}: {history}");
    // It was heard after that, or is another node.
    ensure!(fenced(node, "beta", 0)? == "fenced: no proof", "{history}");
    for other in ["alpha", "bet", "web-two"] {
        ensure!(fenced(node, other, 600)? == "fenced: no proof", "{other}: {history}");
    }
    cluster.wait_online()?;
    node.must("stonith_admin --fence beta --timeout 60")?;
    let proof = fenced(node, "beta", 600)?;
    let history = node.must("stonith_admin --history '*' --verbose --output-as=xml")?;
    ensure!(proof.starts_with("fenced Off "), "{proof}: {history}");

    // Pacemaker stops: nothing is proven.
    node.must("systemctl stop pacemaker")?;
    let proof = fenced(node, "beta", 600)?;
    ensure!(proof.starts_with("fenced: stonith_admin --history failed"), "{proof}");
    Ok(())
}
