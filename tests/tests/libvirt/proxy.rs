//! Between a lab's libvirtd and its clients: what they say to each other is passed on, late or not
//! at all where a test wants that.
//!
//! It takes the place of libvirtd's own socket, so the daemon takes it for the local libvirtd that
//! it is.

use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fence_common::sync::lock;
use fence_lab::lab::Hypervisor;

/// Where libvirtd serves.
const SOCKET: &str = "/run/libvirt/libvirt-sock";
/// Where its socket is moved to.
const BEHIND: &str = "/run/libvirt/libvirt-sock.behind";
/// libvirt's program for hypervisors, in its RPC.
const REMOTE_PROGRAM: u32 = 0x2000_8086;
/// Its procedure that registers for events of domains.
const REGISTER_ANY: u32 = 316;
/// Its procedure that lists all domains.
const LIST_ALL: u32 = 273;
/// `VIR_ERR_NO_SUPPORT` and `VIR_FROM_RPC`, and the level of an error.
const NO_SUPPORT: [u32; 2] = [3, 7];
const LEVEL: u32 = 2;
/// The largest message of libvirt's.
const MESSAGE_MAX: usize = 32 << 20;

/// What the proxy does to messages.
#[derive(Debug, Default)]
struct Rules {
    /// Whether registrations for events are refused, as by a driver that has none.
    refuses_events: AtomicBool,
    /// Whether lists of all domains are never answered.
    withholds_lists: AtomicBool,
    /// For how many milliseconds each answer is kept back.
    delay: AtomicU64,
    /// Whether those on the connection that events come over are as well. Most queries use it.
    delays_queries: AtomicBool,
    open: Mutex<Vec<UnixStream>>,
}

/// The proxy. Dropping it ends all connections through it.
#[derive(Debug)]
pub(super) struct Proxy {
    rules: Arc<Rules>,
    socket: PathBuf,
    /// Where libvirtd's own socket was moved to, if this took its place.
    moved_to: Option<PathBuf>,
}

impl Proxy {
    /// Takes the place of the socket of a libvirtd that serves.
    pub(super) fn start(hypervisor: &Hypervisor) -> Result<Self> {
        let (socket, behind) = (hypervisor.outside(SOCKET), hypervisor.outside(BEHIND));
        fs::rename(&socket, &behind).context("libvirtd's socket")?;
        let mut proxy = Self::serve(&socket, behind.clone())?;
        proxy.moved_to = Some(behind);
        Ok(proxy)
    }

    /// Serves at this path in a lab, in front of another lab's libvirtd.
    ///
    /// # Errors
    /// There is something at that path.
    pub(super) fn between(hypervisor: &Hypervisor, path: &str, other: &Hypervisor) -> Result<Self> {
        Self::serve(&hypervisor.outside(path), other.outside(SOCKET))
    }

    fn serve(socket: &Path, behind: PathBuf) -> Result<Self> {
        let listener = UnixListener::bind(socket).context("a socket in its place")?;
        let rules = Arc::new(Rules::default());
        let proxy = Self { rules: Arc::clone(&rules), socket: socket.to_owned(), moved_to: None };
        thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                // A connection that cannot be made is one that ends.
                let _ = pass(&rules, client, &behind);
            }
        });
        Ok(proxy)
    }

    /// Refuses registrations for events from now on.
    pub(super) fn refuse_events(&self) {
        self.rules.refuses_events.store(true, Ordering::Release);
    }

    /// Answers no list of all domains from now on.
    pub(super) fn withhold_lists(&self) {
        self.rules.withholds_lists.store(true, Ordering::Release);
    }

    /// Keeps each answer back for so long, on all connections but the one that events come over.
    pub(super) fn delay_answers(&self, delay: Duration) {
        self.rules.delay.store(u64::try_from(delay.as_millis()).unwrap_or(u64::MAX), Ordering::Release);
    }

    /// The same on all connections.
    pub(super) fn delay_all_answers(&self, delay: Duration) {
        self.rules.delays_queries.store(true, Ordering::Release);
        self.delay_answers(delay);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        if let Some(moved_to) = &self.moved_to {
            let _ = fs::rename(moved_to, &self.socket);
        }
        for stream in lock(&self.rules.open).iter() {
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
    }
}

/// Passes what client and server say, each way on a thread of its own, until one of them ends.
fn pass(rules: &Arc<Rules>, client: UnixStream, behind: &PathBuf) -> Result<()> {
    let server = UnixStream::connect(behind)?;
    let mut open = lock(&rules.open);
    open.extend([client.try_clone()?, server.try_clone()?]);
    drop(open);
    let (mut from_client, mut to_client) = (client.try_clone()?, client);
    let (mut from_server, mut to_server) = (server.try_clone()?, server);
    let refusals = Mutex::new(to_client.try_clone()?);
    let asks = Arc::clone(rules);
    // Which connection is opened first is not certain, so what it is for tells it.
    let listens = Arc::new(AtomicBool::new(false));
    let has_events = Arc::clone(&listens);
    thread::spawn(move || {
        while let Ok(message) = read(&mut from_client) {
            if calls(&message, REGISTER_ANY) {
                listens.store(true, Ordering::Release);
            }
            if calls(&message, LIST_ALL) && asks.withholds_lists.load(Ordering::Acquire) {
                continue;
            }
            let refused = asks.refuses_events.load(Ordering::Acquire).then(|| refusal(&message)).flatten();
            let passed = match refused {
                Some(refusal) => lock(&refusals).write_all(&refusal),
                None => to_server.write_all(&message),
            };
            if passed.is_err() {
                break;
            }
        }
        let _ = to_server.shutdown(std::net::Shutdown::Both);
    });
    let answers = Arc::clone(rules);
    thread::spawn(move || {
        while let Ok(message) = read(&mut from_server) {
            let delay = answers.delay.load(Ordering::Acquire);
            let is_delayed = !has_events.load(Ordering::Acquire) || answers.delays_queries.load(Ordering::Acquire);
            if is_delayed && delay > 0 && is_answer(&message) {
                thread::sleep(Duration::from_millis(delay));
            }
            if to_client.write_all(&message).is_err() {
                break;
            }
        }
        let _ = to_client.shutdown(std::net::Shutdown::Both);
    });
    Ok(())
}

/// Whether a message is of libvirt's program for hypervisors; others keep the connection alive.
fn is_answer(message: &[u8]) -> bool {
    message.get(4..8).is_some_and(|program| program == REMOTE_PROGRAM.to_be_bytes())
}

/// A whole message: its length, which counts itself, and the rest.
fn read(from: &mut UnixStream) -> Result<Vec<u8>> {
    let mut length = [0; 4];
    from.read_exact(&mut length)?;
    let whole = usize::try_from(u32::from_be_bytes(length))?;
    ensure!((28..=MESSAGE_MAX).contains(&whole), io::Error::from(io::ErrorKind::InvalidData));
    let mut message = vec![0; whole];
    message[..4].copy_from_slice(&length);
    from.read_exact(&mut message[4..])?;
    Ok(message)
}

/// A word of a message's head: length, program, version, procedure, type (0: a call), serial,
/// status.
fn word(message: &[u8], number: usize) -> Option<u32> {
    let bytes = message.get(number * 4..number * 4 + 4)?;
    Some(u32::from_be_bytes(bytes.try_into().ok()?))
}

/// Whether a message is a call of this procedure.
fn calls(message: &[u8], procedure: u32) -> bool {
    let words = [1, 3, 4].map(|number| word(message, number));
    words == [Some(REMOTE_PROGRAM), Some(procedure), Some(0)]
}

/// The answer to a registration for events that a driver without events gives; none to anything
/// else.
fn refusal(message: &[u8]) -> Option<Vec<u8>> {
    if !calls(message, REGISTER_ANY) {
        return None;
    }
    let (program, version, procedure, serial) =
        (word(message, 1)?, word(message, 2)?, word(message, 3)?, word(message, 5)?);
    let text = b"this function is not supported by the connection driver!";
    let [code, domain] = NO_SUPPORT;
    let mut words = vec![program, version, procedure, 1, serial, 1, code, domain, 1];
    words.push(u32::try_from(text.len()).ok()?);
    let mut body: Vec<u8> = words.into_iter().flat_map(u32::to_be_bytes).collect();
    body.extend_from_slice(text);
    body.resize(body.len().next_multiple_of(4), 0);
    // The level; no domain; no strings; two numbers; no network.
    for word in [LEVEL, 0, 0, 0, 0, 0, 0, 0] {
        body.extend(word.to_be_bytes());
    }
    let whole = u32::try_from(body.len() + 4).ok()?;
    Some([whole.to_be_bytes().to_vec(), body].concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(procedure: u32) -> Vec<u8> {
        [28, REMOTE_PROGRAM, 1, procedure, 0, 9, 0].into_iter().flat_map(u32::to_be_bytes).collect()
    }

    #[test]
    fn only_a_registration_is_refused() {
        assert!(refusal(&call(1)).is_none());
        let refused = refusal(&call(REGISTER_ANY)).unwrap();
        assert_eq!(refused.len() % 4, 0);
        assert_eq!(refused[..4], u32::try_from(refused.len()).unwrap().to_be_bytes());
        assert_eq!(refused[16..28], [0, 0, 0, 1, 0, 0, 0, 9, 0, 0, 0, 1]);
    }
}
