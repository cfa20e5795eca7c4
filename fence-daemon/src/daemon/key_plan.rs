//! The keys of a configuration, where they are used. A reload reads their files again.
//!
//! If anything is wrong with one of them, all old keys stay, and one line says why and what to do.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use fence_common::key::Key;
use fence_common::keys::{GroupKey, KeyPair};
use fence_config::key::{self, FoundAll, FoundPair};
use fence_config::{FoundKeys, Groups, Listener, Unusable, Warnings};
use tracing::warn;

use crate::intake::keyring::{Keyring, Rotated, RotationError};
use crate::intake::memberships::chain;

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
}

/// The keys of a configuration, where they are used.
#[derive(Clone, Debug)]
pub(super) struct KeyPlan {
    /// That of each listener, by its number. One whose requests are not signed has an empty one.
    rings: BTreeMap<usize, Keyring>,
    /// The first listener with keys.
    first: Option<usize>,
}

impl KeyPlan {
    /// The plan of a configuration, with the keys that were found for it.
    pub(super) fn new(listeners: &[Listener], found: FoundKeys) -> Self {
        let mut pairs = found.listeners.into_iter();
        let rings = (0..listeners.len()).map(|number| (number, Keyring::new(pairs.next().flatten()))).collect();
        let first = listeners.iter().position(|listener| listener.key_files().is_some());
        let plan = Self { rings, first };
        plan.set_groups(&found.groups);
        plan
    }

    /// The keys of the listener with this number.
    pub(super) fn ring(&self, listener: usize) -> Keyring {
        self.rings.get(&listener).cloned().unwrap_or_else(|| Keyring::new(None))
    }

    /// Whether the listener with this number has a ring.
    pub(super) fn has(&self, listener: usize) -> bool {
        self.rings.contains_key(&listener)
    }

    /// Another listener has these keys of its own, and those of the groups.
    pub(super) fn add(&mut self, listener: usize, pair: Option<FoundPair>) {
        let ring = Keyring::new(pair.map(KeyPair::from));
        // Each ring has all keys of groups.
        let groups = self.rings.values().next().map(|other| other.groups().to_vec());
        ring.set_groups(groups.unwrap_or_default());
        self.rings.insert(listener, ring);
    }

    /// The keys of the other listeners are not needed any more.
    pub(super) fn keep(&mut self, listeners: &[usize]) {
        self.rings.retain(|number, _| listeners.contains(number));
    }

    /// The keys of the first listener that has some.
    pub(super) fn first_ring(&self) -> Keyring {
        self.first.map_or_else(|| Keyring::new(None), |number| self.ring(number))
    }

    /// Accepts these group keys from now on, and no others.
    pub(super) fn set_groups(&self, keys: &[GroupKey]) -> Rotated {
        // Each ring has them all.
        self.rings
            .values()
            .fold(Rotated { added: 0, dropped: 0, accepted: 0 }, |_, ring| ring.set_groups(keys.to_vec()))
    }

    /// Reads the key files of these listeners and groups.
    ///
    /// # Errors
    /// See [`ReloadError`]: a file cannot be used, or hardly holds a key.
    pub(super) fn read(&self, listeners: &[Listener], groups: &Groups) -> Result<FoundAll, ReloadError> {
        let mut warnings = Warnings::default();
        let found = key::load_all(listeners, groups, &mut warnings)?;
        self.check(&found)?;
        for warning in &warnings {
            warn!("{warning}");
        }
        Ok(found)
    }

    /// Accepts the listeners' keys that were [read](Self::read), and no others. `numbers` are the
    /// listeners' numbers; one without a ring has no keys yet.
    ///
    /// # Errors
    /// [`ReloadError::Rotation`]: the keys are unchanged, except with [`RotationError::NotWiped`].
    pub(super) fn rotate(&self, numbers: &[usize], found: &FoundAll) -> Result<Rotated, ReloadError> {
        let all: Vec<_> = numbers
            .iter()
            .zip(&found.listeners)
            .map(|(number, pair)| self.rings.get(number).cloned().zip(pair.clone()))
            .collect();
        let changes = all.iter().flatten().map(|(ring, pair)| (ring.clone(), KeyPair::from(pair.clone())));
        let rotated = Keyring::rotate_all(changes)?;
        // Two listeners with the same files count once.
        let counts = |at: usize| {
            let files = |pair: &Option<(Keyring, FoundPair)>| pair.as_ref().map(|(_, pair)| pair.files.clone());
            let of_this = all.get(at).and_then(files);
            all.iter().take(at).all(|earlier| files(earlier) != of_this)
        };
        let keyed = all.iter().enumerate().filter(|(_, pair)| pair.is_some()).map(|(at, _)| at);
        let counted = keyed.zip(rotated).filter(|(at, _)| counts(*at)).map(|(_, rotated)| rotated);
        Ok(counted.reduce(Rotated::and).unwrap_or(Rotated { added: 0, dropped: 0, accepted: 0 }))
    }

    /// Looks for mistakes that a new key can hardly be meant to have. (At the start they do not
    /// stop the daemon: stock servers would accept the key, and there is no better one to go on
    /// with.)
    fn check(&self, found: &FoundAll) -> Result<(), ReloadError> {
        let of_all = found.pairs().flat_map(FoundPair::each).map(|(found, path)| (&found.key, found.is_cut, path));
        let of_groups = found.groups.iter().map(|found| (&*found.key.key, found.is_cut, found.path.as_path()));
        let accepted: Vec<Arc<Key>> = self
            .rings
            .values()
            .flat_map(|ring| {
                let groups: Vec<_> = ring.groups().iter().map(|group| Arc::clone(&group.key)).collect();
                ring.current().iter().cloned().chain(groups).collect::<Vec<_>>()
            })
            .collect();
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
}

#[cfg(test)]
mod tests {
    use super::*;
    use fence_config::{self as config, Config, KeyFileError, Source};
    use std::os::unix::fs::PermissionsExt;
    use tempfile::{TempDir, tempdir};

    struct Reloading {
        dir: TempDir,
        listeners: Vec<Listener>,
        groups: Groups,
        plan: KeyPlan,
        keys: Keyring,
    }

    impl Reloading {
        fn new() -> Self {
            Self::with("")
        }

        /// `more`, where `DIR` is the directory of the files.
        fn with(more: &str) -> Self {
            Self::with_listeners("", more)
        }

        /// The same, with `listeners` beside the one without a name.
        fn with_listeners(listeners: &str, more: &str) -> Self {
            let dir = tempdir().unwrap();
            let path = |name: &str| dir.path().join(name).display().to_string();
            let text = format!(
                "fence_virtd {{ listener = \"multicast\"; backend = \"libvirt\"; }}\n\
                 listeners {{ multicast {{ key_file = \"{}\"; key_file2 = \"{}\"; }} {} }}\n{}",
                path("one"),
                path("two"),
                listeners.replace("DIR", &dir.path().display().to_string()),
                more.replace("DIR", &dir.path().display().to_string())
            );
            let (config, _) =
                config::parse(&Source::new(Path::new("f"), text.as_bytes()), Warnings::default()).unwrap();
            let Config { listeners, groups, .. } = config;
            let plan = KeyPlan::new(&listeners, FoundKeys::default());
            let bench = Self { dir, listeners, groups, keys: plan.ring(0), plan };
            bench.write("one", OLD);
            bench.write("of-a", OF_A);
            bench.write("of-dmz", OF_DMZ);
            assert!(bench.reload().is_ok());
            bench
        }

        fn write(&self, name: &str, bytes: &[u8]) {
            let path = self.dir.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            std::fs::set_permissions(&path, PermissionsExt::from_mode(0o600)).unwrap();
        }

        fn reload(&self) -> Result<Rotated, ReloadError> {
            let found = self.plan.read(&self.listeners, &self.groups)?;
            let numbers: Vec<_> = (0..self.listeners.len()).collect();
            let rotated = self.plan.rotate(&numbers, &found)?;
            let of_groups: Vec<_> = found.groups.into_iter().map(|found| found.key).collect();
            Ok(rotated.and(self.plan.set_groups(&of_groups)))
        }

        fn accepted(&self) -> Vec<Vec<u8>> {
            self.keys.current().iter().map(|key| key.dangerous_bytes().to_vec()).collect()
        }
    }

    const OLD: &[u8] = b"the old key, of some length";
    const NEW: &[u8] = b"a new key";
    const OF_A: &[u8] = b"a group's own key, of some length";
    const OF_DMZ: &[u8] = b"the key of another listener, of some length";

    #[test]
    fn each_listener_has_its_own_keys_and_a_reload_changes_all_of_them_or_none() {
        let more = "multicast \"dmz\" { port = \"1\"; key_file = \"DIR/of-dmz\"; } \
                    multicast \"same\" { port = \"2\"; key_file = \"DIR/one\"; key_file2 = \"DIR/two\"; }";
        let bench = Reloading::with_listeners(more, "");
        let of = |listener: usize| -> Vec<Vec<u8>> {
            bench.plan.ring(listener).current().iter().map(|key| key.dangerous_bytes().to_vec()).collect()
        };
        assert_eq!((of(0), of(1), of(2)), (vec![OLD.to_vec()], vec![OF_DMZ.to_vec()], vec![OLD.to_vec()]));
        // Two listeners with the same files count once.
        bench.write("one", NEW);
        assert_eq!(bench.reload().unwrap(), Rotated { added: 1, dropped: 1, accepted: 2 });
        assert_eq!((of(0), of(1), of(2)), (vec![NEW.to_vec()], vec![OF_DMZ.to_vec()], vec![NEW.to_vec()]));
        bench.write("one", OLD);
        bench.write("of-dmz", b"");
        let refused = bench.reload().unwrap_err().to_string();
        assert!(refused.contains("of-dmz is empty"), "{refused}");
        assert_eq!((of(0), of(1)), (vec![NEW.to_vec()], vec![OF_DMZ.to_vec()]));
    }

    #[test]
    fn a_listener_that_comes_has_its_keys_and_those_of_the_groups() {
        let groups = "groups { group { ip = \"10.0.0.1\"; uuid = \"a\"; key_file = \"DIR/of-a\"; } }";
        let mut bench = Reloading::with(groups);
        let found = bench.plan.read(&bench.listeners, &bench.groups).unwrap();
        let pair = found.listeners[0].clone();
        assert!(bench.plan.has(0) && !bench.plan.has(7));
        bench.plan.add(7, pair);
        let ring = bench.plan.ring(7);
        assert_eq!(ring.current().first().unwrap().dangerous_bytes(), OLD);
        assert_eq!(ring.groups().iter().map(|group| group.key.dangerous_bytes()).collect::<Vec<_>>(), [OF_A]);
        // Its number has nothing to do with its place.
        bench.write("one", NEW);
        let found = bench.plan.read(&bench.listeners, &bench.groups).unwrap();
        assert_eq!(bench.plan.rotate(&[7], &found).unwrap(), Rotated { added: 1, dropped: 1, accepted: 1 });
        assert_eq!((bench.accepted(), ring.current().first().unwrap().dangerous_bytes()), (vec![OLD.to_vec()], NEW));
        bench.plan.keep(&[7]);
        assert!(!bench.plan.has(0) && bench.plan.ring(0).current().first().is_none());
    }

    /// A kernel program that takes no key from some time on.
    #[derive(Clone, Debug, Default)]
    struct Full(Arc<std::sync::atomic::AtomicBool>);

    impl crate::intake::keyring::Slots for Full {
        fn put(&mut self, _: u32, _: &fence_common::digest::KeySlot) -> Result<(), crate::intake::kernel::Error> {
            let is_full = self.0.load(std::sync::atomic::Ordering::Relaxed);
            if is_full { Err(crate::intake::kernel::Error::Missing("a map")) } else { Ok(()) }
        }
    }

    #[test]
    fn keys_that_one_kernel_program_refuses_change_at_no_listener() {
        let bench = Reloading::with_listeners("multicast \"dmz\" { port = \"1\"; key_file = \"DIR/of-dmz\"; }", "");
        let (full, dmz) = (Full::default(), bench.plan.ring(1));
        dmz.connect(Box::new(full.clone())).unwrap();
        full.0.store(true, std::sync::atomic::Ordering::Relaxed);
        bench.write("one", NEW);
        bench.write("of-dmz", b"another key of the other listener");
        assert!(matches!(bench.reload(), Err(ReloadError::Rotation(RotationError::Refused(_)))));
        assert_eq!((bench.accepted(), dmz.current().first().unwrap().dangerous_bytes()), (vec![OLD.to_vec()], OF_DMZ));
        full.0.store(false, std::sync::atomic::Ordering::Relaxed);
        assert_eq!(bench.reload().unwrap(), Rotated { added: 2, dropped: 2, accepted: 2 });
    }

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
        assert_eq!(bench.reload().unwrap(), Rotated { added: 1, dropped: 0, accepted: 3 });
        assert_eq!(of_groups(), [OF_A, NEW]);
        std::fs::rename(bench.dir.path().join("of-a2"), bench.dir.path().join("of-a")).unwrap();
        assert_eq!(bench.reload().unwrap(), Rotated { added: 0, dropped: 1, accepted: 2 });
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
        assert_eq!(bench.reload().unwrap(), Rotated { added: 1, dropped: 0, accepted: 2 });
        assert_eq!(bench.accepted(), [OLD, NEW]);
        std::fs::rename(bench.dir.path().join("two"), bench.dir.path().join("one")).unwrap();
        assert_eq!(bench.reload().unwrap(), Rotated { added: 0, dropped: 1, accepted: 1 });
        assert_eq!(bench.accepted(), [NEW]);
        assert_eq!(bench.reload().unwrap(), Rotated { added: 0, dropped: 0, accepted: 1 });
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
        assert_eq!(bench.reload().unwrap(), Rotated { added: 1, dropped: 0, accepted: 2 });
    }
}
