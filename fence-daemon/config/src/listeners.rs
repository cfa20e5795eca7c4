//! The list of listeners: which ones `listener` names, their sections, and what no two of them may
//! have in common.

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use strum::IntoStaticStr;

use super::contents::{Contents, Findings, Scope};
use super::error::Mistake;
use super::multicast::{self, MULTICAST, Multicast};
use super::plugin::Plugin;
use super::raw::{Item, Section, Span, clip};
use super::resolved::{NOTHING, absolute, items_of};
use super::serial::{self, Around, SERIAL, Serial};
use super::tcp::{self, TCP, Tcp, TcpAddress};
use super::vsock::{self, VSOCK, Vsock};

/// One way in. Each has a key of its own, although two may name the same file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Listener {
    /// Datagrams to a multicast group.
    Multicast(Multicast),
    /// Connections of clients.
    Tcp(Tcp),
    /// Serial lines of domains.
    Serial(Serial),
    /// Connections of virtual machines, without a network.
    Vsock(Vsock),
}

/// What `listener` names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, IntoStaticStr)]
#[strum(serialize_all = "lowercase")]
pub enum ListenerKind {
    /// [`Listener::Multicast`].
    Multicast,
    /// [`Listener::Tcp`].
    Tcp,
    /// [`Listener::Serial`].
    Serial,
    /// [`Listener::Vsock`].
    Vsock,
}

impl ListenerKind {
    /// In the order of [`Config::listeners`](crate::Config::listeners).
    pub const ALL: [Self; 4] = [Self::Multicast, Self::Tcp, Self::Vsock, Self::Serial];

    /// The name in the file.
    #[must_use]
    pub fn name(self) -> &'static str {
        self.into()
    }
}

/// The files of a key, as absolute paths.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyFiles {
    /// The key.
    pub first: PathBuf,
    /// A second key that is accepted too. The file may be missing.
    pub second: Option<PathBuf>,
}

impl Listener {
    /// Its kind.
    #[must_use]
    pub fn kind(&self) -> ListenerKind {
        match self {
            Self::Multicast(_) => ListenerKind::Multicast,
            Self::Tcp(_) => ListenerKind::Tcp,
            Self::Serial(_) => ListenerKind::Serial,
            Self::Vsock(_) => ListenerKind::Vsock,
        }
    }

    /// The name of its section, if it has one.
    #[must_use]
    pub fn name(&self) -> Option<&str> {
        match self {
            Self::Multicast(multicast) => multicast.name.as_deref(),
            Self::Tcp(tcp) => tcp.name.as_deref(),
            Self::Serial(serial) => serial.name.as_deref(),
            Self::Vsock(vsock) => vsock.name.as_deref(),
        }
    }

    /// What a group calls it: the name of its section, or else its kind.
    #[must_use]
    pub fn called(&self) -> &str {
        self.name().unwrap_or_else(|| self.kind().name())
    }

    /// Its kind and its name, as in `multicast "dmz"`.
    #[must_use]
    pub fn label(&self) -> String {
        label(self.kind(), self.name())
    }

    /// The files of its key; `None` if it signs and verifies nothing.
    #[must_use]
    pub fn key_files(&self) -> Option<KeyFiles> {
        match self {
            Self::Multicast(multicast) => multicast.needs_key().then(|| multicast.key_files()),
            Self::Tcp(tcp) => Some(tcp.keys.clone()),
            Self::Serial(_) => None,
            Self::Vsock(vsock) => Some(vsock.keys.clone()),
        }
    }

    /// Whether both are the same section, whatever is in it.
    #[must_use]
    pub fn is_same_section(&self, other: &Self) -> bool {
        self.kind() == other.kind() && self.name() == other.name()
    }

    /// Whether a daemon that serves this listener needs another socket for `other`, which is the
    /// same section. A multicast listener takes its socket from one interface to another.
    #[must_use]
    pub fn needs_another_socket(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Tcp(one), Self::Tcp(other)) => {
                (&one.address, one.port, &one.interface) != (&other.address, other.port, &other.interface)
            }
            (Self::Vsock(one), Self::Vsock(other)) => (one.port, one.by_systemd) != (other.port, other.by_systemd),
            (Self::Serial(one), Self::Serial(other)) => one != other,
            (Self::Multicast(_) | Self::Tcp(_) | Self::Vsock(_) | Self::Serial(_), _) => false,
        }
    }

    /// Whether `other` cannot have its socket while this listener is served. A serial line is
    /// connected again until it succeeds.
    pub(super) fn shares_socket(&self, other: &Self) -> bool {
        self.kind() != ListenerKind::Serial && self.collides(other)
    }

    /// Whether the kernel would give only one of the two its socket.
    fn collides(&self, other: &Self) -> bool {
        let apart = |one: &Option<String>, other: &Option<String>| {
            one.as_ref().zip(other.as_ref()).is_some_and(|(one, other)| one != other)
        };
        match (self, other) {
            (Self::Multicast(one), Self::Multicast(other)) => {
                one.shares_group(other) && !apart(&one.interface, &other.interface)
            }
            (Self::Tcp(one), Self::Tcp(other)) => {
                // A socket at `::` hears IPv4 too.
                let all = |ip: IpAddr| ip.is_unspecified();
                let same = |one: IpAddr, other: IpAddr| {
                    one == other
                        || (all(one) && (one.is_ipv6() || other.is_ipv4()))
                        || (all(other) && (other.is_ipv6() || one.is_ipv4()))
                };
                let same = match (&one.address, &other.address) {
                    (TcpAddress::Ip(one), TcpAddress::Ip(other)) => same(*one, *other),
                    (TcpAddress::Name { name: one, .. }, TcpAddress::Name { name: other, .. }) => {
                        one.eq_ignore_ascii_case(other)
                    }
                    // Whose addresses a name has shows later. systemd opens each socket once.
                    (TcpAddress::Name { .. } | TcpAddress::Systemd, _)
                    | (_, TcpAddress::Name { .. } | TcpAddress::Systemd) => false,
                };
                same && one.port == other.port && !apart(&one.interface, &other.interface)
            }
            (Self::Vsock(one), Self::Vsock(other)) => one.port == other.port && !one.by_systemd && !other.by_systemd,
            (Self::Serial(one), Self::Serial(other)) => one.path == other.path && one.mode == other.mode,
            (Self::Multicast(_) | Self::Tcp(_) | Self::Vsock(_) | Self::Serial(_), _) => false,
        }
    }
}

/// A listener's kind and name, for people.
fn label(kind: ListenerKind, name: Option<&str>) -> String {
    name.map_or_else(|| kind.name().to_owned(), |name| format!("{} \"{name}\"", kind.name()))
}

/// A mistake about the list of listeners.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ListenerMistake {
    /// A listener is named twice.
    #[error("`listener` names a listener twice")]
    Twice,
    /// Two sections need the same socket.
    #[error("`{0}` needs the same socket as the section on line {1}")]
    SameSocket(String, usize),
    /// A group names a section that is not served.
    #[error("no listener here is called \"{name}\"")]
    NoSuchSection {
        /// The name as written.
        name: String,
        /// The names that there are.
        known: Vec<String>,
    },
    /// A group's `listener` is misspelled. Ignored, it would leave the group without its bounds.
    #[error("`{0}` reads like `listener`")]
    Misspelt(String),
    /// More sections than anybody has networks.
    #[error("there are more than {SECTIONS_MAX} sections of listeners")]
    TooMany,
}

/// Section `listeners`. What `listener` does not name is not read either.
pub(super) const LISTENERS: Scope<'static> =
    Scope { sections: &["multicast", "tcp", "vsock", "serial"], unread: &["vmchannel"], ..NOTHING };

/// The most sections: each costs sockets, threads and a kernel program.
pub(super) const SECTIONS_MAX: usize = 64;

impl ListenerMistake {
    /// The text beside the caret.
    #[must_use]
    pub fn label(&self) -> String {
        match self {
            Self::Misspelt(_) => "the group would count at every listener".to_owned(),
            Self::NoSuchSection { .. } => "the group would count nowhere".to_owned(),
            Self::Twice => "each counts once".to_owned(),
            Self::SameSocket(_, line) => format!("only one could be served: this one, or the one on line {line}"),
            Self::TooMany => "one too many".to_owned(),
        }
    }

    /// The remedy.
    #[must_use]
    pub fn help(&self) -> String {
        let help = match self {
            Self::Twice => {
                "name it once, as in `listener = \"multicast,tcp\";`, and write `multicast = \"...\" { ... }` for each network"
            }
            Self::SameSocket(..) => "give each another `port` or `address`, or name another `interface` in each",
            Self::Misspelt(_) => "write `listener`",
            Self::TooMany => "put guests that share a network and a key into one section",
            Self::NoSuchSection { known, .. } => return format!("write one of \"{}\"", known.join("\", \"")),
        };
        help.to_owned()
    }
}

/// Reads which listeners are chosen, each with its span. fence_virtd has no default either, and
/// knows one name: a list is new here.
pub(super) fn chosen(
    section: Option<&Section<'_>>,
    global: &Contents<'_>,
    findings: &mut Findings<'_>,
) -> Vec<(ListenerKind, Span)> {
    let plugin = Plugin::Listener;
    let Some(item) = global.get(plugin.key()) else {
        plugin.is_missing(section, findings);
        return Vec::new();
    };
    let span = &item.value.span;
    let mut chosen: Vec<(ListenerKind, Span)> = Vec::new();
    let mut twice = false;
    for name in item.value.value.split(',').map(str::trim) {
        let known = ListenerKind::ALL.into_iter().find(|kind| kind.name().eq_ignore_ascii_case(name));
        match known {
            Some(kind) if chosen.iter().any(|(other, _)| *other == kind) => twice = true,
            Some(kind) => chosen.push((kind, span.clone())),
            None if LISTENERS.unread.iter().any(|known| known.eq_ignore_ascii_case(name)) => {
                findings.mistake(span, Mistake::NotYet { plugin, name: clip(name) });
            }
            None => findings.mistake(span, Mistake::NoSuch { plugin, name: clip(name) }),
        }
    }
    if twice {
        findings.mistake(span, ListenerMistake::Twice.into());
    }
    chosen
}

/// Reads the sections of the chosen listeners, each with its span. A listener without a section has
/// the defaults.
pub(super) fn listeners(
    section: Option<&Section<'_>>,
    chosen: &[(ListenerKind, Span)],
    around: Around<'_>,
    findings: &mut Findings<'_>,
) -> Vec<(Listener, Span)> {
    let is_chosen = |name: &str| chosen.iter().any(|(kind, _)| kind.name() == name);
    let all = LISTENERS.sections.iter().chain(LISTENERS.unread).copied();
    let (read, unread): (Vec<_>, Vec<_>) = all.partition(|name| is_chosen(name));
    let scope = Scope { sections: &read, named: &read, unread: &unread, ..NOTHING };
    let sections = Contents::new(items_of(section), &scope, findings);
    let mut found: Vec<(Listener, Span)> = Vec::new();
    for kind in ListenerKind::ALL {
        let Some((_, at)) = chosen.iter().find(|(other, _)| *other == kind) else { continue };
        let mut own: Vec<_> = sections
            .sections()
            .filter(|section| section.name.value.eq_ignore_ascii_case(kind.name()))
            .map(Some)
            .collect();
        if own.is_empty() {
            own.push(None);
        }
        for section in own {
            let name = section.and_then(|section| section.value.as_ref()).map(|name| name.value.to_owned());
            let items = items_of(section);
            let span = section.map_or_else(|| at.clone(), |section| section.name.span.clone());
            let listener = match kind {
                ListenerKind::Multicast => Listener::Multicast(multicast::multicast(
                    name,
                    &Contents::new(items, &MULTICAST, findings),
                    findings,
                )),
                ListenerKind::Tcp => {
                    let (contents, plain) = (Contents::new(items, &TCP, findings), plain_keys(&found));
                    Listener::Tcp(tcp::tcp(name, &contents, at, plain.as_ref(), findings))
                }
                ListenerKind::Vsock => {
                    let (contents, plain) = (Contents::new(items, &VSOCK, findings), plain_keys(&found));
                    Listener::Vsock(vsock::vsock(name, &contents, plain.as_ref(), findings))
                }
                ListenerKind::Serial => {
                    let contents = Contents::new(items, &SERIAL, findings);
                    Listener::Serial(serial::serial(name, &contents, &span, around, findings))
                }
            };
            if let Some((_, other)) = found.iter().find(|(other, _)| other.collides(&listener)) {
                let line = findings.line(other);
                findings.mistake(&span, ListenerMistake::SameSocket(clip(&listener.label()), line).into());
            }
            found.push((listener, span));
        }
    }
    found
}

/// The key files of the multicast section without a name.
fn plain_keys(found: &[(Listener, Span)]) -> Option<KeyFiles> {
    found.iter().find_map(|(listener, _)| match listener {
        Listener::Multicast(multicast) if multicast.name.is_none() => Some(multicast.key_files()),
        Listener::Multicast(_) | Listener::Tcp(_) | Listener::Vsock(_) | Listener::Serial(_) => None,
    })
}

/// The last span at which a listener's section names this key file in the given setting, and true.
/// Otherwise the last section that lacks the setting, and false.
pub(super) fn key_file_span(items: &[Item<'_>], setting: &str, path: &Path) -> (Span, bool) {
    let named = |item: &Item<'_>, name: &str| matches!(item, Item::Section(section) if section.name.value.eq_ignore_ascii_case(name));
    let Some(Item::Section(listeners)) = items.iter().rev().find(|item| named(item, "listeners")) else {
        return (0..0, false);
    };
    let of_kind = |item: &Item<'_>| ListenerKind::ALL.iter().any(|kind| named(item, kind.name()));
    let (mut lacking, mut written) = (None, None);
    for item in listeners.items.iter().filter(|item| of_kind(item)) {
        let Item::Section(section) = item else { continue };
        let mut settings = section.items.iter().filter_map(|item| match item {
            Item::Value(item) if item.key.value.eq_ignore_ascii_case(setting) => Some(&item.value),
            Item::Section(_) | Item::Value(_) => None,
        });
        match settings.next_back() {
            None => lacking = Some(section.name.span.clone()),
            Some(value) if absolute(value.value) == path => written = Some(value.span.clone()),
            Some(_) => {}
        }
    }
    match written {
        Some(span) => (span, true),
        None => (lacking.unwrap_or_else(|| listeners.name.span.clone()), false),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Config, ConfigError, Source, Warnings, parse};

    fn parsed(listener: &str, sections: &str) -> Result<Config, Vec<(usize, Mistake)>> {
        let text = format!(
            "fence_virtd {{ listener = \"{listener}\"; backend = \"libvirt\"; }}\nlisteners {{\n{sections}\n}}"
        );
        match parse(&Source::new(Path::new("f"), text.as_bytes()), Warnings::default()) {
            Ok((config, _)) => Ok(config),
            Err(ConfigError::Mistakes(mistakes)) => {
                Err(mistakes.iter().map(|(place, mistake)| (place.line(), mistake.clone())).collect())
            }
            Err(error) => panic!("{error:?}"),
        }
    }

    fn labels(listener: &str, sections: &str) -> Vec<String> {
        parsed(listener, sections).unwrap().listeners.iter().map(Listener::label).collect()
    }

    #[test]
    fn a_list_names_each_listener_once_in_any_case_and_order() {
        for (list, found) in
            [("multicast", vec!["multicast"]), ("TCP", vec!["tcp"]), ("tcp, Multicast", vec!["multicast", "tcp"])]
        {
            assert_eq!(labels(list, ""), found, "{list}");
        }
        let nameless = || Mistake::NoSuch { plugin: Plugin::Listener, name: String::new() };
        for (list, mistakes) in [
            ("multicast,tcp,TCP", vec![ListenerMistake::Twice.into()]),
            ("multicast,multicast", vec![ListenerMistake::Twice.into()]),
            ("multicast,", vec![nameless()]),
            (",tcp", vec![nameless()]),
            ("multicast tcp", vec![Mistake::NoSuch { plugin: Plugin::Listener, name: "multicast tcp".into() }]),
        ] {
            let found: Vec<_> = parsed(list, "").unwrap_err().into_iter().map(|(_, mistake)| mistake).collect();
            assert_eq!(found, mistakes, "{list}");
        }
    }

    #[test]
    fn sections_with_names_are_listeners_beside_the_one_without() {
        let two = "multicast { interface = \"a\"; }\nmulticast = \"dmz\" { interface = \"b\"; key_file = \"/k\"; }";
        let config = parsed("multicast", two).unwrap();
        let found: Vec<_> = config.listeners.iter().map(|one| (one.label(), one.key_files().unwrap().first)).collect();
        let default = PathBuf::from("/etc/cluster/fence_xvm.key");
        let expected = [("multicast".to_owned(), default), ("multicast \"dmz\"".to_owned(), "/k".into())];
        assert_eq!(found, expected);
        assert_eq!(config.multicast().unwrap().name, None);
        // Without a section that has no name there is no such listener.
        assert_eq!(labels("multicast,tcp", "multicast \"dmz\" { }\ntcp { }"), ["multicast \"dmz\"", "tcp"]);
        // One name, in any case, is one section.
        let again = parsed("multicast", "multicast \"a\" { port = \"1\"; }\nMULTICAST = \"A\" { port = \"2\"; }");
        assert_eq!(again.unwrap_err(), [(4, Mistake::SectionTwice { name: "MULTICAST".into(), line: 3 })]);
        assert_eq!(labels("multicast", "multicast \"a\" { }\nmulticast \"a\" { }"), ["multicast \"a\""]);
    }

    #[test]
    fn two_sections_that_need_one_socket_are_a_mistake_and_others_are_not() {
        for (one, other, collide) in [
            ("multicast", "", true),
            ("multicast", "interface = \"a\";", true),
            ("multicast", "port = \"1\";", false),
            ("multicast", "family = \"ipv6\";", false),
            ("multicast", "address = \"225.0.0.13\";", false),
            ("tcp", "", true),
            ("tcp", "port = \"1\";", false),
            ("tcp", "family = \"ipv6\";", false),
            ("tcp", "address = \"::\";", true),
            ("tcp", "address = \"0.0.0.0\";", true),
            ("tcp", "address = \"192.0.2.1\";", false),
        ] {
            let found = parsed(one, &format!("{one} {{ }}\n{one} \"x\" {{ {other} }}"));
            let label = format!("{one} \"x\"");
            let expected = collide.then(|| vec![(4, ListenerMistake::SameSocket(label, 3).into())]);
            assert_eq!(found.err(), expected, "{one} {other}");
        }
        // An interface each.
        let each = |other: &str| {
            format!("multicast \"a\" {{ interface = \"a\"; }}\nmulticast \"b\" {{ interface = \"{other}\"; }}")
        };
        assert!(parsed("multicast", &each("b")).is_ok() && parsed("multicast", &each("a")).is_err());
        // As sockets of the kernel collide.
        let tcp = |one: &str, other: &str| {
            let text = format!("tcp \"a\" {{ address = \"{one}\"; }}\ntcp \"b\" {{ address = \"{other}\"; }}");
            parsed("tcp", &text).is_ok()
        };
        assert!(tcp("::1", "0.0.0.0") && tcp("127.0.0.1", "127.0.0.2"));
        assert!(!tcp("::", "127.0.0.1") && !tcp("0.0.0.0", "127.0.0.1") && !tcp("::1", "::"));
    }

    #[test]
    fn sections_are_bounded() {
        let many = |number: usize| {
            (0..number).map(|at| format!("tcp \"{at}\" {{ port = \"{}\"; }}\n", at + 1)).collect::<String>()
        };
        assert_eq!(parsed("tcp", &many(SECTIONS_MAX)).unwrap().listeners.len(), SECTIONS_MAX);
        let refused = parsed("tcp", &many(200_000)).unwrap_err();
        assert!(refused.iter().all(|(_, mistake)| *mistake == ListenerMistake::TooMany.into()), "{refused:?}");
    }
}
