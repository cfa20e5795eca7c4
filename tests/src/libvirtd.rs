//! libvirtd
