//! Checks values with the code that reads the configuration file, so that the two never differ.

use std::path::Path;

use fence_config::{self as config, Backend, ConfigError, Plugin, Source, Warnings};

use fence_config::document::Document;

pub(super) const GLOBAL: &[&str] = &["fence_virtd"];
pub(super) const MULTICAST: &[&str] = &["listeners", "multicast"];
pub(super) const TCP: &[&str] = &["listeners", "tcp"];
pub(super) const VSOCK: &[&str] = &["listeners", "vsock"];
pub(super) const SERIAL: &[&str] = &["listeners", "serial"];

/// Checks keys of a section together. The error says what is wrong and what to answer instead.
pub(super) fn check(section: &[&str], pairs: &[(&str, &str)]) -> Result<(), String> {
    let mut probe = Document::default();
    for plugin in [Plugin::Listener, Plugin::Backend] {
        probe.set(GLOBAL, plugin.key(), plugin.usual());
    }
    if let ["listeners", listener] = section {
        probe.set(GLOBAL, Plugin::Listener.key(), listener);
    }
    // What serial demands beside the key that is checked.
    probe.set(SERIAL, "path", "/");
    probe.set(SERIAL, "permit", "everyone");
    for (key, value) in pairs {
        writable(value)?;
        probe.set(section, key, value);
    }
    let text = probe.to_string();
    match config::parse(&Source::new(Path::new("answer"), text.as_bytes()), Warnings::default()) {
        Ok(_) => Ok(()),
        Err(ConfigError::Mistakes(mistakes)) => {
            let first = mistakes.iter().next().map(|(_, mistake)| format!("{mistake} ({})", mistake.help()));
            Err(first.unwrap_or_else(|| mistakes.to_string()))
        }
        Err(other) => Err(other.to_string()),
    }
}

/// Checks the key's file. The path must be absolute, because the daemon may start anywhere.
pub(super) fn check_key_file(path: &str) -> Result<(), String> {
    check(MULTICAST, &[("key_file", path)])?;
    if Path::new(path).is_absolute() { Ok(()) } else { Err(format!("{path} is not a whole path: begin it with /")) }
}

/// Checks a URI. The file may hold any text, but here a `y` is an answer to a later question.
pub(super) fn check_uri(uri: &str) -> Result<(), String> {
    check(Backend::Libvirt.section(), &[("uri", uri)])?;
    let has_scheme = uri.split_once(':').is_some_and(|(scheme, _)| !scheme.is_empty());
    if has_scheme { Ok(()) } else { Err(format!("\"{uri}\" is no URI (such as qemu:///system or lxc:///)")) }
}

/// Checks what the file's grammar can hold between quotes.
pub(super) fn writable(value: &str) -> Result<(), String> {
    let wrong = |c: &char| *c == '"' || *c == char::REPLACEMENT_CHARACTER || (c.is_control() && *c != '\t');
    match value.chars().find(wrong) {
        _ if value.is_empty() => Err("it is empty".to_owned()),
        Some('"') => Err("the file has no way to write a double quote inside a value".to_owned()),
        Some(_) => Err("it has a character in it that is no printable UTF-8 text".to_owned()),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_judged_as_the_files_are() {
        for (key, good, bad) in [
            ("port", "1229", "70000"),
            ("port", "1", "0"),
            ("family", "ipv6", "ipx"),
            ("address", "ff05::3:1", "192.168.122.1"),
            ("interface", "none", "a name with blanks"),
            ("interface", "virbr0", "much-too-long-a-name"),
            ("hash", "SHA512", "md5"),
            ("auth", "none", "maybe"),
        ] {
            assert_eq!(check(MULTICAST, &[(key, good)]), Ok(()), "{key}");
            assert!(check(MULTICAST, &[(key, bad)]).unwrap_err().contains(bad), "{key}");
        }
        let contradiction = check(MULTICAST, &[("family", "ipv6"), ("address", "225.0.0.12")]).unwrap_err();
        assert!(contradiction.contains("225.0.0.12"), "{contradiction}");
        for (key, bad) in [("listener", "vmchannel"), ("backend", "null")] {
            let why = check(GLOBAL, &[(key, bad)]).unwrap_err();
            assert!(why.contains("not supported yet"), "{why}");
        }
        assert_eq!(check(GLOBAL, &[("backend", "cpg")]), Ok(()));
        assert!(check(GLOBAL, &[("listener", "nonsense")]).unwrap_err().contains("there is no listener"));
    }

    #[test]
    fn nothing_can_break_out_of_its_quotes() {
        for bad in ["", "a\"; uri1 = \"b:", "a\nb", "a\0", "a\x1b[31m", "\u{fffd}"] {
            assert!(writable(bad).is_err() && check(Backend::Libvirt.section(), &[("uri", bad)]).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn paths_and_uris_are_whole() {
        assert_eq!((check_key_file("/k"), check_uri("qemu+ssh://root@h/system")), (Ok(()), Ok(())));
        assert!(check_key_file("k").unwrap_err().contains("begin it with /"));
        for bad in ["y", "", ":///x"] {
            assert!(check_uri(bad).is_err(), "{bad}");
        }
    }
}
