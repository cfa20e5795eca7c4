//! What a running daemon can take of a changed file: keys, groups, rate limits, how domains are
//! killed and rebooted, and which listeners there are. All else takes a restart.

use super::cpg::Backend;
use super::error::{ConfigError, Mistake, Mistakes};
use super::listeners::{Listener, ListenerKind};
use super::multicast::Multicast;
use super::position::Source;
use super::raw::{self, Item, Section, Span};
use super::resolved::Config;
use super::tcp::{Tcp, TcpAddress};
use super::vsock::Vsock;
use super::warning::Warnings;

/// A way to a setting: the sections with their values, and the key.
struct Way<'w> {
    sections: &'w [(&'static str, Option<&'w str>)],
    key: &'static str,
}

impl Way<'_> {
    /// Where the file has it: the key or the section of this name, or the innermost section that is
    /// there.
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
        let names = items.iter().map(|item| match item {
            Item::Value(item) => &item.key,
            Item::Section(section) => &section.name,
        });
        let mut there = names.filter(|name| name.value.eq_ignore_ascii_case(self.key));
        there.next_back().map_or(span, |name| name.span.clone())
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
        ("listener", new.backend == Backend::Cpg && first_keyed(running) != first_keyed(new)),
    ];
    for (key, _) in global.iter().filter(|(_, differs)| *differs) {
        fixed(&[("fence_virtd", None)], key, Mistake::Fixed(key));
    }
    if running.uris != new.uris {
        fixed(&[("backends", None), (new.backend.name(), None)], "uri", Mistake::Fixed("uri"));
    }
    for (number, other) in new.listeners.iter().enumerate() {
        let sections = [("listeners", None), (other.kind().name(), other.name())];
        let before = running.listeners.iter().position(|one| one.is_same_section(other));
        let (is_multicast, one) = (other.kind() == ListenerKind::Multicast, before.map(|at| &running.listeners[at]));
        let has_switched =
            is_multicast && before.is_some_and(|at| running.groups.have_keys(at) != new.groups.have_keys(number));
        if has_switched {
            fixed(&[("groups", None)], "", Mistake::GroupKeysFixed);
        }
        let keys = one.map_or_else(|| of_the_start(other), |one| changed(one, other));
        for key in keys.into_iter().filter(|key| !has_switched || *key != "attach") {
            fixed(&sections, key, Mistake::Fixed(key));
        }
        // The old socket is closed after the new one is open.
        let is_free = |one: &Listener| one.is_same_section(other) && !one.needs_another_socket(other);
        if running.listeners.iter().any(|one| !is_free(one) && one.shares_socket(other)) {
            fixed(&sections, "", Mistake::SocketInUse(other.label()));
        }
    }
    if list.is_empty() {
        return Ok(warnings);
    }
    list.sort_by_key(|(place, _)| place.order());
    list.dedup();
    Err(ConfigError::Mistakes(Mistakes { list, warnings }))
}

/// The error of a listener that cannot be served, at the place of this key in its section.
pub(super) fn not_served(source: &Source<'_>, listener: &Listener, key: &'static str, why: String) -> ConfigError {
    let items = raw::parse(source.bytes()).unwrap_or_default();
    let sections = [("listeners", None), (listener.kind().name(), listener.name())];
    let place = source.place(&Way { sections: &sections, key }.span(&items));
    ConfigError::Mistakes(Mistakes { list: vec![(place, Mistake::NotServed(why))], warnings: Warnings::default() })
}

/// The first listener with keys, which sign the messages between hosts.
fn first_keyed(config: &Config) -> Option<(&'static str, Option<&str>)> {
    let first = config.listeners.iter().find(|listener| listener.key_files().is_some())?;
    Some((first.kind().name(), first.name()))
}

/// The settings of a new listener that only a start can carry out: systemd passes its sockets then.
fn of_the_start(listener: &Listener) -> Vec<&'static str> {
    let by_systemd = match listener {
        Listener::Tcp(tcp) => tcp.address == TcpAddress::Systemd,
        Listener::Vsock(vsock) => vsock.by_systemd,
        Listener::Multicast(_) | Listener::Serial(_) => false,
    };
    if by_systemd { vec!["socket"] } else { Vec::new() }
}

/// The settings of a listener that differ, and that take a restart.
fn changed(one: &Listener, other: &Listener) -> Vec<&'static str> {
    match (one, other) {
        (Listener::Multicast(one), Listener::Multicast(other)) => changed_multicast(one, other),
        _ if one.needs_another_socket(other) => of_the_start(other),
        (Listener::Tcp(Tcp { hash, .. }), Listener::Tcp(other)) if *hash != other.hash => vec!["hash"],
        (Listener::Vsock(Vsock { hash, .. }), Listener::Vsock(other)) if *hash != other.hash => vec!["hash"],
        _ => Vec::new(),
    }
}

fn changed_multicast(one: &Multicast, other: &Multicast) -> Vec<&'static str> {
    let each = [
        // Where the group is heard may change; whether that is configured may not.
        ("interface", one.interface.is_some() != other.interface.is_some()),
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
    fn keys_groups_limits_ways_to_kill_and_listeners_may_change() {
        for (old, new) in [
            ("interface = ", "key_file = \"/k\"; key_file2 = \"/l\"; interface = "),
            ("address = \"::\";", "address = \"::\"; key_file = \"/k\";"),
            ("uuid = \"a\";", "uuid = \"a\"; uuid = \"b\";"),
            ("groups { group { ip = \"10.0.0.1\"; uuid = \"a\"; } }", ""),
            ("uri = ", "kill = \"libvirt\"; reboot_method = \"reset\"; reboot_pause = \"2\"; uri = "),
            ("backend = ", "rate_limit { request_rate = \"7\"; replay_window = \"1h\"; } backend = "),
            ("virbr0", "virbr1"),
            ("multicast,tcp", "multicast"),
            (
                "address = \"::\"; }",
                "address = \"::\"; }\n tcp \"a\" { address = \"::\"; port = \"7\"; hash = \"sha512\"; }",
            ),
            ("address = \"::\";", "address = \"::\"; port = \"7\"; hash = \"sha512\";"),
            ("multicast {", "multicast \"a\" { interface = \"virbr1\"; }\n  multicast {"),
            // These count at a start only.
            ("backend = ", "foreground = \"1\"; wait_for_init = \"1\"; backend = "),
        ] {
            assert!(after(old, new).is_ok(), "{new}");
        }
    }

    #[test]
    fn what_takes_a_restart_is_shown_in_its_place() {
        for (old, new, line, said) in [
            ("interface = \"virbr0\";", "", 3, "`interface` cannot change while the daemon runs"),
            ("interface = ", "attach = \"tcx\"; interface = ", 3, "`attach` cannot"),
            ("interface = ", "port = \"9\"; interface = ", 3, "`port` cannot"),
            ("address = \"::\";", "address = \"::\"; hash = \"sha512\";", 4, "`hash` cannot"),
            ("address = \"::\";", "socket = \"systemd\";", 4, "`socket` cannot"),
            ("address = \"::\";", "address = \"::1\";", 4, "the socket of `tcp`"),
            ("tcp { address", "tcp \"a\" { address", 4, "the socket of `tcp \"a\"`"),
            ("multicast {", "multicast \"a\" {", 3, "the socket of `multicast \"a\"`"),
            ("backend = ", "priority = \"normal\"; backend = ", 1, "`priority` cannot"),
            ("backend = ", "debug = \"2\"; backend = ", 1, "`debug` cannot"),
            ("listener = ", "\n\n\n\nmetrics { address = \"::1\"; port = \"9\"; }\nlistener = ", 5, "`metrics` cannot"),
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
