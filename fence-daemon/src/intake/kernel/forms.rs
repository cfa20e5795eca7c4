//! The forms of the kernel program: loads them, each when it is needed, or all in advance.

use std::collections::BTreeMap;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::sync::Arc;

use aya::programs::Program;
use fence_common::boundary::name;

use super::error::refused;
use super::{AttachedMode, Error, KernelProgram, Mode, program_error};

impl Mode {
    /// The ways that [`ways`](Self::ways) may choose on any interface.
    fn all_ways(self) -> &'static [AttachedMode] {
        match self {
            Self::Auto => &[AttachedMode::Generic, AttachedMode::Tcx, AttachedMode::Native],
            Self::Gentle => &[AttachedMode::Generic, AttachedMode::Tcx],
            Self::Native => &[AttachedMode::Native],
            Self::Generic => &[AttachedMode::Generic],
            Self::Tcx => &[AttachedMode::Tcx],
        }
    }
}

impl KernelProgram {
    /// Loads the form of the program for this way, unless it is loaded already. Returns its
    /// descriptor.
    pub(super) fn prepare(&mut self, mode: AttachedMode) -> Result<BorrowedFd<'_>, Error> {
        let mut failure = Error::Missing(name::XDP);
        let mut loaded = None;
        for name in mode.programs() {
            match self.load_one(name) {
                Ok(()) => {
                    loaded = Some(*name);
                    break;
                }
                Err(error) => failure = error,
            }
        }
        let program = loaded.and_then(|name| self.object.program(name)).ok_or(failure)?;
        program.fd().map(|fd| fd.as_fd()).map_err(program_error)
    }

    /// Loads all forms that this mode may attach. From then on attaching takes no capability.
    ///
    /// # Errors
    /// The kernel refuses each of them; the error is about the first one. Forms that it refuses
    /// beside others are reported when they are to be attached.
    pub fn load_forms(&mut self, mode: Mode) -> Result<(), Error> {
        let mut refused = BTreeMap::new();
        let (mut first, mut is_usable) = (None, false);
        for &way in mode.all_ways() {
            for name in way.programs() {
                match self.load_one(name) {
                    Ok(()) => {
                        is_usable = true;
                        // The next one only stands in for it.
                        break;
                    }
                    Err(error) => {
                        let error = Arc::new(error);
                        first = first.or_else(|| Some(Arc::clone(&error)));
                        refused.insert(*name, error);
                    }
                }
            }
        }
        self.refused = Some(refused);
        match first {
            Some(error) if !is_usable => Err(Error::Earlier(error)),
            Some(_) | None => Ok(()),
        }
    }

    fn load_one(&mut self, name: &'static str) -> Result<(), Error> {
        if let Some(error) = self.refused.as_ref().and_then(|refused| refused.get(name)) {
            return Err(Error::Earlier(Arc::clone(error)));
        }
        match self.object.program_mut(name) {
            Some(Program::Xdp(xdp)) if xdp.fd().is_err() => xdp.load().map_err(refused),
            Some(Program::SchedClassifier(tc)) if tc.fd().is_err() => tc.load().map_err(refused),
            Some(Program::Xdp(_) | Program::SchedClassifier(_)) => Ok(()),
            _ => Err(Error::Missing(name)),
        }
    }
}
