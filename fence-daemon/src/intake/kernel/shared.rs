//! The memory of the rate limits, which the programs of several listeners have in common: a sender
//! has one budget, whichever listener it asks.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, IntoRawFd, OwnedFd};

use aya::Ebpf;
use aya::maps::Map;
use aya::programs::ProgramError;
use fence_common::boundary::name;
use nix::fcntl::OFlag;
use nix::unistd::dup3_raw;

use super::{Error, KernelProgram, handle, program_error};

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
        let copy = |name| descriptor(&self.object, name)?.try_clone_to_owned().map_err(io);
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
            let own = descriptor(&self.object, name)?.as_raw_fd();
            // The forms of the program refer to a map by its descriptor's number until they are
            // loaded.
            // SAFETY: needed because aya replaces no map. Sound because the number is that of an
            // open descriptor of `self.object`, which keeps owning it: the map behind it changes,
            // and its type and sizes are the same, as both objects come from the same file.
            let replaced = unsafe { dup3_raw(shared, own, OFlag::O_CLOEXEC) };
            // The object still owns the number.
            let _ = replaced.map_err(|error| io(error.into()))?.into_raw_fd();
        }
        if let Some((_, trusted)) = &mut self.memory {
            *trusted = handle(&self.object, name::TRUSTED)?;
        }
        Ok(())
    }
}

fn io(error: std::io::Error) -> Error {
    program_error(ProgramError::IOError(error))
}

/// The object's descriptor of a map.
pub(super) fn descriptor<'o>(object: &'o Ebpf, name: &'static str) -> Result<BorrowedFd<'o>, Error> {
    #[allow(clippy::wildcard_enum_match_arm, reason = "no other kinds are in the object")]
    let map = match object.map(name) {
        Some(
            Map::Array(map) | Map::PerCpuArray(map) | Map::HashMap(map) | Map::LruHashMap(map) | Map::RingBuf(map),
        ) => map,
        _ => return Err(Error::Missing(name)),
    };
    Ok(map.fd().as_fd())
}
