//! What the kernel program costs per frame: beside an empty program, and beside the same compressions in portable Rust.
//!
//! * [`floods`]: the whole daemon under floods, beside stock's.
//! * [`frames`]: what it is given; [`measure`]: how long it takes; [`verifier`]: what loading it takes; [`report`]: what comes out.
//!
//! Everything is measured by turns in one process on one processor, a million runs at a time, so that whatever else the machine does
//! hits all of it. What counts is the time that the process had the processor.

pub mod floods;
pub mod frames;
pub mod measure;
pub mod report;
pub mod verifier;
