//! Section `listeners { tcp { } }`: where clients connect to.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use fence_common::hash::HashKind;

use super::contents::{Contents, Findings, Scope};
use super::error::Mistake;
use super::listener::{digest, family, interface, port};
use super::listeners::KeyFiles;
use super::multicast::KEY_FILE;
use super::raw::{Span, clip};
use super::resolved::{NOTHING, absolute, read};
use super::warning::Doubt;

pub(super) const TCP: Scope<'static> = Scope {
    keys: &["key_file", "key_file2", "interface", "port", "family", "address", "socket", "hash", "auth"],
    ..NOTHING
};

/// The digest of the exam on a client's own connection, by tcp and vsock: the only one, as with
/// fence_virtd.
pub const AUTH: HashKind = HashKind::Sha256;

/// Section `listeners { tcp { } }`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tcp {
    /// The name of the section; `None` for the one that fence_virtd knows.
    pub name: Option<String>,
    /// The interface to listen on; `None` for all.
    pub interface: Option<String>,
    /// The local address.
    pub address: TcpAddress,
    /// The port, never 0. Of no use if systemd opens it.
    pub port: u16,
    /// The weakest digest that a request may carry.
    pub hash: HashKind,
    /// The files of its key.
    pub keys: KeyFiles,
}

/// Where a tcp listener's port is open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TcpAddress {
    /// At one address, maybe unspecified.
    Ip(IpAddr),
    /// At each address of a host name.
    Name {
        /// The name.
        name: String,
        /// Whether only its IPv4 addresses count, or only its IPv6 addresses.
        is_v4: Option<bool>,
    },
    /// Where systemd has opened it.
    Systemd,
}

impl fmt::Display for TcpAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ip(ip) => write!(f, "{ip}"),
            Self::Name { name, .. } => f.write_str(name),
            Self::Systemd => f.write_str("systemd's socket"),
        }
    }
}

/// A mistake about this listener.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TcpMistake {
    /// `auth` is not sha256.
    #[error("`auth` can only be \"sha256\", not \"{0}\"")]
    Auth(String),
    /// There is only a second key.
    #[error("there is a `key_file2` and no `key_file`")]
    OnlySecondKey,
    /// `address` is a group.
    #[error("no connection arrives at the multicast address {0}")]
    Multicast(IpAddr),
    /// `address` is neither an IP address nor a name.
    #[error("\"{0}\" is neither an IP address nor a host name")]
    Address(String),
    /// `socket` has another value than its only one.
    #[error("`socket` can only be \"systemd\", not \"{0}\"")]
    Socket(String),
    /// A key says where to listen, although systemd opens the socket.
    #[error("`{0}` has no effect beside `socket`")]
    BesideSocket(&'static str),
}

impl TcpMistake {
    /// The text beside the caret.
    #[must_use]
    pub fn label(&self) -> &'static str {
        match self {
            Self::Auth(_) => "fence_virtd reads this key as `hash`",
            Self::OnlySecondKey => "which key is the first?",
            Self::Multicast(_) => "no host has this address",
            Self::Address(_) => "not an address",
            Self::Socket(_) => "unknown",
            Self::BesideSocket(_) => "systemd opens the socket",
        }
    }

    /// The remedy.
    #[must_use]
    pub fn help(&self) -> &'static str {
        match self {
            Self::Auth(_) => "remove it; for the weakest digest of requests write `hash = \"...\";`",
            Self::OnlySecondKey => "write `key_file` beside it",
            Self::Socket(_) => "write `socket = \"systemd\";`, or remove it",
            Self::BesideSocket(_) => "write this into the socket's unit, or remove `socket`",
            Self::Multicast(_) | Self::Address(_) => {
                "write this host's address that guests connect to, such as \"192.168.122.1\", or \"0.0.0.0\" for all of them"
            }
        }
    }
}

/// Reads the section of this name. `chosen` is the span at which `listener` names tcp. `plain` has
/// the key files of the multicast section without a name, which count if this section names none.
pub(super) fn tcp(
    name: Option<String>,
    section: &Contents<'_>,
    chosen: &Span,
    plain: Option<&KeyFiles>,
    findings: &mut Findings<'_>,
) -> Tcp {
    exam(section, findings);
    let by_systemd = socket(section, &["address", "family", "interface", "port"], findings);
    Tcp {
        name,
        interface: interface(section, findings),
        address: if by_systemd { TcpAddress::Systemd } else { address(section, chosen, findings) },
        port: port(section, findings),
        hash: digest("hash", section, findings),
        keys: key_files(section, plain, findings),
    }
}

/// Whether systemd opens the socket, so that the keys in `idle` have no effect.
pub(super) fn socket(section: &Contents<'_>, idle: &[&'static str], findings: &mut Findings<'_>) -> bool {
    let by_systemd = read(section.get("socket"), false, findings, |text| {
        let is_known = text.eq_ignore_ascii_case("systemd");
        if is_known { Ok(true) } else { Err(TcpMistake::Socket(clip(text)).into()) }
    });
    for key in idle.iter().filter(|_| by_systemd) {
        if let Some(item) = section.get(key) {
            findings.mistake(&item.key.span, TcpMistake::BesideSocket(key).into());
        }
    }
    by_systemd
}

/// Reads `auth`, which has one value where clients connect.
pub(super) fn exam(section: &Contents<'_>, findings: &mut Findings<'_>) {
    read(section.get("auth"), (), findings, |text| {
        if HashKind::from_name(text) == Some(AUTH) { Ok(()) } else { Err(TcpMistake::Auth(clip(text)).into()) }
    });
}

pub(super) fn key_files(section: &Contents<'_>, plain: Option<&KeyFiles>, findings: &mut Findings<'_>) -> KeyFiles {
    let file = |key| section.get(key).map(|item| absolute(item.value.value));
    let plain = plain.cloned().unwrap_or_else(|| KeyFiles { first: KEY_FILE.into(), second: None });
    match (file("key_file"), file("key_file2")) {
        (None, None) => plain,
        // The same key with both its files, named again.
        (Some(first), None) if first == plain.first => plain,
        (Some(first), second) => KeyFiles { first, second },
        (None, Some(_)) => {
            let at = section.get("key_file2").map_or(0..0, |item| item.key.span.clone());
            findings.mistake(&at, TcpMistake::OnlySecondKey.into());
            plain
        }
    }
}

/// The address that `family` and `address` mean together.
fn address(section: &Contents<'_>, chosen: &Span, findings: &mut Findings<'_>) -> TcpAddress {
    let is_v4 = family(section, findings);
    let Some(item) = section.get("address") else {
        findings.doubt(chosen, || Doubt::OnlyThisHost);
        let here = if is_v4 == Some(false) { Ipv6Addr::LOCALHOST.into() } else { Ipv4Addr::LOCALHOST.into() };
        return TcpAddress::Ip(here);
    };
    read(Some(item), TcpAddress::Ip(Ipv4Addr::LOCALHOST.into()), findings, |text| {
        let text = text.trim();
        let Ok(address) = text.parse::<IpAddr>() else {
            let is_name = is_host_name(text);
            let name = || TcpAddress::Name { name: text.to_owned(), is_v4 };
            return if is_name { Ok(name()) } else { Err(TcpMistake::Address(clip(text)).into()) };
        };
        if address.is_multicast() {
            return Err(TcpMistake::Multicast(address).into());
        }
        if is_v4.is_some_and(|v4| v4 != address.is_ipv4()) {
            return Err(Mistake::OtherFamily(address));
        }
        Ok(TcpAddress::Ip(address))
    })
}

/// Whether a text can be a host's name. The resolver takes numbers for addresses, so that
/// "192.168.122" would mean 192.168.0.122.
fn is_host_name(text: &str) -> bool {
    let name = text.strip_suffix('.').unwrap_or(text);
    let is_label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    let is_number = |label: &str| {
        let hex = label.strip_prefix("0x").or_else(|| label.strip_prefix("0X"));
        hex.is_some() || label.bytes().all(|byte| byte.is_ascii_digit())
    };
    name.len() <= 253 && name.split('.').all(is_label) && !name.rsplit('.').next().is_none_or(is_number)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use fence_common::wire::{DEFAULT_GROUP_V4, DEFAULT_PORT};

    use super::*;
    use crate::{Config, ConfigError, Source, Warnings, parse};

    const GLOBAL: &str = "fence_virtd { listener = \"multicast,tcp\"; backend = \"libvirt\"; }";

    fn read(text: &str) -> (Config, Warnings) {
        parse(&Source::new(Path::new("f"), text.as_bytes()), Warnings::default())
            .unwrap_or_else(|error| panic!("{text}: {}", error.render(false)))
    }

    fn tcp_of(text: &str) -> (Tcp, Warnings) {
        let (config, warnings) = read(text);
        (config.tcps().next().unwrap().clone(), warnings)
    }

    fn refused(text: &str) -> Vec<Mistake> {
        match parse(&Source::new(Path::new("f"), text.as_bytes()), Warnings::default()) {
            Err(ConfigError::Mistakes(mistakes)) => mistakes.iter().map(|(_, mistake)| mistake.clone()).collect(),
            other => panic!("{other:?}"),
        }
    }

    fn keys(first: &str, second: Option<&str>) -> KeyFiles {
        KeyFiles { first: first.into(), second: second.map(Into::into) }
    }

    #[test]
    fn without_a_section_the_defaults_are_fence_virtds_and_only_this_host_can_connect() {
        for list in ["tcp", "multicast,tcp", " TCP ,\tmulticast "] {
            let (tcp, warnings) = tcp_of(&GLOBAL.replace("multicast,tcp", list));
            let address = TcpAddress::Ip([127, 0, 0, 1].into());
            let keys = keys(KEY_FILE, None);
            let (name, interface, port, hash) = (None, None, DEFAULT_PORT, HashKind::Sha256);
            assert_eq!(tcp, Tcp { name, interface, address, port, hash, keys }, "{list}");
            assert_eq!(warnings.iter().map(|warning| warning.doubt()).collect::<Vec<_>>(), [&Doubt::OnlyThisHost]);
        }
    }

    #[test]
    fn each_key_of_tcp_is_read_or_is_a_mistake() {
        let file = |keys: &str| format!("{GLOBAL} listeners {{ tcp {{ {keys} }} }}");
        let all = "address = \"192.0.2.1\"; family = \"ipv4\"; port = \"9\"; interface = \"virbr0\"; hash = \"sha512\"; \
                   auth = \"SHA256\"; key_file = \"/k\"; key_file2 = \"/k2\";";
        let address = TcpAddress::Ip([192, 0, 2, 1].into());
        let interface = Some("virbr0".to_owned());
        let expected =
            Tcp { name: None, interface, address, port: 9, hash: HashKind::Sha512, keys: keys("/k", Some("/k2")) };
        let (found, warnings) = tcp_of(&file(all));
        // Its key is not that of multicast, and no groups keep the two apart.
        let doubts: Vec<_> = warnings.iter().map(|warning| warning.doubt().clone()).collect();
        let together = Doubt::Together { one: "multicast".to_owned(), other: "tcp".to_owned() };
        assert!(found == expected && doubts == [together], "{found:?} {}", warnings.render(false));
        let ip = |keys: &str| match tcp_of(&file(keys)).0.address {
            TcpAddress::Ip(ip) => ip.to_string(),
            other @ (TcpAddress::Name { .. } | TcpAddress::Systemd) => panic!("{keys}: {other:?}"),
        };
        assert_eq!((ip("address = \"::\";"), ip("family = \"ipv6\";")), ("::".to_owned(), "::1".to_owned()));
        for (keys, mistake) in [
            ("port = \"70000\";", Mistake::Port("70000".into())),
            ("auth = \"sha512\";", TcpMistake::Auth("sha512".into()).into()),
            ("auth = \"none\";", TcpMistake::Auth("none".into()).into()),
            ("key_file2 = \"/other\";", TcpMistake::OnlySecondKey.into()),
            ("family = \"ipx\";", Mistake::Family("ipx".into())),
            (
                "hash = \"md5\";",
                Mistake::Choice { key: "hash", value: "md5".into(), known: vec!["sha256", "sha512", "sha1", "none"] },
            ),
            ("interface = \"a/b\";", Mistake::Interface("a/b".into())),
            ("groups { }", Mistake::Misplaced("groups".into())),
        ] {
            assert_eq!(refused(&file(&format!("address = \"0.0.0.0\"; {keys}"))), [mistake], "{keys}");
        }
        for (keys, mistake) in [
            ("address = \"225.0.0.12\";", TcpMistake::Multicast(IpAddr::from(DEFAULT_GROUP_V4)).into()),
            ("address = \"192.168.122\";", TcpMistake::Address("192.168.122".into()).into()),
            ("address = \"fe80::1%eth0\";", TcpMistake::Address("fe80::1%eth0".into()).into()),
            ("address = \"::\"; family = \"ipv4\";", Mistake::OtherFamily("::".parse().unwrap())),
        ] {
            assert_eq!(refused(&file(keys)), [mistake], "{keys}");
        }
    }

    #[test]
    fn an_address_may_be_a_host_name() {
        let address = |keys: &str| {
            let (tcp, warnings) = tcp_of(&format!("{GLOBAL} listeners {{ tcp {{ {keys} }} }}"));
            assert!(warnings.is_empty(), "{keys}");
            tcp.address
        };
        let named = |name: &str, is_v4| TcpAddress::Name { name: name.to_owned(), is_v4 };
        for name in ["host", "hypervisor-1.example.com", "host.example.", "3com", "a_b.x1"] {
            assert_eq!(address(&format!("address = \" {name} \";")), named(name, None));
        }
        assert_eq!(address("address = \"host\"; family = \"ipv6\";"), named("host", Some(false)));
        assert_eq!(address("address = \"host\"; family = \"ipv4\";"), named("host", Some(true)));
        let long = "a".repeat(64);
        for text in
            ["192.168.122", "1", "10.0.0.256", "host.1", "0x7f.0x1", "a..b", ".a", "-a", "a-", "a b", "ä", "a:1", &long]
        {
            let refused = refused(&format!("{GLOBAL} listeners {{ tcp {{ address = \"{text}\"; }} }}"));
            assert_eq!(refused, [TcpMistake::Address(clip(text)).into()], "{text}");
        }
    }

    #[test]
    fn systemd_may_open_the_socket_and_says_where_then() {
        let file = |keys: &str| format!("{GLOBAL} listeners {{ tcp {{ {keys} }} }}");
        let (tcp, warnings) = tcp_of(&file("socket = \"Systemd\"; hash = \"sha512\";"));
        assert!((tcp.address, tcp.hash) == (TcpAddress::Systemd, HashKind::Sha512) && warnings.is_empty());
        assert_eq!(refused(&file("socket = \"inetd\";")), [TcpMistake::Socket("inetd".into()).into()]);
        for (key, value) in [("address", "::"), ("family", "ipv4"), ("interface", "lo"), ("port", "1")] {
            let mistakes = refused(&file(&format!("socket = \"systemd\"; {key} = \"{value}\";")));
            assert_eq!(mistakes, [TcpMistake::BesideSocket(key).into()]);
        }
    }

    #[test]
    fn the_key_is_its_own_or_that_of_the_multicast_section_without_a_name() {
        let of = |multicast: &str, tcp: &str| {
            tcp_of(&format!("{GLOBAL} listeners {{ {multicast} tcp {{ address = \"::\"; {tcp} }} }}")).0.keys
        };
        let plain = "multicast { key_file = \"/m\"; key_file2 = \"/m2\"; hash = \"none\"; auth = \"none\"; }";
        assert_eq!(of(plain, ""), keys("/m", Some("/m2")));
        assert_eq!(of(plain, "key_file = \"/m\";"), keys("/m", Some("/m2")));
        assert_eq!(of(plain, "key_file = \"/m\"; key_file2 = \"/x\";"), keys("/m", Some("/x")));
        assert_eq!(of(plain, "key_file = \"/t\";"), keys("/t", None));
        assert_eq!(of("multicast \"a\" { key_file = \"/m\"; }", ""), keys(KEY_FILE, None));
    }
}
