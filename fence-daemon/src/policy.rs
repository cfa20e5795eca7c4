//! Authorisation: who may fence what. Every action demands this permission.

use fence_common::caller::{Address, Who};
use fence_common::hosts::GroupOrder;
use fence_common::keys::KeyOwner;
use fence_common::target::Target;
use fence_common::wire::Op;
use fence_config::Groups;

use crate::callback::Authenticated;

/// Permission to act on one domain. The hypervisor takes nothing less. [`authorize`] grants it, or
/// another host has: see [`Authorized::by_all_hosts`].
#[derive(Debug)]
pub struct Authorized {
    op: Op,
    target: Target,
}

impl Authorized {
    /// What to do.
    #[must_use]
    pub fn op(&self) -> Op {
        self.op
    }

    /// Which domain to do it to.
    #[must_use]
    pub fn target(&self) -> &Target {
        &self.target
    }

    /// Permission for this host's part of an order that all hosts of the cluster carry out. The
    /// order's message was signed, and the host that has the client has authorized it.
    #[must_use]
    pub fn by_all_hosts(order: &GroupOrder) -> Self {
        Self { op: order.op(), target: order.target().clone() }
    }

    /// A permission from nothing, for tests of the actions.
    #[cfg(test)]
    pub(crate) fn dangerous_for_test(op: Op, target: Target) -> Self {
        Self { op, target }
    }
}

/// Why an authenticated request is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    /// The request names no domain that could exist, or its operation concerns none.
    #[error("the request names no domain")]
    NoDomain,
    /// The configuration has groups, but none has both the client's address and the target.
    #[error("no group has both {who} and {target}: add `{entry}` and `uuid = \"{target}\"` to one group if it should")]
    NotInAGroup {
        /// The client.
        who: String,
        /// What a group of it would say.
        entry: String,
        /// The target as the request spelled it.
        target: Target,
    },
    /// A group has both the client and the target, and does not count at the listener that the
    /// request came to.
    #[error(
        "the group that has both {who} and {target} does not count at this listener: change its `listener` if it should"
    )]
    NotAtThisListener {
        /// The client.
        who: String,
        /// The target as the request spelled it.
        target: Target,
    },
    /// The request is signed with a group's own key. No group of that key has both the client's
    /// address and the target.
    #[error("no group whose key signed this has both {who} and {target}")]
    NotWithThisKey {
        /// The client.
        who: String,
        /// The target as the request spelled it.
        target: Target,
    },
}

/// Decides whether an authenticated peer may have what its request asks: the operation, on the
/// named domain.
///
/// The callback address counts, as with stock servers.
///
/// # Errors
/// [`Denied`] with the reason, for the log.
pub fn authorize(groups: &Groups, peer: &Authenticated) -> Result<Authorized, Denied> {
    let op = peer.request().op();
    let Some(target) = peer.request().target().filter(|_| op.names_a_domain()).cloned() else {
        return Err(Denied::NoDomain);
    };
    let (who, owner) = (peer.request().who(), peer.owner());
    if groups.permits(owner, &who, &target) {
        Ok(Authorized { op, target })
    } else if groups.permits_elsewhere(owner, &who, &target) {
        Err(Denied::NotAtThisListener { who: who.to_string(), target })
    } else if owner == KeyOwner::EVERYBODY {
        Err(Denied::NotInAGroup { who: who.to_string(), entry: entry(&who), target })
    } else {
        Err(Denied::NotWithThisKey { who: who.to_string(), target })
    }
}

/// What a group would say to have this client.
fn entry(who: &Who<'_>) -> String {
    match (who.domain, who.address) {
        (Some(domain), _) => format!("from = \"{}\"", domain.name.escape_debug()),
        (None, Address::Ip(ip)) => format!("ip = \"{ip}\""),
        (None, Address::Cid(cid)) => format!("ip = \"{cid}\""),
        (None, Address::Domain(uuid)) => format!("from = \"{uuid}\""),
    }
}
