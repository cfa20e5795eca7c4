//! Fence races across hosts: two guests fence each other, and at most one may die.
//!
//! The total order decides. A guest whose fence was delivered first must not have its own order
//! carried out before that fence has ended. Every host sees the same order, so no vote is needed:
//! the host that would act on the later order holds it back. If the earlier fence is proven, the
//! later order's client is dead and the order is refused. If it fails, the order is carried out.
//!
//! A client is known by its domain: the hypervisor vouches for that, or its Ethernet address tells
//! it. Hosts tell each other of the addresses. A client that nobody knows is believed, as on one
//! host.

use alloc::collections::{BTreeMap, BTreeSet};
use alloc::string::String;
use alloc::vec::Vec;

use uuid::Uuid;

use super::message::{QuestionId, Word};
use super::records::Sought;
use super::{ActEnd, Hosts, HostsRule, Member, Message, Question, nanos};
use crate::caller::Vouched;
use crate::ledger::{REMEMBER, RequestId};
use crate::wire::Op;

/// How many fences are remembered. Further ones hold nobody back.
const FENCES_MAX: usize = 4096;

/// How much older than the word of its client's death a request may be known to be, in
/// nanoseconds. No guest boots and asks in less.
const DEAD_FOR: u64 = 500_000_000;

/// The word about an order whose client is dead.
pub(super) fn refused() -> ActEnd {
    ActEnd::Failed("nothing was done: its client is fenced itself (a fence race)".into())
}

/// A fence that some host has asked for.
#[derive(Clone, Debug)]
struct GroupFence {
    /// Its number in the total order.
    number: u64,
    victim: Sought,
    client: Option<Vouched>,
    /// When its client had asked, at the latest.
    asked: u64,
    /// Until when its end is waited for.
    by: u64,
    questions: BTreeSet<QuestionId>,
    /// The daemons that act, and have not said how that ended.
    acting: BTreeSet<Member>,
    /// Since when the victim is dead, at the latest. `None`: nobody has proven it.
    dead: Option<u64>,
    /// Whether an act has failed: of two copies one may live.
    has_failed: bool,
    /// Whether this host has answered its client.
    is_answered: bool,
    /// Whether its client was answered, by the group's word.
    is_over: bool,
}

impl GroupFence {
    fn has_ended(&self) -> bool {
        self.acting.is_empty() && (self.dead.is_some() || self.has_failed || self.is_over)
    }

    /// The moment of a death that is proven.
    fn proven(&self) -> Option<u64> {
        self.dead.filter(|_| !self.has_failed)
    }
}

/// What an order's host does about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Turn {
    /// It acts.
    Act,
    /// An earlier fence of the client has not ended. That is waited for until this moment.
    Hold(u64),
    /// The client is dead.
    Refuse,
}

/// The fences of a short time, in the total order.
#[derive(Clone, Debug, Default)]
pub(super) struct GroupRaces {
    fences: BTreeMap<RequestId, GroupFence>,
    delivered: u64,
}

impl GroupRaces {
    /// A question was delivered. `age`: how long ago the client had asked, at least.
    #[expect(clippy::too_many_arguments, reason = "the fields of one message")]
    pub(super) fn asked(
        &mut self,
        now: u64,
        question: QuestionId,
        request: RequestId,
        op: Op,
        victim: Sought,
        client: Option<Vouched>,
        age: u64,
        by: u64,
    ) {
        if !matches!(op, Op::Off | Op::Reboot) {
            return;
        }
        if let Some(known) = self.fences.get_mut(&request) {
            known.questions.insert(question);
            known.client = known.client.take().or(client);
            return;
        }
        if self.fences.len() >= FENCES_MAX {
            return;
        }
        self.delivered += 1;
        let (number, asked, questions) = (self.delivered, now.saturating_sub(age), BTreeSet::from([question]));
        let fence = GroupFence {
            number,
            victim,
            client,
            asked,
            by,
            questions,
            acting: BTreeSet::new(),
            dead: None,
            has_failed: false,
            is_answered: false,
            is_over: false,
        };
        self.fences.insert(request, fence);
    }

    /// A daemon has said something of a question, and what the domain is there.
    pub(super) fn said(
        &mut self,
        now: u64,
        from: Member,
        question: QuestionId,
        word: &Word,
        domain: (Option<Uuid>, Option<&str>),
    ) {
        let Some(fence) = self.fences.values_mut().find(|fence| fence.questions.contains(&question)) else { return };
        // A name may mean machines with different UUIDs; a UUID has one name everywhere.
        if *word != Word::NotHere {
            fence.victim.uuids.extend(domain.0);
            fence.victim.names.extend(domain.1.map(String::from));
        }
        match word {
            Word::RunsHere => drop(fence.acting.insert(from)),
            Word::End(ActEnd::ProvenOff) | Word::StillOff => fence.dead = fence.dead.max(Some(now)),
            Word::End(ActEnd::Failed(_)) => fence.has_failed = true,
            Word::NotHere | Word::DefinedHere | Word::CannotTell(_) | Word::SameHost => {}
            Word::End(ActEnd::Done) | Word::List(_) | Word::Well => {}
        }
        if matches!(word, Word::End(_) | Word::StillOff) {
            fence.acting.remove(&from);
        }
    }

    /// The client of a request was answered.
    pub(super) fn over(&mut self, request: &RequestId) {
        if let Some(fence) = self.fences.get_mut(request) {
            fence.is_over = true;
        }
    }

    /// This host has answered the client of a request.
    pub(super) fn answered(&mut self, request: &RequestId) {
        if let Some(fence) = self.fences.get_mut(request) {
            fence.is_answered = true;
        }
    }

    /// The requests that this host has answered and whose victims wait for their end. Each is told
    /// once.
    fn untold(&mut self) -> Vec<RequestId> {
        let clients: Vec<_> = self.fences.values().filter_map(|fence| fence.client.clone()).collect();
        let is_awaited =
            |fence: &GroupFence| clients.iter().any(|client| fence.victim.fits(&client.uuid, &client.name));
        let mut untold = Vec::new();
        for (request, fence) in &mut self.fences {
            if fence.is_answered && !fence.is_over && is_awaited(fence) {
                fence.is_over = true;
                untold.push(*request);
            }
        }
        untold
    }

    /// What the host that would act on this request does.
    pub(super) fn turn(&self, now: u64, request: &RequestId) -> Turn {
        let Some(ours) = self.fences.get(request) else { return Turn::Act };
        let Some(client) = &ours.client else { return Turn::Act };
        let earlier = self.fences.values().filter(|fence| {
            // A client that fenced a domain is never taken for that domain.
            fence.number < ours.number
                && fence.client.as_ref().is_none_or(|by| by.uuid != client.uuid)
                && fence.victim.fits(&client.uuid, &client.name)
        });
        let turn = |fence: &GroupFence| match fence.proven() {
            _ if !fence.has_ended() && fence.by > now => Turn::Hold(fence.by),
            Some(dead) if ours.asked < dead.saturating_add(DEAD_FOR) => Turn::Refuse,
            _ => Turn::Act,
        };
        earlier.map(turn).max().unwrap_or(Turn::Act)
    }

    /// Forgets what is long over.
    pub(super) fn expire(&mut self, now: u64) {
        self.fences.retain(|_, fence| fence.by.saturating_add(nanos(REMEMBER)) > now);
    }
}

impl Hosts {
    /// This host may be about to act on its own question before it hears it. Then the order comes
    /// before all that is heard from now on. No other host acts on this victim, so none need know.
    pub(super) fn begun(&mut self, now: u64, id: QuestionId, request: RequestId) {
        let is_ours = id.incarnation == self.incarnation && self.holds(HostsRule::BegunFirst);
        let asked = self.asked.get(&id.number).filter(|_| is_ours && !self.duties.races.fences.contains_key(&request));
        let Some(asked) = asked else { return };
        let Question { op, target, client, age, left, .. } = &asked.question;
        let since = now.saturating_sub(asked.by.saturating_sub(nanos(*left)));
        let (age, victim, client) = (nanos(*age).saturating_add(since), Sought::of(target.as_ref()), client.clone());
        let (op, by) = (*op, asked.by);
        self.duties.races.asked(now, id, request, op, victim, client, age, by);
    }

    /// Tells the hosts that hold an order back of the fences that have ended without an act.
    pub(super) fn tell_over(&mut self) {
        for request in self.duties.races.untold() {
            self.send(Message::Over { request, reached: true });
        }
    }
}
