//! Clusters for tests: the image that nodes are made of, the nodes, corosync and Pacemaker in them.
//!
//! * [`image`]: the root directory that all nodes start from; [`corosync`]: the files that make a node of it.
//! * [`node`]: a node that is a container; [`shell`]: what is asked of any node.
//! * [`lab`]: a whole cluster of two containers.
//! * [`watch`]: an observer of what happens to it, by [`wire`] and files, and the judgement on that.
//! * [`scenario`]: how it is broken, and what has to come of it; [`timeline`]: when what happened.
//! * [`guests`]: a cluster of two QEMU guests, and [`claims`]: who runs its resource.

pub mod claims;
pub mod corosync;
pub mod guests;
pub mod image;
mod judge;
pub mod lab;
pub mod node;
pub mod scenario;
pub mod shell;
pub mod timeline;
pub mod watch;
pub mod wire;
