//! Section `fence_virtd { metrics { } }`: where Prometheus reads the daemon's figures.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use super::contents::{Contents, Findings, Scope};
use super::error::Mistake;
use super::listener::port_or;
use super::raw::{Section, clip};
use super::resolved::{NOTHING, items_of, read};

pub(super) const METRICS: Scope<'static> = Scope { keys: &["address", "port", "path"], ..NOTHING };

/// The TCP port for Prometheus.
pub const PORT: u16 = 12_290;

/// The longest path of a UNIX socket, in bytes.
const PATH_MAX: usize = 107;

/// Where Prometheus reads the daemon's figures.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Metrics {
    /// At a TCP port.
    Tcp(SocketAddr),
    /// At a UNIX socket.
    Unix(PathBuf),
}

impl fmt::Display for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => write!(f, "{address}"),
            Self::Unix(path) => write!(f, "{}", path.display()),
        }
    }
}

/// A mistake in this section.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MetricsMistake {
    /// There is neither `address` nor `path`.
    #[error("the section `metrics` says neither `address` nor `path`")]
    Nowhere,
    /// A key of a TCP port stands beside `path`.
    #[error("`{0}` has no effect beside `path`")]
    BesidePath(&'static str),
    /// `address` is no IP address.
    #[error("\"{0}\" is no IP address")]
    Address(String),
    /// `address` is a group.
    #[error("no connection arrives at the multicast address {0}")]
    Multicast(IpAddr),
    /// No socket can have this path.
    #[error("the path is too long for a socket: \"{0}\"")]
    TooLong(String),
}

impl MetricsMistake {
    /// The text beside the caret.
    #[must_use]
    pub fn label(&self) -> &'static str {
        match self {
            Self::Nowhere => "nobody could read the metrics",
            Self::BesidePath(_) => "a UNIX socket has none",
            Self::Address(_) => "not an IP address",
            Self::Multicast(_) => "no host has this address",
            Self::TooLong(_) => "more than 107 bytes",
        }
    }

    /// The remedy.
    #[must_use]
    pub fn help(&self) -> &'static str {
        match self {
            Self::Nowhere => "write `address = \"127.0.0.1\";` or `path = \"/run/fence-xdp/metrics.sock\";`",
            Self::BesidePath(_) => "remove it, or remove `path` to listen at a TCP port",
            Self::Address(_) | Self::Multicast(_) => {
                "write this host's address that Prometheus connects to, such as \"127.0.0.1\""
            }
            Self::TooLong(_) => "write a shorter path, such as \"/run/fence-xdp/metrics.sock\"",
        }
    }
}

/// Reads the section. Without one there are no metrics.
pub(super) fn metrics(section: Option<&Section<'_>>, findings: &mut Findings<'_>) -> Option<Metrics> {
    let written = section?;
    let contents = Contents::new(items_of(section), &METRICS, findings);
    let port = port_or(PORT, &contents, findings);
    if contents.get("path").is_some() {
        for key in ["address", "port"] {
            if let Some(item) = contents.get(key) {
                findings.mistake(&item.key.span, MetricsMistake::BesidePath(key).into());
            }
        }
        let path = read(contents.get("path"), PathBuf::new(), findings, |text| match Path::new(text) {
            path if !path.is_absolute() => Err(Mistake::RelativePath(clip(text))),
            _ if text.len() > PATH_MAX => Err(MetricsMistake::TooLong(clip(text)).into()),
            path => Ok(path.to_owned()),
        });
        return Some(Metrics::Unix(path));
    }
    if contents.get("address").is_none() {
        findings.mistake(&written.name.span, MetricsMistake::Nowhere.into());
        return None;
    }
    let address = read(contents.get("address"), None, findings, |text| {
        let address: IpAddr = text.trim().parse().map_err(|_| MetricsMistake::Address(clip(text)))?;
        if address.is_multicast() { Err(MetricsMistake::Multicast(address).into()) } else { Ok(Some(address)) }
    });
    address.map(|address| Metrics::Tcp(SocketAddr::new(address, port)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Config, ConfigError, Source, Warnings, parse};

    fn file(keys: &str) -> String {
        format!("fence_virtd {{ listener = \"multicast\"; backend = \"libvirt\"; metrics {{ {keys} }} }}")
    }

    fn parsed(text: &str) -> Result<(Config, Warnings), ConfigError> {
        parse(&Source::new(Path::new("f"), text.as_bytes()), Warnings::default())
    }

    #[test]
    fn metrics_are_off_without_the_section_and_have_one_place_with_it() {
        let of = |text: &str| parsed(text).unwrap_or_else(|error| panic!("{}", error.render(false))).0.metrics;
        assert_eq!(of("fence_virtd { listener = \"multicast\"; backend = \"libvirt\"; }"), None);
        for (keys, place) in [
            ("address = \"127.0.0.1\";", "127.0.0.1:12290"),
            ("address = \" ::1 \"; port = \"9000\";", "[::1]:9000"),
            ("path = \"/run/m.sock\";", "/run/m.sock"),
        ] {
            assert_eq!(of(&file(keys)).map(|metrics| metrics.to_string()).as_deref(), Some(place), "{keys}");
        }
    }

    #[test]
    fn a_section_without_a_place_or_with_two_is_a_mistake() {
        let long = format!("/{}", "x".repeat(PATH_MAX));
        for (keys, mistake) in [
            ("", MetricsMistake::Nowhere.into()),
            ("port = \"9000\";", MetricsMistake::Nowhere.into()),
            ("address = \"::1\"; path = \"/x\";", MetricsMistake::BesidePath("address").into()),
            ("port = \"9000\"; path = \"/x\";", MetricsMistake::BesidePath("port").into()),
            ("address = \"localhost\";", MetricsMistake::Address("localhost".into()).into()),
            ("address = \"225.0.0.12\";", MetricsMistake::Multicast([225, 0, 0, 12].into()).into()),
            ("path = \"m.sock\";", Mistake::RelativePath("m.sock".into())),
            (&format!("path = \"{long}\";"), MetricsMistake::TooLong(clip(&long)).into()),
            ("address = \"::1\"; port = \"0\";", Mistake::Port("0".into())),
        ] {
            let Err(ConfigError::Mistakes(mistakes)) = parsed(&file(keys)) else { panic!("{keys}: accepted") };
            assert_eq!(mistakes.iter().map(|(_, one)| one.clone()).collect::<Vec<Mistake>>(), [mistake], "{keys}");
        }
    }
}
