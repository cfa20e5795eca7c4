//! Section `groups`: which clients may fence which domains, and with which key.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::Path;

use fence_common::hash::HashKind;
use fence_common::keys::KeyOwner;

use super::contents::{Contents, Findings, Scope, nearest};
use super::error::Mistake;
use super::listeners::{KeyFiles, Listener, ListenerMistake};
use super::multicast::Attach;
use super::permission::names_a_uuid;
use super::raw::{Assignment, Item, Section, Span, clip};
use super::resolved::{NOTHING, absolute};
use super::warning::Doubt;

pub(super) const GROUPS: Scope<'static> = Scope { repeated: &["group"], ..NOTHING };
pub(super) const GROUP: Scope<'static> =
    Scope { keys: &["name", "key_file", "key_file2"], lists: &["ip", "from", "uuid", "listener"], ..NOTHING };

/// Which clients may fence which domains.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Groups {
    /// Every client may fence every domain: the file has no `groups` section.
    Everyone,
    /// Clients may fence within these groups only. Never empty.
    Only(Vec<Group>),
}

/// A group: its clients may fence its domains.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Group {
    /// Its name, for log lines.
    pub name: Option<String>,
    /// The IP addresses of its clients.
    pub ips: Vec<IpAddr>,
    /// The vsock numbers of its clients.
    pub cids: Vec<u32>,
    /// The names or UUIDs of the domains that its clients run in, as written. Not all three are
    /// empty.
    pub from: Vec<String>,
    /// The names or UUIDs of its domains, as written. Never empty.
    pub uuids: Vec<String>,
    /// The files of its own key. Without them the group uses the listener's key.
    pub keys: Option<KeyFiles>,
    /// The owner of the key that signs this group's requests.
    pub owner: KeyOwner,
    /// The numbers of the listeners that the group counts at. Empty if it counts at each.
    pub listeners: Vec<usize>,
}

impl Groups {
    /// The groups' own keys, each once, with their owners.
    pub fn key_files(&self) -> impl Iterator<Item = (KeyOwner, &KeyFiles)> {
        let groups = match self {
            Self::Everyone => &[],
            Self::Only(groups) => groups.as_slice(),
        };
        let own = groups.iter().filter_map(|group| Some((group.owner, group.keys.as_ref()?)));
        let mut seen = BTreeSet::new();
        own.filter(move |(owner, _)| seen.insert(*owner))
    }

    /// Numbers the owners of keys: those in `known` by their place, and others behind them.
    ///
    /// After a reload a number must not mean other files than before: a request under way carries
    /// the number of its key's owner.
    pub fn number_owners(&mut self, known: &mut Vec<KeyFiles>) {
        let Self::Only(groups) = self else { return };
        for group in groups {
            let Some(keys) = &group.keys else { continue };
            let place = known.iter().position(|files| files == keys).unwrap_or_else(|| {
                known.push(keys.clone());
                known.len().saturating_sub(1)
            });
            group.owner = KeyOwner(place.saturating_add(1));
        }
    }

    /// Has listeners called by these numbers, in the configuration's order.
    ///
    /// After a reload a number must not mean another listener than before: a request under way
    /// carries its listener's number.
    pub fn number_listeners(&mut self, numbers: &[usize]) {
        let Self::Only(groups) = self else { return };
        let of = |place: &usize| numbers.get(*place).copied();
        for group in groups {
            group.listeners = group.listeners.iter().filter_map(of).collect();
        }
    }

    /// Whether a group with a key of its own counts at the listener with this number.
    #[must_use]
    pub fn have_keys(&self, listener: usize) -> bool {
        match self {
            Self::Everyone => false,
            Self::Only(groups) => groups.iter().any(|group| group.keys.is_some() && group.counts_at(listener)),
        }
    }
}

/// Reads the section. Where a group with a key of its own counts, the kernel program is off, since
/// it does not know such keys.
pub(super) fn groups(section: &Section<'_>, listeners: &mut [Listener], findings: &mut Findings<'_>) -> Groups {
    let sections = Contents::new(&section.items, &GROUPS, findings);
    let groups: Vec<Group> = sections.sections().map(|section| group(section, listeners, findings)).collect();
    if groups.is_empty() {
        findings.mistake(&section.name.span, Mistake::NoGroup);
    }
    let (mut groups, mut digests) = (Groups::Only(groups), Vec::new());
    groups.number_owners(&mut Vec::new());
    for (number, listener) in listeners.iter_mut().enumerate() {
        if !groups.have_keys(number) {
            continue;
        }
        match listener {
            Listener::Multicast(multicast) => {
                multicast.attach = Attach::Off;
                digests.extend([multicast.hash, multicast.auth]);
            }
            Listener::Tcp(tcp) => digests.push(tcp.hash),
            Listener::Serial(_) => {}
            Listener::Vsock(vsock) => digests.push(vsock.hash),
        }
    }
    if digests.contains(&HashKind::None) {
        findings.mistake(&section.name.span, Mistake::GroupKeyUnused);
    }
    groups
}

/// Warns if everybody may fence everything and the listeners have several keys.
pub(super) fn everyone(listeners: &[Listener], spans: &[Span], findings: &mut Findings<'_>) {
    if let Some((one, other)) = with_two_keys(listeners, |_| true)
        && let (Some(span), Some(one), Some(other)) = (spans.get(other), listeners.get(one), listeners.get(other))
    {
        findings.doubt(span, || Doubt::Together { one: clip(&one.label()), other: clip(&other.label()) });
    }
}

/// The numbers of two listeners with different keys, among those that `counts` accepts.
fn with_two_keys(listeners: &[Listener], counts: impl Fn(usize) -> bool) -> Option<(usize, usize)> {
    let all = listeners.iter().enumerate().filter(|(number, _)| counts(*number));
    let mut keyed = all.filter_map(|(number, listener)| Some((number, listener.key_files()?.first)));
    let (first, key) = keyed.next()?;
    keyed.find(|(_, other)| *other != key).map(|(other, _)| (first, other))
}

/// Reads a group. If it counts at serial lines, a domain asks over a line of its own, so its UUID
/// under `uuid` makes it a client of the group, as with fence_virtd.
fn group(section: &Section<'_>, all: &[Listener], findings: &mut Findings<'_>) -> Group {
    let found = Contents::new(&section.items, &GROUP, findings);
    let mut group = Group { listeners: listeners(&found, all, findings), ..Group::default() };
    let at = |is: fn(&Listener) -> bool| {
        all.iter().enumerate().any(|(number, listener)| group.counts_at(number) && is(listener))
    };
    let lines = at(|listener| matches!(listener, Listener::Serial(_)));
    let numbers = at(|listener| matches!(listener, Listener::Vsock(_)));
    let lacks = |key: &str| !found.listed().any(|item| item.key.value.eq_ignore_ascii_case(key));
    let is_uuid = |item: &&Assignment<'_>| {
        item.key.value.eq_ignore_ascii_case("uuid") && names_a_uuid(item.value.value).is_some()
    };
    let asks_itself = lines && found.listed().any(|item| is_uuid(&item));
    if lacks("ip") && lacks("from") && !asks_itself {
        findings.mistake(&section.name.span, Mistake::GroupLacks("ip"));
    }
    if lacks("uuid") {
        findings.mistake(&section.name.span, Mistake::GroupLacks("uuid"));
    }
    for item in found.listed() {
        let text = item.value.value;
        if item.key.value.eq_ignore_ascii_case("uuid") {
            group.uuids.push(text.to_owned());
        } else if item.key.value.eq_ignore_ascii_case("from") {
            if !lines && !numbers {
                findings.doubt(&item.value.span, || Doubt::NobodyVouches);
            }
            group.from.push(text.to_owned());
        } else if item.key.value.eq_ignore_ascii_case("ip") {
            match (text.trim().parse::<IpAddr>(), text.trim().parse::<u32>()) {
                // A socket of both families shows IPv4 peers as mapped addresses.
                (Ok(ip), _) => group.ips.push(ip.to_canonical()),
                (Err(_), Ok(cid)) if numbers => group.cids.push(cid),
                (Err(_), _) => findings.mistake(&item.value.span, Mistake::MemberAddress(clip(text))),
            }
        }
    }
    for item in &section.items {
        if let Item::Value(item) = item
            && reads_like(item.key.value, &["key_file", "key_file2"])
        {
            findings.mistake(&item.key.span, Mistake::GroupKeyMisspelt(clip(item.key.value)));
        } else if let Item::Value(item) = item
            && reads_like(item.key.value, &["listener"])
        {
            findings.mistake(&item.key.span, ListenerMistake::Misspelt(clip(item.key.value)).into());
        }
    }
    let name = found.get("name").map(|item| &item.value).or(section.value.as_ref());
    group.name = name.map(|name| name.value.to_owned());
    let file = |key| found.get(key).map(|item| absolute(item.value.value));
    match (file("key_file"), file("key_file2")) {
        (Some(first), second) => group.keys = Some(KeyFiles { first, second }),
        (None, Some(_)) => findings.mistake(&section.name.span, Mistake::GroupLacks("key_file")),
        (None, None) => {
            if let Some((one, other)) = with_two_keys(all, |number| group.counts_at(number)) {
                let label = |number| all.get(number).map(|one: &Listener| clip(&one.label())).unwrap_or_default();
                findings.doubt(&section.name.span, || Doubt::GroupOfTwoKeys { one: label(one), other: label(other) });
            }
        }
    }
    group
}

/// The numbers of the listeners that a group's `listener` entries call: those with a section of
/// this name, and the one without a name by its kind.
fn listeners(found: &Contents<'_>, all: &[Listener], findings: &mut Findings<'_>) -> Vec<usize> {
    let mut numbers = Vec::new();
    for item in found.listed().filter(|item| item.key.value.eq_ignore_ascii_case("listener")) {
        let name = item.value.value;
        let called = |(number, one): (usize, &Listener)| one.called().eq_ignore_ascii_case(name).then_some(number);
        let before = numbers.len();
        numbers.extend(all.iter().enumerate().filter_map(called));
        if numbers.len() == before {
            let mut known: Vec<_> = all.iter().map(|one| clip(one.called())).collect();
            known.dedup();
            findings.mistake(&item.value.span, ListenerMistake::NoSuchSection { name: clip(name), known }.into());
        }
    }
    numbers.sort_unstable();
    numbers.dedup();
    numbers
}

/// Whether a key looks like a misspelled one of these. Ignoring it would leave the group open to
/// more clients: those with the listener's key, or those of other listeners.
fn reads_like(key: &str, restrictions: &[&'static str]) -> bool {
    let is_known = GROUP.keys.iter().chain(GROUP.lists).any(|known| known.eq_ignore_ascii_case(key));
    !is_known && nearest(key, restrictions.iter().copied()).is_some()
}

/// The span where a group names this key file, and true. Otherwise an empty span, and false.
pub(super) fn key_file_span(items: &[Item<'_>], path: &Path) -> (Span, bool) {
    let found = items.iter().find_map(|item| match item {
        Item::Section(section) => Some(key_file_span(&section.items, path)).filter(|(_, is_written)| *is_written),
        Item::Value(item) => {
            let is_key_file = ["key_file", "key_file2"].iter().any(|key| item.key.value.eq_ignore_ascii_case(key));
            (is_key_file && absolute(item.value.value) == path).then(|| (item.value.span.clone(), true))
        }
    });
    found.unwrap_or((0..0, false))
}

#[cfg(test)]
mod tests {
    use super::super::{Config, ConfigError, Source, Warnings, parse};
    use super::*;

    fn read(groups: &str, multicast: &str) -> Result<Config, ConfigError> {
        let text = format!(
            "fence_virtd {{ listener = \"multicast,tcp\"; backend = \"libvirt\"; }}\n\
             listeners {{ multicast {{ {multicast} }} }}\ngroups {{ {groups} }}"
        );
        parse(&Source::new(Path::new("f"), text.as_bytes()), Warnings::default()).map(|(config, _)| config)
    }

    const MEMBERS: &str = "ip = \"10.0.0.1\"; uuid = \"a\";";

    #[test]
    fn groups_of_the_same_key_files_have_one_owner_and_others_have_others() {
        let own = |keys: &str| format!("group {{ {MEMBERS} {keys} }}\n");
        let (a, b) = (own("key_file = \"/a\";"), own("KEY_FILE = \"/b\"; key_file2 = \"/b2\";"));
        let config = read(&[&own(""), &a, &b, &a, &own(""), &b].map(String::as_str).concat(), "").unwrap();
        let Groups::Only(groups) = &config.groups else { panic!("no groups") };
        assert_eq!(groups.iter().map(|group| group.owner.0).collect::<Vec<_>>(), [0, 1, 2, 1, 0, 2]);
        let files =
            |first: &str, second: Option<&str>| KeyFiles { first: first.into(), second: second.map(Into::into) };
        let found: Vec<_> = config.groups.key_files().map(|(owner, files)| (owner.0, files.clone())).collect();
        assert_eq!(found, [(1, files("/a", None)), (2, files("/b", Some("/b2")))]);
    }

    /// A request under way keeps its owner's number over a reload.
    #[test]
    fn the_number_of_an_owner_never_means_other_files() {
        let own = |keys: &str| format!("group {{ {MEMBERS} key_file = \"{keys}\"; }}\n");
        let mut known = Vec::new();
        let mut numbers = |files: &[&str]| {
            let text: String = files.iter().map(|file| own(file)).collect();
            let mut groups = read(&text, "").unwrap().groups;
            groups.number_owners(&mut known);
            groups.key_files().map(|(owner, _)| owner.0).collect::<Vec<_>>()
        };
        assert_eq!(numbers(&["/a", "/b"]), [1, 2]);
        assert_eq!(numbers(&["/c", "/b"]), [3, 2]);
        assert_eq!(numbers(&["/b", "/a", "/b"]), [2, 1]);
    }

    #[test]
    fn the_kernel_program_is_off_where_a_group_has_a_key_and_nowhere_else() {
        let config = read(&format!("group {{ {MEMBERS} key_file = \"/a\"; }}"), "attach = \"native\";").unwrap();
        assert!(config.groups.have_keys(0) && config.multicast().unwrap().attach == Attach::Off);
        let config = read(&format!("group {{ {MEMBERS} }}"), "attach = \"native\";").unwrap();
        assert!(!config.groups.have_keys(0) && config.multicast().unwrap().attach == Attach::Native);
    }

    #[test]
    fn a_key_that_would_restrict_nothing_is_a_mistake() {
        for (keys, multicast) in [
            ("key_file2 = \"/a\";", ""),
            ("key_file = \"/a\";", "hash = \"none\";"),
            ("key_file = \"/a\";", "auth = \"none\";"),
            ("key_file = \"/a\";", "} tcp { address = \"::\"; hash = \"none\";"),
            ("keyfile = \"/a\";", ""),
            ("key_fiel2 = \"/a\";", ""),
        ] {
            let result = read(&format!("group {{ {MEMBERS} {keys} }}"), multicast);
            assert!(result.is_err(), "{keys} {multicast}");
        }
    }

    /// A file with two multicast sections of one key each, tcp of the first key, and these groups.
    fn two_clusters(groups: &str) -> Result<(Config, Warnings), ConfigError> {
        let text = format!(
            "fence_virtd {{ listener = \"multicast,tcp\"; backend = \"libvirt\"; }}\n\
             listeners {{ multicast {{ interface = \"a\"; }}\n\
             multicast \"dmz\" {{ interface = \"b\"; key_file = \"/dmz\"; }}\n\
             tcp \"DMZ\" {{ address = \"::\"; key_file = \"/dmz\"; }} }}\n{groups}"
        );
        parse(&Source::new(Path::new("f"), text.as_bytes()), Warnings::default())
    }

    #[test]
    fn a_group_counts_at_the_listeners_that_it_names() {
        let at = |listeners: &str| {
            let (config, _) = two_clusters(&format!("groups {{ group {{ {MEMBERS} {listeners} }} }}")).unwrap();
            let Groups::Only(groups) = config.groups else { panic!("no groups") };
            groups[0].listeners.clone()
        };
        assert_eq!(at(""), []);
        assert_eq!(at("listener = \"multicast\";"), [0]);
        // A name is that of each section that has it, in any case.
        assert_eq!(at("listener = \"dmz\";"), [1, 2]);
        assert_eq!(at("Listener = \"Dmz\"; listener = \"MULTICAST\"; listener = \"dmz\";"), [0, 1, 2]);
        for name in ["tcp", "vsock", "other", " "] {
            let groups = format!("groups {{ group {{ {MEMBERS} listener = \"{name}\"; }} }}");
            let Err(ConfigError::Mistakes(mistakes)) = two_clusters(&groups) else { panic!("{name} is known") };
            let known = vec!["multicast".to_owned(), "dmz".to_owned(), "DMZ".to_owned()];
            let expected = ListenerMistake::NoSuchSection { name: name.to_owned(), known };
            assert_eq!(mistakes.iter().map(|(_, mistake)| mistake.clone()).collect::<Vec<_>>(), [expected.into()]);
        }
    }

    #[test]
    fn a_groups_own_key_concerns_its_listeners_only() {
        let with_key = |listener: &str| {
            let groups = format!("groups {{ group {{ {MEMBERS} key_file = \"/own\"; {listener} }} }}");
            let (config, _) = two_clusters(&groups).unwrap();
            config.multicasts().map(|multicast| multicast.attach).collect::<Vec<_>>()
        };
        assert_eq!(with_key(""), [Attach::Off, Attach::Off]);
        assert_eq!(with_key("listener = \"dmz\";"), [Attach::Auto, Attach::Off]);
        // Nothing is signed at another listener, which the group's key has nothing to do with.
        let unsigned = "hash = \"none\"; } multicast \"b\" { port = \"9\";";
        let group = |listener: &str| format!("group {{ {MEMBERS} key_file = \"/own\"; listener = \"{listener}\"; }}");
        assert!(read(&group("b"), unsigned).is_ok() && read(&group("multicast"), unsigned).is_err());
    }

    #[test]
    fn clusters_with_different_keys_that_can_fence_each_other_cause_a_warning() {
        let doubts = |groups: &str| {
            let (_, warnings) = two_clusters(groups).unwrap();
            warnings.iter().map(|warning| warning.doubt().clone()).collect::<Vec<_>>()
        };
        let (one, other) = ("multicast".to_owned(), "multicast \"dmz\"".to_owned());
        assert_eq!(doubts(""), [Doubt::Together { one: one.clone(), other: other.clone() }]);
        let group = |more: &str| format!("group {{ {MEMBERS} {more} }}\n");
        let groups = |all: &[String]| format!("groups {{ {} }}", all.concat());
        let apart = [group("listener = \"multicast\";"), group("listener = \"dmz\";"), group("key_file = \"/own\";")];
        assert_eq!(doubts(&groups(&apart)), []);
        let of_two = Doubt::GroupOfTwoKeys { one, other };
        assert_eq!(doubts(&groups(&[apart[0].clone(), group("")])), [of_two]);
        // One key at several listeners is one cluster.
        let same = "fence_virtd { listener = \"multicast,tcp,vsock\"; backend = \"libvirt\"; }\n\
                    listeners { tcp { address = \"::\"; } }";
        let (_, warnings) = parse(&Source::new(Path::new("f"), same.as_bytes()), Warnings::default()).unwrap();
        assert!(warnings.is_empty(), "{}", warnings.render(false));
    }
}
