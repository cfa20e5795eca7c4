//! The UNIX sockets at which serial ports and channels of running domains listen on this host.
//!
//! The tables follow libvirt's events, so a list of sockets is up to date a moment after a domain
//! has started or ended. Before a connected socket is used, libvirt is asked once more whose it is:
//! another domain may have taken the path meanwhile.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use fence_common::sync::lock;
use tokio::sync::watch;
use tokio::time::Instant;
use uuid::Uuid;

use super::{Instance, Known, Table, Uri};
use crate::hypervisor::libvirt::xml::{DeviceSocket, device_sockets};
use crate::hypervisor::libvirt::{CallError, Connect, Domain, Lane, SocketKind};

/// How long libvirt may take to say whose a socket is.
const SAID_WITHIN: Duration = Duration::from_secs(5);

/// The sockets of one table's domains. Most domains have none, and take no room here.
#[derive(Debug, Default)]
pub(crate) struct Sockets(Mutex<HashMap<Uuid, Vec<DeviceSocket>>>);

impl Sockets {
    /// Notes the sockets of a domain.
    pub(super) fn note(&self, uuid: Uuid, sockets: Vec<DeviceSocket>) {
        let mut all = lock(&self.0);
        if sockets.is_empty() {
            all.remove(&uuid);
        } else {
            all.insert(uuid, sockets);
        }
    }
}

/// A socket of a running domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DomainSocket {
    /// The domain's UUID.
    pub uuid: Uuid,
    /// The domain's name.
    pub name: String,
    /// The socket's path.
    pub path: String,
}

impl Table {
    /// The sockets of this kind of all domains that run.
    fn sockets(&self, kind: SocketKind) -> Vec<DomainSocket> {
        let (domains, sockets) = (self.domains(), lock(&self.sockets.0));
        let of_domain = |(uuid, sockets): (&Uuid, &Vec<DeviceSocket>)| {
            let entry = domains.get(uuid).filter(|entry| entry.instance.as_ref().is_some_and(Instance::may_live))?;
            let of_kind = sockets.iter().filter(|socket| socket.kind == kind);
            let named = |socket: &DeviceSocket| DomainSocket {
                uuid: *uuid,
                name: entry.name.clone(),
                path: socket.path.clone(),
            };
            Some(of_kind.map(named).collect::<Vec<_>>())
        };
        sockets.iter().filter_map(of_domain).flatten().collect()
    }
}

impl Known {
    /// The sockets of this kind on this host, of all URIs or of one. One that two domains claim is
    /// nobody's.
    pub(crate) fn sockets(&self, kind: SocketKind, of: Option<&str>) -> Vec<DomainSocket> {
        let mut owners: BTreeMap<String, BTreeSet<Uuid>> = BTreeMap::new();
        let mut ours = BTreeMap::new();
        for uri in self.local() {
            for socket in uri.table.sockets(kind) {
                owners.entry(socket.path.clone()).or_default().insert(socket.uuid);
                if of.is_none_or(|of| *of == *uri.text) {
                    // Two URIs may lead to one hypervisor: its socket counts once.
                    ours.insert(socket.path.clone(), socket);
                }
            }
        }
        ours.retain(|path, _| owners.get(path).is_some_and(|owners| owners.len() == 1));
        ours.into_values().collect()
    }

    fn local(&self) -> impl Iterator<Item = &Arc<Uri>> {
        self.uris.iter().filter(|uri| !uri.is_remote())
    }

    /// Whether a socket is this running domain's, by libvirt's word at this moment. Every doubt
    /// means no.
    pub(crate) async fn has_socket(&self, uuid: Uuid, path: &str) -> bool {
        for uri in self.local().filter(|uri| uri.table.get(uuid).is_some()) {
            let path = path.to_owned();
            let look = move |connect: &Connect| -> Result<bool, CallError> {
                let Some(domain) = Domain::find(connect, uuid)? else { return Ok(false) };
                if !domain.power()?.is_some_and(|power| power.is_active()) {
                    return Ok(false);
                }
                Ok(device_sockets(&domain.plain_xml()?).is_ok_and(|all| all.iter().any(|socket| socket.path == path)))
            };
            if uri.call(Lane::Look, Instant::now() + SAID_WITHIN, look).await.unwrap_or(false) {
                return true;
            }
        }
        false
    }

    /// Tells when sockets may have come or gone. Must be called within a tokio runtime.
    pub(crate) fn news_of_sockets(&self) -> watch::Receiver<()> {
        let (tell, news) = watch::channel(());
        for uri in &self.uris {
            let (tell, mut changed) = (tell.clone(), uri.table.news());
            tokio::spawn(async move {
                while changed.changed().await.is_ok() && !tell.is_closed() {
                    tell.send_replace(());
                }
            });
        }
        news
    }
}
