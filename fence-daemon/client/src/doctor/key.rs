//! Checks the key files: existence, owner, strength, and a fingerprint to compare with the guests'.

use std::path::Path;

use fence_common::key::Key;
use fence_common::wire::KEY_MAX;
use fence_common::words::counted;
use fence_config::key::{self, Found, KeyFileError};
use fence_config::{Doubt, Groups, Multicast, Unusable, Warnings};

use super::finding::Finding;

/// The keys of a configuration.
#[must_use]
pub fn check_all(multicast: &Multicast, groups: &Groups) -> Vec<Finding> {
    let mut findings = check_listeners(multicast);
    for (_, files) in groups.key_files() {
        findings.extend(check(OF_A_GROUP, &files.first));
        if let Some(second) = files.second.as_deref().filter(|second| second.exists()) {
            findings.extend(check(OF_A_GROUP, second));
        }
    }
    // Each was looked at by itself: whether two are the same is left.
    let mut warnings = Warnings::default();
    let all = key::load_all(multicast, &mut warnings).ok().flatten();
    if let Err(Unusable { error: error @ KeyFileError::NotItsOwn { .. }, .. }) =
        key::load_groups(multicast, groups, all.as_ref(), &mut warnings)
    {
        findings.push(unusable(OF_A_GROUP, &error));
    }
    findings
}

/// The name of the check of a group's key.
const OF_A_GROUP: &str = "group-key";

fn check_listeners(multicast: &Multicast) -> Vec<Finding> {
    if !multicast.needs_key() {
        let seen = "`hash` and `auth` are \"none\": no key is needed, and anybody who can send a packet may fence";
        let remedy = "take both lines out of the configuration, and make a key";
        return vec![Finding::warning("key", seen, remedy).command(make(&multicast.key_file, ""))];
    }
    let mut findings = check("key", &multicast.key_file);
    let Some(second) = &multicast.key_file2 else { return findings };
    if second.exists() {
        findings.extend(check("key2", second));
        let mut warnings = Warnings::default();
        // Each file is checked above. This only finds out whether two are the same.
        let _ = key::load_all(multicast, &mut warnings);
        for warning in warnings.iter().filter(|warning| matches!(warning.doubt(), Doubt::KeyTwice(_))) {
            findings.push(Finding::warning("key2", warning.doubt().to_string(), warning.doubt().help()));
        }
    } else {
        findings.push(Finding::ok("key2", format!("{} does not exist: one key is accepted", second.display())));
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
