//! One URI: the way to libvirt, and the table of its domains.

use std::ops::Deref;
use std::sync::Arc;

use tokio::sync::{Semaphore, watch};
use uuid::Uuid;

use super::{Identity, Table, events::follow, listing::LISTS_AT_ONCE};
use crate::hypervisor::libvirt::Endpoint;

/// One URI.
pub(crate) struct Uri {
    endpoint: Arc<Endpoint>,
    /// Its domains.
    pub(crate) table: Arc<Table>,
    /// Turns of lists of all its domains.
    pub(super) lists: Arc<Semaphore>,
}

impl Deref for Uri {
    type Target = Arc<Endpoint>;

    fn deref(&self) -> &Self::Target {
        &self.endpoint
    }
}

impl Uri {
    /// A URI that nobody keeps yet. `index` goes into its threads' names.
    pub(crate) fn new(text: &str, index: usize) -> Arc<Self> {
        let (table, lists) = (Arc::new(Table::new(text)), Arc::new(Semaphore::new(LISTS_AT_ONCE)));
        Arc::new(Self { endpoint: Endpoint::new(text, index), table, lists })
    }

    /// Keeps it connected and its table as its domains are, until `stop` says so.
    pub(crate) async fn keep(self: Arc<Self>, stop: watch::Receiver<bool>) {
        let endpoint = Arc::clone(&self.endpoint);
        let follow = |told, events| {
            self.table.begin_generation(told);
            follow(&self, events)
        };
        endpoint.keep(stop, follow).await;
    }

    pub(crate) fn identity(&self, uuid: Uuid, name: &str) -> Identity {
        Identity { uri: Arc::clone(&self.text), uuid, name: name.to_owned() }
    }
}
