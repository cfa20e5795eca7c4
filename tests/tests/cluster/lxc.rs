//! A cluster of libvirt's containers.
