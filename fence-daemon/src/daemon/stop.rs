//! The daemon's end: a stop serves on while it waits, and then ends as soon as it can. Nobody is
//! served from there to the start of the next daemon.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use fence_common::verdict::Counters;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing::{error, info, warn};

use super::listeners::Listeners;
use super::serve::Sources;
use crate::history::History;
use crate::hypervisor::Hypervisors;
use crate::intake::ring::RequestRing;
use crate::pipeline::Pipeline;
use crate::systemd;

/// How long a stop waits for the requests of its moment, and for restarts that are due. The daemon
/// goes on to serve meanwhile.
pub const SETTLED_WITHIN: Duration = Duration::from_secs(1);

/// How long a stop waits for connected clients to send their requests, once no port is open any
/// more.
const SENT_WITHIN: Duration = Duration::from_millis(100);

/// How long a stop then waits for answers: the longest time that one may take, and its way to the
/// client. The next daemon serves nobody before this one is gone.
pub const ANSWERS_WITHIN: Duration = Duration::from_millis(350);

/// How long a stop then waits for restarts, which are on record for the next daemon, and for
/// libvirt to close.
pub const REST_WITHIN: Duration = Duration::from_millis(150);

/// How long a stop waits for the last lines of the history.
const WRITTEN_WITHIN: Duration = Duration::from_millis(100);

/// The signals that end the daemon.
pub(super) struct Stop {
    terminate: Signal,
    interrupt: Signal,
}

impl Stop {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    pub(super) async fn wait(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// Returns when the daemon is to stop and little of its work is left. To be called while the daemon
/// serves.
pub(super) async fn stopped(stop: &mut Stop, pipeline: &Pipeline, hypervisors: &Hypervisors) {
    stop.wait().await;
    let settled = async {
        tokio::join!(pipeline.settle(SETTLED_WITHIN), hypervisors.start_pending(SETTLED_WITHIN));
    };
    tokio::select! {
        () = settled => {}
        () = stop.wait() => warn!("second signal: not waiting for requests and restarts any longer"),
    }
}

/// What a stop ends.
pub(super) struct Remainder {
    pub(super) pipeline: Pipeline,
    pub(super) sources: Sources,
    pub(super) listeners: Arc<Listeners>,
    pub(super) hypervisors: Hypervisors,
    pub(super) history: Option<History>,
}

/// Ends the daemon, of which nobody is served any more.
pub(super) async fn end(running: Remainder, stop: &mut Stop) {
    let Remainder { pipeline, sources, listeners, hypervisors, history } = running;
    let Sources { sockets, mut rings, arrivals, .. } = sources;
    // The programs first: from here on the stack gets every packet again. Then the memberships. The
    // ports are closed at the same time: nobody reads what comes by them.
    let (seen, ()) = tokio::join!(listeners.end(), arrivals.drain(SENT_WITHIN, |incoming| pipeline.accept(incoming)));
    drop(listeners);
    // What comes from here on waits in the sockets for the next daemon, if systemd keeps them.
    rings.each().for_each(|ring: &mut RequestRing| ring.take_waiting(|request| pipeline.accept(request)));
    systemd::notify_stopping();
    let mut heard = Counters::default();
    sockets.iter().for_each(|(_, socket)| heard.add(&socket.counters()));
    drop((sockets, rings));
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
    history.iter().for_each(|history| history.flush(WRITTEN_WITHIN));
    info!("stopped");
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
