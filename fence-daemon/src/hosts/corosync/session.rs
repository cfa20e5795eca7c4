//! One connection to corosync, from the join to the loss.

use std::collections::VecDeque;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::mpsc::Receiver;
use std::time::{Duration, SystemTime};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::super::transport::{Departure, Event, HostNode, Member, SendError};
use super::beats::{GroupBeats, GroupFrame};
use super::ffi::{Groups, Libraries, Map, Raw, Sent, Votes};
use super::no_group::NoGroup;
use super::nodes;
use super::outlet::Outlet;
use super::{GROUP, Order, STOCK};
use crate::clock::Moment;

/// How often a beat goes through the group.
const BEAT: Duration = Duration::from_secs(1);
/// One's own beat that takes longer is reported.
const STALLED: Duration = Duration::from_secs(2);
/// How long no message of one's own may come back. Then the group is joined again. A change of
/// membership takes some seconds.
const DEAF: Duration = Duration::from_secs(15);
/// How often `fence_virtd`'s groups are looked at.
const LOOK: Duration = Duration::from_secs(2);
/// The pause before corosync is asked again to take a message.
const AGAIN: Duration = Duration::from_millis(5);
/// How many messages are taken before others' turn.
const AT_ONCE: usize = 64;

/// A connection that is joined, or about to be.
pub(super) struct Session<'a> {
    groups: Groups,
    votes: Votes,
    map: Map,
    outlet: &'a Outlet,
    wake: &'a OwnedFd,
    orders: &'a Receiver<Order>,
    ours: Member,
    is_joined: bool,
    beats: GroupBeats,
    /// The beat that is to be sent next, and was not taken yet.
    beat: Option<[u8; super::beats::BEAT]>,
    next_beat: Moment,
    next_look: Moment,
    /// Messages that corosync has not taken yet.
    waiting: VecDeque<Order>,
    hosts: Option<Vec<HostNode>>,
    /// The map may have changed since it was read.
    is_map_old: bool,
    is_quorate: Option<bool>,
    /// The hosts of corosync's ring.
    ring: Vec<u32>,
    stock: Vec<Member>,
    /// Members whose frames are not understood, logged once.
    strangers: Vec<Member>,
}

impl<'a> Session<'a> {
    /// Connects and asks to join.
    pub(super) fn connect(outlet: &'a Outlet, wake: &'a OwnedFd, orders: &'a Receiver<Order>) -> Result<Self, NoGroup> {
        let libraries = Libraries::load()?;
        let groups = Groups::connect(libraries)?;
        let votes = Votes::connect(libraries)?;
        let map = Map::connect(libraries, nodes::PREFIX)?;
        let ours = Member { node: groups.node()?, pid: std::process::id() };
        let mut first = [0; 8];
        getrandom::fill(&mut first).map_err(|error| NoGroup::System(error.to_string()))?;
        let now = Moment::now();
        if groups.join(GROUP)? == Sent::NotNow {
            return Err(NoGroup::Call { call: "cpg_join", status: 6 });
        }
        Ok(Self {
            groups,
            votes,
            map,
            outlet,
            wake,
            orders,
            ours,
            is_joined: false,
            beats: GroupBeats::new(ours, u64::from_ne_bytes(first)),
            beat: None,
            next_beat: now.plus(DEAF),
            next_look: now,
            waiting: VecDeque::new(),
            hosts: None,
            is_map_old: true,
            is_quorate: None,
            ring: Vec::new(),
            stock: Vec::new(),
            strangers: Vec::new(),
        })
    }

    /// Serves until the connection is lost: why.
    pub(super) fn run(&mut self) -> NoGroup {
        let begun = Moment::now();
        let why = loop {
            if !self.is_joined && Moment::now().since(begun) > DEAF {
                break NoGroup::Deaf(DEAF);
            }
            match self.round() {
                Ok(()) => {}
                Err(why) => break why,
            }
        };
        for order in self.waiting.drain(..) {
            let _ = order.done.send(Err(SendError::NotJoined));
        }
        if why == NoGroup::Ended {
            self.groups.leave(GROUP);
        }
        why
    }

    /// Waits for something, and handles it.
    fn round(&mut self) -> Result<(), NoGroup> {
        self.outlet.leave()?;
        if self.outlet.is_closed() {
            return Err(NoGroup::Ended);
        }
        let ready = self.wait()?;
        self.outlet.enter();
        if ready.late > STALLED && self.is_joined {
            self.stalled(ready.late)?;
        }
        // The vote first: who acts on a message must not believe in a quorum that is lost already.
        if ready.votes {
            self.take_ring()?;
        }
        if ready.map {
            self.map.dispatch()?;
            self.is_map_old = true;
        } else if self.is_map_old && self.is_joined {
            // A reload changes many keys: the list is read when no more changes come.
            self.read_hosts()?;
        }
        self.hear(ready.is_hung_up)?;
        if self.is_joined {
            self.speak()?;
        }
        self.look()
    }

    /// Waits until a descriptor is ready or something is due.
    fn wait(&self) -> Result<Ready, NoGroup> {
        let now = Moment::now();
        let has_to_send = self.beat.is_some() || !self.waiting.is_empty();
        let due = self.next_beat.min(self.next_look).since(now);
        let patience = if has_to_send {
            AGAIN
        } else if self.is_map_old && self.is_joined {
            Duration::ZERO
        } else {
            due
        };
        let mut fds = [
            PollFd::from_borrowed_fd(self.groups.descriptor()?, PollFlags::IN),
            PollFd::from_borrowed_fd(self.votes.descriptor()?, PollFlags::IN),
            PollFd::from_borrowed_fd(self.map.descriptor()?, PollFlags::IN),
            PollFd::from_borrowed_fd(self.wake.as_fd(), PollFlags::IN),
        ];
        let timeout = Timespec::try_from(patience).map_err(|error| NoGroup::System(error.to_string()))?;
        match poll(&mut fds, Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        // The thread may have been stopped meanwhile, as by SIGSTOP or swapping.
        let late = Moment::now().since(now.plus(patience));
        let [groups, votes, map, wake] = fds.map(|fd| fd.revents());
        if wake.contains(PollFlags::IN) {
            let mut count = [0; 8];
            let _ = rustix::io::read(self.wake, &mut count);
        }
        let ended = PollFlags::HUP | PollFlags::ERR | PollFlags::NVAL;
        let is_hung_up = [groups, votes, map].into_iter().any(|one| one.intersects(ended));
        Ok(Ready { votes: votes.contains(PollFlags::IN), map: map.contains(PollFlags::IN), is_hung_up, late })
    }

    /// Takes what has come through the group.
    fn hear(&mut self, is_hung_up: bool) -> Result<(), NoGroup> {
        for _ in 0..AT_ONCE {
            let brought = self.groups.dispatch()?;
            if brought.is_empty() {
                // What was there before the end has been taken.
                return if is_hung_up { Err(NoGroup::Closed) } else { Ok(()) };
            }
            for raw in brought {
                match raw {
                    Raw::Message(from, frame) => self.message(from, &frame)?,
                    Raw::Members(all, left) => self.members(all, left)?,
                }
            }
        }
        Ok(())
    }

    fn message(&mut self, from: Member, frame: &[u8]) -> Result<(), NoGroup> {
        if !self.is_joined {
            return Ok(());
        }
        match self.beats.hear(from, frame, Moment::now(), SystemTime::now()) {
            Some(GroupFrame::Message(sent_after, bytes)) => {
                self.outlet.emit(Event::Message { from, sent_after, bytes: bytes.to_vec() })
            }
            Some(GroupFrame::Own(took)) => {
                if took > STALLED {
                    self.stalled(took)?;
                }
                self.outlet.emit(Event::Alive(from, None))
            }
            Some(GroupFrame::Other(vitals)) => self.outlet.emit(Event::Alive(from, Some(vitals))),
            None => {
                if !self.strangers.contains(&from) {
                    tracing::warn!(%from, group = GROUP, "a member of the group speaks another version: its messages are ignored");
                    self.strangers.push(from);
                }
                Ok(())
            }
        }
    }

    /// Something stood still for so long.
    fn stalled(&self, took: Duration) -> Result<(), NoGroup> {
        tracing::warn!(?took, "messages of the other hosts waited: this daemon, corosync or the network stood still");
        self.outlet.emit(Event::Stalled(took))
    }

    fn members(&mut self, all: Vec<Member>, left: Vec<(Member, Departure)>) -> Result<(), NoGroup> {
        if !all.contains(&self.ours) {
            // Others may come before one's own join does.
            return if self.is_joined { Err(NoGroup::NotMember) } else { Ok(()) };
        }
        let mut left = left;
        if self.is_joined {
            self.ask_quorum()?;
        } else {
            self.is_joined = true;
            left.clear();
            self.outlet.joined(self.ours)?;
            tracing::info!(node = self.ours.node, members = all.len(), "joined the group of the other hosts");
            self.read_hosts()?;
            // corosync sends its ring to each one that connects.
            self.take_ring()?;
            self.tell_quorum()?;
        }
        for (member, why) in &left {
            tracing::warn!(%member, %why, "a host's daemon has left the group");
        }
        self.strangers.retain(|stranger| all.contains(stranger));
        // A beat at once: who has joined learns how old messages are.
        self.next_beat = Moment::now();
        self.outlet.emit(Event::Members { all, left })
    }

    /// Sends the beat that is due, and what the daemon wants to send.
    fn speak(&mut self) -> Result<(), NoGroup> {
        let now = Moment::now();
        if self.beats.oldest(now).is_some_and(|age| age > DEAF) {
            return Err(NoGroup::Deaf(DEAF));
        }
        if self.beat.is_none() && now >= self.next_beat {
            self.beat = Some(self.beats.beat(now, SystemTime::now()));
            self.next_beat = now.plus(BEAT);
        }
        if let Some(beat) = &self.beat {
            if self.groups.send([&beat[..], &[]])? == Sent::NotNow {
                return Ok(());
            }
            self.beat = None;
        }
        self.waiting.extend(self.orders.try_iter());
        while let Some(order) = self.waiting.pop_front() {
            let result = if Moment::now() >= order.by {
                Err(SendError::Late)
            } else if self.groups.send([&self.beats.header()[..], &order.bytes])? == Sent::NotNow {
                self.waiting.push_front(order);
                break;
            } else {
                Ok(())
            };
            // A sender that has given up needs no answer.
            let _ = order.done.send(result);
        }
        Ok(())
    }

    /// Takes the rings that have come, and tells each.
    fn take_ring(&mut self) -> Result<(), NoGroup> {
        while let Some(ring) = self.votes.dispatch()? {
            self.ring = ring;
            self.tell_quorum()?;
        }
        self.ask_quorum()
    }

    /// Asks whether there is quorum, and tells a change.
    fn ask_quorum(&mut self) -> Result<(), NoGroup> {
        if self.is_quorate == Some(self.has_quorum()?) { Ok(()) } else { self.tell_quorum() }
    }

    /// Whether there is quorum. Without a ring nobody knows of what.
    fn has_quorum(&self) -> Result<bool, NoGroup> {
        Ok(self.votes.is_quorate()? && !self.ring.is_empty())
    }

    /// Tells the ring and its quorum.
    fn tell_quorum(&mut self) -> Result<(), NoGroup> {
        if !self.is_joined {
            return Ok(());
        }
        let is_quorate = self.has_quorum()?;
        let event = Event::Quorum { quorate: is_quorate, ring: self.ring.clone() };
        if self.is_quorate == Some(is_quorate) {
            return self.outlet.emit(event);
        }
        match (is_quorate, self.votes.has_provider()) {
            (true, _) => tracing::info!("this host's part of the cluster has quorum"),
            (false, true) => {
                tracing::warn!("this host's part of the cluster has no quorum: nobody is fenced through the group");
            }
            (false, false) => tracing::warn!(
                "corosync.conf has no quorum provider, so nobody is fenced through the group: set `provider: corosync_votequorum`"
            ),
        }
        self.is_quorate = Some(is_quorate);
        self.outlet.emit(event)
    }

    /// Reads the node list, and tells a change.
    fn read_hosts(&mut self) -> Result<(), NoGroup> {
        let hosts = nodes::hosts(&self.map.read(nodes::PREFIX)?);
        self.is_map_old = false;
        if self.hosts.as_ref() == Some(&hosts) {
            return Ok(());
        }
        if hosts.is_empty() {
            tracing::warn!(
                "corosync.conf has no node list with the ids of all nodes: a machine that runs on no host cannot be proven off"
            );
        } else {
            let list = hosts.iter().map(HostNode::to_string).collect::<Vec<_>>().join(", ");
            tracing::info!(hosts = list, "the configured hosts");
        }
        self.hosts = Some(hosts.clone());
        self.outlet.emit(Event::Configured(hosts))
    }

    /// Looks at `fence_virtd`'s groups, and tells a change.
    fn look(&mut self) -> Result<(), NoGroup> {
        let now = Moment::now();
        if !self.is_joined || now < self.next_look {
            return Ok(());
        }
        self.next_look = now.plus(LOOK);
        let mut stock = Vec::new();
        for group in STOCK {
            stock.extend(self.groups.members_of(group)?);
        }
        if stock == self.stock {
            return Ok(());
        }
        for member in stock.iter().filter(|member| !self.stock.contains(member)) {
            tracing::warn!(
                %member,
                "fence_virtd runs with backend cpg in this cluster: it calls machines fenced that run elsewhere; stop it on all hosts"
            );
        }
        self.stock.clone_from(&stock);
        self.outlet.emit(Event::Stock(stock))
    }
}

/// What the wait brought.
struct Ready {
    votes: bool,
    map: bool,
    is_hung_up: bool,
    /// How much longer it took than it should have.
    late: Duration,
}
