//! An open question, and what the hosts have said of it.

use alloc::collections::{BTreeMap, BTreeSet};
use alloc::string::String;
use alloc::vec::Vec;

use uuid::Uuid;

use super::FENCING_EVERY;
use super::inputs::{ActEnd, HostDomain, Incarnation, Member, NodeId, Question};
use super::records::Sought;
use crate::wire::Op;

/// What a host found in one round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// The domain does not run there, and has not run there since the question.
    Clear,
    /// The host acts on it.
    Acting,
    /// The host has acted, and nothing has appeared since.
    Ended,
    /// The host wanted to act, and nothing was there any more. It has to look again.
    Gone,
}

/// A host's answer to one round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Said {
    pub(super) round: u32,
    pub(super) found: Found,
    pub(super) changes: u64,
}

/// What one member has said of a question.
#[derive(Clone, Debug, Default)]
pub(super) struct Testimony {
    pub(super) before: Option<Said>,
    pub(super) last: Option<Said>,
    /// Whether it has said that the domain runs there.
    pub(super) is_owner: bool,
    pub(super) end: Option<(ActEnd, u64)>,
    pub(super) doubt: Option<String>,
    /// The round that it has answered with a doubt last.
    pub(super) doubted: u32,
    /// The domain's UUID and name, if it is defined there.
    pub(super) definition: Option<(Uuid, String)>,
    pub(super) list: Option<Vec<HostDomain>>,
    pub(super) is_well: bool,
}

impl Testimony {
    pub(super) fn is_proven(&self) -> bool {
        matches!(self.end, Some((ActEnd::ProvenOff, _))) || self.last.is_some_and(|last| last.found == Found::Ended)
    }

    /// The last round that it has answered.
    pub(super) fn answers(&self) -> u32 {
        self.last.map_or(0, |last| last.round).max(self.doubted)
    }

    /// Whether it says of the moment when `round` was sent that the domain did not run there, or
    /// that all that ran there is killed or being killed.
    pub(super) fn is_settled(&self, round: u32) -> bool {
        let Some(last) = self.last.filter(|last| last.round == round) else { return false };
        let before = self.before.filter(|before| before.round.saturating_add(1) == round);
        let is_same = before.is_some_and(|before| before.found == last.found && before.changes == last.changes);
        match last.found {
            Found::Acting => true,
            Found::Gone => false,
            Found::Clear => is_same,
            // Either of two looks, or the proof and a look.
            Found::Ended => is_same || self.end.as_ref().is_some_and(|(_, changes)| *changes == last.changes),
        }
    }
}

/// Where a question is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    Asking,
    /// A member was ordered to start the domain.
    Starting(Member),
}

/// An open question of this host.
#[derive(Clone, Debug)]
pub(super) struct Asked {
    pub(super) question: Question,
    pub(super) by: u64,
    pub(super) round: u32,
    /// The epoch when the round was sent.
    pub(super) epoch: u64,
    pub(super) audience: BTreeMap<Member, Incarnation>,
    pub(super) testimonies: BTreeMap<Member, Testimony>,
    /// The configured hosts, also those that were removed since.
    pub(super) configured: BTreeSet<NodeId>,
    /// The hosts that were proven fenced when the round was sent.
    pub(super) fenced: BTreeSet<NodeId>,
    pub(super) sought: Sought,
    pub(super) stage: Stage,
    pub(super) fencing_asked: Option<u64>,
    /// Whether its client runs on another host.
    pub(super) is_remote: bool,
}

impl Asked {
    pub(super) fn wake(&self) -> u64 {
        let fencing = self.fencing_asked.map_or(u64::MAX, |at| at.saturating_add(FENCING_EVERY));
        self.by.min(fencing)
    }

    pub(super) fn op(&self) -> Op {
        self.question.op
    }

    /// Whether another daemon of a member's host answers for it: one that is there runs the domain,
    /// or one has proven it off.
    pub(super) fn is_covered(&self, member: &Member, is_there: impl Fn(&Member) -> bool) -> bool {
        let others = self.testimonies.iter().filter(|(other, _)| other.node == member.node && *other != member);
        let mut owners = others.filter(|(_, one)| one.is_owner);
        owners.any(|(other, one)| is_there(other) || one.is_proven())
    }

    /// Whether a daemon of this host has proven that the domain is off there, and none has failed.
    pub(super) fn is_proven(&self, node: NodeId) -> bool {
        self.testimonies.iter().any(|(member, one)| member.node == node && one.is_proven())
    }

    /// Whether a member runs the domain, or has killed it.
    pub(super) fn has_owner(&self, present: impl Fn(&Member) -> bool) -> bool {
        self.testimonies.iter().any(|(member, one)| one.is_owner && (present(member) || one.is_proven()))
    }
}
