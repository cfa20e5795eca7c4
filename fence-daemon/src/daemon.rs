//! The daemon's life: the order of its start, its tasks, and its end.

mod beat;
mod key_plan;
mod listeners;
mod load;
mod multicasts;
mod ports;
mod reload;
mod serve;
mod stop;
mod together;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use fence_common::sync::Current;
use fence_config::{Backend, CONNECTED_AUTH, Config, FoundKeys, Listener, ListenerKind};
use tokio::runtime::Handle;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Notify, mpsc, watch};
use tracing::{info, warn};

use self::key_plan::KeyPlan;
use self::listeners::{ListenerGround, Listeners};
use self::multicasts::Multicasts;
pub use self::reload::ConfigFile;
use self::reload::Reload;
use self::serve::{Rings, Sources, serve};
pub use self::stop::{ANSWERS_WITHIN, REST_WITHIN, SETTLED_WITHIN};
use self::stop::{Remainder, Stop, stopped};
use crate::control::inspector::{Inspector, Phase};
use crate::control::server::Control;
use crate::history::{Begun, History};
use crate::hypervisor::Hypervisors;
use crate::intake::arrivals::Arrivals;
use crate::intake::backlog::Backlog;
use crate::intake::judge::Judge;
use crate::intake::passed::Passed;
use crate::intake::rate_limits::RateLimits;
use crate::intake::replay_cache::ReplayCache;
use crate::intake::request::Origin;
use crate::intake::socket::SocketError;
use crate::intake::tcp;
use crate::metrics::server::Metrics;
use crate::observe::rejections;
use crate::observe::sources::RejectedView;
use crate::pipeline::{Claims, Pipeline};
use crate::process::{self, Loader, Readiness};
use crate::systemd::{PassedSocket, Watchdog};

/// How long the first round of connections may delay the start. The log then names the unconnected
/// hypervisors, and the daemon goes on trying. A request that needs one waits for it.
const FIRST_ROUND: Duration = Duration::from_millis(300);

/// How long the start waits for a listener that does not hear, if another one does.
const ALL_HEAR: Duration = Duration::from_millis(300);

/// How often the start checks whether a first hypervisor is connected.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// How long joining an existing interface may take before the log says what the start waits for.
const SOON: Duration = Duration::from_secs(2);

/// How long the start of the unit may take at most. At boot the guests wait for the daemon. A
/// missing or misspelt interface must cost them fencing, and nothing else.
const WAITED_FOR: Duration = Duration::from_secs(5);

/// How long the lock of memory waits for the first look at all domains.
const FILLED_WITHIN: Duration = Duration::from_secs(5);

/// What the start waits for with `-w`.
const UNCONNECTED: &str = "no hypervisor is connected: waiting for one";

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
/// the log and `fence-daemon status` say what the daemon still waits for. `sockets` are those that
/// systemd has opened, and `loader` is the thread that may load the kernel program. A reload reads
/// the file of `running` again.
///
/// # Errors
/// Something without which nothing can be served is missing, at the start or later.
pub async fn run(
    config: Config,
    keys: FoundKeys,
    patience: Patience,
    mut readiness: Readiness,
    sockets: Vec<PassedSocket>,
    loader: Loader,
    running: ConfigFile,
) -> Result<(), DaemonError> {
    let signals = |error| DaemonError::Runtime("watch for signals", error);
    let joining = |error| DaemonError::Runtime("join the other hosts", error);
    let mut stop = Stop::new().map_err(signals)?;
    // From here on a signal is stored until the daemon can act on it.
    let hangup = signal(SignalKind::hangup()).map_err(signals)?;
    let Config { listeners, backend, uris, groups, hypervisor, history, stress, rate_limit, metrics, .. } = config;
    let plan = KeyPlan::new(&listeners, keys);
    let groups = Current::new(groups);
    let hypervisors = Hypervisors::start(&uris, hypervisor.clone());

    let (mut multicasts, mut tcps, mut others, numbers) = (Vec::new(), Vec::new(), Vec::new(), 0..listeners.len());
    let (several, origins): (_, Vec<Origin>) =
        (listeners.len() > 1, listeners.iter().enumerate().map(origin).collect());
    let only_multicast = listeners.iter().all(|listener| listener.kind() == ListenerKind::Multicast);
    for (number, listener) in listeners.into_iter().enumerate() {
        match listener {
            Listener::Multicast(settings) => multicasts.push((number, settings)),
            Listener::Tcp(settings) => tcps.push((number, tcp::Prepared::new(settings))),
            other @ (Listener::Serial(_) | Listener::Vsock(_)) => others.push((number, other)),
        }
    }
    let mut passed = Passed::new(sockets);
    let opened = multicasts::open(multicasts, &mut passed)?;
    // After the ports, whose errors explain a second daemon better.
    let state = hypervisor.state.as_deref();
    let replays = state.map_or_else(
        || ReplayCache::none(rate_limit.replay_window),
        |state| ReplayCache::open(state, rate_limit.replay_window),
    );
    let (replays, limits) = (Arc::new(replays), RateLimits::from(rate_limit.limits()));
    let judge = Judge::new(None.into()).rate_limited(limits.clone(), Arc::clone(&replays)).grouped(groups.clone());
    let of = |number: usize| origins.get(number).cloned().unwrap_or_default();
    // Before the first look, so that no change in between is lost.
    let mut multicasts = Multicasts::prepare(opened, several, &plan, &judge, &limits, &replays, of);
    let inspector = Arc::new(Inspector::new(multicasts.watched.clone(), judge.clone(), hypervisors.clone()));
    let claims = Arc::new(hypervisor.state.as_deref().map_or_else(Claims::none, Claims::open));
    let history = history.and_then(|directory| keep_history(directory, &claims, &inspector));
    let hosts = match backend {
        Backend::Libvirt => None,
        Backend::Cpg => Some(together::join(&hypervisors, &plan, &claims).map_err(joining)?),
    };
    if let Some(hosts) = &hosts {
        inspector.set_hosts(hosts.clone());
    }
    let _control = control(hypervisor.state.as_deref(), &inspector);
    let _metrics = metrics.map(|place| Metrics::start(place, Arc::clone(&inspector)));

    let waited_for = tokio::time::Instant::now() + WAITED_FOR;
    let start = async {
        let missing = multicasts.complain();
        if let Some(missing) = &missing {
            readiness.tell(missing);
        }
        // The log names by now what this round could not reach.
        let first_round = tokio::time::timeout(FIRST_ROUND, hypervisors.first_round());
        let mut followers = match patience {
            // At the same time: requests that arrive meanwhile wait in the socket, and not for
            // long.
            Patience::Start => {
                let followers = multicasts.follow();
                let _ = first_round.await;
                followers
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
                    multicasts.libvirt.show(UNCONNECTED);
                    announce_waiting(&mut readiness, UNCONNECTED);
                    connected.await;
                }
                multicasts.follow()
            }
        };
        let all_hear = tokio::time::timeout(ALL_HEAR, followers.all_hear()).await.is_ok();
        if !all_hear && only_multicast && !followers.hears() {
            if missing.is_none() && tokio::time::timeout(SOON, followers.any_hears()).await.is_err() {
                readiness.tell(&format!("waiting: {}", followers.status()));
            }
            if tokio::time::timeout_at(waited_for, followers.any_hears()).await.is_err() {
                announce_waiting(&mut readiness, &followers.status());
                followers.any_hears().await?;
            }
        } else if !all_hear {
            // A missing interface keeps no other listener from serving.
            warn!("not every listener hears yet ({}): serving the others", followers.status());
        }
        Ok::<_, io::Error>(followers)
    };
    let followers = tokio::select! {
        started = start => started.map_err(|error| DaemonError::Runtime("follow the interfaces", error))?,
        () = stop.wait() => return Ok(()),
        never = Watchdog::of_unit().feeding() => match never {},
    };
    let (backlog, mut questions) = Backlog::new();
    let requests = inspector.requests();
    let pipeline =
        Pipeline::new(groups.clone(), hypervisors.clone(), hosts, backlog, claims, Arc::clone(&replays), requests);

    let uris = hypervisors.view();
    let connected = uris.iter().filter(|uri| uri.connected).count();
    multicasts.libvirt.show(&unconnected(&hypervisors));
    for (watched, mut hearing) in multicasts.watched.iter().zip(followers.watch()) {
        let settings = watched.settings();
        let listener = several.then(|| Listener::Multicast((*settings).clone()).label());
        let heard = hearing.borrow().clone();
        if !heard.hears {
            // Its first time makes no line elsewhere: the start usually waits for it.
            tokio::spawn(async move {
                if let Ok(heard) = hearing.wait_for(|heard| heard.hears).await {
                    info!(listener, interface = %heard.names(), program = %heard.ways(), "requests are heard now");
                }
            });
            continue;
        }
        info!(
            listener,
            group = %settings.group,
            port = settings.port,
            interface = %heard.names(),
            hash = %settings.hash.name(),
            auth = %settings.auth.name(),
            program = %if heard.loading { "loading".to_owned() } else { heard.ways() },
            libvirt = %format_args!("{connected}/{}", uris.len()),
            "ready"
        );
    }
    // The last thing before the announcement, as nobody reads their requests earlier.
    let (arrivals, (changes, changed)) = (Arrivals::default(), mpsc::unbounded_channel());
    let (reloads, reloaded) = watch::channel(());
    let around = ListenerGround {
        judge: judge.clone(),
        hypervisors: hypervisors.clone(),
        inlets: arrivals.inlets(),
        reloaded,
        changes,
        inspector: Arc::clone(&inspector),
        status: multicasts.libvirt.clone(),
    };
    let listeners = Arc::new(Listeners::new(around));
    for ((follower, (number, socket)), watched) in
        followers.into_each().zip(&multicasts.sockets).zip(&multicasts.watched)
    {
        listeners.adopt(*number, Arc::clone(socket), Arc::clone(watched), follower);
    }
    for (number, prepared) in tcps {
        listeners.tcp(number, prepared, judge.of_listener(plan.ring(number), of(number)), &mut passed).await;
    }
    for (number, listener) in others {
        listeners.begin(number, listener, plan.ring(number), &mut passed).await;
    }
    listeners.show(numbers);
    passed.close_rest();
    if multicasts.sockets.is_empty() {
        info!(libvirt = %format_args!("{connected}/{}", uris.len()), "ready");
    }
    inspector.enter(Phase::Serving);
    if let Err(error) = readiness.announce() {
        warn!("{error}");
    }
    let (serving, status) = (Arc::clone(&listeners), multicasts.reload.clone());
    let reload = Reload::new(running, plan, (groups, limits, replays), hypervisors.clone(), serving, status);
    let reloading = tokio::spawn(reload::at_each(hangup, reload, reloads));
    // Not earlier: loading would only take processors from the start. The socket serves until the
    // program is attached. Memory is locked after aya has freed the dozens of megabytes that only
    // loading needs.
    let (loads, requests) = (std::mem::take(&mut multicasts.loads), inspector.requests());
    let filling = hypervisors.clone();
    tokio::task::spawn_blocking(move || {
        let runtime = Handle::current();
        loader.run(move || {
            // The rings are watched by the runtime.
            let (_entered, mut limits) = (runtime.enter(), None);
            for load in loads {
                load.run(Arc::clone(&requests), &mut limits);
            }
        });
        if stress.lock_memory {
            // What is locked stays, also what was of use only while all domains were looked at.
            Handle::current().block_on(filling.filled_within(FILLED_WITHIN));
            process::settle();
            if let Err(refused) = process::lock_memory() {
                warn!("{refused}");
            }
        }
    });

    let look = Arc::new(Notify::new());
    let telling = tokio::spawn({
        let (inspector, history) = (Arc::clone(&inspector), history.clone());
        let (hypervisors, libvirt) = (hypervisors.clone(), multicasts.libvirt);
        let told = move |senders: Vec<RejectedView>| history.iter().for_each(|history| history.unsigned(&senders));
        let show = move || libvirt.show(&unconnected(&hypervisors));
        rejections::watch(Arc::clone(&look), move || (show(), inspector.rejected()).1, told)
    });

    let mut sources =
        Sources { sockets: multicasts.sockets, rings: Rings::expected(multicasts.rings), arrivals, changes: changed };
    let outcome = tokio::select! {
        outcome = serve(&pipeline, &mut sources, &mut questions, &look, stopped(&mut stop, &pipeline, &hypervisors)) => outcome,
        error = listeners.broken() => Err(DaemonError::Runtime("follow the interfaces", error)),
    };
    drop(questions);
    reloading.abort();
    telling.abort();
    inspector.enter(Phase::Stopping);
    stop::end(Remainder { pipeline, sources, listeners, hypervisors, history }, &mut stop).await;
    outcome
}

/// Starts the history, and has each request's end told to it. No request needs it.
fn keep_history(directory: PathBuf, claims: &Claims, inspector: &Inspector) -> Option<History> {
    let begun = claims.of_clients().map(|(at, id)| Begun { at, id }).collect();
    let history = History::start(directory, begun)
        .inspect_err(|error| warn!("no history: its thread cannot be started: {error}"))
        .ok()?;
    let told = history.clone();
    inspector.requests().tell(Box::new(move |ended| told.ended(ended)));
    Some(history)
}

/// What the requests of a listener carry with them.
fn origin((number, listener): (usize, &Listener)) -> Origin {
    let name = listener.name().map(str::to_owned);
    match listener {
        Listener::Multicast(settings) => Origin { listener: number, name, auth: settings.auth, alone: settings.alone },
        Listener::Tcp(_) | Listener::Vsock(_) | Listener::Serial(_) => {
            Origin { listener: number, name, auth: CONNECTED_AUTH, ..Origin::default() }
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

/// The hypervisors that are not connected, for the line of `systemctl status`.
fn unconnected(hypervisors: &Hypervisors) -> String {
    let uris = hypervisors.view();
    let missing: Vec<_> = uris.iter().filter(|uri| !uri.connected).map(|uri| uri.uri.to_string()).collect();
    if missing.is_empty() { String::new() } else { format!("not connected to {}", missing.join(", ")) }
}

/// The control socket, if it can be created. No request needs it.
fn control(state_directory: Option<&Path>, inspector: &Arc<Inspector>) -> Option<Control> {
    let control = Control::open(state_directory?, Arc::clone(inspector));
    control.inspect_err(|error| warn!("no control socket, so `status` and `top` do not work: {error}")).ok()
}
