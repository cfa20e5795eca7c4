//! SIGHUP: reads the key files again and accepts their keys from then on.
//!
//! If anything is wrong with one of them, all old keys stay, and one line says why and what to do.
//! The configuration file itself is not read again.

use std::path::{Path, PathBuf};

use fence_common::key::Key;
use fence_common::keys::KeyPair;
use fence_config::key::{self, FoundGroupKey, FoundPair};
use fence_config::{Groups, Multicast, Unusable, Warnings};
use tokio::signal::unix::Signal;
use tracing::{error, info, warn};

use crate::intake::keyring::{Keyring, Rotated, RotationError};
use crate::intake::listener::chain;
use crate::systemd;

/// Why the keys stay as they are.
#[derive(Debug, thiserror::Error)]
pub(super) enum ReloadError {
    /// A file cannot be used at all.
    #[error("{error} ({help})", error = .0.error, help = .0.error.help())]
    File(#[from] Unusable),
    /// Longer than any peer reads, so it does not look like a key.
    #[error("the key file {} is longer than a key (cut it: head -c 4096; or is it another file?)", .0.display())]
    TooLong(PathBuf),
    /// The beginning of a key that is in force.
    #[error(
        "the key file {} holds only the beginning of a key that is accepted now: it was not copied to its end (copy it again)",
        .0.display()
    )]
    CutOff(PathBuf),
    /// An interrupted copy leaves such a file on many file systems.
    #[error("the key file {} holds nothing but zero bytes: its content was never written (copy it again)", .0.display())]
    Zeros(PathBuf),
    /// The kernel does not take them.
    #[error("{}", chain(.0))]
    Rotation(#[from] RotationError),
    /// The thread that reads them broke off.
    #[error("the files were not read to the end")]
    Broken,
}

/// Reads the keys again at each SIGHUP, until it is dropped. Tells systemd when that begins and
/// ends.
pub(super) async fn at_each(mut hangup: Signal, multicast: Multicast, groups: Groups, keys: Keyring) {
    while hangup.recv().await.is_some() {
        systemd::notify_reloading();
        let again = {
            let (multicast, groups, keys) = (multicast.clone(), groups.clone(), keys.clone());
            // It waits while another process writes a file.
            tokio::task::spawn_blocking(move || reload(&multicast, &groups, &keys))
        };
        match again.await.unwrap_or(Err(ReloadError::Broken)) {
            Ok(Some(Rotated { added: 0, dropped: 0, accepted })) => {
                info!(accepted, "SIGHUP: the keys were read again, and are the same");
            }
            Ok(Some(Rotated { added, dropped, accepted })) => {
                info!(accepted, added, dropped, "SIGHUP: the keys were read again, and changed");
            }
            Ok(None) => info!("SIGHUP: no key is needed (hash and auth are \"none\"), so none is read again"),
            Err(error @ ReloadError::Rotation(RotationError::NotWiped(_))) => error!("SIGHUP: {error}"),
            Err(error) => error!("SIGHUP: the old keys stay in force: {error}"),
        }
        systemd::notify_ready();
    }
}

/// Reads the key files of a running configuration and accepts their keys. `None` if no key is
/// needed.
///
/// # Errors
/// See [`ReloadError`]: the keys are unchanged, except with [`RotationError::NotWiped`].
pub(super) fn reload(multicast: &Multicast, groups: &Groups, keys: &Keyring) -> Result<Option<Rotated>, ReloadError> {
    let mut warnings = Warnings::default();
    let Some(found) = key::load_all(multicast, &mut warnings)? else { return Ok(None) };
    let of_groups = key::load_groups(multicast, groups, Some(&found), &mut warnings)?;
    check(&found, &of_groups, multicast, keys)?;
    for warning in &warnings {
        warn!("{warning}");
    }
    // Only the kernel program can refuse keys, and it is not loaded if groups have their own. The
    // listener's keys come first. If everybody's key becomes a group's, nobody has it for a moment.
    // A request at that moment is sent again.
    let rotated = keys.rotate(KeyPair::from(found))?;
    let of_groups = keys.set_groups(of_groups.into_iter().map(|found| found.key).collect());
    Ok(Some(rotated.and(of_groups)))
}

/// Looks for mistakes that a new key can hardly be meant to have. (At the start they do not stop
/// the daemon: stock servers would accept the key, and there is no better one to go on with.)
fn check(
    found: &FoundPair,
    of_groups: &[FoundGroupKey],
    multicast: &Multicast,
    keys: &Keyring,
) -> Result<(), ReloadError> {
    let second = found.second.as_ref().zip(multicast.key_file2.as_deref());
    let of_all = [(&found.first, multicast.key_file.as_path())].into_iter().chain(second);
    let of_all = of_all.map(|(found, path)| (&found.key, found.is_cut, path));
    let of_groups = of_groups.iter().map(|found| (&*found.key.key, found.is_cut, found.path.as_path()));
    let (everybodys, groups) = (keys.current(), keys.groups());
    let accepted: Vec<&Key> =
        everybodys.iter().chain(groups.iter().map(|group| &group.key)).map(|key| &**key).collect();
    for (key, is_cut, path) in of_all.chain(of_groups) {
        let bytes = key.dangerous_bytes();
        if accepted.iter().any(|known| known.dangerous_bytes() == bytes) {
            continue;
        }
        let of = |error: fn(PathBuf) -> ReloadError, path: &Path| Err(error(path.to_owned()));
        if is_cut {
            return of(ReloadError::TooLong, path);
        }
        if bytes.iter().all(|byte| *byte == 0) {
            return of(ReloadError::Zeros, path);
        }
        if accepted.iter().any(|known| known.dangerous_bytes().starts_with(bytes)) {
            return of(ReloadError::CutOff, path);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use fence_config::{self as config, Config, KeyFileError, Source};
    use std::os::unix::fs::PermissionsExt;
    use tempfile::{TempDir, tempdir};

    struct Reloading {
        dir: TempDir,
        multicast: Multicast,
        groups: Groups,
        keys: Keyring,
    }

    impl Reloading {
        fn new() -> Self {
            Self::with("")
        }

        /// `more`, where `DIR` is the directory of the files.
        fn with(more: &str) -> Self {
            let dir = tempdir().unwrap();
            let path = |name: &str| dir.path().join(name).display().to_string();
            let text = format!(
                "fence_virtd {{ listener = \"multicast\"; backend = \"libvirt\"; }}\n\
                 listeners {{ multicast {{ key_file = \"{}\"; key_file2 = \"{}\"; }} }}\n{}",
                path("one"),
                path("two"),
                more.replace("DIR", &dir.path().display().to_string())
            );
            let (config, _) =
                config::parse(&Source::new(Path::new("f"), text.as_bytes()), Warnings::default()).unwrap();
            let Config { multicast, groups, .. } = config;
            let bench = Self { dir, multicast, groups, keys: Keyring::new(None) };
            bench.write("one", OLD);
            bench.write("of-a", OF_A);
            assert!(bench.reload().is_ok());
            bench
        }

        fn write(&self, name: &str, bytes: &[u8]) {
            let path = self.dir.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            std::fs::set_permissions(&path, PermissionsExt::from_mode(0o600)).unwrap();
        }

        fn reload(&self) -> Result<Option<Rotated>, ReloadError> {
            reload(&self.multicast, &self.groups, &self.keys)
        }

        fn accepted(&self) -> Vec<Vec<u8>> {
            self.keys.current().iter().map(|key| key.dangerous_bytes().to_vec()).collect()
        }
    }

    const OLD: &[u8] = b"the old key, of some length";
    const NEW: &[u8] = b"a new key";
    const OF_A: &[u8] = b"a group's own key, of some length";

    #[test]
    fn a_reload_changes_all_keys_or_none() {
        let groups =
            "groups { group { ip = \"10.0.0.1\"; uuid = \"a\"; key_file = \"DIR/of-a\"; key_file2 = \"DIR/of-a2\"; } }";
        let bench = Reloading::with(groups);
        let of_groups = || -> Vec<Vec<u8>> {
            bench.keys.groups().iter().map(|group| group.key.dangerous_bytes().to_vec()).collect()
        };
        assert_eq!(of_groups(), [OF_A]);
        bench.write("of-a2", NEW);
        assert_eq!(bench.reload().unwrap(), Some(Rotated { added: 1, dropped: 0, accepted: 3 }));
        assert_eq!(of_groups(), [OF_A, NEW]);
        std::fs::rename(bench.dir.path().join("of-a2"), bench.dir.path().join("of-a")).unwrap();
        assert_eq!(bench.reload().unwrap(), Some(Rotated { added: 0, dropped: 1, accepted: 2 }));
        assert_eq!(of_groups(), [NEW]);
        for (content, said) in [
            (&b""[..], "is empty"),
            (&NEW[..5], "only the beginning of a key"),
            (&OLD[..5], "only the beginning of a key"),
            (&[0; 40], "zero bytes"),
            (OLD, "holds the same key as"),
        ] {
            bench.write("of-a", content);
            bench.write("two", b"another key of everybody's");
            let refused = bench.reload().unwrap_err().to_string();
            let path = bench.dir.path().join("of-a");
            assert!(refused.contains(said) && refused.contains(&path.display().to_string()), "{refused}");
            assert_eq!((of_groups(), bench.accepted()), (vec![NEW.to_vec()], vec![OLD.to_vec()]), "{refused}");
        }
        // And the other way round.
        bench.write("of-a", OF_A);
        bench.write("two", b"");
        assert!(bench.reload().is_err());
        assert_eq!(of_groups(), [NEW]);
    }

    #[test]
    fn the_second_key_file_may_appear_and_vanish() {
        let bench = Reloading::new();
        bench.write("two", NEW);
        assert_eq!(bench.reload().unwrap(), Some(Rotated { added: 1, dropped: 0, accepted: 2 }));
        assert_eq!(bench.accepted(), [OLD, NEW]);
        std::fs::rename(bench.dir.path().join("two"), bench.dir.path().join("one")).unwrap();
        assert_eq!(bench.reload().unwrap(), Some(Rotated { added: 0, dropped: 1, accepted: 1 }));
        assert_eq!(bench.accepted(), [NEW]);
        assert_eq!(bench.reload().unwrap(), Some(Rotated { added: 0, dropped: 0, accepted: 1 }));
    }

    #[test]
    fn a_wrong_key_file_keeps_all_old_keys_and_names_the_remedy() {
        let bench = Reloading::new();
        let long = [&[7; 4096][..], b"8"].concat();
        for (name, content, said) in [
            ("one", &b""[..], "is empty (copy the guests' key there"),
            ("one", &OLD[..10], "only the beginning of a key"),
            ("one", &[0; 4096], "zero bytes"),
            ("one", &long, "head -c 4096"),
            ("two", b"", "is empty"),
            ("two", &long, "head -c 4096"),
            ("two", &[0; 9], "zero bytes"),
        ] {
            // The other file is right and new, but that does not help.
            let other = if name == "one" { "two" } else { "one" };
            bench.write(other, NEW);
            bench.write(name, content);
            let refused = bench.reload().unwrap_err().to_string();
            let path = bench.dir.path().join(name);
            assert!(refused.contains(said) && refused.contains(&path.display().to_string()), "{name}: {refused}");
            assert!(!refused.contains('\n') && !refused.contains("old key"), "{refused}");
            assert_eq!(bench.accepted(), [OLD], "{refused}");
        }
        std::fs::remove_file(bench.dir.path().join("one")).unwrap();
        let refused = bench.reload().unwrap_err();
        assert!(matches!(
            &refused,
            ReloadError::File(Unusable { setting: "key_file", error: KeyFileError::Missing(_) })
        ));
        assert_eq!(bench.accepted(), [OLD], "{refused}");
    }

    #[test]
    fn a_half_written_key_file_keeps_the_old_keys() {
        use std::io::Write as _;
        let bench = Reloading::new();
        let mut writer = std::fs::File::create(bench.dir.path().join("two")).unwrap();
        writer.write_all(&NEW[..4]).unwrap();
        let refused = bench.reload().unwrap_err().to_string();
        assert!(refused.contains("two is being written (try again when it is complete"), "{refused}");
        assert_eq!(bench.accepted(), [OLD]);
        writer.write_all(&NEW[4..]).unwrap();
        drop(writer);
        bench.reload().unwrap();
        assert_eq!(bench.accepted(), [OLD, NEW]);
    }

    #[test]
    fn a_long_file_accepted_at_the_start_does_not_block_a_reload() {
        let bench = Reloading::new();
        let long = [9; 5000];
        bench.keys.rotate(KeyPair::from(Key::new(&long).unwrap())).unwrap();
        bench.write("one", &long);
        bench.write("two", NEW);
        assert_eq!(bench.reload().unwrap(), Some(Rotated { added: 1, dropped: 0, accepted: 2 }));
    }
}
