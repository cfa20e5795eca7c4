//! Clusters for tests: the image that nodes are made of, the nodes, corosync and Pacemaker in them.
//!
//! * [`image`]: the root directory that all nodes start from; [`corosync`]: the files that make a node of it.
//! * [`node`]: a node that is a container; [`shell`]: what is asked of any node.
//! * [`lab`]: a whole cluster of two containers.

pub mod corosync;
pub mod image;
pub mod lab;
pub mod node;
pub mod shell;
