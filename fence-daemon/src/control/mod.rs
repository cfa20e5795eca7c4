//! The daemon's end of the control socket. Only root may read the report, and nothing can be
//! changed through it.
//!
//! No request waits for it: the report reads state that is there already ([`inspector`]), and
//! clients are few and have little time. If the socket cannot be created the daemon serves without
//! it. [`fence_control`] defines the protocol.

mod cluster;
pub mod inspector;
pub mod multicast;
mod serial;
pub mod server;
mod tcp;
#[cfg(test)]
mod tests;
mod vsock;
