//! Orphaned processes: a domain's processes that live although libvirt no longer speaks of them.

use std::sync::Arc;

use tokio::time::timeout_at;

use crate::hypervisor::deadline::Deadline;
use crate::hypervisor::known::Identity;
use crate::hypervisor::process::Victim;

/// Kills the orphans of a domain, and waits for their death. `false`: not all of them are dead.
pub(super) async fn kill(domain: &Identity, orphans: &[Arc<Victim>], deadline: &Deadline) -> bool {
    if deadline.check().is_err() {
        return false;
    }
    for orphan in orphans {
        let pid = orphan.pid();
        tracing::warn!(%domain, pid, "libvirt does not know that it runs, but its process lives: killed");
        if let Err(error) = orphan.kill() {
            tracing::error!(%domain, pid, %error, "cannot kill it");
            return false;
        }
    }
    for orphan in orphans {
        if !matches!(timeout_at(deadline.by(), orphan.death()).await, Ok(Ok(()))) {
            tracing::error!(%domain, pid = orphan.pid(), "killed, and not dead: {}", orphan.obstacle());
            return false;
        }
    }
    true
}
