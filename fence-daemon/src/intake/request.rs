//! A request that holds: what is known of it, where it is called back, and how it came in.
//!
//! [`Verified`] is the first of the four types that a request passes. Only this folder makes one. `callback` makes an
//! `Authenticated` of it, `policy` an `Authorized`, and `hypervisor` an `Outcome`.

use std::net::{IpAddr, SocketAddr, SocketAddrV6};
use std::sync::Arc;

use fence_common::key::Key;
use fence_common::keys::KeyOwner;
use fence_common::ledger::{Endpoint, RequestId};
use fence_common::rate_limit::Sender;
use fence_common::replay_cache::DatagramId;
use fence_common::target::Target;
use fence_common::wire::{Op, Request};
use fence_net::{link, route};

use crate::clock::Moment;
use crate::observe::requests::{About, Via};

/// A request of the right form with the right digest (or where the configuration says `hash = "none"`, of the right form).
/// That its sender has the key *now* is not shown yet: it may be a copy of an old one.
#[derive(Clone, Debug)]
pub struct Verified {
    op: Op,
    id: RequestId,
    datagram_id: Option<DatagramId>,
    sender: Option<Sender>,
    key: Option<Arc<Key>>,
    owner: KeyOwner,
    seqno: u32,
    target: Option<Target>,
    caller: SocketAddr,
    /// The number of the interface that the callback leaves by; 0 where the routing table decides.
    interface: u32,
    via: Via,
    arrived: Moment,
    verified: Moment,
}

impl Verified {
    /// `None` where the request has no known operation or family: whoever verified it has refused that before.
    /// `key` is what its digest was made with; the first one where it has none.
    pub(super) fn new(
        request: &Request,
        key: Option<Arc<Key>>,
        ifindex: u32,
        via: Via,
        arrived: Moment,
    ) -> Option<Self> {
        let op = request.op()?;
        let caller = match request.callback_ip()? {
            IpAddr::V4(ip) => SocketAddr::from((ip, request.port.get())),
            IpAddr::V6(ip) => {
                // A link-local address means something on its link only: the one that the request came by.
                let scope = if ip.is_unicast_link_local() { ifindex } else { 0 };
                SocketAddrV6::new(ip, request.port.get(), 0, scope).into()
            }
        };
        Some(Self {
            op,
            id: RequestId::of(op, request),
            datagram_id: DatagramId::of(request).copied(),
            sender: None,
            key,
            owner: KeyOwner::EVERYBODY,
            seqno: request.seqno.get(),
            target: request.domain_text().and_then(Target::parse),
            caller,
            interface: way_back(caller.ip(), ifindex, via),
            via,
            arrived,
            verified: Moment::now(),
        })
    }

    /// The same, and who sent it is known.
    pub(super) fn sent_by(self, sender: Sender) -> Self {
        Self { sender: Some(sender), ..self }
    }

    /// The same, and whose key it is signed with is known.
    pub(super) fn signed_for(self, owner: KeyOwner) -> Self {
        Self { owner, ..self }
    }

    /// Whether the request may name this callback address: a loopback one means whatever client runs on this host, in whose name a
    /// guest would act that may ask for it. `from_here`: the datagram came from this host.
    pub(super) fn may_be_called(&self, from_here: bool) -> bool {
        from_here || !self.caller.ip().is_loopback()
    }

    /// A verified request out of nowhere, for tests of what follows.
    #[cfg(test)]
    pub(crate) fn dangerous_for_test(request: &Request, key: Option<Arc<Key>>) -> Self {
        Self::new(request, key, 0, Via::Socket, Moment::now()).unwrap()
    }

    /// The same request, signed with a key of these groups.
    #[cfg(test)]
    pub(crate) fn dangerous_for_owner_for_test(self, owner: KeyOwner) -> Self {
        self.signed_for(owner)
    }

    /// The same request, arrived earlier by `age`.
    #[cfg(test)]
    pub(crate) fn dangerous_older_for_test(self, age: std::time::Duration) -> Self {
        Self { arrived: self.arrived.before(age), ..self }
    }

    /// What is asked.
    #[must_use]
    pub fn op(&self) -> Op {
        self.op
    }

    /// What its copies have in common.
    #[must_use]
    pub fn id(&self) -> RequestId {
        self.id
    }

    /// What tells the datagram from its other copies; `None` if nothing does.
    #[must_use]
    pub fn datagram_id(&self) -> Option<DatagramId> {
        self.datagram_id
    }

    /// Who sent it, as the kernel program's rate limits know it.
    #[must_use]
    pub fn sender(&self) -> Option<Sender> {
        self.sender
    }

    /// The key that its sender has, which the callback is to be made with, whatever the keys have become meanwhile.
    #[must_use]
    pub fn key(&self) -> Option<&Key> {
        self.key.as_deref()
    }

    /// Whose key that is.
    #[must_use]
    pub fn owner(&self) -> KeyOwner {
        self.owner
    }

    /// The client's number for it.
    #[must_use]
    pub fn seqno(&self) -> u32 {
        self.seqno
    }

    /// The domain it names; `None` if it names none that could exist.
    #[must_use]
    pub fn target(&self) -> Option<&Target> {
        self.target.as_ref()
    }

    /// Where to call back.
    #[must_use]
    pub fn caller(&self) -> SocketAddr {
        self.caller
    }

    /// Where the callback goes to, with the interface that it leaves by: the one that the request came by, if a route leads
    /// back over it.
    #[must_use]
    pub fn endpoint(&self) -> Endpoint {
        Endpoint { address: self.caller, interface: self.interface }
    }

    /// How it came in.
    #[must_use]
    pub fn via(&self) -> Via {
        self.via
    }

    /// When the kernel program saw it, or the socket gave it out.
    #[must_use]
    pub fn arrived(&self) -> Moment {
        self.arrived
    }

    /// When user space knew it as verified.
    #[must_use]
    pub fn verified(&self) -> Moment {
        self.verified
    }

    /// What is noted of it for `status`.
    #[must_use]
    pub fn about(&self) -> About<'_> {
        let Self { op, seqno, caller: client, via, arrived, verified, .. } = *self;
        About { op, target: self.target(), client, seqno, via, arrived, verified }
    }
}

/// The number of the interface that a callback to `ip` leaves by, for a request that came by the one with the number `ifindex`; 0 where
/// the routing table decides.
///
/// Networks on two interfaces may use the same addresses, so the routing table may lead to another guest than the one that asks. It
/// decides for this host itself (whose multicast comes back by the bridge, and whose own addresses are on any interface), and where no
/// route leads back, as for guests behind a router.
fn way_back(ip: IpAddr, ifindex: u32, via: Via) -> u32 {
    // The kernel program passes what this host itself sends.
    if ifindex == 0 || (via == Via::Socket && route::is_local(ip).unwrap_or(false)) {
        return 0;
    }
    match route::leads_over(ip, ifindex) {
        // Over an interface that is gone or down nobody can be called back, and over another one it may be somebody else.
        Ok(false) if link::one(ifindex).is_ok_and(|link| link.up) => 0,
        Ok(_) | Err(_) => ifindex,
    }
}
