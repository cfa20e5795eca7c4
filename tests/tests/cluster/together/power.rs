//! The power switch of the hosts: their Pacemaker's fence agent (`assets/fence-power.sh`) asks it,
//! and a test says when it has done what it was asked.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};
use fence_lab::corosync::HostRing;
use fence_lab::process::readable;

/// Where it listens, among the hosts.
const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 88, 0, 254);
/// That of IPMI.
const PORT: u16 = 623;
/// How often it looks whether it is wanted still.
const LOOK: Duration = Duration::from_millis(100);
/// How long a client may take to say what it wants.
const SAID_WITHIN: Duration = Duration::from_secs(10);

/// What the agent wants. If it is dropped, the agent fails.
#[derive(Debug)]
pub(super) struct PowerOrder {
    /// The action and the host: `reboot host2`.
    pub(super) text: String,
    stream: TcpStream,
}

impl PowerOrder {
    /// It is done: the agent succeeds.
    pub(super) fn done(mut self) -> Result<()> {
        self.stream.write_all(b"done\n").context("the agent has gone")
    }
}

/// The switch. It takes orders until it is dropped.
pub(super) struct PowerSwitch {
    orders: Receiver<PowerOrder>,
    is_wanted: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl PowerSwitch {
    pub(super) fn start(ring: &HostRing) -> Result<Self> {
        let place = ring.switch_at(ADDRESS)?;
        let listener = place.space().in_network(|| Ok(TcpListener::bind((ADDRESS, PORT))?))?;
        let (orders, taken) = channel();
        let is_wanted = Arc::new(AtomicBool::new(true));
        let wanted = Arc::clone(&is_wanted);
        let thread = std::thread::spawn(move || {
            while wanted.load(Ordering::Relaxed) {
                if let Err(error) = accept(&listener, &orders) {
                    eprintln!("the power switch: {error:#}");
                }
            }
        });
        Ok(Self { orders: taken, is_wanted, thread: Some(thread) })
    }

    /// The next order.
    ///
    /// # Errors
    /// None comes in time.
    pub(super) fn order(&self, limit: Duration) -> Result<PowerOrder> {
        self.orders.recv_timeout(limit).context("nobody has asked the power switch")
    }
}

/// Takes one order, if there is one.
fn accept(listener: &TcpListener, orders: &Sender<PowerOrder>) -> Result<()> {
    if !readable(listener, LOOK)? {
        return Ok(());
    }
    let (stream, _) = listener.accept()?;
    stream.set_read_timeout(Some(SAID_WITHIN))?;
    let mut text = String::new();
    BufReader::new(&stream).read_line(&mut text)?;
    // The test may have ended.
    let _ = orders.send(PowerOrder { text: text.trim().to_owned(), stream });
    Ok(())
}

impl Drop for PowerSwitch {
    fn drop(&mut self) {
        self.is_wanted.store(false, Ordering::Relaxed);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}
