//! Loads the kernel program beside serving. The socket serves until the program is there, and if it
//! cannot be loaded.

use std::net::IpAddr;
use std::sync::Arc;

use fence_common::admit::Rules;
use fence_common::boundary::Listener as Listening;
use fence_common::rate_limit::Limits;
use fence_config::{Attach, Multicast};
use tokio::sync::oneshot;
use tracing::{info, warn};

use crate::control::multicast::Watched;
use crate::intake::kernel::{self, KernelProgram, Mode, SharedLimits};
use crate::intake::keyring::Keyring;
use crate::intake::memberships::{Coming, chain};
use crate::intake::rate_limits::RateLimits;
use crate::intake::replay_cache::ReplayCache;
use crate::intake::request::Origin;
use crate::intake::ring::RequestRing;
use crate::observe::requests::Requests;

/// The kernel program, as `cargo xtask build` made it.
static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("FENCE_EBPF_OBJECT"));

/// The kernel program's two consumers: the one that attaches it, and the one that reads its ring
/// buffer.
#[derive(Debug)]
pub(super) struct KernelConsumers {
    pub(super) program: Coming,
    pub(super) ring: oneshot::Receiver<RequestRing>,
}

/// What loading the program needs, and who receives it.
pub(super) struct Load {
    listener: Listening,
    keys: Keyring,
    limits: RateLimits,
    origin: Origin,
    mode: Mode,
    /// What it is to know before it sees a packet.
    replays: Arc<ReplayCache>,
    watched: Arc<Watched>,
    program: oneshot::Sender<(KernelProgram, Mode)>,
    ring: oneshot::Sender<RequestRing>,
}

/// How to attach the program of a listener, if there is to be one. Otherwise the log says why, and
/// the socket serves everything. `earlier` are the listeners whose programs come before.
pub(super) fn mode(multicast: &Multicast, earlier: &[Multicast], keys: &Keyring) -> Option<Mode> {
    let meets = |other: &Multicast| match (&multicast.interface, &other.interface) {
        (Some(one), Some(other)) => one == other,
        (None, _) | (_, None) => true,
    };
    match multicast.attach {
        // An interface has one place for XDP, and any number for tcx.
        Attach::Auto if earlier.iter().any(meets) => Some(Mode::Tcx),
        Attach::Auto if multicast.interface.is_none() => Some(Mode::Gentle),
        Attach::Auto => Some(Mode::Auto),
        Attach::Native => Some(Mode::Native),
        Attach::Generic => Some(Mode::Generic),
        Attach::Tcx => Some(Mode::Tcx),
        Attach::Off if !keys.groups().is_empty() => {
            info!(
                "serving without the kernel program, through the socket alone: it does not know the groups' own keys"
            );
            None
        }
        Attach::Off => {
            info!("serving without the kernel program, through the socket alone, as configured (attach = \"off\")");
            None
        }
    }
}

/// What the program of a listener is configured with.
pub(super) fn boundary(multicast: &Multicast, rules: Rules, limits: Limits) -> Listening {
    Listening {
        group_v4: if let IpAddr::V4(group) = multicast.group { Some(group.octets()) } else { None },
        group_v6: if let IpAddr::V6(group) = multicast.group { Some(group.octets()) } else { None },
        port: multicast.port,
        rules,
        limits,
    }
}

impl Load {
    /// What is to be loaded, and for whom.
    pub(super) fn new(
        listener: Listening,
        mode: Mode,
        keys: Keyring,
        limits: &RateLimits,
        origin: Origin,
        replays: &Arc<ReplayCache>,
        watched: &Arc<Watched>,
    ) -> (Self, KernelConsumers) {
        let (program, coming) = oneshot::channel();
        let (ring, ring_coming) = oneshot::channel();
        let (limits, replays, watched) = (limits.clone(), Arc::clone(replays), Arc::clone(watched));
        let load = Self { listener, keys, limits, origin, mode, replays, watched, program, ring };
        (load, KernelConsumers { program: coming, ring: ring_coming })
    }

    fn load(&self, limits: &mut Option<SharedLimits>) -> Result<(Option<kernel::Ring>, KernelProgram), kernel::Error> {
        let mut program = KernelProgram::load(OBJECT, &self.listener, None)?;
        match limits {
            Some(limits) => program.share_limits(limits)?,
            None => *limits = Some(program.limits()?),
        }
        // The limits of this moment, and the keys, which may differ from those of the start.
        self.limits.connect(Box::new(program.config(self.listener)?))?;
        if let Some(slots) = program.take_keys()? {
            self.keys.connect(Box::new(slots))?;
        }
        if let Some(memory) = program.take_memory()? {
            self.replays.teach(memory);
        }
        program.load_forms(self.mode)?;
        Ok((program.take_ring()?, program))
    }

    /// Loads the program, which takes the kernel's verifier some time. If that fails, the socket
    /// serves everything and the log says why. A fencing daemon that is slower in a flood is better
    /// than none. The first program's rate limits are in `limits` afterwards, for the others.
    pub(super) fn run(self, requests: Arc<Requests>, limits: &mut Option<SharedLimits>) {
        // Programs with one memory know the same senders.
        let knows_others = limits.is_some();
        match self.load(limits) {
            Ok((Some(ring), program)) => match RequestRing::new(ring, self.keys, self.origin, requests) {
                Ok(mut ring) => {
                    ring.beat();
                    match program.reader() {
                        Ok(reader) => self.watched.set_kernel(reader),
                        Err(error) => warn!("`status` cannot show the kernel program's counters: {}", chain(&error)),
                    }
                    match program.senders() {
                        Ok(_) if knows_others => {}
                        Ok(senders) => self.watched.set_sources(senders),
                        Err(error) => warn!("`status` cannot show the sources of requests: {}", chain(&error)),
                    }
                    match program.rejected() {
                        Ok(rejected) => self.watched.set_rejected(rejected),
                        Err(error) => warn!("`status` cannot show rejected sources: {}", chain(&error)),
                    }
                    // The reader comes before the program sees its first packet. If nobody takes
                    // the two, the daemon is about to end.
                    if self.ring.send(ring).is_ok() {
                        let _ = self.program.send((program, self.mode));
                    }
                }
                Err(error) => without(&format!("the ring buffer cannot be watched: {error}")),
            },
            Ok((None, _)) => without("the kernel program has no ring buffer"),
            Err(error) => match error.remark() {
                Some(remark) => without(&format!("{remark} ({})", chain(&error))),
                None => without(&chain(&error)),
            },
        }
    }
}

fn without(why: &str) {
    warn!("serving without the kernel program, through the socket alone: {why}");
}
