//! The fencing daemon as a library. The binary is a thin shell around it, and tests use the parts.
//!
//! Read [`pipeline`] first: it is the way of a request.

pub mod callback;
pub mod clock;
pub mod commands;
pub mod control;
pub mod daemon;
mod fault;
pub mod history;
pub mod hosts;
pub mod hypervisor;
pub mod intake;
pub mod metrics;
pub mod observe;
pub mod options;
pub mod pipeline;
pub mod policy;
pub mod process;
pub mod state;
pub mod systemd;
