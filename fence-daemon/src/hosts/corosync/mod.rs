//! The group on corosync's closed process groups (CPG).
//!
//! corosync keeps the membership, the quorum and one total order; there is no protocol of our own
//! for them. Its libraries are loaded at run time, so that hosts without corosync need nothing
//! installed. One thread talks to them and waits for all of their descriptors; it never calls into
//! the daemon. While corosync is not there, the thread tries again once a second.
//!
//! Our group is [`GROUP`]. Those of `fence_virtd` are only looked at: our daemon never joins them.
//!
//! * `ffi`: the libraries, and all `unsafe` code. `session`: one connection, from the join to the
//!   loss. `beats`: how old a message is. `outlet`: the events' way out, and the watch over the
//!   thread. `nodes`: the configured node list. `look`: one look, for the doctor.

mod beats;
mod ffi;
pub mod look;
mod no_group;
mod nodes;
mod outlet;
mod session;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc as orders;
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};
use tokio::sync::{mpsc, oneshot};

use self::no_group::NoGroup;
use self::outlet::Outlet;
use self::session::Session;
use super::transport::{Event, LONGEST, SendError, Transport};
use crate::clock::Moment;

/// Our group's name.
pub const GROUP: &str = "fence-xdp";
/// The names of `fence_virtd`'s group, since 2021 and before.
const STOCK: [&str; 2] = ["fence-agents", "fence-virt"];
/// How long to wait before the next try to connect.
const RETRY: Duration = Duration::from_secs(1);
/// How often the watch looks at the thread.
const WATCH: Duration = Duration::from_millis(500);

/// A message to be sent.
struct Order {
    bytes: Vec<u8>,
    by: Moment,
    done: oneshot::Sender<Result<(), SendError>>,
}

/// The way to the group.
#[derive(Clone)]
pub struct Group {
    orders: orders::Sender<Order>,
    /// Wakes the thread.
    wake: Arc<OwnedFd>,
    outlet: Arc<Outlet>,
}

/// Starts to connect, and goes on until the events are not taken any more. Call it in tokio's
/// runtime.
///
/// # Errors
/// The system has no thread or descriptor left.
pub fn start() -> io::Result<(Group, mpsc::Receiver<Event>)> {
    let (events, taken) = mpsc::channel(outlet::WAITING);
    let outlet = Arc::new(Outlet::new(events));
    let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
    let (sender, orders) = orders::channel();
    let (of_thread, awaked) = (Arc::clone(&outlet), Arc::clone(&wake));
    std::thread::Builder::new().name("corosync".to_owned()).spawn(move || run(&of_thread, &awaked, &orders))?;
    let watched = Arc::clone(&outlet);
    tokio::spawn(async move {
        while !watched.is_closed() {
            tokio::time::sleep(WATCH).await;
            watched.watch(Moment::now());
        }
    });
    Ok((Group { orders: sender, wake, outlet }, taken))
}

/// The thread: one connection after the other.
fn run(outlet: &Outlet, wake: &OwnedFd, orders: &orders::Receiver<Order>) {
    loop {
        outlet.enter();
        let why = match Session::connect(outlet, wake, orders) {
            Ok(mut session) => session.run(),
            Err(why) => why,
        };
        if why == NoGroup::Ended || outlet.is_closed() {
            return;
        }
        let _ = outlet.leave();
        outlet.lost(&why);
        if !refuse(orders) {
            return;
        }
    }
}

/// Refuses what is to be sent while there is no connection, for [`RETRY`]. Whether anybody may
/// still send.
fn refuse(orders: &orders::Receiver<Order>) -> bool {
    let until = Moment::now().plus(RETRY);
    loop {
        match orders.recv_timeout(until.since(Moment::now())) {
            // A sender that has given up needs no answer.
            Ok(order) => drop(order.done.send(Err(SendError::NotJoined))),
            Err(orders::RecvTimeoutError::Timeout) => return true,
            Err(orders::RecvTimeoutError::Disconnected) => return false,
        }
    }
}

impl Transport for Group {
    async fn send(&self, bytes: Vec<u8>, by: Moment) -> Result<(), SendError> {
        if bytes.len() > LONGEST {
            return Err(SendError::TooLong);
        }
        if !self.outlet.is_joined() {
            return Err(SendError::NotJoined);
        }
        let (done, answer) = oneshot::channel();
        self.orders.send(Order { bytes, by, done }).map_err(|_| SendError::NotJoined)?;
        // A counter that is full wakes as well.
        let _ = rustix::io::write(&*self.wake, &1_u64.to_ne_bytes());
        match tokio::time::timeout(by.since(Moment::now()), answer).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(SendError::NotJoined),
            Err(_) => Err(SendError::Late),
        }
    }
}
