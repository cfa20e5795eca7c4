//! A start that makes way for an order that wants the domain off.
//!
//! A start holds its domain's lock until libvirt's call returns. That may take longer than an order
//! may wait: a QEMU takes its memory, or opens its disks, on a slow host. So an `off` or `reboot`
//! that waits for the lock cuts the start short:
//!
//! - A call that has not begun does not begin.
//! - What the call brings up is killed, as soon as this host sees it. libvirt's call then fails,
//!   the lock is free, and the order goes on as usual. It proves the "off" by its own means.
//!
//! libvirt may start the process only after the waiting `off` has given up (a hook of libvirt's
//! hangs, say). Its client was answered "failure". The domain must not come up behind its back, so
//! it is killed then, too. A `reboot` that has given up leaves the domain to its restart.
//!
//! A restart makes way at once: its client was answered long ago. The client of an `on` still waits
//! for a success, so its start has some seconds first.
//!
//! A domain of a URI without a local driver is no process of this host, and nothing is killed.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep, sleep_until};

use super::{Restarter, Started};
use crate::hypervisor::deadline::Deadline;
use crate::hypervisor::known::{Identity, Uri};
use crate::hypervisor::libvirt::CallError;
use crate::hypervisor::process::Job;

/// How long the start of an `on` is left alone.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often the host is looked at for what a call brings up.
const LOOK: Duration = Duration::from_millis(50);

impl Restarter {
    /// The result of `call`, which starts the domain with its lock held, unless an order that is
    /// newer than `requested` wants the domain off. `is_owed`: it is a restart.
    pub(super) async fn unless_overtaken(
        &self,
        uri: &Arc<Uri>,
        domain: &Identity,
        (requested, is_owed): (Instant, bool),
        deadline: &Deadline,
        call: impl Future<Output = Result<Started, CallError>>,
    ) -> Result<Started, CallError> {
        let begun = Instant::now();
        let not_before = if is_owed { begun } else { begun + PATIENCE };
        let result = tokio::select! {
            biased;
            result = call => result,
            never = async {
                sleep_until(not_before).await;
                self.cut_short(uri, domain, requested, deadline).await
            } => match never {},
        };
        if Instant::now() < not_before {
            return result;
        }
        match result {
            // Nothing of ours came up.
            Ok(Started::Already(_) | Started::MovedAway | Started::Gone | Started::NotYet) => result,
            _ if !self.restarts.is_overtaken(domain, requested) => result,
            Ok(Started::Now(_) | Started::NotActive) | Err(_) => {
                // It may have come up between two looks.
                self.kill_begun(uri, domain).await;
                Err(CallError::Busy("its start was cut short: a newer request wants it off"))
            }
        }
    }

    /// Ends the start that is under way, whenever an order wants the domain off.
    async fn cut_short(&self, uri: &Uri, domain: &Identity, requested: Instant, deadline: &Deadline) -> Infallible {
        let mut news = self.restarts.news.subscribe();
        let mut told = false;
        loop {
            if self.restarts.is_overtaken(domain, requested) {
                if !std::mem::replace(&mut told, true) {
                    tracing::warn!(%domain, "a newer request wants it off: its start is cut short");
                }
                deadline.call_off();
                self.kill_begun(uri, domain).await;
                sleep(LOOK).await;
            } else {
                // An error means that the sender is gone, and it is ours.
                let _ = news.changed().await;
            }
        }
    }

    /// Kills what has come up of the domain on this host. What migrates is left to the order that
    /// waits: its death here says nothing about the other host.
    async fn kill_begun(&self, uri: &Uri, domain: &Identity) {
        // Whatever was proven dead before, another instance has come, and it may have written.
        uri.table.deaths.forget(domain.uuid);
        let Some(whom) = uri.table.whom(domain.uuid, &domain.name) else { return };
        if Job::on_record(whom.driver, &whom.name) == Job::None && !uri.table.is_leaving(domain.uuid) {
            self.known.host.kill_living(&whom).await;
        }
    }
}
