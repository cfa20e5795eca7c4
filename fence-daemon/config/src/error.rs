//! What can be wrong with a configuration: the mistake, its position, and the remedy.

use std::fmt;
use std::io;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use annotate_snippets::Level;

use super::key::KeyFileError;
use super::listeners::ListenerMistake;
use super::plugin::Plugin;
use super::position::{Message, Position};
use super::raw::SyntaxKind;
use super::syntax::{syntax_help, syntax_label};
use super::warning::Warnings;
use super::{cpg::CpgMistake, metrics::MetricsMistake, serial::SerialMistake, tcp::TcpMistake};

/// A configuration with which the daemon does not start. The administrator must correct it.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration file {}: {error}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The system's error.
        #[source]
        error: io::Error,
    },
    /// The file is too large for a configuration.
    #[error("{} is larger than {} bytes: this is no configuration file", place.path().display(), super::MAX_SIZE)]
    TooLarge {
        /// Where reading ended.
        place: Position,
    },
    /// A key that the file names cannot be used.
    #[error("{}: {}", .0.place, .0.error)]
    Key(Box<UnusableKey>),
    /// The file has at least one mistake.
    #[error("{0}")]
    Mistakes(Mistakes),
}

/// A key that cannot be used, and what the file says about it.
#[derive(Debug)]
pub struct UnusableKey {
    /// The value of `key_file`, or the section that lacks it.
    pub(super) place: Position,
    /// Whether the file has the setting. Otherwise the default applies.
    pub(super) is_written: bool,
    /// Why the key cannot be used.
    pub(super) error: KeyFileError,
    /// The warnings, such as a misspelled `key_file`.
    pub(super) warnings: Warnings,
}

/// Every mistake of a file in the file's order, at least one, and the warnings, which may explain
/// them.
#[derive(Debug)]
pub struct Mistakes {
    pub(super) list: Vec<(Position, Mistake)>,
    pub(super) warnings: Warnings,
}

impl ConfigError {
    /// The error for a terminal or a log: position, line, caret and remedy. It has several lines,
    /// the last one without a line end. Escape sequences only if `colours`.
    #[must_use]
    pub fn render(&self, colours: bool) -> String {
        let plain = |help: &str| {
            let message = Message { level: Level::ERROR, title: self.to_string(), place: None, help: help.to_owned() };
            message.render(colours)
        };
        match self {
            Self::Unreadable { error, .. } if error.kind() == io::ErrorKind::PermissionDenied => {
                plain("run the daemon as root")
            }
            Self::Unreadable { .. } => plain("make one with `fence-daemon -c`, or name another file with -f"),
            Self::TooLarge { place } => {
                let (title, place) = (self.to_string(), Some((place, "the file goes on here".to_owned())));
                let help = "name the configuration file with -f".to_owned();
                Message { level: Level::ERROR, title, place, help }.render(colours)
            }
            Self::Key(unusable) => {
                let UnusableKey { place, is_written, error, warnings } = unusable.as_ref();
                let label = if *is_written { error.label() } else { "no `key_file` in here: the default applies" };
                let place = Some((place, label.to_owned()));
                let message = Message { level: Level::ERROR, title: error.to_string(), place, help: error.help() };
                with_warnings(vec![message.render(colours)], warnings, colours)
            }
            Self::Mistakes(mistakes) => mistakes.render(colours),
        }
    }
}

impl Mistakes {
    /// The mistakes with their positions, in the file's order.
    pub fn iter(&self) -> impl Iterator<Item = (&Position, &Mistake)> {
        self.list.iter().map(|(place, mistake)| (place, mistake))
    }

    fn render(&self, colours: bool) -> String {
        let parts = (self.list.iter())
            .map(|(place, mistake)| {
                let (level, title) = (Level::ERROR, mistake.to_string());
                Message { level, title, place: Some((place, mistake.label())), help: mistake.help() }.render(colours)
            })
            .collect();
        with_warnings(parts, &self.warnings, colours)
    }
}

/// The errors, followed by the warnings that may explain them.
fn with_warnings(mut parts: Vec<String>, warnings: &Warnings, colours: bool) -> String {
    if !warnings.is_empty() {
        parts.push(warnings.render(colours));
    }
    parts.join("\n\n")
}

impl fmt::Display for Mistakes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (place, mistake)) in self.list.iter().enumerate() {
            let comma = if index == 0 { "" } else { "; " };
            write!(f, "{comma}{place}: {mistake}")?;
        }
        Ok(())
    }
}

/// A mistake at one position of the file.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Mistake {
    /// The file does not follow the grammar.
    #[error("{0}")]
    Syntax(SyntaxKind),
    /// `listeners = "...";`
    #[error("`{0}` is a section, not a value")]
    SectionExpected(String),
    /// `port { ... }`
    #[error("`{0}` is a value, not a section")]
    ValueExpected(String),
    /// The file names no listener or no backend.
    #[error("the file names no {0}")]
    Missing(Plugin),
    /// fence_virtd has this listener or backend, this daemon does not.
    #[error("the {plugin} \"{name}\" is not supported yet")]
    NotYet {
        /// Listener or backend.
        plugin: Plugin,
        /// Its name.
        name: String,
    },
    /// The list of listeners.
    #[error(transparent)]
    Listener(#[from] ListenerMistake),
    /// The tcp listener.
    #[error(transparent)]
    Tcp(#[from] TcpMistake),
    /// The serial listener.
    #[error(transparent)]
    Serial(#[from] SerialMistake),
    /// The cluster backend.
    #[error(transparent)]
    Cpg(#[from] CpgMistake),
    /// The section of the metrics.
    #[error(transparent)]
    Metrics(#[from] MetricsMistake),
    /// No such listener or backend exists.
    #[error("there is no {plugin} \"{name}\"")]
    NoSuch {
        /// Listener or backend.
        plugin: Plugin,
        /// Its name.
        name: String,
    },
    /// `port` is not a port number.
    #[error("\"{0}\" is no port number")]
    Port(String),
    /// `family` is unknown.
    #[error("\"{0}\" is not an address family")]
    Family(String),
    /// `address` is not an IP address.
    #[error("\"{0}\" is no IP address")]
    Address(String),
    /// `address` is not a multicast address.
    #[error("{0} is not a multicast address")]
    NotMulticast(IpAddr),
    /// `address` and `family` contradict each other.
    #[error("{0} is not an address of the configured family")]
    OtherFamily(IpAddr),
    /// No interface can have this name.
    #[error("\"{0}\" cannot be the name of a network interface")]
    Interface(String),
    /// A key has none of its possible values.
    #[error("`{key}` has an unknown value: \"{value}\"")]
    Choice {
        /// The key.
        key: &'static str,
        /// The value.
        value: String,
        /// The possible values.
        known: Vec<&'static str>,
    },
    /// A path that depends on where the daemon is started.
    #[error("\"{0}\" is not an absolute path")]
    RelativePath(String),
    /// A switch is neither on nor off.
    #[error("`{key}` has an unknown value: \"{value}\"")]
    Switch {
        /// The key.
        key: &'static str,
        /// The value.
        value: String,
    },
    /// A switch looks on, and fence_virtd reads it as off.
    #[error("`{key} = \"{value}\"` looks on, but fence_virtd reads it as off")]
    AmbiguousSwitch {
        /// The key.
        key: &'static str,
        /// The value.
        value: String,
    },
    /// A number is invalid or out of its range.
    #[error("`{key}` is no number from {least} to {most}: \"{value}\"")]
    Number {
        /// The key.
        key: &'static str,
        /// The value.
        value: String,
        /// The smallest number.
        least: u32,
        /// The largest number.
        most: u32,
    },
    /// A length of time is invalid or out of its range.
    #[error("`{key}` is no time from a minute to a year: \"{value}\"")]
    Span {
        /// The key.
        key: &'static str,
        /// The value.
        value: String,
    },
    /// `reboot_pause` is no time, or too long.
    #[error("`reboot_pause` is no time from 0 to {} seconds: \"{value}\"", most.as_secs())]
    Pause {
        /// The value.
        value: String,
        /// The longest pause.
        most: Duration,
    },
    /// `reboot_pause` is too long for a client that waits until the domain runs again.
    #[error("with `reboot_reply = \"on\"` no client can wait for `reboot_pause = \"{value}\"`")]
    PauseBeforeReply {
        /// The value.
        value: String,
        /// The longest pause with `reboot_reply = "on"`.
        most: Duration,
    },
    /// `debug` is no number.
    #[error("\"{0}\" is not a debug level")]
    Level(String),
    /// A `groups` section has no group.
    #[error("the `groups` section has no group")]
    NoGroup,
    /// A group lacks a key without which it permits nothing.
    #[error("this group has no `{0}`{or}", or = if *.0 == "ip" { " and no `from`" } else { "" })]
    GroupLacks(&'static str),
    /// A group has its own key, and requests or callbacks are not signed.
    #[error("a group has a `key_file`, which `none` for `hash` or `auth` makes useless")]
    GroupKeyUnused,
    /// A group's `key_file` is misspelled.
    #[error("`{0}` gives this group no key of its own")]
    GroupKeyMisspelt(String),
    /// A group's `ip` is not an IP address.
    #[error("\"{0}\" is no IP address")]
    MemberAddress(String),
    /// `ip` or `uuid` stands where it restricts nothing.
    #[error("`{0}` means nothing outside of a group")]
    OutsideGroup(String),
    /// A section that counts once is there twice, with different contents.
    #[error("`{name}` is here again, with other contents than on line {line}")]
    SectionTwice {
        /// The section.
        name: String,
        /// The line of the other one.
        line: usize,
    },
    /// A restriction stands where it restricts nothing.
    #[error("`{0}` does not restrict anything here")]
    Misplaced(String),
    /// A reload would change what stays as it is while the daemon runs.
    #[error("`{0}` cannot change while the daemon runs")]
    Fixed(&'static str),
    /// A reload would switch the kernel program of a listener on or off.
    #[error("a listener's groups cannot get the first `key_file`, or lose the last one, while the daemon runs")]
    GroupKeysFixed,
    /// A reload would give a listener the socket of a running one.
    #[error("the socket of `{0}` is another one's while the daemon runs")]
    SocketInUse(String),
    /// A reload cannot begin to serve a listener, and why.
    #[error("{0}")]
    NotServed(String),
}

impl Mistake {
    /// The text beside the caret.
    #[must_use]
    pub fn label(&self) -> String {
        match self {
            Self::Syntax(kind) => syntax_label(kind).to_owned(),
            Self::SectionExpected(_) => "expected braces".to_owned(),
            Self::ValueExpected(_) => "expected a value".to_owned(),
            Self::Missing(plugin) => format!("`{plugin}` belongs in the `fence_virtd` section"),
            Self::NotYet { plugin: Plugin::Listener, .. } => "none of those in `fence-daemon -l`".to_owned(),
            Self::NotYet { plugin: Plugin::Backend, .. } => "neither \"libvirt\" nor \"cpg\"".to_owned(),
            Self::Listener(mistake) => mistake.label(),
            Self::Tcp(mistake) => mistake.label().to_owned(),
            Self::Serial(mistake) => mistake.label().to_owned(),
            Self::Cpg(mistake) => mistake.label().to_owned(),
            Self::Metrics(mistake) => mistake.label().to_owned(),
            Self::NoSuch { plugin, .. } => format!("unknown {plugin}"),
            Self::Port(_) => "not a number from 1 to 65535".to_owned(),
            Self::Family(_) => "unknown family".to_owned(),
            Self::Address(_) | Self::MemberAddress(_) => "not an IP address".to_owned(),
            Self::NotMulticast(_) => "no group can be joined here".to_owned(),
            Self::OtherFamily(_) => "of the other family".to_owned(),
            Self::Interface(_) => "not a possible name".to_owned(),
            Self::Choice { .. } => "unknown".to_owned(),
            Self::RelativePath(_) => "does not begin with `/`".to_owned(),
            Self::Switch { .. } | Self::AmbiguousSwitch { .. } => "write a number".to_owned(),
            Self::Number { least, .. } => format!("not a number, or not from {least} on"),
            Self::Span { .. } => "not a time, or too short or too long".to_owned(),
            Self::Pause { .. } => "not a number of seconds, or too many".to_owned(),
            Self::PauseBeforeReply { most, .. } => format!("more than {} seconds", most.as_secs()),
            Self::Level(_) => "not a number".to_owned(),
            Self::NoGroup => "no client could fence any domain".to_owned(),
            Self::GroupLacks("key_file") => "there is only a second key".to_owned(),
            Self::GroupKeyMisspelt(_) => "the group would use the listener's key".to_owned(),
            Self::GroupKeyUnused => "any client could act in any group".to_owned(),
            Self::GroupLacks(_) => "this group permits nothing".to_owned(),
            Self::OutsideGroup(_) => "not inside a `group`".to_owned(),
            Self::SectionTwice { line, .. } => format!("is this one meant, or the one on line {line}?"),
            Self::Misplaced(_) => "everyone could fence everything".to_owned(),
            Self::Fixed(_) => "not what the daemon was started with".to_owned(),
            Self::GroupKeysFixed => "it switches the kernel program off or on".to_owned(),
            Self::NotServed(_) => "cannot be served now".to_owned(),
            Self::SocketInUse(_) => "the new socket is opened before the old one is closed".to_owned(),
        }
    }

    /// The remedy.
    #[must_use]
    pub fn help(&self) -> String {
        match self {
            Self::Syntax(kind) => syntax_help(kind),
            Self::SectionExpected(name) => format!("write `{name} {{ ... }}`"),
            Self::ValueExpected(name) => format!("write `{name} = \"...\";`"),
            Self::Missing(plugin) => format!("write `fence_virtd {{ {plugin} = \"{}\"; ... }}`", plugin.usual()),
            Self::Listener(mistake) => mistake.help(),
            Self::Tcp(mistake) => mistake.help().to_owned(),
            Self::Serial(mistake) => mistake.help().to_owned(),
            Self::Cpg(mistake) => mistake.help().to_owned(),
            Self::Metrics(mistake) => mistake.help().to_owned(),
            Self::NotYet { plugin, .. } | Self::NoSuch { plugin, .. } => {
                format!("write `{plugin} = \"{}\";`", plugin.usual())
            }
            Self::Port(_) => "write a port such as \"1229\", which clients use by default".to_owned(),
            Self::Family(_) => "write \"ipv4\" or \"ipv6\"".to_owned(),
            Self::Address(_) | Self::NotMulticast(_) => {
                "write the address that clients send to: \"225.0.0.12\" or \"ff05::3:1\" by default".to_owned()
            }
            Self::OtherFamily(address) => {
                let family = if address.is_ipv4() { "ipv4" } else { "ipv6" };
                format!("write `family = \"{family}\";`, or another address")
            }
            Self::Interface(name) => match name.split_once(':') {
                // `ip address` shows the label beside an address.
                Some((interface, _)) if !interface.is_empty() => {
                    format!("this is the label of an address: write the interface's own name, \"{interface}\"")
                }
                _ => "write a name as `ip link` prints it, such as \"virbr0\", or \"none\"".to_owned(),
            },
            Self::Choice { known, .. } => format!("write one of \"{}\"", known.join("\", \"")),
            Self::RelativePath(_) => "write the whole path, from `/` on".to_owned(),
            Self::Number { key, .. } => format!("write a whole number, or leave `{key}` out for the default"),
            Self::Span { .. } => "write a number and `s`, `m`, `h` or `d`, such as \"24h\"".to_owned(),
            Self::Switch { key, .. } => format!("write `{key} = \"1\";` for on, `{key} = \"0\";` for off"),
            Self::AmbiguousSwitch { key, .. } => {
                format!("write `{key} = \"1\";` for on, `{key} = \"0\";` for what fence_virtd did so far")
            }
            Self::Pause { .. } => "write seconds, with up to three digits after the point, such as \"2.5\"".to_owned(),
            Self::PauseBeforeReply { most, .. } => {
                format!("write a pause of at most {} seconds, or `reboot_reply = \"off\";`", most.as_secs())
            }
            Self::Level(_) => "write a number: 0 for the usual messages, 1 and up for more".to_owned(),
            Self::NoGroup => {
                "write `group { ip = \"...\"; uuid = \"...\"; }` into it, or remove it to permit everyone everything"
                    .to_owned()
            }
            Self::GroupLacks("key_file") => "write `key_file` beside `key_file2`".to_owned(),
            Self::GroupKeyMisspelt(_) => "write `key_file` or `key_file2`".to_owned(),
            Self::GroupKeyUnused => "remove `hash` and `auth`, or the groups' `key_file`".to_owned(),
            Self::GroupLacks("ip") => {
                "write the address or the domain of each guest that may fence: `ip = \"192.168.122.11\";`, `from = \"node1\";`"
                    .to_owned()
            }
            Self::GroupLacks(_) => {
                "write the name or UUID of each guest that may be fenced: `uuid = \"node1\";`".to_owned()
            }
            Self::MemberAddress(_) => {
                "write the address that the guest is called back at, such as \"192.168.122.11\"".to_owned()
            }
            Self::SectionTwice { name, line } => {
                let many = ["multicast", "tcp", "vsock"].iter().any(|kind| kind.eq_ignore_ascii_case(name));
                let rename = if many { "give this one another name, " } else { "" };
                format!("{rename}put both into one `{name}`, or remove one (fence_virtd ignores the one on line {line})")
            }
            Self::Fixed(_) | Self::GroupKeysFixed | Self::SocketInUse(_) => {
                "change it back, or restart the daemon: systemctl restart fence-daemon".to_owned()
            }
            Self::NotServed(_) => "reload again when that is mended: systemctl reload fence-daemon".to_owned(),
            Self::OutsideGroup(_) | Self::Misplaced(_) => {
                "write `groups { group { ip = \"...\"; uuid = \"...\"; } }` at the top level of the file".to_owned()
            }
        }
    }
}
