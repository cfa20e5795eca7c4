//! The history: each signed request and its end, as one JSON line in a file of the state directory.
//! `fence-daemon history` reads it; [`fence_control::history`] is its form.
//!
//! Neither a request nor the daemon's start waits for it. A request is handed over when it is
//! answered. A thread of its own (`writer`) opens the file and writes the lines. What finds no
//! room in its queue is counted.
//!
//! - **A crash of the daemon** loses what waits in the queue, some milliseconds of it. The next
//!   daemon finds claims without an end and adds them as unfinished (`unfinished`).
//! - **A crash of the host** loses the same, and its claims as well. Each batch of lines is
//!   followed by fdatasync. A line that was cut off is left out.
//! - **The size** is bounded: a full file replaces the one before.
//! - **Nothing secret** is in it: neither keys nor digests.

mod unfinished;
mod writer;

use std::time::{SystemTime, UNIX_EPOCH};

use crate::clock::Moment;

pub use self::unfinished::Begun;
pub use self::writer::History;

/// A moment in milliseconds since 1970.
fn unix_ms(at: Moment) -> u64 {
    let ago = Moment::now().since(at);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.saturating_sub(ago).as_millis()).unwrap_or(u64::MAX)
}
