//! The fencing daemon as a library: the binary is a thin shell around it, tests use the parts.
//!
//! Read [`pipeline`] first: it is the way of a request.

pub mod callback;
pub mod check_config;
pub mod claims;
pub mod cli;
pub mod clock;
pub mod commands;
pub mod config;
pub mod configure;
pub mod control;
pub mod daemon;
pub mod doctor;
pub mod durable;
mod fault;
pub mod hypervisor;
pub mod intake;
pub mod keygen;
pub mod keyring;
pub mod observe;
pub mod pipeline;
pub mod plugins;
pub mod policy;
pub mod process;
pub mod reload;
mod rtnetlink;
pub mod seen;
mod senders;
pub mod state;
pub mod status;
pub mod top;
