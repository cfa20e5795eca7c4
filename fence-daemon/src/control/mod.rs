//! The daemon's end of the control socket: to look into the daemon while it runs, for root alone. Nothing can be changed through it.
//!
//! Nothing that is served waits for it: what is told is read from what others have left ([`inspector`]), clients are few at a time and have
//! little of it, and if the socket cannot be had the daemon serves without. The protocol is [`fence_control`]'s.

pub mod inspector;
pub mod server;
#[cfg(test)]
mod tests;
