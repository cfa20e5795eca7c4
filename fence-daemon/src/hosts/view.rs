//! What is known of the cluster, for reports.

use std::sync::{Arc, Mutex};

use fence_common::hosts::HostDomain;
use fence_common::sync::lock;

use super::transport::{Member, Software};
use crate::clock::Moment;

/// The cluster as this host sees it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct View {
    /// This daemon in the group; `None` if it has not joined.
    pub ours: Option<Member>,
    /// Why it has not joined.
    pub lost: Option<String>,
    /// Whether corosync has quorum here.
    pub quorate: bool,
    /// The configured hosts, by node ID.
    pub hosts: Vec<HostView>,
    /// The members of fence_virtd's group.
    pub stock: Vec<Member>,
}

/// A configured host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostView {
    /// Its node ID.
    pub node: u32,
    /// Its name.
    pub name: Option<String>,
    /// Whether a daemon of it is in the group.
    pub present: bool,
    /// When it was last heard.
    pub heard: Option<Moment>,
    /// The version of its messages.
    pub version: Option<u32>,
    /// Whether its messages are signed with an accepted key.
    pub key_agrees: Option<bool>,
    /// The domains that it has told of, by name.
    pub domains: Arc<[HostDomain]>,
    /// The version of its daemon; `None` if that is not there.
    pub software: Option<Software>,
    /// How far its clock is ahead of this host's in milliseconds, at least. `None` if not known.
    pub clock_ahead_ms: Option<i64>,
    /// When it was fenced last, by Pacemaker's word.
    pub fenced: Option<Moment>,
}

/// The view that the driver writes and reports read.
#[derive(Clone, Debug, Default)]
pub struct Shown(Arc<Mutex<View>>);

impl Shown {
    /// What is known now.
    #[must_use]
    pub fn now(&self) -> View {
        lock(&self.0).clone()
    }

    /// Why the other hosts cannot be asked. `None`: they can.
    pub(super) fn alone(&self) -> Option<String> {
        let view = self.now();
        view.ours.is_none().then(|| view.lost.unwrap_or_else(|| "corosync is not connected yet".to_owned()))
    }

    pub(super) fn set(&self, view: View) {
        *lock(&self.0) = view;
    }
}
