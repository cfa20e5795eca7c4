//! What is known of domains: a table for each URI that libvirt's events keep warm, the answers of
//! all URIs, and what this host's processes say beside them. This room changes no domain.

mod addresses;
mod appearances;
mod deaths;
mod events;
pub(crate) mod last_words;
mod listing;
mod observe;
mod presumed;
mod query_all;
mod sockets;
mod stale;
mod table;
mod uri;
pub(crate) mod view;
mod vouched;
mod words;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use super::process::Host;

pub(crate) use self::deaths::SeenDead;
pub(crate) use self::presumed::Unknown;
pub(crate) use self::query_all::{Answers, FoundDomain, sorted};
pub(crate) use self::stale::NOTICES_WITHIN;
pub(crate) use self::table::{Entry, Instance, Table};
pub(crate) use self::uri::Uri;

pub use self::listing::{Listed, Listing};
pub use self::sockets::DomainSocket;

/// All that is known.
pub(crate) struct Known {
    /// In the configuration's order.
    pub(crate) uris: Vec<Arc<Uri>>,
    /// What this host itself says of domains.
    pub(crate) host: Host,
    /// How long a look-up or a list may take. A local libvirtd answers within a millisecond, a busy
    /// remote one within this.
    pub(crate) look_up: Duration,
    /// How long a connected URI may take to answer once another one knows the domain.
    pub(crate) grace: Duration,
}

impl Known {
    pub(crate) fn new(uris: Vec<Arc<Uri>>, look_up: Duration, grace: Duration) -> Arc<Self> {
        let machines = uris.iter().filter(|uri| uri.table.runs_machines());
        let belongings = machines.map(|uri| Arc::clone(&uri.table.belongings)).collect();
        let host = Host::new(uris.iter().filter_map(|uri| uri.table.driver), belongings);
        Arc::new(Self { uris, host, look_up, grace })
    }
}

/// Which domain, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The libvirt URI.
    pub uri: Arc<str>,
    /// Its UUID.
    pub uuid: Uuid,
    /// Its name.
    pub name: String,
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({}, {})", self.name.escape_debug(), self.uuid, self.uri)
    }
}
