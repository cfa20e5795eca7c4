//! The multicast listeners: their sockets, the programs that are to be loaded for them, and the
//! tasks that keep them on their interfaces.

use std::net::IpAddr;
use std::sync::Arc;

use fence_common::admit::Rules;
use fence_config::{Attach, Listener, Multicast};
use fence_net::interface::Wanted;
use tokio::sync::{oneshot, watch};
use tracing::warn;

use super::key_plan::KeyPlan;
use super::load::{self, KernelConsumers, Load};
use crate::control::multicast::Watched;
use crate::intake::follower::Follower;
use crate::intake::judge::Judge;
use crate::intake::keyring::Keyring;
use crate::intake::links::Links;
use crate::intake::memberships::{Heard, Memberships};
use crate::intake::passed::Passed;
use crate::intake::rate_limits::RateLimits;
use crate::intake::replay_cache::ReplayCache;
use crate::intake::request::Origin;
use crate::intake::ring::RequestRing;
use crate::intake::socket::{RequestSocket, SocketError};
use crate::systemd::StatusPart;

/// A multicast listener, its number in the configuration, and its socket.
pub(super) struct Opened {
    pub(super) number: usize,
    pub(super) settings: Multicast,
    socket: RequestSocket,
}

impl Opened {
    fn rules(&self) -> Rules {
        rules(&self.settings)
    }
}

fn rules(settings: &Multicast) -> Rules {
    Rules { min_hash: settings.hash, strict_source: settings.strict_source }
}

/// Opens the socket of a listener. `is_shared` says that another one hears the same group.
///
/// # Errors
/// See [`SocketError`].
pub(super) fn open_one(
    (number, settings): (usize, Multicast),
    is_shared: bool,
    passed: &mut Passed,
) -> Result<Opened, SocketError> {
    let (group, port, interface) = (settings.group, settings.port, settings.interface.as_deref());
    let keys = Keyring::new(None);
    let socket = RequestSocket::beside(group, port, rules(&settings), keys, is_shared, interface, passed)?;
    if settings.interface.is_none() && socket.needs_interface() {
        return Err(SocketError::NoInterface(group));
    }
    Ok(Opened { number, settings, socket })
}

/// Opens the sockets of these listeners. Those of an earlier daemon are taken over or closed.
///
/// # Errors
/// See [`SocketError`].
pub(super) fn open(listeners: Vec<(usize, Multicast)>, passed: &mut Passed) -> Result<Vec<Opened>, SocketError> {
    let all: Vec<Multicast> = listeners.iter().map(|(_, settings)| settings.clone()).collect();
    let is_shared = |settings: &Multicast| all.iter().filter(|other| settings.shares_group(other)).count() > 1;
    let opened = listeners.into_iter().map(|one| (is_shared(&one.1), one));
    let opened = opened.map(|(is_shared, one)| open_one(one, is_shared, passed)).collect();
    passed.close_kept();
    opened
}

/// The multicast listeners before they hear anything.
pub(super) struct Multicasts {
    /// By the numbers of their listeners.
    pub(super) sockets: Vec<(usize, Arc<RequestSocket>)>,
    pub(super) watched: Vec<Arc<Watched>>,
    pub(super) loads: Vec<Load>,
    pub(super) rings: Vec<(usize, oneshot::Receiver<RequestRing>)>,
    /// Where `systemctl status` says what libvirt lacks.
    pub(super) libvirt: StatusPart,
    /// Where it says why a reload was refused.
    pub(super) reload: StatusPart,
    memberships: Vec<(Memberships, Links)>,
}

impl Multicasts {
    /// Prepares all that the sockets lack. `origin` says for each what its requests carry. With
    /// `several` listeners, log and status name each.
    pub(super) fn prepare(
        opened: Vec<Opened>,
        several: bool,
        plan: &KeyPlan,
        judge: &Judge,
        limits: &RateLimits,
        replays: &Arc<ReplayCache>,
        origin: impl Fn(usize) -> Origin,
    ) -> Self {
        let (mut parts, mut earlier) = (StatusPart::of(opened.len() + 2).into_iter(), Vec::<Multicast>::new());
        let [libvirt, reload] = [(); 2].map(|()| parts.next().unwrap_or_else(StatusPart::only));
        let (sockets, watched, loads, rings) = Default::default();
        let mut all = Self { sockets, watched, loads, rings, libvirt, reload, memberships: Vec::new() };
        for one in opened {
            let (keys, origin, rules) = (plan.ring(one.number), origin(one.number), one.rules());
            let Opened { number, settings, socket } = one;
            let socket = Arc::new(socket.judged_by(judge.of_listener(keys.clone(), origin.clone())));
            let mode = load::mode(&settings, &earlier, &keys);
            let watched = Watched::new(settings.clone(), &socket, mode.is_some());
            let program = mode.map(|mode| {
                let listener = load::boundary(&settings, rules, limits.now());
                let (load, KernelConsumers { program, ring }) =
                    Load::new(listener, mode, keys, limits, origin.clone(), replays, &watched);
                all.loads.push(load);
                all.rings.push((number, ring));
                program
            });
            let part = parts.next().unwrap_or_else(StatusPart::only);
            let memberships = memberships(&settings, &socket, several, part).expecting(program);
            all.memberships.push((memberships, links(settings.group)));
            all.sockets.push((number, socket));
            all.watched.push(watched);
            earlier.push(settings);
        }
        all
    }

    /// If a listener has no interface to hear on, logs it, and returns the text for the waiting
    /// start.
    pub(super) fn complain(&mut self) -> Option<String> {
        let missing: Vec<_> = self.memberships.iter_mut().filter_map(|(one, _)| one.complain()).collect();
        (!missing.is_empty()).then(|| missing.join("; "))
    }

    /// Begins to listen, and lets the report tell what is heard.
    pub(super) fn follow(&mut self) -> Followers {
        let all = self.memberships.drain(..).zip(&self.watched).map(|((memberships, links), watched)| {
            let follower = Follower::start(memberships, links);
            watched.set_heard(follower.watch());
            follower
        });
        Followers(all.collect())
    }
}

/// The tasks that keep the listeners on their interfaces.
pub(super) struct Followers(Vec<Follower>);

impl Followers {
    /// Waits until each listener hears.
    ///
    /// # Errors
    /// A task ended.
    pub(super) async fn all_hear(&mut self) -> std::io::Result<()> {
        for follower in &mut self.0 {
            follower.heard().await?;
        }
        Ok(())
    }

    /// Waits until any listener hears; at once if there is none.
    ///
    /// # Errors
    /// A task ended.
    pub(super) async fn any_hears(&mut self) -> std::io::Result<()> {
        if self.0.is_empty() {
            return Ok(());
        }
        let mut waiting: Vec<_> = self.0.iter_mut().map(|follower| Box::pin(follower.heard())).collect();
        std::future::poll_fn(move |context| {
            let ready = waiting.iter_mut().find_map(|heard| match heard.as_mut().poll(context) {
                std::task::Poll::Ready(heard) => Some(heard.map(drop)),
                std::task::Poll::Pending => None,
            });
            ready.map_or(std::task::Poll::Pending, std::task::Poll::Ready)
        })
        .await
    }

    /// The state of those that do not hear, in a line.
    pub(super) fn status(&self) -> String {
        let deaf = self.0.iter().filter(|follower| !follower.now().hears).map(Follower::status);
        deaf.filter(|status| !status.is_empty()).collect::<Vec<_>>().join("; ")
    }

    /// Whether any hears.
    pub(super) fn hears(&self) -> bool {
        self.0.iter().any(|follower| follower.now().hears)
    }

    /// What each hears, as it changes.
    pub(super) fn watch(&self) -> impl Iterator<Item = watch::Receiver<Heard>> {
        self.0.iter().map(Follower::watch)
    }

    /// Each of them, in the order of the listeners.
    pub(super) fn into_each(self) -> impl Iterator<Item = Follower> {
        self.0.into_iter()
    }
}

/// The memberships of a listener. With `several` listeners, the log names this one.
fn memberships(settings: &Multicast, socket: &Arc<RequestSocket>, several: bool, part: StatusPart) -> Memberships {
    let wanted = settings.interface.clone().map_or(Wanted::Suitable(settings.group), Wanted::Named);
    let label = several.then(|| format!("{}: ", Listener::Multicast(settings.clone()).label()));
    let memberships = Memberships::new(wanted, Arc::clone(socket), None).telling(settings.alone);
    memberships.among_others(label.unwrap_or_default(), part)
}

/// Begins to listen while the daemon runs. The socket alone serves: a kernel program is loaded only
/// at a start.
pub(super) fn begin(opened: Opened, judge: Judge, part: StatusPart) -> (Arc<RequestSocket>, Arc<Watched>, Follower) {
    let Opened { settings, socket, .. } = opened;
    let socket = Arc::new(socket.judged_by(judge));
    let watched = Watched::new(settings.clone(), &socket, settings.attach != Attach::Off);
    let follower = Follower::start(memberships(&settings, &socket, true, part), links(settings.group));
    watched.set_heard(follower.watch());
    (socket, watched, follower)
}

/// What tells that interfaces come and go.
fn links(group: IpAddr) -> Links {
    Links::open(group).unwrap_or_else(|error| {
        warn!("the kernel does not tell when interfaces come and go ({error}): looking every 2 s instead");
        Links::by_looking()
    })
}
