//! One serial line of a domain: a connection to the UNIX socket of its port.
//!
//! A line has one reader and no order of its own: an answer names no request. So it goes to the
//! client whose request came last, or to nobody.

use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use fence_common::ledger::RequestId;
use fence_common::serial::on_the_line;
use fence_common::sync::lock;
use tokio::io::AsyncWriteExt;
use tokio::net::unix::OwnedWriteHalf;
use tokio::sync::{Mutex as Turn, Notify};
use tokio::time::timeout;

/// How long a guest may take to read an answer for which its line has no room.
const REPLY_WITHIN: Duration = Duration::from_secs(2);

/// The writing end of a connected line.
#[derive(Debug)]
pub(super) struct Link {
    socket: Turn<OwnedWriteHalf>,
    /// The request that came last.
    newest: Mutex<Option<RequestId>>,
    /// Told when an answer could not be written whole.
    broken: Notify,
}

impl Link {
    pub(super) fn new(socket: OwnedWriteHalf) -> Arc<Self> {
        Arc::new(Self { socket: Turn::new(socket), newest: Mutex::default(), broken: Notify::new() })
    }

    /// Notes a request. From now on no other one is answered on this line.
    pub(super) fn enter(self: &Arc<Self>, id: RequestId) -> AtLine {
        *lock(&self.newest) = Some(id);
        AtLine { link: Arc::clone(self), id }
    }

    /// Waits until half an answer is on the line. The connection is of no further use then.
    pub(super) async fn broken(&self) {
        self.broken.notified().await;
    }
}

/// A client that waits on a line. Only a request that was read from the line makes one, so it
/// stands for the hypervisor's word about who asks.
#[derive(Debug)]
pub struct AtLine {
    link: Arc<Link>,
    id: RequestId,
}

impl AtLine {
    /// Writes the answer.
    ///
    /// # Errors
    /// A newer request came over the line, the guest does not read, or the line is gone.
    pub async fn reply(self, answer: &[u8]) -> io::Result<()> {
        let bytes = on_the_line(answer);
        let write = async {
            let mut socket = self.link.socket.lock().await;
            if *lock(&self.link.newest) != Some(self.id) {
                return Err(io::Error::other("a newer request came over the line"));
            }
            // What it has begun, it ends, or the line is closed.
            let written = timeout(REPLY_WITHIN, socket.write_all(&bytes)).await;
            let written = written.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
            written.inspect_err(|_| self.link.broken.notify_one())
        };
        // A turn as long as that of the answer before it, and its own.
        timeout(2 * REPLY_WITHIN, write).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
    }
}
