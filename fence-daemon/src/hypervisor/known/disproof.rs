//! The last word of a silent URI, as this host itself sees it.
//!
//! A local libvirtd hangs, and its last word is that the domain runs. That is a veto ([`memory`](super::last_words)), and this host knows
//! better: it sees all its processes. So the word does not count where no process of the domain lives here and it has not gone to another
//! host. Containers do not move. A machine that ended here while its libvirtd was silent still stands in libvirt's record, without a
//! migration; one of which there is no record may have moved before, and the veto stands.

use fence_common::target::Target;

use super::query_all::{Found, Survey, survey};
use crate::hypervisor::Inner;
use crate::hypervisor::libvirt::domain::{Power, Seen};
use crate::hypervisor::process::host::{Remains, Whom};
use crate::hypervisor::process::victim::Job;

/// Asks all URIs, as [`survey`], and leaves out the last words that this host disproves.
pub(crate) async fn ask(inner: &Inner, target: &Target, enough: fn(&Seen) -> bool) -> Survey {
    let mut survey = survey(&inner.uris, target, &inner.limits, enough).await;
    let mut standing = Vec::new();
    for (found, error) in std::mem::take(&mut survey.remembered) {
        if is_disproved(inner, &found).await {
            let name = found.seen.name.escape_debug();
            tracing::info!(domain = %name, uuid = %found.seen.uuid, "it ran here when libvirt last spoke of it, and nothing of it lives: no hindrance");
        } else {
            standing.push((found, error));
        }
    }
    survey.remembered = standing;
    survey
}

/// Whether nothing of a domain lives on this host, and it has not left it.
pub(crate) async fn is_disproved(inner: &Inner, found: &Found) -> bool {
    let Seen { uuid, name, power, .. } = &found.seen;
    let whom = inner.uris.get(found.place).and_then(|uri| Whom::at(&uri.table, *uuid, name));
    let Some(whom) = whom.filter(|_| matches!(power, Power::Active(_))) else { return false };
    let stays = |whom: &Whom| Job::on_record(whom.driver, name) == Job::None;
    // Before and after: libvirt may come back and go on with a migration in between.
    stays(&whom) && matches!(inner.host.remains(&whom).await, Remains::Nothing) && stays(&whom)
}
