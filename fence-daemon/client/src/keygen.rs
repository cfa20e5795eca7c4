//! `fence-daemon keygen`: makes the key that hypervisors and guests share.

use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use fence_common::exit::{EXIT_START, EXIT_USAGE};
use fence_common::wire::KEY_MAX;
use fence_config as config;
use fence_config::ConfigError;
use fence_config::durable::{self, Destination, FileError};
use zeroize::Zeroizing;

use crate::screen::{complain, print, stderr_colours};

/// Makes a key at `path`, or else at the configured place. Prints what to do with it, and returns
/// the exit code.
#[must_use]
pub fn run(path: Option<&Path>, config: &Path, options: KeygenOptions) -> u8 {
    let path = match path.map_or_else(|| configured_key_file(config), |path| Ok(path.to_owned())) {
        Ok(path) => path,
        Err(error) => {
            complain(error.render(stderr_colours()));
            complain("fence-daemon: no key was created: name its file, or correct the configuration");
            return EXIT_USAGE;
        }
    };
    let made = durable::fail_instead_of_dying().map_err(|error| error.to_string());
    match made.and_then(|()| generate(&path, options).map_err(|error| error.to_string())) {
        Ok(()) if print(&told(&path)) => 0,
        Ok(()) => EXIT_START,
        Err(error) => {
            complain(format_args!("fence-daemon: {error}"));
            EXIT_START
        }
    }
}

/// The key file that the configuration names; fence_virtd's default if there is no configuration
/// yet.
fn configured_key_file(config: &Path) -> Result<PathBuf, ConfigError> {
    match config::load(config) {
        Ok((config, _)) => {
            let plain = config.multicast().map(|multicast| multicast.key_file.clone());
            let other = || config.listeners.iter().find_map(config::Listener::key_files).map(|files| files.first);
            Ok(plain.or_else(other).unwrap_or_else(|| config::DEFAULT_KEY_FILE.into()))
        }
        Err(ConfigError::Unreadable { error, .. })
            if error.kind() == io::ErrorKind::NotFound && config == Path::new(config::DEFAULT_PATH) =>
        {
            Ok(config::DEFAULT_KEY_FILE.into())
        }
        Err(error) => Err(error),
    }
}

/// Options of `keygen`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KeygenOptions {
    /// Whether an existing key is replaced.
    pub force: bool,
    /// Whether missing directories are made.
    pub parents: bool,
}

/// Why there is no new key.
#[derive(Debug, thiserror::Error)]
pub enum KeygenError {
    /// The key exists, and may be in use.
    #[error(
        "{path} exists already, and guests may use it: keep it, create the new key beside it (`key_file2`), or use --force and copy the new key to every guest",
        path = .0.display()
    )]
    Exists(PathBuf),
    /// The key's directory is missing.
    #[error("there is no directory {}: create it, or add --parents", .0.display())]
    NoDirectory(PathBuf),
    /// The key's directory cannot be made.
    #[error("cannot make the directory {}: {error}", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// The system's error.
        #[source]
        error: io::Error,
    },
    /// The system gives no random bytes.
    #[error("the system gives no random bytes: {0}")]
    Random(getrandom::Error),
    /// The file cannot be written.
    #[error(transparent)]
    File(FileError),
}

/// Writes 4096 random bytes to `path`, mode 0600. No peer reads more.
///
/// # Errors
/// There is no new key, and an existing one is unchanged.
pub fn generate(path: &Path, options: KeygenOptions) -> Result<(), KeygenError> {
    let dir = durable::directory(path);
    if !dir.exists() {
        if !options.parents {
            return Err(KeygenError::NoDirectory(dir.to_owned()));
        }
        let made = DirBuilder::new().recursive(true).mode(0o755).create(dir);
        made.map_err(|error| KeygenError::Directory { path: dir.to_owned(), error })?;
    }
    // On the heap and wiped when dropped: the only copy outside the file.
    let mut key = Zeroizing::new(vec![0; KEY_MAX]);
    getrandom::fill(&mut key).map_err(KeygenError::Random)?;
    let written = if options.force {
        Destination::find(path).and_then(|place| place.replace(&key))
    } else {
        durable::create(path, &key)
    };
    written.map_err(|error| {
        if let FileError::Exists(path) = error { KeygenError::Exists(path) } else { KeygenError::File(error) }
    })
}

/// What has happened, and what to do with the key.
#[must_use]
pub fn told(path: &Path) -> String {
    let (path, guests) = (path.display(), config::DEFAULT_KEY_FILE);
    format!(
        "{path}: a new key of {KEY_MAX} random bytes, for root only (mode 0600).\n\n\
         Every guest that fences, and every hypervisor that serves it, needs the same bytes. For each of them:\n    \
         ssh root@GUEST mkdir -p /etc/cluster\n    \
         scp -p {path} root@GUEST:{guests}\n\
         Then have the daemon read it (kill -HUP $(cat /var/run/fence_virtd.pid), or start it), and try in a guest: fence_xvm -o list\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;
    use tempfile::tempdir;

    fn bytes(path: &Path) -> Vec<u8> {
        std::fs::read(path).unwrap()
    }

    #[test]
    fn keys_are_long_secret_and_different() {
        let dir = tempdir().unwrap();
        let (one, two) = (dir.path().join("one"), dir.path().join("two"));
        generate(&one, KeygenOptions::default()).unwrap();
        generate(&two, KeygenOptions::default()).unwrap();
        assert_eq!(one.metadata().unwrap().mode() & 0o7777, 0o600);
        assert_eq!((bytes(&one).len(), bytes(&two).len()), (4096, 4096));
        assert_ne!(bytes(&one), bytes(&two));
        // All of it is random: no quarter is like another one, none is zero.
        let quarters: std::collections::HashSet<_> = bytes(&one).chunks(1024).map(<[u8]>::to_vec).collect();
        assert!(quarters.len() == 4 && !quarters.contains(&vec![0; 1024]));
        config::key::load(&one, &mut config::Warnings::default()).unwrap();
    }

    #[test]
    fn a_key_that_is_in_use_goes_only_by_force() {
        let dir = tempdir().unwrap();
        let path = dir.path().join("key");
        std::fs::write(&path, "in use").unwrap();
        let error = generate(&path, KeygenOptions::default()).unwrap_err();
        assert!(matches!(error, KeygenError::Exists(_)) && error.to_string().contains("--force"), "{error}");
        assert_eq!(bytes(&path), b"in use");
        generate(&path, KeygenOptions { force: true, ..KeygenOptions::default() }).unwrap();
        assert_eq!((bytes(&path).len(), path.metadata().unwrap().mode() & 0o7777), (4096, 0o600));
    }

    #[test]
    fn directories_are_made_only_when_asked_for() {
        let dir = tempdir().unwrap();
        let path = dir.path().join("etc/cluster/key");
        let error = generate(&path, KeygenOptions::default()).unwrap_err();
        assert!(error.to_string().contains("--parents"), "{error}");
        assert!(!dir.path().join("etc").exists());
        generate(&path, KeygenOptions { parents: true, ..KeygenOptions::default() }).unwrap();
        assert_eq!(bytes(&path).len(), 4096);
        let through_a_file = generate(&path.join("x/key"), KeygenOptions { parents: true, force: true });
        assert!(matches!(through_a_file, Err(KeygenError::Directory { .. })), "{through_a_file:?}");
    }

    #[test]
    fn messages_have_no_key_in_them() {
        let dir = tempdir().unwrap();
        let path = dir.path().join("key");
        generate(&path, KeygenOptions::default()).unwrap();
        let text = told(&path);
        assert!(text.contains("4096") && text.contains("scp -p ") && text.contains("fence_xvm -o list"), "{text}");
        assert!(!text.as_bytes().windows(8).any(|part| bytes(&path).windows(8).any(|key| key == part)));
    }
}
