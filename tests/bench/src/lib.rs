//! Measures the daemon and fence_virtd in the lab, and writes the pages in `docs/measured`. The
//! program is `fence-bench`, which `cargo xtask bench` runs.
//!
//! * `daemon`: both servers in turn, on one lab, asked by one client. [`figures`] has the figures
//!   and their targets, [`bed`] the lab, [`caller`] the clients. [`measure`] is one round of each
//!   part, [`rounds`] their order. [`report`] and [`plot`] show the results.
//! * [`tcp`]: the part of `daemon` about that listener. [`thousand`], [`restart`], [`hosts`]: parts
//!   with labs of their own.
//! * [`rate_limit`]: what the kernel program costs per frame, and the daemon under floods.
//! * [`bystanders`]: what the kernel program costs other traffic.
//! * [`clusters`]: fences in real clusters.
//! * [`soak`]: load and faults at random for an hour, judged and not timed (`cargo xtask soak`).
//! * [`stats`]: medians and the like; [`machine`]: the machine that runs the bench; [`pages`]: the
//!   templates of the pages.
//!
//! No time fails the bench, but for the soak's rules. A false success does: a success while the
//! victim lives.

pub mod bed;
pub mod bystanders;
pub mod caller;
pub mod clusters;
pub mod figures;
pub mod hosts;
pub mod machine;
pub mod measure;
pub mod pages;
pub mod plot;
pub mod rate_limit;
pub mod report;
pub mod restart;
pub mod rounds;
pub mod serial;
pub mod soak;
pub mod stats;
pub mod svg;
pub mod tcp;
pub mod thousand;
