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

use crate::control::inspector::Inspector;
use crate::intake::kernel::{self, KernelProgram, Mode};
use crate::intake::keyring::Keyring;
use crate::intake::listener::{Coming, chain};
use crate::intake::replay_cache::ReplayCache;
use crate::intake::ring::RequestRing;

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
    mode: Mode,
    /// What it is to know before it sees a packet.
    replays: Arc<ReplayCache>,
    program: oneshot::Sender<(KernelProgram, Mode)>,
    ring: oneshot::Sender<RequestRing>,
}

/// What to load, if anything. Otherwise the log says why, and the socket serves everything.
pub(super) fn kernel(
    multicast: &Multicast,
    rules: Rules,
    limits: Limits,
    keys: &Keyring,
    replays: &Arc<ReplayCache>,
) -> Option<(Load, KernelConsumers)> {
    let mode = match multicast.attach {
        Attach::Auto if multicast.interface.is_none() => Mode::Gentle,
        Attach::Auto => Mode::Auto,
        Attach::Native => Mode::Native,
        Attach::Generic => Mode::Generic,
        Attach::Tcx => Mode::Tcx,
        Attach::Off if !keys.groups().is_empty() => {
            info!(
                "serving without the kernel program, through the socket alone: it does not know the groups' own keys"
            );
            return None;
        }
        Attach::Off => {
            info!("serving without the kernel program, through the socket alone, as configured (attach = \"off\")");
            return None;
        }
    };
    let listener = Listening {
        group_v4: if let IpAddr::V4(group) = multicast.group { Some(group.octets()) } else { None },
        group_v6: if let IpAddr::V6(group) = multicast.group { Some(group.octets()) } else { None },
        port: multicast.port,
        rules,
        limits,
    };
    let (program, coming) = oneshot::channel();
    let (ring, ring_coming) = oneshot::channel();
    let load = Load { listener, keys: keys.clone(), mode, replays: Arc::clone(replays), program, ring };
    Some((load, KernelConsumers { program: coming, ring: ring_coming }))
}

impl Load {
    fn load(&self) -> Result<(Option<kernel::Ring>, KernelProgram), kernel::Error> {
        let mut program = KernelProgram::load(OBJECT, &self.listener, None)?;
        // The keys of this moment, which may differ from those of the start.
        if let Some(slots) = program.take_keys()? {
            self.keys.connect(Box::new(slots))?;
        }
        if let Some(memory) = program.take_memory()? {
            self.replays.teach(memory);
        }
        Ok((program.take_ring()?, program))
    }

    /// Loads the program, which takes the kernel's verifier some time. If that fails, the socket
    /// serves everything and the log says why. A fencing daemon that is slower in a flood is better
    /// than none.
    pub(super) fn run(self, inspector: &Inspector) {
        match self.load() {
            Ok((Some(ring), program)) => match RequestRing::new(ring, self.keys, inspector.requests()) {
                Ok(mut ring) => {
                    ring.beat();
                    match program.reader() {
                        Ok(reader) => inspector.set_kernel(reader),
                        Err(error) => warn!("`status` cannot show the kernel program's counters: {}", chain(&error)),
                    }
                    match program.senders() {
                        Ok(senders) => inspector.set_sources(senders),
                        Err(error) => warn!("`status` cannot show the sources of requests: {}", chain(&error)),
                    }
                    match program.rejected() {
                        Ok(rejected) => inspector.set_rejected(rejected),
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
