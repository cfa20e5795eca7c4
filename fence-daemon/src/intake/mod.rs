//! Where requests come in: the ring buffer that the kernel program fills, and the socket that is
//! always open beside it.
//!
//! Only this folder makes a [`Verified`](request::Verified).

pub mod backlog;
mod datagram;
pub mod kernel;
pub mod keyring;
pub mod leads;
pub mod links;
pub mod listener;
pub mod listening;
pub mod replay_cache;
pub mod request;
pub mod ring;
mod senders;
pub mod socket;
