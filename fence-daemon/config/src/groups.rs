//! Section `groups`: which clients may fence which domains, and with which key.

use std::net::IpAddr;
use std::path::Path;

use fence_common::hash::HashKind;
use fence_common::keys::KeyOwner;

use super::contents::{Contents, Findings, Scope, nearest};
use super::error::Mistake;
use super::listeners::{KeyFiles, Listener};
use super::multicast::Attach;
use super::permission::names_a_uuid;
use super::raw::{Assignment, Item, Section, Span, clip};
use super::resolved::{NOTHING, absolute};
use super::warning::Doubt;

pub(super) const GROUPS: Scope<'static> = Scope { repeated: &["group"], ..NOTHING };
pub(super) const GROUP: Scope<'static> =
    Scope { keys: &["name", "key_file", "key_file2"], lists: &["ip", "from", "uuid"], ..NOTHING };

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
}

impl Groups {
    /// The groups' own keys, each once, with their owners.
    pub fn key_files(&self) -> impl Iterator<Item = (KeyOwner, &KeyFiles)> {
        let groups = match self {
            Self::Everyone => &[],
            Self::Only(groups) => groups.as_slice(),
        };
        let own = groups.iter().filter_map(|group| Some((group.owner, group.keys.as_ref()?)));
        // Owners are numbered in the order in which they first appear.
        let fresh = own.scan(KeyOwner::EVERYBODY, |last, (owner, files)| {
            let is_new = owner > *last;
            *last = owner.max(*last);
            Some(is_new.then_some((owner, files)))
        });
        fresh.flatten()
    }

    /// Whether any group has its own key.
    #[must_use]
    pub fn have_keys(&self) -> bool {
        self.key_files().next().is_some()
    }
}

/// Reads the section. If a group has its own key, the kernel programs are off, since they do not
/// know such keys.
pub(super) fn groups(section: &Section<'_>, listeners: &mut [Listener], findings: &mut Findings<'_>) -> Groups {
    let lines = listeners.iter().any(|listener| matches!(listener, Listener::Serial(_)));
    let numbers = listeners.iter().any(|listener| matches!(listener, Listener::Vsock(_)));
    let sections = Contents::new(&section.items, &GROUPS, findings);
    let mut groups: Vec<Group> = sections.sections().map(|section| group(section, lines, numbers, findings)).collect();
    if groups.is_empty() {
        findings.mistake(&section.name.span, Mistake::NoGroup);
    }
    let mut owners: Vec<KeyFiles> = Vec::new();
    for group in &mut groups {
        let Some(keys) = &group.keys else { continue };
        let known = owners.iter().position(|files| files == keys);
        let position = known.unwrap_or_else(|| {
            owners.push(keys.clone());
            owners.len().saturating_sub(1)
        });
        group.owner = KeyOwner(position.saturating_add(1));
    }
    if !owners.is_empty() {
        let mut digests = Vec::new();
        for listener in listeners {
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
    }
    Groups::Only(groups)
}

/// Reads a group. With `lines` a domain asks over a line of its own, so its UUID under `uuid` makes
/// it a client of the group, as with fence_virtd. With `numbers` it may ask by vsock.
fn group(section: &Section<'_>, lines: bool, numbers: bool, findings: &mut Findings<'_>) -> Group {
    let found = Contents::new(&section.items, &GROUP, findings);
    let (mut ips, mut cids, mut from, mut uuids) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
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
            uuids.push(text.to_owned());
        } else if item.key.value.eq_ignore_ascii_case("from") {
            if !lines && !numbers {
                findings.doubt(&item.value.span, || Doubt::NobodyVouches);
            }
            from.push(text.to_owned());
        } else if item.key.value.eq_ignore_ascii_case("ip") {
            match (text.trim().parse::<IpAddr>(), text.trim().parse::<u32>()) {
                // A socket of both families shows IPv4 peers as mapped addresses.
                (Ok(ip), _) => ips.push(ip.to_canonical()),
                (Err(_), Ok(cid)) if numbers => cids.push(cid),
                (Err(_), _) => findings.mistake(&item.value.span, Mistake::MemberAddress(clip(text))),
            }
        }
    }
    for item in &section.items {
        if let Item::Value(item) = item
            && reads_like_a_key_file(item.key.value)
        {
            findings.mistake(&item.key.span, Mistake::GroupKeyMisspelt(clip(item.key.value)));
        }
    }
    let name = found.get("name").map(|item| &item.value).or(section.value.as_ref());
    let file = |key| found.get(key).map(|item| absolute(item.value.value));
    let keys = match (file("key_file"), file("key_file2")) {
        (Some(first), second) => Some(KeyFiles { first, second }),
        (None, Some(_)) => {
            findings.mistake(&section.name.span, Mistake::GroupLacks("key_file"));
            None
        }
        (None, None) => None,
    };
    Group { name: name.map(|name| name.value.to_owned()), ips, cids, from, uuids, keys, owner: KeyOwner::EVERYBODY }
}

/// Whether a key looks like a misspelled `key_file`. Ignoring it would leave the group with the
/// listener's key.
fn reads_like_a_key_file(key: &str) -> bool {
    let is_known = GROUP.keys.iter().chain(GROUP.lists).any(|known| known.eq_ignore_ascii_case(key));
    !is_known && nearest(key, ["key_file", "key_file2"].into_iter()).is_some()
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

    #[test]
    fn the_kernel_program_is_off_where_a_group_has_a_key_and_nowhere_else() {
        let config = read(&format!("group {{ {MEMBERS} key_file = \"/a\"; }}"), "attach = \"native\";").unwrap();
        assert!(config.groups.have_keys() && config.multicast().unwrap().attach == Attach::Off);
        let config = read(&format!("group {{ {MEMBERS} }}"), "attach = \"native\";").unwrap();
        assert!(!config.groups.have_keys() && config.multicast().unwrap().attach == Attach::Native);
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
}
