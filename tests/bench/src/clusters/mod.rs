//! Fences in real clusters, by the daemon and by fence_virtd: [`report`] makes the page, with a
//! picture of the phases.

mod picture;
pub mod report;
