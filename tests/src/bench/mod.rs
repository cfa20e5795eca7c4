//! The bench behind `cargo xtask bench`: `fence-daemon` and stock's `fence_virtd` in turn, on one lab, asked by one client.
//!
//! * [`stats`]: medians and the like; [`figures`]: what is measured, and what it is to be.
//! * [`bed`]: the lab with its victims and callers; [`caller`]: requests that are timed, storms, callers that say nothing.
//! * [`measure`]: one round of each part; [`rounds`]: their order.
//! * [`machine`], [`report`], [`plot`]: what comes out.
//!
//! Nothing here passes or fails by its time. What fails is a lie: a reply of success while the victim lives ends the bench.

pub mod bed;
pub mod caller;
pub mod figures;
pub mod machine;
pub mod measure;
pub mod plot;
pub mod report;
pub mod rounds;
pub mod stats;

use std::io::Write as _;

/// Says what is going on, on standard error; that nobody reads it is no reason to stop.
pub fn progress(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}
