//! Commands on a cluster's nodes, be they containers or QEMU guests.

use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::lab::COMMAND_LIMIT;
use crate::process::{Finished, poll_until};

use super::corosync::{Member, host_map};

/// How long a cluster may take to form, or to take a node back, on a loaded machine.
pub const ONLINE_LIMIT: Duration = Duration::from_secs(120);

/// A node that commands can be run on.
pub trait Shell {
    /// Its names.
    fn member(&self) -> &Member;

    /// Runs a command line to its end; an exit code other than 0 is no error.
    fn run(&self, script: &str, limit: Duration) -> Result<Finished>;

    /// What a command line prints on standard output; an exit code other than 0 is an error.
    fn must(&self, script: &str) -> Result<String> {
        let done = self.run(script, COMMAND_LIMIT)?;
        Ok(done.success().with_context(|| format!("on {}: {script}", self.member().name))?.stdout)
    }
}

/// What Pacemaker knows, as `crm_mon` prints it.
pub fn status(node: &dyn Shell) -> Result<String> {
    node.must("crm_mon -1")
}

/// The nodes that are online in crm_mon's words.
#[must_use]
pub fn online(status: &str) -> Vec<&str> {
    let line = status.lines().find_map(|line| line.split_once("Online: [")?.1.split_once(']'));
    line.map(|(names, _)| names.split_whitespace().collect()).unwrap_or_default()
}

/// Where a resource runs, in crm_mon's words.
#[must_use]
pub fn runs_on<'a>(status: &'a str, resource: &str) -> Option<&'a str> {
    let of_resource = |line: &&str| line.split_whitespace().any(|word| word == resource);
    let line = status.lines().filter(of_resource).find_map(|line| line.split_once("Started "));
    line.and_then(|(_, node)| node.split_whitespace().next())
}

/// Waits until `node` says that all of these are online.
///
/// # Errors
/// They are not in time; the error has what it says instead.
pub fn wait_online(node: &dyn Shell, names: &[&str]) -> Result<()> {
    let mut last = String::new();
    let waited = poll_until(&format!("{names:?} to be online"), ONLINE_LIMIT, || {
        // Until Pacemaker runs, crm_mon fails.
        last = status(node).unwrap_or_else(|error| format!("{error:#}"));
        let online = online(&last);
        if names.iter().all(|name| online.contains(name)) {
            return Ok(Some(()));
        }
        std::thread::sleep(Duration::from_millis(200));
        Ok(None)
    });
    waited.with_context(|| format!("{} says: {last}", node.member().name))
}

/// Waits until the resource runs somewhere: the node's name.
///
/// # Errors
/// It does not in time.
pub fn wait_started(node: &dyn Shell, resource: &str) -> Result<String> {
    let mut last = String::new();
    let waited = poll_until(&format!("{resource} to run"), ONLINE_LIMIT, || {
        last = status(node).unwrap_or_else(|error| format!("{error:#}"));
        let found = runs_on(&last, resource).map(str::to_owned);
        if found.is_none() {
            std::thread::sleep(Duration::from_millis(200));
        }
        Ok(found)
    });
    waited.with_context(|| format!("{} says: {last}", node.member().name))
}

/// Waits until the cluster has nothing left to do.
pub fn settle(node: &dyn Shell) -> Result<()> {
    node.must("crm_resource --wait --timeout=60s").map(drop)
}

/// Configures the cluster as the guides do: the fence device is the stock client's agent, and the
/// resource must never run twice.
pub fn configure(node: &dyn Shell, members: &[Member], device: &str) -> Result<()> {
    let text = format!(
        "property stonith-enabled=true cluster-recheck-interval=60s\n\
         rsc_defaults resource-stickiness=100\n\
         primitive fence stonith:fence_xvm params pcmk_host_map=\"{}\" {device} op monitor interval=300s\n\
         primitive solo ocf:lab:solo op monitor interval=1s timeout=20s on-fail=fence\n",
        host_map(members)
    );
    if text.contains('\'') {
        bail!("a quote in the cluster's configuration: {text}");
    }
    node.must(&format!("printf '%s' '{text}' | crm -F configure load update -")).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATUS: &str = "Cluster Summary:\n  * Stack: corosync\nNode List:\n  * Node beta: UNCLEAN (offline)\n  * Online: [ alpha ]\n\n\
                          Active Resources:\n  * fence\t(stonith:fence_xvm):\t Started alpha\n  * solo\t(ocf:lab:solo):\t Started beta (UNCLEAN)\n";

    #[test]
    fn crm_mon_is_read() {
        assert_eq!(online(STATUS), ["alpha"]);
        assert_eq!(runs_on(STATUS, "solo"), Some("beta"));
        assert_eq!(runs_on(STATUS, "other"), None);
        assert!(online("").is_empty());
    }
}
