//! The commands of `fence-daemon` besides the daemon: they ask and show, write the configuration
//! and the key, and find problems.
//!
//! Nothing here kills or loads a BPF program. What only the daemon's library can find out
//! (libvirt's answer, the programs on an interface) comes through [`probe::Probe`].

pub mod check_config;
pub mod cli;
pub mod configure;
pub mod doctor;
pub mod drop_in;
pub mod history;
pub mod keygen;
pub mod probe;
pub mod screen;
pub mod status;
pub mod top;

#[cfg(test)]
mod example;
