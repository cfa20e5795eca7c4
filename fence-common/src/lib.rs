//! What the kernel program and the daemon of fence-xdp agree on.
//!
//! Everything here is plain code over bytes and, where time matters, a clock value that the caller passes in: no sockets, no
//! clock, no allocation in the part that the kernel shares. That is what lets the same lines be property-tested, fuzzed and
//! compiled for BPF.
//!
//! * [`wire`]: the 176-byte request and what is sent back, as stock peers speak it.
//! * [`hash`]: which digests there are and how strong they are held to be.
//!
//! With feature `user` (the default; off in the BPF program):
//!
//! * [`key`]: the shared secret, wiped on drop, and the digests made with it.
//! * [`exchange`]: the call-back conversation as a state machine.
//! * [`ledger`]: which requests were claimed, answered or superseded.
#![no_std]

#[cfg(any(test, feature = "user"))]
extern crate alloc;
#[cfg(test)]
extern crate std;

pub mod hash;
pub mod wire;

#[cfg(feature = "user")]
pub mod exchange;
#[cfg(feature = "user")]
pub mod key;
#[cfg(feature = "user")]
pub mod ledger;
