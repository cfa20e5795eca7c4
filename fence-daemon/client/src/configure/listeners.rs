//! The questions about each listener that was chosen, in fence_virtd's order and by its labels.
//! vsock has no questions there.

use std::net::IpAddr;

use fence_common::wire::{DEFAULT_GROUP_V4, DEFAULT_GROUP_V6, DEFAULT_PORT};
use fence_config::{self as config, ListenerKind};
use fence_net::interface::Interface;
use fence_net::taker::Taker;

use super::ConfigureError;
use super::questions::{NOTHING, Question, Questions};
use super::values::{MULTICAST, SERIAL, TCP, VSOCK, check, check_key_file, check_uri};

const GROUP: &str = "\
Guests send their requests to this multicast group. Unless they run fence_xvm with -a, that is 225.0.0.12, or
ff05::3:1 over IPv6. The address decides which of the two families is used.";
const GROUP_PORT: &str = "\
The UDP port that guests send to, and the TCP port that they are called back at (fence_xvm -p).";
const INTERFACE: &str = "\
The interface that requests come from: the guests' bridge, virbr0 for libvirt's own network. Requests through other interfaces
are then ignored. `none`: every interface that is up.";
const KEY_FILE: &str = "\
Everyone who has this file's content can fence. Put the same file on this host and on every guest, and nowhere else.";
const TCP_ADDRESS: &str = "\
The address of this host that guests connect to (fence_virt -T), or its name. 0.0.0.0: every IPv4 address of this host; `::`:
every address.";
const TCP_PORT: &str = "\
The TCP port that guests connect to (fence_virt -p).";
const VSOCK_PORT: &str = "\
The vsock port that virtual machines connect to (fence_virt -S2 -p).";
const LINES_OF: &str = "\
The libvirt connection whose domains are heard by their serial ports. `none`: all that the backend has.";
const DIRECTORY: &str = "\
The sockets of the domains' serial ports are directly in this directory, as the domains' XML says. Others are left alone.
Only root and libvirt may have the right to write there.";
const MODE: &str = "\
Which devices of the domains have the sockets: `serial` ports, or `vmchannel` channels.";
const EVERYBODY: &str = "\
A serial line has no key, and the file has no groups that say which domain may fence which.";

/// The address that tcp listens at if neither the file nor an answer has one.
const EVERYWHERE: [&str; 2] = ["0.0.0.0", "::"];
/// The directory that the guide uses.
const LINES: &str = "/run/fence";

/// The listeners that `listener` names.
pub(super) struct Chosen(Vec<ListenerKind>);

impl Chosen {
    /// Those in the list that there are.
    pub(super) fn of(list: &str) -> Self {
        let is_named = |kind: &ListenerKind| list.split(',').any(|name| name.trim().eq_ignore_ascii_case(kind.name()));
        Self(ListenerKind::ALL.into_iter().filter(is_named).collect())
    }

    /// All of them.
    pub(super) fn all(&self) -> impl Iterator<Item = ListenerKind> {
        self.0.iter().copied()
    }

    /// The one that an option is for: the first that has such a key.
    pub(super) fn with_key(&self, option: &str) -> Option<ListenerKind> {
        self.all().find(|kind| keys(*kind).contains(&option))
    }
}

/// The section of a listener.
pub(super) fn section(kind: ListenerKind) -> &'static [&'static str] {
    match kind {
        ListenerKind::Multicast => MULTICAST,
        ListenerKind::Tcp => TCP,
        ListenerKind::Vsock => VSOCK,
        ListenerKind::Serial => SERIAL,
    }
}

/// The keys of a listener that options set.
fn keys(kind: ListenerKind) -> &'static [&'static str] {
    match kind {
        ListenerKind::Multicast | ListenerKind::Tcp => {
            &["interface", "port", "family", "address", "hash", "auth", "key-file"]
        }
        ListenerKind::Vsock => &["port", "hash", "auth", "key-file"],
        ListenerKind::Serial => &["path", "mode", "permit"],
    }
}

impl Questions<'_, '_> {
    /// Asks about a listener.
    pub(super) fn listener(&mut self, kind: ListenerKind, chosen: &Chosen) -> Result<(), ConfigureError> {
        let given = self.given;
        let option = |name: &'static str, value: &'_ Option<String>| {
            value.clone().filter(|_| chosen.with_key(name) == Some(kind)).map(|value| (name, value))
        };
        let port = option("port", &given.port);
        match kind {
            ListenerKind::Multicast => {
                self.group(chosen)?;
                self.plain(kind, "Multicast IP Port", GROUP_PORT, "port", &DEFAULT_PORT.to_string(), port)?;
                self.plain(kind, "Interface", INTERFACE, "interface", NOTHING, option("interface", &given.interface))?;
                self.no_interface()?;
                self.key_file(kind, chosen)?;
            }
            ListenerKind::Tcp => {
                self.tcp_address(option("family", &given.family), option("address", &given.address))?;
                self.plain(kind, "TCP Listen Port", TCP_PORT, "port", &DEFAULT_PORT.to_string(), port)?;
                if let Some((key, name)) = option("interface", &given.interface) {
                    self.document.set(TCP, key, &name);
                }
                self.key_file(kind, chosen)?;
            }
            ListenerKind::Vsock => {
                self.plain(kind, "VSOCK Listen Port", VSOCK_PORT, "port", &DEFAULT_PORT.to_string(), port)?;
                self.key_file(kind, chosen)?;
            }
            ListenerKind::Serial => {
                self.lines_of()?;
                self.plain(kind, "Socket directory", DIRECTORY, "path", LINES, option("path", &given.path))?;
                self.plain(kind, "Mode (serial or vmchannel)", MODE, "mode", "serial", option("mode", &given.mode))?;
            }
        }
        for (key, value) in [option("hash", &given.hash), option("auth", &given.auth)].into_iter().flatten() {
            self.document.set(section(kind), key, &value);
        }
        Ok(())
    }

    fn plain(
        &mut self,
        kind: ListenerKind,
        label: &'static str,
        about: &'static str,
        key: &'static str,
        fallback: &str,
        given: Option<(&'static str, String)>,
    ) -> Result<String, ConfigureError> {
        let given = given.as_ref().map(|(option, value)| (*option, value.as_str()));
        self.setting(&Question { label, about, section: section(kind), key, fallback, given })
    }

    /// Asks for the group, which decides the family: fence_virtd needs both for IPv6.
    fn group(&mut self, chosen: &Chosen) -> Result<(), ConfigureError> {
        let given = self.given;
        debug_assert_eq!(chosen.with_key("family"), Some(ListenerKind::Multicast), "the first one that has it");
        let old_family = self.document.get(MULTICAST, "family").map(str::to_owned);
        let wanted = given.family.clone();
        let fallback = match wanted.as_ref().or(old_family.as_ref()) {
            Some(family) if family.eq_ignore_ascii_case("ipv6") => IpAddr::from(DEFAULT_GROUP_V6).to_string(),
            _ => IpAddr::from(DEFAULT_GROUP_V4).to_string(),
        };
        let accept = |answer: &str| match &wanted {
            Some(family) => check(MULTICAST, &[("family", family), ("address", answer)]),
            None => check(MULTICAST, &[("address", answer)]),
        };
        // Another family needs another group than the file's.
        if wanted.is_some() && self.document.get(MULTICAST, "address").is_some_and(|old| accept(old).is_err()) {
            self.document.remove(MULTICAST, |name| name.eq_ignore_ascii_case("address"));
        }
        let given = given.address.as_deref().map(|address| ("address", address));
        let (label, about) = ("Multicast IP Address", GROUP);
        let question = Question { label, about, section: MULTICAST, key: "address", fallback: &fallback, given };
        let answer = self.settle(&question, accept)?;
        let family = if answer.contains(':') { "ipv6" } else { "ipv4" };
        if !self.given.yes {
            self.dialogue.say(&format!("That is {family}."))?;
        }
        // If nobody was asked, the administrator must resolve a contradiction in the old file.
        let decided = !self.given.yes || self.given.family.is_some() || self.given.address.is_some();
        if decided || old_family.is_none() {
            self.document.set(MULTICAST, "family", family);
        }
        self.document.set(MULTICAST, "address", &answer);
        Ok(())
    }

    /// Leaves the interface out if there is none, and tells what is wrong with it now.
    fn no_interface(&mut self) -> Result<(), ConfigureError> {
        let name = self.document.get(MULTICAST, "interface").unwrap_or(NOTHING);
        if name.eq_ignore_ascii_case(NOTHING) {
            // fence_virtd would look for an interface of that name.
            self.document.remove(MULTICAST, |key| key.eq_ignore_ascii_case("interface"));
        } else {
            match Interface::meant_by(name) {
                None => self.dialogue.say(&format!("There is no {name} here now: the daemon will wait for it."))?,
                Some(interface) => {
                    if let Some(taker) = Taker::of(&interface) {
                        self.dialogue.say(&format!("{name} is {taker}: {}.", taker.help()))?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Asks for the address of tcp. An IP address decides the family: fence_virtd needs both for
    /// IPv6. Of a name, each address counts.
    fn tcp_address(
        &mut self,
        family: Option<(&'static str, String)>,
        given: Option<(&'static str, String)>,
    ) -> Result<(), ConfigureError> {
        if let Some((key, family)) = &family {
            self.document.set(TCP, key, family);
        }
        let wanted = family.as_ref().map(|(_, family)| family.clone());
        let is_v6 = wanted.as_ref().is_some_and(|family| family.eq_ignore_ascii_case("ipv6"));
        let accept = |answer: &str| match &wanted {
            Some(family) => check(TCP, &[("family", family), ("address", answer)]),
            None => check(TCP, &[("address", answer)]),
        };
        if wanted.is_some() && self.document.get(TCP, "address").is_some_and(|old| accept(old).is_err()) {
            self.document.remove(TCP, |name| name.eq_ignore_ascii_case("address"));
        }
        let given = given.as_ref().map(|(option, value)| (*option, value.as_str()));
        let (label, about, fallback) = ("TCP Listen IP Address", TCP_ADDRESS, EVERYWHERE[usize::from(is_v6)]);
        let question = Question { label, about, section: TCP, key: "address", fallback, given };
        let answer = self.settle(&question, accept)?;
        if family.is_none()
            && !self.given.yes
            && let Ok(ip) = answer.parse::<IpAddr>()
        {
            self.document.set(TCP, "family", if ip.is_ipv4() { "ipv4" } else { "ipv6" });
        }
        self.document.set(TCP, "address", &answer);
        Ok(())
    }

    fn key_file(&mut self, kind: ListenerKind, chosen: &Chosen) -> Result<(), ConfigureError> {
        let is_for_this = chosen.with_key("key-file") == Some(kind);
        let given = self.given.key_file.as_deref().filter(|_| is_for_this).and_then(|path| path.to_str());
        // tcp and vsock take multicast's by default.
        let shared = self.document.get(MULTICAST, "key_file").filter(|_| !is_for_this).map(str::to_owned);
        let question = Question {
            label: "Key File",
            about: KEY_FILE,
            section: section(kind),
            key: "key_file",
            fallback: shared.as_deref().unwrap_or(config::DEFAULT_KEY_FILE),
            given: given.map(|path| ("key-file", path)),
        };
        let answer = self.settle(&question, check_key_file)?;
        if shared.as_ref() != Some(&answer) || self.document.get(section(kind), "key_file").is_some() {
            self.document.set(section(kind), "key_file", &answer);
        }
        Ok(())
    }

    /// Asks for the URI whose domains are heard by serial lines.
    fn lines_of(&mut self) -> Result<(), ConfigureError> {
        let (label, about, key, fallback) = ("Libvirt URI", LINES_OF, "uri", NOTHING);
        let question = Question { label, about, section: SERIAL, key, fallback, given: None };
        let is_none = |answer: &str| answer.eq_ignore_ascii_case(NOTHING);
        let answer = self.settle(&question, |answer| if is_none(answer) { Ok(()) } else { check_uri(answer) })?;
        if is_none(&answer) {
            self.document.remove(SERIAL, |name| name.eq_ignore_ascii_case(key));
        } else {
            self.document.set(SERIAL, key, &answer);
        }
        Ok(())
    }

    /// Asks whether every domain with a serial line may fence every domain, if nothing says who
    /// may. fence_virtd does not ask.
    pub(super) fn permission(&mut self, chosen: &Chosen) -> Result<(), ConfigureError> {
        if !chosen.all().any(|kind| kind == ListenerKind::Serial) {
            return Ok(());
        }
        if let Some(permit) = &self.given.permit {
            self.document.set(SERIAL, "permit", permit);
        }
        let is_said =
            self.document.named(&[], "groups", None).is_some() || self.document.get(SERIAL, "permit").is_some();
        if is_said || self.given.yes {
            return Ok(());
        }
        self.dialogue.say(&format!("\n{EVERYBODY}"))?;
        if self.dialogue.consent("May every domain with such a port fence every domain")? {
            self.document.set(SERIAL, "permit", "everyone");
        }
        Ok(())
    }
}
