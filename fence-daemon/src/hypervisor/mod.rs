//! The only user of libvirt, and the only place that kills.
