//! What the groups permit: which client may fence which domain, and sign with which key.

use fence_common::caller::{Address, Vouched, Who};
use fence_common::keys::KeyOwner;
use fence_common::target::Target;
use uuid::Uuid;

use super::groups::{Group, Groups};

/// A group's entry that permits nothing: no domain has this name or UUID.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unmatched {
    /// The group's name, if it has one.
    pub group: Option<String>,
    /// The `uuid` entry as written.
    pub entry: String,
}

impl Groups {
    /// Whether this client may act on the target. A UUID in a group does not
    /// permit the domain's name, nor a name its UUID. This check comes before authentication, so it
    /// is no permission yet.
    #[must_use]
    pub fn permits(&self, owner: KeyOwner, who: &Who<'_>, target: &Target) -> bool {
        self.allows(owner, who, |listed| spells(listed, target))
    }

    /// Whether a request signed with this owner's key may name this callback address at all.
    ///
    /// A group's own key counts for the group's addresses only. The listener's key does not count
    /// for an address whose groups all have their own keys. Otherwise the holder of one key could
    /// have another group's client called back. That callback would fail, and it would use up the
    /// client's rate limit.
    #[must_use]
    pub fn may_ask(&self, owner: KeyOwner, who: &Who<'_>) -> bool {
        let Self::Only(all) = self else { return true };
        let mut there = all.iter().filter(|group| group.has(who)).map(|group| group.owner).peekable();
        (owner == KeyOwner::EVERYBODY && there.peek().is_none()) || there.any(|of_group| of_group == owner)
    }

    /// Whether the client could act on the target if it came to another listener.
    #[must_use]
    pub fn permits_elsewhere(&self, owner: KeyOwner, who: &Who<'_>, target: &Target) -> bool {
        let Self::Only(groups) = self else { return false };
        let mut others = groups.iter().filter(|group| group.owner == owner && !group.counts_at(who.listener));
        others.any(|group| group.lists(who) && group.uuids.iter().any(|listed| spells(listed, target)))
    }

    /// Whether a host list for this client shows the domain: whether the client could fence it by
    /// its name or its UUID.
    #[must_use]
    pub fn may_see(&self, owner: KeyOwner, who: &Who<'_>, name: &str, uuid: Uuid) -> bool {
        let (by_uuid, by_name) = (Target::Uuid(uuid), Target::Name(name.to_owned()));
        self.allows(owner, who, |listed| spells(listed, &by_uuid) || spells(listed, &by_name))
    }

    fn allows(&self, owner: KeyOwner, who: &Who<'_>, is_target: impl Fn(&str) -> bool) -> bool {
        match self {
            Self::Everyone => true,
            Self::Only(groups) => {
                let mut of_owner = groups.iter().filter(|group| group.owner == owner);
                of_owner.any(|group| group.has(who) && group.uuids.iter().any(|listed| is_target(listed)))
            }
        }
    }

    /// The entries that match none of `domains` (names and UUIDs), in the file's order.
    #[must_use]
    pub fn unmatched(&self, domains: &[(&str, Uuid)]) -> Vec<Unmatched> {
        let Self::Only(groups) = self else { return Vec::new() };
        let targets: Vec<_> =
            domains.iter().flat_map(|(name, uuid)| [Target::Name((*name).to_owned()), Target::Uuid(*uuid)]).collect();
        let entries = groups.iter().flat_map(|group| group.uuids.iter().map(|entry| (&group.name, entry)));
        entries
            .filter(|(_, entry)| !targets.iter().any(|target| spells(entry, target)))
            .map(|(group, entry)| Unmatched { group: group.clone(), entry: entry.clone() })
            .collect()
    }
}

impl Group {
    /// Whether the group counts at the listener with this number.
    #[must_use]
    pub fn counts_at(&self, listener: usize) -> bool {
        self.listeners.is_empty() || self.listeners.contains(&listener)
    }

    /// Whether a client is in the group.
    fn has(&self, who: &Who<'_>) -> bool {
        self.counts_at(who.listener) && self.lists(who)
    }

    /// Whether the group names a client, at whichever listener.
    fn lists(&self, who: &Who<'_>) -> bool {
        let by_address = match who.address {
            Address::Ip(ip) => self.ips.contains(&ip),
            Address::Cid(cid) => self.cids.contains(&cid),
            // As with fence_virtd, a domain that is listed by its UUID may ask over its line.
            Address::Domain(uuid) => self.uuids.iter().any(|listed| names_a_uuid(listed) == Some(uuid)),
        };
        by_address || who.domain.is_some_and(|domain| self.from.iter().any(|listed| is_called(listed, domain)))
    }
}

/// The UUID that a group's entry is.
pub(super) fn names_a_uuid(listed: &str) -> Option<Uuid> {
    match Target::parse(listed.as_bytes()) {
        Some(Target::Uuid(uuid)) => Some(uuid),
        Some(Target::Name(_)) | None => None,
    }
}

/// Whether a group's `from` entry means this domain. Its UUID and its name are both known. Names
/// count letter by letter: libvirt tells `a` and `A` apart.
fn is_called(listed: &str, domain: &Vouched) -> bool {
    match Target::parse(listed.as_bytes()) {
        Some(Target::Uuid(uuid)) => uuid == domain.uuid,
        Some(Target::Name(name)) => name == domain.name,
        None => false,
    }
}

/// Whether a group's `uuid` entry matches the target. UUIDs are compared as values. Names are
/// compared regardless of the case of ASCII letters, as in fence_virtd. libvirt then looks up the
/// name as the request spells it.
fn spells(listed: &str, target: &Target) -> bool {
    match (Target::parse(listed.as_bytes()), target) {
        (Some(Target::Uuid(listed)), Target::Uuid(uuid)) => listed == *uuid,
        (Some(Target::Name(listed)), Target::Name(name)) => listed.eq_ignore_ascii_case(name),
        (Some(Target::Uuid(_)), Target::Name(_)) | (Some(Target::Name(_)), Target::Uuid(_)) | (None, _) => false,
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;

    const UUID: &str = "6695eb01-f6a4-8304-79aa-97f2502e193f";

    fn group(ips: &[&str], uuids: &[&str]) -> Group {
        Group {
            ips: ips.iter().map(|ip| ip.parse().unwrap()).collect(),
            uuids: uuids.iter().map(|uuid| (*uuid).to_owned()).collect(),
            ..Group::default()
        }
    }

    fn at(ip: &str) -> Who<'static> {
        Who::of(ip.parse::<IpAddr>().unwrap().into(), 0)
    }

    fn ask(groups: &Groups, ip: &str, target: &str) -> bool {
        groups.permits(KeyOwner::EVERYBODY, &at(ip), &Target::parse(target.as_bytes()).unwrap())
    }

    /// Two groups with keys of their own, and one without. `10.0.0.9` is in the first and in the
    /// last.
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
                    if groups.permits(KeyOwner(owner), &at(ip), &target) {
                        permitted.push(format!("{owner} {ip} {target}"));
                    }
                }
            }
        }
        let expected = ["0 10.0.0.3 c", "0 10.0.0.9 c", "1 10.0.0.1 a", "1 10.0.0.9 a", "2 10.0.0.2 b"];
        assert_eq!(permitted, expected, "who signs with the key of one group and names the address of another");
    }

    #[test]
    fn only_addresses_of_the_keys_group_are_called_back() {
        let groups = keyed();
        let asks = |owner, ip: &str| groups.may_ask(KeyOwner(owner), &at(ip));
        let may = |owner| ["10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.9", "10.0.0.4"].map(|ip| asks(owner, ip));
        // A client that is in no group is answered so, if it has the listener's key.
        assert_eq!(may(0), [false, false, true, true, true]);
        assert_eq!(may(1), [true, false, false, true, false]);
        assert_eq!(may(2), [false, true, false, false, false]);
        assert!(Groups::Everyone.may_ask(KeyOwner::EVERYBODY, &at("10.0.0.1")));
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
        let found = groups.unmatched(&[("cvm1", Uuid::nil()), ("other", UUID.parse().unwrap())]);
        let entries: Vec<_> = found.iter().map(|unmatched| unmatched.entry.as_str()).collect();
        assert_eq!(entries, ["cvm11", &UUID.replace('6', "7")]);
        assert_eq!(Groups::Everyone.unmatched(&[]), []);
    }

    #[test]
    fn from_permits_the_domain_that_the_hypervisor_vouches_for_and_nobody_by_ip() {
        let from = |entries: &[&str]| Group {
            from: entries.iter().map(|entry| (*entry).to_owned()).collect(),
            ..group(&[], &["victim"])
        };
        let domain = |name: &str, uuid: &str| Vouched { name: name.to_owned(), uuid: uuid.parse().unwrap() };
        let other = UUID.replace('6', "7");
        let (one, two) = (domain("node1", UUID), domain("node2", &other));
        let victim = Target::Name("victim".to_owned());
        let asks = |entry: &str, address: Address, domain| {
            let groups = Groups::Only(vec![from(&[entry])]);
            groups.permits(KeyOwner::EVERYBODY, &Who { domain, ..Who::of(address, 0) }, &victim)
        };
        let cid = Address::Cid(7);
        for entry in ["node1", UUID, &UUID.to_uppercase()] {
            assert!(asks(entry, cid, Some(&one)) && asks(entry, Address::Domain(one.uuid), Some(&one)), "{entry}");
            assert!(!asks(entry, cid, Some(&two)), "{entry}: another domain");
            assert!(!asks(entry, cid, None), "{entry}: an unknown number");
            assert!(!asks(entry, at("10.0.0.1").address, None), "{entry}: an IP address");
        }
        // A number counts for whichever machine has it.
        let by_number = Groups::Only(vec![Group { cids: vec![7], ..group(&[], &["victim"]) }]);
        let numbered = |address| by_number.permits(KeyOwner::EVERYBODY, &Who::of(address, 0), &victim);
        assert!(numbered(cid) && !numbered(Address::Cid(8)) && !numbered(at("0.0.0.7").address));
        // libvirt may have both, and the number is no name.
        assert!(!asks("NODE1", cid, Some(&one)) && !asks("7", cid, Some(&one)) && !asks("", cid, Some(&one)));
        // Its key counts for it, and the listener's does not.
        let keyed = Groups::Only(vec![Group { owner: KeyOwner(1), ..from(&["node1"]) }]);
        let may = |owner, domain| keyed.may_ask(KeyOwner(owner), &Who { domain, ..Who::of(cid, 0) });
        assert_eq!(
            [may(1, Some(&one)), may(0, Some(&one)), may(1, None), may(1, Some(&two))],
            [true, false, false, false]
        );
    }

    #[test]
    fn a_group_counts_at_its_listeners_only_and_so_does_its_key() {
        let at_one = |group: Group| Group { listeners: vec![1], ..group };
        let groups = Groups::Only(vec![at_one(group(&["10.0.0.1"], &["a"])), group(&["10.0.0.2"], &["b"])]);
        let own_key = Group { owner: KeyOwner(1), ..at_one(group(&["10.0.0.1"], &["a"])) };
        let keyed = Groups::Only(vec![own_key]);
        let victim = |name: &str| Target::Name(name.to_owned());
        let came = |ip: &str, listener| Who { listener, ..at(ip) };
        let everybody = KeyOwner::EVERYBODY;
        for listener in 0..3 {
            let (first, second) = (came("10.0.0.1", listener), came("10.0.0.2", listener));
            let there = listener == 1;
            assert_eq!(groups.permits(everybody, &first, &victim("a")), there, "{listener}");
            assert_eq!(groups.permits_elsewhere(everybody, &first, &victim("a")), !there, "{listener}");
            assert_eq!(groups.may_see(everybody, &first, "a", Uuid::nil()), there, "{listener}");
            assert!(groups.permits(everybody, &second, &victim("b")), "{listener}: a group without listeners");
            assert!(!groups.permits_elsewhere(everybody, &second, &victim("a")), "{listener}: another's");
            assert_eq!(keyed.may_ask(KeyOwner(1), &first), there, "{listener}: its key");
            // Elsewhere the address is in no group. With the listener's key it is answered so.
            assert_eq!(keyed.may_ask(everybody, &first), !there, "{listener}: the listener's key");
        }
        assert!(!Groups::Everyone.permits_elsewhere(everybody, &came("10.0.0.1", 0), &victim("a")));
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
