//! The kernel program on real interfaces, through the daemon's own loader: how it is attached and
//! found. It must accept and drop the same frames as the network stack and the socket.
//!
//! Each test's thread has its own network namespace, which vanishes with it. Needs root, `ip` and
//! the object of `cargo xtask build`.

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
