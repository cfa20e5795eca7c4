//! Joins the other hosts of the cluster (`backend = "cpg"`).

use std::io;
use std::sync::Arc;

use super::key_plan::KeyPlan;
use crate::clock::Moment;
use crate::hosts::{Hosts, Parts, corosync, start};
use crate::hypervisor::Hypervisors;
use crate::pipeline::Claims;

/// The program that says which hosts Pacemaker has fenced, and where distributions have it.
const STONITH_ADMIN: [&str; 2] = ["/usr/sbin/stonith_admin", "/usr/bin/stonith_admin"];

/// Starts to join. corosync may come later. The messages are signed with the key of the first
/// listener that has one. Must be called within a tokio runtime.
///
/// # Errors
/// The system has no thread, descriptor or randomness left.
pub(super) fn join(hypervisors: &Hypervisors, plan: &KeyPlan, claims: &Arc<Claims>) -> io::Result<Hosts> {
    let mut incarnation = [0; 16];
    getrandom::fill(&mut incarnation).map_err(io::Error::other)?;
    let (ring, claims) = (plan.first_ring(), Arc::clone(claims));
    let recent = claims.recent(Moment::now()).collect();
    let parts = Parts {
        hypervisors: hypervisors.clone(),
        keys: Box::new(move || ring.current()),
        recent,
        note: Box::new(move |id| claims.note_for_hosts(Moment::now(), id)),
        has_fencing: STONITH_ADMIN.iter().any(|path| std::path::Path::new(path).exists()),
        incarnation,
    };
    let (group, events) = corosync::start()?;
    Ok(start(group, events, parts))
}
