//! Which host calls a client back: the first one whose claim is delivered.
//!
//! Nothing of safety depends on it. Two hosts that call back cost the client a refused connection.

use alloc::collections::{BTreeMap, BTreeSet};
use alloc::vec::Vec;

use super::message::Message;
use super::{Hosts, Member, Output};
use crate::ledger::{REMEMBER, RequestId};

/// How long a winner may call back until a further datagram of the client lets another host claim
/// the request, in nanoseconds. Clients repeat after 2 s.
const PATIENCE: u64 = 4_000_000_000;

/// The claims of one request.
#[derive(Clone, Debug, Default)]
struct Election {
    /// Who calls back, and since when.
    winner: Option<(Member, u64)>,
    /// Whether the winner has asked the group: it has reached the client.
    is_used: bool,
    /// Whether this daemon has heard the request.
    heard: bool,
    /// Who did not reach the client.
    failed: BTreeSet<Member>,
    /// Whether the client was called back.
    is_over: bool,
    until: u64,
}

/// The requests that clients have sent to several hosts.
#[derive(Clone, Debug, Default)]
pub(super) struct Elections(BTreeMap<RequestId, Election>);

impl Elections {
    /// Ends the group's part in all of them. Returns the requests that this daemon has heard, does
    /// not call back for, and nobody has called back for.
    pub(super) fn forget(&mut self, now: u64, me: Member) -> Vec<RequestId> {
        let is_mine = |one: &Election| one.winner.is_some_and(|(winner, _)| winner == me);
        let open = self.0.iter().filter(|(_, one)| one.heard && !one.is_over && one.until > now && !is_mine(one));
        let open = open.map(|(request, _)| *request).collect();
        self.0.clear();
        open
    }

    pub(super) fn expire(&mut self, now: u64) {
        self.0.retain(|_, one| one.until > now);
    }

    pub(super) fn wake(&self) -> Option<u64> {
        self.0.values().map(|one| one.until).min()
    }
}

impl Hosts {
    /// A client's request was received that other hosts may have received, too. The group decides
    /// who calls back: see [`Output::CallBack`].
    pub fn heard(&mut self, now: u64, request: RequestId) {
        if !self.is_whole() {
            return self.outputs.push_back(Output::CallBack { request, is_certain: false });
        }
        let election = self.elections.0.entry(request).or_default();
        election.heard = true;
        election.until = now.saturating_add(super::nanos(REMEMBER));
        let is_late = |since: u64| now.saturating_sub(since) > PATIENCE && !election.is_used;
        let takes_over = election.is_over;
        let takes_over = takes_over || election.winner.is_some_and(|(who, since)| is_late(since) && who != self.me);
        if takes_over || election.winner.is_none() {
            self.send(Message::Claim { request, takes_over });
        }
    }

    /// The client of this request was called back, or not reached.
    pub fn answered(&mut self, request: RequestId, reached: bool) {
        if self.is_joined() {
            self.send(Message::Over { request, reached });
        }
    }

    pub(super) fn claimed(&mut self, now: u64, from: Member, request: RequestId, takes_over: bool) {
        let election = self.elections.0.entry(request).or_default();
        election.until = now.saturating_add(super::nanos(REMEMBER));
        if election.winner.is_some() && !takes_over {
            return;
        }
        if election.is_over {
            election.failed.clear();
        }
        (election.winner, election.is_used, election.is_over) = (Some((from, now)), false, false);
        if from == self.me {
            self.outputs.push_back(Output::CallBack { request, is_certain: true });
        }
    }

    /// A member asks the group on behalf of this request's client.
    pub(super) fn claim_is_used(&mut self, request: RequestId, by: Member) {
        if let Some(election) = self.elections.0.get_mut(&request)
            && election.winner.is_some_and(|(winner, _)| winner == by)
        {
            election.is_used = true;
        }
    }

    pub(super) fn over(&mut self, now: u64, from: Member, request: RequestId, reached: bool) {
        let Some(election) = self.elections.0.get_mut(&request) else { return };
        if election.winner.is_none_or(|(winner, _)| winner != from) {
            return;
        }
        election.until = now.saturating_add(super::nanos(REMEMBER));
        if reached {
            election.is_over = true;
        } else {
            election.failed.insert(from);
            election.winner = None;
            self.take_over(now);
        }
    }

    /// Claims the requests whose winner has left, or has not reached the client.
    pub(super) fn take_over(&mut self, now: u64) {
        let mut orphaned = Vec::new();
        for (request, election) in &mut self.elections.0 {
            if election.winner.is_some_and(|(winner, _)| !self.members.contains_key(&winner)) && !election.is_over {
                election.winner = None;
            }
            let may_claim = election.heard && !election.is_over && !election.failed.contains(&self.me);
            if election.winner.is_none() && may_claim && election.until > now {
                orphaned.push(*request);
            }
        }
        for request in orphaned {
            self.send(Message::Claim { request, takes_over: false });
        }
    }
}
