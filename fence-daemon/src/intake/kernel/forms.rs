//! The forms of the kernel program over its maps: loads them, each when it is needed, or all in
//! advance.
//!
//! What aya makes of the program's file serves only to load forms, and takes most of a megabyte. It
//! goes once all are loaded.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, IntoRawFd as _, OwnedFd};
use std::sync::Arc;

use aya::maps::Map;
use aya::programs::{Program, ProgramError};
use aya::{Ebpf, EbpfLoader};
use fence_common::boundary::name;
use fence_common::rate_limit::{FAILED_MAX, REPLAY_CACHE_MAX, TRUSTED_MAX};
use nix::fcntl::OFlag;
use nix::unistd::dup3_raw;

use super::error::{not_permitted, refused};
use super::{AttachedMode, Error, KernelProgram, Mode, program_error};

/// How many elements each CPU may keep for itself in an LRU map: twice the kernel's batch of 128.
const KEPT_PER_CPU: usize = 256;
/// How many CPUs to assume if the kernel does not say.
const CPUS_MAX: usize = 1024;

/// How many elements an LRU map needs to hold `most`, whatever each CPU keeps for itself.
///
/// The kernel hands out free elements in batches. A CPU without free ones evicts old ones, although
/// other CPUs still have free ones.
fn entries(most: usize, cpus: usize) -> u32 {
    u32::try_from(most.saturating_add(cpus.saturating_mul(KEPT_PER_CPU))).unwrap_or(u32::MAX)
}

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

/// The maps, and the forms that are loaded.
#[derive(Debug)]
pub(super) struct Forms {
    /// The program's file as aya has read it, until all forms are loaded.
    object: Option<Ebpf>,
    maps: BTreeMap<String, OwnedFd>,
    loaded: BTreeMap<&'static str, Form>,
    /// The forms that the kernel has refused, if all were loaded in advance.
    refused: BTreeMap<&'static str, Arc<Error>>,
}

/// A form that the kernel has verified.
#[derive(Debug)]
struct Form {
    fd: OwnedFd,
    /// The kernel's number of it.
    id: Option<u32>,
}

impl Forms {
    /// Reads the program's file, and creates its maps.
    ///
    /// # Errors
    /// [`Error::NotPermitted`], [`Error::Object`], or the process has no descriptor left.
    pub(super) fn new(file: &[u8]) -> Result<Self, Error> {
        // The ELF reader needs aligned bytes. The allocator aligns them; an included file may not
        // be.
        let file = file.to_vec();
        let mut loader = EbpfLoader::new();
        loader.btf(None);
        let cpus = aya::util::nr_cpus().unwrap_or(CPUS_MAX);
        for (name, most) in [(name::TRUSTED, TRUSTED_MAX), (name::FAILED, FAILED_MAX), (name::REPLAY, REPLAY_CACHE_MAX)]
        {
            loader.map_max_entries(name, entries(most, cpus));
        }
        let object = loader
            .load(&file)
            .map_err(|error| not_permitted(&error).unwrap_or_else(|| Error::Object(Box::new(error))))?;
        let mut maps = BTreeMap::new();
        for (name, map) in object.maps() {
            let Some(fd) = descriptor(map) else { continue };
            maps.insert(name.to_owned(), fd.try_clone_to_owned().map_err(io_error)?);
        }
        Ok(Self { object: Some(object), maps, loaded: BTreeMap::new(), refused: BTreeMap::new() })
    }

    /// The descriptor of a map.
    ///
    /// # Errors
    /// [`Error::Missing`].
    pub(super) fn map(&self, name: &'static str) -> Result<BorrowedFd<'_>, Error> {
        self.maps.get(name).map(|fd| fd.as_fd()).ok_or(Error::Missing(name))
    }

    /// Uses another map in place of this one, of the same type and size. Forms that are loaded keep
    /// the old one.
    ///
    /// # Errors
    /// [`Error::Missing`], or the process has no descriptor left.
    pub(super) fn replace(&mut self, name: &'static str, map: BorrowedFd<'_>) -> Result<(), Error> {
        let own = self.maps.get_mut(name).ok_or(Error::Missing(name))?;
        *own = map.try_clone_to_owned().map_err(io_error)?;
        let Some(object) = &self.object else { return Ok(()) };
        // Forms refer to a map by the number of the object's descriptor until they are loaded.
        let number = object.map(name).and_then(descriptor).ok_or(Error::Missing(name))?.as_raw_fd();
        // SAFETY: needed because aya replaces no map. Sound because the number is that of an open
        // descriptor of `object`, which keeps owning it: the map behind it changes, and its type
        // and sizes are the same, as both objects come from the same file.
        let replaced = unsafe { dup3_raw(map, number, OFlag::O_CLOEXEC) };
        // The object still owns the number.
        let _ = replaced.map_err(|error| io_error(error.into()))?.into_raw_fd();
        Ok(())
    }

    /// The kernel's number of a form, if it is loaded.
    pub(super) fn id(&self, name: &str) -> Option<u32> {
        self.loaded.get(name)?.id
    }

    /// Loads a form, unless it is loaded already.
    fn load(&mut self, name: &'static str) -> Result<(), Error> {
        if self.loaded.contains_key(name) {
            return Ok(());
        }
        if let Some(error) = self.refused.get(name) {
            return Err(Error::Earlier(Arc::clone(error)));
        }
        let object = self.object.as_mut().ok_or(Error::Missing(name))?;
        match object.program_mut(name) {
            Some(Program::Xdp(xdp)) => xdp.load(),
            Some(Program::SchedClassifier(tc)) => tc.load(),
            _ => return Err(Error::Missing(name)),
        }
        .map_err(refused)?;
        let program = object.program(name).ok_or(Error::Missing(name))?;
        let fd = program.fd().map_err(program_error)?.as_fd().try_clone_to_owned().map_err(io_error)?;
        let id = program.info().ok().map(|info| info.id());
        self.loaded.insert(name, Form { fd, id });
        Ok(())
    }
}

impl KernelProgram {
    /// Loads the form of the program for this way, unless it is loaded already. Returns its
    /// descriptor.
    pub(super) fn prepare(&mut self, mode: AttachedMode) -> Result<BorrowedFd<'_>, Error> {
        let mut failure = Error::Missing(name::XDP);
        let mut loaded = None;
        for &name in mode.programs() {
            match self.forms.load(name) {
                Ok(()) => {
                    loaded = Some(name);
                    break;
                }
                Err(error) => failure = error,
            }
        }
        let form = loaded.and_then(|name| self.forms.loaded.get(name)).ok_or(failure)?;
        Ok(form.fd.as_fd())
    }

    /// Loads all forms that this mode may attach, and no other one later. From then on attaching
    /// takes no capability.
    ///
    /// # Errors
    /// The kernel refuses each of them; the error is about the first one. Forms that it refuses
    /// beside others are reported when they are to be attached.
    pub fn load_forms(&mut self, mode: Mode) -> Result<(), Error> {
        let (mut refused, mut first) = (BTreeMap::new(), None);
        for &way in mode.all_ways() {
            for &name in way.programs() {
                let Err(error) = self.forms.load(name) else {
                    // The next one only stands in for it.
                    break;
                };
                let error = Arc::new(error);
                first = first.or_else(|| Some(Arc::clone(&error)));
                refused.insert(name, error);
            }
        }
        self.forms.refused = refused;
        self.forms.object = None;
        match first {
            Some(error) if self.forms.loaded.is_empty() => Err(Error::Earlier(error)),
            Some(_) | None => Ok(()),
        }
    }
}

/// The descriptor of a map, if it is of a kind that the program has.
fn descriptor(map: &Map) -> Option<BorrowedFd<'_>> {
    #[allow(clippy::wildcard_enum_match_arm, reason = "no other kinds are in the object")]
    match map {
        Map::Array(map) | Map::PerCpuArray(map) | Map::HashMap(map) | Map::LruHashMap(map) | Map::RingBuf(map) => {
            Some(map.fd().as_fd())
        }
        _ => None,
    }
}

/// For `map_err`: the process has no descriptor left.
pub(super) fn io_error(error: io::Error) -> Error {
    program_error(ProgramError::IOError(error))
}
