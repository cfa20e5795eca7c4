//! The memory of the rate limits, which the programs of several listeners have in common: a sender
//! has one budget, whichever listener it asks.

use std::os::fd::{AsFd as _, OwnedFd};

use fence_common::boundary::name;

use super::forms::io_error;
use super::{Error, KernelProgram, handle};

/// The maps in which a program keeps senders and their buckets.
const LIMITS: [&str; 3] = [name::TRUSTED, name::FAILED, name::STRANGERS];

/// The memory of one program's rate limits.
#[derive(Debug)]
pub struct SharedLimits([OwnedFd; 3]);

impl KernelProgram {
    /// The memory of its rate limits, for other programs.
    ///
    /// # Errors
    /// [`Error::Missing`], or the process has no descriptor left.
    pub fn limits(&self) -> Result<SharedLimits, Error> {
        let copy = |name| self.forms.map(name)?.try_clone_to_owned().map_err(io_error);
        let [trusted, failed, strangers] = LIMITS.map(copy);
        Ok(SharedLimits([trusted?, failed?, strangers?]))
    }

    /// Uses another program's memory from now on, in place of its own. Must come before the first
    /// [`attach`](Self::attach) and [`take_memory`](Self::take_memory).
    ///
    /// # Errors
    /// As with [`limits`](Self::limits). The program must not be attached then.
    pub fn share_limits(&mut self, limits: &SharedLimits) -> Result<(), Error> {
        for (name, shared) in LIMITS.into_iter().zip(&limits.0) {
            self.forms.replace(name, shared.as_fd())?;
        }
        if let Some((_, trusted)) = &mut self.memory {
            *trusted = handle(&self.forms, name::TRUSTED)?;
        }
        Ok(())
    }
}
