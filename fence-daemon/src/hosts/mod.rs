//! The other hypervisors of this host's cluster.
//!
//! * [`transport`]: a group of daemons with one order of messages.
//! * [`corosync`]: that group on corosync's closed process groups.
//! * [`proof`]: whether the hosts' own Pacemaker has fenced a host.
//! * `handle`: the pipeline's door. `driver`: the task behind it. `elections`: who calls back.
//!   `local`: what this host does. `watch`: what the log and reports say.
//! * [`view`]: the cluster, for reports.

pub mod corosync;
mod driver;
mod elections;
mod handle;
mod local;
pub mod proof;
#[cfg(test)]
mod tests;
pub mod transport;
pub mod view;
mod watch;

pub use self::driver::{Parts, start};
pub use self::handle::{Elected, Election, Hosts, SharedDomain};
pub use self::local::Verdict;
