//! A small group whose network neither fails nor waits, for one rule at a time.

use std::collections::VecDeque;
use std::time::Duration;

use fence_common::hosts::{
    ActEnd, ConfiguredHost, GroupAnswer, GroupNote, HostDomain, Hosts, HostsOptions, Incarnation, LocalState, Look,
    Member, NoMessage, Output, Question,
};
use fence_common::key::Key;
use fence_common::keys::{KeyPair, Keys};
use fence_common::ledger::RequestId;
use fence_common::target::Target;
use fence_common::wire::{Op, Request};
use uuid::Uuid;
use zerocopy::FromZeros;

use crate::driver::node;
use crate::world::{NAME, UUID};

pub(crate) const SECOND: u64 = 1_000_000_000;

/// One daemon, and what its host would find and do.
pub(crate) struct Seat {
    pub(crate) hosts: Hosts,
    pub(crate) member: Member,
    /// Whether it is in the group.
    pub(crate) is_there: bool,
    pub(crate) state: LocalState,
    /// How its acts end. `None`: they never do.
    pub(crate) end: Option<ActEnd>,
    /// The operations that it has carried out.
    pub(crate) acts: Vec<Op>,
    /// The number of its last act.
    pub(crate) last_act: u64,
    /// Whether its looks take long. Then they stay here.
    pub(crate) looks_slowly: bool,
    pub(crate) looks: Vec<u64>,
    pub(crate) called_back: Vec<RequestId>,
    pub(crate) fencing_asked: bool,
    pub(crate) foreign: Vec<NoMessage>,
}

pub(crate) struct Group {
    pub(crate) now: u64,
    pub(crate) seats: Vec<Seat>,
    pub(crate) answer: Option<GroupAnswer>,
    /// Whether the last host leaves right before somebody is ready to start.
    pub(crate) changes_before_ready: bool,
    /// Every message so far, with its sender.
    pub(crate) sent: Vec<(Member, Vec<u8>)>,
}

pub(crate) fn keys(secret: &[u8]) -> Keys {
    Keys::from(KeyPair::from(Key::new(secret).unwrap()))
}

pub(crate) fn request(op: Op, seqno: u32) -> RequestId {
    let mut request = Request::new_zeroed();
    request.seqno.set(seqno);
    request.domain[..NAME.len()].copy_from_slice(NAME.as_bytes());
    RequestId::of(op, &request)
}

impl Group {
    /// Daemons on these hosts, all of them in the group.
    pub(crate) fn of(nodes: &[usize]) -> Self {
        let mut group = Self::apart(nodes, HostsOptions::default());
        group.join(&(0..nodes.len()).collect::<Vec<_>>());
        group
    }

    /// Daemons on these hosts, none of them in the group. All hosts up to the last one are
    /// configured.
    pub(crate) fn apart(nodes: &[usize], options: HostsOptions) -> Self {
        let last = nodes.iter().max().copied().unwrap_or_default();
        let seat = |(at, host): (usize, &usize)| {
            let member = Member { node: node(*host), pid: 100 + u32::try_from(at).unwrap() };
            let incarnation = Incarnation([u8::try_from(at).unwrap(); 16]);
            let mut hosts = Hosts::new(member, incarnation, keys(b"a key"), options);
            let host = |host| ConfiguredHost { node: node(host), name: format!("host{host}") };
            hosts.configured(SECOND, (0..=last).map(host));
            Seat {
                hosts,
                member,
                is_there: false,
                state: LocalState::NotHere,
                end: Some(ActEnd::ProvenOff),
                acts: Vec::new(),
                last_act: 0,
                looks_slowly: false,
                looks: Vec::new(),
                called_back: Vec::new(),
                fencing_asked: false,
                foreign: Vec::new(),
            }
        };
        let seats = nodes.iter().enumerate().map(seat).collect();
        Self { now: 100 * SECOND, seats, answer: None, changes_before_ready: false, sent: Vec::new() }
    }

    /// These daemons are in the group now, and no others.
    pub(crate) fn join(&mut self, seats: &[usize]) {
        let members: Vec<_> = seats.iter().map(|at| self.seats[*at].member).collect();
        let nodes: Vec<_> = members.iter().map(|member| member.node).collect();
        for at in 0..self.seats.len() {
            let seat = &mut self.seats[at];
            seat.is_there = seats.contains(&at);
            if seat.is_there {
                seat.hosts.membership(self.now, &members);
                seat.hosts.quorum(self.now, true, &nodes);
            } else {
                seat.hosts.disconnected(self.now);
            }
        }
        self.run();
    }

    /// The domain runs at this daemon's host, and it has told of that.
    pub(crate) fn runs_at(&mut self, seat: usize) {
        self.seats[seat].state = LocalState::RunsHere;
        self.seats[seat].hosts.domains([HostDomain { uuid: UUID, name: NAME.into(), state: 1 }]);
        self.run();
    }

    /// Asks on behalf of a client. Returns the answer, if there is one.
    pub(crate) fn ask(&mut self, seat: usize, op: Op) -> Option<GroupAnswer> {
        let seqno = u32::try_from(self.sent.len()).unwrap();
        self.ask_of(seat, op, request(op, seqno), Target::Name(NAME.into()))
    }

    pub(crate) fn ask_of(&mut self, seat: usize, op: Op, request: RequestId, target: Target) -> Option<GroupAnswer> {
        let target = op.names_a_domain().then_some(target);
        let (age, left) = (Duration::ZERO, Duration::from_secs(20));
        self.seats[seat]
            .hosts
            .ask(self.now, Question { request, op, target, client: None, macs: Vec::new(), age, left });
        self.run();
        self.answer.take()
    }

    pub(crate) fn pass(&mut self, time: u64) {
        self.now += time;
        for seat in &mut self.seats {
            seat.hosts.tick(self.now);
        }
        self.run();
    }

    /// Delivers a message to all that are there.
    pub(crate) fn deliver(&mut self, from: Member, bytes: &[u8]) {
        for seat in self.seats.iter_mut().filter(|seat| seat.is_there) {
            seat.hosts.message(self.now, from, Some(self.now), bytes);
        }
    }

    /// Until nothing is left to do.
    pub(crate) fn run(&mut self) {
        let mut unsent = VecDeque::new();
        loop {
            let mut is_idle = true;
            for at in 0..self.seats.len() {
                while let Some(output) = self.seats[at].hosts.poll() {
                    is_idle = false;
                    if let Output::Send(bytes) = output {
                        unsent.push_back((self.seats[at].member, bytes));
                    } else if let Output::Answer { answer, .. } = output {
                        self.answer = Some(answer);
                    } else {
                        self.seats[at].take(self.now, output);
                    }
                }
            }
            if let Some((from, bytes)) = unsent.pop_front() {
                // 6 is `Message::Ready`.
                if self.changes_before_ready && bytes[10] == 6 {
                    self.changes_before_ready = false;
                    self.seats[2].is_there = false;
                    let members = [self.seats[0].member, self.seats[1].member];
                    self.seats[..2].iter_mut().for_each(|seat| seat.hosts.membership(self.now, &members));
                }
                self.deliver(from, &bytes);
                self.sent.push((from, bytes));
            } else if is_idle {
                return;
            }
        }
    }
}

impl Seat {
    fn take(&mut self, now: u64, output: Output) {
        match output {
            Output::Look { look, .. } if self.looks_slowly => self.looks.push(look),
            Output::Look { look, .. } => {
                let is_unknown = matches!(self.state, LocalState::NotHere | LocalState::CannotTell(_));
                let is_known = !is_unknown && self.state != LocalState::Arriving;
                let (uuid, name) = (is_known.then_some(UUID), is_known.then(|| NAME.to_owned()));
                self.hosts.looked(now, look, Look { state: self.state.clone(), uuid, name, changes: 1 });
            }
            Output::Act(order) => {
                self.acts.push(order.op());
                self.last_act = order.act();
                if let Some(end) = self.end.clone() {
                    let off = matches!(end, ActEnd::ProvenOff | ActEnd::Gone) && order.op() == Op::Off;
                    self.state = if off { LocalState::DefinedHere } else { self.state.clone() };
                    self.hosts.acted(now, order.act(), end, 1);
                }
            }
            Output::List { look } => {
                let uuid = Uuid::from_u128(self.member.pid.into());
                let domain = HostDomain { uuid, name: NAME.into(), state: 1 };
                self.hosts.listed(look, Ok(vec![domain]));
            }
            Output::Check { look } => self.hosts.checked(look, Ok(())),
            Output::CallBack { request, is_certain: true } => self.called_back.push(request),
            Output::AskFencing { .. } => self.fencing_asked = true,
            Output::Note(GroupNote::Foreign(_, trouble)) => self.foreign.push(trouble),
            Output::CallBack { .. } | Output::Note(_) | Output::Send(_) | Output::Answer { .. } => {}
        }
    }
}
