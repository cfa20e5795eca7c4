//! The start of a domain on one host: the order is the only one, and no host has left meanwhile.

use alloc::string::{String, ToString as _};

use uuid::Uuid;

use super::{STARTS_MAX, Started, Starting};
use crate::hosts::message::{Message, QuestionId, Word};
use crate::hosts::records::Sought;
use crate::hosts::{ActEnd, Hosts, HostsRule, Incarnation, Member};
use crate::wire::Op;

impl Hosts {
    /// A start was ordered. If this host shall start the domain, it gets ready.
    pub(in crate::hosts) fn start(
        &mut self,
        now: u64,
        question: QuestionId,
        round: u32,
        starter: Incarnation,
        uuid: Uuid,
        name: String,
    ) {
        let start = Started { position: self.position, uuid, name: name.clone() };
        let mut same = Sought::default();
        same.uuids.insert(uuid);
        same.names.insert(name.clone());
        let earlier = self.duties.starts.iter().filter(|other| same.fits(&other.uuid, &other.name));
        let earlier = earlier.map(|other| other.position).max().filter(|_| self.holds(HostsRule::FirstStart));
        if self.duties.starts.len() >= STARTS_MAX {
            self.duties.starts.remove(0);
        }
        self.duties.starts.push(start);
        if starter != self.incarnation {
            return;
        }
        let (same_members, may_act) = (self.holds(HostsRule::SameMembers), self.may_act());
        let Some(duty) = self.duties.open.get_mut(&question) else { return };
        let reason = match duty.place {
            _ if duty.op != Op::On || duty.round != round || duty.start.is_some() => {
                Some("the order to start is out of place")
            }
            None => Some("the order to start came before its question"),
            Some((_, epoch)) if epoch != self.epoch && same_members => Some("the hosts changed meanwhile"),
            Some((position, _)) if earlier.is_some_and(|other| other > position) => {
                Some("another order to start it came first")
            }
            Some(_) if !may_act => Some("this host has no quorum"),
            Some(_) if duty.by <= now || self.duties.acts.contains_key(&duty.request) => {
                Some("the order to start is too late")
            }
            Some(_) => None,
        };
        if let Some(reason) = reason {
            return self.refuse_start(question, round, reason);
        }
        duty.start = Some((uuid, name.clone()));
        self.duties.starting.push(Starting { request: duty.request, uuid, name });
        self.send(Message::Ready { to: question });
    }

    fn refuse_start(&mut self, to: QuestionId, round: u32, reason: &str) {
        let word = Word::End(ActEnd::Failed(reason.to_string()));
        self.say(to, round, word, None);
    }

    /// This host hears itself. So the order to start was delivered in a membership that held: every
    /// order before it was delivered, too.
    pub(in crate::hosts) fn ready(&mut self, now: u64, from: Member, question: QuestionId) {
        let Some(duty) = self.duties.open.get(&question).cloned().filter(|_| from == self.me) else { return };
        if duty.start.is_none() || self.duties.acts.contains_key(&duty.request) {
            return;
        }
        let holds = duty.place.is_some_and(|(_, epoch)| epoch == self.epoch) || !self.holds(HostsRule::SameMembers);
        if holds && self.may_act() && duty.by > now {
            self.act(&duty, Op::On);
        } else {
            self.duties.starting.retain(|starting| starting.request != duty.request);
            self.refuse_start(question, duty.round, "the hosts changed meanwhile");
        }
    }
}
