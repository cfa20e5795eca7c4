//! Warnings: what is doubtful in a configuration without being wrong. A warning appears once, with
//! its position, and never stops the start.

use std::fmt;
use std::path::PathBuf;

use annotate_snippets::Level;
use fence_common::words::counted;

use super::position::{Message, Position};

/// The most warnings kept: a file can repeat a mistake a million times.
const MAX_WARNINGS: usize = 100;

/// The warnings about a configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Warnings {
    list: Vec<Warning>,
    left_out: usize,
}

/// One warning.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Warning {
    place: Option<Position>,
    doubt: Doubt,
}

/// What is doubtful.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Doubt {
    /// A key that neither this daemon nor fence_virtd knows.
    #[error("unknown key `{name}`")]
    UnknownKey {
        /// As spelled.
        name: String,
        /// The key that was probably meant.
        meant: Option<&'static str>,
    },
    /// A section that has no effect.
    #[error("unknown section `{name}`")]
    UnknownSection {
        /// As spelled.
        name: String,
        /// The section that was probably meant.
        meant: Option<&'static str>,
    },
    /// A key or section that a later one overrules.
    #[error("this `{name}` is overruled by the one on line {line}")]
    Overruled {
        /// The key or section.
        name: String,
        /// The line of the later one.
        line: usize,
    },
    /// A libvirt URI that is there twice.
    #[error("this URI is already configured")]
    SameUri,
    /// `hash` or `auth` is "none".
    #[error("`{0}` is \"none\": {what}", what = without_digest(.0))]
    NoDigest(&'static str),
    /// tcp listens on the loopback address for want of an `address`.
    #[error("tcp has no `address`: only this host itself can connect, and no guest")]
    OnlyThisHost,
    /// tcp listens at a name that has no address now.
    #[error("the name {0} has no address now")]
    NameUnknown(String),
    /// tcp listens at a name that has addresses of the loopback only.
    #[error("the name {0} has only addresses of this host itself: no guest can connect")]
    NameOfThisHost(String),
    /// A group names domains that ask, and nothing tells which domain asks.
    #[error("`from` is nobody: no listener here knows which domain asks")]
    NobodyVouches,
    /// Listeners have different keys, and their clients may fence each other's domains.
    #[error("{one} and {other} have different keys, and clients of both may fence every domain")]
    Together {
        /// A listener.
        one: String,
        /// Another one.
        other: String,
    },
    /// A group counts at listeners with different keys.
    #[error("this group counts at {one} and {other}, which have different keys")]
    GroupOfTwoKeys {
        /// A listener.
        one: String,
        /// Another one.
        other: String,
    },
    /// Other users than root may change the configuration.
    #[error("{} can be changed by others than its owner (mode {mode:04o})", path.display())]
    ConfigWritable {
        /// The file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// Other users than root may read or change the key.
    #[error("the key file {} is open to others than its owner (mode {mode:04o})", path.display())]
    KeyOpen {
        /// The file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// The key belongs to another user.
    #[error("the key file {} belongs to the user with ID {uid}, who can read and change it", path.display())]
    KeyForeign {
        /// The file.
        path: PathBuf,
        /// Its owner.
        uid: u32,
    },
    /// The key is longer than what any peer reads.
    #[error("only the first 4096 bytes of the key file {} count", .0.display())]
    KeyLong(PathBuf),
    /// The key is so short that it can be guessed.
    #[error("the key in {} has {}: who records one request can guess it", path.display(), counted(len, "byte"))]
    KeyShort {
        /// The file.
        path: PathBuf,
        /// Its length in bytes.
        len: usize,
    },
    /// The key's bytes are all the same, or repeat, or count.
    #[error("the key in {} is not random (zeros, a repeated word, or the like): who records one request can guess it", .0.display())]
    KeyMonotonous(PathBuf),
    /// The second key equals the first.
    #[error("the key file {} holds the same key as `key_file`", .0.display())]
    KeyTwice(PathBuf),
    /// A group's entry matches no domain of the configured URIs.
    #[error("no domain is called `{entry}`, which {} permits to fence", the_group(group.as_deref()))]
    NoSuchDomain {
        /// The group's name.
        group: Option<String>,
        /// The `uuid` entry as written.
        entry: String,
    },
    /// The interface does not exist now. Without a configured one, no interface is suitable.
    #[error("{}", no_interface(.0.as_deref()))]
    InterfaceMissing(Option<String>),
    /// Something else takes the interface's frames.
    #[error("the interface {interface} is {what}")]
    InterfaceTaken {
        /// The interface's name.
        interface: String,
        /// What takes its frames.
        what: String,
        /// The remedy.
        instead: String,
    },
}

fn no_interface(name: Option<&str>) -> String {
    match name {
        Some(name) => format!("there is no interface {name} now"),
        None => {
            "there is no interface now that is up, can multicast and has an address of the group's family".to_owned()
        }
    }
}

fn the_group(name: Option<&str>) -> String {
    name.map_or_else(|| "a group".to_owned(), |name| format!("the group `{name}`"))
}

fn without_digest(key: &str) -> &'static str {
    match key {
        "hash" => "requests are not signed: who can send one passes for a guest",
        _ => "callbacks are not authenticated: a recorded request can be sent again",
    }
}

impl Doubt {
    /// The remedy.
    #[must_use]
    pub fn help(&self) -> String {
        match self {
            Self::UnknownKey { meant, .. } | Self::UnknownSection { meant, .. } => match meant {
                Some(meant) => format!("did you mean `{meant}`?"),
                None => "it is ignored".to_owned(),
            },
            Self::Overruled { .. } => "only the last one counts: remove this one, or put both into one".to_owned(),
            Self::SameUri => "it has no further effect: remove this one".to_owned(),
            Self::NoDigest(key) => format!("write `{key} = \"sha256\";` here and give the guests the key"),
            Self::OnlyThisHost => {
                "write this host's address in the guests' network into `listeners { tcp { address = \"...\"; } }`"
                    .to_owned()
            }
            Self::NameUnknown(name) => {
                format!("the daemon looks it up again and again: `getent ahosts {name}` shows what it finds")
            }
            Self::NameOfThisHost(name) => {
                format!("write the address itself, or correct the line of {name} in /etc/hosts")
            }
            Self::NobodyVouches => "name the guest by its address: `ip = \"192.168.122.11\";`".to_owned(),
            Self::Together { .. } => {
                "if these are two clusters, write a group for each, with `listener = \"...\";` in it".to_owned()
            }
            Self::GroupOfTwoKeys { .. } => {
                "if these are two clusters, name the one that it belongs to: `listener = \"...\";`".to_owned()
            }
            Self::ConfigWritable { path, .. } => format!("chmod go-w {}", path.display()),
            Self::KeyOpen { path, .. } => format!("chmod 0600 {}", path.display()),
            Self::KeyForeign { path, .. } => format!("chown root {}", path.display()),
            Self::KeyShort { path, .. } | Self::KeyMonotonous(path) => {
                format!("make a random one, and copy it to every guest: fence-daemon keygen --force {}", path.display())
            }
            Self::KeyTwice(path) => format!("it adds nothing: rm {}, or put the new key there", path.display()),
            Self::KeyLong(_) => "guests read no more either: nothing needs to be done".to_owned(),
            Self::NoSuchDomain { .. } => {
                "correct its spelling (`virsh list --all`), unless the domain is defined later or on another host"
                    .to_owned()
            }
            Self::InterfaceMissing(Some(_)) => {
                "the daemon waits for it: if it is libvirt's, `virsh net-start default` makes it".to_owned()
            }
            Self::InterfaceMissing(None) => "the daemon waits for one: name it by `interface`".to_owned(),
            Self::InterfaceTaken { instead, .. } => instead.clone(),
        }
    }

    fn label(&self) -> &'static str {
        match self {
            Self::UnknownKey { .. } | Self::UnknownSection { .. } => "ignored",
            Self::Overruled { .. } | Self::SameUri => "has no effect",
            Self::NoDigest(_) => "no authentication",
            Self::OnlyThisHost => "127.0.0.1 or ::1 by default",
            Self::NobodyVouches => "no effect",
            Self::Together { .. } => "two clusters could fence each other",
            Self::GroupOfTwoKeys { .. } => "the holder of either key is a client",
            // These concern files, not positions in them.
            Self::ConfigWritable { .. }
            | Self::KeyOpen { .. }
            | Self::KeyForeign { .. }
            | Self::KeyLong(_)
            | Self::KeyShort { .. }
            | Self::KeyMonotonous(_)
            | Self::KeyTwice(_)
            | Self::NoSuchDomain { .. }
            | Self::NameUnknown(_)
            | Self::NameOfThisHost(_)
            | Self::InterfaceMissing(_)
            | Self::InterfaceTaken { .. } => "",
        }
    }
}

impl Warning {
    /// The doubt.
    #[must_use]
    pub fn doubt(&self) -> &Doubt {
        &self.doubt
    }

    /// The position, if the warning concerns one in the configuration file.
    #[must_use]
    pub fn place(&self) -> Option<&Position> {
        self.place.as_ref()
    }
}

/// One line: position, doubt and remedy.
impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(place) = &self.place {
            write!(f, "{place}: ")?;
        }
        write!(f, "{} ({})", self.doubt, self.doubt.help())
    }
}

impl Warnings {
    /// Adds a doubt about a position, or about a file as a whole.
    pub fn push(&mut self, place: Option<Position>, doubt: Doubt) {
        if self.are_enough() {
            self.leave_out();
        } else {
            self.list.push(Warning { place, doubt });
        }
    }

    /// Whether no further warning would be kept.
    pub(super) fn are_enough(&self) -> bool {
        self.list.len() >= MAX_WARNINGS
    }

    /// Counts a warning that is not kept.
    pub(super) fn leave_out(&mut self) {
        self.left_out = self.left_out.saturating_add(1);
    }

    /// Sorts the warnings by position, those about whole files first.
    pub(super) fn sort(&mut self) {
        self.list.sort_by_key(|warning| warning.place.as_ref().map(|place| (place.line(), place.column())));
    }

    /// The warnings that were kept.
    pub fn iter(&self) -> std::slice::Iter<'_, Warning> {
        self.list.iter()
    }

    /// The number of warnings that were not kept.
    #[must_use]
    pub fn left_out(&self) -> usize {
        self.left_out
    }

    /// Whether there are no warnings.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// The warnings as log lines.
    pub fn lines(&self) -> impl Iterator<Item = String> {
        let more = (self.left_out > 0)
            .then(|| format!("{} further warnings about the configuration are left out", self.left_out));
        self.list.iter().map(ToString::to_string).chain(more)
    }

    /// The warnings for a terminal, with carets and remedies; escape sequences only if `colours`.
    #[must_use]
    pub fn render(&self, colours: bool) -> String {
        let render = |warning: &Warning| {
            let place = warning.place.as_ref().map(|place| (place, warning.doubt.label().to_owned()));
            Message { level: Level::WARNING, title: warning.doubt.to_string(), place, help: warning.doubt.help() }
                .render(colours)
        };
        let mut parts: Vec<String> = self.list.iter().map(render).collect();
        if self.left_out > 0 {
            parts.push(format!("warning: {} further warnings are left out", self.left_out));
        }
        parts.join("\n\n")
    }
}

impl<'w> IntoIterator for &'w Warnings {
    type Item = &'w Warning;
    type IntoIter = std::slice::Iter<'w, Warning>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}
