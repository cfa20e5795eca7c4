//! The processes of this host that are domains: found, held, killed and proven dead without libvirt.

pub(crate) mod host;
pub(crate) mod victim;
