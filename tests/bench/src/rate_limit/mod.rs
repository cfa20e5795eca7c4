//! What the kernel program costs per frame, beside an empty program and beside the same
//! compressions in portable Rust.
//!
//! * [`floods`]: the whole daemon under floods, beside fence_virtd.
//! * [`frames`]: the frames; [`measure`]: the time they take; [`verifier`]: the effort of loading;
//!   [`report`]: the page.
//!
//! The measurements take turns in one process on one processor, a million runs at a time, so other
//! load hits all of them. Only processor time counts.

pub mod floods;
pub mod frames;
pub mod measure;
pub mod report;
pub mod verifier;
