//! What a question costs: messages and bytes, in groups where nothing fails.

use fence_common::hosts::{GroupAnswer, HostDomain, HostsOptions, LocalState};
use fence_common::target::Target;
use fence_common::wire::Op;
use uuid::Uuid;

use crate::group::{Group, request};
use crate::world::{NAME, UUID};

/// How many domains each host has.
const DOMAINS: u64 = 50;

/// Messages and their bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Cost {
    pub(crate) messages: usize,
    pub(crate) bytes: usize,
}

fn group(hosts: usize) -> Group {
    let mut group = Group::apart(&(0..hosts).collect::<Vec<_>>(), HostsOptions::default());
    for (host, seat) in group.seats.iter_mut().enumerate() {
        seat.hosts.domains((0..DOMAINS).map(|domain| HostDomain {
            uuid: Uuid::from_u64_pair(u64::try_from(host).unwrap(), domain),
            name: format!("machine-{host:02}-{domain:02}"),
            state: 1,
        }));
    }
    group
}

fn cost(group: &Group, begin: usize) -> Cost {
    let sent = &group.sent[begin..];
    Cost { messages: sent.len(), bytes: sent.iter().map(|(_, bytes)| bytes.len()).sum() }
}

/// The cost of an `off` whose victim runs on another host.
pub(crate) fn of_off(hosts: usize) -> Cost {
    let mut group = group(hosts);
    group.join(&(0..hosts).collect::<Vec<_>>());
    group.seats[1].state = LocalState::RunsHere;
    let begin = group.sent.len();
    let request = request(Op::Off, 1);
    group.seats[0].hosts.heard(group.now, request);
    group.run();
    let answer = group.ask_of(0, Op::Off, request, Target::Name(NAME.into()));
    assert_eq!(answer, Some(GroupAnswer::Success), "{UUID}");
    group.seats[0].hosts.answered(request, true);
    group.run();
    cost(&group, begin)
}

/// The cost of one more daemon that joins.
pub(crate) fn of_joining(hosts: usize) -> Cost {
    let mut group = group(hosts);
    group.join(&(0..hosts - 1).collect::<Vec<_>>());
    let begin = group.sent.len();
    group.join(&(0..hosts).collect::<Vec<_>>());
    cost(&group, begin)
}
