//! What can be wrong with a configuration, in words for the administrator: what, where, and what to
//! write instead.

use std::fmt;
use std::io;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use annotate_snippets::Level;

use super::key::KeyFileError;
use super::position::{Message, Position};
use super::raw::SyntaxKind;
use super::syntax::{syntax_help, syntax_label};
use super::warning::Warnings;

/// A configuration that the daemon refuses to start with. All of these are the administrator's to
/// mend.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration file {}: {error}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        error: io::Error,
    },
    /// The file is larger than any configuration.
    #[error("{} is larger than {} bytes: this is no configuration file", place.path().display(), super::MAX_SIZE)]
    TooLarge {
        /// Where reading ended.
        place: Position,
    },
    /// The key that the file means cannot be used.
    #[error("{}: {}", .0.place, .0.error)]
    Key(Box<UnusableKey>),
    /// The file says something wrong, in at least one place.
    #[error("{0}")]
    Mistakes(Mistakes),
}

/// A key that cannot be used, and what the file says about it.
#[derive(Debug)]
pub struct UnusableKey {
    /// The value of `key_file`, or where that is missing.
    pub(super) place: Position,
    /// Whether the file says `key_file` at all: otherwise the default is meant.
    pub(super) is_written: bool,
    /// Why not.
    pub(super) error: KeyFileError,
    /// What is doubtful besides, such as a misspelled `key_file`.
    pub(super) warnings: Warnings,
}

/// Every mistake of a file in the order of the file, at least one, and what is doubtful besides
/// (which may explain them).
#[derive(Debug)]
pub struct Mistakes {
    pub(super) list: Vec<(Position, Mistake)>,
    pub(super) warnings: Warnings,
}

impl ConfigError {
    /// The error as it belongs on a terminal or in a log: the place with its line and a caret, and
    /// what to write instead. Several lines, the last one without its end; escape sequences only if
    /// `colours`.
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
                let (title, place) = (self.to_string(), Some((place, "and it goes on".to_owned())));
                let help = "name the configuration file with -f".to_owned();
                Message { level: Level::ERROR, title, place, help }.render(colours)
            }
            Self::Key(unusable) => {
                let UnusableKey { place, is_written, error, warnings } = unusable.as_ref();
                let label = if *is_written { error.label() } else { "no `key_file` in here: the default is meant" };
                let place = Some((place, label.to_owned()));
                let message = Message { level: Level::ERROR, title: error.to_string(), place, help: error.help() };
                with_warnings(vec![message.render(colours)], warnings, colours)
            }
            Self::Mistakes(mistakes) => mistakes.render(colours),
        }
    }
}

impl Mistakes {
    /// The mistakes and their places, first of the file first.
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

/// Errors, and what may explain them.
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

/// One thing that is wrong at one place of the file.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Mistake {
    /// The file is not of the grammar.
    #[error("{0}")]
    Syntax(SyntaxKind),
    /// `listeners = "...";`
    #[error("`{0}` is a section, not a value")]
    SectionExpected(String),
    /// `port { ... }`
    #[error("`{0}` is a value, not a section")]
    ValueExpected(String),
    /// The file doesn't say which listener or backend.
    #[error("the file names no {0}")]
    Missing(Plugin),
    /// A listener or backend that stock servers have and this daemon has not.
    #[error("the {plugin} \"{name}\" is not supported yet")]
    NotYet {
        /// Which of the two.
        plugin: Plugin,
        /// Its name.
        name: String,
    },
    /// A listener or backend that nobody has.
    #[error("there is no {plugin} \"{name}\"")]
    NoSuch {
        /// Which of the two.
        plugin: Plugin,
        /// Its name.
        name: String,
    },
    /// `hash` or `auth` of an unknown name.
    #[error("`{key}` is no digest that clients know: \"{value}\"")]
    Hash {
        /// `hash` or `auth`.
        key: &'static str,
        /// What it says.
        value: String,
    },
    /// `port` is none.
    #[error("\"{0}\" is no port number")]
    Port(String),
    /// `family` is neither.
    #[error("\"{0}\" is no address family")]
    Family(String),
    /// `address` is none.
    #[error("\"{0}\" is no IP address")]
    Address(String),
    /// `address` is not a group's.
    #[error("{0} is not a multicast address")]
    NotMulticast(IpAddr),
    /// `address` and `family` disagree.
    #[error("{0} is not an address of the configured family")]
    OtherFamily(IpAddr),
    /// No interface can have this name.
    #[error("\"{0}\" is no name of a network interface")]
    Interface(String),
    /// `attach` is unknown.
    #[error("\"{0}\" is no way to attach")]
    Attach(String),
    /// Not one of the words that a key can have.
    #[error("`{key}` is none of its words: \"{value}\"")]
    Choice {
        /// The key.
        key: &'static str,
        /// What stands there.
        value: String,
        /// What could.
        known: Vec<&'static str>,
    },
    /// A path that depends on where the daemon was started.
    #[error("\"{0}\" is no absolute path")]
    RelativePath(String),
    /// A switch that is neither on nor off.
    #[error("`{key}` is neither on nor off: \"{value}\"")]
    Switch {
        /// Which.
        key: &'static str,
        /// What it says.
        value: String,
    },
    /// A switch that reads like on and that stock servers read as off.
    #[error("`{key} = \"{value}\"` reads like on, but stock servers take it for off")]
    AmbiguousSwitch {
        /// Which.
        key: &'static str,
        /// What it says.
        value: String,
    },
    /// A number that is none, or out of its bounds.
    #[error("`{key}` is no number from {least} to {most}: \"{value}\"")]
    Number {
        /// The key.
        key: &'static str,
        /// What stands there.
        value: String,
        /// The least that it can be.
        least: u32,
        /// The most that it can be.
        most: u32,
    },
    /// A length of time that is none, or out of its bounds.
    #[error("`{key}` is no time from a minute to a year: \"{value}\"")]
    Span {
        /// The key.
        key: &'static str,
        /// What stands there.
        value: String,
    },
    /// `reboot_pause` is no time, or too long a one.
    #[error("`reboot_pause` is no time from 0 to {} seconds: \"{value}\"", most.as_secs())]
    Pause {
        /// What stands there.
        value: String,
        /// The longest that it can be.
        most: Duration,
    },
    /// `reboot_pause` is longer than a client can wait that is told when the domain runs again.
    #[error("with `reboot_reply = \"on\"` no client can wait for `reboot_pause = \"{value}\"`")]
    PauseBeforeReply {
        /// What stands there.
        value: String,
        /// The longest that it can be then.
        most: Duration,
    },
    /// `debug` is no number.
    #[error("\"{0}\" is no debug level")]
    Level(String),
    /// A `groups` section without any group.
    #[error("the `groups` section says nothing")]
    NoGroup,
    /// A group that permits nothing.
    #[error("this group has no `{0}`")]
    GroupLacks(&'static str),
    /// A group has a key, and requests or callbacks are not signed.
    #[error("a group has a `key_file`, which `none` for `hash` or `auth` makes worthless")]
    GroupKeyUnused,
    /// A group's `key_file`, not spelt like that.
    #[error("`{0}` gives this group no key of its own")]
    GroupKeyMisspelt(String),
    /// A group's `ip` that is no address.
    #[error("\"{0}\" is no IP address")]
    MemberAddress(String),
    /// `ip` or `uuid` where it restricts nothing.
    #[error("`{0}` means nothing outside of a group")]
    OutsideGroup(String),
    /// A section of which only the last one would count, twice, and not with the same contents.
    #[error("`{name}` stands here again, and says something else than on line {line}")]
    SectionTwice {
        /// The section.
        name: String,
        /// Where the other one is.
        line: usize,
    },
    /// Something that was meant as a restriction and would be none.
    #[error("`{0}` does not restrict anything here")]
    Misplaced(String),
}

/// What `listener` and `backend` choose from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plugin {
    /// Where requests come from.
    Listener,
    /// What carries them out.
    Backend,
}

impl Plugin {
    /// The key that chooses.
    #[must_use]
    pub const fn key(self) -> &'static str {
        match self {
            Self::Listener => "listener",
            Self::Backend => "backend",
        }
    }

    /// The one choice that works.
    #[must_use]
    pub const fn supported(self) -> &'static str {
        match self {
            Self::Listener => "multicast",
            Self::Backend => "libvirt",
        }
    }
}

impl fmt::Display for Plugin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.key())
    }
}

impl Mistake {
    /// What stands beside the caret.
    #[must_use]
    pub fn label(&self) -> String {
        match self {
            Self::Syntax(kind) => syntax_label(kind).to_owned(),
            Self::SectionExpected(_) => "expected braces".to_owned(),
            Self::ValueExpected(_) => "expected a value".to_owned(),
            Self::Missing(plugin) => format!("`{plugin}` belongs into the `fence_virtd` section"),
            Self::NotYet { plugin, .. } => format!("only \"{}\" so far", plugin.supported()),
            Self::NoSuch { plugin, .. } => format!("unknown {plugin}"),
            Self::Hash { .. } => "unknown digest".to_owned(),
            Self::Port(_) => "not a number from 1 to 65535".to_owned(),
            Self::Family(_) => "unknown family".to_owned(),
            Self::Address(_) | Self::MemberAddress(_) => "not an IP address".to_owned(),
            Self::NotMulticast(_) => "no group can be joined here".to_owned(),
            Self::OtherFamily(_) => "of the other family".to_owned(),
            Self::Interface(_) => "not a possible name".to_owned(),
            Self::Attach(_) | Self::Choice { .. } => "unknown".to_owned(),
            Self::RelativePath(_) => "does not begin with `/`".to_owned(),
            Self::Switch { .. } | Self::AmbiguousSwitch { .. } => "write a number".to_owned(),
            Self::Number { least, .. } => format!("not a number, or not from {least} on"),
            Self::Span { .. } => "not a time, or too short or too long".to_owned(),
            Self::Pause { .. } => "not a number of seconds, or too many".to_owned(),
            Self::PauseBeforeReply { most, .. } => format!("more than {} seconds", most.as_secs()),
            Self::Level(_) => "not a number".to_owned(),
            Self::NoGroup => "nobody would be permitted anything".to_owned(),
            Self::GroupLacks("key_file") => "there is only a second key".to_owned(),
            Self::GroupKeyMisspelt(_) => "the group would go by the listener's key".to_owned(),
            Self::GroupKeyUnused => "anybody could act in any group".to_owned(),
            Self::GroupLacks(_) => "this group permits nothing".to_owned(),
            Self::OutsideGroup(_) => "not inside a `group`".to_owned(),
            Self::SectionTwice { line, .. } => format!("which of the two is meant, this one or that on line {line}?"),
            Self::Misplaced(_) => "everyone could fence everything".to_owned(),
        }
    }

    /// What to write instead.
    #[must_use]
    pub fn help(&self) -> String {
        match self {
            Self::Syntax(kind) => syntax_help(kind),
            Self::SectionExpected(name) => format!("write `{name} {{ ... }}`"),
            Self::ValueExpected(name) => format!("write `{name} = \"...\";`"),
            Self::Missing(plugin) => {
                format!("write `fence_virtd {{ {plugin} = \"{}\"; ... }}`", plugin.supported())
            }
            Self::NotYet { plugin, .. } | Self::NoSuch { plugin, .. } => {
                format!("write `{plugin} = \"{}\";`", plugin.supported())
            }
            Self::Hash { .. } => "write one of \"sha256\", \"sha512\", \"sha1\", \"none\"".to_owned(),
            Self::Port(_) => "write a port such as \"1229\", which clients use unless told otherwise".to_owned(),
            Self::Family(_) => "write \"ipv4\" or \"ipv6\"".to_owned(),
            Self::Address(_) | Self::NotMulticast(_) => {
                "write the address that clients send to: \"225.0.0.12\" or \"ff05::3:1\" unless they are told otherwise"
                    .to_owned()
            }
            Self::OtherFamily(address) => {
                let family = if address.is_ipv4() { "ipv4" } else { "ipv6" };
                format!("write `family = \"{family}\";`, or another address")
            }
            Self::Interface(name) => match name.split_once(':') {
                // `ip address` shows it beside an address.
                Some((interface, _)) if !interface.is_empty() => {
                    format!("this is the label of an address: write the interface's own name, \"{interface}\"")
                }
                _ => "write a name as `ip link` prints it, such as \"virbr0\", or \"none\"".to_owned(),
            },
            Self::Choice { known, .. } => format!("write one of \"{}\"", known.join("\", \"")),
            Self::RelativePath(_) => "write the whole path, from `/` on".to_owned(),
            Self::Number { key, .. } => format!("write a whole number, or leave `{key}` out for the default"),
            Self::Span { .. } => "write a number and `s`, `m`, `h` or `d`, such as \"24h\"".to_owned(),
            Self::Attach(_) => "write one of \"auto\", \"native\", \"generic\", \"tcx\", \"off\"".to_owned(),
            Self::Switch { key, .. } => format!("write `{key} = \"1\";` for on, `{key} = \"0\";` for off"),
            Self::AmbiguousSwitch { key, .. } => {
                format!("write `{key} = \"1\";` for on, `{key} = \"0\";` for what stock servers did so far")
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
                "write the address of each guest that may fence: `ip = \"192.168.122.11\";`".to_owned()
            }
            Self::GroupLacks(_) => {
                "write the name or UUID of each guest that may be fenced: `uuid = \"node1\";`".to_owned()
            }
            Self::MemberAddress(_) => {
                "write the address that the guest is called back at, such as \"192.168.122.11\"".to_owned()
            }
            Self::SectionTwice { name, line } => {
                format!("put both into one `{name}`, or remove one (stock servers forget the whole one on line {line})")
            }
            Self::OutsideGroup(_) | Self::Misplaced(_) => {
                "write `groups { group { ip = \"...\"; uuid = \"...\"; } }` at the top level of the file".to_owned()
            }
        }
    }
}
