//! The serial listener: requests that domains write to their serial ports. QEMU listens at a UNIX
//! socket for each such port, and this daemon connects to it.
//!
//! No key is involved: the socket says which domain asks. So it is served only while libvirt says
//! that it is that domain's. A guest can write whatever it likes, as fast as it can. Its bytes cost
//! a bounded share of a processor, and its requests are limited like any sender's.
//!
//! Each line has a task of its own. A line that ends is connected again, for as long as its domain
//! runs.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use fence_common::caller::{Address, Vouched};
use fence_common::serial::LineReader;
use fence_common::sync::lock;
use fence_common::verdict::{Counters, Verdict};
use fence_common::wire::Request;
use fence_config::Serial;
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, sleep, timeout};
use tracing::{debug, info, warn};

use super::arrivals::{Feed, Inlet};
use super::awake::Awake;
use super::judge::Judge;
use super::line::Link;
use super::request::{Incoming, Verified};
use crate::clock::Moment;

/// How long connecting may take. QEMU is in the way only if another client has the socket.
const CONNECT_WITHIN: Duration = Duration::from_secs(3);

/// The pauses before a line is connected again: the first, and the longest.
const AGAIN: Duration = Duration::from_millis(100);
const AGAIN_MAX: Duration = Duration::from_secs(5);

/// How many changes of domains become one look: a host that starts has many at once.
const SETTLE: Duration = Duration::from_millis(20);

/// How many bytes are read at once, and how long the line then rests. So a guest that writes
/// without end costs a thousand small reads a second, however it writes.
const READ: usize = 1024;
const REST: Duration = Duration::from_millis(1);

/// A serial port of a running domain.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Port {
    /// The socket at which QEMU listens.
    pub path: PathBuf,
    /// The domain's UUID.
    pub uuid: uuid::Uuid,
    /// The domain's name.
    pub name: String,
}

/// What knows the ports: libvirt, by way of the daemon.
pub trait Ports: Send + Sync + 'static {
    /// The ports of all domains that run on this host.
    fn all(&self) -> Vec<Port>;
    /// Whether this port is still its domain's. Every doubt means no.
    fn is_there(&self, port: &Port) -> impl Future<Output = bool> + Send;
    /// Tells when ports may have come or gone.
    fn news(&self) -> watch::Receiver<()>;
}

/// What is known of a line, to be looked at.
#[derive(Debug, Default)]
struct LineState {
    /// Why it is not connected; `None` if it is.
    trouble: Option<String>,
    /// Bytes that belong to no request, over all connections.
    stray: u64,
}

/// A line for the report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LineView {
    /// The domain's name.
    pub domain: String,
    /// The socket.
    pub path: String,
    /// Why it is not connected; `None` if it is.
    pub trouble: Option<String>,
    /// Bytes that belong to no request, since the start.
    pub stray: u64,
}

/// The listener, to be looked at.
#[derive(Debug)]
pub struct LineIntake {
    settings: Serial,
    judge: Judge,
    lines: Mutex<BTreeMap<Port, LineState>>,
    counters: Mutex<Counters>,
    numbers: AtomicU64,
    awake: Arc<Awake>,
}

impl LineIntake {
    /// Begins to listen to the ports, for the queue. Must be called within a tokio runtime.
    #[must_use]
    pub fn start(settings: Serial, judge: Judge, ports: impl Ports, inlet: &mut Inlet) -> Arc<Self> {
        let (lines, counters) = (Mutex::default(), Mutex::default());
        let (numbers, awake) = (AtomicU64::new(0), inlet.awake());
        let intake = Arc::new(Self { settings, judge, lines, counters, numbers, awake });
        inlet.listen(|feed| Arc::clone(&intake).keep(Arc::new(ports), feed));
        intake
    }

    /// Which sockets are served.
    #[must_use]
    pub fn settings(&self) -> &Serial {
        &self.settings
    }

    /// The requests so far, by verdict.
    #[must_use]
    pub fn counters(&self) -> Counters {
        *lock(&self.counters)
    }

    /// The lines, by their sockets.
    #[must_use]
    pub fn lines(&self) -> Vec<LineView> {
        let view = |(port, heard): (&Port, &LineState)| LineView {
            domain: port.name.clone(),
            path: port.path.display().to_string(),
            trouble: heard.trouble.clone(),
            stray: heard.stray,
        };
        lock(&self.lines).iter().map(view).collect()
    }

    /// Keeps a task for each port in the directory.
    async fn keep(self: Arc<Self>, ports: Arc<impl Ports>, feed: Feed) {
        let mut news = ports.news();
        let mut tasks = JoinSet::new();
        let mut running: BTreeMap<Port, AbortHandle> = BTreeMap::new();
        loop {
            news.mark_unchanged();
            let there = ports.all().into_iter().filter(|port| self.settings.holds(&port.path));
            let mut gone = std::mem::take(&mut running);
            for port in there {
                let task = gone.remove(&port).unwrap_or_else(|| {
                    lock(&self.lines)
                        .insert(port.clone(), LineState { trouble: Some("connecting".to_owned()), stray: 0 });
                    tasks.spawn(Arc::clone(&self).follow(port.clone(), Arc::clone(&ports), feed.clone()))
                });
                running.insert(port, task);
            }
            for (port, task) in gone {
                task.abort();
                lock(&self.lines).remove(&port);
                info!(domain = %port.name.escape_debug(), path = %port.path.display(), "serial: the line is gone");
            }
            while tasks.try_join_next().is_some() {}
            if news.changed().await.is_err() {
                // Nothing will change any more: the hypervisors are gone.
                std::future::pending::<()>().await;
            }
            sleep(SETTLE).await;
        }
    }

    /// Listens to a port as long as it is there.
    async fn follow(self: Arc<Self>, port: Port, ports: Arc<impl Ports>, feed: Feed) {
        let domain = Arc::new(Vouched { name: port.name.clone(), uuid: port.uuid });
        let mut pause = AGAIN;
        loop {
            let begun = Instant::now();
            let trouble = match connect(&port.path).await {
                Err(error) => error.to_string(),
                // After connecting: a later owner of the socket is not on this connection.
                Ok(_) if !ports.is_there(&port).await => "libvirt does not say that it is the domain's".to_owned(),
                Ok(socket) => {
                    info!(domain = %domain.name.escape_debug(), path = %port.path.display(), "serial: listening");
                    self.note(&port, |heard| heard.trouble = None);
                    self.hear(socket, &port, &domain, &feed).await
                }
            };
            let lasted = begun.elapsed() > AGAIN_MAX;
            pause = if lasted { AGAIN } else { pause };
            let is_new = self.note(&port, |heard| heard.trouble.replace(trouble.clone()) != Some(trouble.clone()));
            if is_new == Some(true) {
                let (name, path) = (domain.name.escape_debug(), port.path.display());
                warn!(domain = %name, %path, "serial: not listening: {trouble}; trying again");
            }
            sleep(pause).await;
            pause = AGAIN_MAX.min(2 * pause);
        }
    }

    fn note<T>(&self, port: &Port, change: impl FnOnce(&mut LineState) -> T) -> Option<T> {
        lock(&self.lines).get_mut(port).map(change)
    }

    /// Reads a connected line until it ends. Returns why.
    async fn hear(&self, socket: UnixStream, port: &Port, domain: &Arc<Vouched>, feed: &Feed) -> String {
        let (mut socket, write) = socket.into_split();
        let (link, line) = (Link::new(write), self.numbers.fetch_add(1, Ordering::Relaxed));
        let (mut reader, mut buffer, mut stray) = (LineReader::default(), [0; READ], 0);
        loop {
            let read = tokio::select! {
                read = socket.read(&mut buffer) => read,
                () = link.broken() => return "the guest does not read its answers".to_owned(),
            };
            let bytes = match read {
                Ok(0) => return "QEMU has closed the connection".to_owned(),
                Ok(count) => buffer.get(..count).unwrap_or_default(),
                Err(error) => return error.to_string(),
            };
            for &byte in bytes {
                if let Some(request) = reader.push(byte)
                    && let Some(incoming) = self.take(&request, domain, line, &link)
                    && feed.send(incoming).await.is_err()
                {
                    return "the daemon stops".to_owned();
                }
            }
            let more = reader.skipped() - stray;
            if more > 0 {
                stray += more;
                self.note(port, |heard| heard.stray += more);
            }
            sleep(REST).await;
        }
    }

    /// Judges a request. One that comes too often is counted, and not answered.
    fn take(&self, request: &Request, domain: &Arc<Vouched>, line: u64, link: &Arc<Link>) -> Option<Incoming> {
        let arrived = self.awake.arrival(Moment::now());
        // A line's number is of use only beside its domain.
        let line = u32::try_from(line % (1 << 32)).unwrap_or_default();
        let verified = Verified::on_line(request, Arc::clone(domain), line, arrived)?;
        let at_line = link.enter(verified.id());
        let judged = self.judge.permit(&Address::Domain(domain.uuid).sender());
        lock(&self.counters).count(judged.err().unwrap_or(Verdict::Delivered));
        match judged {
            Ok(()) => Some(Incoming::on_line(verified.came_to(self.judge.origin()), at_line)),
            Err(verdict) => {
                debug!(domain = %domain.name.escape_debug(), ?verdict, "serial: not answered");
                None
            }
        }
    }
}

async fn connect(path: &Path) -> io::Result<UnixStream> {
    timeout(CONNECT_WITHIN, UnixStream::connect(path)).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

#[cfg(test)]
mod tests;
