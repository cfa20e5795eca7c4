//! Reads the key files: of each listener and group the first key, and the second one during a key
//! rotation.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use annotate_snippets::Level;
use fence_common::key::Key;
use fence_common::keys::{GroupKey, KeyPair};
use fence_common::wire::KEY_MAX;

use self::settled::Reading;
use self::strength::Weakness;
use super::groups::Groups;
use super::listeners::{KeyFiles, Listener};
use super::position::Message;
use super::warning::{Doubt, Warnings};

mod settled;
pub mod strength;

/// A key from a file.
#[derive(Clone, Debug)]
pub struct Found {
    /// The key.
    pub key: Key,
    /// Whether the file is longer than the key.
    pub is_cut: bool,
}

/// A listener's keys from its files.
#[derive(Clone, Debug)]
pub struct FoundPair {
    /// From `key_file`.
    pub first: Found,
    /// From `key_file2`, if that file exists.
    pub second: Option<Found>,
    /// The files.
    pub files: KeyFiles,
}

impl FoundPair {
    /// Each key with its file.
    pub fn each(&self) -> impl Iterator<Item = (&Found, &Path)> {
        let second = self.second.as_ref().zip(self.files.second.as_deref());
        [(&self.first, self.files.first.as_path())].into_iter().chain(second)
    }
}

/// The keys from all configured files.
#[derive(Debug, Default)]
pub struct FoundAll {
    /// Those of each listener, in the configuration's order; `None` if it needs none.
    pub listeners: Vec<Option<FoundPair>>,
    /// Those of the groups.
    pub groups: Vec<FoundGroupKey>,
}

impl FoundAll {
    /// The listeners' keys, each pair of files once.
    pub fn pairs(&self) -> impl Iterator<Item = &FoundPair> {
        let pairs = self.listeners.iter().flatten();
        let is_first = |(at, pair): &(usize, &FoundPair)| {
            !self.listeners.iter().flatten().take(*at).any(|earlier| earlier.files == pair.files)
        };
        pairs.enumerate().filter(is_first).map(|(_, pair)| pair)
    }
}

impl From<FoundPair> for KeyPair {
    fn from(found: FoundPair) -> Self {
        Self { first: found.first.key, second: found.second.map(|second| second.key) }
    }
}

/// A key file that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct Unusable {
    /// The setting that names it: `key_file` or `key_file2` of the listener, or [`OF_A_GROUP`].
    pub setting: &'static str,
    /// Why the file cannot be used.
    #[source]
    pub error: KeyFileError,
}

/// Reads all key files that a configuration names.
///
/// # Errors
/// A key cannot be used, or a group's key is accepted elsewhere too.
pub fn load_all(listeners: &[Listener], groups: &Groups, warnings: &mut Warnings) -> Result<FoundAll, Unusable> {
    let mut all = FoundAll::default();
    for listener in listeners {
        let pair = match listener.key_files() {
            None => None,
            Some(files) => match all.listeners.iter().flatten().find(|known: &&FoundPair| known.files == files) {
                Some(known) => Some(known.clone()),
                None => Some(load_pair(files, warnings)?),
            },
        };
        all.listeners.push(pair);
    }
    all.groups = load_groups(groups, &all, warnings)?;
    Ok(all)
}

/// Reads the key files of a listener. If `key_file2` does not exist, there is no second key: this
/// is the normal state between two rotations.
fn load_pair(files: KeyFiles, warnings: &mut Warnings) -> Result<FoundPair, Unusable> {
    let failed = |setting| move |error| Unusable { setting, error };
    let first = load(&files.first, warnings).map_err(failed("key_file"))?;
    let second = match files.second.as_deref().map(|path| load(path, warnings)) {
        None | Some(Err(KeyFileError::Missing(_))) => None,
        Some(result) => Some(result.map_err(failed("key_file2"))?),
    };
    if let (Some(second), Some(path)) = (&second, &files.second)
        && second.key.dangerous_bytes() == first.key.dangerous_bytes()
    {
        warnings.push(None, Doubt::KeyTwice(path.clone()));
    }
    Ok(FoundPair { first, second, files })
}

/// A group's own key from a file.
#[derive(Debug)]
pub struct FoundGroupKey {
    /// The key and its owner.
    pub key: GroupKey,
    /// The file.
    pub path: PathBuf,
    /// Whether the file is longer than the key.
    pub is_cut: bool,
}

/// Reads the groups' own keys. No group may use a listener's key.
///
/// # Errors
/// A key cannot be used, or is accepted elsewhere too.
fn load_groups(groups: &Groups, all: &FoundAll, warnings: &mut Warnings) -> Result<Vec<FoundGroupKey>, Unusable> {
    let failed = |error| Unusable { setting: OF_A_GROUP, error };
    let mut found: Vec<FoundGroupKey> = Vec::new();
    for (owner, files) in groups.key_files() {
        let first = Some((files.first.as_path(), false));
        for (path, is_second) in first.into_iter().chain(files.second.as_deref().map(|path| (path, true))) {
            let Found { key, is_cut } = match load(path, warnings) {
                Err(KeyFileError::Missing(_)) if is_second => continue,
                result => result.map_err(failed)?,
            };
            let others = found.iter().filter(|other| other.key.owner != owner);
            let others = others.map(|other| (other.key.key.dangerous_bytes(), other.path.as_path()));
            let of_listeners = all.pairs().flat_map(FoundPair::each);
            let mut foreign = of_listeners.map(|(found, path)| (found.key.dangerous_bytes(), path)).chain(others);
            if let Some((_, other)) = foreign.find(|(bytes, _)| *bytes == key.dangerous_bytes()) {
                return Err(failed(KeyFileError::NotItsOwn { path: path.to_owned(), other: other.to_owned() }));
            }
            found.push(FoundGroupKey { key: GroupKey { owner, key: Arc::new(key) }, path: path.to_owned(), is_cut });
        }
    }
    Ok(found)
}

/// The name of the setting in [`Unusable`] for a group's key file.
pub const OF_A_GROUP: &str = "a group's key_file";

/// Reads a key: the file's bytes verbatim, at most the first 4096. No copy stays outside the key,
/// which is wiped when dropped. Waits up to two seconds for a process that writes the file.
///
/// # Errors
/// The file is missing, empty, unreadable, being written, or no regular file. No other source
/// replaces it.
pub fn load(path: &Path, warnings: &mut Warnings) -> Result<Found, KeyFileError> {
    let unreadable = |error: io::Error| {
        let path = path.to_owned();
        let missing = error.kind() == io::ErrorKind::NotFound;
        if missing { KeyFileError::Missing(path) } else { KeyFileError::Unreadable { path, error } }
    };
    let contents = match settled::read(path).map_err(unreadable)? {
        Reading::Settled(contents) => contents,
        Reading::Unsettled => return Err(KeyFileError::BeingWritten(path.to_owned())),
        Reading::NotAFile => return Err(KeyFileError::NotAFile(path.to_owned())),
    };
    let key = Key::new(contents.bytes()).map_err(|_| KeyFileError::Empty(path.to_owned()))?;

    let about = contents.about;
    let mode = about.mode() & 0o7777;
    if mode & 0o077 != 0 {
        warnings.push(None, Doubt::KeyOpen { path: path.to_owned(), mode });
    }
    if about.uid() != 0 && about.uid() != nix::unistd::geteuid().as_raw() {
        warnings.push(None, Doubt::KeyForeign { path: path.to_owned(), uid: about.uid() });
    }
    match strength::weakness(&key) {
        Some(Weakness::Short(len)) => warnings.push(None, Doubt::KeyShort { path: path.to_owned(), len }),
        Some(Weakness::Monotonous) => warnings.push(None, Doubt::KeyMonotonous(path.to_owned())),
        None => {}
    }
    let is_cut = usize::try_from(about.len()).is_ok_and(|len| len > KEY_MAX);
    if is_cut {
        warnings.push(None, Doubt::KeyLong(path.to_owned()));
    }
    Ok(Found { key, is_cut })
}

/// Why a key file cannot be used. The daemon starts without a key only if `hash` and `auth` are
/// both "none".
#[derive(Debug, thiserror::Error)]
pub enum KeyFileError {
    /// The file does not exist.
    #[error("the key file {} does not exist", .0.display())]
    Missing(PathBuf),
    /// The file is empty.
    #[error("the key file {} is empty", .0.display())]
    Empty(PathBuf),
    /// The path leads to a directory, a device or the like.
    #[error("the key file {} is not a regular file", .0.display())]
    NotAFile(PathBuf),
    /// A group's key is accepted elsewhere too.
    #[error("the key file {} of a group holds the same key as {}", path.display(), other.display())]
    NotItsOwn {
        /// The group's file.
        path: PathBuf,
        /// The file of the same key.
        other: PathBuf,
    },
    /// A process has the file open for writing, or the file keeps changing.
    #[error("the key file {} is being written", .0.display())]
    BeingWritten(PathBuf),
    /// The file cannot be read.
    #[error("cannot read the key file {}: {error}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The system's error.
        #[source]
        error: io::Error,
    },
}

impl KeyFileError {
    /// The key file.
    #[must_use]
    pub fn path(&self) -> &Path {
        match self {
            Self::Missing(path)
            | Self::Empty(path)
            | Self::NotAFile(path)
            | Self::NotItsOwn { path, .. }
            | Self::BeingWritten(path)
            | Self::Unreadable { path, .. } => path,
        }
    }

    /// The text beside the caret under the path.
    pub(super) fn label(&self) -> &'static str {
        match self {
            Self::Missing(_) => "there is no such file",
            Self::Empty(_) => "empty",
            Self::NotAFile(_) => "not a regular file",
            Self::NotItsOwn { .. } => "not the group's own",
            Self::BeingWritten(_) => "being written",
            Self::Unreadable { .. } => "unreadable",
        }
    }

    /// The remedy.
    #[must_use]
    pub fn help(&self) -> String {
        let path = self.path().display();
        let make = |option: &str| format!("make one and copy it to every guest: fence-daemon keygen {option}{path}");
        match self {
            Self::Missing(path) => {
                // The folder may be missing too: /etc/cluster, where fence_virtd keeps the key,
                // comes with no package.
                let folder_is_there = path.parent().is_none_or(Path::exists);
                format!("copy the guests' key there, or {}", make(if folder_is_there { "" } else { "--parents " }))
            }
            Self::Empty(_) => format!("copy the guests' key there, or {}", make("--force ")),
            Self::NotAFile(_) => "name a file: `listeners { multicast { key_file = \"...\"; } }`".to_owned(),
            Self::NotItsOwn { .. } => {
                format!("make one for this group and copy it to its guests: fence-daemon keygen --force {path}")
            }
            Self::BeingWritten(_) => {
                "try again when it is complete; better write another file and move it over this one".to_owned()
            }
            Self::Unreadable { .. } => {
                format!("run the daemon as root, and give the file to root: chown root {path}; chmod 0600 {path}")
            }
        }
    }

    /// The error with its remedy, on several lines; escape sequences only if `colours`.
    #[must_use]
    pub fn render(&self, colours: bool) -> String {
        Message { level: Level::ERROR, title: self.to_string(), place: None, help: self.help() }.render(colours)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use tempfile::{TempDir, tempdir};

    fn file(dir: &TempDir, bytes: &[u8], mode: u32) -> PathBuf {
        let path = dir.path().join("fence.key");
        std::fs::write(&path, bytes).unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(mode)).unwrap();
        path
    }

    /// A configuration with two groups that have keys, in files of this directory.
    fn of_groups(dir: &TempDir) -> crate::Config {
        let path = |name: &str| dir.path().join(name).display().to_string();
        let text = format!(
            "fence_virtd {{ listener = \"multicast\"; backend = \"libvirt\"; }}\n\
             listeners {{ multicast {{ key_file = \"{}\"; key_file2 = \"{}\"; }} }}\n\
             groups {{ group {{ ip = \"10.0.0.1\"; uuid = \"a\"; key_file = \"{}\"; key_file2 = \"{}\"; }}\n\
             group {{ ip = \"10.0.0.2\"; uuid = \"b\"; key_file = \"{}\"; }} }}",
            path("all"),
            path("all2"),
            path("a"),
            path("a2"),
            path("b"),
        );
        let source = crate::Source::new(Path::new("f"), text.as_bytes());
        crate::parse(&source, Warnings::default()).unwrap().0
    }

    fn load_both(config: &crate::Config) -> Result<Vec<FoundGroupKey>, Unusable> {
        load_all(&config.listeners, &config.groups, &mut Warnings::default()).map(|all| all.groups)
    }

    #[test]
    fn a_groups_key_that_is_accepted_elsewhere_is_refused_with_both_places() {
        let dir = tempdir().unwrap();
        let config = of_groups(&dir);
        let write = |name: &str, content: &str| std::fs::write(dir.path().join(name), content).unwrap();
        let names = ["all", "all2", "a", "a2", "b"];
        let fresh = || names.iter().for_each(|name| write(name, &format!("the key of {name}, of some length")));
        fresh();
        let found = load_both(&config).unwrap();
        assert_eq!(found.iter().map(|found| found.key.owner.0).collect::<Vec<_>>(), [1, 1, 2]);
        for (one, other) in [("a", "all"), ("a2", "all"), ("b", "all2"), ("b", "a"), ("b", "a2")] {
            fresh();
            write(one, &format!("the key of {other}, of some length"));
            let refused = load_both(&config).unwrap_err().to_string();
            let [one, other] = [one, other].map(|name| dir.path().join(name).display().to_string());
            assert_eq!(refused, format!("the key file {one} of a group holds the same key as {other}"));
        }
        fresh();
        // The second file may be missing, the first may not.
        for (name, is_needed) in [("a2", false), ("b", true)] {
            std::fs::remove_file(dir.path().join(name)).unwrap();
            assert_eq!(load_both(&config).is_err(), is_needed, "{name}");
        }
    }

    #[test]
    fn the_bytes_count_verbatim_and_no_more_than_4096() {
        let dir = tempdir().unwrap();
        let mut warnings = Warnings::default();
        for bytes in [&b"x"[..], b"line\n", b"\0\xff\n\n", &[7; 512], &[7; KEY_MAX]] {
            let found = load(&file(&dir, bytes, 0o600), &mut warnings).unwrap();
            assert_eq!((found.key.dangerous_bytes(), found.is_cut), (bytes, false));
        }
        let is_of_strength = |doubt: &Doubt| matches!(doubt, Doubt::KeyShort { .. } | Doubt::KeyMonotonous(_));
        assert!(warnings.iter().all(|warning| is_of_strength(warning.doubt())), "{}", warnings.render(false));
        let mut warnings = Warnings::default();
        let path = file(&dir, &[7; KEY_MAX + 1], 0o600);
        let found = load(&path, &mut warnings).unwrap();
        assert_eq!((found.key.dangerous_bytes(), found.is_cut), (&[7; KEY_MAX][..], true));
        assert!(warnings.iter().any(|warning| *warning.doubt() == Doubt::KeyLong(path.clone())));
    }

    #[test]
    fn a_key_that_others_can_read_is_used_with_a_warning() {
        let dir = tempdir().unwrap();
        let mut warnings = Warnings::default();
        let path = file(&dir, b"a secret of one line", 0o644);
        load(&path, &mut warnings).unwrap();
        let said = warnings.iter().next().unwrap().to_string();
        let path = path.display();
        assert_eq!(
            said,
            format!("the key file {path} is open to others than its owner (mode 0644) (chmod 0600 {path})")
        );
        assert!(!said.contains("secret"));
    }

    #[test]
    fn an_unusable_key_is_rejected_with_a_remedy() {
        let dir = tempdir().unwrap();
        let warnings = &mut Warnings::default();
        let missing = load(&dir.path().join("none"), warnings).unwrap_err();
        assert!(matches!(missing, KeyFileError::Missing(_)), "{missing}");
        let remedy = format!("fence-daemon keygen {}", dir.path().join("none").display());
        assert!(missing.render(false).contains(&remedy), "{}", missing.render(false));
        let nowhere = load(&dir.path().join("no/such/key"), warnings).unwrap_err();
        assert!(nowhere.help().contains("keygen --parents "), "{}", nowhere.help());
        let directory = load(dir.path(), warnings).unwrap_err();
        assert!(matches!(directory, KeyFileError::NotAFile(_)), "{directory}");
        let device = load(Path::new("/dev/zero"), warnings).unwrap_err();
        assert!(matches!(device, KeyFileError::NotAFile(_)), "{device}");
        let fifo = dir.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRUSR).unwrap();
        assert!(matches!(load(&fifo, warnings), Err(KeyFileError::NotAFile(_))));
        let empty = load(&file(&dir, b"", 0o600), warnings).unwrap_err();
        assert!(matches!(empty, KeyFileError::Empty(_)) && empty.help().contains("keygen --force "), "{empty}");
        // Root may read any file. A path through a file is unreadable to root too.
        let through = load(&dir.path().join("fence.key/key"), warnings).unwrap_err();
        assert!(matches!(through, KeyFileError::Unreadable { .. }), "{through}");
        assert!(through.help().contains("chmod 0600"), "{}", through.help());
    }
}
