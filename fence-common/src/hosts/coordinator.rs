//! The coordinator of a question: it asks all hosts on behalf of a client, and judges their words.
//!
//! # Looking twice
//!
//! Hosts look at different moments. A domain that migrates meanwhile can be missed by all of them.
//! So they are asked in rounds, each sent after the one before was answered. If two rounds find
//! the same, and no host has seen the domain appear in between, all of it was true at once: when
//! the second round was sent. The owner kills meanwhile, so a fence waits for no second round.

use alloc::collections::{BTreeMap, BTreeSet};
use alloc::string::String;
use alloc::vec::Vec;

use uuid::Uuid;

use super::answer::{GroupAnswer, HostList, NoAnswer};
use super::message::{Message, Word};
use super::records::Sought;
use super::testimony::{Asked, Found, Said, Stage};
use super::{ActEnd, FENCING_EVERY, Hosts, HostsRule, Member, NodeId, Output, Presence, Question, nanos};
use crate::wire::Op;

/// How often the hosts are asked about one question.
const ROUNDS_MAX: u32 = 32;

/// How many questions of this host are open at once.
const ASKED_MAX: usize = 2048;

/// What follows from the words so far.
enum Step {
    Wait,
    Answer(GroupAnswer),
    NextRound,
    Start(Member, Uuid, String),
    /// These hosts must be proven fenced first.
    AskFencing(BTreeSet<NodeId>),
}

impl Step {
    fn fail(reason: NoAnswer) -> Self {
        Self::Answer(GroupAnswer::Failure(reason))
    }
}

impl Hosts {
    /// Asks all hosts. Returns the number of the question: [`Output::Answer`] has it.
    ///
    /// The client must be authorized: hosts act on the question.
    pub fn ask(&mut self, now: u64, mut question: Question) -> u64 {
        let number = self.number();
        let is_remote = question.client.is_none();
        let with_dead = self.holds(HostsRule::DeadAreKnown);
        question.client = question.client.or_else(|| self.records.guest_of(now, &question.macs, with_dead));
        let is_remote = is_remote && question.client.is_some();
        let refusal = if !self.is_joined() {
            Some(NoAnswer::NotJoined)
        } else if !self.is_quorate && self.holds(HostsRule::Quorum) {
            Some(NoAnswer::NoQuorum)
        } else if self.configured.is_empty() {
            Some(NoAnswer::NoHosts)
        } else {
            (self.asked.len() >= ASKED_MAX).then_some(NoAnswer::Full)
        };
        if let Some(reason) = refusal {
            self.outputs.push_back(Output::Answer { question: number, answer: GroupAnswer::Failure(reason) });
            return number;
        }
        let sought = Sought::of(question.target.as_ref());
        let asked = Asked {
            by: now.saturating_add(nanos(question.left)),
            round: 0,
            epoch: self.epoch,
            audience: BTreeMap::new(),
            testimonies: BTreeMap::new(),
            configured: self.configured.keys().copied().collect(),
            fenced: BTreeSet::new(),
            sought,
            stage: Stage::Asking,
            fencing_asked: None,
            is_remote,
            question,
        };
        self.asked.insert(number, asked);
        self.next_round(now, number);
        self.judge(now, number);
        number
    }

    /// Sends the next round of a question.
    fn next_round(&mut self, now: u64, number: u64) {
        let fenced = |asked: &Asked| {
            let hosts = asked.configured.iter().chain(self.configured.keys());
            hosts.filter(|node| self.is_fenced(now, **node)).copied().collect::<BTreeSet<_>>()
        };
        let Some(fenced) = self.asked.get(&number).map(fenced) else { return };
        let heard = |(member, one): (&Member, &Presence)| Some((*member, one.incarnation?));
        let audience: BTreeMap<_, _> = self.members.iter().filter_map(heard).collect();
        let Some(asked) = self.asked.get_mut(&number) else { return };
        asked.round += 1;
        (asked.fenced, asked.audience, asked.epoch) = (fenced, audience, self.epoch);
        let round = asked.round;
        let is_remote = asked.is_remote;
        let Question { request, op, target, client, age, left, .. } = asked.question.clone();
        let (by, audience) = (asked.by, asked.audience.values().copied().collect());
        let begun = by.saturating_sub(nanos(left));
        let age = nanos(age).saturating_add(now.saturating_sub(begun));
        let millis = |time: u64| u32::try_from(time / 1_000_000).unwrap_or(u32::MAX);
        let (left_ms, age_ms) = (millis(by.saturating_sub(now)), millis(age));
        self.send(Message::Ask {
            number,
            round,
            request,
            op,
            target: target.clone(),
            left_ms,
            age_ms,
            client,
            audience,
        });
        // The order of questions decides between guests of two hosts, so it is waited for.
        if op == Op::Off && !is_remote {
            self.begin_own(number, round, request, op, target, by);
        }
    }

    /// A member has answered a question of this host.
    #[expect(clippy::too_many_arguments, reason = "the fields of one message")]
    pub(super) fn said_to_me(
        &mut self,
        from: Member,
        number: u64,
        round: u32,
        word: Word,
        changes: u64,
        uuid: Option<Uuid>,
        name: Option<String>,
    ) {
        let Some(asked) = self.asked.get_mut(&number) else { return };
        let incarnation = self.members.get(&from).and_then(|one| one.incarnation);
        if incarnation.is_none() || asked.audience.get(&from).copied() != incarnation {
            return;
        }
        let is_current = asked.round == round;
        // A name may mean machines with different UUIDs; a UUID has one name everywhere.
        if word != Word::NotHere {
            asked.sought.uuids.extend(uuid);
        }
        let one = asked.testimonies.entry(from).or_default();
        let mut found = |found| {
            if is_current {
                let said = Said { round, found, changes };
                if one.last.is_none_or(|last| last.round != round) {
                    one.before = one.last;
                }
                one.last = Some(said);
            }
        };
        match word {
            Word::NotHere => found(Found::Clear),
            Word::DefinedHere => {
                found(Found::Clear);
                one.definition = uuid.zip(name);
            }
            // For `SameHost` the other daemon of its host proves it.
            Word::SameHost | Word::RunsHere => {
                found(Found::Acting);
                one.is_owner = true;
            }
            Word::StillOff => {
                found(Found::Ended);
                one.is_owner = true;
            }
            Word::CannotTell(reason) => (one.doubt, one.doubted) = (Some(reason), round),
            // It owns nothing after all. What it has found since counts.
            Word::End(ActEnd::Gone) => {
                one.is_owner = false;
                let acting = one.last.as_mut().filter(|last| last.found == Found::Acting);
                acting.into_iter().for_each(|last| last.found = Found::Gone);
            }
            Word::End(end) => {
                if end == ActEnd::ProvenOff {
                    one.is_owner = true;
                }
                one.end = Some((end, changes));
            }
            Word::List(domains) => {
                found(Found::Clear);
                one.list = Some(domains);
            }
            Word::Well => {
                found(Found::Clear);
                one.is_well = true;
            }
        }
    }

    /// Judges all questions again.
    pub(super) fn judge_all(&mut self, now: u64) {
        let open: Vec<_> = self.asked.keys().copied().collect();
        for number in open {
            self.judge(now, number);
        }
    }

    fn judge(&mut self, now: u64, number: u64) {
        let Some(asked) = self.asked.get(&number) else { return };
        let step = self.step(now, asked);
        let round = asked.round;
        if let Some(asked) = self.asked.get_mut(&number).filter(|_| !matches!(step, Step::AskFencing(_))) {
            asked.fencing_asked = None;
        }
        match step {
            Step::Wait => {}
            Step::Answer(answer) => self.answer(number, answer),
            Step::NextRound if round >= ROUNDS_MAX => {
                self.answer(number, GroupAnswer::Failure(NoAnswer::Unsettled));
            }
            Step::NextRound => self.next_round(now, number),
            Step::Start(starter, uuid, name) => self.order_start(number, starter, uuid, name),
            Step::AskFencing(nodes) => {
                let is_due = |at: u64| now.saturating_sub(at) >= FENCING_EVERY;
                let asked = self.asked.get_mut(&number).filter(|asked| asked.fencing_asked.is_none_or(is_due));
                if let Some(asked) = asked {
                    asked.fencing_asked = Some(now);
                    for node in nodes {
                        let since = self.records.of(node).and_then(|words| words.heard.max(words.in_ring));
                        self.outputs.push_back(Output::AskFencing { node, since });
                    }
                }
            }
        }
    }

    pub(super) fn answer(&mut self, number: u64, answer: GroupAnswer) {
        if let Some(asked) = self.asked.remove(&number) {
            self.outputs.push_back(Output::Answer { question: number, answer });
            self.duties.races.answered(&asked.question.request);
            self.tell_answered();
        }
    }

    fn order_start(&mut self, number: u64, starter: Member, uuid: Uuid, name: String) {
        let Some(asked) = self.asked.get_mut(&number) else { return };
        let Some(&incarnation) = asked.audience.get(&starter) else { return };
        asked.stage = Stage::Starting(starter);
        let round = asked.round;
        self.send(Message::Start { number, round, starter: incarnation, uuid, name });
    }

    fn step(&self, now: u64, asked: &Asked) -> Step {
        if now >= asked.by {
            return Step::fail(self.too_late(now, asked));
        }
        if !self.is_quorate && self.holds(HostsRule::Quorum) {
            return Step::fail(NoAnswer::NoQuorum);
        }
        let is_present = |member: &Member| self.members.contains_key(member);
        let is_asking = asked.stage == Stage::Asking;
        if let Stage::Starting(starter) = asked.stage {
            return self.started(asked, starter);
        }
        // One that runs it is enough; so others need not be certain.
        if matches!(asked.op(), Op::Status | Op::On) && is_asking && asked.has_owner(is_present) {
            return Step::Answer(GroupAnswer::Success);
        }
        if let Some(reason) = self.doubt(asked).filter(|_| self.holds(HostsRule::DoubtFails)) {
            return Step::fail(reason);
        }
        let is_new =
            |(member, one): (&Member, &Presence)| one.since > asked.epoch || !asked.audience.contains_key(member);
        if self.members.iter().any(is_new) {
            // The newcomers' incarnations come with their first messages.
            let are_known = self.members.values().all(|one| one.incarnation.is_some());
            return if are_known { Step::NextRound } else { Step::Wait };
        }
        let said = |member: &Member| asked.testimonies.get(member);
        let has_said = |member: &Member| said(member).is_some_and(|one| one.answers() == asked.round);
        if matches!(asked.op(), Op::HostList | Op::DevStatus) {
            return self.roll_call(asked, has_said);
        }
        if !self.members.keys().all(has_said) && self.holds(HostsRule::AllSpeak) {
            return Step::Wait;
        }
        let needed = self.must_be_fenced(asked);
        let unproven: BTreeSet<_> = needed.iter().filter(|node| !self.is_fenced(now, **node)).copied().collect();
        if !unproven.is_empty() && !needed.is_subset(&asked.fenced) {
            let reason = NoAnswer::Unproven(self.names(unproven.iter().copied()));
            return if self.options.has_fencing { Step::AskFencing(unproven) } else { Step::fail(reason) };
        }
        // One daemon of a host proves what none of its daemons knows, too.
        let may_cover = |member: &Member| self.may_cover(member);
        let is_settled = |member: &Member| {
            !self.holds(HostsRule::TwoRounds)
                || !self.holds(HostsRule::AllSpeak)
                || !self.holds(HostsRule::DoubtFails)
                || said(member).is_some_and(|one| {
                    one.is_settled(asked.round) || (one.doubt.is_some() && asked.is_covered(member, may_cover))
                })
        };
        if !needed.is_subset(&asked.fenced) || !self.members.keys().all(is_settled) {
            return Step::NextRound;
        }
        let acts = |member: &Member| {
            self.holds(HostsRule::ProofAwaited)
                && said(member).is_some_and(|one| one.is_owner)
                && !asked.is_proven(member.node)
        };
        if self.members.keys().any(acts) {
            return Step::Wait;
        }
        self.runs_nowhere(asked)
    }

    /// The answer when the domain ran nowhere, or is dead wherever it ran.
    fn runs_nowhere(&self, asked: &Asked) -> Step {
        if asked.op() == Op::Status {
            return Step::Answer(GroupAnswer::Off);
        }
        let is_known = asked.testimonies.values().any(|one| one.is_owner || one.definition.is_some());
        if !is_known && !self.records.knew(&asked.sought) {
            return Step::fail(NoAnswer::Unknown);
        }
        if asked.op() != Op::On {
            return Step::Answer(GroupAnswer::Success);
        }
        let defined = |member: &Member| Some((*member, asked.testimonies.get(member)?.definition.clone()?));
        let starter = defined(&self.me).or_else(|| self.members.keys().find_map(defined));
        starter.map_or(Step::fail(NoAnswer::NotDefined), |(starter, (uuid, name))| Step::Start(starter, uuid, name))
    }

    fn started(&self, asked: &Asked, starter: Member) -> Step {
        let host = || self.names([starter.node]);
        match asked.testimonies.get(&starter).and_then(|one| one.end.as_ref()) {
            Some((ActEnd::Done, _)) => Step::Answer(GroupAnswer::Success),
            Some((ActEnd::Failed(reason) | ActEnd::Unproven(reason), _)) => {
                Step::fail(NoAnswer::Failed { host: host(), reason: reason.clone() })
            }
            Some((ActEnd::ProvenOff | ActEnd::Gone, _)) | None if self.members.contains_key(&starter) => Step::Wait,
            Some((ActEnd::ProvenOff | ActEnd::Gone, _)) | None => Step::fail(NoAnswer::Left(host())),
        }
    }

    /// Whether a daemon may answer for another one of its host.
    fn may_cover(&self, member: &Member) -> bool {
        self.members.contains_key(member) || !self.holds(HostsRule::PresentCovers)
    }

    /// A doubt of any host, an act that failed, or a member that is not understood.
    fn doubt(&self, asked: &Asked) -> Option<NoAnswer> {
        let may_cover = |member: &Member| self.may_cover(member);
        asked
            .testimonies
            .iter()
            .find_map(|(member, one)| {
                let host = || self.names([member.node]);
                match (&one.doubt, &one.end) {
                    // Another daemon of its host answers for this one.
                    (Some(_), None) if !one.is_owner && asked.is_covered(member, may_cover) => None,
                    (Some(reason), _) => Some(NoAnswer::CannotTell { host: host(), reason: reason.clone() }),
                    (None, Some((ActEnd::Failed(reason) | ActEnd::Unproven(reason), _))) => {
                        Some(NoAnswer::Failed { host: host(), reason: reason.clone() })
                    }
                    (None, _) => None,
                }
            })
            .or_else(|| {
                let (member, trouble) = self.members.iter().find_map(|(member, one)| Some((*member, one.trouble?)))?;
                Some(NoAnswer::Foreign { host: self.names([member.node]), trouble })
            })
    }

    /// The hosts that are not there, and may run the domain.
    ///
    /// If no host has said that it runs there, these are all of them. Otherwise these are the ones
    /// that were last known to run it: a machine runs on one host.
    fn must_be_fenced(&self, asked: &Asked) -> BTreeSet<NodeId> {
        if !self.holds(HostsRule::AbsentFenced) {
            return BTreeSet::new();
        }
        let configured = asked.configured.iter().chain(self.configured.keys()).copied();
        let heard = asked.testimonies.keys().map(|member| member.node);
        let absent = configured.chain(heard).filter(|node| !self.is_present(*node));
        let has_owner = asked.has_owner(|member| self.members.contains_key(member));
        let owned = |node: &NodeId| {
            asked.testimonies.iter().any(|(member, one)| member.node == *node && one.is_owner && !one.is_proven())
        };
        // Its own word alone says that it runs there no more: a reboot may have started it again.
        let ran = |node: &NodeId| self.records.of(*node).is_some_and(|words| words.last_ran(&asked.sought));
        let ran = |node: &NodeId| ran(node) && !asked.is_proven(*node);
        absent.filter(|node| !has_owner || owned(node) || ran(node)).collect()
    }

    /// `list` and `monitor`: every configured host must answer.
    fn roll_call(&self, asked: &Asked, has_said: impl Fn(&Member) -> bool) -> Step {
        let missing = asked.configured.iter().filter(|node| !self.is_present(**node));
        let missing = self.names(missing.copied());
        if !missing.0.is_empty() {
            return Step::fail(NoAnswer::Missing(missing));
        }
        if !self.members.keys().all(has_said) {
            return Step::Wait;
        }
        if asked.op() == Op::DevStatus {
            return Step::Answer(GroupAnswer::Success);
        }
        let mut lists: BTreeMap<NodeId, HostList> = BTreeMap::new();
        for (member, one) in &asked.testimonies {
            let list = lists.entry(member.node).or_insert_with(|| HostList {
                node: member.node,
                name: self.name(member.node),
                domains: Vec::new(),
            });
            list.domains.extend(one.list.iter().flatten().cloned());
        }
        for list in lists.values_mut() {
            // Two daemons of one host may have the same libvirt.
            list.domains.sort_by_key(|domain| domain.uuid);
            list.domains.dedup_by_key(|domain| domain.uuid);
        }
        Step::Answer(GroupAnswer::List(lists.into_values().collect()))
    }

    fn too_late(&self, now: u64, asked: &Asked) -> NoAnswer {
        let needed = self.must_be_fenced(asked).into_iter().filter(|node| !self.is_fenced(now, *node));
        let unproven = self.names(needed);
        let silent = self.members.keys().filter(|member| {
            let one = asked.testimonies.get(member);
            one.is_none_or(|one| one.answers() != asked.round || (one.is_owner && !asked.is_proven(member.node)))
        });
        let silent = self.names(silent.map(|member| member.node));
        match (silent.0.is_empty(), unproven.0.is_empty()) {
            (false, _) => NoAnswer::Silent(silent),
            (true, false) => NoAnswer::Unproven(unproven),
            (true, true) => NoAnswer::Unsettled,
        }
    }
}
