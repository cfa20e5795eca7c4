//! What is known of domains: a table kept warm by libvirt's events, and the answers of all URIs.

pub(crate) mod deaths;
pub(crate) mod disproof;
pub(crate) mod events;
pub(crate) mod last_words;
pub(crate) mod listing;
pub(crate) mod presumed;
pub(crate) mod query_all;
pub(crate) mod stale;
pub(crate) mod table;
pub(crate) mod view;
