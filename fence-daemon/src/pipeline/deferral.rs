//! The deferral: when this host calls back. Each hypervisor of a segment hears each request, and
//! the client believes the first that connects. That must be the host where the domain runs, else
//! one that knows it, and only then one that does not.
//!
//! The hosts of a cluster (`backend = "cpg"`) elect one of them instead, and nobody waits. Nor does
//! anybody wait for other hosts where there are none, or for a client that has connected to this
//! host: it has asked no other.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use fence_common::wire::Op;
use fence_config::Alone;
use fence_net::way_out;
use tokio::sync::Semaphore;
use tokio::task::spawn_blocking;
use tokio::time::{Instant, sleep_until, timeout_at};

use super::{NoPeer, Shared};
use crate::callback::{Authenticated, CallbackError};
use crate::hosts::{Election, Hosts};
use crate::hypervisor::{Foresight, Presence};
use crate::intake::request::{Verified, Waits};

/// How long the callback for a domain that does not run here waits; half as long again if no answer
/// of this host can be good news. Shorter than the 2 s after which the client asks again.
pub(super) const DEFER: Duration = Duration::from_secs(1);

/// How long this host waits to be elected among those of its cluster: longer than the 2 s after
/// which the client asks again, and the hosts elect again.
const AGREED_WITHIN: Duration = Duration::from_secs(5);

/// How many threads may look at once where an interface leads: the kernel may hold its lock for
/// links for long.
const LOOKS_MAX: usize = 2;

/// Decides whether no other hypervisor hears a request.
#[derive(Debug)]
pub(super) struct Segment {
    looks: Arc<Semaphore>,
}

impl Default for Segment {
    fn default() -> Self {
        Self { looks: Arc::new(Semaphore::new(LOOKS_MAX)) }
    }
}

impl Segment {
    /// Whether only this host hears this request: by the setting of its listener, or by where its
    /// interface leads. Every doubt, and no answer of the kernel's before `by`, means no.
    ///
    /// The kernel is asked each time: a card that was plugged in a moment ago counts, also if the
    /// message about it is still to be read. A card that comes after the answer has not carried
    /// this request.
    async fn is_ours(&self, request: &Verified, by: Instant) -> bool {
        let interface = request.came_by();
        match request.origin().alone {
            Alone::Yes => true,
            Alone::No => false,
            Alone::Auto => {
                let look = async {
                    let turn = Arc::clone(&self.looks).acquire_owned().await.ok()?;
                    let ways = spawn_blocking(move || {
                        let ways = way_out::of(interface);
                        drop(turn);
                        ways
                    });
                    ways.await.ok()?.ok()
                };
                matches!(timeout_at(by, look).await, Ok(Some(ways)) if ways.is_empty())
            }
        }
    }
}

/// When this host's turn was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Deferral {
    /// At once: any host can answer.
    Any,
    /// At once: the domain is off here, and no other host hears the request.
    Alone,
    /// By what the domain is to this host.
    By(Presence),
    /// The last one: the groups deny it here.
    Denied,
    /// At once: the client has connected to this host.
    Connected,
    /// At once: the hosts of the cluster have agreed on this one.
    Agreed,
}

impl Deferral {
    /// Whether such a failed callback usually means that another host was first.
    pub(super) fn is_no_worry(self, error: &CallbackError) -> bool {
        match (self, error) {
            (Self::By(Presence::Runs) | Self::Connected | Self::Agreed, _) => false,
            (_, CallbackError::Unwanted(..)) => true,
            // Reset: the client accepted, and hung up before we knew.
            (Self::Any | Self::Alone, CallbackError::Connect(_, error)) => {
                matches!(error.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::ConnectionReset)
            }
            (Self::By(Presence::Defined | Presence::Unknown) | Self::Denied, CallbackError::Connect(..)) => true,
            (_, _) => false,
        }
    }

    /// What a failed callback may mean beyond its error.
    pub(super) fn doubt(self) -> &'static str {
        match self {
            Self::By(Presence::Runs) => {
                ", although it runs here (if another host has answered, two machines that run have this name)"
            }
            Self::By(Presence::Defined | Presence::Unknown)
            | Self::Any
            | Self::Alone
            | Self::Denied
            | Self::Connected
            | Self::Agreed => "",
        }
    }

    /// For the line about an answer.
    pub(super) fn waited(self) -> &'static str {
        match self {
            Self::By(Presence::Defined | Presence::Unknown) | Self::Denied => {
                "; other hosts were given time to answer first"
            }
            Self::By(Presence::Runs) | Self::Any | Self::Alone | Self::Connected | Self::Agreed => "",
        }
    }
}

impl fmt::Display for Deferral {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Any => "nobody waits for our answer, another host may have been first",
            Self::Alone => "does not run here, no other host hears of it, and nobody waits for our answer",
            Self::By(Presence::Runs) => "nobody waits for our answer, although it runs here",
            Self::By(Presence::Defined) => "does not run here, and nobody waits for our answer",
            Self::By(Presence::Unknown) => "no such domain here, and nobody waits for our answer",
            Self::Denied => "the groups deny it here, and nobody waits for our answer",
            Self::Connected => "the client has connected, and waits no longer",
            Self::Agreed => "the hosts have agreed on this one, and nobody waits for our answer",
        })
    }
}

/// A client that was reached.
#[derive(Debug)]
pub(super) struct Reached {
    pub(super) peer: Authenticated,
    pub(super) deferral: Deferral,
    /// What is asked about its domain meanwhile, if that is off.
    pub(super) foresight: Option<Foresight>,
}

impl Shared {
    /// Reaches the client where it waits. On a line the hypervisor vouches for it.
    pub(super) async fn reach(&self, request: &Verified, waits: Waits) -> Result<Reached, NoPeer> {
        let deferral = Deferral::Connected;
        let stream = match waits {
            Waits::ForCallback => return self.call_back(request).await,
            Waits::OnLine(line) => {
                return Ok(Reached { peer: Authenticated::on_line(request, line), deferral, foresight: None });
            }
            Waits::Connected(stream) => stream,
        };
        let foresight = self.foresee(request);
        match self.callback.answer(request, stream).await {
            Ok(peer) => Ok(Reached { peer, deferral, foresight }),
            Err(error) => Err(NoPeer::Unreached(error, deferral)),
        }
    }

    /// Begins to ask what the answer takes, if the request is about a domain that is off, and its
    /// sender may have an answer.
    fn foresee(&self, request: &Verified) -> Option<Foresight> {
        // All hosts of a cluster are asked otherwise.
        let is_of_use = self.hosts.is_none() && matches!(request.op(), Op::Status | Op::Off | Op::Reboot);
        let target = request.target().filter(|_| is_of_use)?;
        let is_permitted = self.groups.now().permits(request.owner(), &request.who(), target);
        if is_permitted { self.hypervisors.foresee(target) } else { None }
    }

    /// Calls back when it is this host's turn.
    async fn call_back(&self, request: &Verified) -> Result<Reached, NoPeer> {
        let mut deferral = Deferral::Any;
        if let Some(hosts) = &self.hosts
            && let Some(called) = self.call_back_if_elected(request, hosts).await
        {
            return called;
        }
        if let Some(target) = request.target().filter(|_| request.op().names_a_domain()) {
            // From now, not from its arrival: what delayed our read, such as a flood, has reached
            // the other hosts as well.
            let now = Instant::now();
            let (second, last) = (now + self.defer, now + self.defer * 3 / 2);
            if !self.groups.now().permits(request.owner(), &request.who(), target) {
                // The client believes the first callback. Another address of it, or another host,
                // may permit what this one denies.
                sleep_until(last).await;
                return self.called(request, Deferral::Denied, None).await;
            }
            // Where only this host hears the request, the answer asks libvirt soon enough. To ask
            // it here as well would double the wait.
            let is_off = self.hypervisors.is_off_by_tables(target);
            if is_off {
                let foresight = self.foresee(request);
                if self.segment.is_ours(request, second).await {
                    return self.called(request, Deferral::Alone, foresight).await;
                }
            }
            // A URI that cannot answer in time has no good news.
            let asked = timeout_at(last, self.hypervisors.presence(target)).await;
            let presence = asked.unwrap_or(Presence::Unknown);
            deferral = Deferral::By(presence);
            match presence {
                Presence::Runs => {}
                Presence::Defined if !is_off && self.segment.is_ours(request, second).await => {
                    deferral = Deferral::Alone;
                }
                Presence::Defined => sleep_until(second).await,
                Presence::Unknown => sleep_until(last).await,
            }
        }
        self.called(request, deferral, None).await
    }

    /// Calls back if the hosts of the cluster agree on this one. `None`: they cannot agree, and the
    /// time decides.
    async fn call_back_if_elected(&self, request: &Verified, hosts: &Hosts) -> Option<Result<Reached, NoPeer>> {
        let target = request.target().filter(|_| request.op().names_a_domain());
        if let Some(target) = target
            && !self.groups.now().permits(request.owner(), &request.who(), target)
        {
            // Another host may permit what this one denies. The client asks it again.
            sleep_until(Instant::now() + self.defer * 3 / 2).await;
        }
        match hosts.elect(request.id(), Instant::now() + AGREED_WITHIN).await {
            Election::Won(mut elected) => {
                let called = self.called(request, Deferral::Agreed, None).await;
                if called.is_ok() {
                    elected.reached();
                }
                Some(called)
            }
            Election::Lost => Some(Err(NoPeer::Elsewhere)),
            Election::Open => None,
        }
    }

    async fn called(
        &self,
        request: &Verified,
        deferral: Deferral,
        foresight: Option<Foresight>,
    ) -> Result<Reached, NoPeer> {
        match self.callback.call(request).await {
            Ok(peer) => Ok(Reached { peer, deferral, foresight }),
            Err(error) => Err(NoPeer::Unreached(error, deferral)),
        }
    }
}
