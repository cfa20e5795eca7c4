//! Powering a domain on.

use std::sync::Arc;

use fence_common::wire::Reply;
use tokio::time::Instant;

use super::{Detail, Meant, Orders, Outcome, Plan, Source, Started};
use crate::hypervisor::deadline::Deadline;
use crate::hypervisor::libvirt::Power;

impl Orders {
    /// Starts the domain that is meant, with its locks held. `requested`: when the order was
    /// requested.
    pub(super) async fn start(&self, mut all: Vec<Meant>, requested: Instant, deadline: &Deadline) -> Outcome {
        // Where it runs nothing is to be done. Where it moved away from is the last place to start
        // it.
        all.sort_by_key(|meant| {
            let rank = match meant.power {
                Power::Active(_) => 0,
                Power::Off => 1,
                Power::MovedAway => 2,
            };
            (rank, meant.index)
        });
        let Some(Meant { index, domain, veto, .. }) = all.first() else { return Outcome::failure(Detail::Broken) };
        if let Some(veto) = veto {
            return Outcome::failure(veto.clone()).about(domain.clone());
        }
        // A pending restart knows more: the XML of a transient domain. It stays pending if this
        // start fails.
        let plan = self.restarts.get(*index, domain.uuid).unwrap_or_else(|| {
            Arc::new(Plan {
                index: *index,
                domain: domain.clone(),
                source: Source::Definition,
                // A domain that has just died, and libvirt has not noticed, is not "on already".
                dead: self.known.uris.get(*index).and_then(|uri| uri.table.dead_instance(domain.uuid)),
                died: None,
                kept: None,
                inherited: false,
                held: false,
            })
        });
        let outcome = match self.restarter.start(&plan, requested, false, deadline).await {
            Ok(Started::Already(state)) => Outcome::found(Reply::Success, Detail::AlreadyActive(state)),
            Ok(Started::Now(state)) => Outcome::found(Reply::Success, Detail::Started(state)),
            Ok(Started::NotActive | Started::NotYet) => Outcome::failure(Detail::NotActive),
            Ok(Started::MovedAway) => Outcome::failure(Detail::MovedAway),
            Ok(Started::Gone) => Outcome::failure(Detail::Vanished),
            Err(error) => Outcome::failure(Detail::Failed { uri: Arc::clone(&domain.uri), error }),
        };
        if outcome.reply == Reply::Success {
            for meant in &all {
                self.restarts.cancel(meant.index, meant.domain.uuid);
            }
        }
        outcome.about(plan.domain.clone())
    }
}
