//! The kernels that people run: each is booted in QEMU with the daemon, the stock client and the
//! tests of the kernel program inside, and does there what it does here.
//!
//! No KVM is needed, and no libvirtd. Needs root for what runs on this kernel, and
//! `cargo xtask test kernels`, which says where the other test programs are.

#[cfg(test)]
mod boots;
#[cfg(test)]
mod guest;
#[cfg(test)]
mod table;
#[cfg(test)]
mod verifier;
