//! Which domain of this host has a vsock number.
//!
//! libvirt may give a number to another machine at that machine's next start. So the table, which
//! events keep, only says whom to look at. The domain's live XML decides, asked afresh.

use fence_common::caller::Vouched;
use tokio::time::Instant;
use uuid::Uuid;

use super::Known;
use crate::hypervisor::libvirt::{CallError, Connect, Domain, Lane, xml};

impl Known {
    /// The running domain with this vsock number. `None`: there is none, or any doubt about it.
    pub(crate) async fn domain_of_cid(&self, cid: u32, begin_by: Instant) -> Option<Vouched> {
        let mut found: Option<Vouched> = None;
        // The numbers of another host's machines are its own.
        for uri in self.uris.iter().filter(|uri| !uri.is_remote()) {
            for uuid in uri.table.running_with_cid(cid) {
                let asked = uri.call(Lane::Query, begin_by, move |connect| confirmed(connect, uuid, cid)).await;
                match asked {
                    Ok(None) => {}
                    Ok(Some(domain)) if found.as_ref().is_none_or(|other| *other == domain) => found = Some(domain),
                    // Two domains have it, or libvirt does not say.
                    Ok(Some(_)) => return None,
                    Err(error) => {
                        tracing::warn!(cid, %uuid, %error, "the domain with this vsock number cannot be confirmed");
                        return None;
                    }
                }
            }
        }
        found
    }
}

/// The domain, if it runs and has the number.
fn confirmed(connect: &Connect, uuid: Uuid, cid: u32) -> Result<Option<Vouched>, CallError> {
    let Some(domain) = Domain::find(connect, uuid)? else { return Ok(None) };
    let (Some(instance), Some(power)) = (domain.id(), domain.power()?) else { return Ok(None) };
    let (name, its) = (domain.name()?, xml::cid(&domain.plain_xml()?));
    // The XML may be the definition's, of a domain that has ended meanwhile.
    let still = Domain::find(connect, uuid)?.and_then(|domain| domain.id());
    Ok((power.is_active() && its == Some(cid) && still == Some(instance)).then_some(Vouched { name, uuid }))
}
