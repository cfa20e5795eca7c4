//! Section `listeners { tcp { } }`: where clients connect to.

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

pub(super) const TCP: Scope<'static> =
    Scope { keys: &["key_file", "key_file2", "interface", "port", "family", "address", "hash", "auth"], ..NOTHING };

/// The digest of the exam: the only one, as with fence_virtd.
pub const AUTH: HashKind = HashKind::Sha256;

/// Section `listeners { tcp { } }`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tcp {
    /// The name of the section; `None` for the one that fence_virtd knows.
    pub name: Option<String>,
    /// The interface to listen on; `None` for all.
    pub interface: Option<String>,
    /// The local address, maybe unspecified.
    pub address: IpAddr,
    /// The port, never 0.
    pub port: u16,
    /// The weakest digest that a request may carry.
    pub hash: HashKind,
    /// The files of its key.
    pub keys: KeyFiles,
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
    /// `address` is not an IP address.
    #[error("\"{0}\" is no IP address")]
    Address(String),
}

impl TcpMistake {
    /// The text beside the caret.
    #[must_use]
    pub fn label(&self) -> &'static str {
        match self {
            Self::Auth(_) => "fence_virtd reads this key as `hash`",
            Self::OnlySecondKey => "which key is the first?",
            Self::Multicast(_) => "no host has this address",
            Self::Address(_) => "not an IP address",
        }
    }

    /// The remedy.
    #[must_use]
    pub fn help(&self) -> &'static str {
        match self {
            Self::Auth(_) => "remove it; for the weakest digest of requests write `hash = \"...\";`",
            Self::OnlySecondKey => "write `key_file` beside it",
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
    Tcp {
        name,
        interface: interface(section, findings),
        address: address(section, chosen, findings),
        port: port(section, findings),
        hash: digest("hash", section, findings),
        keys: key_files(section, plain, findings),
    }
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
fn address(section: &Contents<'_>, chosen: &Span, findings: &mut Findings<'_>) -> IpAddr {
    let family_is_v4 = family(section, findings);
    let Some(item) = section.get("address") else {
        findings.doubt(chosen, || Doubt::OnlyThisHost);
        return if family_is_v4 == Some(false) { Ipv6Addr::LOCALHOST.into() } else { Ipv4Addr::LOCALHOST.into() };
    };
    read(Some(item), Ipv4Addr::LOCALHOST.into(), findings, |text| {
        let address: IpAddr = text.trim().parse().map_err(|_| TcpMistake::Address(clip(text)))?;
        if address.is_multicast() {
            return Err(TcpMistake::Multicast(address).into());
        }
        if family_is_v4.is_some_and(|v4| v4 != address.is_ipv4()) {
            return Err(Mistake::OtherFamily(address));
        }
        Ok(address)
    })
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
            let address = IpAddr::from([127, 0, 0, 1]);
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
        let address = IpAddr::from([192, 0, 2, 1]);
        let interface = Some("virbr0".to_owned());
        let expected =
            Tcp { name: None, interface, address, port: 9, hash: HashKind::Sha512, keys: keys("/k", Some("/k2")) };
        let (found, warnings) = tcp_of(&file(all));
        assert!(found == expected && warnings.is_empty(), "{found:?} {}", warnings.render(false));
        assert_eq!(tcp_of(&file("address = \"::\";")).0.address, "::".parse::<IpAddr>().unwrap());
        assert_eq!(tcp_of(&file("family = \"ipv6\";")).0.address, "::1".parse::<IpAddr>().unwrap());
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
            ("address = \"host\";", TcpMistake::Address("host".into()).into()),
            ("address = \"::\"; family = \"ipv4\";", Mistake::OtherFamily("::".parse().unwrap())),
        ] {
            assert_eq!(refused(&file(keys)), [mistake], "{keys}");
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
