//! Tests docs/reference/configuration.md: it has one entry for every key, in one form, and the code
//! agrees with its values and defaults.

use std::collections::BTreeMap;
use std::path::Path;

use crate::contents::Scope;
use crate::cpg::CPG;
use crate::groups::{GROUP, GROUPS};
use crate::listeners::LISTENERS;
use crate::metrics::METRICS;
use crate::multicast::MULTICAST;
use crate::rate_limit::RATE_LIMIT;
use crate::resolved::{BACKENDS, FILE, GLOBAL, LIBVIRT};
use crate::serial::SERIAL;
use crate::tcp::TCP;
use crate::vsock::VSOCK;
use crate::{Config, Doubt, Source, Warnings, parse};

const TEXT: &str = include_str!("../../../../docs/reference/configuration.md");

/// Each section with keys: its heading, its scope, and a file that has room for one of its keys.
pub(super) const SECTIONS: [(&str, &Scope<'_>, &str); 10] = [
    ("fence_virtd { }", &GLOBAL, "fence_virtd { listener = \"multicast\"; backend = \"libvirt\"; KEY }"),
    (
        "fence_virtd { rate_limit { } }",
        &RATE_LIMIT,
        "fence_virtd { listener = \"multicast\"; backend = \"libvirt\"; rate_limit { KEY } }",
    ),
    (
        "fence_virtd { metrics { } }",
        &METRICS,
        "fence_virtd { listener = \"multicast\"; backend = \"libvirt\"; metrics { address = \"::1\"; KEY } }",
    ),
    (
        "listeners { multicast { } }",
        &MULTICAST,
        "fence_virtd { listener = \"multicast\"; backend = \"libvirt\"; } listeners { multicast { KEY } }",
    ),
    (
        "listeners { tcp { } }",
        &TCP,
        "fence_virtd { listener = \"multicast,tcp\"; backend = \"libvirt\"; } listeners { tcp { KEY } }",
    ),
    (
        "listeners { vsock { } }",
        &VSOCK,
        "fence_virtd { listener = \"vsock\"; backend = \"libvirt\"; } listeners { vsock { KEY } }",
    ),
    (
        "listeners { serial { } }",
        &SERIAL,
        "fence_virtd { listener = \"multicast,serial\"; backend = \"libvirt\"; } \
         listeners { serial { path = \"/x\"; permit = \"everyone\"; KEY } }",
    ),
    (
        "backends { libvirt { } }",
        &LIBVIRT,
        "fence_virtd { listener = \"multicast\"; backend = \"libvirt\"; } backends { libvirt { KEY } }",
    ),
    (
        "backends { cpg { } }",
        &CPG,
        "fence_virtd { listener = \"multicast\"; backend = \"cpg\"; } backends { cpg { KEY } }",
    ),
    (
        "groups { group { } }",
        &GROUP,
        "fence_virtd { listener = \"multicast\"; backend = \"libvirt\"; } \
         groups { group { ip = \"10.0.0.1\"; uuid = \"a\"; KEY } }",
    ),
];

/// The part of the reference under a second-level heading.
fn part(heading: &str) -> &'static str {
    let from = TEXT.find(&format!("\n## {heading}\n")).unwrap_or_else(|| panic!("no heading {heading}"));
    let part = &TEXT[from + 4..];
    part.find("\n## ").map_or(part, |end| &part[..end])
}

/// The keys under a heading, each with its text.
pub(super) fn documented(heading: &str) -> BTreeMap<&'static str, &'static str> {
    let keys = part(&format!("`{heading}`")).split("\n#### ").skip(1);
    keys.map(|key| {
        let (name, text) = key.split_once('\n').unwrap();
        (name.trim_matches('`'), text)
    })
    .collect()
}

pub(super) fn known(scope: &Scope<'_>) -> Vec<&'static str> {
    let mut keys: Vec<_> = [scope.keys, scope.lists, scope.numbered].into_iter().flatten().copied().collect();
    keys.sort_unstable();
    keys
}

/// The words in back quotes between `word` and the end of its sentence or line.
fn quoted<'t>(text: &'t str, word: &str) -> Vec<&'t str> {
    let Some((_, rest)) = text.split_once(word) else { return Vec::new() };
    let sentence = rest.split(". ").next().unwrap_or(rest).lines().next().unwrap_or(rest);
    sentence.split('`').skip(1).step_by(2).collect()
}

/// The values that a key's entry lists. References to other keys ("as for `foreground`", "with
/// `family = ...`") do not count.
pub(super) fn values_of(heading: &str, text: &'static str) -> Vec<&'static str> {
    let values = quoted(text, "Values: ").into_iter();
    values.filter(|value| !value.contains(' ') && !documented(heading).contains_key(*value)).collect()
}

/// The defaults in a key's entry. A description ("that of ...") is no value.
pub(super) fn default_of(text: &str) -> Vec<&str> {
    let is_value = text.contains("Default: `");
    quoted(text, "Default: ").into_iter().take(usize::from(is_value)).collect()
}

fn read(file: &str) -> (Config, Warnings) {
    parse(&Source::new(Path::new("f"), file.as_bytes()), Warnings::default())
        .unwrap_or_else(|error| panic!("{file}: {}", error.render(false)))
}

#[test]
fn every_key_is_documented_and_every_documented_key_is_known() {
    for (heading, scope, _) in SECTIONS {
        let documented: Vec<_> = documented(heading).into_keys().collect();
        assert_eq!(documented, known(scope), "{heading}");
    }
    // No other part documents keys, and each section has an entry.
    assert_eq!(TEXT.matches("\n#### ").count(), SECTIONS.iter().map(|(_, scope, _)| known(scope).len()).sum::<usize>());
    for scope in [&FILE, &LISTENERS, &BACKENDS, &GROUPS] {
        assert!(known(scope).is_empty(), "a section of sections has keys: {:?}", known(scope));
        for name in scope.sections.iter().chain(scope.repeated) {
            assert!(SECTIONS.iter().any(|(heading, ..)| heading.contains(name)), "`{name}` is not documented");
        }
        for name in scope.unread {
            assert!(part("Sections that are not read").contains(&format!("`{name}`")), "`{name}` is not documented");
        }
    }
}

/// Each entry has one form: the meaning, then a list of values, default and fence_virtd's
/// behaviour.
#[test]
fn each_key_says_its_meaning_its_values_its_default_and_what_stock_does() {
    for (heading, _, _) in SECTIONS {
        for (key, text) in documented(heading) {
            let (meaning, rest) = text.trim_start().split_once("\n\n").unwrap_or_default();
            assert!(!meaning.starts_with("- ") && meaning.ends_with('.'), "{heading} {key}: no meaning");
            let list = rest.split("\n\n").next().unwrap_or_default();
            let mut items = list.lines().filter(|line| !line.starts_with("  "));
            for (number, starts) in
                [&["- Values: "] as &[_], &["- Default: ", "- No default"], &["- Stock: "]].into_iter().enumerate()
            {
                let item = items.next().unwrap_or_default();
                assert!(starts.iter().any(|start| item.starts_with(start)), "{heading} {key}, item {number}: {item}");
            }
            assert_eq!(items.next(), None, "{heading} {key}");
        }
    }
}

#[test]
fn values_are_accepted_and_defaults_are_what_is_so_anyway() {
    let mut tried = 0;
    for (heading, _, file) in SECTIONS {
        let without = read(&file.replace("KEY", "")).0;
        for (key, text) in documented(heading) {
            let with = |value: &str| read(&file.replace("KEY", &format!("{key} = \"{value}\";"))).0;
            if let Some(default) = default_of(text).first() {
                assert_eq!(with(default), without, "{key} = \"{default}\" is not the default");
                tried += 1;
            }
            for value in values_of(heading, text) {
                with(value);
                tried += 1;
            }
        }
    }
    assert!(tried > 25, "only {tried} values and defaults were found in the text");
}

/// fence_virtd ignores the keys marked as new, and knows the others.
#[test]
fn new_findings_are_marked() {
    let new: Vec<_> = SECTIONS
        .iter()
        .flat_map(|(heading, ..)| documented(heading))
        .filter(|(_, text)| text.contains("\n- Stock: ignores it (new here)."))
        .map(|(key, _)| key)
        .collect();
    let ours = [
        "history_directory",
        "lock_memory",
        "oom_protect",
        "priority",
        "state_directory",
        "failure_burst",
        "failure_rate",
        "replay_window",
        "request_burst",
        "request_rate",
        "stranger_rate",
        "address",
        "path",
        "port",
        "alone",
        "attach",
        "key_file2",
        "strict_source",
        "key_file2",
        "socket",
        "key_file2",
        "socket",
        "kill",
        "reboot_method",
        "reboot_pause",
        "reboot_reply",
        "kill",
        "reboot_method",
        "reboot_pause",
        "reboot_reply",
        "unfenced_hosts",
        "from",
        "key_file",
        "key_file2",
        "listener",
    ];
    assert_eq!(new, ours);
}

/// Every word with one letter missing, doubled, wrong or swapped with the next: likely typing
/// errors.
fn misspellings(word: &str) -> Vec<String> {
    let letters: Vec<char> = word.chars().collect();
    let mut found = Vec::new();
    for at in 0..letters.len() {
        let mut missing = letters.clone();
        missing.remove(at);
        let mut doubled = letters.clone();
        doubled.insert(at, letters[at]);
        let mut wrong = letters.clone();
        wrong[at] = 'q';
        let mut exchanged = letters.clone();
        if at + 1 < letters.len() {
            exchanged.swap(at, at + 1);
        }
        found.extend([missing, doubled, wrong, exchanged].map(String::from_iter));
    }
    found.retain(|misspelled| misspelled != word && !misspelled.is_empty());
    found
}

#[test]
fn a_misspelled_key_is_reported_with_the_likely_one() {
    for (heading, scope, file) in SECTIONS {
        for key in known(scope) {
            let twice = |once: String| misspellings(&once).into_iter().take(3).chain([once]).collect::<Vec<_>>();
            // A short word with two wrong letters is hardly recognisable.
            let all: Vec<String> =
                if key.len() < 6 { misspellings(key) } else { misspellings(key).into_iter().flat_map(twice).collect() };
            for misspelled in all {
                // Another key's name is no misspelling.
                let is_key = known(scope).iter().any(|key| key.eq_ignore_ascii_case(&misspelled));
                if is_key
                    || misspelled == key
                    || ["ip", "from", "uuid", "group", "groups"].contains(&misspelled.as_str())
                {
                    continue;
                }
                let with = file.replace("KEY", &format!("{misspelled} = \"1\";"));
                if heading.starts_with("groups") && (key.starts_with("key_file") || key == "listener") {
                    // Without them a group is open to more clients than its author meant.
                    let error = parse(&Source::new(Path::new("f"), with.as_bytes()), Warnings::default()).unwrap_err();
                    assert!(error.to_string().contains(&misspelled), "{error}");
                    continue;
                }
                let (config, warnings) = read(&with);
                assert_eq!(config, read(&file.replace("KEY", "")).0, "{misspelled}");
                let doubts = warnings.iter().map(|warning| warning.doubt().clone());
                let doubts: Vec<_> = doubts.filter(|doubt| *doubt != Doubt::OnlyThisHost).collect();
                let [Doubt::UnknownKey { meant: Some(meant), .. }] = doubts.as_slice() else {
                    panic!("{heading}: {misspelled} for {key}: {doubts:?}");
                };
                // Of two equally near keys either may be suggested.
                let (distance, expected) =
                    [*meant, key].map(|word| strsim::damerau_levenshtein(&misspelled, word)).into();
                assert!(distance <= expected, "{heading}: {misspelled} for {key}: did you mean {meant}?");
            }
        }
    }
}

#[test]
fn a_misspelled_section_is_reported_with_the_likely_one() {
    let file = "fence_virtd { listener = \"multicast\"; backend = \"libvirt\"; }";
    for (scope, around) in [(&FILE, "KEY"), (&LISTENERS, "listeners { KEY }"), (&BACKENDS, "backends { KEY }")] {
        for section in scope.sections {
            for misspelled in misspellings(section) {
                let file = format!("{file} {}", around.replace("KEY", &format!("{misspelled} {{ }}")));
                match parse(&Source::new(Path::new("f"), file.as_bytes()), Warnings::default()) {
                    Ok((_, warnings)) => {
                        let doubts: Vec<_> = warnings.iter().map(|warning| warning.doubt().clone()).collect();
                        let [Doubt::UnknownSection { meant, .. }] = doubts.as_slice() else {
                            panic!("{misspelled}: {doubts:?}");
                        };
                        assert_eq!(*meant, Some(*section), "{misspelled}");
                    }
                    // Only a restriction's misspelling stops the daemon from starting.
                    Err(error) => assert_eq!(*section, "groups", "{misspelled}: {error}"),
                }
            }
        }
    }
}
