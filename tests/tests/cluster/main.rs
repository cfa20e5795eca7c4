//! Real clusters: corosync and Pacemaker in libvirt containers and QEMU guests, fenced by the
//! daemon through the stock client. The guides in docs are run as well.
//!
//! The nodes' root is an image that the lab makes from Debian's archive: this machine gets no
//! cluster packages.

#[cfg(test)]
mod claims;
#[cfg(test)]
mod guests;
#[cfg(test)]
mod guides;
#[cfg(test)]
mod history;
#[cfg(test)]
mod host;
#[cfg(test)]
mod hypervisors;
#[cfg(test)]
mod kvm;
#[cfg(test)]
mod lxc;
#[cfg(test)]
mod pages;
#[cfg(test)]
mod plugin;
#[cfg(test)]
mod privilege;
#[cfg(test)]
mod remote_uris;
#[cfg(test)]
mod serial;
#[cfg(test)]
mod service;
#[cfg(test)]
mod tcp;
#[cfg(test)]
mod together;
