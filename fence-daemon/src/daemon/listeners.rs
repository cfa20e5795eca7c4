//! The listeners that are served. A reload begins new ones, takes some to other interfaces, and
//! ends others. It opens what is new before anything changes.

use std::collections::BTreeMap;
use std::future::poll_fn;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::task::Poll;
use std::time::Duration;

use fence_common::sync::lock;
use fence_common::verdict::Counters;
use fence_config::{Attach, ConfigError, Listener, Multicast};
use fence_net::interface::{Interface, Wanted};
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::timeout;
use tracing::{info, warn};

use super::multicasts::{self, Opened};
use super::origin;
use super::ports::{PortsByLibvirt, voucher};
use super::serve::SourceChange;
use crate::control::inspector::{Inspector, ListenerViews};
use crate::control::multicast::Watched;
use crate::hypervisor::Hypervisors;
use crate::intake::arrivals::{Inlet, Inlets};
use crate::intake::follower::Follower;
use crate::intake::judge::Judge;
use crate::intake::keyring::Keyring;
use crate::intake::passed::Passed;
use crate::intake::serial::LineIntake;
use crate::intake::socket::{self, RequestSocket};
use crate::intake::tcp::{self, TcpIntake};
use crate::intake::vsock::{self, VsockIntake};
use crate::systemd::StatusPart;

/// How long a reload waits until a new listener hears, or one hears on its new interface.
const HEARS_WITHIN: Duration = Duration::from_secs(2);

/// What all listeners have in around.
pub(super) struct ListenerGround {
    pub(super) judge: Judge,
    pub(super) hypervisors: Hypervisors,
    pub(super) inlets: Inlets,
    /// Tells that names are to be looked up again.
    pub(super) reloaded: watch::Receiver<()>,
    /// Tells the loop that serves what to read.
    pub(super) changes: mpsc::UnboundedSender<SourceChange>,
    pub(super) inspector: Arc<Inspector>,
    pub(super) status: StatusPart,
}

/// The listeners that are served, by their numbers.
pub(super) struct Listeners {
    around: ListenerGround,
    all: Mutex<BTreeMap<usize, ServedListener>>,
    more: Notify,
}

/// A listener that is served. Dropping it ends it.
enum ServedListener {
    Multicast { socket: Arc<RequestSocket>, watched: Arc<Watched>, follower: Follower },
    Tcp(Arc<TcpIntake>, #[expect(dead_code, reason = "holds the tasks")] Inlet),
    Vsock(Arc<VsockIntake>, #[expect(dead_code, reason = "holds the tasks")] Inlet),
    Serial(Arc<LineIntake>, #[expect(dead_code, reason = "holds the tasks")] Inlet),
}

/// What a reload is to change.
pub(super) struct ListenerPlan {
    begun: Vec<(usize, NewListener)>,
    moved: Vec<(usize, Multicast)>,
    ended: Vec<usize>,
    /// The numbers of all listeners, in the configuration's order.
    order: Vec<usize>,
}

/// A listener that is to be served.
enum NewListener {
    Multicast(Box<Opened>),
    Other(Listener),
}

impl ListenerPlan {
    /// Whether the listeners stay as they are.
    pub(super) fn is_empty(&self) -> bool {
        self.begun.is_empty() && self.moved.is_empty() && self.ended.is_empty()
    }
}

/// The listener with this number.
fn of<'l>(all: &[(usize, &'l Listener)], number: usize) -> Option<&'l Listener> {
    all.iter().find(|(of, _)| *of == number).map(|(_, listener)| *listener)
}

impl Listeners {
    /// None yet.
    pub(super) fn new(around: ListenerGround) -> Self {
        Self { around, all: Mutex::default(), more: Notify::new() }
    }

    /// Serves a multicast listener that hears already.
    pub(super) fn adopt(&self, number: usize, socket: Arc<RequestSocket>, watched: Arc<Watched>, follower: Follower) {
        self.put(number, ServedListener::Multicast { socket, watched, follower });
    }

    /// Serves a tcp listener. `passed` has the sockets of systemd.
    pub(super) async fn tcp(&self, number: usize, prepared: tcp::Prepared, judge: Judge, passed: &mut Passed) {
        let mut inlet = self.around.inlets.inlet();
        let reloaded = self.around.reloaded.clone();
        let intake = TcpIntake::start(prepared, judge, passed, reloaded, &mut inlet).await;
        self.put(number, ServedListener::Tcp(intake, inlet));
    }

    /// Serves a listener to which clients connect, or whose lines it connects to.
    pub(super) async fn begin(&self, number: usize, listener: Listener, keys: Keyring, passed: &mut Passed) {
        let judge = self.around.judge.of_listener(keys, origin((number, &listener)));
        let (hypervisors, mut inlet) = (&self.around.hypervisors, self.around.inlets.inlet());
        match listener {
            // Opened elsewhere.
            Listener::Multicast(_) => {}
            Listener::Tcp(settings) => self.tcp(number, tcp::Prepared::new(settings), judge, passed).await,
            Listener::Vsock(settings) => {
                let intake = VsockIntake::start(settings, judge, voucher(hypervisors), passed, &mut inlet);
                self.put(number, ServedListener::Vsock(intake, inlet));
            }
            Listener::Serial(settings) => {
                let ports = PortsByLibvirt::new(hypervisors.clone(), &settings);
                self.put(number, ServedListener::Serial(LineIntake::start(settings, judge, ports, &mut inlet), inlet));
            }
        }
    }

    /// The one that was there before ends.
    fn put(&self, number: usize, served: ServedListener) {
        let before = lock(&self.all).insert(number, served);
        self.more.notify_one();
        drop(before);
    }

    /// Lets the report show the listeners with these numbers, in their order.
    pub(super) fn show(&self, order: impl IntoIterator<Item = usize>) {
        let (all, mut watch) = (lock(&self.all), ListenerViews::default());
        for number in order {
            match all.get(&number) {
                Some(ServedListener::Multicast { watched, .. }) => watch.multicasts.push(Arc::clone(watched)),
                Some(ServedListener::Tcp(intake, _)) => watch.tcps.push(Arc::clone(intake)),
                Some(ServedListener::Vsock(intake, _)) => watch.vsocks.push(Arc::clone(intake)),
                Some(ServedListener::Serial(intake, _)) => watch.serials.push(Arc::clone(intake)),
                None => {}
            }
        }
        self.around.inspector.set_listeners(watch);
    }

    /// Opens what the listeners of a configuration lack. Nothing is served by it yet. `path` is the
    /// configuration's file. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// A listener cannot be served: the error has its place.
    pub(super) fn prepare(
        &self,
        path: &Path,
        before: &[(usize, &Listener)],
        after: &[(usize, &Listener)],
    ) -> Result<ListenerPlan, ConfigError> {
        let mut plan = ListenerPlan { begun: Vec::new(), moved: Vec::new(), ended: Vec::new(), order: Vec::new() };
        for (number, listener) in after {
            let refused = |key, why: String| fence_config::not_served(path, listener, key, why);
            plan.order.push(*number);
            let old = of(before, *number);
            match (*listener, old) {
                (Listener::Multicast(new), Some(Listener::Multicast(old))) => {
                    if new.interface != old.interface {
                        self.look_at(new, after).map_err(|(key, why)| refused(key, why))?;
                        plan.moved.push((*number, new.clone()));
                    }
                }
                (Listener::Multicast(new), _) => {
                    let is_shared = self.look_at(new, after).map_err(|(key, why)| refused(key, why))?;
                    let opened = multicasts::open_one((*number, new.clone()), is_shared, &mut Passed::default());
                    let opened = opened.map_err(|error| refused("", error.to_string()))?;
                    plan.begun.push((*number, NewListener::Multicast(Box::new(opened))));
                }
                (_, Some(old)) if !old.needs_another_socket(listener) => {}
                (Listener::Tcp(settings), _) => {
                    tcp::probe(settings).map_err(|error| refused("", error.to_string()))?;
                    plan.begun.push((*number, NewListener::Other((*listener).clone())));
                }
                (Listener::Vsock(settings), _) => {
                    vsock::probe(settings).map_err(|error| refused("", error.to_string()))?;
                    plan.begun.push((*number, NewListener::Other((*listener).clone())));
                }
                (Listener::Serial(_), _) => plan.begun.push((*number, NewListener::Other((*listener).clone()))),
            }
        }
        plan.ended = before.iter().map(|(number, _)| *number).filter(|number| of(after, *number).is_none()).collect();
        Ok(plan)
    }

    /// Looks whether a multicast listener can hear where it is to hear. Returns whether another one
    /// hears the same group.
    fn look_at(&self, wanted: &Multicast, after: &[(usize, &Listener)]) -> Result<bool, (&'static str, String)> {
        let Some(name) = &wanted.interface else { return Ok(false) };
        let interface = Interface::named(name)
            .ok_or_else(|| ("interface", format!("there is no interface {name} now, and nothing would be heard")))?;
        let others = after.iter().filter(|(_, one)| match one {
            Listener::Multicast(one) => one.shares_group(wanted) && one.interface != wanted.interface,
            Listener::Tcp(_) | Listener::Vsock(_) | Listener::Serial(_) => false,
        });
        let is_shared = others.count() > 0;
        // A socket that is bound to no interface has the port of all.
        for served in lock(&self.all).values() {
            let ServedListener::Multicast { socket, watched, .. } = served else { continue };
            let settings = watched.settings();
            if !is_shared || !settings.shares_group(wanted) {
                continue;
            }
            let named = settings.interface.as_deref().and_then(Interface::named);
            let narrowed = named.map_or(Ok(()), |interface| socket.narrow(&interface));
            narrowed.map_err(|error| ("", error.to_string()))?;
        }
        if is_shared {
            socket::probe(wanted.group, wanted.port, &interface).map_err(|error| ("", error.to_string()))?;
        }
        Ok(is_shared)
    }

    /// Carries a plan out. `keys` has those of each new listener.
    pub(super) async fn carry_out(&self, plan: ListenerPlan, keys: impl Fn(usize) -> Keyring) {
        let ListenerPlan { begun, moved, ended, order } = plan;
        for (number, new) in begun {
            match new {
                NewListener::Multicast(opened) => self.begin_multicast(number, *opened, keys(number)).await,
                NewListener::Other(listener) => {
                    info!("{}: served from now on", listener.label());
                    self.begin(number, listener, keys(number), &mut Passed::default()).await;
                }
            }
        }
        for (number, settings) in moved {
            self.take_elsewhere(number, settings).await;
        }
        for number in ended {
            let served = lock(&self.all).remove(&number);
            if let Some(ServedListener::Multicast { socket, follower, .. }) = served {
                // The program first: the socket gets what comes meanwhile.
                follower.end().await;
                let _ = self.around.changes.send(SourceChange::Forget(number));
                socket.keep_no_more();
            }
        }
        self.show(order);
    }

    async fn begin_multicast(&self, number: usize, opened: Opened, keys: Keyring) {
        let settings = opened.settings.clone();
        let (listener, name) = (Listener::Multicast(settings.clone()), settings.interface.unwrap_or_default());
        let judge = self.around.judge.of_listener(keys, origin((number, &listener)));
        let (socket, watched, mut follower) = multicasts::begin(opened, judge, self.around.status.beside());
        let _ = self.around.changes.send(SourceChange::Read(number, Arc::clone(&socket)));
        let label = listener.label();
        match timeout(HEARS_WITHIN, follower.heard()).await {
            Ok(Ok(heard)) => info!(interface = %heard.names(), "{label}: served from now on"),
            Ok(Err(_)) | Err(_) => warn!(interface = name, "{label}: no request is heard yet"),
        }
        if settings.attach != Attach::Off {
            warn!(
                "{label}: serving without the kernel program, through the socket alone: it is loaded only at a start \
                 (`systemctl restart fence-daemon`)"
            );
        }
        self.adopt(number, socket, watched, follower);
    }

    /// Takes a listener to another interface, with its socket and its program.
    async fn take_elsewhere(&self, number: usize, settings: Multicast) {
        let (label, interface) = (Listener::Multicast(settings.clone()).label(), settings.interface.clone());
        let Some(name) = interface.clone() else { return };
        let hearing = {
            let all = lock(&self.all);
            let Some(ServedListener::Multicast { socket, watched, follower }) = all.get(&number) else { return };
            // One that is bound to its interface is another one there.
            socket.keep_no_more();
            socket.keep(&name);
            follower.want(Wanted::Named(name.clone()));
            watched.set_settings(settings);
            follower.watch()
        };
        let mut hearing = hearing;
        let hears = hearing.wait_for(|heard| heard.interfaces.iter().any(|one| one.interface.name == name));
        match timeout(HEARS_WITHIN, hears).await {
            Ok(Ok(_)) => info!(interface = name, "{label}: served there from now on"),
            Ok(Err(_)) | Err(_) => warn!(interface = name, "{label}: no request is heard there yet"),
        }
    }

    /// Returns when the task of a listener ends by itself, which it must not.
    pub(super) async fn broken(&self) -> io::Error {
        loop {
            let more = self.more.notified();
            let broken = poll_fn(|context| {
                let mut all = lock(&self.all);
                let mut followers = all.values_mut().filter_map(|served| match served {
                    ServedListener::Multicast { follower, .. } => Some(follower),
                    ServedListener::Tcp(..) | ServedListener::Vsock(..) | ServedListener::Serial(..) => None,
                });
                let ready = followers.find_map(|follower| match follower.poll_broken(context) {
                    Poll::Ready(error) => Some(error),
                    Poll::Pending => None,
                });
                ready.map_or(Poll::Pending, Poll::Ready)
            });
            tokio::select! {
                error = broken => return error,
                () = more => {}
            }
        }
    }

    /// Ends all listeners, and detaches the programs. Returns the programs' counters, if there is
    /// any.
    pub(super) async fn end(&self) -> Option<Counters> {
        let all = std::mem::take(&mut *lock(&self.all));
        let followers = all.into_values().filter_map(|served| match served {
            ServedListener::Multicast { follower, .. } => Some(follower),
            ServedListener::Tcp(..) | ServedListener::Vsock(..) | ServedListener::Serial(..) => None,
        });
        let ending: Vec<_> = followers.map(|follower| tokio::spawn(follower.end())).collect();
        let mut all: Option<Counters> = None;
        for ended in ending {
            if let Ok(Some(counters)) = ended.await {
                all.get_or_insert_with(Counters::default).add(&counters);
            }
        }
        all
    }
}
