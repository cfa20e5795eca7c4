//! Every operation on a domain in every state, in every spelling, from guests with and without
//! permission.

use std::net::IpAddr;

use fence_common::wire::Op;
use fence_lab::testdriver::{State, TestDomain, uuid};

use crate::scene::{Case, Expected, Scene};
use crate::talk::{self, HostList, Record};

/// A domain's state before the request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Before {
    /// Persistent, and in this state.
    Defined(State),
    /// Transient and running.
    Transient,
    /// Not existing.
    Unknown,
}

impl Before {
    fn all() -> impl Iterator<Item = Self> {
        State::ALL.into_iter().map(Self::Defined).chain([Self::Transient, Self::Unknown])
    }

    fn name(self) -> &'static str {
        match self {
            Self::Defined(state) => state.name(),
            Self::Transient => "transient",
            Self::Unknown => "unknown",
        }
    }
}

/// A request's spelling of the domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Spelling {
    Name,
    Uuid,
    UpperUuid,
}

impl Spelling {
    const ALL: [Self; 3] = [Self::Name, Self::Uuid, Self::UpperUuid];

    fn name(self) -> &'static str {
        match self {
            Self::Name => "name",
            Self::Uuid => "uuid",
            Self::UpperUuid => "UUID",
        }
    }

    fn of(self, domain: &TestDomain) -> String {
        match self {
            Self::Name => domain.name.clone(),
            Self::Uuid => domain.uuid.clone(),
            Self::UpperUuid => domain.uuid.to_uppercase(),
        }
    }
}

/// What the groups say about the client's guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Groups {
    /// The configuration has no groups.
    None,
    /// The guest is in a group with the domain's name.
    ByName,
    /// The guest is in a group with the domain's UUID.
    ByUuid,
    /// The guest is in one group, the domain in another.
    OtherGroup,
    /// The guest is in no group.
    Nowhere,
}

impl Groups {
    /// The variants of a configuration with groups, each with its guest.
    const LISTED: [(Self, usize); 4] =
        [(Self::ByName, 1), (Self::ByUuid, 2), (Self::OtherGroup, 3), (Self::Nowhere, 4)];

    fn name(self) -> &'static str {
        match self {
            Self::None => "free",
            Self::ByName => "by-name",
            Self::ByUuid => "by-uuid",
            Self::OtherGroup => "other-group",
            Self::Nowhere => "nowhere",
        }
    }

    /// Whether a list shows the domains to the guest.
    fn show(self) -> bool {
        matches!(self, Self::None | Self::ByName | Self::ByUuid)
    }

    fn allow(self, spelling: Spelling) -> bool {
        match self {
            Self::None => true,
            Self::ByName => spelling == Spelling::Name,
            Self::ByUuid => spelling != Spelling::Name,
            Self::OtherGroup | Self::Nowhere => false,
        }
    }
}

/// The reply and the final state that the documents of the protocol promise.
fn promised(op: Op, before: Before, allowed: bool) -> (u8, &'static str) {
    let is = before.name();
    let is = if before == Before::Transient { "running" } else { is };
    let off = Before::Defined(State::ShutOff);
    match (op, before) {
        (Op::Null, _) => (1, is),
        (Op::DevStatus | Op::HostList, _) => (0, is),
        _ if !allowed => (3, is),
        (Op::Status, Before::Unknown) => (2, is),
        (Op::Off | Op::On | Op::Reboot, Before::Unknown) => (1, is),
        (Op::Off, Before::Transient) => (0, "unknown"),
        (Op::Off, Before::Defined(_)) => (0, "off"),
        (Op::Reboot, before) => (0, if before == off { "off" } else { "running" }),
        (Op::On, before) => (0, if before == off { "running" } else { is }),
        (Op::Status, before) => (if before == off { 2 } else { 0 }, is),
    }
}

/// One combination of the product.
struct Combination {
    op: Op,
    before: Before,
    spelling: Spelling,
    domain: TestDomain,
}

/// The cases and domains of one variant of groups. The domains' numbers begin with `first`, and
/// guest `guest` is the client.
fn product(groups: Groups, guest: usize, first: usize) -> (Vec<Case>, Vec<TestDomain>) {
    let mut combinations = Vec::new();
    for op in Op::ALL {
        for before in Before::all() {
            for spelling in Spelling::ALL {
                let name = format!("{}-{}-{}-{}", op.name(), before.name(), spelling.name(), groups.name());
                let state = if let Before::Defined(state) = before { state } else { State::Running };
                let domain = TestDomain::new(&name, &uuid(first + combinations.len()), state);
                let domain = TestDomain { transient: before == Before::Transient, ..domain };
                combinations.push(Combination { op, before, spelling, domain });
            }
        }
    }
    let known = combinations.iter().filter(|combination| combination.before != Before::Unknown);
    let domains: Vec<_> = known.map(|combination| combination.domain.clone()).collect();
    let visible = if groups.show() { domains.as_slice() } else { &[] };
    let cases = combinations.iter().map(|combination| case(combination, groups, guest, visible)).collect();
    (cases, domains)
}

fn case(combination: &Combination, groups: Groups, guest: usize, visible: &[TestDomain]) -> Case {
    let Combination { op, before, spelling, domain } = combination;
    let (reply, after) = promised(*op, *before, groups.allow(*spelling));
    let said = if *op == Op::HostList {
        let record = |domain: &TestDomain| Record {
            name: domain.name.clone(),
            uuid: domain.uuid.clone(),
            state: domain.state as u8,
        };
        steady(HostList { records: visible.iter().map(record).collect() }, &domain.name)
    } else {
        talk::reply(reply)
    };
    let (op, own, spelled) = (*op, domain.name.clone(), spelling.of(domain));
    let case =
        Case::new(domain.name.clone(), Expected::both(format!("{said}, then {after}")), move |stage, watched| {
            let said = talk::answer(stage, guest, watched, op, &spelled)?;
            Ok(match HostList::parse(&said, !stage.is_stock()) {
                Some(list) => steady(list, &own),
                None => talk::described(&said),
            })
        });
    case.and_state_of(domain.name.clone())
}

/// The part of a list that does not depend on concurrent cases: this domain's own state, and no
/// domain that is gone when it is off.
fn steady(list: HostList, own: &str) -> String {
    let mut records = list.records;
    records.retain(|record| !record.name.starts_with("off-transient"));
    records.iter_mut().filter(|record| record.name != own).for_each(|record| record.state = 0);
    records.sort_unstable();
    HostList { records }.described()
}

fn group(name: &str, ip: IpAddr, targets: impl IntoIterator<Item = String>) -> String {
    let targets: String = targets.into_iter().map(|target| format!("\t\tuuid = \"{target}\";\n")).collect();
    format!("\tgroup {{\n\t\tname = \"{name}\";\n\t\tip = \"{ip}\";\n{targets}\t}}\n")
}

pub(crate) fn scenes() -> Vec<Scene> {
    let (cases, domains) = product(Groups::None, 1, 1);
    let free = Scene::new("matrix-free", domains, cases);

    let parts: Vec<_> = Groups::LISTED.iter().map(|(groups, guest)| product(*groups, *guest, guest * 1000)).collect();
    let mut sections = Vec::new();
    let all: Vec<TestDomain> = parts.iter().flat_map(|(_, domains)| domains.clone()).collect();
    for ((groups, guest), (cases, _)) in Groups::LISTED.iter().zip(&parts) {
        // A list names unknown domains too: they could belong to another hypervisor.
        let names = cases.iter().map(|case| case.name.clone());
        let uuids = (0..cases.len()).map(|number| uuid(guest * 1000 + number));
        match groups {
            Groups::ByName => sections.push((*guest, names.collect::<Vec<_>>())),
            Groups::ByUuid => sections.push((*guest, uuids.collect())),
            Groups::OtherGroup => sections.push((*guest, vec!["somebody-else".to_owned()])),
            Groups::None | Groups::Nowhere => {}
        }
    }
    let cases = parts.into_iter().flat_map(|(cases, _)| cases).collect();
    let everything: Vec<_> = all.iter().map(|domain| domain.uuid.clone()).collect();
    let grouped = Scene { guests: 5, ..Scene::new("matrix-groups", all, cases) };
    let grouped = grouped.configured(move |config, guests| {
        let mut text = String::new();
        for (guest, targets) in &sections {
            if let Some(ip) = guests.get(guest - 1).map(|guest| guest.v4) {
                text.push_str(&group(&format!("guest{guest}"), ip.into(), targets.clone()));
            }
        }
        if let Some(last) = guests.last() {
            text.push_str(&group("all", last.v4.into(), everything.clone()));
        }
        config.more = format!("groups {{\n{text}}}\n");
    });
    vec![free, grouped]
}
