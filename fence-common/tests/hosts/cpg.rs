//! corosync's closed process groups, as far as they promise anything.
//!
//! * All nodes of a ring deliver the same messages and memberships in one order, each at its own
//!   pace. A sender's messages keep their order.
//! * When a ring breaks, the nodes that stay together deliver the same. What any of them has
//!   delivered all of them deliver. Beyond that, each message of a node that stays is delivered.
//!   Messages of the nodes that are gone may be missing, and later ones are delivered all the same.
//! * A node that is gone may have delivered more, and less.
//! * The next membership follows. What was not sent yet is sent in it.
//! * Quorum comes by itself, in no order with the messages.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::rc::Rc;

use fence_common::hosts::Member;

use crate::random::Random;

/// What a daemon gets from corosync.
#[derive(Clone, Debug)]
pub(crate) enum Item {
    /// A sender, when it sent, and what.
    Message(Member, u64, Rc<[u8]>),
    Membership(Vec<Member>),
}

#[derive(Debug, Default)]
struct Node {
    ring: u32,
    /// What is not delivered yet, each with the ring that it was ordered in.
    inbox: VecDeque<(u32, Item)>,
    outbox: VecDeque<(Member, u64, Rc<[u8]>)>,
}

#[derive(Debug, Default)]
struct Ring {
    nodes: BTreeSet<usize>,
    group: Vec<Member>,
}

/// corosync on all nodes.
#[derive(Debug, Default)]
pub(crate) struct Cpg {
    nodes: Vec<Node>,
    rings: BTreeMap<u32, Ring>,
    next: u32,
}

impl Cpg {
    pub(crate) fn new(nodes: usize) -> Self {
        let ring = Ring { nodes: (0..nodes).collect(), group: Vec::new() };
        Self { nodes: (0..nodes).map(|_| Node::default()).collect(), rings: [(0, ring)].into(), next: 1 }
    }

    /// The number of a node's ring.
    pub(crate) fn ring_number(&self, node: usize) -> u32 {
        self.nodes[node].ring
    }

    /// The nodes of a node's ring.
    pub(crate) fn ring(&self, node: usize) -> &BTreeSet<usize> {
        &self.rings[&self.nodes[node].ring].nodes
    }

    pub(crate) fn send(&mut self, now: u64, node: usize, from: Member, bytes: Vec<u8>) {
        self.nodes[node].outbox.push_back((from, now, bytes.into()));
    }

    pub(crate) fn has_unsent(&self, node: usize) -> bool {
        !self.nodes[node].outbox.is_empty()
    }

    pub(crate) fn has_undelivered(&self, node: usize) -> bool {
        !self.nodes[node].inbox.is_empty()
    }

    /// The next message of a node gets its place in the order.
    pub(crate) fn order(&mut self, node: usize) {
        if let Some((from, sent, bytes)) = self.nodes[node].outbox.pop_front() {
            self.append(self.nodes[node].ring, &Item::Message(from, sent, bytes));
        }
    }

    pub(crate) fn deliver(&mut self, node: usize) -> Option<Item> {
        self.nodes[node].inbox.pop_front().map(|(_, item)| item)
    }

    /// A daemon joins. It gets nothing from before.
    pub(crate) fn join(&mut self, node: usize, member: Member) {
        self.nodes[node].inbox.clear();
        self.change(node, |group| group.push(member));
    }

    /// A daemon is gone. Some of what it wanted to send may be lost.
    pub(crate) fn leave(&mut self, node: usize, member: Member, random: &mut Random) {
        let unsent = random.below(self.nodes[node].outbox.len() + 1);
        self.nodes[node].outbox.truncate(unsent);
        while self.has_unsent(node) {
            self.order(node);
        }
        self.nodes[node].inbox.clear();
        self.change(node, |group| group.retain(|other| *other != member));
    }

    fn change(&mut self, node: usize, change: impl FnOnce(&mut Vec<Member>)) {
        let number = self.nodes[node].ring;
        let ring = self.rings.get_mut(&number).unwrap();
        change(&mut ring.group);
        let item = Item::Membership(ring.group.clone());
        self.append(number, &item);
    }

    fn append(&mut self, ring: u32, item: &Item) {
        for node in &self.rings[&ring].nodes {
            self.nodes[*node].inbox.push_back((ring, item.clone()));
        }
    }

    /// Nodes with the same number in `parts` form a ring from now on.
    pub(crate) fn regroup(&mut self, parts: &[usize], random: &mut Random) {
        let numbers: BTreeSet<_> = parts.iter().copied().collect();
        let nodes_of = |number| (0..parts.len()).filter(|node| parts[*node] == number).collect::<BTreeSet<_>>();
        let mut new: Vec<_> = numbers.into_iter().map(nodes_of).collect();
        new.retain(|nodes| nodes.iter().any(|node| self.ring(*node) != nodes));
        for nodes in new {
            let old: BTreeSet<_> = nodes.iter().map(|node| self.nodes[*node].ring).collect();
            let mut group = Vec::new();
            for ring in old {
                let together: BTreeSet<_> = self.rings[&ring].nodes.intersection(&nodes).copied().collect();
                self.recover(ring, &together, random);
                let is_there = |member: &&Member| together.contains(&node_of(**member));
                group.extend(self.rings[&ring].group.iter().filter(is_there).copied());
                let left = self.rings.get_mut(&ring).unwrap();
                left.nodes.retain(|node| !together.contains(node));
                left.group.retain(|member| !together.contains(&node_of(*member)));
            }
            let ring = self.next;
            self.next += 1;
            for node in &nodes {
                self.nodes[*node].ring = ring;
            }
            let item = Item::Membership(group.clone());
            self.rings.insert(ring, Ring { nodes, group });
            self.append(ring, &item);
        }
        self.rings.retain(|_, ring| !ring.nodes.is_empty());
    }

    /// Loses messages of a broken ring that none of those who stay `together` has delivered.
    fn recover(&mut self, ring: u32, together: &BTreeSet<usize>, random: &mut Random) {
        if *together == self.rings[&ring].nodes {
            return;
        }
        let of_ring = |node: &usize| self.nodes[*node].inbox.iter().filter(|(number, _)| *number == ring).count();
        let open = together.iter().map(of_ring).min().unwrap_or_default();
        let Some(first) = together.first() else { return };
        let inbox = &self.nodes[*first].inbox;
        let tail: Vec<_> = inbox.iter().skip(inbox.len() - open).map(|(_, item)| item.clone()).collect();
        let is_kept: Vec<_> = tail
            .iter()
            .map(|item| match item {
                Item::Membership(_) => true,
                Item::Message(from, ..) => together.contains(&node_of(*from)) || random.percent(50),
            })
            .collect();
        for node in together {
            let inbox = &mut self.nodes[*node].inbox;
            let begin = inbox.len() - open;
            let mut at = 0;
            inbox.retain(|_| {
                at += 1;
                at <= begin || is_kept[at - 1 - begin]
            });
        }
    }
}

/// The index of a member's node.
pub(crate) fn node_of(member: Member) -> usize {
    usize::try_from(member.node.0).unwrap() - 1
}
