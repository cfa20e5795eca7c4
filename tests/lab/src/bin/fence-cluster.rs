//! A cluster to play with. `cargo xtask lab cluster` runs it.
//!
//! Two containers with corosync and Pacemaker, fenced by the daemon. The program says how to enter
//! and what to break, and reports events until Ctrl-C.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, bail};
use clap::Parser;
use fence_lab::cluster::lab::{Cluster, SERVICE};
use fence_lab::cluster::shell::{self, Shell as _};
use fence_lab::cluster::watch::{Event, Seen, Watch};
use fence_lab::interrupt::Interrupt;
use fence_lab::lab::{BRIDGE, HYPERVISOR_V4};
use fence_lab::program::{self, say};
use fence_lab::server::Which;
use fence_lab::timings::Fence;
use fence_lab::tools;

/// A cluster of two containers on this machine, and the daemon that fences them.
#[derive(Parser)]
#[command(about)]
struct Arguments {
    /// The daemon to run [default: $FENCE_DAEMON_BIN, or the one built in this workspace]
    #[arg(long, value_name = "PATH")]
    daemon: Option<PathBuf>,
    /// Run Debian's fence_virtd instead, for comparison
    #[arg(long, conflicts_with = "daemon")]
    stock: bool,
    /// Show that it comes up, and exit
    #[arg(long)]
    once: bool,
}

fn main() -> ExitCode {
    program::exit("fence-cluster", run(&Arguments::parse()).map(|()| true))
}

fn run(arguments: &Arguments) -> Result<()> {
    let interrupt = Interrupt::watch()?;
    let which = Which::chosen(arguments.daemon.as_deref(), arguments.stock)?;
    tools::require(&["libvirtd", "virsh", "ip", "tini", "mmdebstrap"])?;
    say(&format!("making a cluster of two containers, fenced by {}: ten seconds ...", which.name()));
    let mut cluster = Cluster::start(&which)?;
    say(&shell::status(cluster.node(0)?)?);
    if arguments.once {
        return Ok(());
    }
    interrupt.rest();
    say(&instructions(&cluster)?);
    let watch = Watch::start(&cluster.nodes)?;
    follow(&mut cluster, &watch, &interrupt)?;
    say("\nthe cluster is being removed");
    Ok(())
}

fn instructions(cluster: &Cluster) -> Result<String> {
    let nodes: Vec<_> = cluster.nodes.iter().map(|node| node.member()).collect();
    let [first, second] = nodes.as_slice() else { bail!("a cluster of two has {} nodes", nodes.len()) };
    let holder = cluster.hypervisor.holder();
    let hypervisor = format!("nsenter --target {holder} --all");
    let (first, second, domain) = (&first.name, &second.name, &first.domain);
    let enter = |number: usize| -> Result<String> {
        let pid_file = format!("/run/libvirt/lxc/{}.pid", cluster.node(number)?.member().domain);
        // By the hypervisor's numbers, which hold for the instance of the moment.
        Ok(format!("{hypervisor} sh -c 'exec nsenter --target $(pgrep -P $(cat {pid_file})) --all bash -l'"))
    };
    Ok(format!(
        "The cluster stays up until Ctrl-C. As root, from another terminal:

  a shell on {first}
    {}
  a shell on {second}
    {}
  a shell on the hypervisor ({HYPERVISOR_V4}, bridge {BRIDGE}; virsh -c lxc:/// list)
    {hypervisor} bash

On a node: crm_mon, pcs status, crm configure show. To have one fenced, on the node that runs {SERVICE}:

    pkill -STOP corosync            the node hangs
    pkill -KILL corosync            the cluster's software dies
    ip link set eth0 down           the network fails
    kill -KILL $(cat /run/solo.pid) the service dies, and its monitor has on-fail=fence
or on the other one:
    stonith_admin --reboot {first}
    pcs stonith fence {second}
    fence_xvm -o off -H {domain}    past the cluster, which will want to fence it all the same

What happens:
",
        enter(0)?,
        enter(1)?,
    ))
}

/// Reports events, with the time since the last quiet moment.
fn follow(cluster: &mut Cluster, watch: &Watch, interrupt: &Interrupt) -> Result<()> {
    const QUIET: Duration = Duration::from_secs(10);
    let (mut told, mut logged) = (0, cluster.server.log_position());
    let (mut begun, mut last) = (None::<Duration>, Duration::ZERO);
    while !interrupt.came() {
        if !cluster.server.is_running()? {
            bail!("the server has ended by itself: {}", cluster.server.log());
        }
        std::thread::sleep(Duration::from_millis(50));
        let seen = watch.seen();
        for (number, Seen { at, event }) in seen.iter().enumerate().skip(told) {
            // Each of Pacemaker's daemons says the same.
            let repeated = seen[..number]
                .iter()
                .rev()
                .take_while(|one| *at - one.at < Duration::from_secs(2))
                .any(|one| one.event == *event);
            let Some(line) = in_words(cluster, event).filter(|_| !repeated) else { continue };
            if *at > last + QUIET {
                begun = None;
                say("");
            }
            last = *at;
            let since = *at - *begun.get_or_insert(*at);
            say(&format!("{:>8.3} s  {line}", since.as_secs_f64()));
        }
        told = seen.len();
        if let Some(fence) =
            cluster.server.wait_log(logged, Duration::ZERO, |line| Fence::parse(line).map(|_| line.to_owned()))
        {
            say(&format!("            {fence}"));
        }
        logged = cluster.server.log_position();
    }
    Ok(())
}

fn in_words(cluster: &Cluster, event: &Event) -> Option<String> {
    let name = |node: &usize| cluster.node(*node).map_or("?", |node| node.member().name.as_str());
    Some(match event {
        Event::Noticed(node) => format!("{} notices that something is wrong", name(node)),
        Event::Returned(node) => format!("{} sees a node join", name(node)),
        Event::Asked { by, op, domain } if op.names_a_domain() => {
            format!("{} asks for {} of {domain}", name(by), op.name())
        }
        Event::Asked { .. } => return None,
        Event::Replied { to, byte } => format!("{} is answered: {byte}", name(to)),
        Event::Died(node) => format!("{} is dead", name(node)),
        Event::Born(node) => format!("{} boots", name(node)),
        Event::Started(node) => format!("{SERVICE} runs on {}", name(node)),
        Event::Stopped(node) => format!("{SERVICE} was stopped on {}", name(node)),
        Event::Breach(breach) => format!("BREACH: {breach}"),
    })
}
