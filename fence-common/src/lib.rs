//! What the kernel program and the daemon of fence-xdp agree on.
//!
//! Everything here is plain code over bytes and, where time matters, a clock value that the caller passes in: no sockets, no
//! clock, no allocation in the part that the kernel shares. That is what lets the same lines be property-tested, fuzzed and
//! compiled for BPF.
//!
//! * [`wire`]: the 176-byte request and what is sent back, as stock peers speak it.
//! * [`hash`]: which digests there are and how strong they are held to be.
//! * [`frame`]: what a frame is, and its whole judgement.
//! * [`admit`]: what a request must be like before its digest is looked at.
//! * [`digest`]: checking a digest from a midstate of the key.
//! * `bytes`: words from places that are not aligned to them.
//! * [`compress`]: the block functions under the digests.
//! * [`rate_limit`]: how much of whom is let through, and what came before; [`replay_cache`]: how a datagram is known again.
//! * [`domain_state`]: libvirt's numbers for a domain's state.
//! * [`exit`]: what the program exits with.
//! * [`verdict`]: every way that a judgement can end, and its counter.
//! * [`boundary`]: names, version and layouts of what kernel and daemon exchange.
//!
//! With feature `user` (the default; off in the BPF program):
//!
//! * [`key`]: the shared secret, wiped on drop, and the digests made with it.
//! * [`keys`]: which keys are accepted, and how one takes another's place.
//! * [`exchange`]: the call-back conversation as a state machine.
//! * [`ledger`]: which requests were claimed, answered or superseded.
//! * [`memory_store`]: the rate limits' memory outside of the kernel.
//! * [`sync`]: locks of the standard library without their poison.
//! * [`target`]: the domain that a request means.
//! * [`words`]: words for people that log lines, reports and errors share.
#![no_std]
// For what the language does not offer on the kernel's target: see `compress`.
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]

#[cfg(any(test, feature = "user"))]
extern crate alloc;
#[cfg(any(test, feature = "user"))]
extern crate std;

pub mod admit;
pub mod boundary;
mod bytes;
pub mod compress;
pub mod digest;
pub mod domain_state;
pub mod exit;
pub mod frame;
pub mod hash;
pub mod rate_limit;
pub mod rejected;
pub mod replay_cache;
pub mod verdict;
pub mod wire;

#[cfg(feature = "user")]
pub mod exchange;
#[cfg(feature = "user")]
pub mod key;
#[cfg(feature = "user")]
pub mod keys;
#[cfg(feature = "user")]
pub mod ledger;
#[cfg(feature = "user")]
pub mod memory_store;
#[cfg(test)]
mod model;
#[cfg(feature = "user")]
pub mod sync;
#[cfg(feature = "user")]
pub mod target;
#[cfg(feature = "user")]
pub mod words;
