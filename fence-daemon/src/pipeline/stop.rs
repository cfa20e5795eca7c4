//! The end of the daemon, for requests that are under way.
//!
//! As long as this daemon waits, no other one serves. So a stop gives all of them the same short
//! time. A client whose request is claimed is then told "failure": its claim is on record, so the
//! next daemon does not begin it anew, and what has begun stays in force. A client that nobody has
//! connected to asks again.

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

/// How long a stop waits for callbacks and for answers. An honest exchange takes milliseconds, and
/// a client that has been connected to does not ask again: cut off in the middle it reports a
/// failed fence.
pub const STOP_GRACE: Duration = Duration::from_secs(1);

/// Tells when a stop has begun, and by when all must be answered then.
pub(super) type Stopping = watch::Receiver<Option<Instant>>;

/// Waits until the daemon stops and its grace is over.
pub(super) async fn stopped(stopping: &mut Stopping) {
    // An error means that the pipeline is gone, and its tasks with it.
    let by = stopping.wait_for(Option::is_some).await.ok().and_then(|by| *by);
    if let Some(by) = by {
        sleep_until(by).await;
    }
}
