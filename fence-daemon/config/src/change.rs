//! What a running daemon can take of a changed file: keys, groups, rate limits, and how domains are
//! killed and rebooted. All else takes a restart.

use super::error::{ConfigError, Mistake, Mistakes};
use super::listeners::{KeyFiles, Listener};
use super::multicast::Multicast;
use super::position::Source;
use super::raw::{self, Item, Section, Span};
use super::resolved::Config;
use super::warning::Warnings;

/// A way to a setting: the sections with their values, and the key.
struct Way<'w> {
    sections: &'w [(&'static str, Option<&'w str>)],
    key: &'static str,
}

impl Way<'_> {
    /// Where the file has it: the key, or the innermost section that is there.
    fn span(&self, items: &[Item<'_>]) -> Span {
        let (mut items, mut span) = (items, 0..0);
        for (name, value) in self.sections {
            let called = || {
                items.iter().filter_map(|item| match item {
                    Item::Section(section) => section.name.value.eq_ignore_ascii_case(name).then_some(section),
                    Item::Value(_) => None,
                })
            };
            let has_value = |section: &&Section<'_>| section.value.as_ref().map(|value| value.value) == *value;
            let Some(section) = called().rfind(has_value).or_else(|| called().next_back()) else { return span };
            (items, span) = (section.items.as_slice(), section.name.span.clone());
        }
        let mut keys = items.iter().filter_map(|item| match item {
            Item::Value(item) => item.key.value.eq_ignore_ascii_case(self.key).then(|| item.key.span.clone()),
            Item::Section(_) => None,
        });
        keys.next_back().unwrap_or(span)
    }
}

/// Checks that a daemon which runs with `running` can take `new`. Both are as the file says,
/// without the command line.
///
/// # Errors
/// Each setting that takes a restart, at its place.
pub(super) fn check(
    running: &Config,
    new: &Config,
    source: &Source<'_>,
    warnings: Warnings,
) -> Result<Warnings, ConfigError> {
    let items = raw::parse(source.bytes()).unwrap_or_default();
    let mut list = Vec::new();
    let mut fixed = |sections: &[(&'static str, Option<&str>)], key: &'static str, mistake: Mistake| {
        list.push((source.place(&Way { sections, key }.span(&items)), mistake));
    };
    let global = [
        ("backend", running.backend != new.backend),
        ("debug", running.debug != new.debug),
        ("state_directory", running.hypervisor.state != new.hypervisor.state),
        ("lock_memory", running.stress.lock_memory != new.stress.lock_memory),
        ("priority", running.stress.priority != new.stress.priority),
        ("oom_protect", running.stress.oom_protect != new.stress.oom_protect),
        ("history_directory", running.history != new.history),
        ("metrics", running.metrics != new.metrics),
        ("listener", kinds(running) != kinds(new)),
    ];
    for (key, _) in global.iter().filter(|(_, differs)| *differs) {
        fixed(&[("fence_virtd", None)], key, Mistake::Fixed(key));
    }
    if running.uris != new.uris {
        fixed(&[("backends", None), (new.backend.name(), None)], "uri", Mistake::Fixed("uri"));
    }
    if kinds(running) == kinds(new) {
        for (number, (one, other)) in running.listeners.iter().zip(&new.listeners).enumerate() {
            let sections = [("listeners", None), (other.kind().name(), other.name())];
            let has_switched = running.groups.have_keys(number) != new.groups.have_keys(number);
            if has_switched {
                fixed(&[("groups", None)], "", Mistake::GroupKeysFixed);
            }
            for key in changed(one, other).into_iter().filter(|key| !has_switched || *key != "attach") {
                fixed(&sections, key, Mistake::Fixed(key));
            }
        }
    }
    if list.is_empty() {
        return Ok(warnings);
    }
    list.sort_by_key(|(place, _)| place.order());
    list.dedup();
    Err(ConfigError::Mistakes(Mistakes { list, warnings }))
}

/// The kinds and names of the listeners, which are in the same order in each configuration.
fn kinds(config: &Config) -> Vec<(&'static str, Option<&str>)> {
    config.listeners.iter().map(|listener| (listener.kind().name(), listener.name())).collect()
}

/// The settings in which two listeners differ, but for their key files.
fn changed(one: &Listener, other: &Listener) -> Vec<&'static str> {
    let no_files = || KeyFiles { first: "/".into(), second: None };
    match (one, other) {
        (Listener::Multicast(one), Listener::Multicast(other)) => changed_multicast(one, other),
        (Listener::Tcp(one), Listener::Tcp(other)) => {
            let mut same = one.clone();
            let mut other = other.clone();
            (same.keys, other.keys) = (no_files(), no_files());
            if same == other { Vec::new() } else { vec!["tcp"] }
        }
        (Listener::Vsock(one), Listener::Vsock(other)) => {
            let mut same = one.clone();
            let mut other = other.clone();
            (same.keys, other.keys) = (no_files(), no_files());
            if same == other { Vec::new() } else { vec!["vsock"] }
        }
        (Listener::Serial(one), Listener::Serial(other)) if one == other => Vec::new(),
        _ => vec!["serial"],
    }
}

fn changed_multicast(one: &Multicast, other: &Multicast) -> Vec<&'static str> {
    let each = [
        ("interface", one.interface != other.interface),
        ("address", one.group != other.group),
        ("port", one.port != other.port),
        ("hash", one.hash != other.hash),
        ("auth", one.auth != other.auth),
        ("attach", one.attach != other.attach),
        ("strict_source", one.strict_source != other.strict_source),
        ("alone", one.alone != other.alone),
    ];
    each.iter().filter(|(_, differs)| *differs).map(|(key, _)| *key).collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::parse;
    use super::*;

    const RUNNING: &str = "fence_virtd { listener = \"multicast,tcp\"; backend = \"libvirt\"; }\n\
        listeners {\n  multicast { interface = \"virbr0\"; }\n  tcp { address = \"::\"; }\n}\n\
        backends { libvirt { uri = \"a\"; } }\n\
        groups { group { ip = \"10.0.0.1\"; uuid = \"a\"; } }\n";

    fn read(text: &str) -> Config {
        parse(&Source::new(Path::new("f"), text.as_bytes()), Warnings::default()).unwrap().0
    }

    /// What a daemon with [`RUNNING`] says to this replacement.
    fn after(old: &str, new: &str) -> Result<Warnings, ConfigError> {
        let text = RUNNING.replace(old, new);
        assert_ne!(text, RUNNING, "{old}");
        let source = Source::new(Path::new("f"), text.as_bytes());
        check(&read(RUNNING), &read(&text), &source, Warnings::default())
    }

    #[test]
    fn keys_groups_limits_and_ways_to_kill_may_change() {
        for (old, new) in [
            ("interface = ", "key_file = \"/k\"; key_file2 = \"/l\"; interface = "),
            ("address = \"::\";", "address = \"::\"; key_file = \"/k\";"),
            ("uuid = \"a\";", "uuid = \"a\"; uuid = \"b\";"),
            ("groups { group { ip = \"10.0.0.1\"; uuid = \"a\"; } }", ""),
            ("uri = ", "kill = \"libvirt\"; reboot_method = \"reset\"; reboot_pause = \"2\"; uri = "),
            ("backend = ", "rate_limit { request_rate = \"7\"; replay_window = \"1h\"; } backend = "),
            // These count at a start only.
            ("backend = ", "foreground = \"1\"; wait_for_init = \"1\"; backend = "),
        ] {
            assert!(after(old, new).is_ok(), "{new}");
        }
    }

    #[test]
    fn what_takes_a_restart_is_shown_in_its_place() {
        for (old, new, line, said) in [
            ("virbr0", "virbr1", 3, "`interface` cannot change while the daemon runs"),
            ("interface = ", "attach = \"tcx\"; interface = ", 3, "`attach` cannot"),
            ("interface = ", "port = \"9\"; interface = ", 3, "`port` cannot"),
            ("address = \"::\";", "address = \"::1\";", 4, "`tcp` cannot"),
            ("multicast,tcp", "multicast", 1, "`listener` cannot"),
            ("backend = ", "priority = \"normal\"; backend = ", 1, "`priority` cannot"),
            ("backend = ", "debug = \"2\"; backend = ", 1, "`debug` cannot"),
            ("uri = ", "uri1 = \"b\"; uri = ", 6, "`uri` cannot"),
            ("uuid = \"a\";", "uuid = \"a\"; key_file = \"/k\";", 7, "the first `key_file`"),
        ] {
            let Err(ConfigError::Mistakes(mistakes)) = after(old, new) else { panic!("{new} is taken") };
            let all: Vec<_> = mistakes.iter().map(|(place, mistake)| (place.line(), mistake.to_string())).collect();
            let [(at, text)] = all.as_slice() else { panic!("{new}: {all:?}") };
            assert!(*at == line && text.contains(said), "{new}: {all:?}");
            let shown = ConfigError::Mistakes(mistakes).render(false);
            assert!(shown.contains('^') && shown.contains("systemctl restart fence-daemon"), "{shown}");
        }
    }
}
