//! This host's processes: found, held, killed and proven dead. libvirt is not asked here.

mod driver;
pub(crate) mod host;
mod monitor;
mod pidfd;
mod proc;
mod victim;

pub(crate) use self::driver::{Driver, Job};
pub(crate) use self::host::{Belongings, Cleared, Disks, Host, Look, Remains, Running, Whom};
pub(crate) use self::monitor::Monitor;
pub(crate) use self::victim::{Victim, VictimError};

pub use self::host::Left;
