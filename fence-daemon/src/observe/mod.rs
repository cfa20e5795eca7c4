//! What the daemon tells about itself: to the log, and to those who look inside ([`crate::control`]).

pub mod histogram;
mod journal;
pub mod limit;
pub mod logging;
pub mod refusals;
pub mod relay;
pub mod requests;
pub mod sources;
pub mod steps;
