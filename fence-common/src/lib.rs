//! What the kernel program and the daemon of fence-xdp agree on.
//!
//! All of it is code over bytes and, where time matters, a clock value from the caller. It has no
//! sockets and no clock, and the kernel's part does not allocate. So the same code is
//! property-tested, fuzzed and compiled for BPF.
//!
//! * [`wire`]: the 176-byte request and the answers, as stock peers send them.
//! * [`hash`]: the kinds of digest, in order of strength.
//! * [`frame`]: finds the request in a frame and judges it.
//! * [`admit`]: the rules for a request before its digest is checked.
//! * [`digest`]: checks a digest from a midstate of the key.
//! * `bytes`: reads words from unaligned bytes.
//! * [`compress`]: the block functions of SHA-1, SHA-256 and SHA-512.
//! * [`rate_limit`]: the limits per sender and for all. [`replay_cache`]: duplicates.
//! * [`rejected`]: the last senders that were rejected before the digest.
//! * [`verdict`]: every verdict and its counter.
//! * [`domain_state`]: libvirt's numbers for a domain's state.
//! * [`exit`]: the program's exit codes.
//! * [`boundary`]: names, version and layouts of what kernel and daemon exchange.
//!
//! With feature `user` (the default; off in the BPF program):
//!
//! * [`caller`]: who asks, by IP, vsock or serial line.
//! * [`key`]: the shared secret, wiped on drop, and its digests.
//! * [`keys`]: the accepted keys and their rotation.
//! * [`exchange`]: the callback conversation as a state machine.
//! * [`hosts`]: the group of hosts: who runs a domain, and when it is off everywhere.
//! * [`ledger`]: the requests that are claimed, answered or superseded.
//! * [`memory_store`]: the rate limits' store in user space.
//! * [`serial`]: the requests and answers of a serial line.
//! * [`sync`]: locks without poisoning.
//! * [`target`]: the domain that a request names.
//! * [`words`]: words that log lines, reports and errors share.
#![no_std]
// For inline assembly, which the kernel's target has behind this feature: see `compress`.
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
pub mod caller;
#[cfg(feature = "user")]
pub mod ending;
#[cfg(feature = "user")]
pub mod exchange;
#[cfg(feature = "user")]
pub mod hosts;
#[cfg(feature = "user")]
pub mod key;
#[cfg(feature = "user")]
pub mod keys;
#[cfg(feature = "user")]
pub mod ledger;
#[cfg(feature = "user")]
pub mod memory_store;
#[cfg(feature = "user")]
pub mod serial;
#[cfg(feature = "user")]
pub mod sync;
#[cfg(feature = "user")]
pub mod target;
#[cfg(feature = "user")]
pub mod words;
