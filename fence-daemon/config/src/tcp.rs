//! Section `listeners { tcp { } }`: where clients connect to.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;

use fence_common::hash::HashKind;

use super::contents::{Contents, Findings, Scope};
use super::error::Mistake;
use super::listener::{digest, family, interface, port};
use super::raw::{Span, clip};
use super::resolved::{Multicast, NOTHING, absolute, read};
use super::warning::Doubt;

pub(super) const TCP: Scope =
    Scope { keys: &["key_file", "interface", "port", "family", "address", "hash", "auth"], ..NOTHING };

/// The digest of the exam: the only one, as with fence_virtd.
pub const AUTH: HashKind = HashKind::Sha256;

/// Section `listeners { tcp { } }`. Its key is that of the multicast section.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tcp {
    /// The interface to listen on; `None` for all.
    pub interface: Option<String>,
    /// The local address, maybe unspecified.
    pub address: IpAddr,
    /// The port, never 0.
    pub port: u16,
    /// The weakest digest that a request may carry.
    pub hash: HashKind,
}

/// A mistake about this listener.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TcpMistake {
    /// It is chosen without multicast.
    #[error("the listener \"tcp\" serves only beside \"multicast\" so far")]
    Alone,
    /// No key is read.
    #[error("the listener \"tcp\" needs a key, and `hash` and `auth` of multicast are both \"none\"")]
    LacksKey,
    /// `auth` is not sha256.
    #[error("`auth` of tcp can only be \"sha256\", not \"{0}\"")]
    Auth(String),
    /// It names another key than multicast.
    #[error("`key_file` of tcp is not that of multicast, {}", .0.display())]
    OtherKeyFile(PathBuf),
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
            Self::Alone => "no multicast",
            Self::LacksKey => "no key is read",
            Self::Auth(_) => "fence_virtd reads this key as `hash`",
            Self::OtherKeyFile(_) => "all listeners share one key so far",
            Self::Multicast(_) => "no host has this address",
            Self::Address(_) => "not an IP address",
        }
    }

    /// The remedy.
    #[must_use]
    pub fn help(&self) -> &'static str {
        match self {
            Self::Alone => "write `listener = \"multicast,tcp\";`",
            Self::LacksKey => "remove `hash` or `auth` from the multicast section",
            Self::Auth(_) => "remove it; for the weakest digest of requests write `hash = \"...\";`",
            Self::OtherKeyFile(_) => "remove it, or write the same path",
            Self::Multicast(_) | Self::Address(_) => {
                "write this host's address that guests connect to, such as \"192.168.122.1\", or \"0.0.0.0\" for all of them"
            }
        }
    }
}

/// Reads the section. `chosen` is the span at which `listener` names tcp.
pub(super) fn tcp(section: &Contents<'_>, chosen: &Span, multicast: &Multicast, findings: &mut Findings<'_>) -> Tcp {
    if !multicast.needs_key() {
        findings.mistake(chosen, TcpMistake::LacksKey.into());
    }
    read(section.get("key_file"), (), findings, |text| {
        let is_same = absolute(text) == multicast.key_file;
        if is_same { Ok(()) } else { Err(TcpMistake::OtherKeyFile(multicast.key_file.clone()).into()) }
    });
    read(section.get("auth"), (), findings, |text| {
        if HashKind::from_name(text) == Some(AUTH) { Ok(()) } else { Err(TcpMistake::Auth(clip(text)).into()) }
    });
    Tcp {
        interface: interface(section, findings),
        address: address(section, chosen, findings),
        port: port(section, findings),
        hash: digest("hash", section, findings),
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
    use crate::{Config, ConfigError, Plugin, Source, Warnings, parse};

    const GLOBAL: &str = "fence_virtd { listener = \"multicast\"; backend = \"libvirt\"; }";

    fn read(text: &str) -> (Config, Warnings) {
        parse(&Source::new(Path::new("f"), text.as_bytes()), Warnings::default())
            .unwrap_or_else(|error| panic!("{text}: {}", error.render(false)))
    }

    fn quiet(text: &str) -> Config {
        let (config, warnings) = read(text);
        assert!(warnings.is_empty(), "{}", warnings.render(false));
        config
    }

    fn refused(text: &str) -> Vec<Mistake> {
        match parse(&Source::new(Path::new("f"), text.as_bytes()), Warnings::default()) {
            Err(ConfigError::Mistakes(mistakes)) => mistakes.iter().map(|(_, mistake)| mistake.clone()).collect(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_list_of_listeners_names_each_once_and_multicast_in_any_case() {
        for list in ["multicast,tcp", "tcp, Multicast", " TCP ,\tmulticast "] {
            let (config, warnings) = read(&GLOBAL.replace("multicast", list));
            let local = IpAddr::from([127, 0, 0, 1]);
            let expected = Tcp { interface: None, address: local, port: DEFAULT_PORT, hash: HashKind::Sha256 };
            assert_eq!(config.tcp, Some(expected), "{list}");
            assert_eq!(warnings.iter().map(|warning| warning.doubt()).collect::<Vec<_>>(), [&Doubt::OnlyThisHost]);
        }
        let nameless = || Mistake::NoSuch { plugin: Plugin::Listener, name: String::new() };
        for (list, mistakes) in [
            ("tcp", vec![TcpMistake::Alone.into()]),
            ("multicast,tcp,tcp", vec![Mistake::ListenerTwice]),
            ("multicast,multicast", vec![Mistake::ListenerTwice]),
            ("multicast,", vec![nameless()]),
            (",multicast", vec![nameless()]),
            ("multicast tcp", vec![Mistake::NoSuch { plugin: Plugin::Listener, name: "multicast tcp".into() }]),
        ] {
            assert_eq!(refused(&GLOBAL.replace("multicast", list)), mistakes, "{list}");
        }
    }

    #[test]
    fn each_key_of_tcp_is_read_or_is_a_mistake() {
        let file = |keys: &str, multicast: &str| {
            let global = GLOBAL.replace("multicast", "multicast,tcp");
            format!("{global} listeners {{ multicast {{ {multicast} }} tcp {{ {keys} }} }}")
        };
        let tcp = |keys: &str| quiet(&file(keys, "key_file = \"/k\";")).tcp.unwrap();
        let all = "address = \"192.0.2.1\"; family = \"ipv4\"; port = \"9\"; interface = \"virbr0\"; hash = \"sha512\"; \
                   auth = \"SHA256\"; key_file = \"/k\";";
        let address = IpAddr::from([192, 0, 2, 1]);
        let expected = Tcp { interface: Some("virbr0".into()), address, port: 9, hash: HashKind::Sha512 };
        assert_eq!(tcp(all), expected);
        assert_eq!(tcp("address = \"::\";").address, "::".parse::<IpAddr>().unwrap());
        let (config, _) = read(&file("family = \"ipv6\";", ""));
        assert_eq!(config.tcp.unwrap().address, "::1".parse::<IpAddr>().unwrap());
        for (keys, mistake) in [
            ("port = \"70000\";", Mistake::Port("70000".into())),
            ("auth = \"sha512\";", TcpMistake::Auth("sha512".into()).into()),
            ("auth = \"none\";", TcpMistake::Auth("none".into()).into()),
            ("key_file = \"/other\";", TcpMistake::OtherKeyFile("/etc/cluster/fence_xvm.key".into()).into()),
            ("family = \"ipx\";", Mistake::Family("ipx".into())),
            (
                "hash = \"md5\";",
                Mistake::Choice { key: "hash", value: "md5".into(), known: vec!["sha256", "sha512", "sha1", "none"] },
            ),
            ("interface = \"a/b\";", Mistake::Interface("a/b".into())),
            ("groups { }", Mistake::Misplaced("groups".into())),
        ] {
            assert_eq!(refused(&file(&format!("address = \"0.0.0.0\"; {keys}"), "")), [mistake], "{keys}");
        }
        for (keys, mistake) in [
            ("address = \"225.0.0.12\";", TcpMistake::Multicast(IpAddr::from(DEFAULT_GROUP_V4)).into()),
            ("address = \"host\";", TcpMistake::Address("host".into()).into()),
            ("address = \"::\"; family = \"ipv4\";", Mistake::OtherFamily("::".parse().unwrap())),
        ] {
            assert_eq!(refused(&file(keys, "")), [mistake], "{keys}");
        }
        let unsigned = "hash = \"none\"; auth = \"none\";";
        assert_eq!(refused(&file("address = \"0.0.0.0\";", unsigned)), [TcpMistake::LacksKey.into()]);
    }
}
