//! The kernel program on real interfaces, by the daemon's own loader: how it is attached and found,
//! and whether what it lets through and what it drops is what the network stack and the socket
//! would.
//!
//! Each test runs in a network namespace of its own, that of its thread, which vanishes with it.
//! Needs root, `ip` and the object that `cargo xtask build` makes.

#[cfg(test)]
mod abi;
#[cfg(test)]
mod attach;
#[cfg(test)]
mod bench;
#[cfg(test)]
mod frames;
#[cfg(test)]
mod links;
mod maps;
#[cfg(test)]
mod pieces;
#[cfg(test)]
mod two_ways;
