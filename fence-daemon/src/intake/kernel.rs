//! The kernel program: loads it, fills its maps, attaches and reads it.
//!
//! Nothing is pinned. This process alone holds the attachment, a bpf_link, so the interface is free
//! again when the process ends, however it ends.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use aya::maps::{Array, Map, MapData, MapError, RingBuf};
use aya::programs::ProgramError;
use fence_common::boundary::{ABI_VERSION, Config, KEY_SLOT_ACTIVE, Listener, name};
use fence_common::digest::{KeySlot, PreparedKey};
use fence_common::key::Key;
use fence_net::interface::Interface;

use self::memory::Heart;

mod config;
mod counters;
mod error;
mod forms;
mod interface;
mod keys;
mod memory;
mod oldest;
mod ring;
mod senders;
mod shared;

pub use config::ConfigMap;
pub use counters::CounterReader;
pub use error::Error;
pub use interface::{Occupant, Sharer, Vlans};
pub use keys::KeyMap;
pub use memory::Memory;
pub use oldest::OLDEST;
pub use ring::Ring;
pub use shared::SharedLimits;

use forms::Forms;
use interface::Surroundings;

/// How the program is to be attached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// In the driver of hardware, as XDP in the network stack on a bridge, and as tc elsewhere; in
    /// another way where that fails or would mistake VLANs.
    #[default]
    Auto,
    /// As [`Mode::Auto`], but not in the driver. Many network cards reset when a program is
    /// attached there, and the configuration does not name this interface.
    Gentle,
    /// In the driver or not at all.
    Native,
    /// In the network stack as XDP, on any device.
    Generic,
    /// In the network stack as tc, on any device. Linux 6.6 and later.
    Tcx,
}

impl Mode {
    /// The ways to try on an interface, the best one first.
    ///
    /// Bridges have no native XDP. veth and tap devices do, but lose their offloads with it: see
    /// docs/measured/bystanders.md.
    fn ways(self, around: &Surroundings) -> &'static [AttachedMode] {
        match self {
            Self::Auto if around.hardware => &[AttachedMode::Native, AttachedMode::Tcx, AttachedMode::Generic],
            Self::Auto | Self::Gentle if around.bridge => &[AttachedMode::Generic, AttachedMode::Tcx],
            Self::Auto | Self::Gentle => &[AttachedMode::Tcx, AttachedMode::Generic],
            Self::Native => &[AttachedMode::Native],
            Self::Generic => &[AttachedMode::Generic],
            Self::Tcx => &[AttachedMode::Tcx],
        }
    }
}

/// How the program is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, strum::Display)]
#[strum(serialize_all = "lowercase")]
pub enum AttachedMode {
    /// In the driver.
    Native,
    /// In the network stack as XDP. The stack must first copy each packet into one piece.
    Generic,
    /// In the network stack as tc, by tcx.
    Tcx,
}

impl AttachedMode {
    /// The programs that can be attached in this way, the better one first. Drivers on kernels
    /// before Linux 5.18 reject the first one. With the second one, drivers limit the MTU.
    fn programs(self) -> &'static [&'static str] {
        match self {
            Self::Native => &[name::XDP_FRAGS, name::XDP],
            Self::Generic => &[name::XDP],
            Self::Tcx => &[name::TC],
        }
    }
}

/// What came of attaching.
#[derive(Debug)]
pub struct Attachment {
    /// The way.
    pub mode: AttachedMode,
    /// Why it is not the best way: another program is attached, the kernel refuses XDP, or XDP
    /// would mistake VLANs.
    pub second_best: Option<Error>,
}

/// The program in its two forms, XDP and tc, over the same maps. Dropping it detaches both. The
/// maps are freed once a [`Ring`] taken from it is dropped too.
///
/// The kernel's verifier is slow, so each form is loaded when it is first attached, or by
/// [`load_forms`](Self::load_forms) while this process may.
#[derive(Debug)]
pub struct KernelProgram {
    forms: Forms,
    counters: Map,
    ring: Option<(Map, Map)>,
    memory: Option<(Map, Map)>,
    keys: Option<Map>,
    /// By the number of the interface.
    links: BTreeMap<u32, ProgramLink>,
}

/// An attachment, which ends when its descriptor is closed.
#[derive(Debug)]
struct ProgramLink {
    fd: OwnedFd,
    mode: AttachedMode,
    /// What was tried, the best way first.
    ways: Vec<AttachedMode>,
    /// Whether a better way should be tried again.
    second_best: bool,
}

/// What is being loaded.
struct Loading(Forms);

impl KernelProgram {
    /// Creates the maps and fills them. The program sees no packet before [`attach`](Self::attach).
    ///
    /// Without a key the program drops every request that carries a digest. That is right only if
    /// the configuration says `none`.
    ///
    /// # Errors
    /// [`Error::NotPermitted`], [`Error::Object`], [`Error::Missing`], [`Error::Abi`] or
    /// [`Error::Map`]: nothing is loaded then.
    pub fn load(object: &[u8], listener: &Listener, key: Option<&Key>) -> Result<Self, Error> {
        let mut loading = Loading(Forms::new(object)?);
        loading.check_abi()?;
        if let Some(key) = key {
            loading.write_key(&PreparedKey::new(key))?;
        }
        // The configuration comes last: the program passes everything until it is there.
        let config: [u8; size_of::<Config>()] = zerocopy::transmute!(Config::new(listener));
        loading.write(name::CONFIG, 0, &config)?;
        loading.finish()
    }

    /// Attaches the program to an interface, by bpf_link only. If it is attached there already, but
    /// not in the best way, better ones are tried. The old attachment stays until the new one
    /// exists.
    ///
    /// # Errors
    /// [`Error::NoInterface`], [`Error::Shared`], [`Error::Vlans`], [`Error::Occupied`],
    /// [`Error::Attach`], or what the verifier says: the program is not attached there then.
    pub fn attach(&mut self, interface: &str, mode: Mode) -> Result<Attachment, Error> {
        self.attach_by(interface, |around| mode.ways(around))
    }

    /// As [`attach`](Self::attach), in the first of these ways that works.
    ///
    /// # Errors
    /// As [`attach`](Self::attach).
    pub fn attach_in(&mut self, interface: &str, ways: &[AttachedMode]) -> Result<Attachment, Error> {
        self.attach_by(interface, |_| ways)
    }

    fn attach_by<'w>(
        &mut self,
        interface: &str,
        wanted: impl FnOnce(&Surroundings) -> &'w [AttachedMode],
    ) -> Result<Attachment, Error> {
        let index = nix::net::if_::if_nametoindex(interface)
            .map_err(|_| Error::NoInterface { interface: interface.to_owned() })?;
        let refusal = |mode, source| Error::Attach { interface: interface.to_owned(), mode, source };
        let around = match Surroundings::of(interface, index) {
            Ok(around) => around,
            Err(source) => {
                // If the kernel does not tell, an attachment stays.
                let present = self.links.get(&index).map(|link| Attachment { mode: link.mode, second_best: None });
                return present.ok_or_else(|| refusal(AttachedMode::Generic, source));
            }
        };
        let wanted = wanted(&around);
        if let Some(sharer) = around.sharer {
            self.detach(index);
            return Err(Error::Shared { interface: interface.to_owned(), sharer });
        }
        let ways = Vlans::leave(around.vlans.as_ref(), wanted);
        let mut reason = around
            .vlans
            .filter(|_| ways.first() != wanted.first())
            .map(|vlans| Error::Vlans { interface: interface.to_owned(), vlans });
        let present = self.links.get(&index);
        if let Some(link) = present.filter(|link| link.ways == ways && !link.second_best) {
            return Ok(Attachment { mode: link.mode, second_best: None });
        }
        let present = present.map(|link| link.mode);
        let mut failure = None;
        for &mode in &ways {
            let linked = if present == Some(mode) { Ok(None) } else { self.link(index, mode).map(Some) };
            match linked {
                Ok(fd) => {
                    let second_best = reason.is_some();
                    let fd = fd.or_else(|| self.links.remove(&index).map(|link| link.fd));
                    let link = fd.map(|fd| ProgramLink { fd, mode, ways, second_best });
                    self.links.extend(link.map(|link| (index, link)));
                    return Ok(Attachment { mode, second_best: reason });
                }
                Err(Linking::Rejected(source)) if interface::is_occupied(&source) => {
                    // Who is there must be named.
                    let occupant = Occupant::of(index);
                    reason = Some(Error::Occupied { interface: interface.to_owned(), occupant });
                }
                Err(error) => {
                    let error = match error {
                        Linking::Rejected(source) => refusal(mode, source),
                        Linking::NotLoaded(error) => error,
                    };
                    tracing::debug!(interface, way = %mode, %error, "not attached in this way");
                    // A driver that lacks XDP, and a kernel that lacks tcx, are no news.
                    let slot = if mode == AttachedMode::Generic { &mut reason } else { &mut failure };
                    *slot = Some(error);
                }
            }
        }
        self.detach(index);
        Err(reason.or(failure).unwrap_or(Error::Missing(name::XDP)))
    }

    /// Loads the program if need be, and makes the link.
    fn link(&mut self, interface: u32, mode: AttachedMode) -> Result<OwnedFd, Linking> {
        let program = self.prepare(mode).map_err(Linking::NotLoaded)?;
        interface::link(program, interface, mode).map_err(Linking::Rejected)
    }

    /// Detaches the program from the interface with this index. The ring buffer's content stays
    /// readable.
    pub fn detach(&mut self, interface: u32) {
        // The link goes with its last descriptor.
        self.links.remove(&interface);
    }

    /// Whether the program is attached to the interface with this index.
    ///
    /// It no longer is if the interface was deleted or somebody detached the program. Call
    /// [`detach`](Self::detach) then before attaching again.
    #[must_use]
    pub fn is_attached_to(&self, interface: u32) -> bool {
        let Some(link) = self.links.get(&interface) else { return false };
        match interface::attached_to(link.fd.as_fd()) {
            Ok(index) => index == Some(interface),
            Err(error) => {
                tracing::debug!("the kernel does not tell what a link is attached to: {error}");
                false
            }
        }
    }

    /// Who else needs the frames of an interface and would miss those that the program takes.
    ///
    /// # Errors
    /// The kernel does not tell.
    pub fn sharer(interface: &Interface) -> io::Result<Option<Sharer>> {
        Surroundings::of(&interface.name, interface.index).map(|around| around.sharer)
    }

    /// The reading end of the ring buffer. `None` the second time: there is one reader.
    ///
    /// # Errors
    /// [`Error::Map`] if it cannot be mapped.
    pub fn take_ring(&mut self) -> Result<Option<Ring>, Error> {
        let Some((ring, heart)) = self.ring.take() else { return Ok(None) };
        let ring = RingBuf::try_from(ring).map_err(map_error(name::REQUESTS))?;
        Ok(Some(Ring { ring, heart: Heart::new(heart)? }))
    }

    /// The program's maps of datagrams and senders, to be filled before the program is attached.
    /// `None` the second time.
    ///
    /// # Errors
    /// [`Error::Map`].
    pub fn take_memory(&mut self) -> Result<Option<Memory>, Error> {
        self.memory.take().map(|(replay_cache, trusted)| Memory::new(replay_cache, trusted)).transpose()
    }

    /// The slots for keys, which may be written at any time. `None` the second time.
    ///
    /// # Errors
    /// [`Error::Map`] if the map is not as expected.
    pub fn take_keys(&mut self) -> Result<Option<KeyMap>, Error> {
        let Some(map) = self.keys.take() else { return Ok(None) };
        Array::try_from(map).map(|map| Some(KeyMap(map))).map_err(map_error(name::KEYS))
    }

    /// The ID of the loaded form that this mode attaches, for `bpftool prog show id`. `None` before
    /// it is loaded.
    #[must_use]
    pub fn id(&self, mode: AttachedMode) -> Option<u32> {
        mode.programs().iter().find_map(|name| self.forms.id(name))
    }
}

/// Why there is no link.
enum Linking {
    NotLoaded(Error),
    Rejected(io::Error),
}

fn program_error(error: ProgramError) -> Error {
    Error::Program(Box::new(error))
}

/// A handle of a map for its reader or writer.
fn handle(forms: &Forms, name: &'static str) -> Result<Map, Error> {
    let copy = forms.map(name)?.try_clone_to_owned().map_err(forms::io_error)?;
    MapData::from_fd(copy).and_then(Map::from_map_data).map_err(map_error(name))
}

impl Loading {
    /// What stays.
    fn finish(self) -> Result<KernelProgram, Error> {
        let counters = handle(&self.0, name::COUNTERS)?;
        let ring = Some((handle(&self.0, name::REQUESTS)?, handle(&self.0, name::HEARTBEAT)?));
        let memory = Some((handle(&self.0, name::REPLAY)?, handle(&self.0, name::TRUSTED)?));
        let keys = Some(handle(&self.0, name::KEYS)?);
        Ok(KernelProgram { forms: self.0, counters, ring, memory, keys, links: BTreeMap::new() })
    }

    fn check_abi(&self) -> Result<(), Error> {
        let map = Array::<_, u32>::try_from(handle(&self.0, name::ABI)?).map_err(map_error(name::ABI))?;
        match map.get(&0, 0).map_err(map_error(name::ABI))? {
            ABI_VERSION => Ok(()),
            other => Err(Error::Abi(other)),
        }
    }

    /// Writes the key into the map. Only the kernel keeps a copy.
    fn write_key(&mut self, key: &PreparedKey) -> Result<(), Error> {
        let bytes: &[u8; size_of::<KeySlot>()] = zerocopy::transmute_ref!(key.dangerous_slot());
        self.write(name::KEYS, KEY_SLOT_ACTIVE, bytes)
    }

    /// Writes one element of an array. The kernel reads the bytes in place, so no copy of a key
    /// remains.
    fn write<const LEN: usize>(&mut self, name: &'static str, index: u32, bytes: &[u8; LEN]) -> Result<(), Error> {
        let mut map = Array::<_, [u8; LEN]>::try_from(handle(&self.0, name)?).map_err(map_error(name))?;
        map.set(index, bytes, 0).map_err(map_error(name))
    }
}

fn map_error(name: &'static str) -> impl Fn(MapError) -> Error {
    move |source| Error::Map { name, source: Box::new(source) }
}
