//! Checks the key files: existence, owner, strength, and a fingerprint to compare with the guests'.

use std::path::Path;

use fence_common::key::Key;
use fence_common::wire::KEY_MAX;
use fence_common::words::counted;
use fence_config::key::{self, Found, KeyFileError};
use fence_config::{Config, Doubt, KeyFiles, Listener, Unusable, Warnings};

use super::finding::Finding;

/// The keys of a configuration.
#[must_use]
pub fn check_all(config: &Config) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut known: Vec<KeyFiles> = Vec::new();
    for listener in &config.listeners {
        match listener.key_files() {
            // The line itself says who asks.
            None if matches!(listener, Listener::Serial(_)) => {}
            None => findings.push(unsigned(listener)),
            Some(files) if known.contains(&files) => {}
            Some(files) => {
                findings.extend(check_pair(&files));
                known.push(files);
            }
        }
    }
    for (_, files) in config.groups.key_files() {
        findings.extend(check(OF_A_GROUP, &files.first));
        if let Some(second) = files.second.as_deref().filter(|second| second.exists()) {
            findings.extend(check(OF_A_GROUP, second));
        }
    }
    // Each was looked at by itself: whether two are the same is left.
    let (mut warnings, mut told) = (Warnings::default(), Vec::new());
    match key::load_all(&config.listeners, &config.groups, &mut warnings) {
        Err(Unusable { error: error @ KeyFileError::NotItsOwn { .. }, .. }) => {
            findings.push(unusable(OF_A_GROUP, &error));
        }
        Ok(_) | Err(_) => {
            told.extend(warnings.iter().filter(|warning| matches!(warning.doubt(), Doubt::KeyTwice(_))));
        }
    }
    findings.extend(
        told.iter().map(|warning| Finding::warning("key2", warning.doubt().to_string(), warning.doubt().help())),
    );
    findings
}

/// The name of the check of a group's key.
const OF_A_GROUP: &str = "group-key";

/// A listener that signs and verifies nothing.
fn unsigned(listener: &Listener) -> Finding {
    let label = listener.label();
    let seen = format!(
        "`hash` and `auth` of {label} are \"none\": no key is needed, and anybody who can send a packet may fence"
    );
    let remedy = "take both lines out of the configuration, and make a key";
    let finding = Finding::warning("key", seen, remedy);
    match listener {
        Listener::Multicast(multicast) => finding.command(make(&multicast.key_file, "")),
        Listener::Tcp(_) | Listener::Vsock(_) | Listener::Serial(_) => finding,
    }
}

/// Checks the key files of a listener, each by itself.
fn check_pair(files: &KeyFiles) -> Vec<Finding> {
    let mut findings = check("key", &files.first);
    match &files.second {
        Some(second) if second.exists() => findings.extend(check("key2", second)),
        Some(second) => {
            findings.push(Finding::ok("key2", format!("{} does not exist: one key is accepted", second.display())));
        }
        None => {}
    }
    findings
}

/// Checks one key file.
#[must_use]
pub fn check(name: &'static str, path: &Path) -> Vec<Finding> {
    let mut warnings = Warnings::default();
    let found = match key::load(path, &mut warnings) {
        Ok(found) => found,
        Err(error) => return vec![unusable(name, &error)],
    };
    let mut findings = vec![Finding::ok(name, described(path, &found))];
    for warning in &warnings {
        let (seen, help) = (warning.doubt().to_string(), warning.doubt().help());
        let doubt = warning.doubt();
        let finding = if matches!(doubt, Doubt::KeyOpen { .. } | Doubt::KeyForeign { .. }) {
            Finding::warning(name, seen, "who can read the key can fence every guest").command(help)
        } else if matches!(doubt, Doubt::KeyShort { .. } | Doubt::KeyMonotonous(_)) {
            let remedy = "make a random one, and copy it to every guest";
            Finding::warning(name, seen, remedy).command(make(path, "--force "))
        } else {
            Finding::warning(name, seen, help)
        };
        findings.push(finding);
    }
    findings
}

fn unusable(name: &'static str, error: &KeyFileError) -> Finding {
    let finding = Finding::wrong(name, error.to_string(), error.help());
    match error {
        KeyFileError::Missing(path) => {
            let parents = if path.parent().is_none_or(Path::exists) { "" } else { "--parents " };
            finding.command(make(path, parents))
        }
        KeyFileError::Empty(path) => finding.command(make(path, "--force ")),
        KeyFileError::NotAFile(_)
        | KeyFileError::NotItsOwn { .. }
        | KeyFileError::BeingWritten(_)
        | KeyFileError::Unreadable { .. } => finding,
    }
}

fn make(path: &Path, option: &str) -> String {
    format!("fence-daemon keygen {option}{}", path.display())
}

/// Describes a key without revealing it.
fn described(path: &Path, found: &Found) -> String {
    let len = found.key.dangerous_bytes().len();
    let cut = if found.is_cut { format!(" (the first {KEY_MAX} of the file)") } else { String::new() };
    format!("{}: {}{cut}, fingerprint {}", path.display(), counted(len, "byte"), fingerprint(&found.key))
}

/// A key's fingerprint, in groups that can be read out.
#[must_use]
pub fn fingerprint(key: &Key) -> String {
    let digits: String = key.fingerprint().iter().map(|byte| format!("{byte:02x}")).collect();
    let groups: Vec<_> = digits.as_bytes().chunks(4).map(|group| String::from_utf8_lossy(group).into_owned()).collect();
    groups.join(" ")
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::super::finding::State;
    use super::*;
    use tempfile::{TempDir, tempdir};

    fn states(findings: &[Finding]) -> Vec<State> {
        findings.iter().map(|finding| finding.state).collect()
    }

    fn write(dir: &TempDir, bytes: &[u8], mode: u32) -> std::path::PathBuf {
        let path = dir.path().join("key");
        std::fs::write(&path, bytes).unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(mode)).unwrap();
        path
    }

    #[test]
    fn a_good_key_is_told_by_its_fingerprint_and_nothing_else() {
        let dir = tempdir().unwrap();
        let findings = check("key", &write(&dir, b"a line of text that is a key\n", 0o600));
        assert_eq!(states(&findings), [State::Ok]);
        // By sha256sum: printf 'fence-xdp key fingerprint\na line of text that is a key\n' |
        // sha256sum
        assert!(findings[0].seen.ends_with("29 bytes, fingerprint 188a cbb0 aadb 000a"), "{findings:?}");
        assert!(!findings[0].seen.contains("a line of text"), "{findings:?}");
        let other = check("key", &write(&dir, b"a line of text that is a key", 0o600));
        assert_ne!(findings, other, "the newline counts");
    }

    #[test]
    fn a_key_finding_has_a_command() {
        let dir = tempdir().unwrap();
        let missing = check("key", &dir.path().join("no/key"));
        assert_eq!(states(&missing), [State::Wrong]);
        assert!(missing[0].commands[0].starts_with("fence-daemon keygen --parents "), "{missing:?}");
        let empty = check("key", &write(&dir, b"", 0o600));
        assert_eq!(states(&empty), [State::Wrong]);
        assert!(empty[0].commands[0].contains("--force"), "{empty:?}");
        let open = check("key", &write(&dir, b"a line of text that is a key", 0o644));
        assert_eq!(states(&open), [State::Ok, State::Warning]);
        assert!(open[1].commands[0].starts_with("chmod 0600 "), "{open:?}");
        for weak in [b"short".as_slice(), &[0; 4096], &[7; 64]] {
            let weak = check("key", &write(&dir, weak, 0o600));
            assert_eq!(states(&weak), [State::Ok, State::Warning]);
            assert!(weak[1].seen.contains("can guess it") && weak[1].commands[0].contains("--force"), "{weak:?}");
        }
        let long: Vec<u8> = (0..5000_u32).map(|n| ((n * n) >> 3).to_le_bytes()[0]).collect();
        assert_eq!(states(&check("key", &write(&dir, &long, 0o600))), [State::Ok, State::Warning]);
        assert_eq!(states(&check("key", dir.path())), [State::Wrong]);
    }
}
