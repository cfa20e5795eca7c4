//! Prints the resolved configuration as a configuration file, for `fence-daemon check-config`.
//!
//! Reading the output gives the same configuration. It leaves out what has no effect: unknown keys,
//! and sections of other listeners.

use std::fmt::Write as _;
use std::path::Path;

use fence_common::hash::HashKind;
use fence_common::words::counted;

use crate::document::Document;
use crate::key::{Found, FoundAll};
use crate::{
    Backend, CONNECTED_AUTH, Config, Groups, KeyFiles, Listener, Metrics, Multicast, Serial, Tcp, TcpAddress, Vsock,
};

/// The complete configuration as a file. `file` is the original: it shows which values are
/// defaults.
#[must_use]
pub fn render(config: &Config, file: &[u8]) -> String {
    let written = Document::parse(file).unwrap_or_default();
    let mut text = String::new();
    global(&mut text, config, &written);
    text.push_str("\nlisteners {\n");
    for (number, listener) in config.listeners.iter().enumerate() {
        let (kind, name) = (listener.kind().name(), listener.name());
        let nothing = Document::default();
        let written = written.named(LISTENERS, kind, name).unwrap_or(&nothing);
        let title = name.map_or_else(|| kind.to_owned(), |name| format!("{kind} = \"{name}\""));
        let _ = writeln!(text, "\t{title} {{");
        match listener {
            Listener::Multicast(section) => multicast(&mut text, section, config.groups.have_keys(number), written),
            Listener::Tcp(section) => tcp(&mut text, section, written),
            Listener::Serial(section) => serial(&mut text, section, written),
            Listener::Vsock(section) => vsock(&mut text, section, written),
        }
        text.push_str("\t}\n");
    }
    text.push_str("}\n");

    let own = config.backend.section();
    let is_default = written.values(own).all(|(key, _)| !key.to_ascii_lowercase().starts_with("uri"));
    let _ = writeln!(text, "\nbackends {{\n\t{} {{", config.backend.name());
    for (index, uri) in config.uris.iter().enumerate() {
        let key = if index == 0 { "uri".to_owned() } else { format!("uri{index}") };
        line(&mut text, 2, &key, uri, is_default);
    }
    let chosen = &config.hypervisor;
    let pause = crate::in_seconds(chosen.reboot_pause);
    for (key, value) in [
        ("kill", chosen.kill.into()),
        ("reboot_method", chosen.reboot_method.into()),
        ("reboot_pause", pause.as_str()),
        ("reboot_reply", chosen.reboot_reply.into()),
    ] {
        line(&mut text, 2, key, value, written.get(own, key).is_none());
    }
    if config.backend == Backend::Cpg {
        line(&mut text, 2, "unfenced_hosts", "fail", written.get(own, "unfenced_hosts").is_none());
        if let Some(value) = written.get(own, "name_mode") {
            let _ = writeln!(text, "\t\tname_mode = \"{value}\";  # for fence_virtd only");
        }
    }
    text.push_str("\t}\n}\n");
    groups(&mut text, config);
    text
}

const GLOBAL: &[&str] = &["fence_virtd"];
const RATE_LIMIT: &[&str] = &["fence_virtd", "rate_limit"];
const METRICS: &[&str] = &["fence_virtd", "metrics"];
const LISTENERS: &[&str] = &["listeners"];

/// Prints one key, with a comment about where its value comes from.
fn line(text: &mut String, depth: usize, key: &str, value: &str, is_default: bool) {
    let comment = if is_default { "  # default" } else { "" };
    let _ = writeln!(text, "{}{key} = \"{value}\";{comment}", "\t".repeat(depth));
}

fn global(text: &mut String, config: &Config, written: &Document) {
    let is_default = |key| written.get(GLOBAL, key).is_none();
    let switch = |on| if on { "1" } else { "0" };
    text.push_str("fence_virtd {\n");
    let mut kinds: Vec<_> = config.listeners.iter().map(|listener| listener.kind().name()).collect();
    kinds.dedup();
    line(text, 1, "listener", &kinds.join(","), false);
    line(text, 1, "backend", config.backend.name(), false);
    line(text, 1, "foreground", switch(config.foreground), is_default("foreground"));
    let waits = is_default("wait_for_init") && is_default("wait_for_backend");
    line(text, 1, "wait_for_init", switch(config.wait_for_init), waits);
    line(text, 1, "debug", &config.debug.to_string(), is_default("debug"));
    let yes_or_no = |on| if on { "yes" } else { "no" };
    let state = config.hypervisor.state.as_deref().unwrap_or_else(|| Path::new(crate::DEFAULT_STATE_DIRECTORY));
    for (key, value) in [
        ("lock_memory", yes_or_no(config.stress.lock_memory)),
        ("priority", config.stress.priority.into()),
        ("oom_protect", yes_or_no(config.stress.oom_protect)),
        ("state_directory", &state.to_string_lossy()),
    ] {
        line(text, 1, key, value, is_default(key));
    }
    let history = config.history.as_deref().unwrap_or(state);
    line(text, 1, "history_directory", &history.to_string_lossy(), is_default("history_directory"));
    for key in ["module_path", "name_mode"] {
        if let Some(value) = written.get(GLOBAL, key) {
            let _ = writeln!(text, "\t{key} = \"{value}\";  # for fence_virtd only");
        }
    }
    text.push_str("\trate_limit {\n");
    for (key, value) in config.rate_limit.pairs() {
        line(text, 2, key, &value, written.get(RATE_LIMIT, key).is_none());
    }
    text.push_str("\t}\n");
    match &config.metrics {
        None => text.push_str("\t# no metrics: a section `metrics` says where Prometheus reads them\n"),
        Some(Metrics::Tcp(place)) => {
            text.push_str("\tmetrics {\n");
            line(text, 2, "address", &place.ip().to_string(), false);
            line(text, 2, "port", &place.port().to_string(), written.get(METRICS, "port").is_none());
            text.push_str("\t}\n");
        }
        Some(Metrics::Unix(path)) => {
            text.push_str("\tmetrics {\n");
            line(text, 2, "path", &path.to_string_lossy(), false);
            text.push_str("\t}\n");
        }
    }
    text.push_str("}\n");
}

/// A path as a file can express it. No file can express some paths (such working directories
/// exist): those are shown as written.
fn shown(path: &Path, key: &str, written: &Document) -> String {
    let path = path.to_str().filter(|path| !path.contains(['"', '\n']));
    path.or_else(|| written.get(&[], key)).unwrap_or_default().to_owned()
}

fn multicast(text: &mut String, multicast: &Multicast, groups_have_keys: bool, written: &Document) {
    for (key, value) in [
        ("interface", multicast.interface.as_deref().unwrap_or("none")),
        ("family", if multicast.group.is_ipv4() { "ipv4" } else { "ipv6" }),
        ("address", &multicast.group.to_string()),
        ("port", &multicast.port.to_string()),
        ("key_file", &shown(&multicast.key_file, "key_file", written)),
        ("hash", multicast.hash.name()),
        ("auth", multicast.auth.name()),
        ("attach", multicast.attach.name()),
        ("strict_source", if multicast.strict_source { "yes" } else { "no" }),
        ("alone", multicast.alone.into()),
    ] {
        if key == "attach" && groups_have_keys {
            text.push_str(
                "\t\t# the kernel program does not know the groups' own keys: requests come through the socket\n",
            );
            line(text, 2, key, value, false);
        } else {
            line(text, 2, key, value, written.get(&[], key).is_none());
        }
        if let ("key_file", Some(path)) = (key, &multicast.key_file2) {
            line(text, 2, "key_file2", &shown(path, "key_file2", written), false);
        }
    }
}

fn tcp(text: &mut String, tcp: &Tcp, written: &Document) {
    let family = match &tcp.address {
        TcpAddress::Ip(ip) => Some(if ip.is_ipv4() { "ipv4" } else { "ipv6" }),
        TcpAddress::Name { is_v4, .. } => is_v4.map(|v4| if v4 { "ipv4" } else { "ipv6" }),
        TcpAddress::Systemd => None,
    };
    let (interface, address, port) = (tcp.interface.as_deref(), tcp.address.to_string(), tcp.port.to_string());
    let place: &[(&str, Option<&str>)] = match &tcp.address {
        TcpAddress::Systemd => &[("socket", Some("systemd"))],
        TcpAddress::Ip(_) | TcpAddress::Name { .. } => &[
            ("interface", Some(interface.unwrap_or("none"))),
            ("family", family),
            ("address", Some(&address)),
            ("port", Some(&port)),
        ],
    };
    for (key, value) in place {
        if let Some(value) = value {
            line(text, 2, key, value, written.get(&[], key).is_none());
        }
    }
    with_key(text, &tcp.keys, tcp.hash, written);
}

fn vsock(text: &mut String, vsock: &Vsock, written: &Document) {
    if vsock.by_systemd {
        line(text, 2, "socket", "systemd", false);
    } else {
        line(text, 2, "port", &vsock.port.to_string(), written.get(&[], "port").is_none());
    }
    with_key(text, &vsock.keys, vsock.hash, written);
}

/// What all listeners have that clients connect to.
fn with_key(text: &mut String, keys: &KeyFiles, hash: HashKind, written: &Document) {
    for (key, value) in [
        ("key_file", shown(&keys.first, "key_file", written).as_str()),
        ("hash", hash.name()),
        ("auth", CONNECTED_AUTH.name()),
    ] {
        line(text, 2, key, value, written.get(&[], key).is_none());
        second_key(text, key, keys, written);
    }
}

/// The second key's line, right behind that of `key_file`.
fn second_key(text: &mut String, behind: &str, keys: &KeyFiles, written: &Document) {
    if let ("key_file", Some(path)) = (behind, &keys.second) {
        line(text, 2, "key_file2", &shown(path, "key_file2", written), written.get(&[], "key_file2").is_none());
    }
}

fn serial(text: &mut String, serial: &Serial, written: &Document) {
    line(text, 2, "path", &serial.path.to_string_lossy(), false);
    line(text, 2, "mode", serial.mode.into(), written.get(&[], "mode").is_none());
    if let Some(uri) = &serial.uri {
        line(text, 2, "uri", uri, false);
    }
    if serial.everyone {
        line(text, 2, "permit", "everyone", false);
    }
}

fn groups(text: &mut String, config: &Config) {
    let Groups::Only(groups) = &config.groups else {
        text.push_str("\n# no groups: each client that has the key may fence every domain\n");
        return;
    };
    text.push_str(
        "\n# groups guard against mistakes; against another holder of the key only a `key_file` of their own does\n",
    );
    text.push_str("groups {\n");
    for group in groups {
        text.push_str("\tgroup {\n");
        if let Some(name) = &group.name {
            line(text, 2, "name", name, false);
        }
        let mut called: Vec<_> =
            group.listeners.iter().filter_map(|number| config.listeners.get(*number)).map(Listener::called).collect();
        called.dedup();
        for name in called {
            line(text, 2, "listener", name, false);
        }
        if let Some(keys) = &group.keys {
            for (key, path) in [("key_file", Some(&keys.first)), ("key_file2", keys.second.as_ref())] {
                if let Some(path) = path {
                    line(text, 2, key, &path.to_string_lossy(), false);
                }
            }
        }
        for ip in &group.ips {
            line(text, 2, "ip", &ip.to_string(), false);
        }
        for cid in &group.cids {
            line(text, 2, "ip", &cid.to_string(), false);
        }
        for from in &group.from {
            line(text, 2, "from", from, false);
        }
        for uuid in &group.uuids {
            line(text, 2, "uuid", uuid, false);
        }
        text.push_str("\t}\n");
    }
    text.push_str("}\n");
}

/// The comments about usable keys.
#[must_use]
pub fn key_note(keys: &FoundAll) -> String {
    let note = |path: &Path, found: &Found| {
        let len = counted(found.key.dangerous_bytes().len(), "byte");
        format!("# the key file {} has a key of {len}\n", path.display())
    };
    let mut text = String::from("\n");
    for pair in keys.pairs() {
        text.push_str(&note(&pair.files.first, &pair.first));
        match (&pair.files.second, &pair.second) {
            (Some(path), Some(second)) => text.push_str(&note(path, second)),
            (Some(path), None) => {
                let _ = writeln!(text, "# there is no second key now: {} does not exist", path.display());
            }
            (None, _) => {}
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Doubt, Source, Warnings, parse};

    fn parsed(text: &str) -> (Config, Warnings) {
        parse(&Source::new(Path::new("f"), text.as_bytes()), Warnings::default())
            .unwrap_or_else(|error| panic!("{}\n{text}", error.render(false)))
    }

    const MINIMAL: &str = "fence_virtd { listener = \"multicast\"; backend = \"libvirt\"; }";
    const FULL: &str = "FENCE_VIRTD { listener = \"multicast\"; backend = \"libvirt\"; module_path = \"/m\"; debug = \"5\"; \
        wait_for_backend = \"1\"; foreground = \"1\"; name_mode = \"uuid\"; \
        lock_memory = \"no\"; priority = \"realtime\"; oom_protect = \"no\"; state_directory = \"/s\"; history_directory = \"/h\"; \
        RATE_LIMIT { failure_rate = \"1\"; failure_burst = \"2\"; stranger_rate = \"0\"; request_rate = \"4\"; request_burst = \"5\"; \
        replay_window = \"90m\"; } metrics { address = \"::1\"; port = \"9\"; } }\n\
        listeners { tcp { port = \"9\"; } multicast { Interface = \"virbr1\"; port = \"7\"; family = \"ipv6\"; address = \"ff02::5\"; \
        key_file = \"/k # y\"; key_file2 = \"/k2\"; hash = \"sha1\"; auth = \"none\"; attach = \"off\"; strict_source = \"no\"; alone = \"yes\"; zork = \"1\"; } }\n\
        backends { libvirt { uri2 = \"c:\"; uri1 = \"b:\"; kill = \"libvirt\"; reboot_method = \"reset\"; \
        reboot_pause = \"0.25\"; reboot_reply = \"on\"; } }\n\
        groups { group = \"a\" { ip = \"192.168.122.11\"; ip = \"fd00::1\"; uuid = \"node1\"; } group { ip = \"1.2.3.4\"; uuid = \"x y\"; } }";

    const KEYED: &str = "fence_virtd { listener = \"multicast\"; backend = \"libvirt\"; }\n\
        listeners { multicast { attach = \"native\"; } }\n\
        groups { group { key_file = \"/k3\"; key_file2 = \"/k4\"; ip = \"1.2.3.4\"; uuid = \"x\"; } }";

    const CPG: &str = "fence_virtd { listener = \"multicast\"; backend = \"CPG\"; metrics { path = \"/m.sock\"; } }\n\
        backends { libvirt { uri = \"a:\"; kill = \"libvirt\"; } CPG { uri = \"b:\"; reboot_pause = \"2\"; name_mode = \"uuid\"; } }";

    #[test]
    fn the_cluster_backend_is_shown_with_its_own_section() {
        let text = render(&parsed(CPG).0, CPG.as_bytes());
        for line in [
            "backend = \"cpg\";",
            "cpg {",
            "uri = \"b:\";",
            "kill = \"direct\";  # default",
            "reboot_pause = \"2\";",
            "unfenced_hosts = \"fail\";  # default",
            "name_mode = \"uuid\";  # for fence_virtd only",
        ] {
            assert!(text.lines().any(|shown| shown.trim() == line), "no {line}: {text}");
        }
    }

    #[test]
    fn a_groups_own_keys_are_shown_and_what_they_cost() {
        let text = render(&parsed(KEYED).0, KEYED.as_bytes());
        for line in ["key_file = \"/k3\";", "key_file2 = \"/k4\";", "attach = \"off\";"] {
            assert!(text.lines().any(|shown| shown.trim() == line), "no {line}: {text}");
        }
        assert!(text.contains("# the kernel program does not know the groups' own keys"), "{text}");
    }

    #[test]
    fn the_output_is_a_file_that_means_the_same() {
        for file in [MINIMAL, FULL, KEYED, CPG, include_str!("../../../docs/reference/fence_virt.conf.example")] {
            let (config, _) = parsed(file);
            let text = render(&config, file.as_bytes());
            let (again, warnings) = parsed(&text);
            assert_eq!(again, config, "{text}");
            let about_the_output: Vec<_> = warnings.iter().map(|warning| warning.doubt().clone()).collect();
            assert!(about_the_output.iter().all(|doubt| matches!(doubt, Doubt::NoDigest(_))), "{about_the_output:?}");
        }
    }

    #[test]
    fn every_key_is_there_and_defaults_say_so() {
        let keys = [
            "interface",
            "family",
            "address",
            "port",
            "key_file",
            "hash",
            "auth",
            "attach",
            "strict_source",
            "alone",
            "uri",
            "debug",
            "foreground",
            "wait_for_init",
            "lock_memory",
            "priority",
            "oom_protect",
            "state_directory",
            "history_directory",
            "failure_rate",
            "failure_burst",
            "stranger_rate",
            "request_rate",
            "request_burst",
            "replay_window",
            "kill",
            "reboot_method",
            "reboot_pause",
            "reboot_reply",
        ];
        let (config, _) = parsed(MINIMAL);
        let text = render(&config, MINIMAL.as_bytes());
        for key in keys {
            let line = text
                .lines()
                .find(|line| line.trim().starts_with(&format!("{key} = ")))
                .unwrap_or_else(|| panic!("no {key}: {text}"));
            assert!(line.ends_with("# default"), "{line}");
        }
        assert!(!text.lines().any(|line| line.contains("listener = ") && line.contains("default")));
        let (config, _) = parsed(FULL);
        let text = render(&config, FULL.as_bytes());
        assert!(!text.contains("# default"), "{text}");
        assert!(!text.contains("zork") && !text.contains("tcp"), "{text}");
    }
}
