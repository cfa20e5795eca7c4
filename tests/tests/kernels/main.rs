//! The supported kernels: each boots in QEMU with the daemon, the stock client and the tests of the
//! kernel program. One of them also has what a machine with a vsock has.
//!
//! Needs neither KVM nor libvirtd. Needs root for the tests on this kernel.
//! `cargo xtask test kernels` names the other test programs.

#[cfg(test)]
mod boots;
#[cfg(test)]
mod guest;
#[cfg(test)]
mod real_cid;
#[cfg(test)]
mod table;
#[cfg(test)]
mod verifier;
#[cfg(test)]
mod vsock;
