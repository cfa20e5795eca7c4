//! Section `listeners { multicast { } }`: the group to join, and how.

use std::net::IpAddr;
use std::path::PathBuf;

use fence_common::hash::HashKind;
use fence_common::wire::{DEFAULT_GROUP_V4, DEFAULT_GROUP_V6};
use strum::{IntoStaticStr, VariantArray};

use super::choices::{self, choice};
use super::contents::{Contents, Findings, Scope};
use super::error::Mistake;
use super::listener::{digest, family, interface, port};
use super::listeners::KeyFiles;
use super::raw::clip;
use super::resolved::{NOTHING, absolute, on_or_off, read};
use super::settings::Alone;

pub(super) const MULTICAST: Scope<'static> = Scope {
    keys: &[
        "key_file",
        "key_file2",
        "interface",
        "port",
        "family",
        "address",
        "hash",
        "auth",
        "attach",
        "strict_source",
        "alone",
    ],
    ..NOTHING
};
/// Section `listeners { multicast { } }`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Multicast {
    /// The name of the section; `None` for the one that fence_virtd knows.
    pub name: Option<String>,
    /// The interface to listen on; `None` for every one that can multicast.
    pub interface: Option<String>,
    /// The group to join. Its family decides the family of everything else.
    pub group: IpAddr,
    /// The UDP port, never 0.
    pub port: u16,
    /// The weakest digest that a request may carry.
    pub hash: HashKind,
    /// The digest of the callback's challenges and responses.
    pub auth: HashKind,
    /// The shared key's file, as an absolute path.
    pub key_file: PathBuf,
    /// The file of a second key that is accepted too, as an absolute path. The file may be missing.
    pub key_file2: Option<PathBuf>,
    /// How the kernel program is attached.
    pub attach: Attach,
    /// Whether an IPv4 request's callback address must be the datagram's source.
    pub strict_source: bool,
    /// Whether no other hypervisor hears the requests.
    pub alone: Alone,
}

impl Multicast {
    /// Whether anything is signed or verified. If so, the daemon does not start without a key.
    #[must_use]
    pub fn needs_key(&self) -> bool {
        self.hash != HashKind::None || self.auth != HashKind::None
    }

    /// The files of its key, whether it needs one or not.
    #[must_use]
    pub fn key_files(&self) -> KeyFiles {
        KeyFiles { first: self.key_file.clone(), second: self.key_file2.clone() }
    }

    /// Whether both hear the same group at the same port. Then each must have an interface of its
    /// own, to which its socket is bound.
    #[must_use]
    pub fn shares_group(&self, other: &Self) -> bool {
        (self.group, self.port) == (other.group, other.port)
    }
}

/// How the kernel program is attached to the interface.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, IntoStaticStr, VariantArray)]
#[strum(serialize_all = "lowercase")]
pub enum Attach {
    /// The way that costs other traffic least, of those that the device and the kernel support.
    #[default]
    Auto,
    /// XDP in the driver, or not at all.
    Native,
    /// Generic XDP, or not at all.
    Generic,
    /// A tc program by tcx, or not at all.
    Tcx,
    /// Not at all: requests come through the socket alone.
    Off,
}

impl Attach {
    /// The name in the configuration file.
    #[must_use]
    pub fn name(self) -> &'static str {
        self.into()
    }
}

/// The default key file of fence_virtd and fence_xvm.
pub const KEY_FILE: &str = "/etc/cluster/fence_xvm.key";

/// Reads the section of this name.
pub(super) fn multicast(name: Option<String>, section: &Contents<'_>, findings: &mut Findings<'_>) -> Multicast {
    let (interface, port) = (interface(section, findings), port(section, findings));
    let attach = choice(section, "attach", findings);
    let strict_source = read(section.get("strict_source"), true, findings, |text| {
        on_or_off(text).ok_or_else(|| Mistake::Switch { key: "strict_source", value: clip(text) })
    });
    let key_file = absolute(section.get("key_file").map_or(KEY_FILE, |item| item.value.value));
    let key_file2 = section.get("key_file2").map(|item| absolute(item.value.value));
    let group = group_address(section, findings);
    let (hash, auth) = (digest("hash", section, findings), digest("auth", section, findings));
    let alone = choices::alone(section, findings);
    Multicast { name, interface, group, port, hash, auth, key_file, key_file2, attach, strict_source, alone }
}

/// The group that `family` and `address` mean together.
fn group_address(section: &Contents<'_>, findings: &mut Findings<'_>) -> IpAddr {
    let family_is_v4 = family(section, findings);
    let default = if family_is_v4 == Some(false) { DEFAULT_GROUP_V6.into() } else { DEFAULT_GROUP_V4.into() };
    read(section.get("address"), default, findings, |text| {
        let address: IpAddr = text.trim().parse().map_err(|_| Mistake::Address(clip(text)))?;
        if !address.is_multicast() {
            return Err(Mistake::NotMulticast(address));
        }
        if family_is_v4.is_some_and(|v4| v4 != address.is_ipv4()) {
            return Err(Mistake::OtherFamily(address));
        }
        Ok(address)
    })
}
