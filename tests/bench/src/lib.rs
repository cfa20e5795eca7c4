//! Measures the daemon and fence_virtd in the lab, and writes the pages in `docs/measured`. The program is `fence-bench`, which
//! `cargo xtask bench` runs.
//!
//! * `daemon`: both servers in turn, on one lab, asked by one client. [`figures`]: what is measured, and what it is to be; [`bed`]: the
//!   lab with its victims and callers; [`caller`]: requests that are timed, storms, callers that say nothing; [`measure`]: one round of each
//!   part; [`rounds`]: their order; [`report`] and [`plot`]: what comes out.
//! * [`rate_limit`]: what the kernel program costs per frame, and the daemon under floods.
//! * [`bystanders`]: what the kernel program costs other traffic.
//! * [`clusters`]: fences in real clusters.
//! * [`stats`]: medians and the like; [`machine`]: what it was measured on.
//!
//! Nothing here passes or fails by its time. What fails is a lie: a reply of success while the victim lives ends the bench.

pub mod bed;
pub mod bystanders;
pub mod caller;
pub mod clusters;
pub mod figures;
pub mod machine;
pub mod measure;
pub mod plot;
pub mod rate_limit;
pub mod report;
pub mod rounds;
pub mod stats;
mod svg;
