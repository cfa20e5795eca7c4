//! The kernel program: loaded, its maps filled, attached, read, and gone when its owner is.
//!
//! Nothing is pinned and the attachment is a bpf_link held by this process alone, so the interface is free again when the
//! process ends, however it ends.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use aya::maps::{Array, Map, MapData, MapError, PerCpuArray, RingBuf};
use aya::programs::{ProgramError, Xdp};
use aya::{Ebpf, EbpfError, EbpfLoader};
use fence_common::boundary::{ABI_VERSION, Config, Event, EventError, KEY_SLOT_ACTIVE, Listener, name};
use fence_common::digest::{KeySlot, PreparedKey};
use fence_common::key::Key;
use fence_common::verdict::{COUNTERS, Counters};

use self::memory::Heart;
use super::interface::Interface;
use crate::clock::Moment;

mod interface;
mod keys;
mod memory;
mod oldest;

pub use interface::{Occupant, Sharer};
pub use keys::KeyMap;
pub use memory::Memory;
pub use oldest::OLDEST;

/// How the program is to be attached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// In the driver if it can, else generic.
    #[default]
    Auto,
    /// In the driver or not at all.
    Native,
    /// In the network stack, on any device.
    Generic,
}

/// How the program is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttachedMode {
    /// In the driver.
    Native,
    /// In the network stack.
    Generic,
}

impl fmt::Display for AttachedMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Native => "native",
            Self::Generic => "generic",
        })
    }
}

/// Why there is no program in the way of the datagrams. None of these is fatal: the socket serves without it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Ours, or a kernel that lacks something: the object or its maps could not be created.
    #[error("the kernel program's object cannot be loaded")]
    Object(#[source] Box<EbpfError>),
    /// The administrator's: whoever started the daemon kept the right to use BPF from it.
    #[error(
        "BPF is not permitted here: it takes CAP_BPF and CAP_NET_ADMIN, and no container or security module that refuses it"
    )]
    NotPermitted(#[source] io::Error),
    /// Ours: the object is not the one that belongs to this daemon.
    #[error("the object has no {0}: it is not this daemon's kernel program")]
    Missing(&'static str),
    /// Ours: the object was built with another version of the boundary.
    #[error(
        "the kernel program speaks version {0} of the boundary, this daemon version {ABI_VERSION}: install both from one build"
    )]
    Abi(u32),
    /// A map refused to be read or written.
    #[error("the map {name} cannot be used")]
    Map {
        /// Which map.
        name: &'static str,
        /// What the kernel said.
        #[source]
        source: Box<MapError>,
    },
    /// Ours, or the kernel's: its verifier finds something to say against the program.
    #[error("the kernel refuses the program: {reason}")]
    Refused {
        /// The verifier's last words. The whole log goes to the debug messages.
        reason: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The program cannot be used.
    #[error("the kernel program cannot be used")]
    Program(#[source] Box<ProgramError>),
    /// The administrator's: no such interface.
    #[error("there is no interface {interface:?}")]
    NoInterface {
        /// Its name as configured.
        interface: String,
    },
    /// The administrator's: somebody else's XDP program is on the interface.
    #[error("interface {interface} already has an XDP program: {occupant}")]
    Occupied {
        /// The interface's name.
        interface: String,
        /// Who is there.
        occupant: Occupant,
    },
    /// The administrator's choice of an interface: what the program takes out there, others would miss.
    #[error("what comes by interface {interface} is also for {sharer}")]
    Shared {
        /// The interface's name.
        interface: String,
        /// Who else gets it.
        sharer: Sharer,
    },
    /// The kernel refuses the attachment.
    #[error("the program cannot be attached to interface {interface} ({mode})")]
    Attach {
        /// The interface's name.
        interface: String,
        /// The mode that was refused last.
        mode: AttachedMode,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// It is attached already; one program serves one interface.
    #[error("the program is attached already")]
    Attached,
}

/// The loaded program. Dropping it detaches the program and frees its maps, once a [`Ring`] taken from it is gone too.
///
/// The kernel keeps the maps as long as the program; what the loader knows of both is not needed any more, and not small.
#[derive(Debug)]
pub struct KernelProgram {
    program: OwnedFd,
    id: u32,
    counters: Map,
    ring: Option<(Map, Map)>,
    memory: Option<(Map, Map)>,
    keys: Option<Map>,
    link: Option<OwnedFd>,
}

/// What is being loaded.
struct Loading(Ebpf);

impl KernelProgram {
    /// Loads the program and fills its maps. It sees no packet before [`attach`](Self::attach).
    ///
    /// Without a key every request that carries a digest is refused; that is right only where the configuration says `none`.
    ///
    /// # Errors
    /// [`Error::NotPermitted`], [`Error::Object`], [`Error::Missing`], [`Error::Abi`], [`Error::Map`] [`Error::Refused`] or
    /// [`Error::Program`]: nothing is loaded then.
    pub fn load(object: &[u8], listener: &Listener, key: Option<&Key>) -> Result<Self, Error> {
        // The ELF reader wants aligned bytes: the allocator's are, an included file's need not be.
        let aligned = object.to_vec();
        let ebpf = EbpfLoader::new()
            .btf(None)
            .load(&aligned)
            .map_err(|error| not_permitted(&error).unwrap_or_else(|| Error::Object(Box::new(error))))?;
        let mut loading = Loading(ebpf);
        loading.check_abi()?;
        if let Some(key) = key {
            loading.write_key(&PreparedKey::new(key))?;
        }
        // The configuration last: until it is there the program lets everything pass.
        let config: [u8; size_of::<Config>()] = zerocopy::transmute!(Config::new(listener));
        loading.write(name::CONFIG, 0, &config)?;
        loading.xdp()?.load().map_err(refused)?;
        loading.finish()
    }

    /// Attaches the program to an interface, by bpf_link and in no other way.
    ///
    /// # Errors
    /// [`Error::NoInterface`], [`Error::Shared`], [`Error::Occupied`], [`Error::Attach`]; [`Error::Attached`] where it is attached already.
    pub fn attach(&mut self, interface: &str, mode: Mode) -> Result<AttachedMode, Error> {
        if self.link.is_some() {
            return Err(Error::Attached);
        }
        let index = nix::net::if_::if_nametoindex(interface)
            .map_err(|_| Error::NoInterface { interface: interface.to_owned() })?;
        match Sharer::of(interface, index) {
            Ok(None) => {}
            Ok(Some(sharer)) => return Err(Error::Shared { interface: interface.to_owned(), sharer }),
            Err(source) => {
                let interface = interface.to_owned();
                return Err(Error::Attach { interface, mode: AttachedMode::Native, source });
            }
        }
        let fd = &self.program;
        let (attached, link) = match mode {
            Mode::Native => (AttachedMode::Native, interface::link(fd.as_fd(), index, AttachedMode::Native)),
            Mode::Generic => (AttachedMode::Generic, interface::link(fd.as_fd(), index, AttachedMode::Generic)),
            Mode::Auto => match interface::link(fd.as_fd(), index, AttachedMode::Native) {
                // Who is there does not leave for generic mode either, and must be named.
                Err(error) if !interface::is_occupied(&error) => {
                    tracing::debug!(interface, %error, "no native XDP, trying generic");
                    (AttachedMode::Generic, interface::link(fd.as_fd(), index, AttachedMode::Generic))
                }
                native => (AttachedMode::Native, native),
            },
        };
        match link {
            Ok(link) => {
                self.link = Some(link);
                Ok(attached)
            }
            Err(error) if interface::is_occupied(&error) => {
                Err(Error::Occupied { interface: interface.to_owned(), occupant: Occupant::of(index) })
            }
            Err(source) => Err(Error::Attach { interface: interface.to_owned(), mode: attached, source }),
        }
    }

    /// Takes the program off its interface; what is in the ring buffer stays readable.
    pub fn detach(&mut self) {
        // The link goes with its last descriptor.
        self.link = None;
    }

    /// The number of the interface that the program is on. `None` also where it was, and the interface was deleted or somebody has
    /// detached the program: [`detach`](Self::detach) it then before it is attached again.
    #[must_use]
    pub fn attached_to(&self) -> Option<u32> {
        let link = self.link.as_ref()?;
        match interface::attached_to(link.as_fd()) {
            Ok(index) => index,
            Err(error) => {
                tracing::debug!("the kernel does not tell what a link is attached to: {error}");
                None
            }
        }
    }

    /// Who else gets what comes by an interface, and would miss what the program takes out there.
    ///
    /// # Errors
    /// The kernel does not tell.
    pub fn sharer(interface: &Interface) -> io::Result<Option<Sharer>> {
        Sharer::of(&interface.name, interface.index)
    }

    /// The counters of all CPUs together.
    ///
    /// # Errors
    /// [`Error::Map`].
    pub fn counters(&self) -> Result<Counters, Error> {
        let mut sum = Counters::default();
        let map = PerCpuArray::<_, [u64; COUNTERS]>::try_from(&self.counters).map_err(map_error(name::COUNTERS))?;
        for cpu in map.get(&0, 0).map_err(map_error(name::COUNTERS))?.iter() {
            sum.add(zerocopy::transmute_ref!(cpu));
        }
        Ok(sum)
    }

    /// The reading end of the ring buffer. `None` the second time: there is one reader.
    ///
    /// # Errors
    /// [`Error::Map`] where it cannot be mapped.
    pub fn take_ring(&mut self) -> Result<Option<Ring>, Error> {
        let Some((ring, heart)) = self.ring.take() else { return Ok(None) };
        let ring = RingBuf::try_from(ring).map_err(map_error(name::REQUESTS))?;
        Ok(Some(Ring { ring, heart: Heart::new(heart)? }))
    }

    /// What the program knows of datagrams and their senders, to be filled before it is attached. `None` the second time.
    ///
    /// # Errors
    /// [`Error::Map`].
    pub fn take_memory(&mut self) -> Result<Option<Memory>, Error> {
        self.memory.take().map(|(seen, trusted)| Memory::new(seen, trusted)).transpose()
    }

    /// The slots for keys, which may be written at any time. `None` the second time.
    ///
    /// # Errors
    /// [`Error::Map`] where the map is not what it should be.
    pub fn take_keys(&mut self) -> Result<Option<KeyMap>, Error> {
        let Some(map) = self.keys.take() else { return Ok(None) };
        Array::try_from(map).map(|map| Some(KeyMap(map))).map_err(map_error(name::KEYS))
    }

    /// The program's number in the kernel, as `bpftool prog show id` wants it.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.id
    }
}

impl Loading {
    /// What stays.
    fn finish(mut self) -> Result<KernelProgram, Error> {
        let program_error = |error: ProgramError| Error::Program(Box::new(error));
        let program = self.xdp()?;
        let id = program.info().map_err(program_error)?.id();
        let program = program.fd().map_err(program_error)?.as_fd().try_clone_to_owned();
        let program = program.map_err(|error| program_error(ProgramError::IOError(error)))?;
        let mut map = |name| self.0.take_map(name).ok_or(Error::Missing(name));
        let counters = map(name::COUNTERS)?;
        let ring = Some((map(name::REQUESTS)?, map(name::HEARTBEAT)?));
        let memory = Some((map(name::SEEN)?, map(name::TRUSTED)?));
        let keys = Some(map(name::KEYS)?);
        Ok(KernelProgram { program, id, counters, ring, memory, keys, link: None })
    }

    fn xdp(&mut self) -> Result<&mut Xdp, Error> {
        let program = self.0.program_mut(name::XDP).ok_or(Error::Missing(name::XDP))?;
        program.try_into().map_err(|error| Error::Program(Box::new(error)))
    }

    fn check_abi(&self) -> Result<(), Error> {
        let map = self.0.map(name::ABI).ok_or(Error::Missing(name::ABI))?;
        let map = Array::<_, u32>::try_from(map).map_err(map_error(name::ABI))?;
        match map.get(&0, 0).map_err(map_error(name::ABI))? {
            ABI_VERSION => Ok(()),
            other => Err(Error::Abi(other)),
        }
    }

    /// Writes the key into the map; the only copy that stays is the kernel's.
    fn write_key(&mut self, key: &PreparedKey) -> Result<(), Error> {
        let bytes: &[u8; size_of::<KeySlot>()] = zerocopy::transmute_ref!(key.dangerous_slot());
        self.write(name::KEYS, KEY_SLOT_ACTIVE, bytes)
    }

    /// Writes one element of an array. The bytes are handed to the kernel where they lie: no copy of a key is left behind.
    fn write<const LEN: usize>(&mut self, name: &'static str, index: u32, bytes: &[u8; LEN]) -> Result<(), Error> {
        let map: &mut Map = self.0.map_mut(name).ok_or(Error::Missing(name))?;
        let mut map = Array::<_, [u8; LEN]>::try_from(map).map_err(map_error(name))?;
        map.set(index, bytes, 0).map_err(map_error(name))
    }
}

/// The error that says what is missing, if somewhere below this one is the kernel's `EPERM`.
fn not_permitted(error: &(dyn std::error::Error + 'static)) -> Option<Error> {
    let mut causes = std::iter::successors(Some(error), |cause| cause.source());
    let denied = causes.any(|cause| {
        cause.downcast_ref::<io::Error>().is_some_and(|error| error.raw_os_error() == Some(nix::libc::EPERM))
    });
    denied.then(|| Error::NotPermitted(io::Error::from_raw_os_error(nix::libc::EPERM)))
}

fn refused(error: ProgramError) -> Error {
    if let ProgramError::LoadError { io_error, verifier_log } = error {
        return refused_by(io_error, &verifier_log.to_string());
    }
    not_permitted(&error).unwrap_or_else(|| Error::Program(Box::new(error)))
}

/// Why the program was not loaded. The verifier's log may have thousands of lines; the last ones say what it did not like.
fn refused_by(io_error: io::Error, log: &str) -> Error {
    let reason = last_words(log);
    // Without CAP_PERFMON it refuses some arithmetic, by EACCES, as it does for anything else.
    if io_error.raw_os_error() == Some(nix::libc::EPERM) || reason.ends_with("prohibited for !root") {
        return Error::NotPermitted(io_error);
    }
    tracing::debug!("the verifier says: {log}");
    Error::Refused { reason, source: io_error }
}

/// The last line of a verifier's log that is not statistics.
fn last_words(log: &str) -> String {
    let statistics = ["processed ", "verification time ", "stack depth "];
    let mut lines = log.lines().map(str::trim).rev();
    let line = lines.find(|line| !line.is_empty() && !statistics.iter().any(|start| line.starts_with(start)));
    line.unwrap_or("it does not say why").chars().take(200).collect()
}

fn map_error(name: &'static str) -> impl Fn(MapError) -> Error {
    move |source| Error::Map { name, source: Box::new(source) }
}

/// Verified requests as the kernel program hands them over. Readable (`poll`, `AsyncFd`) when there is one.
pub struct Ring {
    ring: RingBuf<MapData>,
    heart: Heart,
}

impl Ring {
    /// Tells the program that this ring buffer is read, at this time on the monotonic clock. When it has not been told for
    /// [`STALE_AFTER_NS`](fence_common::shield::STALE_AFTER_NS) it passes what it would have put in.
    pub fn beat(&mut self, now: Moment) {
        self.heart.beat(now.nanos());
    }

    /// The next request, if there is one now. After readiness, call it until it says `None`.
    ///
    /// An error is a record of somebody who is not our program; it is consumed, the next call goes on behind it.
    #[allow(clippy::should_implement_trait, reason = "an empty ring is not the end of it")]
    pub fn next(&mut self) -> Option<Result<Event, EventError>> {
        self.ring.next().map(|record| Event::decode(&record))
    }
}

impl AsRawFd for Ring {
    fn as_raw_fd(&self) -> RawFd {
        self.ring.as_raw_fd()
    }
}

impl AsFd for Ring {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.ring.as_fd()
    }
}

impl fmt::Debug for Ring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Ring").field(&self.as_raw_fd()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_verifiers_last_words_are_one_line_without_statistics() {
        let log = "0: R1=ctx()\n; a line of source\nR8 invalid mem access 'scalar'\nverification time 71 usec\nstack depth 16+0\nprocessed 137 insns (limit 1000000)\n\n";
        assert_eq!(last_words(log), "R8 invalid mem access 'scalar'");
        assert_eq!(last_words("processed 1 insns"), "it does not say why");
        assert_eq!(last_words(&"x".repeat(1000)).len(), 200);
    }

    #[test]
    fn a_missing_right_is_told_from_another_refusal() {
        let refused = |errno, log| refused_by(io::Error::from_raw_os_error(errno), log);
        let (eperm, eacces) = (nix::libc::EPERM, nix::libc::EACCES);
        assert!(matches!(refused(eperm, ""), Error::NotPermitted(_)));
        let log = "R8 pointer arithmetic with it prohibited for !root\nprocessed 137 insns";
        assert!(matches!(refused(eacces, log), Error::NotPermitted(_)));
        assert!(matches!(refused(eacces, "R8 is bad"), Error::Refused { reason, .. } if reason == "R8 is bad"));
    }
}
