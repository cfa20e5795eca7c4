//! The kernel program alone, driven through `BPF_PROG_TEST_RUN`: no interface, no daemon.
//!
//! Every test loads its own copy, so tests run side by side. `fence_common::frame::judge` judges
//! every frame as well, and both verdicts must agree. Needs root and the object of `cargo xtask
//! build`.
//!
//! (`cfg(test)` is always on here; saying it tells clippy that the modules may panic.)

#[cfg(test)]
mod bpftool;
#[cfg(test)]
mod busy;
#[cfg(test)]
mod delivery;
#[cfg(test)]
mod differential;
#[cfg(test)]
mod digests;
#[cfg(test)]
mod frames;
#[cfg(test)]
mod parity;
#[cfg(test)]
mod program;
#[cfg(test)]
mod rate_limit;
#[cfg(test)]
mod refusals;
#[cfg(test)]
mod shapes;
