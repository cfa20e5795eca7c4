//! The kernel program alone, driven through `BPF_PROG_TEST_RUN`: no interface, no daemon.
//!
//! Every test loads a copy of its own, so they run side by side. Wherever a frame is given to the program, the same frame is given
//! to `fence_common::frame::judge`, and the verdicts must agree. Needs root and the object that `cargo xtask build` makes.
//!
//! (`cfg(test)` is always on here; saying it tells clippy that the modules may panic.)

#[cfg(test)]
#[path = "prog_run/bpftool.rs"]
mod bpftool;
#[cfg(test)]
#[path = "prog_run/busy.rs"]
mod busy;
#[cfg(test)]
#[path = "prog_run/delivery.rs"]
mod delivery;
#[cfg(test)]
#[path = "prog_run/differential.rs"]
mod differential;
#[cfg(test)]
#[path = "prog_run/digests.rs"]
mod digests;
#[cfg(test)]
#[path = "prog_run/frames.rs"]
mod frames;
#[cfg(test)]
#[path = "prog_run/parity.rs"]
mod parity;
#[cfg(test)]
#[path = "prog_run/program.rs"]
mod program;
#[cfg(test)]
#[path = "prog_run/refusals.rs"]
mod refusals;
#[cfg(test)]
#[path = "prog_run/shapes.rs"]
mod shapes;
#[cfg(test)]
#[path = "prog_run/shield.rs"]
mod shield;
