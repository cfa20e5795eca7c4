//! Clusters for tests: the nodes' image, the nodes, and corosync and Pacemaker in them.
//!
//! * [`image`]: the root directory of all nodes; [`corosync`]: the files that make a node of it.
//! * [`node`]: a node that is a container; [`shell`]: commands on any node.
//! * [`lab`]: a whole cluster of two containers.
//! * [`watch`]: an observer of the cluster, by [`wire`] and files, which judges what it sees.
//! * [`scenario`]: how to break a cluster, and what must follow; [`timeline`]: when it follows.

pub mod corosync;
pub mod image;
mod judge;
pub mod lab;
pub mod node;
pub mod scenario;
pub mod shell;
pub mod timeline;
pub mod watch;
pub mod wire;
