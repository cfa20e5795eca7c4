//! What the daemon tells about itself.

pub mod limit;
pub mod logging;
pub mod relay;
pub mod steps;
