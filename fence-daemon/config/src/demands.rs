//! What a configuration takes of the system that most do not: capabilities and kinds of sockets.

use super::listeners::Listener;
use super::metrics::Metrics;
use super::resolved::Config;

/// Ports below this one are privileged.
const UNPRIVILEGED: u16 = 1024;

impl Config {
    /// Whether a port is privileged, which takes CAP_NET_BIND_SERVICE.
    #[must_use]
    pub fn has_privileged_port(&self) -> bool {
        let port = |listener: &Listener| match listener {
            Listener::Multicast(multicast) => Some(multicast.port),
            Listener::Tcp(tcp) => Some(tcp.port),
            Listener::Vsock(vsock) => Some(vsock.port),
            Listener::Serial(_) => None,
        };
        let scraped = self.metrics.iter().filter_map(|metrics| match metrics {
            Metrics::Tcp(address) => Some(address.port()),
            Metrics::Unix(_) => None,
        });
        self.listeners.iter().filter_map(port).chain(scraped).any(|port| port < UNPRIVILEGED)
    }

    /// Whether libvirt's client starts a program for a URI, with all rights dropped, which takes
    /// CAP_SETPCAP. It may do so for an alias, which libvirt's own configuration explains.
    #[must_use]
    pub fn starts_programs(&self) -> bool {
        let starts = |uri: &String| {
            uri.split_once("://").is_none_or(|(scheme, _)| scheme.ends_with("+ssh") || scheme.ends_with("+ext"))
        };
        self.uris.iter().any(starts)
    }

    /// Whether a listener has a vsock socket.
    #[must_use]
    pub fn has_vsock(&self) -> bool {
        self.listeners.iter().any(|listener| matches!(listener, Listener::Vsock(_)))
    }
}
