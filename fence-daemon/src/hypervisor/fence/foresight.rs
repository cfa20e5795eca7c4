//! What is asked about a domain while its client still proves that it has the key.
//!
//! "It is off" takes libvirt's word and a look at this host, and each takes as long as that proof.
//! So both begin with it. They only ask: nothing is done before a request is authorized, and the
//! presence of a domain is asked at that time as well.
//!
//! What comes of them is about a moment after the request had arrived, as any answer is. It is left
//! aside when the proof has taken long, or when libvirt has told other news of the domain since.

use std::sync::Arc;
use std::time::Duration;

use fence_common::target::Target;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::{Restarts, status};
use crate::clock::Moment;
use crate::hypervisor::known::{Answers, Known};
use crate::hypervisor::libvirt::Seen;
use crate::hypervisor::process::Look;

/// How long the proof may take, for what was asked with it to count.
const COUNTS_FOR: Duration = Duration::from_millis(200);

/// The questions about one domain, under way. They end when it is dropped.
#[derive(Debug)]
pub struct Foresight {
    begun: Instant,
    asked: JoinSet<Foreseen>,
}

/// What they came to.
#[derive(Debug)]
pub(crate) struct Foreseen {
    /// The URIs' words.
    pub(crate) answers: Answers,
    /// A look at this host for the domains that the tables know by the target. `None`: they know
    /// none.
    pub(crate) look: Option<Arc<Look>>,
}

impl Foresight {
    /// Asks about a domain that is off by the tables. `None`: it is not.
    pub(crate) fn begin(known: &Arc<Known>, restarts: &Restarts, target: &Target) -> Option<Self> {
        if !status::is_off_by_tables(known, restarts, target, Moment::now()) {
            return None;
        }
        let mut asked = JoinSet::new();
        let (known, target) = (Arc::clone(known), target.clone());
        asked.spawn(async move { ask(&known, &target).await });
        Some(Self { begun: Instant::now(), asked })
    }

    /// What was foreseen, if anything was, and if that still counts.
    pub(super) async fn end(
        foresight: Option<Self>,
        known: &Known,
        restarts: &Restarts,
        target: &Target,
    ) -> Option<Foreseen> {
        let Self { begun, mut asked } = foresight?;
        if begun.elapsed() > COUNTS_FOR {
            return None;
        }
        let foreseen = asked.join_next().await?.ok()?;
        status::is_off_by_tables(known, restarts, target, Moment::now()).then_some(foreseen)
    }
}

/// Asks all URIs and this host, at the same time: each takes as long as the other.
pub(super) async fn ask(known: &Known, target: &Target) -> Foreseen {
    let asked = known.query(target, |seen: &Seen| seen.power.is_active());
    let (answers, look) = tokio::join!(asked, status::look_by_tables(known, target));
    Foreseen { answers, look }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_was_foreseen_long_ago_does_not_count() {
        let known = Known::new(Vec::new(), COUNTS_FOR, COUNTS_FOR);
        let mut asked = JoinSet::new();
        // Not even waited for.
        asked.spawn(std::future::pending());
        let begun = Instant::now().checked_sub(2 * COUNTS_FOR).unwrap();
        let target = Target::Name("vm".to_owned());
        let foresight = Some(Foresight { begun, asked });
        assert!(Foresight::end(foresight, &known, &Restarts::default(), &target).await.is_none());
        assert!(Foresight::end(None, &known, &Restarts::default(), &target).await.is_none());
    }
}
