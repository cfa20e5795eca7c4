//! The orders: off, on and reboot, what follows them, and what is only asked.

pub(crate) mod act;
pub(crate) mod fence_race;
pub(crate) mod inherit;
mod kill;
pub(crate) mod locks;
mod off;
pub(crate) mod outcome;
pub(crate) mod pause;
pub(crate) mod record;
pub(crate) mod reset;
pub(crate) mod restart;
pub(crate) mod status;
