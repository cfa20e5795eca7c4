//! The end of the daemon, for requests that are under way.
//!
//! While this daemon waits, no other one serves. So a stop gives all requests the same short time.
//! A client with a claimed request then receives "failure". Its claim is on record, so the next
//! daemon does not act again, and what has begun takes effect. A client without a connection asks
//! again.

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

/// How long a stop waits for callbacks and answers. An honest exchange takes milliseconds. A
/// connected client does not ask again: if it is cut off it reports a failed fence.
pub const STOP_GRACE: Duration = Duration::from_secs(1);

/// Tells that a stop has begun, and the deadline for all answers.
pub(super) type Stopping = watch::Receiver<Option<Instant>>;

/// Waits until the daemon stops and its grace period is over.
pub(super) async fn stopped(stopping: &mut Stopping) {
    // An error means that the pipeline is gone, and its tasks with it.
    let by = stopping.wait_for(Option::is_some).await.ok().and_then(|by| *by);
    if let Some(by) = by {
        sleep_until(by).await;
    }
}
