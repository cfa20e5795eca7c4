//! Authorisation: who may fence what. Every action demands this permission.

use std::net::IpAddr;

use fence_common::keys::KeyOwner;
use fence_common::target::Target;
use fence_common::wire::Op;
use fence_config::Groups;

use crate::callback::Authenticated;

/// Permission to act on one domain. The hypervisor takes nothing less, and only [`authorize`]
/// grants it.
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
    #[error(
        "no group has both {ip} and {target}: add `ip = \"{ip}\"` and `uuid = \"{target}\"` to one group if it should"
    )]
    NotInAGroup {
        /// The callback address.
        ip: IpAddr,
        /// The target as the request spelled it.
        target: Target,
    },
    /// The request is signed with a group's own key. No group of that key has both the client's
    /// address and the target.
    #[error("no group whose key signed this has both {ip} and {target}")]
    NotWithThisKey {
        /// The callback address.
        ip: IpAddr,
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
    let (ip, owner) = (peer.ip(), peer.owner());
    if groups.permits(owner, ip, &target) {
        Ok(Authorized { op, target })
    } else if owner == KeyOwner::EVERYBODY {
        Err(Denied::NotInAGroup { ip, target })
    } else {
        Err(Denied::NotWithThisKey { ip, target })
    }
}
