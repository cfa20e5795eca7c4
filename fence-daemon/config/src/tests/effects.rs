//! Tests that each key and value of docs/reference/configuration.md has a test of its effect in a
//! running daemon. A key without effect is worse than no key, so a new key or value needs such a
//! test.

use std::collections::BTreeSet;
use std::path::Path;

use fence_common::hash::HashKind;

use super::reference::{SECTIONS, default_of, documented, known, values_of};

/// How a value gets into its test's configuration.
#[derive(Clone, Copy)]
enum Given {
    /// The test's text has the value in quotes.
    Written,
    /// The test leaves the key out, so that the documented default applies.
    Default,
    /// The test's text has this expression, which stands for the value or the key.
    As(&'static str),
}
use Given::{As, Default, Written};

/// A key, its values (none if its entry lists none), how the test sets them, the test's file and
/// name.
type Effect = (&'static str, &'static [&'static str], Given, &'static str, &'static str);

const SWITCH: &[&str] = &["yes", "no"];
const DIGESTS: &[&str] = &["sha256", "sha512", "sha1", "none"];
/// Every configuration of the lab names its listener and its backend.
const LAB: Given = As("Config::new(");

const OPERATIONS: &str = "netns/operations.rs";
const SETTINGS: &str = "netns/settings.rs";
const EFFECTS_OF_PROCESS: &str = "netns/effects.rs";
const REMOTE_URIS: &str = "cluster/remote_uris.rs";
const EACH_URI: &str = "each_form_of_uri_connects_under_the_unit";
const ALONE: &str = "netns/alone.rs";
const BAD_REQUESTS: &str = "netns/bad_requests.rs";
const TCP: &str = "netns/tcp.rs";
const LISTENERS: &str = "netns/listeners.rs";
const HISTORY: &str = "netns/history.rs";
const METRICS: &str = "netns/metrics.rs";
const PROMETHEUS: &str = "a_real_prometheus_answers_the_dashboards_queries_and_takes_the_rules";
const SERIAL: &str = "netns/serial.rs";
const LINE_KEYS: &str = "each_key_of_the_serial_listener_has_its_effect";
const VSOCK_GUEST: &str = "kernels/vsock.rs";
const OVER_VSOCK: &str = "every_operation_over_vsock_is_answered_as_stock_answers_it";
const ALONE_IN_A_CLUSTER: &str = "netns/cpg.rs";
const WITHOUT_COROSYNC: &str = "without_corosync_only_what_ran_here_and_died_is_off";
const RECORDS: &str = "libvirt/records.rs";
const REBOOT: &str = "libvirt/reboot.rs";

const ANSWERS: &str = "every_operation_is_answered_as_stock_answers_it";
const WAITS: &str = "wait_for_init_and_its_old_name_wait_for_a_hypervisor";
const STOCKS: &str = "keys_that_only_fence_virtd_reads_cause_no_warning";
const PRIORITY: &str = "priority_sets_the_threads_scheduling";
const BOUNDS: &str = "the_program_gets_the_configured_rate_limits";
const WINDOW: &str = "a_copy_is_refused_within_the_replay_window_and_not_after_it";
const SERVED: &str = "every_hash_and_family_is_served";
const ATTACH: &str = "attach_decides_how_the_program_is_attached";
const REBOOTED: &str = "a_rebooted_domain_dies_first_and_comes_back";
const GROUP_KEYS: &str = "a_groups_own_key_counts_in_it_and_no_other_does";
const NOBODY: &str = "a_group_of_a_domain_alone_denies_clients_that_are_known_by_their_address";
const REFUSALS: &str = "each_refusal_is_logged_with_its_reason";

const EFFECTS: &[Effect] = &[
    // fence_virtd
    ("listener", &["multicast"], LAB, OPERATIONS, ANSWERS),
    ("listener", &["multicast,tcp"], As("bench.with_tcp("), TCP, "each_key_of_the_listener_has_its_effect"),
    ("listener", &["tcp"], Written, LISTENERS, "tcp_serves_without_multicast_and_its_interface"),
    ("listener", &["multicast,serial"], As("lines(&bench"), SERIAL, LINE_KEYS),
    ("listener", &["vsock"], As("step(\"ours-all\""), VSOCK_GUEST, OVER_VSOCK),
    ("backend", &["libvirt"], LAB, OPERATIONS, ANSWERS),
    ("backend", &["cpg"], Written, ALONE_IN_A_CLUSTER, WITHOUT_COROSYNC),
    ("foreground", &[], Written, SETTINGS, "foreground_keeps_it_in_the_foreground"),
    ("wait_for_init", &[], Written, SETTINGS, WAITS),
    ("wait_for_backend", &[], Written, SETTINGS, WAITS),
    ("debug", &[], Written, SETTINGS, "debug_logs_more"),
    ("module_path", &[], Written, SETTINGS, STOCKS),
    ("name_mode", &[], Written, SETTINGS, STOCKS),
    ("lock_memory", SWITCH, Written, EFFECTS_OF_PROCESS, "lock_memory_locks_memory_or_does_not"),
    ("priority", &["high", "realtime", "normal"], Written, EFFECTS_OF_PROCESS, PRIORITY),
    ("oom_protect", SWITCH, Written, EFFECTS_OF_PROCESS, "oom_protect_protects_or_does_not"),
    ("state_directory", &[], Written, "cluster/guides/installation.rs", "installation_on_the_hypervisor"),
    ("history_directory", &[], Written, HISTORY, "what_came_of_each_request_outlives_the_daemon"),
    // rate_limit
    ("failure_rate", &["0"], Written, SETTINGS, BOUNDS),
    ("failure_burst", &["1"], Written, SETTINGS, BOUNDS),
    ("stranger_rate", &["0"], Written, SETTINGS, BOUNDS),
    ("request_rate", &["0"], Written, SETTINGS, BOUNDS),
    ("request_burst", &["1"], Written, SETTINGS, BOUNDS),
    ("replay_window", &["1m"], Written, SETTINGS, WINDOW),
    ("replay_window", &["24h"], Default, "netns/rate_limit.rs", "a_recorded_off_does_nothing_after_a_crash_either"),
    // metrics; `address`, `port` and `path` are others' keys, too
    ("address", &[], Written, METRICS, PROMETHEUS),
    ("port", &[], Written, METRICS, PROMETHEUS),
    ("path", &[], Written, METRICS, "the_page_is_right_in_both_formats_by_prometheus_own_check"),
    // multicast
    ("key_file", &[], As("&Config::new(&missing)"), "netns/startup.rs", "without_a_usable_key_it_does_not_start"),
    (
        "key_file2",
        &[],
        As("rotate(\"auto\")"),
        "cluster/pages/rotation.rs",
        "no_request_is_lost_while_keys_rotate_in_the_kernel",
    ),
    (
        "interface",
        &["none"],
        Written,
        "netns/interfaces/beginning.rs",
        "without_a_configured_interface_each_new_one_is_joined",
    ),
    ("family", &["ipv4"], As("Family::V4"), OPERATIONS, SERVED),
    ("family", &["ipv6"], As("Family::V6"), OPERATIONS, SERVED),
    ("address", &[], Written, "netns/interfaces.rs", "a_group_of_the_link_is_followed_by_a_socket_of_its_own"),
    ("port", &[], As("port: Some("), SETTINGS, "requests_are_heard_at_the_configured_port"),
    ("hash", DIGESTS, As("hash: kind"), OPERATIONS, SERVED),
    ("auth", DIGESTS, As("auth: kind"), OPERATIONS, SERVED),
    ("attach", &["auto", "native", "generic", "tcx", "off"], Written, SETTINGS, ATTACH),
    ("strict_source", &["no"], Written, BAD_REQUESTS, "a_guest_behind_nat_is_served_where_the_source_need_not_match"),
    ("strict_source", &["yes"], Default, BAD_REQUESTS, "each_bad_request_is_counted_once_and_has_no_effect"),
    ("alone", &["auto"], Default, ALONE, "a_domain_that_is_off_is_deferred_while_the_bridge_leads_out"),
    ("alone", &["yes", "no"], Written, ALONE, "the_configuration_overrules_where_the_bridge_leads"),
    // tcp and vsock
    ("socket", &["systemd"], Written, "cluster/service.rs", "systemd_keeps_the_port_open_over_a_restart"),
    // serial
    ("path", &[], Written, SERIAL, LINE_KEYS),
    ("mode", &["serial", "vmchannel"], Written, SERIAL, LINE_KEYS),
    ("uri", &[], Written, SERIAL, LINE_KEYS),
    ("permit", &["everyone"], Written, SERIAL, LINE_KEYS),
    ("key_file", &[], Written, SERIAL, LINE_KEYS),
    // libvirt
    ("uri", &["qemu:///system", "lxc:///"], Written, REMOTE_URIS, EACH_URI),
    ("uri", &["qemu+ssh://root@host/system"], As("BY_SSH,"), REMOTE_URIS, EACH_URI),
    ("kill", &["direct"], Default, RECORDS, "the_short_way_leaves_the_records_that_are_documented"),
    ("kill", &["libvirt"], Written, RECORDS, "libvirts_way_leaves_its_own_records"),
    ("reboot_method", &["cycle"], Default, REBOOT, REBOOTED),
    ("reboot_method", &["reset"], Written, REBOOT, "a_reset_is_told_when_it_was_done_and_spares_the_process"),
    ("reboot_pause", &["0"], Default, REBOOT, REBOOTED),
    ("reboot_pause", &["6.5"], Written, REBOOT, "a_pause_is_kept_also_by_the_next_daemon"),
    ("reboot_reply", &["off"], Default, REBOOT, REBOOTED),
    ("reboot_reply", &["on"], Written, REBOOT, "reboot_reply_on_answers_when_the_domain_runs"),
    // cpg; the rest as of libvirt
    ("unfenced_hosts", &["fail"], Written, ALONE_IN_A_CLUSTER, WITHOUT_COROSYNC),
    // group; its `key_file` and `key_file2` are not the listener's
    ("key_file", &[], Written, "netns/group_keys.rs", GROUP_KEYS),
    ("key_file2", &[], Written, "netns/group_keys.rs", GROUP_KEYS),
    ("listener", &[], Written, LISTENERS, "a_group_keeps_two_clusters_of_one_daemon_apart"),
    (
        "name",
        &[],
        As("group = \\\"web\\\""),
        "../../fence-daemon/tests/commands/check.rs",
        "entries_of_groups_that_no_domain_has_are_named",
    ),
    ("ip", &[], As("grouped(&bench)"), "netns/refusals.rs", REFUSALS),
    ("from", &[], Written, "netns/refusals.rs", NOBODY),
    ("uuid", &[], As("grouped(&bench)"), "netns/refusals.rs", REFUSALS),
];

#[test]
fn each_configuration_value_has_a_test_of_its_effect() {
    for (heading, scope, _) in SECTIONS {
        for key in known(scope) {
            let of_key = || EFFECTS.iter().filter(|(name, ..)| *name == key);
            assert!(of_key().next().is_some(), "{heading} {key}: no test looks at its effect");
            let tested: BTreeSet<&str> = of_key().flat_map(|(_, values, ..)| values.iter().copied()).collect();
            // Other spellings of yes and no are parsed to the same value.
            let same = |value: &&str| ["1", "0", "on", "off", "true", "false"].contains(value);
            let is_switch = tested.contains("yes") && tested.contains("no");
            let text = documented(heading)[key];
            let listed: BTreeSet<&str> =
                values_of(heading, text).into_iter().filter(|value| !(is_switch && same(value))).collect();
            let missing: Vec<_> = listed.difference(&tested).collect();
            assert!(missing.is_empty(), "{heading} {key}: no test looks at the effect of {missing:?}");
            for (_, values, given, ..) in of_key() {
                let default = default_of(text);
                let is_right = !matches!(given, Default) || *values == default.as_slice();
                assert!(is_right, "{heading} {key}: {values:?} is not the default {default:?}");
            }
        }
    }
}

/// The text of a test from its name to its end. `None` if it is no test, or is ignored.
fn text_of<'t>(file: &'t str, test: &str) -> Option<&'t str> {
    let rest = file.split_once(&format!("#[test]\nfn {test}("))?.1;
    Some(rest.split_once("\n}\n").map_or(rest, |(text, _)| text))
}

/// Whether a test's text sets `key` to this value, or without a value, sets it at all.
fn gives(text: &str, key: &str, value: Option<&str>) -> bool {
    // Quotes inside a Rust string are escaped.
    let in_a_file = format!("{key} = \\\"");
    match value {
        None => text.contains(&in_a_file) || text.contains(&format!("\"{key}\"")),
        Some(value) if text.contains(&in_a_file) => text.contains(&format!("{in_a_file}{value}\\\"")),
        Some(value) => text.contains(&format!("\"{value}\"")),
    }
}

#[test]
fn each_of_these_tests_gives_its_key_the_value() {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/tests");
    let keys: BTreeSet<&str> = SECTIONS.iter().flat_map(|(_, scope, _)| known(scope)).collect();
    for (key, values, given, file, test) in EFFECTS {
        assert!(keys.contains(key), "{key} is no key");
        let text = std::fs::read_to_string(tests.join(file)).unwrap_or_else(|error| panic!("{key}: {file}: {error}"));
        let text = text_of(&text, test).unwrap_or_else(|| panic!("{key}: no test {test} that is run in {file}"));
        match given {
            Written if values.is_empty() => assert!(gives(text, key, None), "{key} is not given in {test}"),
            Written => {
                for value in *values {
                    assert!(gives(text, key, Some(value)), "{key} is not \"{value}\" anywhere in {test}");
                }
            }
            Default => assert!(!gives(text, key, None), "{key} is given in {test}, and not its default"),
            As(expression) => assert!(text.contains(expression), "{key}: no {expression} in {test}"),
        }
    }
    // The test loops over all digests.
    assert!(DIGESTS.len() == HashKind::ALL.len() && HashKind::ALL.iter().all(|kind| DIGESTS.contains(&kind.name())));
}

#[test]
fn a_value_that_no_test_gives_is_seen() {
    let text = "(\"kill\", \"libvirt\") rate_limit {{ failure_rate = \\\"1\\\"; }}";
    assert!(gives(text, "kill", Some("libvirt")) && gives(text, "kill", None));
    assert!(!gives(text, "kill", Some("direct")) && !gives(text, "attach", None));
    assert!(gives(text, "failure_rate", Some("1")) && !gives(text, "failure_rate", Some("0")));
    assert_eq!(text_of("#[test]\nfn a() {\n    b\n}\nfn c() {}\n", "a"), Some(") {\n    b"));
    assert_eq!(text_of("#[test]\n#[ignore]\nfn a() {\n}\n", "a"), None);
}
