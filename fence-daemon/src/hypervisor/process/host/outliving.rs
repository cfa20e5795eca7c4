//! What can outlive a domain's own processes: its helpers, and writes to its disks under way.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout_at};

use super::super::driver::Driver;
use super::belongings::{Belongings, WhichWrites};
use super::helpers::{Helper, with_children};
use super::{Host, Left, Whom};
use crate::hypervisor::deadline::Deadline;

/// How long the daemon waits before the log says so. If this order has killed nothing, it is a
/// failure then.
const LATE: Duration = Duration::from_secs(3);
/// How often helpers are looked for that nobody has killed.
const LOOK: Duration = Duration::from_millis(20);
/// How often in a row new helpers may appear.
const ROUNDS: u32 = 20;

impl Host {
    fn belongings_of(&self, whom: &Whom) -> &[Arc<Belongings>] {
        match whom.driver {
            Driver::Qemu => &self.shared.belongings,
            // Everything in a container dies with its first process, and no lock tells of writes.
            Driver::Lxc => &[],
        }
    }

    /// Kills the known helpers of a domain, and does not wait.
    pub(super) fn kill_helpers(&self, whom: &Whom) {
        for helper in self.belongings_of(whom).iter().flat_map(|belongings| belongings.helpers_to_kill(whom.uuid)) {
            // If that fails, the wait for its death shows it.
            let _ = helper.process.kill();
        }
    }

    fn helpers(&self, whom: &Whom) -> Vec<Helper> {
        self.belongings_of(whom).iter().flat_map(|belongings| belongings.living_helpers(whom.uuid)).collect()
    }

    /// Kills a domain's helpers, and waits until they are dead. `begun`: this order has killed
    /// something of the domain.
    ///
    /// # Errors
    /// One lives at `by`, or nothing was begun yet and the deadline has passed.
    pub(super) async fn clear_helpers(
        &self,
        whom: &Whom,
        begun: bool,
        deadline: &Deadline,
        by: Instant,
    ) -> Result<(), Left> {
        for round in 0..ROUNDS {
            let helpers = self.helpers(whom);
            if helpers.is_empty() {
                return Ok(());
            }
            if !begun && round == 0 {
                deadline.check().map_err(|_| Left::Helpers(describe(&helpers)))?;
                let (domain, helpers) = (whom.name.escape_debug(), describe(&helpers));
                tracing::warn!(%domain, uuid = %whom.uuid, helpers, "the domain is dead, and helpers of it live: killed");
            }
            let helpers = with_children(helpers);
            for helper in &helpers {
                if let Err(error) = helper.process.kill() {
                    return Err(Left::Helpers(format!("{} cannot be killed: {error}", helper.describe())));
                }
            }
            all_dead(whom, &helpers, by).await?;
        }
        Err(Left::Helpers("new ones appear again and again".to_owned()))
    }

    /// Waits until no write of a domain is under way.
    ///
    /// # Errors
    /// A write is under way at `by`, or that is not known.
    pub(super) async fn writes_over(&self, whom: &Whom, search: WhichWrites, by: Instant) -> Result<(), Left> {
        for belongings in self.belongings_of(whom) {
            let late = by.min(Instant::now() + LATE);
            let Err(what) = belongings.settled(whom.uuid, search, late.into_std()).await else { continue };
            tracing::error!(domain = %whom.name.escape_debug(), uuid = %whom.uuid, "dead, but {what}");
            // The next request finds it as it is then.
            if search == WhichWrites::All {
                return Err(Left::Writes(what));
            }
            belongings.settled(whom.uuid, search, by.into_std()).await.map_err(Left::Writes)?;
        }
        Ok(())
    }

    /// Waits until nothing outlives a domain whose own processes are dead. Waits for up to `limit`.
    ///
    /// # Errors
    /// Something outlives it, or may.
    pub(super) async fn nothing_outlives(&self, whom: &Whom, limit: Duration) -> Result<(), Left> {
        let by = Instant::now() + limit;
        // The helpers of a domain that has just ended in peace end a moment later.
        loop {
            let helpers = self.helpers(whom);
            if helpers.is_empty() {
                break;
            }
            if Instant::now() >= by {
                return Err(Left::Helpers(describe(&helpers)));
            }
            sleep(LOOK).await;
        }
        let search = if whom.proven_dead { WhichWrites::Known } else { WhichWrites::All };
        for belongings in self.belongings_of(whom) {
            belongings.settled(whom.uuid, search, by.into_std()).await.map_err(Left::Writes)?;
        }
        Ok(())
    }
}

fn describe(helpers: &[Helper]) -> String {
    helpers.iter().map(Helper::describe).collect::<Vec<_>>().join(", ")
}

/// Waits for the death of helpers that were killed.
async fn all_dead(whom: &Whom, helpers: &[Helper], by: Instant) -> Result<(), Left> {
    let mut late = Some(by.min(Instant::now() + LATE));
    for helper in helpers {
        while !helper.process.is_dead() {
            match timeout_at(late.unwrap_or(by), helper.process.death()).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => {
                    return Err(Left::Helpers(format!("{} cannot be watched: {error}", helper.describe())));
                }
                Err(_) if late.take().is_some() => {
                    let (domain, helper) = (whom.name.escape_debug(), helper.describe());
                    tracing::error!(%domain, uuid = %whom.uuid, helper, "the domain is dead, but this helper was killed and is not dead yet");
                }
                Err(_) => {
                    let living: Vec<_> = helpers.iter().filter(|it| !it.process.is_dead()).cloned().collect();
                    return Err(Left::Helpers(describe(&living)));
                }
            }
        }
    }
    Ok(())
}
