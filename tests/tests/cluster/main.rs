//! Real clusters: corosync and Pacemaker in libvirt's containers and in QEMU guests, fenced by the
//! daemon through the stock client, and what the guides in docs tell people to type.
//!
//! The nodes' root is an image of their own that the lab makes from Debian's archive: nothing of a
//! cluster is installed on this machine.

#[cfg(test)]
mod guides;
#[cfg(test)]
mod hypervisors;
#[cfg(test)]
mod kvm;
#[cfg(test)]
mod lxc;
#[cfg(test)]
mod plugin;
#[cfg(test)]
mod remote_uris;
#[cfg(test)]
mod service;
