//! The fencing daemon as a library: the binary is a thin shell around it, tests use the parts.
//!
//! Read [`pipeline`] first: it is the way of a request.

pub mod clock;
pub mod config;
pub mod hypervisor;
pub mod intake {
    //! Where requests come in.
    pub mod kernel;
}
pub mod policy;

#[cfg(test)]
mod scratch;
