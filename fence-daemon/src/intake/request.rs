//! A verified request: its content, its callback address, and how it came in.
//!
//! [`Verified`] is the first of the four types that a request passes. Only this folder makes one.
//! `callback` turns it into an `Authenticated`, `policy` into an `Authorized`, and `hypervisor`
//! into an `Outcome`.

use std::fmt;
use std::net::{IpAddr, SocketAddr, SocketAddrV6};
use std::sync::Arc;

use fence_common::caller::{Caller, Vouched, Who};
use fence_common::hash::HashKind;
use fence_common::key::Key;
use fence_common::keys::KeyOwner;
use fence_common::ledger::{Endpoint, RequestId};
use fence_common::rate_limit::Sender;
use fence_common::replay_cache::DatagramId;
use fence_common::target::Target;
use fence_common::wire::{Op, Request};
use fence_config::Alone;
use fence_net::{link, route};
use tokio::io::{AsyncRead, AsyncWrite};

use super::line::AtLine;
use crate::clock::Moment;
use crate::observe::requests::{About, Via};

/// A request of the right form with the right digest. (With `hash = "none"` only the form is
/// checked.)
///
/// It does not prove that its sender has the key *now*: it may be a copy of an old request.
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
    caller: Caller,
    domain: Option<Arc<Vouched>>,
    /// The index of the interface that the callback leaves by; 0 if the routing table decides.
    interface: u32,
    /// The index of the interface that it came by; 0 if that is not known.
    came_by: u32,
    origin: Arc<Origin>,
    via: Via,
    arrived: Moment,
    verified: Moment,
}

/// What the configuration says of the listener that a request came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    /// Its number in the configuration.
    pub listener: usize,
    /// The name of its section, if it has one.
    pub name: Option<String>,
    /// The digest of the exam.
    pub auth: HashKind,
    /// Whether no other hypervisor hears its requests.
    pub alone: Alone,
}

impl Default for Origin {
    fn default() -> Self {
        Self { listener: 0, name: None, auth: HashKind::Sha256, alone: Alone::Auto }
    }
}

impl Verified {
    /// `None` if the request has no known operation or family, which verification has refused
    /// before. `key` made its digest; it is the first key if there is no digest.
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
                // A link-local address is valid on one link only: the one that the request came by.
                let scope = if ip.is_unicast_link_local() { ifindex } else { 0 };
                SocketAddrV6::new(ip, request.port.get(), 0, scope).into()
            }
        };
        let interface = way_back(caller.ip(), ifindex, via);
        Some(Self::of(op, request, key, caller.into(), via, arrived).by(interface, ifindex))
    }

    /// A request whose client waits at the other end of its connection. `None` as with
    /// [`new`](Self::new).
    pub(super) fn connected(
        request: &Request,
        key: Option<Arc<Key>>,
        caller: Caller,
        via: Via,
        arrived: Moment,
    ) -> Option<Self> {
        Some(Self::of(request.op()?, request, key, caller, via, arrived))
    }

    /// A request that came over a line of this domain, which the hypervisor vouches for. `None` if
    /// it has no known operation.
    pub(super) fn on_line(request: &Request, domain: Arc<Vouched>, line: u32, arrived: Moment) -> Option<Self> {
        let caller = Caller::Line { domain: domain.uuid, line };
        let verified = Self::of(request.op()?, request, None, caller, Via::Serial, arrived);
        Some(Self { domain: Some(domain), ..verified })
    }

    fn of(op: Op, request: &Request, key: Option<Arc<Key>>, caller: Caller, via: Via, arrived: Moment) -> Self {
        Self {
            op,
            id: RequestId::of(op, request),
            datagram_id: DatagramId::of(request).copied(),
            sender: None,
            key,
            owner: KeyOwner::EVERYBODY,
            seqno: request.seqno.get(),
            target: request.domain_text().and_then(Target::parse),
            caller,
            domain: None,
            interface: 0,
            came_by: 0,
            origin: Arc::default(),
            via,
            arrived,
            verified: Moment::now(),
        }
    }

    fn by(self, interface: u32, came_by: u32) -> Self {
        Self { interface, came_by, ..self }
    }

    /// The same, and who sent it is known.
    pub(super) fn sent_by(self, sender: Sender) -> Self {
        Self { sender: Some(sender), ..self }
    }

    /// The same, and which listener it came to is known.
    pub(super) fn came_to(self, origin: &Arc<Origin>) -> Self {
        Self { origin: Arc::clone(origin), ..self }
    }

    /// The same, with a known owner of the signing key.
    pub(super) fn signed_for(self, owner: KeyOwner) -> Self {
        Self { owner, ..self }
    }

    /// The same, and the hypervisor knows the domain that it comes from.
    pub(super) fn vouched_for(self, domain: Option<Arc<Vouched>>) -> Self {
        Self { domain, ..self }
    }

    /// A verified request from nothing, for tests of later steps.
    #[cfg(test)]
    pub(crate) fn dangerous_for_test(request: &Request, key: Option<Arc<Key>>) -> Self {
        Self::new(request, key, 0, Via::Socket, Moment::now()).unwrap()
    }

    /// The same request, signed with a key of these groups.
    #[cfg(test)]
    pub(crate) fn dangerous_for_owner_for_test(self, owner: KeyOwner) -> Self {
        self.signed_for(owner)
    }

    /// The same request, from another listener.
    #[cfg(test)]
    pub(crate) fn dangerous_from_for_test(self, origin: Origin) -> Self {
        self.came_to(&Arc::new(origin))
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

    /// The ID of the datagram, which its replays share. `None` if it has no digest.
    #[must_use]
    pub fn datagram_id(&self) -> Option<DatagramId> {
        self.datagram_id
    }

    /// Its sender, as the kernel program's rate limits know it.
    #[must_use]
    pub fn sender(&self) -> Option<Sender> {
        self.sender
    }

    /// The key that signed the request. The callback uses this one even if the keys have changed
    /// since.
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

    /// The domain that the request names. `None` if it names none that could exist.
    #[must_use]
    pub fn target(&self) -> Option<&Target> {
        self.target.as_ref()
    }

    /// Where to call back, or the client's end of its connection.
    #[must_use]
    pub fn caller(&self) -> Caller {
        self.caller
    }

    /// The client, as groups and the log know it.
    #[must_use]
    pub fn who(&self) -> Who<'_> {
        Who { address: self.caller.address(), domain: self.domain.as_deref(), listener: self.origin.listener }
    }

    /// Whether it asks to fence the domain that it came from, over a line. What runs there after
    /// that has asked nothing.
    #[must_use]
    pub fn is_of_its_own_victim(&self) -> bool {
        let Some(domain) = self.domain.as_deref().filter(|_| self.via == Via::Serial) else { return false };
        matches!(self.op, Op::Off | Op::Reboot)
            && self.target.as_ref().is_some_and(|target| match target {
                Target::Uuid(uuid) => *uuid == domain.uuid,
                Target::Name(name) => *name == domain.name,
            })
    }

    /// The callback's address, with its interface: the one that the request came by, if a route
    /// leads back over it.
    #[must_use]
    pub fn endpoint(&self) -> Endpoint {
        Endpoint { caller: self.caller, interface: self.interface, is_connected: self.is_connected() }
    }

    /// The index of the interface that it came by; 0 if that is not known.
    #[must_use]
    pub fn came_by(&self) -> u32 {
        self.came_by
    }

    /// What the configuration says of the listener that it came to.
    #[must_use]
    pub fn origin(&self) -> &Origin {
        &self.origin
    }

    /// How it came in.
    #[must_use]
    pub fn via(&self) -> Via {
        self.via
    }

    /// How it came in, and to which listener, for the log.
    #[must_use]
    pub fn way(&self) -> impl fmt::Display {
        self.origin.name.as_ref().map_or_else(|| self.via.to_string(), |name| format!("{}:{name}", self.via))
    }

    /// Whether its client waits on the connection that it came over.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        match self.via {
            Via::Kernel | Via::Socket => false,
            Via::Tcp | Via::Vsock | Via::Serial => true,
        }
    }

    /// When the kernel program saw it, or the socket returned it.
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
        let (target, who, listener) = (self.target(), self.who(), self.origin.name.as_deref());
        About { op, target, client, who, seqno, via, listener, arrived, verified }
    }
}

/// A client's connection, whatever it leads over.
pub trait Duplex: AsyncRead + AsyncWrite + Unpin + Send + Sync + fmt::Debug {}

impl<C: AsyncRead + AsyncWrite + Unpin + Send + Sync + fmt::Debug> Duplex for C {}

/// A connection of any kind.
pub type Stream = Box<dyn Duplex>;

/// Where a request's client waits.
#[derive(Debug)]
pub enum Waits {
    /// At its callback address.
    ForCallback,
    /// At the other end of its own connection, which its exam and its answer belong to.
    Connected(Stream),
    /// On a line of its domain, without an exam.
    OnLine(AtLine),
}

/// A verified request, and where its client waits.
#[derive(Debug)]
pub struct Incoming {
    request: Verified,
    waits: Waits,
}

impl Incoming {
    /// A request whose client waits at the other end of `stream`.
    pub(super) fn connected(request: Verified, stream: Stream) -> Self {
        Self { request, waits: Waits::Connected(stream) }
    }

    /// A request whose client waits on a line.
    pub(super) fn on_line(request: Verified, line: AtLine) -> Self {
        Self { request, waits: Waits::OnLine(line) }
    }

    /// The request.
    #[must_use]
    pub fn request(&self) -> &Verified {
        &self.request
    }

    /// The request, and where its client waits.
    #[must_use]
    pub fn split(self) -> (Verified, Waits) {
        (self.request, self.waits)
    }
}

impl From<Verified> for Incoming {
    fn from(request: Verified) -> Self {
        Self { request, waits: Waits::ForCallback }
    }
}

/// The index of the interface that a callback to `ip` leaves by, for a request that came by
/// interface `ifindex`. 0 if the routing table decides.
///
/// Two interfaces' networks may use the same addresses, so the routing table may lead to another
/// guest than the client. The routing table still decides in two cases: for this host's own
/// addresses, and if no route leads back, as for guests behind a router.
fn way_back(ip: IpAddr, ifindex: u32, via: Via) -> u32 {
    // The kernel program passes what this host itself sends.
    if ifindex == 0 || (via == Via::Socket && route::is_local(ip).unwrap_or(false)) {
        return 0;
    }
    match route::leads_over(ip, ifindex) {
        // An interface that is gone or down reaches nobody, and another one may reach somebody
        // else.
        Ok(false) if link::one(ifindex).is_ok_and(|link| link.up) => 0,
        Ok(_) | Err(_) => ifindex,
    }
}
