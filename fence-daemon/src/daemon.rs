//! The daemon's life: the order of its start, its tasks, and its end.

mod beat;
mod load;
mod reload;

use std::io;
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use fence_common::admit::Rules;
use fence_common::rate_limit::STALE_AFTER_NS;
use fence_common::verdict::Counters;
use fence_config::{Config, FoundKeys};
use fence_net::interface::Wanted;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{Notify, oneshot};
use tracing::{error, info, warn};

use self::beat::Beat;
use self::load::{KernelConsumers, kernel};
use crate::callback::Callback;
use crate::control::inspector::{Inspector, Phase};
use crate::control::server::Control;
use crate::hypervisor::Hypervisors;
use crate::intake::arrivals::Arrivals;
use crate::intake::backlog::{Backlog, Questions};
use crate::intake::keyring::Keyring;
use crate::intake::links::Links;
use crate::intake::listener::{Follower, Listener};
use crate::intake::replay_cache::ReplayCache;
use crate::intake::ring::RequestRing;
use crate::intake::socket::{RequestSocket, SocketError};
use crate::intake::tcp;
use crate::observe::rejections;
use crate::pipeline::{Claims, Pipeline, Settings};
use crate::process::{self, Readiness};
use crate::systemd;

/// How long the first round of connections may delay the start. The log then names the unconnected
/// hypervisors, and the daemon goes on trying. A request that needs one waits for it.
const FIRST_ROUND: Duration = Duration::from_millis(500);

/// How often the start checks whether a first hypervisor is connected.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// How long joining an existing interface may take before the log says what the start waits for.
const SOON: Duration = Duration::from_secs(2);

/// How long the start of the unit may take at most. At boot the guests wait for the daemon. A
/// missing or misspelt interface must cost them fencing, and nothing else.
const WAITED_FOR: Duration = Duration::from_secs(5);

/// What the start waits for with `-w`.
const UNCONNECTED: &str = "no hypervisor is connected: waiting for one";

/// How often the daemon sends the heartbeat to the kernel program: one may come late.
const BEAT: Duration = Duration::from_nanos(STALE_AFTER_NS / 2);

/// Each so many heartbeats the daemon looks at whom it has rejected. A timer of its own would wake
/// an idle daemon once more.
const BEATS_PER_LOOK: u32 = 4;

/// How long a stop waits for answers: the longest time that one may take, and its way to the
/// client. The next daemon hears nothing before this one is gone.
pub const ANSWERS_WITHIN: Duration = Duration::from_millis(1300);

/// How long a stop then waits for restarts, which are on record for the next daemon, and for
/// libvirt to close.
pub const REST_WITHIN: Duration = Duration::from_millis(300);

/// Why the daemon does not start, or stops by itself.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// No socket to listen at.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The runtime.
    #[error("cannot {0}: {1}")]
    Runtime(&'static str, #[source] io::Error),
}

/// Whether the start waits for a hypervisor that is not there yet (`-w`). It always waits for the
/// interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Patience {
    /// Hypervisors are connected to later.
    Start,
    /// Wait for the first hypervisor only: a second one that never comes must not keep the first
    /// one's domains from being fenced.
    Wait,
}

/// Runs until SIGTERM or SIGINT.
///
/// `readiness` is announced once requests are served, or 5 s after the start. In the latter case
/// the log and `fence-daemon status` say what the daemon still waits for.
///
/// # Errors
/// Something without which nothing can be served is missing, at the start or later.
pub async fn run(
    config: Config,
    keys: FoundKeys,
    patience: Patience,
    mut readiness: Readiness,
) -> Result<(), DaemonError> {
    let signals = |error| DaemonError::Runtime("watch for signals", error);
    let mut stop = Stop::new().map_err(signals)?;
    // From here on a signal is stored until the daemon can act on it.
    let hangup = signal(SignalKind::hangup()).map_err(signals)?;
    let (keys, of_groups) = (Keyring::new(keys.everybodys), keys.groups);
    keys.set_groups(of_groups);
    let Config { multicast, tcp, uris, groups, hypervisor, stress, rate_limit, .. } = config;
    let hypervisors = Hypervisors::start(&uris, hypervisor.clone());

    let rules = Rules { min_hash: multicast.hash, strict_source: multicast.strict_source };
    let limits = rate_limit.limits();
    let socket = RequestSocket::open(multicast.group, multicast.port, rules, keys.clone())?;
    // After the port, whose error explains a second daemon better.
    let state = hypervisor.state.as_deref();
    let replays = state.map_or_else(
        || ReplayCache::none(rate_limit.replay_window),
        |state| ReplayCache::open(state, rate_limit.replay_window),
    );
    let replays = Arc::new(replays);
    let socket = Arc::new(socket.rate_limited(limits, Arc::clone(&replays)).grouped(groups.clone()));
    if multicast.interface.is_none() && socket.needs_interface() {
        return Err(SocketError::NoInterface(multicast.group).into());
    }
    // Before the first look, so that no change in between is lost.
    let links = links(multicast.group);
    let (loading, kernel) = kernel(&multicast, rules, limits, &keys, &replays).unzip();
    let inspector = Arc::new(Inspector::new(&multicast, &socket, hypervisors.clone(), loading.is_some()));
    let _control = control(hypervisor.state.as_deref(), &inspector);
    let (program, ring) = kernel.map(|KernelConsumers { program, ring }| (program, ring)).unzip();
    let wanted = multicast.interface.clone().map_or(Wanted::Suitable(multicast.group), Wanted::Named);
    let mut listener = Listener::new(wanted, Arc::clone(&socket), None).expecting(program).telling(multicast.alone);

    let waited_for = tokio::time::Instant::now() + WAITED_FOR;
    let start = async {
        let missing = listener.complain();
        if let Some(missing) = &missing {
            readiness.tell(missing);
        }
        // The log names by now what this round could not reach.
        let first_round = tokio::time::timeout(FIRST_ROUND, hypervisors.first_round());
        let mut follower = match patience {
            // At the same time: requests that arrive meanwhile wait in the socket, and not for
            // long.
            Patience::Start => {
                let follower = Follower::start(listener, links);
                // The report already tells what is heard.
                inspector.set_heard(follower.watch());
                let _ = first_round.await;
                follower
            }
            Patience::Wait => {
                let _ = first_round.await;
                let connected = async {
                    while !hypervisors.any_connected() {
                        tokio::time::sleep(LOOK_AGAIN).await;
                    }
                };
                tokio::pin!(connected);
                if tokio::time::timeout_at(waited_for, &mut connected).await.is_err() {
                    systemd::notify_status(UNCONNECTED);
                    announce_waiting(&mut readiness, UNCONNECTED);
                    connected.await;
                }
                Follower::start(listener, links)
            }
        };
        inspector.set_heard(follower.watch());
        if missing.is_none() && tokio::time::timeout(SOON, follower.heard()).await.is_err() {
            readiness.tell(&format!("waiting: {}", follower.status()));
        }
        if tokio::time::timeout_at(waited_for, follower.heard()).await.is_err() {
            announce_waiting(&mut readiness, &follower.status());
        }
        follower.heard().await.map(|_| follower)
    };
    let mut follower = tokio::select! {
        started = start => started.map_err(|error| DaemonError::Runtime("follow the interfaces", error))?,
        () = stop.wait() => return Ok(()),
    };
    let (backlog, mut questions) = Backlog::new();
    let claims = hypervisor.state.as_deref().map_or_else(Claims::none, Claims::open);
    let (callback, key_groups) = (Callback::new(multicast.auth), groups.clone());
    let requests = inspector.requests();
    let settings = Settings { groups, alone: multicast.alone };
    let pipeline = Pipeline::new(callback, settings, hypervisors.clone(), backlog, claims, replays, requests);

    let uris = hypervisors.view();
    let connected = uris.iter().filter(|uri| uri.connected).count();
    let heard = follower.now();
    info!(
        group = %multicast.group,
        port = multicast.port,
        interface = %heard.names(),
        hash = %multicast.hash.name(),
        auth = %multicast.auth.name(),
        program = %if heard.loading { "loading".to_owned() } else { heard.ways() },
        libvirt = %format_args!("{connected}/{}", uris.len()),
        "ready"
    );
    // The last thing before the announcement, as nobody reads its requests earlier.
    let mut arrivals = Arrivals::default();
    if let Some(settings) = tcp {
        inspector.set_tcp(tcp::Intake::start(settings, socket.judging(), &mut arrivals));
    }
    inspector.enter(Phase::Serving);
    if let Err(error) = readiness.announce() {
        warn!("{error}");
    }
    let reloading = tokio::spawn(reload::at_each(hangup, multicast, key_groups, keys));
    // Not earlier: loading would only take processors from the start. The socket serves until the
    // program is attached. Memory is locked after aya has freed the dozens of megabytes that only
    // loading needs.
    let loader = Arc::clone(&inspector);
    tokio::task::spawn_blocking(move || {
        if let Some(load) = loading {
            load.run(&loader);
        }
        if stress.lock_memory {
            process::settle();
            if let Err(refused) = process::lock_memory() {
                warn!("{refused}");
            }
        }
    });

    let look = Arc::new(Notify::new());
    let telling = tokio::spawn({
        let inspector = Arc::clone(&inspector);
        rejections::watch(Arc::clone(&look), move || inspector.rejected())
    });

    let outcome = tokio::select! {
        outcome = serve(&pipeline, &socket, ring, arrivals, &mut questions, &look, stopped(&mut stop, &hypervisors)) => outcome,
        error = follower.broken() => Err(DaemonError::Runtime("follow the interfaces", error)),
    };
    drop(questions);
    reloading.abort();
    telling.abort();
    inspector.enter(Phase::Stopping);

    // The program first: from here on the stack gets every packet again. Then the membership.
    let seen = follower.end().await;
    systemd::notify_stopping();
    let heard = socket.counters();
    drop(socket);
    info!("stopping: {}", tell(seen, heard));
    let left = tokio::select! {
        left = pipeline.shutdown(ANSWERS_WITHIN) => left,
        () = stop.wait() => { warn!("second signal: not waiting for answers any longer"); 0 }
    };
    if left > 0 {
        error!("{left} requests are still unanswered {ANSWERS_WITHIN:?} after the stop began: giving them up");
    }
    tokio::select! {
        () = hypervisors.shutdown(REST_WITHIN) => {}
        () = stop.wait() => warn!("second signal: not waiting for restarts and connections any longer"),
    }
    info!("stopped");
    outcome
}

/// Stops the daemon when no work is left that the next daemon does not know of.
async fn stopped(stop: &mut Stop, hypervisors: &Hypervisors) {
    stop.wait().await;
    tokio::select! {
        () = hypervisors.start_unrecorded() => {}
        () = stop.wait() => warn!("second signal: not waiting for restarts any longer"),
    }
}

async fn serve(
    pipeline: &Pipeline,
    socket: &RequestSocket,
    mut coming: Option<oneshot::Receiver<RequestRing>>,
    mut arrivals: Arrivals,
    questions: &mut Questions,
    look: &Notify,
    stopped: impl Future<Output = ()>,
) -> Result<(), DaemonError> {
    tokio::pin!(stopped);
    let mut ring: Option<RequestRing> = None;
    let beat = Beat::every(BEAT).map_err(|error| DaemonError::Runtime("start the heartbeat", error))?;
    let mut beats = 0_u32;
    loop {
        let from_ring = async {
            match ring.as_mut() {
                Some(ring) => ring.next().await,
                None => std::future::pending().await,
            }
        };
        let came = async {
            match coming.as_mut() {
                Some(coming) => coming.await.ok(),
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            loaded = came => {
                ring = loaded;
                coming = None;
                if let Some(ring) = ring.as_mut() {
                    ring.beat();
                }
            }
            // Only this loop sends the heartbeat: if it hangs, the program must notice.
            ticked = beat.tick() => {
                ticked.map_err(|error| DaemonError::Runtime("go on with the heartbeat", error))?;
                if let Some(ring) = ring.as_mut() {
                    ring.beat();
                }
                beats = beats.wrapping_add(1);
                if beats.is_multiple_of(BEATS_PER_LOOK) {
                    look.notify_one();
                }
            }
            () = &mut stopped => return Ok(()),
            request = from_ring => match request {
                Ok(request) => pipeline.accept(request),
                Err(error) => return Err(DaemonError::Runtime("read the ring buffer", error)),
            },
            request = socket.next() => pipeline.accept(request),
            // Not in the backlog: a connection's peer has asked what came over it, and no more.
            incoming = arrivals.next() => pipeline.accept(incoming),
            question = questions.next() => {
                if let Some(ring) = ring.as_mut() {
                    ring.take_waiting(|request| pipeline.accept(request));
                }
                socket.take_waiting(|request| pipeline.accept(request));
                drop(question);
            }
        }
    }
}

/// Ends the wait of the daemon's starter, although nothing is served yet.
fn announce_waiting(readiness: &mut Readiness, what: &str) {
    warn!("nothing is served yet ({what}); the start no longer waits, and serving begins as soon as possible");
    readiness.tell(&format!("nothing is served yet ({what}); it goes on waiting in the background"));
    if let Err(error) = readiness.announce() {
        warn!("{error}");
    }
}

/// The control socket, if it can be created. No request needs it.
fn control(state_directory: Option<&Path>, inspector: &Arc<Inspector>) -> Option<Control> {
    let control = Control::open(state_directory?, Arc::clone(inspector));
    control.inspect_err(|error| warn!("no control socket, so `status` and `top` do not work: {error}")).ok()
}

/// What tells that interfaces come and go.
fn links(group: IpAddr) -> Links {
    Links::open(group).unwrap_or_else(|error| {
        warn!("the kernel does not tell when interfaces come and go ({error}): looking every 2 s instead");
        Links::by_looking()
    })
}

/// The counters that are not zero, in words.
fn tell(kernel: Option<Counters>, socket: Counters) -> String {
    let list = |counters: Counters| {
        let some: Vec<_> = counters.iter().filter(|(_, n)| *n > 0).map(|(name, n)| format!("{name} {n}")).collect();
        if some.is_empty() { "nothing".to_owned() } else { some.join(", ") }
    };
    match kernel {
        Some(kernel) => format!("the kernel program saw {}; the socket saw {}", list(kernel), list(socket)),
        None => format!("the socket saw {}", list(socket)),
    }
}

/// The signals that end the daemon.
struct Stop {
    terminate: Signal,
    interrupt: Signal,
}

impl Stop {
    fn new() -> io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    async fn wait(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}
