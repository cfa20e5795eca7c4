//! Calls to libvirt, and the connections that they go over. Only this room names `virt`.
//!
//! It knows nothing of processes and remembers nothing of domains.

mod connection;
pub(crate) mod domain;
mod endpoint;
mod error;
mod ffi;
mod migration;
mod pool;
pub(crate) mod xml;

pub(crate) use self::connection::Connect;
pub(crate) use self::domain::{Domain, Power, Row, Seen};
pub(crate) use self::endpoint::{Endpoint, LinkState};
pub(crate) use self::ffi::{News, Told};
pub(crate) use self::migration::Direction;
pub(crate) use self::pool::Lane;

pub use self::domain::State;
pub use self::error::{CallError, LibvirtError};
pub use self::xml::SocketKind;
