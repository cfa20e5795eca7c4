//! The other hypervisors of this host's cluster.
//!
//! * [`transport`]: a group of daemons with one order of messages.
//! * [`corosync`]: that group on corosync's closed process groups.
//! * [`proof`]: whether the hosts' own Pacemaker has fenced a host.

pub mod corosync;
pub mod proof;
pub mod transport;
