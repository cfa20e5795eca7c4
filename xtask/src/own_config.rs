//! A configuration and a key for a hypervisor that has neither. They are stored in the user's
//! directory, never in /etc.

use std::env;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};

/// The key's length in bytes: all that the protocol uses, as in Debian's package.
const KEY_BYTES: usize = 4096;

/// The paths of the two files, and whether the key is new.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct OwnConfig {
    /// The configuration.
    pub(crate) file: PathBuf,
    /// The key that the configuration names.
    pub(crate) key: PathBuf,
    /// Whether the key was made just now, so no guest can have it yet.
    pub(crate) is_new: bool,
}

/// The directory for a program's state, by the XDG rules.
///
/// # Errors
/// The environment has neither `XDG_STATE_HOME` nor `HOME`.
pub(crate) fn folder() -> anyhow::Result<PathBuf> {
    let absolute = |name: &str| env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let state = absolute("XDG_STATE_HOME").or_else(|| absolute("HOME").map(|home| home.join(".local/state")));
    Ok(state.context("no directory for the key: set XDG_STATE_HOME or HOME")?.join("fence-xdp"))
}

impl OwnConfig {
    /// Makes the missing files in `folder`. Existing files stay: guests have copies of the key, and
    /// an administrator may have edited the configuration.
    ///
    /// # Errors
    /// A file cannot be written, or the existing key is empty.
    pub(crate) fn ensure(folder: &Path) -> anyhow::Result<Self> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(folder)
            .with_context(|| format!("cannot make {}", folder.display()))?;
        let key = folder.join("fence_xvm.key");
        let is_new = !key.exists();
        if is_new {
            let mut bytes = vec![0; KEY_BYTES];
            File::open("/dev/urandom")
                .and_then(|mut random| random.read_exact(&mut bytes))
                .context("cannot get random bytes for a key")?;
            write_whole(&key, &bytes)?;
        } else if fs::metadata(&key).with_context(|| format!("cannot look at {}", key.display()))?.len() == 0 {
            bail!("the key {} is empty: remove it to get a new one", key.display());
        }
        let file = folder.join("fence_virt.conf");
        if !file.exists() {
            let key = key
                .to_str()
                .filter(|key| !key.contains(['"', '\\', '\n']))
                .context("the directory's name has characters that a configuration cannot hold")?;
            write_whole(&file, configuration(key).as_bytes())?;
        }
        Ok(Self { file, key, is_new })
    }
}

/// Writes a file that only its owner can read, completely or not at all.
fn write_whole(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    let partial = path.with_extension("partial");
    let _ = fs::remove_file(&partial);
    let written = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&partial).and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync_all()
    });
    written.and_then(|()| fs::rename(&partial, path)).with_context(|| format!("cannot write {}", path.display()))
}

/// The configuration for a host with libvirt's default network.
fn configuration(key: &str) -> String {
    format!(
        r#"# Made by `cargo xtask run`; yours to edit. Stock's fence_virtd reads the same file.
fence_virtd {{
    listener = "multicast";
    backend = "libvirt";
}}

listeners {{
    multicast {{
        key_file = "{key}";
        interface = "virbr0";
        family = "ipv4";
        address = "225.0.0.12";
        port = "1229";
        hash = "sha256";
        auth = "sha256";
    }}
}}

backends {{
    libvirt {{
        uri = "qemu:///system";
    }}
}}
"#
    )
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn it_is_made_once_secret_and_whole() {
        let temporary = tempfile::tempdir().unwrap();
        let folder = temporary.path().join("own");
        let made = OwnConfig::ensure(&folder).unwrap();
        assert!(made.is_new);
        let key = fs::read(&made.key).unwrap();
        assert_eq!(key.len(), KEY_BYTES);
        assert!(key.iter().any(|byte| *byte != key[0]));
        for path in [&made.key, &made.file] {
            assert_eq!(fs::metadata(path).unwrap().permissions().mode() & 0o777, 0o600);
        }
        assert_eq!(fs::metadata(&folder).unwrap().permissions().mode() & 0o777, 0o700);
        assert!(fs::read_to_string(&made.file).unwrap().contains(made.key.to_str().unwrap()));

        fs::write(&made.file, "edited").unwrap();
        let again = OwnConfig::ensure(&folder).unwrap();
        assert!(!again.is_new);
        assert_eq!(fs::read(&made.key).unwrap(), key);
        assert_eq!(fs::read_to_string(&made.file).unwrap(), "edited");

        fs::write(&made.key, "").unwrap();
        assert!(OwnConfig::ensure(&folder).unwrap_err().to_string().contains("empty"));
    }
}
