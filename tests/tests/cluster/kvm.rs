//! A cluster of two QEMU guests. Its nodes fence each other with the stock client, through the
//! daemon.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use fence_lab::cluster::shell::{ONLINE_LIMIT, Shell as _};
use fence_lab::lab::Hypervisor;
use fence_lab::libvirtd::Libvirtd;
use fence_lab::process::poll_until;
use fence_lab::qemu::URI;
use fence_lab::server::{Config, Server, Which};
use fence_lab::timings::Fence;
use fence_lab::witness::Witness;

use super::claims::Claims;
use super::guests::Guests;

const KEY: [u8; 4096] = [0x3c; 4096];
/// The surviving node, and the fenced one: see `guests`.
const ALPHA: usize = 0;
const BETA: usize = 1;

struct Cluster {
    guests: Guests,
    claims: Claims,
    server: Server,
    libvirtd: Libvirtd,
}

impl Cluster {
    fn new() -> Result<Self> {
        let hypervisor = Hypervisor::new()?;
        let libvirtd = Libvirtd::start(&hypervisor)?;
        let mut config = Config::new(&hypervisor.write("fence.key", &KEY)?);
        config.uris = vec![URI.to_owned()];
        let server = Server::start(&hypervisor, &Which::ours()?, &config)?;
        let guests = Guests::boot(&libvirtd, &KEY)?;
        let claims = guests.watch()?;
        guests.wait_online()?;
        let begun = claims.wait(BETA, None);
        begun.with_context(|| guests.logs())?;
        Ok(Self { guests, claims, server, libvirtd })
    }

    /// Waits until alpha has fenced beta and runs the resource. The failure began at `since`, with
    /// the server's log at `position`.
    fn sees_beta_fenced(&self, since: Instant, position: usize, machines: &[Witness; 2]) -> Result<()> {
        poll_until("beta to be fenced", ONLINE_LIMIT, || {
            self.claims.check()?;
            Ok(machines[BETA].is_dead()?.then_some(()))
        })?;
        let dead = since.elapsed();
        // The watcher checks that beta was dead before.
        let taken_over = self.claims.wait(ALPHA, Some(since))?.duration_since(since);
        ensure!(!machines[ALPHA].is_dead()?, "alpha was fenced as well");
        let orders = self.orders(position);
        let [alpha, beta] = [ALPHA, BETA].map(|number| self.guests.nodes[number].member());
        let source = alpha.address.to_string();
        let expected = [(Some("reboot"), Some(beta.domain.as_str()), Some(source.as_str()))];
        let told: Vec<_> =
            orders.iter().map(|order| (order.get("op"), order.get("domain"), order.get("source"))).collect();
        ensure!(told == expected, "{orders:?}");
        eprintln!("beta dead after {dead:.1?}, its resource on alpha after {taken_over:.1?}");
        Ok(())
    }

    /// The events, for an error message.
    fn story(&self, what: &str) -> String {
        format!("{what}\nthe server: {}\n{}", self.server.log(), self.guests.logs())
    }

    /// Successful requests to kill since `position`.
    fn orders(&self, position: usize) -> Vec<Fence> {
        let log = self.server.log();
        let fences = log.lines().skip(position).filter_map(Fence::parse);
        fences
            .filter(|fence| matches!(fence.get("op"), Some("off" | "reboot")) && fence.get("reply") == Some("success"))
            .collect()
    }

    fn machines(&self) -> Result<[Witness; 2]> {
        Ok([self.guests.nodes[ALPHA].machine()?, self.guests.nodes[BETA].machine()?])
    }
}

#[test]
fn guests_fence_each_other() -> Result<()> {
    let cluster = Cluster::new()?;
    let beta = &cluster.guests.nodes[BETA];

    // Corosync is stopped: the node is silent, and still runs its resource.
    let (machines, position, since) = (cluster.machines()?, cluster.server.log_position(), Instant::now());
    beta.must("kill -STOP $(pidof corosync)")?;
    cluster.sees_beta_fenced(since, position, &machines).with_context(|| cluster.story("frozen"))?;
    // The node starts again, joins, and gets its resource back.
    beta.wait_up()?;
    cluster.guests.wait_online()?;
    cluster.claims.wait(BETA, Some(since)).with_context(|| cluster.story("back"))?;
    eprintln!("beta is back after {:.1?}", since.elapsed());

    // A split-brain: each node tries to fence the other, and one survives.
    let (machines, position, since) = (cluster.machines()?, cluster.server.log_position(), Instant::now());
    cluster.guests.part(&cluster.libvirtd)?;
    cluster.sees_beta_fenced(since, position, &machines).with_context(|| cluster.story("a race"))?;
    ensure!(!machines[ALPHA].is_dead()?, "nobody survives");
    cluster.claims.check()
}
