//! Who may fence what: targets, groups, and the permission that everything that acts demands.

use std::fmt;
use std::net::IpAddr;

use fence_common::wire::Op;
use uuid::Uuid;

use crate::callback::Authenticated;
use crate::config::Groups;
use crate::keyring::KeyOwner;

/// The domain that a request means.
///
/// As with stock servers a canonical UUID text (8-4-4-4-12 hexadecimal digits, any case) is looked up as a UUID and anything
/// else as a name; the request's flag for it is ignored.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Target {
    /// Look up by UUID.
    Uuid(Uuid),
    /// Look up by name, exactly as spelled.
    Name(String),
}

impl Target {
    /// The target that the text of a request's domain field means; `None` for text that can name no domain.
    #[must_use]
    pub fn parse(text: &[u8]) -> Option<Self> {
        let text = std::str::from_utf8(text).ok().filter(|text| !text.is_empty())?;
        // `try_parse` also takes braces, URNs and digits alone; only the canonical form is 36 bytes long.
        Some(match Uuid::try_parse(text) {
            Ok(uuid) if text.len() == 36 => Self::Uuid(uuid),
            _ => Self::Name(text.to_owned()),
        })
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Uuid(uuid) => write!(f, "{uuid}"),
            // Names come from outside: quotes and control characters must not shape a log line.
            Self::Name(name) => write!(f, "{}", name.escape_debug()),
        }
    }
}

/// Permission to act on one domain. The hypervisor takes nothing less, and only [`authorize`] gives it.
#[derive(Debug)]
pub struct Authorized {
    op: Op,
    target: Target,
}

impl Authorized {
    /// What to do.
    #[must_use]
    pub fn op(&self) -> Op {
        self.op
    }

    /// Which domain to do it to.
    #[must_use]
    pub fn target(&self) -> &Target {
        &self.target
    }

    /// A permission out of nowhere, for tests of what acts on one.
    #[cfg(test)]
    pub(crate) fn dangerous_for_test(op: Op, target: Target) -> Self {
        Self { op, target }
    }
}

/// Why an authenticated request is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    /// The configuration has groups, and none of them has both the asking address and the target.
    #[error(
        "no group has both {ip} and {target}: add `ip = \"{ip}\"` and `uuid = \"{target}\"` to one group if it should"
    )]
    NotInAGroup {
        /// The call-back address.
        ip: IpAddr,
        /// The target as the request spelled it.
        target: Target,
    },
    /// The request is signed with a group's own key. No group of that key has both the asking address and the target.
    #[error("no group whose key signed this has both {ip} and {target}")]
    NotWithThisKey {
        /// The callback address.
        ip: IpAddr,
        /// The target as the request spelled it.
        target: Target,
    },
}

/// Whether an authenticated peer may do `op` to `target`.
///
/// As with stock servers the callback address counts. A group that lists a UUID does not allow its domain's name, nor the
/// other way round.
///
/// # Errors
/// [`Denied`] with the reason, for the log.
pub fn authorize(groups: &Groups, peer: &Authenticated, op: Op, target: Target) -> Result<Authorized, Denied> {
    let (ip, owner) = (peer.ip(), peer.owner());
    if permits(groups, owner, ip, &target) {
        Ok(Authorized { op, target })
    } else if owner == KeyOwner::EVERYBODY {
        Err(Denied::NotInAGroup { ip, target })
    } else {
        Err(Denied::NotWithThisKey { ip, target })
    }
}

/// Whether [`authorize`] would permit a peer at this callback address to act on the target. It is no permission: nobody has
/// authenticated yet.
#[must_use]
pub fn permits(groups: &Groups, owner: KeyOwner, ip: IpAddr, target: &Target) -> bool {
    allows(groups, owner, ip, |listed| spells(listed, target))
}

/// Whether a request that is signed with this owner's key may name this callback address at all.
///
/// A group's own key counts for the group's addresses only. The listener's key does not count for an address that stands in
/// groups with a key of their own alone. Else the holder of one key could have another group's client called back, which would
/// fail for that client; and could use up what that address may send.
#[must_use]
pub fn may_ask(groups: &Groups, owner: KeyOwner, ip: IpAddr) -> bool {
    let Groups::Only(all) = groups else { return true };
    let mut there = all.iter().filter(|group| group.ips.contains(&ip)).map(|group| group.owner).peekable();
    (owner == KeyOwner::EVERYBODY && there.peek().is_none()) || there.any(|of_group| of_group == owner)
}

/// Whether a host list for `peer` shows the domain: whether it could fence it under one of its two spellings.
#[must_use]
pub fn may_see(groups: &Groups, peer: &Authenticated, name: &str, uuid: Uuid) -> bool {
    let (by_uuid, by_name) = (Target::Uuid(uuid), Target::Name(name.to_owned()));
    allows(groups, peer.owner(), peer.ip(), |listed| spells(listed, &by_uuid) || spells(listed, &by_name))
}

fn allows(groups: &Groups, owner: KeyOwner, ip: IpAddr, is_target: impl Fn(&str) -> bool) -> bool {
    match groups {
        Groups::Everyone => true,
        Groups::Only(groups) => {
            let mut of_owner = groups.iter().filter(|group| group.owner == owner);
            of_owner.any(|group| group.ips.contains(&ip) && group.uuids.iter().any(|listed| is_target(listed)))
        }
    }
}

/// An entry of a group that permits nothing here: no domain has this name or UUID.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unmatched {
    /// The group's name, if it has one.
    pub group: Option<String>,
    /// The `uuid` entry as written.
    pub entry: String,
}

/// The entries of `groups` that are no domain among `domains`, in the order of the file. `domains` are names and UUIDs.
#[must_use]
pub fn unmatched(groups: &Groups, domains: &[(&str, Uuid)]) -> Vec<Unmatched> {
    let Groups::Only(groups) = groups else { return Vec::new() };
    let targets: Vec<_> =
        domains.iter().flat_map(|(name, uuid)| [Target::Name((*name).to_owned()), Target::Uuid(*uuid)]).collect();
    let entries = groups.iter().flat_map(|group| group.uuids.iter().map(|entry| (&group.name, entry)));
    entries
        .filter(|(_, entry)| !targets.iter().any(|target| spells(entry, target)))
        .map(|(group, entry)| Unmatched { group: group.clone(), entry: entry.clone() })
        .collect()
}

/// Whether a group's `uuid` entry is the target. UUIDs are compared as values. Names are compared without regard to the case
/// of ASCII letters, as stock servers do; libvirt then looks for the name as the request spells it.
fn spells(listed: &str, target: &Target) -> bool {
    match (Target::parse(listed.as_bytes()), target) {
        (Some(Target::Uuid(listed)), Target::Uuid(uuid)) => listed == *uuid,
        (Some(Target::Name(listed)), Target::Name(name)) => listed.eq_ignore_ascii_case(name),
        (Some(Target::Uuid(_)), Target::Name(_)) | (Some(Target::Name(_)), Target::Uuid(_)) | (None, _) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Group;

    const UUID: &str = "6695eb01-f6a4-8304-79aa-97f2502e193f";

    fn group(ips: &[&str], uuids: &[&str]) -> Group {
        Group {
            ips: ips.iter().map(|ip| ip.parse().unwrap()).collect(),
            uuids: uuids.iter().map(|uuid| (*uuid).to_owned()).collect(),
            ..Group::default()
        }
    }

    fn ask(groups: &Groups, ip: &str, target: &str) -> bool {
        permits(groups, KeyOwner::EVERYBODY, ip.parse().unwrap(), &Target::parse(target.as_bytes()).unwrap())
    }

    /// Two groups with keys of their own, and one that goes by the listener's. `10.0.0.9` is in the first and in the last.
    fn keyed() -> Groups {
        let owned = |owner, group: Group| Group { owner: KeyOwner(owner), ..group };
        Groups::Only(vec![
            owned(1, group(&["10.0.0.1", "10.0.0.9"], &["a"])),
            owned(2, group(&["10.0.0.2"], &["b"])),
            group(&["10.0.0.3", "10.0.0.9"], &["c"]),
        ])
    }

    #[test]
    fn a_groups_own_key_counts_in_it_and_no_other_does() {
        let groups = keyed();
        let mut permitted = Vec::new();
        for owner in 0..4 {
            for ip in ["10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.9", "10.0.0.4"] {
                for target in ["a", "b", "c", "d"] {
                    let target = Target::Name(target.to_owned());
                    if permits(&groups, KeyOwner(owner), ip.parse().unwrap(), &target) {
                        permitted.push(format!("{owner} {ip} {target}"));
                    }
                }
            }
        }
        let expected = ["0 10.0.0.3 c", "0 10.0.0.9 c", "1 10.0.0.1 a", "1 10.0.0.9 a", "2 10.0.0.2 b"];
        assert_eq!(permitted, expected, "who signs with the key of one group and names the address of another");
    }

    #[test]
    fn nobody_has_an_address_called_back_that_is_in_no_group_of_the_key() {
        let groups = keyed();
        let asks = |owner, ip: &str| may_ask(&groups, KeyOwner(owner), ip.parse().unwrap());
        let may = |owner| ["10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.9", "10.0.0.4"].map(|ip| asks(owner, ip));
        // An address that is in no group at all is told so, if it has the listener's key.
        assert_eq!(may(0), [false, false, true, true, true]);
        assert_eq!(may(1), [true, false, false, true, false]);
        assert_eq!(may(2), [false, true, false, false, false]);
        assert!(may_ask(&Groups::Everyone, KeyOwner::EVERYBODY, "10.0.0.1".parse().unwrap()));
    }

    #[test]
    fn only_the_canonical_form_is_a_uuid() {
        assert!(matches!(Target::parse(UUID.as_bytes()), Some(Target::Uuid(_))));
        assert_eq!(Target::parse(UUID.as_bytes()), Target::parse(UUID.to_uppercase().as_bytes()));
        for name in ["6695eb01f6a4830479aa97f2502e193f", "{6695eb01-f6a4-8304-79aa-97f2502e193f}", "node1", "a b"] {
            assert_eq!(Target::parse(name.as_bytes()), Some(Target::Name(name.to_owned())));
        }
        assert_eq!(Target::parse(b""), None);
        assert_eq!(Target::parse(b"\xff"), None);
    }

    #[test]
    fn a_name_cannot_shape_a_log_line() {
        assert_eq!(Target::Name("a\n\"b".to_owned()).to_string(), r#"a\n\"b"#);
    }

    #[test]
    fn names_are_compared_without_regard_to_case() {
        let groups = Groups::Only(vec![group(&["192.168.122.11"], &["CVM1", "Straße"])]);
        for target in ["cvm1", "CVM1", "Cvm1", "STRAße"] {
            assert!(ask(&groups, "192.168.122.11", target), "{target}");
        }
        for target in ["cvm", "cvm11", "cvm 1", "STRASSE"] {
            assert!(!ask(&groups, "192.168.122.11", target), "{target}");
        }
    }

    #[test]
    fn entries_that_no_domain_has_are_found() {
        let groups = Groups::Only(vec![group(&["192.168.122.11"], &["CVM1", "cvm11", UUID, &UUID.replace('6', "7")])]);
        let found = unmatched(&groups, &[("cvm1", Uuid::nil()), ("other", UUID.parse().unwrap())]);
        let entries: Vec<_> = found.iter().map(|unmatched| unmatched.entry.as_str()).collect();
        assert_eq!(entries, ["cvm11", &UUID.replace('6', "7")]);
        assert_eq!(unmatched(&Groups::Everyone, &[]), []);
    }

    #[test]
    fn address_and_target_must_stand_in_the_same_group() {
        let groups = Groups::Only(vec![group(&["192.168.122.11"], &["node1", UUID]), group(&["fd00::12"], &["node2"])]);
        assert!(ask(&groups, "192.168.122.11", "node1"));
        assert!(ask(&groups, "192.168.122.11", &UUID.to_uppercase()));
        assert!(ask(&groups, "fd00::12", "node2"));
        for (ip, target) in [("192.168.122.11", "node2"), ("fd00::12", "node1"), ("192.168.122.12", "node1")] {
            assert!(!ask(&groups, ip, target), "{ip} {target}");
        }
        assert!(ask(&Groups::Everyone, "192.0.2.1", "anything"));
        assert!(!ask(&Groups::Only(vec![]), "192.168.122.11", "node1"));
    }
}
