//! The door to the orders: which one is carried out how.

use std::sync::Arc;
use std::time::Duration;

use fence_common::sync::Current;
use fence_common::target::Target;
use fence_common::wire::Op;
use fence_config::Options;
use tokio::time::{Instant, timeout_at};

use super::{
    Detail, FenceRaces, Foresight, Held, Locks, Meant, Outcome, Purpose, Requester, Restarter, Restarts, Search,
    Settling, status,
};
use crate::hypervisor::deadline::Deadline;
use crate::hypervisor::known::Known;

/// What carries orders out.
pub(crate) struct Orders {
    pub(crate) known: Arc<Known>,
    pub(crate) locks: Arc<Locks>,
    pub(crate) settling: Arc<Settling>,
    pub(crate) restarts: Arc<Restarts>,
    pub(crate) restarter: Arc<Restarter>,
    pub(crate) races: Arc<FenceRaces>,
    /// How to kill and reboot.
    pub(crate) options: Current<Options>,
    /// How long a reset may take, until the event that says that it was done.
    pub(crate) reset: Duration,
}

impl Orders {
    /// Does what `op` says to `target`. A step that is not begun by the deadline is not done. A
    /// step that is begun is seen through to its end with the domain's lock held, however long that
    /// takes.
    pub(crate) async fn perform(
        self: Arc<Self>,
        op: Op,
        target: Target,
        requester: Option<Requester>,
        foresight: Option<Foresight>,
        deadline: Deadline,
    ) -> Outcome {
        match op {
            Op::Status => {
                let foreseen = Foresight::end(foresight, &self.known, &self.restarts, &target).await;
                status::status_foreseen(&self.known, &target, foreseen).await
            }
            Op::Off | Op::Reboot => self.off(&target, op == Op::Reboot, requester, foresight, &deadline).await,
            Op::On => self.on(&target, &deadline).await,
            Op::Null | Op::DevStatus | Op::HostList => Outcome::failure(Detail::NotAboutADomain),
        }
    }

    /// Looks a target up and takes the locks, until the deadline.
    pub(super) async fn meant(
        &self,
        target: &Target,
        deadline: &Deadline,
        purpose: Purpose,
        foresight: Option<Foresight>,
    ) -> (Vec<Held>, Result<Vec<Meant>, Detail>) {
        let mut held = Vec::new();
        let search = Search { known: &self.known, locks: &self.locks, restarts: &self.restarts, target };
        let found = timeout_at(deadline.by(), search.run(purpose, foresight, &mut held)).await;
        (held, found.unwrap_or(Err(Detail::Occupied)))
    }

    /// `on`.
    async fn on(&self, target: &Target, deadline: &Deadline) -> Outcome {
        let requested = Instant::now();
        self.restarts.permit(target, requested);
        let (held, meant) = self.meant(target, deadline, Purpose::Start, None).await;
        let outcome = match meant {
            Ok(meant) => self.start(meant, requested, deadline).await,
            Err(detail) => Outcome::failure(detail),
        };
        drop(held);
        outcome
    }
}
