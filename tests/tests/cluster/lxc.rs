//! A cluster of libvirt containers.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use fence_lab::cluster::corosync::{KEY_PATH, plain};
use fence_lab::cluster::image::Image;
use fence_lab::cluster::lab::{Cluster, KEY, members};
use fence_lab::cluster::node::{BOOT_LIMIT, Node};
use fence_lab::cluster::scenario::{Scenario, play};
use fence_lab::cluster::shell::Shell as _;
use fence_lab::container::URI;
use fence_lab::lab::Hypervisor;
use fence_lab::libvirtd::Libvirtd;
use fence_lab::process::poll_until;
use fence_lab::server::{Config, Server, Which};
use fence_lab::tools;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// The number of fence races in one test.
const DUELS: usize = 8;
/// The file where a node writes its result.
const SHOT: &str = "/var/tmp/shot";

#[test]
fn a_node_is_a_small_debian_of_its_own() -> Result<()> {
    Image::get()?;
    let hypervisor = Hypervisor::new()?;
    let libvirtd = Libvirtd::start(&hypervisor)?;
    let members = members();
    let node = Node::define(&libvirtd, &members[0], &plain(&members, &members[0], &KEY))?;
    node.start(&libvirtd)?;
    node.wait_up()?;
    // systemd sees itself at the root of every hierarchy, and no other container's processes in its
    // slices.
    let groups = node.must("cat /proc/1/cgroup")?;
    ensure!(groups.lines().all(|line| line.ends_with(":/") || line.ends_with(":/init.scope")), "{groups}");
    // Pacemaker must not be able to reboot the host when its node fails.
    node.must("test ! -e /proc/sysrq-trigger || test $(stat -c %t:%T /proc/sysrq-trigger) = 1:3")
        .context("the node reaches the host's sysrq")?;
    ensure!(node.must("hostname")?.trim() == "alpha");
    ensure!(node.must("ip -o -4 addr show dev eth0")?.contains("192.168.122.31/24"));
    let before = node.witness()?;
    node.must("echo kept > /etc/kept; systemctl start --no-block poweroff.target; true")?;
    ensure!(before.dies_within(BOOT_LIMIT)?, "poweroff does not end the container");
    libvirtd.wait_state(URI, &members[0].domain, "shut off")?;
    // The node's files outlast a restart, except for those that belong to one boot.
    node.start(&libvirtd)?;
    node.wait_up()?;
    ensure!(node.must("cat /etc/kept")? == "kept\n");
    Ok(())
}

/// Each scenario uses the cluster that the previous one has left, which must be in order again.
fn play_all(scenarios: &[Scenario]) -> Result<()> {
    let mut cluster = Cluster::start(&Which::from_env()?)?;
    for &scenario in scenarios {
        let timeline = play(&mut cluster, scenario)?;
        eprintln!("{}: {timeline}", scenario.title());
    }
    Ok(())
}

#[test]
fn a_node_that_fails_is_dead_before_its_service_starts_elsewhere() -> Result<()> {
    play_all(&[Scenario::Frozen, Scenario::Killed, Scenario::Unplugged])
}

#[test]
fn a_failed_service_and_an_administrator_have_a_node_fenced() -> Result<()> {
    play_all(&[Scenario::Unhealthy, Scenario::Reboot, Scenario::OffAndOn, Scenario::Pcs])
}

#[test]
fn troubles_of_the_hypervisor_and_of_both_nodes_at_once_are_survived() -> Result<()> {
    play_all(&[Scenario::Hung, Scenario::Absent, Scenario::Restarted, Scenario::DelayedRace, Scenario::FenceRace])
}

/// Closer together than two Pacemakers ever get: both clients wait for the same moment.
#[test]
fn one_of_two_nodes_survives_a_simultaneous_fence_race() -> Result<()> {
    Image::get()?;
    let hypervisor = Hypervisor::new()?;
    let libvirtd = Libvirtd::start(&hypervisor)?;
    let mut config = Config::new(&hypervisor.write("fence.key", &KEY)?);
    config.uris = vec![URI.to_owned()];
    let members = members();
    let start = |me| {
        let node = Node::define(&libvirtd, me, &plain(&members, me, &KEY))?;
        node.start(&libvirtd)?;
        Ok(node)
    };
    let nodes = members.iter().map(start).collect::<Result<Vec<_>>>()?;
    let server = Server::start(&hypervisor, &Which::ours()?, &config)?;
    let mut refused = 0;
    for round in 0..DUELS {
        nodes.iter().try_for_each(Node::wait_up)?;
        let position = server.log_position();
        let lives = [nodes[0].witness()?, nodes[1].witness()?];
        let moment = (SystemTime::now() + Duration::from_millis(500)).duration_since(UNIX_EPOCH)?.as_nanos();
        for number in [0, 1] {
            let (node, domain) = (&nodes[number], &members[1 - number].domain);
            let wait = format!("while [ $(date +%s%N) -lt {moment} ]; do :; done");
            // A child of the container itself: otherwise the container could not die before its
            // parent has reaped it.
            let shoot = format!("{wait}; fence_xvm -k {KEY_PATH} -H {domain} -o reboot; echo $? > {SHOT}");
            node.must(&format!("rm -f {SHOT}; ({shoot}) > /dev/null 2>&1 &"))?;
        }
        let dead = poll_until("a death", BOOT_LIMIT, || {
            let dead = [lives[0].is_dead()?, lives[1].is_dead()?];
            Ok(dead.contains(&true).then_some(dead))
        });
        let dead = dead.with_context(|| server.log())?;
        let victim = usize::from(dead[1]);
        let both = lives[1 - victim].dies_within(Duration::from_millis(200))?;
        let log: Vec<_> = server.log().lines().skip(position).map(str::to_owned).collect();
        ensure!(!both, "round {round}: both are dead: {log:#?}");
        let told = poll_until("the reply to the survivor", BOOT_LIMIT, || {
            let told = std::fs::read_to_string(nodes[1 - victim].outside(SHOT)).unwrap_or_default();
            Ok(told.strip_suffix('\n').map(str::to_owned))
        })?;
        ensure!(told == "0", "round {round}: the survivor: {told}: {log:#?}");
        refused += usize::from(log.iter().any(|line| line.contains("is being fenced itself")));
    }
    ensure!(refused > 0, "no fence race occurred");
    Ok(())
}

/// Killed and waited for when it is dropped, which ends its lab.
struct Started(Child);

impl Drop for Started {
    fn drop(&mut self) {
        // An error means that the process has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs the commands that `cargo xtask lab cluster` prints.
#[test]
fn a_cluster_to_play_with_is_entered_as_it_says_and_removed_by_an_interrupt() -> Result<()> {
    let Which::Ours(daemon) = Which::ours()? else { bail!("not ours") };
    let program = tools::target_directory().join("debug/fence-cluster");
    ensure!(program.is_file(), "no {}: run this by `cargo xtask test cluster`", program.display());
    let mut lab = Command::new(program);
    lab.arg("--daemon").arg(daemon).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut lab = Started(lab.spawn()?);
    let mut lines = BufReader::new(lab.0.stdout.take().context("no pipe")?).lines();
    let mut until = |part: &str| -> Result<String> {
        for line in lines.by_ref() {
            let line = line?;
            if line.contains(part) {
                return Ok(line);
            }
        }
        bail!("the lab ended without printing `{part}`")
    };
    until("a shell on beta")?;
    let enter = until("nsenter")?;
    until("What happens")?;
    let shell = |script: &str| -> Result<String> {
        let done =
            Command::new("sh").args(["-c", &enter.replace("bash -l", &format!("sh -c \"{script}\""))]).output()?;
        ensure!(done.status.success(), "{enter}: {}", String::from_utf8_lossy(&done.stderr));
        Ok(String::from_utf8_lossy(&done.stdout).trim().to_owned())
    };
    ensure!(shell("hostname")? == "beta");
    shell("crm_mon -1 > /dev/null; pkill -STOP corosync; true")?;
    until("alpha asks for reboot of web-two")?;
    until("beta is dead")?;
    until("beta boots")?;
    kill(Pid::from_raw(i32::try_from(lab.0.id())?), Signal::SIGINT)?;
    until("is being removed")?;
    ensure!(lab.0.wait()?.success(), "the lab ends with an error");
    Ok(())
}
