//! The systemd unit in dist agrees with the daemon. `tests/tests/cluster/service.rs` tests that
//! systemd accepts it and that its rights suffice.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use fence_client::drop_in;
use fence_common::exit::EXIT_USAGE;
use fence_config::{DEFAULT_PATH, DEFAULT_PID_FILE, DEFAULT_STATE_DIRECTORY, ListenerKind, Source, Warnings};
use fence_daemon::commands;
use fence_daemon::daemon::{ANSWERS_WITHIN, REST_WITHIN, SETTLED_WITHIN};
use fence_daemon::options::DaemonOptions;

const UNIT: &str = include_str!("../../dist/fence-daemon.service");
const PAGE: &str = include_str!("../../docs/guide/installation.md");

/// The values of a setting, in order.
fn values<'a>(text: &'a str, name: &str) -> Vec<&'a str> {
    let lines = text.lines().filter_map(|line| line.split_once('='));
    lines.filter(|(key, _)| *key == name).map(|(_, value)| value).collect()
}

fn value(name: &str) -> &'static str {
    let values = values(UNIT, name);
    assert_eq!(values.len(), 1, "{name} must occur once");
    values[0]
}

/// The path as the kernel sees it where `/var/run` links to `/run`.
fn real(path: &str) -> PathBuf {
    path.strip_prefix("/var/run/").map_or_else(|| PathBuf::from(path), |rest| Path::new("/run").join(rest))
}

/// The absolute paths in a text.
fn paths(text: &str) -> Vec<&str> {
    let words = text.split(|c: char| c.is_whitespace() || matches!(c, '=' | ',' | ';' | '`' | '(' | ')'));
    words.filter(|word| word.starts_with('/')).map(|word| word.trim_end_matches(['.', ':'])).collect()
}

#[test]
fn the_command_is_one_that_the_daemon_takes() {
    let mut words = value("ExecStart").split_whitespace();
    let program = words.next().unwrap();
    let options = DaemonOptions::read(words.map(Into::into)).unwrap();
    assert!(options.foreground, "systemd needs the daemon in the foreground");
    assert_eq!(options.config, Path::new(DEFAULT_PATH));
    assert_eq!(options.pid_file, Path::new(DEFAULT_PID_FILE));
    assert!(
        PAGE.contains(&format!("target/release/fence-daemon {program}\n")),
        "the page installs the program elsewhere"
    );
    let found = commands::places(Path::new(program).parent().unwrap());
    let commands =
        |path: &PathBuf| PAGE.contains(&format!("target/release/{} {}\n", commands::PROGRAM, path.display()));
    assert!(found.iter().any(commands), "the page installs the commands where the daemon does not look: {found:?}");
}

#[test]
fn the_unit_has_all_paths_that_the_daemon_writes() {
    assert_eq!(Path::new("/run").join(value("RuntimeDirectory")), Path::new(DEFAULT_STATE_DIRECTORY));
    assert_eq!(value("RuntimeDirectoryPreserve"), "yes", "the next daemon needs the directory");
    assert_eq!(value("ProtectSystem"), "strict");
    let writable: Vec<_> = value("ReadWritePaths").split_whitespace().map(Path::new).collect();
    for written in [DEFAULT_PID_FILE, DEFAULT_STATE_DIRECTORY] {
        assert!(writable.iter().any(|folder| real(written).starts_with(folder)), "{written}");
    }
    let known = [value("ExecStart").split_whitespace().next().unwrap(), "/bin/kill", "/run"];
    let place = "/etc/systemd/system/fence-daemon.service";
    for path in paths(UNIT) {
        assert!(known.contains(&path) || path == place, "the daemon does not use {path}");
    }
    assert!(PAGE.contains(&format!("dist/fence-daemon.service {place}\n")), "the page installs the unit elsewhere");
}

#[test]
fn it_is_started_again_when_that_helps_and_given_time_to_stop() {
    assert_eq!(value("Restart"), "on-failure");
    assert_eq!(value("RestartPreventExitStatus"), EXIT_USAGE.to_string());
    // First requests, then restarts and connections.
    assert!(
        value("TimeoutStopSec").parse::<u64>().unwrap() > 2 * (SETTLED_WITHIN + ANSWERS_WITHIN + REST_WITHIN).as_secs()
    );
    assert_eq!(value("Type"), "notify");
    assert_eq!(value("KillMode"), "mixed");
    assert_eq!(value("Conflicts"), "fence_virtd.service");
}

#[test]
fn the_page_explains_every_right() {
    // Several lines add up.
    let rights: BTreeSet<_> =
        values(UNIT, "CapabilityBoundingSet").into_iter().flat_map(str::split_whitespace).collect();
    assert!(rights.len() > 5, "{rights:?}");
    for right in &rights {
        assert!(PAGE.contains(&format!("`{right}`")), "{right}");
    }
    // The generator adds these.
    let added = drop_in_of_everything();
    let rights = &rights | &values(&added, "CapabilityBoundingSet").into_iter().collect();
    let rows = PAGE.lines().filter(|line| line.starts_with("| `CAP_"));
    let quoted = rows.flat_map(|row| row.split('|').nth(1).unwrap_or_default().split('`'));
    let told: BTreeSet<_> = quoted.filter(|word| word.starts_with("CAP_")).collect();
    assert_eq!(told, rights);
}

/// The drop-in of a configuration that takes all that one can take.
fn drop_in_of_everything() -> String {
    const CONFIG: &str = "fence_virtd { listener = \"tcp,vsock\"; backend = \"libvirt\"; priority = \"realtime\"; }\n\
        listeners { tcp { port = \"9\"; } vsock { } }\n\
        backends { libvirt { uri = \"qemu+ssh://host/system\"; } }";
    let source = Source::new(Path::new("f"), CONFIG.as_bytes());
    let parsed = fence_config::parse(&source, Warnings::default());
    parsed.map(|(config, _)| drop_in::text(&config)).unwrap_or_default()
}

/// The page has each line that the generator may add, and the unit has none of them.
#[test]
fn the_page_has_what_a_configuration_adds() {
    let added = drop_in_of_everything();
    let lines: Vec<_> = added.lines().filter(|line| line.contains('=') && !line.starts_with('#')).collect();
    assert!(lines.len() > 4, "{added}");
    for line in lines {
        assert!(PAGE.contains(&format!("`{line}`")), "{line}");
        assert!(!UNIT.contains(line), "{line}");
    }
    assert_eq!(value("Nice"), "-20");
    assert!(PAGE.contains("`Nice=0`"));
}

/// The socket unit is the page's, and its name is that of the section without a name.
#[test]
fn the_socket_unit_is_the_one_on_the_page() {
    const SOCKET: &str = include_str!("../../dist/fence-daemon.socket");
    const WAYS_IN: &str = include_str!("../../docs/guide/ways-in.md");
    assert_eq!(values(SOCKET, "FileDescriptorName"), [ListenerKind::Tcp.name()]);
    for line in SOCKET.lines().filter(|line| line.contains('=') && !line.starts_with(['#', 'D'])) {
        assert!(WAYS_IN.contains(&format!("\n{line}\n")), "{line}");
    }
    // Every family that a listener has.
    let families: BTreeSet<_> = value("RestrictAddressFamilies").split_whitespace().collect();
    assert_eq!(families, BTreeSet::from(["AF_INET", "AF_INET6", "AF_NETLINK", "AF_UNIX"]));
}
