//! Metrics for Prometheus: OpenMetrics by HTTP, at the configured address or UNIX socket. Off by
//! default; then nothing of this room runs.
//!
//! All figures come from the report of the control socket ([`page`]): nothing is counted here. No
//! fence waits for a scraper ([`server`] has the bounds).

mod families;
pub mod page;
pub mod server;
