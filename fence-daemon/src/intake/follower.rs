//! The task that keeps a multicast listener on its interfaces, from its start to its end.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use fence_common::verdict::Counters;
use fence_net::interface::Wanted;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tracing::error;

use super::links::{Changes, Links};
use super::memberships::{Heard, Memberships};

/// How often failed commands are tried again: they may become possible without a message from the
/// kernel.
const TRY_AGAIN: Duration = Duration::from_secs(5);

/// How long a stop waits for a system call that the kernel delays.
const STOP_WITHIN: Duration = Duration::from_millis(500);

/// The task that keeps a listener on its interfaces.
#[derive(Debug)]
pub struct Follower {
    heard: watch::Receiver<Heard>,
    wanted: mpsc::UnboundedSender<Wanted>,
    stop: oneshot::Sender<()>,
    /// The task's result is `None` if the task broke off; the field is `None` once the result was
    /// reported.
    task: Option<JoinHandle<Option<Memberships>>>,
}

impl Follower {
    /// Begins to listen on the existing interfaces, and follows the changes in `links` from then
    /// on.
    #[must_use]
    pub fn start(memberships: Memberships, links: Links) -> Self {
        let (tell, heard) = watch::channel(Heard::default());
        let (stop, stopped) = oneshot::channel();
        let (wanted, other) = mpsc::unbounded_channel();
        let task = tokio::spawn(follow(memberships, links, tell, other, stopped));
        Self { heard, wanted, stop, task: Some(task) }
    }

    /// Listens on another interface from now on, with the same socket and program.
    pub fn want(&self, wanted: Wanted) {
        // If the task has ended, that is reported elsewhere.
        let _ = self.wanted.send(wanted);
    }

    /// Waits until requests are heard, and returns the interfaces.
    ///
    /// # Errors
    /// As [`Follower::broken`].
    pub async fn heard(&mut self) -> io::Result<Heard> {
        if let Ok(heard) = self.heard.wait_for(|heard| heard.hears).await {
            return Ok(heard.clone());
        }
        Err(self.broken().await)
    }

    /// How it is, in a line.
    #[must_use]
    pub fn status(&self) -> String {
        self.heard.borrow().status.clone()
    }

    /// The same as it changes, for the report.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<Heard> {
        self.heard.clone()
    }

    /// What is listened on now.
    #[must_use]
    pub fn now(&self) -> Heard {
        self.heard.borrow().clone()
    }

    /// Returns when the task ends by itself, which it must not.
    pub async fn broken(&mut self) -> io::Error {
        poll_fn(|context| self.poll_broken(context)).await
    }

    /// As [`broken`](Self::broken), for one task that waits for several.
    pub fn poll_broken(&mut self, context: &mut Context<'_>) -> Poll<io::Error> {
        let Some(task) = &mut self.task else { return Poll::Pending };
        let result = ready!(Pin::new(task).poll(context));
        self.task = None;
        Poll::Ready(match result {
            Ok(_) => io::Error::other("it ended"),
            Err(error) => io::Error::other(error),
        })
    }

    /// Ends the task and detaches the program. Returns the program's counters, if there is a
    /// program.
    pub async fn end(self) -> Option<Counters> {
        let _ = self.stop.send(());
        match tokio::time::timeout(STOP_WITHIN, self.task?).await {
            Ok(Ok(memberships)) => memberships.and_then(Memberships::end),
            // The program goes with the process.
            Ok(Err(_)) | Err(_) => None,
        }
    }
}

async fn sleep_until(due: Option<Instant>) {
    match due {
        Some(due) => tokio::time::sleep_until(due).await,
        None => std::future::pending().await,
    }
}

async fn follow(
    mut memberships: Memberships,
    mut links: Links,
    tell: watch::Sender<Heard>,
    mut other: mpsc::UnboundedReceiver<Wanted>,
    mut stopped: oneshot::Receiver<()>,
) -> Option<Memberships> {
    let (mut changes, mut again) = (Changes::default(), false);
    let mut due = None;
    loop {
        let looked = tokio::task::spawn_blocking(move || {
            let heard = memberships.look(&changes, again);
            (memberships, heard)
        });
        let heard;
        (memberships, heard) = match looked.await {
            Ok(looked) => looked,
            Err(error) => {
                error!("the task that follows the interfaces broke off: {error}");
                return None;
            }
        };
        tell.send_if_modified(|told| std::mem::replace(told, heard.clone()) != heard);
        due = match due {
            _ if !memberships.is_unfinished() => None,
            Some(due) if !again => Some(due),
            _ => Some(Instant::now() + TRY_AGAIN),
        };
        let leads_due = memberships.leads_due();
        (changes, again) = tokio::select! {
            changes = links.next() => (changes, false),
            () = sleep_until(due) => (Changes::default(), true),
            () = sleep_until(leads_due) => (Changes::default(), false),
            () = memberships.program_came() => (Changes::default(), false),
            Some(wanted) = other.recv() => {
                memberships.want(wanted);
                (Changes::default(), false)
            }
            _ = &mut stopped => return Some(memberships),
        };
    }
}
