//! What the daemon reports: log lines, counters, recent requests. [`crate::control`] serves them.

pub mod histogram;
mod journal;
pub mod limit;
pub mod logging;
mod message_ids;
pub mod rejections;
pub mod relay;
pub mod requests;
pub mod results;
pub mod sources;
pub mod steps;
