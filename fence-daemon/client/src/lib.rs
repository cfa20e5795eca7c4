//! What `fence-daemon` does besides being the daemon: it asks and shows, makes the configuration
//! and the key, and finds what is wrong.
//!
//! Nothing here kills, and nothing here loads a BPF program. What only the daemon's library can
//! find out (libvirt's answer, what is on an interface) comes through [`probe::Probe`].

pub mod check_config;
pub mod cli;
pub mod configure;
pub mod doctor;
pub mod keygen;
pub mod probe;
pub mod screen;
pub mod status;
pub mod top;

#[cfg(test)]
mod example;
