//! The daemon's life: what is opened in which order, what it runs on, and how it ends.

use std::convert::Infallible;
use std::io;
use std::net::IpAddr;
use std::time::Duration;

use fence_common::admit::Rules;
use fence_common::boundary::Listener;
use fence_common::key::Key;
use fence_common::verdict::Counters;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing::{error, info, warn};

use crate::callback::Callback;
use crate::config::{Attach, Config, Multicast};
use crate::hypervisor::Hypervisors;
use crate::intake::backlog::{Backlog, Questions};
use crate::intake::interface::{self, Interface, InterfaceError};
use crate::intake::kernel::{AttachedMode, KernelProgram, Mode};
use crate::intake::ring::Ring;
use crate::intake::socket::{RequestSocket, SocketError};
use crate::pipeline::Pipeline;
use crate::process::{self, Readiness};

/// How long the first round of connections may hold up the start. Whatever is not connected then is said to be so and goes
/// on being tried.
const FIRST_ROUND: Duration = Duration::from_secs(3);

/// How often it is looked whether a first hypervisor is connected.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// How often it is looked whether the interfaces are still there.
const LOOK_AFTER: Duration = Duration::from_secs(2);

/// How long a stop waits for requests that are being carried out; they are answered within 25 s.
pub const STOP_WITHIN: Duration = Duration::from_secs(30);

/// The kernel program, as `cargo xtask build` made it.
static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("FENCE_EBPF_OBJECT"));

/// Why the daemon does not start, or stops by itself.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// No interface to listen on.
    #[error(transparent)]
    Interface(#[from] InterfaceError),
    /// No socket to listen at.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The runtime.
    #[error("cannot {0}: {1}")]
    Runtime(&'static str, #[source] io::Error),
}

/// Whether the start waits for what is not there yet (`-w`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Patience {
    /// A missing interface is an error; hypervisors are connected to later.
    Start,
    /// Wait for the interface and for the first hypervisor: another one that never comes must not keep its domains from being fenced.
    Wait,
}

/// Runs until SIGTERM or SIGINT. `readiness` is announced once requests are served.
///
/// # Errors
/// When something without which nothing can be served is missing, at the start or later.
pub async fn run(
    config: Config,
    key: Option<Key>,
    patience: Patience,
    readiness: Readiness,
) -> Result<(), DaemonError> {
    let mut stop = Stop::new().map_err(|error| DaemonError::Runtime("watch for signals", error))?;
    let Config { multicast, uris, groups, .. } = config;
    let hypervisors = Hypervisors::start(&uris);

    let prepare = async {
        let interfaces = interfaces(&multicast, patience).await?;
        // What this round could not reach is in the log by then.
        let _ = tokio::time::timeout(FIRST_ROUND, hypervisors.first_round()).await;
        while patience == Patience::Wait && !hypervisors.any_connected() {
            tokio::time::sleep(LOOK_AGAIN).await;
        }
        Ok::<_, DaemonError>(interfaces)
    };
    let interfaces = tokio::select! {
        interfaces = prepare => interfaces?,
        () = stop.wait() => return Ok(()),
    };
    // The membership comes before the program: a snooping bridge delivers the group only to members.
    let rules = Rules { min_hash: multicast.hash, strict_source: multicast.strict_source };
    let socket = RequestSocket::open(multicast.group, multicast.port, &interfaces, rules, key.clone())?;
    let kernel = attach(&multicast, rules, &interfaces, key.as_ref());
    let (backlog, mut questions) = Backlog::new();
    let pipeline = Pipeline::new(Callback::new(multicast.auth, key), groups, hypervisors.clone(), backlog);

    let names: Vec<_> = interfaces.iter().map(|interface| interface.name.as_str()).collect();
    let health = hypervisors.health();
    let connected = health.iter().filter(|uri| uri.connected).count();
    info!(
        group = %multicast.group,
        port = multicast.port,
        interface = %names.join(","),
        hash = %multicast.hash.name(),
        auth = %multicast.auth.name(),
        xdp = %kernel.mode_name(),
        libvirt = %format_args!("{connected}/{}", health.len()),
        "ready"
    );
    if let Err(error) = readiness.announce() {
        warn!("{error}");
    }

    let outcome = tokio::select! {
        outcome = serve(&pipeline, &socket, kernel.ring, &mut questions, &mut stop) => outcome,
        never = watch(&interfaces) => match never {},
    };
    drop(questions);

    // The program first: from here on the stack gets every packet back. Then the membership.
    let seen = kernel.program.and_then(|program| program.counters().ok());
    process::notify_stopping();
    let heard = socket.counters();
    drop(socket);
    info!("stopping: {}", tell(seen, heard));
    let left = tokio::select! {
        left = pipeline.shutdown(STOP_WITHIN) => left,
        () = stop.wait() => { warn!("asked again: not waiting any longer"); 0 }
    };
    if left > 0 {
        error!("{left} requests are given up without an answer, {} s after the stop", STOP_WITHIN.as_secs());
    }
    tokio::select! {
        () = hypervisors.shutdown(STOP_WITHIN) => {}
        () = stop.wait() => warn!("asked again: not waiting for restarts and connections any longer"),
    }
    info!("stopped");
    outcome
}

async fn serve(
    pipeline: &Pipeline,
    socket: &RequestSocket,
    mut ring: Option<Ring>,
    questions: &mut Questions,
    stop: &mut Stop,
) -> Result<(), DaemonError> {
    loop {
        let from_ring = async {
            match ring.as_mut() {
                Some(ring) => ring.next().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = stop.wait() => return Ok(()),
            request = from_ring => match request {
                Ok(request) => pipeline.accept(request),
                Err(error) => return Err(DaemonError::Runtime("read the ring buffer", error)),
            },
            request = socket.next() => pipeline.accept(request),
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

/// Says when an interface is gone: its membership and the program on it went with it, and nothing else would ever tell.
async fn watch(interfaces: &[Interface]) -> Infallible {
    let mut there: Vec<_> = interfaces.iter().map(|interface| (interface, true)).collect();
    loop {
        tokio::time::sleep(LOOK_AFTER).await;
        for (Interface { name, .. }, there) in
            there.iter_mut().filter(|(interface, there)| *there && !interface.exists())
        {
            error!(interface = %name, "the interface is gone, and no request is heard through it any more: restart the daemon when it is back");
            *there = false;
        }
    }
}

async fn interfaces(multicast: &Multicast, patience: Patience) -> Result<Vec<Interface>, DaemonError> {
    Ok(match (&multicast.interface, patience) {
        (Some(name), Patience::Wait) => vec![interface::wait_for(name).await],
        (Some(name), Patience::Start) => vec![interface::named(name)?],
        (None, Patience::Wait) => interface::wait_for_any(multicast.group).await,
        (None, Patience::Start) => interface::all_for(multicast.group)?,
    })
}

/// The kernel program's part, as far as there is one.
#[derive(Debug, Default)]
struct Kernel {
    program: Option<KernelProgram>,
    ring: Option<Ring>,
    mode: Option<AttachedMode>,
}

impl Kernel {
    fn mode_name(&self) -> String {
        self.mode.map_or_else(|| Attach::Off.name().to_owned(), |mode| mode.to_string())
    }
}

/// Loads and attaches the program. Where that cannot be, the socket serves everything, and the log says why: a fencing daemon
/// that is slower under a flood is worth more than none.
fn attach(multicast: &Multicast, rules: Rules, interfaces: &[Interface], key: Option<&Key>) -> Kernel {
    let without = |why: &str| {
        warn!("serving without XDP, through the socket alone: {why}");
        Kernel::default()
    };
    let mode = match multicast.attach {
        Attach::Auto => Mode::Auto,
        Attach::Native => Mode::Native,
        Attach::Generic => Mode::Generic,
        Attach::Off => {
            info!("serving without XDP, through the socket alone, as configured (attach = \"off\")");
            return Kernel::default();
        }
    };
    let (Some(_), [interface]) = (&multicast.interface, interfaces) else {
        return without("no `interface` is configured in the multicast section");
    };
    let listener = Listener {
        group_v4: if let IpAddr::V4(group) = multicast.group { Some(group.octets()) } else { None },
        group_v6: if let IpAddr::V6(group) = multicast.group { Some(group.octets()) } else { None },
        port: multicast.port,
        rules,
    };
    let attached = KernelProgram::load(OBJECT, &listener, key).and_then(|mut program| {
        // The reader before the program sees its first packet.
        let ring = program.take_ring()?;
        let mode = program.attach(&interface.name, mode)?;
        Ok((program, ring, mode))
    });
    match attached {
        Ok((program, Some(ring), mode)) => match Ring::new(ring) {
            Ok(ring) => Kernel { program: Some(program), ring: Some(ring), mode: Some(mode) },
            Err(error) => without(&format!("the ring buffer cannot be watched: {error}")),
        },
        Ok((_, None, _)) => without("the kernel program has no ring buffer"),
        Err(error) => without(&chain(&error)),
    }
}

/// An error with everything that caused it, in one line: the kernel's own logs, which some errors carry, have thousands.
fn chain(error: &dyn std::error::Error) -> String {
    let first_line = |error: &dyn std::error::Error| error.to_string().lines().next().unwrap_or_default().to_owned();
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(first_line(error), |text, cause| format!("{text}: {}", first_line(cause)))
}

/// The counters that are not zero, in words.
fn tell(kernel: Option<Counters>, socket: Counters) -> String {
    let list = |counters: Counters| {
        let some: Vec<_> = counters.iter().filter(|(_, n)| *n > 0).map(|(name, n)| format!("{name} {n}")).collect();
        if some.is_empty() { "nothing".to_owned() } else { some.join(", ") }
    };
    match kernel {
        Some(kernel) => format!("XDP saw {}; the socket saw {}", list(kernel), list(socket)),
        None => format!("the socket saw {}", list(socket)),
    }
}

/// The signals that end the daemon.
struct Stop {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl Stop {
    fn new() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }

    async fn wait(&mut self) {
        loop {
            tokio::select! {
                _ = self.terminate.recv() => return,
                _ = self.interrupt.recv() => return,
                _ = self.hangup.recv() => warn!("SIGHUP: nothing is read again while running; restart to take over changes"),
            }
        }
    }
}
