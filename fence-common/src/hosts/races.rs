//! Fence races across hosts: two guests fence each other, and at most one may die.
//!
//! The total order decides. A guest whose fence was delivered first must not have its own order
//! carried out before that fence has ended. Every host sees the same order, so no vote is needed:
//! the host that would act on the later order holds it back. If the earlier fence has killed, the
//! later order's client is dead and the order is refused. If it fails, and no host may still act on
//! it, the order is carried out.
//!
//! A client is known by its domain: the hypervisor vouches for that, or its Ethernet address tells
//! it. Hosts tell each other of the addresses. They remember those of machines that have ended: a
//! client may be dead before its order is looked at. A client that nobody knows is believed, as on
//! one host.

use alloc::collections::{BTreeMap, BTreeSet};
use alloc::string::String;
use alloc::vec::Vec;

use uuid::Uuid;

use super::message::{QuestionId, Word};
use super::records::Sought;
use super::{ActEnd, Hosts, HostsRule, Incarnation, Member, Message, Question, nanos};
use crate::caller::Vouched;
use crate::ledger::{REMEMBER, RequestId};
use crate::wire::Op;

/// How many fences are remembered. Further ones hold nobody back.
const FENCES_MAX: usize = 4096;

/// How much older than the word of its client's death a request may be known to be, in
/// nanoseconds. No guest boots and asks in less.
const DEAD_FOR: u64 = 500_000_000;

/// How much later than the client of a fence a host may give it up, in nanoseconds. Each host
/// reckons that moment by the age of the question, which it knows to about a second.
const LATE: u64 = 2_000_000_000;

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
    /// The daemons that were asked and have not answered, with the question. They may act yet: an
    /// answer to one question is none to another host's.
    silent: BTreeSet<(QuestionId, Incarnation)>,
    /// The daemons that act, and have not said how that ended.
    acting: BTreeSet<Member>,
    /// Since when the victim is dead, at the latest, or may be. `None`: nobody has killed it.
    dead: Option<u64>,
    /// Whether an act has failed and done nothing: of two copies one may live.
    has_failed: bool,
    /// Whether this host has answered its client.
    is_answered: bool,
    /// Whether this host has told the others so.
    is_told: bool,
    /// Whether its client was answered, by the group's word.
    is_over: bool,
}

impl GroupFence {
    /// Whether all is known that will come of it. `is_strict`: also of hosts that were silent.
    fn has_ended(&self, is_strict: bool) -> bool {
        let has_killed_nothing = (self.silent.is_empty() || !is_strict) && (self.has_failed || self.is_over);
        self.acting.is_empty() && (self.dead.is_some() || has_killed_nothing)
    }

    /// Since when the victim is no client, at the latest.
    fn dead(&self) -> Option<u64> {
        self.dead.filter(|_| !self.has_failed)
    }

    fn dies(&mut self, now: u64) {
        self.dead = self.dead.max(Some(now));
    }

    /// What is done about a later order of its victim, that was asked for at this moment.
    fn turn(&self, now: u64, asked: u64, is_strict: bool) -> Turn {
        let given_up = self.by.saturating_add(if is_strict { LATE } else { 0 });
        if !self.has_ended(is_strict) && given_up > now {
            return Turn::Hold(given_up);
        }
        // What acts still may have killed by then.
        let may_kill = !self.acting.is_empty() && is_strict;
        let dead = if may_kill { Some(given_up) } else { self.dead() };
        if dead.is_some_and(|dead| asked < dead.saturating_add(DEAD_FOR)) { Turn::Refuse } else { Turn::Act }
    }
}

/// What an order's host does about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Turn {
    /// It acts.
    Act,
    /// An earlier fence of the client has not ended. That is waited for until this moment.
    Hold(u64),
    /// The client is dead, or may be.
    Refuse,
}

/// The fences of a short time, in the total order.
#[derive(Clone, Debug, Default)]
pub(super) struct GroupRaces {
    fences: BTreeMap<RequestId, GroupFence>,
    delivered: u64,
}

impl GroupRaces {
    /// A question was delivered. `age`: how long ago the client had asked, at least. `audience`:
    /// those that shall answer.
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
        audience: &[Incarnation],
    ) {
        if !matches!(op, Op::Off | Op::Reboot) {
            return;
        }
        if let Some(known) = self.fences.get_mut(&request) {
            // Others may have acted since its client was answered. Asked again, it comes after
            // them, unless it has killed or may do so yet.
            let has_done_nothing = known.dead.is_none() && known.has_ended(true);
            if known.questions.insert(question) && known.is_over && has_done_nothing {
                self.delivered += 1;
                (known.number, known.is_over, known.is_told) = (self.delivered, false, false);
            }
            known.silent.extend(audience.iter().map(|one| (question, *one)));
            known.by = known.by.max(by);
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
            silent: audience.iter().map(|one| (question, *one)).collect(),
            acting: BTreeSet::new(),
            dead: None,
            has_failed: false,
            is_answered: false,
            is_told: false,
            is_over: false,
        };
        self.fences.insert(request, fence);
    }

    /// A daemon has said something of a question, and what the domain is there.
    pub(super) fn said(
        &mut self,
        now: u64,
        from: (Member, Incarnation),
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
        fence.silent.remove(&(question, from.1));
        match word {
            Word::RunsHere => drop(fence.acting.insert(from.0)),
            Word::End(ActEnd::ProvenOff | ActEnd::Unproven(_)) | Word::StillOff => fence.dies(now),
            Word::End(ActEnd::Failed(_)) => fence.has_failed = true,
            Word::NotHere | Word::DefinedHere | Word::CannotTell(_) | Word::SameHost => {}
            Word::End(ActEnd::Done | ActEnd::Gone) | Word::List(_) | Word::Well => {}
        }
        if matches!(word, Word::End(_) | Word::StillOff) {
            fence.acting.remove(&from.0);
        }
    }

    /// The client's request of a question that was heard.
    pub(super) fn request_of(&self, question: &QuestionId) -> Option<RequestId> {
        let mut fences = self.fences.iter();
        fences.find(|(_, fence)| fence.questions.contains(question)).map(|(request, _)| *request)
    }

    /// A daemon has left. What it acts on may be dead.
    pub(super) fn left(&mut self, now: u64, member: Member, incarnation: Option<Incarnation>) {
        for fence in self.fences.values_mut() {
            let before = fence.silent.len();
            fence.silent.retain(|(_, one)| Some(*one) != incarnation);
            let was_silent = fence.silent.len() < before;
            if fence.acting.remove(&member) || was_silent {
                fence.dies(now);
            }
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
            if fence.is_answered && !fence.is_told && !fence.is_over && is_awaited(fence) {
                // It is over when the others hear it, in the same place of the order.
                fence.is_told = true;
                untold.push(*request);
            }
        }
        untold
    }

    /// What the host that would act on this request does. `is_strict`: while another host may still
    /// act on an earlier one, that has not ended.
    pub(super) fn turn(&self, now: u64, request: &RequestId, is_strict: bool) -> Turn {
        let Some(ours) = self.fences.get(request) else { return Turn::Act };
        let Some(client) = &ours.client else { return Turn::Act };
        let earlier = self.fences.values().filter(|fence| {
            // A client that fenced a domain is never taken for that domain.
            fence.number < ours.number
                && fence.client.as_ref().is_none_or(|by| by.uuid != client.uuid)
                && fence.victim.fits(&client.uuid, &client.name)
        });
        earlier.map(|fence| fence.turn(now, ours.asked, is_strict)).max().unwrap_or(Turn::Act)
    }

    /// Forgets what is long over, and stands before no order that may still be carried out: a
    /// client may wait for longer than an earlier one.
    pub(super) fn expire(&mut self, now: u64) {
        let is_over = |fence: &GroupFence| fence.by.saturating_add(nanos(REMEMBER)) <= now;
        if !self.fences.values().any(is_over) {
            return;
        }
        let open = self.fences.values().filter(|fence| fence.by.saturating_add(LATE) > now);
        let open: Vec<_> = open.filter_map(|fence| Some((fence.number, fence.client.clone()?))).collect();
        self.fences.retain(|_, fence| {
            let stands_before = |(number, client): &(u64, Vouched)| {
                fence.number < *number && fence.victim.fits(&client.uuid, &client.name)
            };
            !is_over(fence) || open.iter().any(stands_before)
        });
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
        self.duties.races.asked(now, id, request, op, victim, client, age, by, &[]);
    }

    /// Tells the hosts that hold an order back of the fences that have ended without an act.
    pub(super) fn tell_answered(&mut self) {
        for request in self.duties.races.untold() {
            self.send(Message::Answered { request });
        }
    }
}
