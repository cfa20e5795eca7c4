//! Where requests come in: the ring buffer that the kernel program fills, the UDP socket that is
//! always open beside it, the connections of clients by tcp and vsock, and serial lines of domains.
//!
//! Only this folder makes a [`Verified`](request::Verified).

pub mod arrivals;
mod awake;
pub mod backlog;
pub mod connections;
mod datagram;
pub mod follower;
mod group_socket;
pub mod judge;
pub mod kernel;
pub mod keyring;
pub mod leads;
pub mod line;
pub mod links;
pub mod listening;
mod lookup;
pub mod memberships;
pub mod passed;
pub mod port;
pub mod rate_limits;
pub mod replay_cache;
pub mod request;
pub mod ring;
mod senders;
pub mod serial;
pub mod socket;
pub mod tcp;
pub mod vsock;
