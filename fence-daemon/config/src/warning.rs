//! What is doubtful in a configuration without being wrong: said once, with its place, and never a
//! reason not to start.

use std::fmt;
use std::path::PathBuf;

use annotate_snippets::Level;
use fence_common::words::counted;

use super::position::{Message, Position};

/// How many are kept: a file can hold a mistake a million times.
const MAX_WARNINGS: usize = 100;

/// Every doubt about a configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Warnings {
    list: Vec<Warning>,
    left_out: usize,
}

/// One doubt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Warning {
    place: Option<Position>,
    doubt: Doubt,
}

/// What is doubtful.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Doubt {
    /// A key that means nothing here, to stock servers neither.
    #[error("unknown key `{name}`")]
    UnknownKey {
        /// As spelled.
        name: String,
        /// What was probably meant.
        meant: Option<&'static str>,
    },
    /// A section that means nothing here.
    #[error("unknown section `{name}`")]
    UnknownSection {
        /// As spelled.
        name: String,
        /// What was probably meant.
        meant: Option<&'static str>,
    },
    /// Something that is said again further down.
    #[error("this `{name}` is overruled by the one on line {line}")]
    Overruled {
        /// The key or section.
        name: String,
        /// Where it is said again.
        line: usize,
    },
    /// The same libvirt URI twice.
    #[error("this URI is configured already")]
    SameUri,
    /// `hash` or `auth` says "none".
    #[error("`{0}` is \"none\": {what}", what = without_digest(.0))]
    NoDigest(&'static str),
    /// Others than root may change the configuration.
    #[error("{} can be changed by others than its owner (mode {mode:04o})", path.display())]
    ConfigWritable {
        /// The file.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// Others than root may read or change the key.
    #[error("the key file {} is open to others than its owner (mode {mode:04o})", path.display())]
    KeyOpen {
        /// The file.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// The key is another user's.
    #[error("the key file {} belongs to the user with ID {uid}, who can read and change it", path.display())]
    KeyForeign {
        /// The file.
        path: PathBuf,
        /// Its owner.
        uid: u32,
    },
    /// The key is longer than any peer reads.
    #[error("only the first 4096 bytes of the key file {} count", .0.display())]
    KeyLong(PathBuf),
    /// The key has so few bytes that it can be guessed.
    #[error("the key in {} has {}: it can be guessed by whoever overhears one request", path.display(), counted(len, "byte"))]
    KeyShort {
        /// The file.
        path: PathBuf,
        /// How many.
        len: usize,
    },
    /// The key's bytes are all the same, or repeat, or count.
    #[error("the key in {} is not random (zeros, a repeated word, or the like): it can be guessed by whoever overhears one request", .0.display())]
    KeyMonotonous(PathBuf),
    /// The second key is the first one.
    #[error("the key file {} holds the same key as `key_file`", .0.display())]
    KeyTwice(PathBuf),
    /// An entry of a group means no domain that the configured URIs know.
    #[error("no domain is called `{entry}`, which {} permits to fence", the_group(group.as_deref()))]
    NoSuchDomain {
        /// The group's name.
        group: Option<String>,
        /// The `uuid` entry as written.
        entry: String,
    },
    /// The interface is not there now, or where none is configured, none that would do.
    #[error("{}", no_interface(.0.as_deref()))]
    InterfaceMissing(Option<String>),
    /// What comes by the interface goes to somebody else.
    #[error("the interface {interface} is {what}")]
    InterfaceTaken {
        /// The interface's name.
        interface: String,
        /// What it is, so that its frames go elsewhere.
        what: String,
        /// What to configure instead.
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
        "hash" => "requests are not signed, anyone who can send one passes for a guest",
        _ => "call-backs are not authenticated, a recorded request can be sent again",
    }
}

impl Doubt {
    /// What to do about it.
    #[must_use]
    pub fn help(&self) -> String {
        match self {
            Self::UnknownKey { meant, .. } | Self::UnknownSection { meant, .. } => match meant {
                Some(meant) => format!("did you mean `{meant}`?"),
                None => "it is ignored".to_owned(),
            },
            Self::Overruled { .. } => "only the last one counts: remove this one, or put both into one".to_owned(),
            Self::SameUri => "it is asked only once: remove this one".to_owned(),
            Self::NoDigest(key) => format!("write `{key} = \"sha256\";` here and give the guests the key"),
            Self::ConfigWritable { path, .. } => format!("chmod go-w {}", path.display()),
            Self::KeyOpen { path, .. } => format!("chmod 0600 {}", path.display()),
            Self::KeyForeign { path, .. } => format!("chown root {}", path.display()),
            Self::KeyShort { path, .. } | Self::KeyMonotonous(path) => {
                format!("make a random one, and copy it to every guest: fence-daemon keygen --force {}", path.display())
            }
            Self::KeyTwice(path) => format!("it adds nothing: rm {}, or put the new key there", path.display()),
            Self::KeyLong(_) => "peers read no more either: nothing needs to be done".to_owned(),
            Self::NoSuchDomain { .. } => {
                "mend its spelling (`virsh list --all`), unless it is to be defined later or on another host".to_owned()
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
            // These are about files, not about places in them.
            Self::ConfigWritable { .. }
            | Self::KeyOpen { .. }
            | Self::KeyForeign { .. }
            | Self::KeyLong(_)
            | Self::KeyShort { .. }
            | Self::KeyMonotonous(_)
            | Self::KeyTwice(_)
            | Self::NoSuchDomain { .. }
            | Self::InterfaceMissing(_)
            | Self::InterfaceTaken { .. } => "",
        }
    }
}

impl Warning {
    /// What is doubtful.
    #[must_use]
    pub fn doubt(&self) -> &Doubt {
        &self.doubt
    }

    /// Where, if it is about a place in the configuration file.
    #[must_use]
    pub fn place(&self) -> Option<&Position> {
        self.place.as_ref()
    }
}

/// One line: place, doubt and remedy.
impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(place) = &self.place {
            write!(f, "{place}: ")?;
        }
        write!(f, "{} ({})", self.doubt, self.doubt.help())
    }
}

impl Warnings {
    /// Adds a doubt about a place, or about a file as a whole.
    pub fn push(&mut self, place: Option<Position>, doubt: Doubt) {
        if self.list.len() < MAX_WARNINGS {
            self.list.push(Warning { place, doubt });
        } else {
            self.left_out = self.left_out.saturating_add(1);
        }
    }

    /// Whether another one would be kept after `more`.
    pub(super) fn takes_more_than(&self, more: usize) -> bool {
        self.list.len().saturating_add(more) < MAX_WARNINGS
    }

    /// Counts one that is not kept.
    pub(super) fn leave_out(&mut self) {
        self.left_out = self.left_out.saturating_add(1);
    }

    /// Puts them into the file's order, those about whole files first.
    pub(super) fn sort(&mut self) {
        self.list.sort_by_key(|warning| warning.place.as_ref().map(|place| (place.line(), place.column())));
    }

    /// The warnings that were kept.
    pub fn iter(&self) -> std::slice::Iter<'_, Warning> {
        self.list.iter()
    }

    /// How many were too many to be kept.
    #[must_use]
    pub fn left_out(&self) -> usize {
        self.left_out
    }

    /// Whether nothing is doubtful.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// One log line for each.
    pub fn lines(&self) -> impl Iterator<Item = String> {
        let more = (self.left_out > 0)
            .then(|| format!("{} further warnings about the configuration are left out", self.left_out));
        self.list.iter().map(ToString::to_string).chain(more)
    }

    /// All of them as they belong on a terminal, with caret and remedy; escape sequences only if
    /// `colours`.
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
