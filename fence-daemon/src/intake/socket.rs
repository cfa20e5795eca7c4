//! The UDP socket that is always open. It receives requests from this host itself, those that the
//! kernel program passes, and all requests if no program is attached.
//!
//! It is bound to the group's address, so it never gets unicast to the port. It hears the group
//! only on interfaces where it has joined it. That membership also makes a snooping bridge deliver
//! the group here.

use std::mem::MaybeUninit;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd as _;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use fence_common::admit::{Rules, admit};
use fence_common::caller::Address;
use fence_common::key::Key;
use fence_common::keys::KeyOwner;
use fence_common::sync::lock;
use fence_common::verdict::{Counters, Verdict};
use fence_common::wire::Request;
use fence_net::interface::Interface;
use socket2::{SockRef, Socket};
use tokio::io::Interest;
use tokio::net::UdpSocket;
use tokio::sync::watch;
use zerocopy::FromBytes;

use super::datagram::{Datagram, receive};
use super::group_socket::{Binding, bind_to, bound, is_of_the_link, join, join_again, leave, taken_over};
pub use super::group_socket::{SocketError, probe};
use super::judge::Judge;
use super::keyring::Keyring;
use super::passed::{Passed, kept_name};
use super::request::Verified;
use crate::clock::Moment;
use crate::observe::limit::LogLimit;
use crate::observe::requests::Via;
use crate::systemd;

/// How long to wait before the next read after the socket itself failed (an interface went down,
/// say).
const AFTER_ERROR: Duration = Duration::from_millis(100);

/// More datagrams than the socket's buffer holds.
///
/// The kernel counts at least 512 bytes for each, of 208 KiB unless an administrator made it
/// larger. A reader of that many has read all that was there at its start, however many arrive
/// meanwhile.
const QUEUE_MAX: usize = 4096;

/// How long at most the reader takes to let go of a socket that is being replaced.
const LET_GO: Duration = Duration::from_millis(500);

/// The socket, and the rules by which it accepts a datagram.
#[derive(Debug)]
pub struct RequestSocket {
    group: IpAddr,
    port: u16,
    /// A link-local group can only be bound together with an interface, and the socket of a group
    /// that another listener hears elsewhere must be. So these sockets open once the interface is
    /// there, and again when the interface is replaced.
    socket: watch::Sender<Option<Arc<UdpSocket>>>,
    binding: Mutex<Binding>,
    /// The name by which systemd keeps the socket.
    kept: Mutex<Option<String>>,
    /// An earlier daemon has opened it, and may have joined the group.
    is_taken_over: bool,
    rules: Rules,
    judge: Judge,
    counters: Mutex<Counters>,
    complaints: LogLimit,
}

impl RequestSocket {
    /// Opens the socket. It hears nothing before [`RequestSocket::join`]. Must be called within a
    /// tokio runtime.
    ///
    /// # Errors
    /// See [`SocketError`].
    pub fn open(group: IpAddr, port: u16, rules: Rules, keys: impl Into<Keyring>) -> Result<Self, SocketError> {
        let binding = if is_of_the_link(group) { Binding::ToTheLink } else { Binding::Free };
        Self::bound(group, port, rules, keys, binding, None)
    }

    /// As [`open`](Self::open), beside other listeners. `is_shared` says that one of them hears the
    /// same group at the same port through another interface. On `interface` an earlier daemon's
    /// socket is taken over, and this one is kept for the next daemon.
    ///
    /// # Errors
    /// See [`SocketError`].
    pub fn beside(
        group: IpAddr,
        port: u16,
        rules: Rules,
        keys: impl Into<Keyring>,
        is_shared: bool,
        interface: Option<&str>,
        passed: &mut Passed,
    ) -> Result<Self, SocketError> {
        let binding = match (is_of_the_link(group), is_shared) {
            (true, _) => Binding::ToTheLink,
            (false, true) => Binding::ToTheInterface,
            (false, false) => Binding::Free,
        };
        if binding != Binding::Free {
            let bound_to = interface.filter(|_| binding == Binding::ToTheInterface).and_then(Interface::named);
            let kept = bound_to.and_then(|interface| passed.kept_on(group, port, &interface));
            let opened = Self::bound(group, port, rules, keys, binding, kept)?;
            interface.into_iter().for_each(|interface| opened.keep(interface));
            return Ok(opened);
        }
        let kept = passed.kept(group, port).map(|(heard, socket)| {
            if interface != Some(heard.as_str()) {
                // The configuration has changed. What was heard there is not ours any more.
                kept_name(&heard).iter().for_each(|name| systemd::keep_no_more(name));
                let index = Interface::named(&heard).map(|heard| heard.index);
                if let Some(Err(error)) = index.map(|index| leave(&socket, group, index)) {
                    tracing::debug!(interface = %heard, "leaving the group: {error}");
                }
                let mut byte = [MaybeUninit::uninit(); 1];
                let _ = (0..QUEUE_MAX).take_while(|_| socket.recv(&mut byte).is_ok()).count();
            }
            socket
        });
        let opened = Self::bound(group, port, rules, keys, binding, kept)?;
        if let Some(interface) = interface {
            opened.keep(interface);
        }
        Ok(opened)
    }

    /// Lets systemd keep the socket over a restart, for this interface. One of the link does not
    /// outlive it.
    pub fn keep(&self, interface: &str) {
        let current = self.socket.borrow().clone().filter(|_| self.binding() != Binding::ToTheLink);
        let Some((name, socket)) = kept_name(interface).zip(current) else { return };
        match systemd::keep(&name, socket.as_fd()) {
            Ok(()) => *lock(&self.kept) = Some(name),
            Err(error) => tracing::debug!("systemd does not keep the request socket over a restart: {error}"),
        }
    }

    /// Lets systemd close its copy of the socket.
    pub fn keep_no_more(&self) {
        lock(&self.kept).take().iter().for_each(|name| systemd::keep_no_more(name));
    }

    fn binding(&self) -> Binding {
        *lock(&self.binding)
    }

    /// Binds the socket to its interface too, so that another listener can hear the same group
    /// elsewhere. What waits in the socket stays.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn narrow(&self, interface: &Interface) -> Result<(), SocketError> {
        let Some(socket) = self.socket.borrow().clone() else { return Ok(()) };
        let mut binding = lock(&self.binding);
        if *binding == Binding::Free {
            bind_to(&SockRef::from(&*socket), self.group, interface.index).map_err(|error| SocketError::Kernel {
                what: "bind",
                address: SocketAddr::new(self.group, self.port),
                error,
            })?;
            *binding = Binding::ToTheInterface;
        }
        Ok(())
    }

    fn bound(
        group: IpAddr,
        port: u16,
        rules: Rules,
        keys: impl Into<Keyring>,
        binding: Binding,
        kept: Option<Socket>,
    ) -> Result<Self, SocketError> {
        let (judge, is_taken_over) = (Judge::new(keys.into()), kept.is_some());
        let socket = match kept {
            Some(kept) => Some(Arc::new(taken_over(kept, group, port)?)),
            None if binding == Binding::Free => Some(Arc::new(bound(group, port, 0, binding)?)),
            None => None,
        };
        let (socket, _) = watch::channel(socket);
        let complaints = LogLimit::new(1, Duration::from_secs(60));
        let (binding, kept, counters) = (Mutex::new(binding), Mutex::default(), Mutex::default());
        Ok(Self { group, port, socket, binding, kept, is_taken_over, rules, judge, counters, complaints })
    }

    /// Judges by this from now on, as other listeners do. Until then only the key counts.
    #[must_use]
    pub fn judged_by(self, judge: Judge) -> Self {
        Self { judge, ..self }
    }

    /// Whether the group differs from network to network, so that the configuration must name one
    /// interface.
    #[must_use]
    pub fn needs_interface(&self) -> bool {
        is_of_the_link(self.group)
    }

    /// Joins the group on an interface, and hears it from now on. Must be called within a tokio
    /// runtime.
    ///
    /// The kernel may be slow, so do not call this in a task that others wait for.
    ///
    /// # Errors
    /// See [`SocketError`].
    pub fn join(&self, interface: &Interface) -> Result<(), SocketError> {
        let refused = |error| SocketError::Join { group: self.group, interface: interface.name.clone(), error };
        let (binding, current) = (self.binding(), self.socket.borrow().clone());
        let is_there = |socket: &Arc<UdpSocket>| {
            let index = SockRef::from(&**socket).device_index_v4().ok().flatten();
            binding == Binding::ToTheInterface && index.is_some_and(|index| index.get() == interface.index)
        };
        if binding == Binding::Free || self.is_taken_over && current.as_ref().is_some_and(is_there) {
            let how = if self.is_taken_over { join_again } else { join };
            return current
                .map_or(Ok(()), |socket| how(&SockRef::from(&*socket), self.group, interface.index))
                .map_err(refused);
        }
        // The reader still holds the old socket for a moment, and the port with it.
        let _ = self.socket.send_replace(None);
        let mut waited = Duration::ZERO;
        let socket = loop {
            match bound(self.group, self.port, interface.index, binding) {
                Err(SocketError::PortTaken(..)) if waited < LET_GO => {
                    std::thread::sleep(Duration::from_millis(5));
                    waited += Duration::from_millis(5);
                }
                result => break result?,
            }
        };
        join(&SockRef::from(&socket), self.group, interface.index).map_err(refused)?;
        self.socket.send_replace(Some(Arc::new(socket)));
        self.keep(&interface.name);
        Ok(())
    }

    /// Leaves the group on an interface, which may be gone already.
    ///
    /// The kernel keeps a membership of a deleted interface until then. It counts against the
    /// socket's small limit, and as a membership of a new interface with the same index.
    pub fn leave(&self, index: u32) {
        if self.binding() != Binding::Free {
            let _ = self.socket.send_replace(None);
            // The copy has the port as well.
            self.keep_no_more();
            return;
        }
        let Some(socket) = self.socket.borrow().clone() else { return };
        if let Err(error) = leave(&SockRef::from(&*socket), self.group, index) {
            tracing::debug!(index, "leaving the group: {error}");
        }
    }

    /// The next verified request. All other datagrams are only counted. Dropping the future loses
    /// no datagram.
    pub async fn next(&self) -> Verified {
        let mut replaced = self.socket.subscribe();
        loop {
            let socket = replaced.borrow_and_update().clone();
            let received = async {
                match &socket {
                    Some(socket) => socket.async_io(Interest::READABLE, || receive(socket)).await,
                    None => std::future::pending().await,
                }
            };
            let received = tokio::select! {
                received = received => received,
                _ = replaced.changed() => continue,
            };
            match received {
                Ok(datagram) => {
                    if let Some(verified) = self.take(&datagram) {
                        return verified;
                    }
                }
                Err(error) => {
                    if let Some(held_back) = self.complaints.allow(Moment::now()) {
                        tracing::warn!(held_back, "the request socket: {error}");
                    }
                    tokio::time::sleep(AFTER_ERROR).await;
                }
            }
        }
    }

    /// Hands each request that has arrived to `each`, even if the runtime has not noticed it yet.
    pub fn take_waiting(&self, mut each: impl FnMut(Verified)) {
        let Some(socket) = self.socket.borrow().clone() else { return };
        for _ in 0..QUEUE_MAX {
            let Ok(datagram) = receive(&socket) else { return };
            if let Some(verified) = self.take(&datagram) {
                each(verified);
            }
        }
    }

    /// Counts a datagram, and returns its request if it is valid.
    fn take(&self, datagram: &Datagram) -> Option<Verified> {
        let judged = self.judge(datagram.bytes.get(..datagram.len).unwrap_or_default(), datagram.source);
        let verdict = match &judged {
            Ok(_) => Verdict::Delivered,
            Err(verdict) => *verdict,
        };
        lock(&self.counters).count(verdict);
        let sender = Address::from(datagram.source).sender();
        self.judge.note_rejection(&sender, verdict, datagram.arrived);
        judged
            .ok()
            .and_then(|(request, key, owner)| {
                Verified::new(&request, key, datagram.interface, Via::Socket, datagram.arrived)
                    .map(|verified| verified.signed_for(owner).came_to(self.judge.origin()))
            })
            .map(|request| request.sent_by(sender))
    }

    /// What arrived here so far, by verdict.
    #[must_use]
    pub fn counters(&self) -> Counters {
        *lock(&self.counters)
    }

    /// Judges a datagram by the same checks in the same order as the kernel program. Returns its
    /// request and its key: the one that signed it, or the one for the answer.
    fn judge(&self, datagram: &[u8], source: IpAddr) -> Result<(Request, Option<Arc<Key>>, KeyOwner), Verdict> {
        let request = Request::read_from_bytes(datagram).map_err(|_| Verdict::Length)?;
        admit(&request, &source.into(), &self.rules)?;
        let client = request.callback_ip().map(Address::from);
        let (key, owner) = self.judge.judge(&request, &Address::from(source).sender(), client)?;
        Ok((request, key, owner))
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::net::{Ipv4Addr, Ipv6Addr};

    use super::*;
    use crate::intake::group_socket::remedy;
    use crate::intake::replay_cache::ReplayCache;
    use fence_common::hash::HashKind;
    use fence_common::keys::GroupKey;
    use fence_common::rate_limit::{Limit, Limits};
    use fence_common::replay_cache::DatagramId;
    use fence_common::wire::{FAMILY_V4, Op};
    use fence_config::{Group, Groups};
    use nix::libc;
    use socket2::{Domain, Protocol, Type};
    use zerocopy::{FromZeros, IntoBytes};

    const GROUP: IpAddr = IpAddr::V4(Ipv4Addr::new(239, 255, 77, 12));

    fn key() -> Key {
        Key::new(b"a key").unwrap()
    }

    fn open(port: u16) -> Result<RequestSocket, SocketError> {
        let rules = Rules { min_hash: HashKind::Sha256, strict_source: true };
        let socket = RequestSocket::open(GROUP, port, rules, Some(key()))?;
        socket.join(&lo()).map(|()| socket)
    }

    fn lo() -> Interface {
        Interface::named("lo").unwrap()
    }

    fn request() -> Request {
        let mut request = Request::new_zeroed();
        request.op = Op::Status.to_wire();
        request.domain[..5].copy_from_slice(b"node1");
        request.address[..4].copy_from_slice(&[127, 0, 0, 1]);
        request.port = 1229.into();
        request.family = FAMILY_V4.into();
        key().sign(HashKind::Sha256, &mut request);
        request
    }

    /// Sends through the loopback to `to`, from 127.0.0.1.
    fn send(bytes: &[u8], to: impl Into<SocketAddr>) {
        let sender = Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::UDP)).unwrap();
        sender.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
        sender.set_multicast_if_v4(&Ipv4Addr::LOCALHOST).unwrap();
        sender.send_to(bytes, &to.into().into()).unwrap();
    }

    #[tokio::test]
    async fn accepts_valid_requests_counts_the_rest_and_hears_no_unicast() {
        let socket = open(11_229).unwrap();
        let to = SocketAddr::new(GROUP, 11_229);
        let good = request();
        send(good.as_bytes(), ([127, 0, 0, 1], 11_229));
        send(&good.as_bytes()[1..], to);
        send(&[good.as_bytes(), &[0]].concat(), to);
        send(Request { hash: [7; 64], ..good }.as_bytes(), to);
        send(Request { port: 0.into(), ..good }.as_bytes(), to);
        send(good.as_bytes(), to);
        let verified = tokio::time::timeout(Duration::from_secs(10), socket.next()).await.unwrap();
        assert_eq!((verified.op(), verified.via()), (Op::Status, Via::Socket));
        assert_eq!(verified.caller(), SocketAddr::from(([127, 0, 0, 1], 1229)).into());
        let expected = Counters { delivered: 1, drop_length: 2, drop_digest: 1, drop_port: 1, ..Counters::default() };
        assert_eq!(socket.counters(), expected);
    }

    /// A holder of one group's key names the address of another group's client as its own.
    #[tokio::test]
    async fn a_groups_key_counts_for_its_addresses_only() {
        let rules = Rules { min_hash: HashKind::Sha256, strict_source: false };
        let group = |owner, ip: &str| Group {
            ips: vec![ip.parse().unwrap()],
            uuids: vec!["node1".to_owned()],
            owner: KeyOwner(owner),
            ..Group::default()
        };
        let groups = Groups::Only(vec![group(1, "127.0.0.1"), group(2, "127.0.0.2"), group(0, "127.0.0.3")]);
        let keys = Keyring::new(Some(key().into()));
        let named = |name: &str| Key::new(name.as_bytes()).unwrap();
        let of = |owner, name| GroupKey { owner: KeyOwner(owner), key: Arc::new(named(name)) };
        keys.set_groups(vec![of(1, "of one"), of(2, "of two")]);
        let socket =
            RequestSocket::open(GROUP, 11_239, rules, None).unwrap().judged_by(Judge::new(keys).grouped(groups));
        for (name, owner, right) in [("a key", 0, 3), ("of one", 1, 1), ("of two", 2, 2), ("of nobody", 0, 0)] {
            for last in 1..4 {
                let mut request = Request { hash: [0; 64], ..request() };
                request.address[3] = last;
                named(name).sign(HashKind::Sha256, &mut request);
                let judged = socket.judge(request.as_bytes(), [127, 0, 0, last].into()).map(|(_, _, owner)| owner);
                let expected = if last == right { Ok(KeyOwner(owner)) } else { Err(Verdict::Digest) };
                assert_eq!(judged, expected, "{name} for 127.0.0.{last}");
            }
        }
    }

    /// The socket refuses what the kernel program drops, for the same reasons.
    #[tokio::test]
    async fn limits_a_sender_as_the_kernel_program_does() {
        let hour = 3_600_000_000_000;
        let only = |burst: u64| Limit { every_ns: hour, ahead_ns: hour * (burst - 1) };
        let limits = Limits { failures: only(2), strangers: only(2), deliveries: only(3), replay_window_ns: hour };
        let replays = Arc::new(ReplayCache::none(Duration::from_secs(3600)));
        let rules = Rules { min_hash: HashKind::Sha256, strict_source: true };
        let open = |port| RequestSocket::open(GROUP, port, rules, Some(key())).unwrap();
        let socket = open(11_236).judged_by(Judge::new(Some(key()).into()).rate_limited(limits, Arc::clone(&replays)));
        let signed = |n: u8| {
            let mut request = Request { random: [n; 6], ..request() };
            key().sign(HashKind::Sha256, &mut request);
            request
        };
        let forged = |n| Request { hash: [n; 64], ..signed(n) };
        let judge = |request: &Request| socket.judge(request.as_bytes(), [127, 0, 0, 1].into()).map(|_| ());
        assert_eq!(judge(&signed(1)), Ok(()));
        // As the pipeline does it; the other way in may have done so, too.
        assert!(replays.is_new(*DatagramId::of(&signed(1)).unwrap(), None, false));
        assert_eq!(judge(&signed(1)), Err(Verdict::Replay));
        assert_eq!(judge(&signed(2)), Ok(()));
        assert_eq!(judge(&signed(3)), Ok(()));
        assert_eq!(judge(&signed(4)), Err(Verdict::DeliveryLimit));
        // A forger of its address costs it nothing.
        for n in 5..9 {
            assert_eq!(judge(&forged(n)), Err(Verdict::Digest));
        }
        // An unknown sender, for which two wrong digests in all are allowed.
        let strangers = open(11_237).judged_by(Judge::new(Some(key()).into()).rate_limited(limits, replays));
        let mut verdicts = (1..=3_u8).map(|n| {
            let mut request = forged(n);
            request.address[3] = n;
            strangers.judge(request.as_bytes(), [127, 0, 0, n].into()).map(|_| ())
        });
        assert_eq!(verdicts.next(), Some(Err(Verdict::Digest)));
        assert_eq!(verdicts.next(), Some(Err(Verdict::Digest)));
        assert_eq!(verdicts.next(), Some(Err(Verdict::GlobalLimit)));
    }

    /// Without the kernel program only the socket's own cache knows the senders.
    #[tokio::test]
    async fn trusted_senders_are_known_to_the_next_daemon() {
        let hour = 3_600_000_000_000;
        let only = |burst: u64| Limit { every_ns: hour, ahead_ns: hour * (burst - 1) };
        let limits = Limits { failures: only(9), strangers: only(2), deliveries: only(9), replay_window_ns: hour };
        let scratch = tempfile::tempdir().unwrap();
        let daemon = |port| {
            let replays = Arc::new(ReplayCache::open(scratch.path(), Duration::from_secs(3600)));
            (
                open(port)
                    .unwrap()
                    .judged_by(Judge::new(Some(key()).into()).rate_limited(limits, Arc::clone(&replays))),
                replays,
            )
        };
        let (socket, replays) = daemon(11_238);
        send(request().as_bytes(), SocketAddr::new(GROUP, 11_238));
        let verified = tokio::time::timeout(Duration::from_secs(10), socket.next()).await.unwrap();
        // As the pipeline does it.
        assert!(replays.is_new(verified.datagram_id().unwrap(), verified.sender(), false));
        drop((socket, replays));
        let (socket, _replays) = daemon(11_239);
        for n in 2..9_u8 {
            let mut forged = Request { hash: [n; 64], ..request() };
            forged.address[3] = n;
            let _ = socket.judge(forged.as_bytes(), [127, 0, 0, n].into());
        }
        let mut again = Request { random: [9; 6], ..request() };
        key().sign(HashKind::Sha256, &mut again);
        let judged = socket.judge(again.as_bytes(), [127, 0, 0, 1].into()).map(|_| ());
        assert_eq!(judged, Ok(()), "a flood of strangers starves a sender that was right before the restart");
    }

    #[tokio::test]
    async fn a_link_local_group_is_joined_again_while_it_is_read() {
        let rules = Rules { min_hash: HashKind::Sha256, strict_source: true };
        for (port, group) in [(11_232, "ff02::fe1:ce"), (11_233, "ff05::fe1:ce")] {
            let group: Ipv6Addr = group.parse().unwrap();
            let socket = Arc::new(RequestSocket::open(group.into(), port, rules, Some(key())).unwrap());
            assert_eq!(socket.needs_interface(), port == 11_232);
            let reader = tokio::spawn({
                let socket = Arc::clone(&socket);
                async move { socket.next().await }
            });
            for round in 0..4 {
                tokio::task::yield_now().await;
                let joining = Arc::clone(&socket);
                // On a thread of its own, as in the daemon: here the reader would get no turn to
                // let go.
                let joined = tokio::task::spawn_blocking(move || {
                    joining.join(&lo()).unwrap();
                    if round < 3 {
                        joining.leave(lo().index);
                    }
                });
                joined.await.unwrap();
            }
            assert!(!reader.is_finished());
            reader.abort();
        }
    }

    #[tokio::test]
    async fn a_left_group_is_not_heard_and_can_be_joined_again() {
        let socket = open(11_234).unwrap();
        let to = SocketAddr::new(GROUP, 11_234);
        assert!(matches!(socket.join(&lo()), Err(SocketError::Join { .. })), "joined twice");
        socket.leave(lo().index);
        socket.leave(lo().index);
        send(request().as_bytes(), to);
        assert!(tokio::time::timeout(Duration::from_millis(100), socket.next()).await.is_err());
        socket.join(&lo()).unwrap();
        send(request().as_bytes(), to);
        tokio::time::timeout(Duration::from_secs(10), socket.next()).await.unwrap();
    }

    /// The next daemon has the socket, where the group is joined and a request waits.
    #[tokio::test]
    async fn a_kept_socket_goes_on_hearing() {
        let kept = bound(GROUP, 11_241, 0, Binding::Free).unwrap();
        join(&SockRef::from(&kept), GROUP, lo().index).unwrap();
        send(request().as_bytes(), SocketAddr::new(GROUP, 11_241));
        let rules = Rules { min_hash: HashKind::Sha256, strict_source: true };
        let kept = Some(kept.into_std().unwrap().into());
        let socket = RequestSocket::bound(GROUP, 11_241, rules, Some(key()), Binding::Free, kept).unwrap();
        socket.join(&lo()).unwrap();
        send(request().as_bytes(), SocketAddr::new(GROUP, 11_241));
        for _ in 0..2 {
            tokio::time::timeout(Duration::from_secs(10), socket.next()).await.unwrap();
        }
    }

    #[tokio::test]
    async fn a_membership_over_the_limit_names_the_remedy() {
        let rules = Rules { min_hash: HashKind::Sha256, strict_source: true };
        let socket = RequestSocket::open(GROUP, 11_235, rules, Some(key())).unwrap();
        let nowhere = socket.join(&Interface { name: "gone0".to_owned(), index: i32::MAX.unsigned_abs() }).unwrap_err();
        assert!(nowhere.to_string().contains("cannot join 239.255.77.12 on gone0"), "{nowhere}");
        assert!(remedy(GROUP, &io::Error::from_raw_os_error(libc::ENOBUFS)).contains("igmp_max_memberships"));
    }

    #[tokio::test]
    async fn the_age_of_a_request_counts_from_its_arrival() {
        let socket = open(11_231).unwrap();
        let waited = Duration::from_millis(100);
        let mut ages = Vec::new();
        // The kernel starts to stamp datagrams a moment after the machine's first socket asks for
        // it.
        while ages.last().is_none_or(|age| *age < waited) && ages.len() < 50 {
            send(request().as_bytes(), SocketAddr::new(GROUP, 11_231));
            std::thread::sleep(waited);
            let verified = tokio::time::timeout(Duration::from_secs(10), socket.next()).await.unwrap();
            ages.push(verified.verified().since(verified.arrived()));
        }
        let age = *ages.last().unwrap();
        assert!(age >= waited && age < Duration::from_secs(10), "{ages:?}");
    }

    #[tokio::test]
    async fn a_taken_port_is_said_to_be_taken() {
        let _first = open(11_230).unwrap();
        let error = open(11_230).unwrap_err();
        assert!(matches!(error, SocketError::PortTaken(11_230, _)), "{error}");
        assert!(error.to_string().contains("fence_virtd"));
    }
}
