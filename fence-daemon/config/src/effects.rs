//! For each key of docs/reference/configuration.md, and each value that it lists, the test that looks at what it *does* in a daemon that
//! runs. A key that is read and has no effect is worse than none, so a new key brings such a test.

use std::collections::BTreeSet;
use std::path::Path;

use super::reference::{SECTIONS, documented, known, values_of};

/// A key, values of it (none: the key has no list of values), where the test is, and what it is called.
type Effect = (&'static str, &'static [&'static str], &'static str, &'static str);

const SWITCH: &[&str] = &["yes", "no"];
const DIGESTS: &[&str] = &["sha256", "sha512", "sha1", "none"];

const EFFECTS: &[Effect] = &[
    // fence_virtd
    ("listener", &["multicast"], "netns/operations.rs", "every_operation_is_answered_as_stock_answers_it"),
    ("backend", &["libvirt"], "netns/operations.rs", "every_operation_is_answered_as_stock_answers_it"),
    ("foreground", &[], "netns/settings.rs", "foreground_keeps_it_in_the_foreground"),
    ("wait_for_init", &[], "netns/settings.rs", "wait_for_init_and_its_old_name_wait_for_a_hypervisor"),
    ("wait_for_backend", &[], "netns/settings.rs", "wait_for_init_and_its_old_name_wait_for_a_hypervisor"),
    ("debug", &[], "netns/settings.rs", "debug_logs_more"),
    ("module_path", &[], "netns/settings.rs", "what_only_stock_reads_changes_nothing_and_is_no_doubt"),
    ("name_mode", &[], "netns/settings.rs", "what_only_stock_reads_changes_nothing_and_is_no_doubt"),
    ("lock_memory", SWITCH, "netns/effects.rs", "lock_memory_locks_memory_or_does_not"),
    (
        "priority",
        &["high", "realtime", "normal"],
        "netns/effects.rs",
        "each_value_of_priority_is_what_the_threads_have",
    ),
    ("oom_protect", SWITCH, "netns/effects.rs", "oom_protect_protects_or_does_not"),
    ("state_directory", &[], "cluster/guides/installation.rs", "installation_on_the_hypervisor"),
    // rate_limit
    ("failure_rate", &["0"], "netns/settings.rs", "each_rate_limit_is_the_configured_one"),
    ("failure_burst", &["1"], "netns/settings.rs", "each_rate_limit_is_the_configured_one"),
    ("stranger_rate", &["0"], "netns/settings.rs", "each_rate_limit_is_the_configured_one"),
    ("request_rate", &["0"], "netns/settings.rs", "each_rate_limit_is_the_configured_one"),
    ("request_burst", &["1"], "netns/settings.rs", "each_rate_limit_is_the_configured_one"),
    (
        "replay_window",
        &["90m", "24h", "7d"],
        "netns/settings.rs",
        "a_copy_is_refused_within_the_replay_window_and_not_after_it",
    ),
    // multicast
    ("key_file", &[], "netns/startup.rs", "without_a_usable_key_it_does_not_start"),
    ("key_file2", &[], "netns/rotation.rs", "nobody_is_lost_while_keys_rotate_in_the_kernel"),
    (
        "interface",
        &["none"],
        "netns/interfaces/beginning.rs",
        "without_a_configured_interface_all_that_come_are_listened_on",
    ),
    ("family", &["ipv4", "ipv6"], "netns/operations.rs", "every_hash_and_family_is_served"),
    ("address", &[], "netns/interfaces.rs", "a_group_of_the_link_is_followed_by_a_socket_of_its_own"),
    ("port", &[], "netns/interfaces/company.rs", "where_another_program_leaves_ours_takes_over"),
    ("hash", DIGESTS, "netns/operations.rs", "every_hash_and_family_is_served"),
    ("auth", DIGESTS, "netns/operations.rs", "every_hash_and_family_is_served"),
    (
        "attach",
        &["auto", "native", "generic", "tcx", "off"],
        "netns/settings.rs",
        "each_value_of_attach_is_how_the_program_is_attached",
    ),
    ("strict_source", &["no"], "netns/bad_requests.rs", "a_guest_behind_nat_is_served_where_the_source_need_not_match"),
    ("strict_source", &["yes"], "netns/bad_requests.rs", "each_is_counted_once_and_comes_to_nothing"),
    // libvirt
    (
        "uri",
        &["qemu:///system", "lxc:///", "qemu+ssh://root@host/system"],
        "cluster/service.rs",
        "each_form_of_uri_connects_under_the_unit",
    ),
    ("kill", &["direct"], "libvirt/records.rs", "the_short_way_leaves_the_records_that_are_documented"),
    ("kill", &["libvirt"], "libvirt/records.rs", "libvirts_way_leaves_its_own_records"),
    ("reboot_method", &["cycle"], "libvirt/reboot.rs", "what_is_rebooted_is_dead_first_and_comes_back"),
    ("reboot_method", &["reset"], "libvirt/reboot.rs", "a_reset_is_told_when_it_was_done_and_spares_the_process"),
    ("reboot_pause", &["0"], "libvirt/reboot.rs", "what_is_rebooted_is_dead_first_and_comes_back"),
    ("reboot_pause", &["2.5"], "libvirt/reboot.rs", "a_pause_is_kept_also_by_the_next_daemon"),
    ("reboot_reply", &["off"], "libvirt/reboot.rs", "what_is_rebooted_is_dead_first_and_comes_back"),
    ("reboot_reply", &["on"], "libvirt/reboot.rs", "who_waits_for_the_start_is_told_when_it_runs"),
    // group, whose `key_file` and `key_file2` are others than the listener's
    ("key_file", &[], "netns/group_keys.rs", "a_groups_own_key_counts_in_it_and_no_other_does"),
    ("key_file2", &[], "netns/group_keys.rs", "a_groups_own_key_counts_in_it_and_no_other_does"),
    ("name", &[], "../../fence-daemon/tests/commands/check.rs", "entries_of_groups_that_no_domain_has_are_named"),
    ("ip", &[], "netns/refusals.rs", "each_refusal_is_logged_with_its_reason"),
    ("uuid", &[], "netns/refusals.rs", "each_refusal_is_logged_with_its_reason"),
];

#[test]
fn each_key_and_each_value_has_a_test_that_looks_at_its_effect() {
    for (heading, scope, _) in SECTIONS {
        for key in known(scope) {
            let of_key = || EFFECTS.iter().filter(|(name, ..)| *name == key);
            assert!(of_key().next().is_some(), "{heading} {key}: no test looks at its effect");
            let tested: BTreeSet<&str> = of_key().flat_map(|(_, values, ..)| values.iter().copied()).collect();
            // Other spellings of yes and no are the same to all that comes after reading.
            let same = |value: &&str| ["1", "0", "on", "off", "true", "false"].contains(value);
            let is_switch = tested.contains("yes") && tested.contains("no");
            let text = documented(heading)[key];
            let listed: BTreeSet<&str> =
                values_of(heading, text).into_iter().filter(|value| !(is_switch && same(value))).collect();
            let missing: Vec<_> = listed.difference(&tested).collect();
            assert!(missing.is_empty(), "{heading} {key}: no test looks at the effect of {missing:?}");
        }
    }
}

#[test]
fn each_of_these_tests_is_there_and_each_key_too() {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/tests");
    let keys: BTreeSet<&str> = SECTIONS.iter().flat_map(|(_, scope, _)| known(scope)).collect();
    for (key, _, file, test) in EFFECTS {
        assert!(keys.contains(key), "{key} is no key");
        let text = std::fs::read_to_string(tests.join(file)).unwrap_or_else(|error| panic!("{key}: {file}: {error}"));
        assert!(text.contains(&format!("#[test]\nfn {test}(")), "{key}: there is no test {test} in {file}");
        assert!(!text.contains(&format!("#[ignore]\nfn {test}(")), "{key}: {test} is not run");
    }
}
