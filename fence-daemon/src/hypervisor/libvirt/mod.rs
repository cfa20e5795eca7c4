//! Calls to libvirt, and the connections that they go over.

pub(crate) mod connection;
pub(crate) mod domain;
pub(crate) mod error;
pub(crate) mod ffi;
pub(crate) mod link;
pub(crate) mod migration;
mod pool;
pub(crate) mod probe;
mod shelf;
