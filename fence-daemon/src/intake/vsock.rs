//! The vsock listener: virtual machines connect to this host without any network. The kernel says
//! which machine has connected, and libvirt which domain that is.

use std::sync::Arc;

use fence_common::verdict::Counters;
use fence_config::{Listener, Vsock};

use super::arrivals::Inlet;
use super::connections::{ClientConnections, Voucher};
use super::judge::Judge;
use super::passed::Passed;
use super::port::{self, At, ListeningPort, NoPort};
use crate::observe::requests::Via;

/// Looks whether a listener that is to come can have its port.
///
/// # Errors
/// It cannot.
pub fn probe(settings: &Vsock) -> Result<(), NoPort> {
    port::probe(&At::Vsock(settings.port))
}

/// The listener, to be looked at.
#[derive(Debug)]
pub struct VsockIntake {
    settings: Vsock,
    connections: Arc<ClientConnections>,
    /// One, or as many as systemd has opened.
    ports: Vec<Arc<ListeningPort>>,
}

impl VsockIntake {
    /// Begins to listen, for the queue. If that is not possible now, it is tried again until it is.
    /// `voucher` knows the domains, `passed` has the sockets of systemd. Must be called within a
    /// tokio runtime.
    #[must_use]
    pub fn start(settings: Vsock, judge: Judge, voucher: Voucher, passed: &mut Passed, inlet: &mut Inlet) -> Arc<Self> {
        let connections = ClientConnections::vouched(Via::Vsock, settings.hash, judge, voucher);
        let listener = Listener::Vsock(settings.clone());
        let mut ports = Vec::new();
        if settings.by_systemd {
            for (port, opened) in passed.vsock(&listener) {
                ports.push(Arc::clone(&port));
                if let Some(opened) = opened {
                    let connections = Arc::clone(&connections);
                    inlet.listen(|feed| port.serve(Some(opened), connections, feed));
                }
            }
        } else {
            let port = ListeningPort::new(listener.label(), At::Vsock(settings.port));
            ports.push(Arc::clone(&port));
            // Here, so that the port is open when the daemon says that it is ready.
            let (opened, connections) = (port.open(), Arc::clone(&connections));
            inlet.listen(|feed| port.serve(opened, connections, feed));
        }
        Arc::new(Self { settings, connections, ports })
    }

    /// Where clients connect to.
    #[must_use]
    pub fn settings(&self) -> &Vsock {
        &self.settings
    }

    /// The port that clients connect to; 0 if systemd has opened none.
    #[must_use]
    pub fn port(&self) -> u16 {
        let first = self.ports.first().map(|port| port.at());
        if let Some(At::Vsock(port)) = first { *port } else { self.settings.port }
    }

    /// Whether clients can connect, and if not, why.
    #[must_use]
    pub fn status(&self) -> (bool, String) {
        let all = || self.ports.iter().map(|port| port.status());
        let refused = all().find(|(hears, _)| !hears);
        (all().any(|(hears, _)| hears), refused.or_else(|| all().next()).map(|(_, status)| status).unwrap_or_default())
    }

    /// The requests so far, by verdict.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.connections.counters()
    }
}
