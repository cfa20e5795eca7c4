//! Where requests come from, as the kernel program keeps account of it.

use std::net::IpAddr;

use crate::clock::Moment;

/// A source, and what is left of what it may do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceView {
    /// Its address.
    pub address: IpAddr,
    /// Its hardware address, where that is known.
    pub mac: Option<[u8; 6]>,
    /// Whether a request of its has been found right of late, so that floods from other addresses cost it nothing.
    pub trusted: bool,
    /// Digests of its that were wrong.
    pub failures: u64,
    /// Requests of its that went to the daemon.
    pub delivered: u64,
    /// Datagrams of its that were dropped because there were too many.
    pub limited: u64,
    /// When something came from it last.
    pub last_seen: Option<Moment>,
}

/// Reads the kernel program's account of sources.
pub type Provider = Box<dyn Fn() -> Vec<SourceView> + Send + Sync>;
