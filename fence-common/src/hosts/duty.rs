//! Every host's part in a question: it looks, acts at most once, and says what it has found.

mod start;

use alloc::collections::BTreeMap;
use alloc::string::String;
use alloc::vec::Vec;

use uuid::Uuid;

use super::message::{self, Message, QuestionId, Word};
use super::races::{self, GroupRaces, Turn};
use super::records::Sought;
use super::{ActEnd, GroupOrder, HostDomain, Hosts, HostsRule, Incarnation, LocalState, Look, Member, Output};
use crate::ledger::RequestId;
use crate::target::Target;
use crate::wire::Op;

/// How long an act is remembered after its end, in nanoseconds. No copy of its request acts again
/// meanwhile. Coordinators end their questions after 25 s.
const REMEMBER: u64 = 60_000_000_000;

/// How many questions of others this host works on at once. Further ones are not answered, which
/// fails them.
const DUTIES_MAX: usize = 4096;

/// How many starts are remembered for comparison.
const STARTS_MAX: usize = 1024;

/// One question, as this host knows it.
#[derive(Clone, Debug)]
struct Duty {
    coordinator: Member,
    round: u32,
    /// The first round that this host has heard.
    heard_from: u32,
    /// The place of the round in the total order, and the epoch there. Unknown until this host
    /// hears its own question.
    place: Option<(u64, u64)>,
    request: RequestId,
    op: Op,
    target: Option<Target>,
    /// When its client gives up.
    by: u64,
    /// The look that is under way.
    look: Option<u64>,
    /// Whether a start of the domain was under way here when the look began. What the look finds
    /// may be from before that start, although the start has ended since.
    saw_start: bool,
    /// What this host was ordered to start.
    start: Option<(Uuid, String)>,
    /// Until when it waits for the end of its client's own fence.
    held: Option<u64>,
    /// Whether what the look has found may be a copy that is on its way in.
    may_arrive: bool,
}

impl Duty {
    /// One that is about to be begun.
    fn new(
        coordinator: Member,
        round: u32,
        place: Option<(u64, u64)>,
        request: RequestId,
        op: Op,
        target: Option<Target>,
        by: u64,
    ) -> Self {
        Self {
            coordinator,
            round,
            heard_from: round,
            place,
            request,
            op,
            target,
            by,
            look: None,
            saw_start: false,
            start: None,
            held: None,
            may_arrive: false,
        }
    }
}

/// An act of this host.
#[derive(Clone, Debug)]
struct Act {
    number: u64,
    op: Op,
    /// Whether it may be about a copy that is on its way in.
    may_arrive: bool,
    /// How it ended, and how often the domain had appeared by then.
    end: Option<(ActEnd, u64)>,
    until: u64,
}

/// A start that was ordered.
#[derive(Clone, Debug)]
struct Started {
    position: u64,
    uuid: Uuid,
    name: String,
}

/// A start on this host that has not ended.
#[derive(Clone, Debug)]
struct Starting {
    request: RequestId,
    uuid: Uuid,
    name: String,
}

/// All that this host works on.
#[derive(Clone, Debug, Default)]
pub(super) struct Duties {
    open: BTreeMap<QuestionId, Duty>,
    acts: BTreeMap<RequestId, Act>,
    /// Which member said first that the domain of a reboot runs there, and until when that counts.
    first: BTreeMap<RequestId, (Member, u64)>,
    starts: Vec<Started>,
    starting: Vec<Starting>,
    pub(super) races: GroupRaces,
}

/// A start may still fail, so it is neither on nor off.
fn being_started() -> Word {
    Word::CannotTell("it is being started here".into())
}

impl Duties {
    /// Forgets the questions. Acts go on.
    pub(super) fn forget(&mut self) {
        self.open.clear();
        self.races = GroupRaces::default();
        // Starts that have not begun do not begin any more.
        let acts = &self.acts;
        self.starting.retain(|starting| acts.get(&starting.request).is_some_and(|act| act.end.is_none()));
    }

    pub(super) fn expire(&mut self, now: u64) {
        self.open.retain(|_, duty| duty.by > now);
        self.acts.retain(|_, act| act.end.is_none() || act.until > now);
        self.first.retain(|_, (_, until)| *until > now);
        self.races.expire(now);
        let (open, acts) = (&self.open, &self.acts);
        let is_due = |request: &RequestId| {
            acts.get(request).is_some_and(|act| act.end.is_none())
                || open.values().any(|duty| duty.request == *request && duty.start.is_some())
        };
        self.starting.retain(|starting| is_due(&starting.request));
    }

    pub(super) fn wake(&self) -> Option<u64> {
        self.open.values().flat_map(|duty| [Some(duty.by), duty.held]).flatten().min()
    }

    fn by_look(&self, look: u64) -> Option<QuestionId> {
        self.open.iter().find(|(_, duty)| duty.look == Some(look)).map(|(question, _)| *question)
    }

    fn is_starting(&self, target: Option<&Target>, uuid: Option<Uuid>) -> bool {
        let mut sought = Sought::of(target);
        sought.uuids.extend(uuid);
        self.starting.iter().any(|starting| sought.fits(&starting.uuid, &starting.name))
    }
}

impl Hosts {
    /// An earlier daemon of this host has acted on this request, or was about to. It is not carried
    /// out again.
    pub fn remember(&mut self, now: u64, request: RequestId) {
        let number = self.number();
        let end = ActEnd::Failed("the daemon was restarted while it acted, or after".into());
        let (op, until) = (Op::Null, now.saturating_add(REMEMBER));
        let act = Act { number, op, may_arrive: false, end: Some((end, 0)), until };
        self.duties.acts.entry(request).or_insert(act);
    }

    /// A question was delivered. Its time runs from `sent_after` on.
    pub(super) fn asked_by(&mut self, now: u64, from: Member, incarnation: Incarnation, sent_after: u64, ask: Message) {
        let Message::Ask { number, round, request, op, target, left_ms, age_ms, client, audience } = ask else {
            return;
        };
        self.claim_is_used(request, from);
        let by = sent_after.saturating_add(u64::from(left_ms) * 1_000_000);
        let question = QuestionId { incarnation, number };
        let (victim, age) = (Sought::of(target.as_ref()), u64::from(age_ms) * 1_000_000);
        self.duties.races.asked(now, question, request, op, victim, client, age, by, &audience);
        self.tell_answered();
        if !audience.contains(&self.incarnation) {
            return;
        }
        let place = Some((self.position, self.epoch));
        let heard_from = self.duties.open.get(&question).map_or(round, |duty| duty.heard_from);
        if let Some(duty) = self.duties.open.get_mut(&question)
            && duty.round >= round
        {
            // Our own question, which was begun before it was heard.
            if duty.round == round && duty.place.is_none() {
                duty.place = place;
            }
            return;
        }
        let duty = Duty::new(from, round, place, request, op, target, by);
        self.begin_duty(question, Duty { heard_from, ..duty });
    }

    /// Begins this host's part in its own question before it hears it.
    pub(super) fn begin_own(
        &mut self,
        number: u64,
        round: u32,
        request: RequestId,
        op: Op,
        target: Option<Target>,
        by: u64,
    ) {
        let question = QuestionId { incarnation: self.incarnation, number };
        self.begin_duty(question, Duty::new(self.me, round, None, request, op, target, by));
    }

    fn begin_duty(&mut self, question: QuestionId, mut duty: Duty) {
        if self.duties.open.len() >= DUTIES_MAX && !self.duties.open.contains_key(&question) {
            return;
        }
        if self.duties.acts.get(&duty.request).is_some_and(|act| act.end.is_none()) {
            let round = duty.round;
            let word = if duty.op == Op::On { being_started() } else { Word::RunsHere };
            self.duties.open.insert(question, duty);
            return self.say(question, round, word, None);
        }
        let look = self.number();
        let output = match (duty.op, &duty.target) {
            (Op::HostList, _) => Output::List { look },
            (Op::DevStatus, _) => Output::Check { look },
            (op @ (Op::Off | Op::Reboot | Op::On | Op::Status), Some(target)) => {
                Output::Look { look, target: target.clone(), op }
            }
            (Op::Null | Op::Off | Op::Reboot | Op::On | Op::Status, _) => return,
        };
        duty.look = Some(look);
        duty.saw_start = self.duties.is_starting(duty.target.as_ref(), None);
        self.duties.open.insert(question, duty);
        self.outputs.push_back(output);
    }

    fn say(&mut self, to: QuestionId, round: u32, word: Word, look: Option<Look>) {
        let (changes, uuid, name) = look.map_or((0, None, None), |look| (look.changes, look.uuid, look.name));
        self.send(Message::Say { to, round, word, changes, uuid, name });
    }

    /// What the domain of a look is to this host.
    pub fn looked(&mut self, now: u64, number: u64, look: Look) {
        let Some(question) = self.duties.by_look(number) else { return };
        let Some(duty) = self.duties.open.get_mut(&question) else { return };
        duty.look = None;
        duty.may_arrive = look.state == LocalState::MayBeArriving;
        let duty = duty.clone();
        if duty.by <= now {
            return;
        }
        let acts = matches!(duty.op, Op::Off | Op::Reboot);
        let saw_start = duty.saw_start && self.holds(HostsRule::StartHidesLook);
        let is_starting = saw_start || self.duties.is_starting(duty.target.as_ref(), look.uuid);
        let arrives = look.state == LocalState::Arriving;
        let runs = look.state == LocalState::RunsHere || arrives || duty.may_arrive || is_starting;
        let act = self.duties.acts.get(&duty.request).filter(|_| self.holds(HostsRule::ActsOnce)).cloned();
        let word = match (&look.state, act) {
            (LocalState::CannotTell(reason), _) => Word::CannotTell(message::reason(reason)),
            _ if arrives && self.holds(HostsRule::ArrivalsWait) => {
                Word::CannotTell("it is on its way in from another host".into())
            }
            // Nothing may be started beside its source.
            _ if duty.may_arrive && duty.op == Op::Reboot => {
                Word::CannotTell("it may be on its way in from another host".into())
            }
            (_, Some(Act { end: None, .. })) if acts => Word::RunsHere,
            // A reboot has started it again.
            (_, Some(Act { end: Some((ActEnd::ProvenOff, changes)), op, .. }))
                if !runs || (op == Op::Reboot && changes == look.changes) =>
            {
                Word::StillOff
            }
            (_, Some(_)) if acts && runs => {
                Word::CannotTell("it runs here, and this request has acted here before".into())
            }
            _ if is_starting && !acts && look.state != LocalState::RunsHere => being_started(),
            _ if acts && runs && !self.may_act() => Word::CannotTell("this host has no quorum".into()),
            _ if runs => Word::RunsHere,
            (LocalState::DefinedHere, _) => Word::DefinedHere,
            (LocalState::NotHere | LocalState::RunsHere, _) => Word::NotHere,
            (LocalState::Arriving | LocalState::MayBeArriving, _) => Word::NotHere,
        };
        // Another host may have been the first to say so, and starts it again.
        let has_missed = duty.op == Op::Reboot && duty.heard_from > 1 && self.holds(HostsRule::WholeReboot);
        let has_acted = self.duties.acts.contains_key(&duty.request);
        let word = if word == Word::RunsHere && has_missed && !has_acted {
            Word::CannotTell("it runs here, and this host has joined meanwhile".into())
        } else {
            word
        };
        let is_owner = word == Word::RunsHere;
        let act_is_new = !self.duties.acts.contains_key(&duty.request) || !self.holds(HostsRule::ActsOnce);
        if acts && is_owner && act_is_new && self.holds(HostsRule::VictimWaits) {
            self.begun(now, question, duty.request);
            match self.duties.races.turn(now, &duty.request, self.holds(HostsRule::SilentMayAct)) {
                Turn::Act => {}
                Turn::Hold(until) => {
                    self.duties.open.insert(question, Duty { held: Some(until), look: None, ..duty });
                    return;
                }
                Turn::Refuse => {
                    return self.say(question, duty.round, Word::End(races::refused()), Some(look));
                }
            }
        }
        self.say(question, duty.round, word, Some(look));
        if is_owner && duty.op == Op::Off && act_is_new {
            self.act(&duty, Op::Off);
        }
    }

    /// Goes on with the orders that have waited long enough: what was seen before is old.
    pub(super) fn go_on(&mut self, now: u64) {
        let (races, is_strict) = (&self.duties.races, self.holds(HostsRule::SilentMayAct));
        let waits = |duty: &Duty| matches!(races.turn(now, &duty.request, is_strict), Turn::Hold(_));
        let due = self.duties.open.iter().filter(|(_, duty)| duty.held.is_some() && !waits(duty));
        let due: Vec<_> = due.map(|(question, duty)| (*question, duty.clone())).collect();
        for (question, duty) in due {
            self.begin_duty(question, Duty { held: None, ..duty });
        }
    }

    /// All domains of this host, or why they are not known.
    pub fn listed(&mut self, look: u64, list: Result<Vec<HostDomain>, String>) {
        self.tell(look, list.map_or_else(|reason| Word::CannotTell(message::reason(&reason)), Word::List));
    }

    /// Whether this host's libvirt is well, or why not.
    pub fn checked(&mut self, look: u64, health: Result<(), String>) {
        self.tell(look, health.map_or_else(|reason| Word::CannotTell(message::reason(&reason)), |()| Word::Well));
    }

    fn tell(&mut self, look: u64, word: Word) {
        let Some(question) = self.duties.by_look(look) else { return };
        let Some(duty) = self.duties.open.get_mut(&question) else { return };
        duty.look = None;
        let round = duty.round;
        self.say(question, round, word, None);
    }

    /// Without quorum nobody acts.
    fn may_act(&self) -> bool {
        self.is_quorate || !self.holds(HostsRule::Quorum)
    }

    fn act(&mut self, duty: &Duty, op: Op) {
        let Some(target) = duty.target.clone() else { return };
        let act = self.number();
        let (by, coordinator) = (duty.by, duty.coordinator);
        let may_arrive = duty.may_arrive;
        self.duties.acts.insert(duty.request, Act { number: act, op, may_arrive, end: None, until: u64::MAX });
        let order = GroupOrder { act, request: duty.request, op, target, coordinator, by };
        self.outputs.push_back(Output::Act(order));
    }

    /// An act has ended. `changes` is as in [`Look`], counted no later than the proof.
    pub fn acted(&mut self, now: u64, number: u64, end: ActEnd, changes: u64) {
        let (is_no_proof, is_dead) = (self.holds(HostsRule::GoneIsNoProof), self.holds(HostsRule::KilledIsDead));
        let Some((&request, act)) = self.duties.acts.iter_mut().find(|(_, act)| act.number == number) else { return };
        let end = match end {
            ActEnd::Failed(reason) => ActEnd::Failed(message::reason(&reason)),
            ActEnd::Unproven(reason) if is_dead => ActEnd::Unproven(message::reason(&reason)),
            ActEnd::Unproven(reason) => ActEnd::Failed(message::reason(&reason)),
            ActEnd::ProvenOff if act.may_arrive && is_no_proof => ActEnd::Gone,
            ActEnd::Gone if !is_no_proof => ActEnd::ProvenOff,
            ActEnd::ProvenOff | ActEnd::Gone | ActEnd::Done => end,
        };
        act.end = Some((end.clone(), changes));
        act.until = now.saturating_add(REMEMBER);
        self.duties.starting.retain(|starting| starting.request != request);
        let open = self.duties.open.iter().filter(|(_, duty)| duty.request == request);
        let open: Vec<_> = open.map(|(question, duty)| (*question, duty.round)).collect();
        for (to, round) in open {
            let word = Word::End(end.clone());
            self.send(Message::Say { to, round, word, changes, uuid: None, name: None });
        }
        self.judge_all(now);
    }

    /// Hears what a member says of a question, to whomever. Of the hosts that run the domain of a
    /// reboot, the first one starts it again. This host acts when it hears its own word.
    pub(super) fn said_to_all(&mut self, now: u64, from: Member, to: QuestionId, word: &Word) {
        // Also of a question of another coordinator, which this host is not asked.
        let Some(request) = self.duties.races.request_of(&to).filter(|_| *word == Word::RunsHere) else { return };
        let until = now.saturating_add(REMEMBER);
        let (first, _) = *self.duties.first.entry(request).or_insert((from, until));
        let Some(duty) = self.duties.open.get(&to).filter(|duty| duty.op == Op::Reboot).cloned() else { return };
        if from != self.me || self.duties.acts.contains_key(&duty.request) || duty.by <= now {
            return;
        }
        if !self.may_act() {
            let reason = Word::CannotTell("this host has no quorum".into());
            self.say(to, duty.round, reason, None);
        } else if first != self.me && first.node == self.me.node {
            self.say(to, duty.round, Word::SameHost, None);
        } else {
            let restarts = first == self.me || !self.holds(HostsRule::FirstReboot);
            self.act(&duty, if restarts { Op::Reboot } else { Op::Off });
        }
    }
}
