//! The configuration as the daemon works with it: every value parsed, every default filled in.

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::OnceLock;

use strum::VariantArray as _;

use super::choices;
use super::contents::{Contents, Findings, Scope};
use super::cpg::{self, Backend, CPG, CpgMistake};
use super::error::{ConfigError, Mistake};
use super::groups::{self, Groups};
use super::listeners::{self, Listener};
use super::metrics::{self, Metrics};
use super::multicast::Multicast;
use super::plugin::Plugin;
use super::position::Source;
use super::rate_limit::{self, RATE_LIMIT, RateLimit};
use super::raw::{Assignment, Item, Section, Span, clip};
use super::serial::Around;
use super::settings::{Options, Stress};
use super::tcp::Tcp;
use super::warning::{Doubt, Warnings};

/// A resolved configuration, defaults included.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Where and how requests are received: multicast first, each kind in the file's order. Never
    /// empty.
    pub listeners: Vec<Listener>,
    /// Who answers for a domain: this host, or all hosts of its cluster.
    pub backend: Backend,
    /// The libvirt URIs, in the order in which a domain is looked for. Never empty, no two the
    /// same.
    pub uris: Vec<String>,
    /// Which clients may fence which domains.
    pub groups: Groups,
    /// Whether the start waits for libvirt and the interface.
    pub wait_for_init: bool,
    /// Whether the daemon stays in the foreground.
    pub foreground: bool,
    /// The debug level: 0 for the usual messages, more for more.
    pub debug: u32,
    /// How domains are killed and rebooted.
    pub hypervisor: Options,
    /// The directory of the history; `None` if there is none.
    pub history: Option<PathBuf>,
    /// How the daemon competes for memory and processors.
    pub stress: Stress,
    /// The rate limits.
    pub rate_limit: RateLimit,
    /// Where Prometheus reads the daemon's figures; `None` for nowhere.
    pub metrics: Option<Metrics>,
}

impl Config {
    /// The multicast listeners.
    pub fn multicasts(&self) -> impl Iterator<Item = &Multicast> {
        self.listeners.iter().filter_map(|listener| match listener {
            Listener::Multicast(multicast) => Some(multicast),
            Listener::Tcp(_) | Listener::Vsock(_) | Listener::Serial(_) => None,
        })
    }

    /// The multicast listener whose section has no name, or else the first one.
    #[must_use]
    pub fn multicast(&self) -> Option<&Multicast> {
        self.multicasts().find(|multicast| multicast.name.is_none()).or_else(|| self.multicasts().next())
    }

    /// The tcp listeners.
    pub fn tcps(&self) -> impl Iterator<Item = &Tcp> {
        self.listeners.iter().filter_map(|listener| match listener {
            Listener::Tcp(tcp) => Some(tcp),
            Listener::Multicast(_) | Listener::Vsock(_) | Listener::Serial(_) => None,
        })
    }
}

/// The default libvirt URI.
pub const URI: &str = "qemu:///system";

pub(super) const NOTHING: Scope<'static> =
    Scope { keys: &[], lists: &[], numbered: &[], sections: &[], named: &[], repeated: &[], unread: &[] };
pub(super) const FILE: Scope<'static> =
    Scope { sections: &["fence_virtd", "listeners", "backends", "groups"], ..NOTHING };
pub(super) const GLOBAL: Scope<'static> = Scope {
    keys: &[
        "listener",
        "backend",
        "module_path",
        "debug",
        "foreground",
        "wait_for_init",
        "wait_for_backend",
        "name_mode",
        "lock_memory",
        "priority",
        "oom_protect",
        "state_directory",
        "history_directory",
    ],
    sections: &["rate_limit", "metrics"],
    ..NOTHING
};
pub(super) const BACKENDS: Scope<'static> = Scope { sections: &["libvirt", "cpg"], unread: &["null"], ..NOTHING };
pub(super) const LIBVIRT: Scope<'static> =
    Scope { keys: &["kill", "reboot_method", "reboot_pause", "reboot_reply"], numbered: &["uri"], ..NOTHING };

/// Resolves a parsed file.
pub(super) fn resolve(
    source: &Source<'_>,
    items: &[Item<'_>],
    warnings: Warnings,
) -> Result<(Config, Warnings), ConfigError> {
    let mut findings = Findings::new(source, warnings);
    let f = &mut findings;
    let file = Contents::new(items, &FILE, f);

    let globals = file.last_section("fence_virtd");
    let global = Contents::new(items_of(globals), &GLOBAL, f);
    let chosen = listeners::chosen(globals, &global, f);
    let (backend, backend_at) = backend(globals, &global, f);
    let wait = global.get("wait_for_init").or_else(|| global.get("wait_for_backend"));
    let (wait_for_init, foreground) =
        (switch("wait_for_init", wait, f), switch("foreground", global.get("foreground"), f));
    let debug = read(global.get("debug"), 0, f, |text| text.trim().parse().map_err(|_| Mistake::Level(clip(text))));

    let own = own_section(backend, file.last_section("backends"), &backend_at, f);
    let uris = uris(&own, f);
    let around = Around { uris: &uris, groups: file.last_section("groups").is_some() };
    let placed = listeners::listeners(file.last_section("listeners"), &chosen, around, f);
    let (mut listeners, spans): (Vec<_>, Vec<_>) = placed.into_iter().unzip();
    if backend == Backend::Cpg {
        cpg::key(&listeners, &backend_at, f);
    }
    let (hypervisor, stress) = (choices::options(&global, &own, f), choices::stress(&global, f));
    let history = choices::history(&global, hypervisor.state.as_deref(), f);
    let rate_limit =
        rate_limit::rate_limit(&Contents::new(items_of(global.last_section("rate_limit")), &RATE_LIMIT, f), f);
    let metrics = metrics::metrics(global.last_section("metrics"), f);
    let groups = match file.last_section("groups") {
        Some(section) => groups::groups(section, &mut listeners, f),
        None => {
            groups::everyone(&listeners, &spans, f);
            Groups::Everyone
        }
    };

    let warnings = findings.conclude()?;
    let config = Config {
        listeners,
        backend,
        uris,
        groups,
        wait_for_init,
        foreground,
        debug,
        hypervisor,
        history,
        stress,
        rate_limit,
        metrics,
    };
    Ok((config, warnings))
}

pub(super) fn items_of<'i>(section: Option<&'i Section<'i>>) -> &'i [Item<'i>] {
    section.map_or(&[], |section| section.items.as_slice())
}

/// Reads `backend` and where it stands. fence_virtd has no default for it either.
fn backend(section: Option<&Section<'_>>, global: &Contents<'_>, findings: &mut Findings<'_>) -> (Backend, Span) {
    let plugin = Plugin::Backend;
    let Some(item) = global.get(plugin.key()) else {
        plugin.is_missing(section, findings);
        return (Backend::default(), 0..0);
    };
    let (span, name) = (item.value.span.clone(), clip(item.value.value));
    let known = Backend::VARIANTS.iter().find(|backend| backend.name().eq_ignore_ascii_case(item.value.value));
    match known {
        Some(backend) => return (*backend, span),
        None if BACKENDS.unread.iter().any(|known| known.eq_ignore_ascii_case(item.value.value)) => {
            findings.mistake(&span, Mistake::NotYet { plugin, name });
        }
        None => findings.mistake(&span, Mistake::NoSuch { plugin, name }),
    }
    (Backend::default(), span)
}

/// The section of the chosen backend. Those of the others are not read.
fn own_section<'i>(
    backend: Backend,
    section: Option<&'i Section<'i>>,
    at: &Span,
    findings: &mut Findings<'_>,
) -> Contents<'i> {
    let (name, scope) = match backend {
        Backend::Libvirt => (backend.name(), &LIBVIRT),
        Backend::Cpg => (backend.name(), &CPG),
    };
    let all = BACKENDS.sections.iter().chain(BACKENDS.unread).copied();
    let (read, unread): (Vec<_>, Vec<_>) = all.partition(|other| *other == name);
    let backends = Contents::new(items_of(section), &Scope { sections: &read, unread: &unread, ..NOTHING }, findings);
    let own = backends.last_section(name);
    let contents = Contents::new(items_of(own), scope, findings);
    if backend == Backend::Cpg {
        let is_libvirts = |item: &Item<'_>| matches!(item, Item::Section(section) if section.name.value.eq_ignore_ascii_case("libvirt"));
        if own.is_none() && items_of(section).iter().any(is_libvirts) {
            findings.mistake(at, CpgMistake::NoSection.into());
        }
        cpg::cpg(&contents, findings);
    }
    contents
}

/// A key's value, or its default. Reports a mistake at the value.
pub(super) fn read<T>(
    item: Option<&Assignment<'_>>,
    default: T,
    findings: &mut Findings<'_>,
    parse: impl FnOnce(&str) -> Result<T, Mistake>,
) -> T {
    match item.map(|item| (item, parse(item.value.value))) {
        None => default,
        Some((_, Ok(value))) => value,
        Some((item, Err(mistake))) => {
            findings.mistake(&item.value.span, mistake);
            default
        }
    }
}

/// Reads one of fence_virtd's switches: a number is on unless it is 0, and a word is 0.
fn switch(key: &'static str, item: Option<&Assignment<'_>>, findings: &mut Findings<'_>) -> bool {
    read(item, false, findings, |text| {
        let text = text.trim();
        if let Ok(number) = text.parse::<i64>() {
            return Ok(number != 0);
        }
        let value = clip(text);
        match on_or_off(text) {
            Some(false) => Ok(false),
            Some(true) => Err(Mistake::AmbiguousSwitch { key, value }),
            None => Err(Mistake::Switch { key, value }),
        }
    })
}

pub(super) fn on_or_off(text: &str) -> Option<bool> {
    match text.to_ascii_lowercase().as_str() {
        "1" | "yes" | "true" | "on" => Some(true),
        "0" | "no" | "false" | "off" => Some(false),
        _ => None,
    }
}

/// Makes a path absolute from the working directory of the first call: the daemon moves to `/`, and
/// reads the file again there.
pub(super) fn absolute(path: &str) -> PathBuf {
    static FROM: OnceLock<PathBuf> = OnceLock::new();
    let path = FROM.get_or_init(|| std::env::current_dir().unwrap_or_default()).join(path);
    std::path::absolute(&path).unwrap_or(path)
}

/// `uri`, `uri1`, `uri2`, ... in the order of their numbers; of each the last one.
fn uris(section: &Contents<'_>, findings: &mut Findings<'_>) -> Vec<String> {
    let number = |item: &Assignment<'_>| {
        let digits = item.key.value.get("uri".len()..).filter(|digits| !digits.is_empty())?;
        Some(digits.parse::<u64>().unwrap_or(u64::MAX))
    };
    let mut items: Vec<_> = section.listed().map(|item| (number(item), item)).collect();
    items.sort_by_key(|(number, _)| *number);
    let (mut uris, mut seen) = (Vec::new(), HashSet::new());
    for (index, (number, item)) in items.iter().enumerate() {
        match items.get(index.saturating_add(1)) {
            Some((next, later)) if next == number => findings.overruled(&item.key, &later.key),
            // Two connections to one hypervisor would find every domain twice.
            _ if !seen.insert(item.value.value) => findings.doubt(&item.value.span, || Doubt::SameUri),
            _ => uris.push(item.value.value.to_owned()),
        }
    }
    if uris.is_empty() {
        uris.push(URI.to_owned());
    }
    uris
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;
    use std::path::Path;

    use fence_common::hash::HashKind;
    use fence_common::wire::{DEFAULT_GROUP_V4, DEFAULT_GROUP_V6};

    use super::super::{Alone, Attach, Source, Warnings, parse};
    use super::*;

    /// Debian's packaged configuration, in shape and content.
    const DEBIAN: &str = "fence_virtd {\n\tlistener = \"multicast\";\n\tbackend = \"libvirt\";\n}\n\nlisteners {\n\tmulticast {\n\t\t\
        key_file = \"/etc/fence_virt.key\";\n\t\taddress = \"225.0.0.12\";\n\t\t# Needed on Fedora systems\n\t\t\
        interface = \"virbr0\";\n\t}\n}\n\nbackends {\n\tlibvirt { \n\t\turi = \"qemu:///system\";\n\t}\n}\n\n";
    /// The configuration that fence_virtd's interactive mode writes.
    const INTERACTIVE: &str = "backends {\n\tlibvirt {\n\t\turi = \"qemu:///system\";\n\t}\n\n}\n\nlisteners {\n\tmulticast {\n\t\t\
        port = \"1229\";\n\t\tfamily = \"ipv6\";\n\t\tinterface = \"none\";\n\t\taddress = \"ff05::3:1\";\n\t\t\
        key_file = \"/etc/cluster/fence_xvm.key\";\n\t}\n\n}\n\nfence_virtd {\n\tmodule_path = \"/usr/lib64/fence-virt\";\n\t\
        backend = \"libvirt\";\n\tlistener = \"multicast\";\n}\n\n";
    const GLOBAL: &str = "fence_virtd { listener = \"multicast\"; backend = \"libvirt\"; }\n";

    fn read(file: &str) -> (Config, Warnings) {
        parse(&Source::new(Path::new("fence_virt.conf"), file.as_bytes()), Warnings::default())
            .unwrap_or_else(|error| panic!("{}", error.render(false)))
    }

    fn quiet(file: &str) -> Config {
        let (config, warnings) = read(file);
        assert!(warnings.is_empty(), "{}", warnings.render(false));
        config
    }

    fn refused(file: &str) -> Vec<Mistake> {
        match parse(&Source::new(Path::new("fence_virt.conf"), file.as_bytes()), Warnings::default()) {
            Err(ConfigError::Mistakes(mistakes)) => mistakes.iter().map(|(_, mistake)| mistake.clone()).collect(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn defaults_are_those_of_stock_servers() {
        let config = quiet(GLOBAL);
        let multicast = Multicast {
            name: None,
            interface: None,
            group: "225.0.0.12".parse().unwrap(),
            port: 1229,
            hash: HashKind::Sha256,
            auth: HashKind::Sha256,
            key_file: "/etc/cluster/fence_xvm.key".into(),
            key_file2: None,
            attach: Attach::Auto,
            strict_source: true,
            alone: Alone::Auto,
        };
        assert!(multicast.needs_key());
        let expected = Config {
            listeners: vec![Listener::Multicast(multicast)],
            backend: Backend::Libvirt,
            uris: vec!["qemu:///system".into()],
            groups: Groups::Everyone,
            wait_for_init: false,
            foreground: false,
            debug: 0,
            hypervisor: Options { state: Some("/run/fence-xdp".into()), ..Options::default() },
            history: Some("/run/fence-xdp".into()),
            stress: Stress::default(),
            rate_limit: RateLimit::default(),
            metrics: None,
        };
        assert_eq!(config, expected);
    }

    #[test]
    fn files_that_are_in_use_are_understood() {
        let debian = quiet(DEBIAN);
        assert_eq!(debian.multicast().unwrap().interface.as_deref(), Some("virbr0"));
        assert_eq!(debian.multicast().unwrap().key_file, Path::new("/etc/fence_virt.key"));
        assert_eq!(debian.multicast().unwrap().group, IpAddr::from(DEFAULT_GROUP_V4));

        let interactive = quiet(INTERACTIVE);
        assert_eq!(interactive.multicast().unwrap().interface, None, "\"none\" is how it writes no interface");
        assert_eq!(interactive.multicast().unwrap().group, IpAddr::from(DEFAULT_GROUP_V6));
    }

    #[test]
    fn the_example_in_the_documentation_is_valid() {
        let config = quiet(include_str!("../../../docs/reference/fence_virt.conf.example"));
        assert!(matches!(config.groups, Groups::Everyone), "a copied example must work before guests are named in it");
        let with_groups = include_str!("../../../docs/reference/fence_virt.conf.example").replace("\n#!", "\n");
        assert!(matches!(quiet(&with_groups).groups, Groups::Only(groups) if groups.len() == 2));
    }

    #[test]
    fn keys_are_found_in_any_case_and_the_last_one_counts() {
        let (config, warnings) = read(&format!(
            "{GLOBAL} LISTENERS {{ Multicast {{ PORT = \"1\"; Hash = \"SHA512\"; port = \"2\"; attach = \"Generic\"; }} }}"
        ));
        assert_eq!((config.multicast().unwrap().port, config.multicast().unwrap().hash), (2, HashKind::Sha512));
        assert_eq!(config.multicast().unwrap().attach, Attach::Generic);
        assert_eq!(warnings.iter().count(), 1, "{}", warnings.render(false));
    }

    /// fence_virtd takes the last section and silently drops the first.
    #[test]
    fn a_section_that_is_there_twice_says_the_same_or_is_a_mistake() {
        let twice = |name: &str, line| Mistake::SectionTwice { name: name.to_owned(), line };
        for (file, name) in [
            (
                "listeners {\nmulticast { interface = \"virbr0\"; }\nmulticast { interface = \"virbr1\"; } }",
                "multicast",
            ),
            ("listeners { Multicast { port = \"1\"; }\n}\nLISTENERS { multicast { port = \"2\"; } }", "LISTENERS"),
            ("listeners { multicast { port = \"1\"; } }\nlisteners { }", "listeners"),
            ("fence_virtd { listener = \"multicast\"; backend = \"libvirt\"; debug = \"1\"; }", "fence_virtd"),
            ("backends { libvirt { uri = \"a:\"; }\nlibvirt { uri = \"b:\"; } }", "libvirt"),
            ("backends { libvirt { uri = \"a:\"; } }\nbackends { libvirt { } }", "backends"),
            (
                "groups { group { ip = \"10.0.0.1\"; uuid = \"a\"; } }\ngroups { group { ip = \"10.0.0.1\"; uuid = \"b\"; } }",
                "groups",
            ),
            (
                "groups { group = \"x\" { ip = \"10.0.0.1\"; uuid = \"a\"; } }\ngroups { group { ip = \"10.0.0.1\"; uuid = \"a\"; } }",
                "groups",
            ),
        ] {
            let text = format!("{GLOBAL}\n{file}");
            let head = format!("{name} {{").to_ascii_lowercase();
            let line = text.lines().position(|line| line.to_ascii_lowercase().contains(&head)).unwrap() + 1;
            assert_eq!(refused(&text), [twice(name, line)], "{text}");
        }
        // The same contents again are only superfluous, whatever their spelling and layout.
        let (config, warnings) = read(&format!(
            "{GLOBAL} listeners {{ multicast {{ port = \"1\"; }} multicast {{ # again\nPORT=\"1\"; }} }}"
        ));
        assert_eq!((config.multicast().unwrap().port, warnings.iter().count()), (1, 1), "{}", warnings.render(false));
        // Sections of other listeners are not judged.
        quiet(&format!("{GLOBAL} listeners {{ tcp {{ port = \"1\"; }} tcp {{ port = \"2\"; }} }}"));
    }

    #[test]
    fn family_and_address_infer_each_other() {
        let group =
            |keys: &str| quiet(&format!("{GLOBAL} listeners {{ multicast {{ {keys} }} }}")).multicast().unwrap().group;
        assert_eq!(group("family = \"IPv6\";"), IpAddr::from(DEFAULT_GROUP_V6));
        assert_eq!(group("address = \"ff02::5\";"), "ff02::5".parse::<IpAddr>().unwrap());
        assert_eq!(group("family = \"ipv4\"; address = \"239.1.2.3\";"), "239.1.2.3".parse::<IpAddr>().unwrap());
        let mistakes =
            refused(&format!("{GLOBAL} listeners {{ multicast {{ family = \"ipv6\"; address = \"225.0.0.12\"; }} }}"));
        assert_eq!(mistakes, [Mistake::OtherFamily(IpAddr::from(DEFAULT_GROUP_V4))]);
    }

    #[test]
    fn uris_are_tried_by_number() {
        let uris = |keys: &str| read(&format!("{GLOBAL} backends {{ libvirt {{ {keys} }} }}")).0.uris;
        assert_eq!(uris("uri10 = \"d\"; uri2 = \"c\"; uri = \"a\"; uri1 = \"b\";"), ["a", "b", "c", "d"]);
        assert_eq!(uris("uri1 = \"lxc:///\"; uri3 = \"qemu:///system\";"), ["lxc:///", "qemu:///system"]);
        assert_eq!(uris("uri = \"a\"; uri = \"b\"; uri1 = \"b\";"), ["b"]);
        assert_eq!(uris("uri99999999999999999999999 = \"z\"; uri5 = \"a\";"), ["a", "z"]);
    }

    #[test]
    fn groups_restrict_or_the_daemon_does_not_start() {
        let config = quiet(&format!(
            "{GLOBAL} groups {{ group = \"a\" {{ ip = \"192.168.122.11\"; ip = \"fd00::11\"; uuid = \"node1\"; UUID = \"node2\"; }} \
             group {{ name = \"b\"; ip = \"192.168.122.12\"; uuid = \"node1\"; }} \
             group {{ ip = \"192.168.122.13\"; uuid = \"node1\"; }} }}"
        ));
        let Groups::Only(groups) = config.groups else { panic!("{config:?}") };
        let names: Vec<_> = groups.iter().map(|group| group.name.as_deref()).collect();
        assert_eq!(names, [Some("a"), Some("b"), None]);
        assert_eq!(groups[0].ips, ["192.168.122.11", "fd00::11"].map(|ip| ip.parse::<IpAddr>().unwrap()));
        assert_eq!(groups[0].uuids, ["node1", "node2"]);

        for (file, expected) in [
            ("groups { }", Mistake::NoGroup),
            ("groups = \"x\" { }", Mistake::NoGroup),
            ("groups { gruop { ip = \"1.2.3.4\"; uuid = \"x\"; } }", Mistake::NoGroup),
            ("groups { group { ip = \"1.2.3.4\"; } }", Mistake::GroupLacks("uuid")),
            ("groups { group { uuid = \"x\"; } }", Mistake::GroupLacks("ip")),
            ("groups { group { ip1 = \"1.2.3.4\"; uuid = \"x\"; } }", Mistake::GroupLacks("ip")),
            ("groups { group { ip = \"1.2.3\"; uuid = \"x\"; } }", Mistake::MemberAddress("1.2.3".into())),
            (
                "groups { group { ip = \"fe80::1%eth0\"; uuid = \"x\"; } }",
                Mistake::MemberAddress("fe80::1%eth0".into()),
            ),
            ("groups = \"x\";", Mistake::SectionExpected("groups".into())),
            ("group = \"x\";", Mistake::Misplaced("group".into())),
            ("ip = \"1.2.3.4\";", Mistake::OutsideGroup("ip".into())),
            ("Group { }", Mistake::Misplaced("Group".into())),
            ("grups { }", Mistake::Misplaced("grups".into())),
            ("acl { members { uuid = \"x\"; } }", Mistake::Misplaced("acl".into())),
            ("listeners { groups { } }", Mistake::Misplaced("groups".into())),
            ("fence_virtd2 { groups { } }", Mistake::Misplaced("fence_virtd2".into())),
            // Sections that are not read: another listener's, and an overruled one.
            ("listeners { tcp { groups { } } }", Mistake::Misplaced("tcp".into())),
            ("backends { cpg { x { ip = \"1.2.3.4\"; } } }", Mistake::Misplaced("cpg".into())),
            ("listeners { Groups { } } listeners { }", Mistake::Misplaced("listeners".into())),
        ] {
            assert!(refused(&format!("{GLOBAL} {file}")).contains(&expected), "{file}");
        }
    }

    #[test]
    fn switches_mean_what_stock_servers_take_them_for() {
        let global = |keys: &str| format!("fence_virtd {{ listener = \"multicast\"; backend = \"libvirt\"; {keys} }}");
        for (value, expected) in [("1", true), ("2", true), ("0", false), ("no", false), ("off", false)] {
            let config = quiet(&global(&format!("foreground = \"{value}\"; wait_for_init = \"{value}\";")));
            assert_eq!((config.foreground, config.wait_for_init), (expected, expected), "{value}");
        }
        assert!(quiet(&global("wait_for_backend = \"1\";")).wait_for_init);
        assert_eq!(quiet(&global("debug = \"99\"; name_mode = \"uuid\";")).debug, 99);
        for value in ["yes", "on", "true", "maybe", "1x"] {
            assert_eq!(refused(&global(&format!("foreground = \"{value}\";"))).len(), 1, "{value}");
        }
        let strict = |value: &str| {
            quiet(&format!("{GLOBAL} listeners {{ multicast {{ strict_source = \"{value}\"; }} }}"))
                .multicast()
                .unwrap()
                .strict_source
        };
        assert_eq!(["yes", "no", "1", "0", "On", "False"].map(strict), [true, false, true, false, true, false]);
    }

    /// Found by fuzzing: the order depended on a byte order mark, which moves the first word away
    /// from the file's beginning.
    #[test]
    fn warnings_about_the_whole_file_come_first() {
        let expected = [
            Mistake::Missing(Plugin::Listener),
            Mistake::Missing(Plugin::Backend),
            Mistake::Misplaced("fence_virtdd".into()),
        ];
        for mark in ["", "\u{feff}"] {
            assert_eq!(refused(&format!("{mark}fence_virtdd {{ group {{ }} }}")), expected);
        }
    }

    #[test]
    fn sections_of_other_plugins_are_ignored_and_choosing_one_is_a_mistake() {
        let sections = "listeners { tcp { port = \"1\"; auth = \"x\"; } vsock { cid = \"2\"; } serial { mode = \"vmchannel\"; path = \"/x\"; } \
                        vmchannel { } } backends { cpg { uri = \"x\"; name_mode = \"uuid\"; } null { } }";
        assert_eq!(quiet(&format!("{GLOBAL} {sections}")), quiet(GLOBAL));
        for name in ["vmchannel", "VMCHANNEL"] {
            for list in [name.to_owned(), format!("multicast, {name}"), format!("{name},multicast")] {
                let mistakes = refused(&GLOBAL.replace("multicast", &list));
                assert_eq!(mistakes, [Mistake::NotYet { plugin: Plugin::Listener, name: name.into() }]);
            }
        }
        let mistakes = refused(&GLOBAL.replace("libvirt", "null"));
        assert_eq!(mistakes, [Mistake::NotYet { plugin: Plugin::Backend, name: "null".into() }]);
    }

    #[test]
    fn a_key_is_needed_unless_both_digests_are_none() {
        let needs_key = |keys: &str| {
            read(&format!("{GLOBAL} listeners {{ multicast {{ {keys} }} }}")).0.multicast().unwrap().needs_key()
        };
        assert!(!needs_key("hash = \"none\"; auth = \"none\";"));
        assert!(needs_key("hash = \"none\";"));
        assert!(needs_key("auth = \"none\";"));
    }

    #[test]
    fn a_relative_key_file_outlives_the_change_to_the_root_directory() {
        let config = quiet(&format!("{GLOBAL} listeners {{ multicast {{ key_file = \"k/fence.key\"; }} }}"));
        assert_eq!(config.multicast().unwrap().key_file, std::env::current_dir().unwrap().join("k/fence.key"));
    }

    #[test]
    fn thousands_of_mistakes_and_warnings_take_no_time_and_little_room() {
        let many = |item: &str| item.repeat(20_000);
        let mistakes = refused(&format!("{GLOBAL} groups {{ group {{ uuid = \"x\"; {} }} }}", many("ip = \"x\";\n")));
        assert_eq!(mistakes.len(), 20);
        let (config, warnings) =
            read(&format!("{GLOBAL} {} backends {{ libvirt {{ {} }} }}", many("x = \"1\";\n"), many("uri1 = \"a\";")));
        assert_eq!((config.uris.as_slice(), warnings.iter().count()), (&["a".to_owned()][..], 100));
        assert_eq!(warnings.left_out(), 2 * 20_000 - 1 - 100);
        let many_groups = many("group { ip = \"10.0.0.1\"; uuid = \"x\"; }\n");
        assert!(
            matches!(quiet(&format!("{GLOBAL} groups {{ {many_groups} }}")).groups, Groups::Only(groups) if groups.len() == 20_000)
        );
    }
}
