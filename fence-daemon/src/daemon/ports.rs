//! What libvirt tells the listeners: the serial ports to hear, and the domain of a vsock number.

use crate::intake::connections::Voucher;
use fence_common::caller::Address;
use std::path::PathBuf;

use fence_config::{Serial, SerialMode};
use tokio::sync::watch;

use crate::hypervisor::{DomainSocket, Hypervisors, SocketKind};
use crate::intake::serial::{Port, Ports};

/// The ports that the settings mean.
pub(super) struct PortsByLibvirt {
    hypervisors: Hypervisors,
    kind: SocketKind,
    uri: Option<String>,
}

impl PortsByLibvirt {
    pub(super) fn new(hypervisors: Hypervisors, settings: &Serial) -> Self {
        let kind = match settings.mode {
            SerialMode::Serial => SocketKind::Serial,
            SerialMode::Vmchannel => SocketKind::Channel,
        };
        Self { hypervisors, kind, uri: settings.uri.clone() }
    }
}

impl Ports for PortsByLibvirt {
    fn all(&self) -> Vec<Port> {
        let port = |DomainSocket { uuid, name, path }| Port { path: PathBuf::from(path), uuid, name };
        self.hypervisors.sockets(self.kind, self.uri.as_deref()).into_iter().map(port).collect()
    }

    async fn is_there(&self, port: &Port) -> bool {
        // It was text before.
        match port.path.to_str() {
            Some(path) => self.hypervisors.has_socket(port.uuid, path).await,
            None => false,
        }
    }

    fn news(&self) -> watch::Receiver<()> {
        self.hypervisors.news_of_sockets()
    }
}

/// Names the domain behind a vsock number, by libvirt.
pub(super) fn voucher(hypervisors: &Hypervisors) -> Voucher {
    let hypervisors = hypervisors.clone();
    Voucher::new(move |address| {
        let hypervisors = hypervisors.clone();
        async move {
            match address {
                Address::Cid(cid) => hypervisors.domain_of_cid(cid).await,
                Address::Ip(_) | Address::Domain(_) => None,
            }
        }
    })
}
