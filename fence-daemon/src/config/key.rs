//! The shared key's file.

use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use annotate_snippets::Level;
use fence_common::key::Key;
use fence_common::wire::KEY_MAX;
use nix::fcntl::OFlag;
use zeroize::Zeroizing;

use super::place::Message;
use super::warning::{Doubt, Warnings};

/// Reads the key: the file's bytes verbatim, the first 4096 at most. They are nowhere but in the key, and wiped with it.
///
/// # Errors
/// A key file that is missing, empty, unreadable or no regular file. Nothing is fetched from elsewhere instead.
pub fn load(path: &Path, warnings: &mut Warnings) -> Result<Key, KeyFileError> {
    let unreadable = |error: io::Error| {
        let path = path.to_owned();
        let missing = error.kind() == io::ErrorKind::NotFound;
        if missing { KeyFileError::Missing(path) } else { KeyFileError::Unreadable { path, error } }
    };
    // Without O_NONBLOCK a FIFO in the key's place would hang the start.
    let flags = OFlag::O_NONBLOCK | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
    let mut file = std::fs::OpenOptions::new().read(true).custom_flags(flags.bits()).open(path).map_err(unreadable)?;
    let about = file.metadata().map_err(unreadable)?;
    if !about.is_file() {
        return Err(KeyFileError::NotAFile(path.to_owned()));
    }

    // A buffer of its final size: one that grows would leave copies behind.
    let mut bytes = Zeroizing::new([0; KEY_MAX]);
    let mut len = 0;
    while let Some(rest) = bytes.get_mut(len..).filter(|rest| !rest.is_empty()) {
        match file.read(rest) {
            Ok(0) => break,
            Ok(read) => len = len.saturating_add(read),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(unreadable(error)),
        }
    }
    let key = Key::new(bytes.get(..len).unwrap_or_default()).map_err(|_| KeyFileError::Empty(path.to_owned()))?;

    let mode = about.mode() & 0o7777;
    if mode & 0o077 != 0 {
        warnings.push(None, Doubt::KeyOpen { path: path.to_owned(), mode });
    }
    if about.uid() != 0 && about.uid() != nix::unistd::geteuid().as_raw() {
        warnings.push(None, Doubt::KeyForeign { path: path.to_owned(), uid: about.uid() });
    }
    if usize::try_from(about.len()).is_ok_and(|len| len > KEY_MAX) {
        warnings.push(None, Doubt::KeyLong(path.to_owned()));
    }
    Ok(key)
}

/// Why there is no key. The daemon doesn't start without one, unless `hash` and `auth` both say "none".
#[derive(Debug, thiserror::Error)]
pub enum KeyFileError {
    /// There is no such file.
    #[error("the key file {} does not exist", .0.display())]
    Missing(PathBuf),
    /// There is nothing in it.
    #[error("the key file {} is empty", .0.display())]
    Empty(PathBuf),
    /// It is a directory, a device or the like.
    #[error("the key file {} is not a regular file", .0.display())]
    NotAFile(PathBuf),
    /// It cannot be read.
    #[error("cannot read the key file {}: {error}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        error: io::Error,
    },
}

impl KeyFileError {
    /// The key file.
    #[must_use]
    pub fn path(&self) -> &Path {
        match self {
            Self::Missing(path) | Self::Empty(path) | Self::NotAFile(path) | Self::Unreadable { path, .. } => path,
        }
    }

    /// What stands beside the caret under the path.
    pub(super) fn label(&self) -> &'static str {
        match self {
            Self::Missing(_) => "there is no such file",
            Self::Empty(_) => "empty",
            Self::NotAFile(_) => "not a regular file",
            Self::Unreadable { .. } => "unreadable",
        }
    }

    /// What to do about it.
    #[must_use]
    pub fn help(&self) -> String {
        let path = self.path().display();
        let make = |option: &str| format!("make one and copy it to every guest: fence-daemon keygen {option}{path}");
        match self {
            Self::Missing(path) => {
                // The folder may be missing with it: /etc/cluster, where upstream keeps the key, comes with no package.
                let folder_is_there = path.parent().is_none_or(Path::exists);
                format!("copy the guests' key there, or {}", make(if folder_is_there { "" } else { "--parents " }))
            }
            Self::Empty(_) => format!("copy the guests' key there, or {}", make("--force ")),
            Self::NotAFile(_) => "name a file: `listeners { multicast { key_file = \"...\"; } }`".to_owned(),
            Self::Unreadable { .. } => {
                format!("run the daemon as root, and give the file to root: chown root {path}; chmod 0600 {path}")
            }
        }
    }

    /// The error with its remedy, in a few lines; escape sequences only if `colours`.
    #[must_use]
    pub fn render(&self, colours: bool) -> String {
        Message { level: Level::ERROR, title: self.to_string(), place: None, help: self.help() }.render(colours)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scratch::Scratch;
    use std::os::unix::fs::PermissionsExt;

    fn file(dir: &Scratch, bytes: &[u8], mode: u32) -> PathBuf {
        let path = dir.path().join("fence.key");
        std::fs::write(&path, bytes).unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(mode)).unwrap();
        path
    }

    #[test]
    fn the_bytes_count_verbatim_and_no_more_than_4096() {
        let dir = Scratch::new();
        let mut warnings = Warnings::default();
        for bytes in [&b"x"[..], b"line\n", b"\0\xff\n\n", &[7; 512], &[7; KEY_MAX]] {
            let key = load(&file(&dir, bytes, 0o600), &mut warnings).unwrap();
            assert_eq!(key.dangerous_bytes(), bytes);
        }
        assert!(warnings.is_empty(), "{}", warnings.render(false));
        let path = file(&dir, &[7; KEY_MAX + 1], 0o600);
        assert_eq!(load(&path, &mut warnings).unwrap().dangerous_bytes(), &[7; KEY_MAX]);
        assert_eq!(warnings.iter().next().unwrap().doubt(), &Doubt::KeyLong(path));
    }

    #[test]
    fn a_key_that_others_can_read_is_used_with_a_warning() {
        let dir = Scratch::new();
        let mut warnings = Warnings::default();
        let path = file(&dir, b"secret", 0o644);
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
    fn what_is_no_key_is_refused_with_a_remedy() {
        let dir = Scratch::new();
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
        // Root may read everything: a path through a file is unreadable to it too.
        let through = load(&dir.path().join("fence.key/key"), warnings).unwrap_err();
        assert!(matches!(through, KeyFileError::Unreadable { .. }), "{through}");
        assert!(through.help().contains("chmod 0600"), "{}", through.help());
    }
}
