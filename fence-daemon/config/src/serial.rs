//! Section `listeners { serial { } }`: which serial ports of domains are heard.

use std::path::{Path, PathBuf};

use strum::{IntoStaticStr, VariantArray};

use super::choices::choice;
use super::contents::{Contents, Findings, Scope};
use super::raw::{Span, clip};
use super::resolved::{NOTHING, read};

pub(super) const SERIAL: Scope<'static> = Scope { keys: &["path", "mode", "uri", "permit", "key_file"], ..NOTHING };

/// Section `listeners { serial { } }`. It has no key: the line itself says which domain asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Serial {
    /// The name of the section; `None` for the one that fence_virtd knows.
    pub name: Option<String>,
    /// The directory: the sockets directly in it are heard.
    pub path: PathBuf,
    /// Which devices have the sockets.
    pub mode: SerialMode,
    /// The libvirt URI whose domains are heard; `None` for all URIs.
    pub uri: Option<String>,
    /// Whether every domain with such a socket may fence every domain.
    pub everyone: bool,
}

/// Which devices of domains have the sockets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, IntoStaticStr, VariantArray)]
#[strum(serialize_all = "lowercase")]
pub enum SerialMode {
    /// Serial ports (`<serial>`).
    #[default]
    Serial,
    /// Channels (`<channel>`).
    Vmchannel,
}

impl Serial {
    /// Whether a socket is directly in the directory. Nothing is resolved: the paths are compared.
    #[must_use]
    pub fn holds(&self, socket: &Path) -> bool {
        socket.parent() == Some(&self.path)
    }
}

/// A mistake about this listener.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SerialMistake {
    /// Nothing says which sockets are meant.
    #[error("serial has no `path`")]
    NoPath,
    /// `path` is relative.
    #[error("`path` of serial must begin with `/`: \"{0}\"")]
    Relative(String),
    /// Nothing says who may fence whom.
    #[error("serial needs `groups`: a serial line has no key")]
    NoGroups,
    /// `permit` has another value.
    #[error("`permit` can only be \"everyone\", not \"{0}\"")]
    Permit(String),
    /// The file has groups as well.
    #[error("`permit` contradicts `groups`")]
    PermitBesideGroups,
    /// No backend has this URI.
    #[error("no backend has the `uri` \"{0}\"")]
    Uri(String),
}

impl SerialMistake {
    /// The text beside the caret.
    #[must_use]
    pub fn label(&self) -> &'static str {
        match self {
            Self::NoPath => "which sockets?",
            Self::Relative(_) => "libvirt's paths are absolute",
            Self::NoGroups => "which domain may fence which?",
            Self::Permit(_) => "unknown value",
            Self::PermitBesideGroups => "the groups say who may fence",
            Self::Uri(_) => "its domains are not known",
        }
    }

    /// The remedy.
    #[must_use]
    pub fn help(&self) -> &'static str {
        match self {
            Self::NoPath | Self::Relative(_) => {
                "write the directory of the sockets in the domains' XML, such as `path = \"/run/fence\";`"
            }
            Self::NoGroups => {
                "write `groups { group { from = \"node1\"; uuid = \"node2\"; } }` with your domains, \
                 or `permit = \"everyone\";` in serial"
            }
            Self::Permit(_) => "write `permit = \"everyone\";`, or `groups`",
            Self::PermitBesideGroups => "remove `permit`",
            Self::Uri(_) => "write it in `backends { libvirt { } }` too, or remove it here",
        }
    }
}

/// What of the rest of the file this section depends on.
#[derive(Clone, Copy)]
pub(super) struct Around<'f> {
    /// The URIs of the backend.
    pub(super) uris: &'f [String],
    /// Whether there are groups.
    pub(super) groups: bool,
}

/// Reads the section of this name. `at` is its span, or that at which `listener` names serial.
pub(super) fn serial(
    name: Option<String>,
    section: &Contents<'_>,
    at: &Span,
    around: Around<'_>,
    findings: &mut Findings<'_>,
) -> Serial {
    let path = section.get("path");
    if path.is_none() {
        findings.mistake(at, SerialMistake::NoPath.into());
    }
    let path = read(path, PathBuf::new(), findings, |text| {
        let path = Path::new(text);
        // Without the slashes at its end.
        if path.is_absolute() {
            Ok(path.components().collect())
        } else {
            Err(SerialMistake::Relative(clip(text)).into())
        }
    });
    let everyone = read(section.get("permit"), false, findings, |text| match text.to_ascii_lowercase().as_str() {
        "everyone" if around.groups => Err(SerialMistake::PermitBesideGroups.into()),
        "everyone" => Ok(true),
        _ => Err(SerialMistake::Permit(clip(text)).into()),
    });
    if !around.groups && section.get("permit").is_none() {
        findings.mistake(at, SerialMistake::NoGroups.into());
    }
    let uri = read(section.get("uri"), None, findings, |text| {
        let is_known = around.uris.iter().any(|uri| uri == text);
        if is_known { Ok(Some(text.to_owned())) } else { Err(SerialMistake::Uri(clip(text)).into()) }
    });
    Serial { name, path, mode: choice(section, "mode", findings), uri, everyone }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Config, ConfigError, Listener, Source, Warnings, parse};

    fn parsed(keys: &str, more: &str) -> Result<Config, Vec<String>> {
        let text = format!(
            "fence_virtd {{ listener = \"serial\"; backend = \"libvirt\"; }}\nlisteners {{ serial {{ {keys} }} }}\n{more}"
        );
        match parse(&Source::new(Path::new("f"), text.as_bytes()), Warnings::default()) {
            Ok((config, warnings)) => {
                assert!(warnings.is_empty(), "{}", warnings.render(false));
                Ok(config)
            }
            Err(ConfigError::Mistakes(mistakes)) => {
                Err(mistakes.iter().map(|(place, mistake)| format!("{}: {mistake}", place.line())).collect())
            }
            Err(error) => panic!("{error:?}"),
        }
    }

    const GROUPS: &str = "groups { group { from = \"a\"; uuid = \"b\"; } }";

    #[test]
    fn each_key_is_read_and_no_key_file_is_wanted() {
        let all = "path = \"/run/fence//\"; mode = \"VMCHANNEL\"; uri = \"qemu:///system\"; key_file = \"/nowhere\";";
        let config = parsed(all, GROUPS).unwrap();
        let expected = Serial {
            name: None,
            path: "/run/fence".into(),
            mode: SerialMode::Vmchannel,
            uri: Some("qemu:///system".to_owned()),
            everyone: false,
        };
        assert_eq!(config.listeners, [Listener::Serial(expected)]);
        assert_eq!(config.listeners[0].key_files(), None);
        let config = parsed("path = \"/run/fence\"; permit = \"everyone\";", "").unwrap();
        let Listener::Serial(serial) = &config.listeners[0] else { panic!("{config:?}") };
        assert!(serial.everyone && serial.uri.is_none() && serial.mode == SerialMode::Serial);
    }

    #[test]
    fn nothing_is_permitted_that_is_not_written_down() {
        let path = "path = \"/run/fence\";";
        for (keys, more, mistake) in [
            (path, "", "2: serial needs `groups`: a serial line has no key"),
            ("", GROUPS, "2: serial has no `path`"),
            ("path = \"fence\";", GROUPS, "2: `path` of serial must begin with `/`: \"fence\""),
            (&format!("{path} permit = \"everyone\";"), GROUPS, "2: `permit` contradicts `groups`"),
            (&format!("{path} permit = \"all\";"), "", "2: `permit` can only be \"everyone\", not \"all\""),
            (&format!("{path} uri = \"lxc:///\";"), GROUPS, "2: no backend has the `uri` \"lxc:///\""),
        ] {
            assert_eq!(parsed(keys, more).unwrap_err(), [mistake], "{keys} {more}");
        }
        assert!(parsed(&format!("{path} mode = \"1\";"), GROUPS).is_err());
    }

    #[test]
    fn only_sockets_directly_in_the_directory_are_meant() {
        let config = parsed("path = \"/run/fence/\";", GROUPS).unwrap();
        let Listener::Serial(serial) = &config.listeners[0] else { panic!("{config:?}") };
        assert!(serial.holds(Path::new("/run/fence/node1")));
        for other in ["/run/fence", "/run/fence/a/b", "/run/fences/a", "/run/fence/../a", "node1"] {
            assert!(!serial.holds(Path::new(other)), "{other}");
        }
    }
}
