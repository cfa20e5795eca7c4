//! Notifies systemd of the daemon's states, and takes the sockets that it has opened. Without
//! systemd it does nothing.

use std::convert::Infallible;
use std::ffi::OsStr;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, BorrowedFd, FromRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use fence_common::sync::lock;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use sd_notify::NotifyState;

/// How often a waiting daemon feeds the watchdog, if that lets it.
const WAITING: Duration = Duration::from_secs(10);

/// A socket that systemd has opened for the daemon.
#[derive(Debug)]
pub struct PassedSocket {
    /// The `FileDescriptorName` of its unit.
    pub name: String,
    /// The socket, if it is one: nothing is checked yet.
    pub fd: OwnedFd,
}

/// Takes the sockets that systemd has opened.
///
/// # Errors
/// The environment describes them wrongly.
///
/// # Safety
/// Must be called once, before the process opens any file: the environment names their numbers.
pub unsafe fn passed_sockets() -> io::Result<Vec<PassedSocket>> {
    let all = sd_notify::listen_fds_with_names()?;
    // SAFETY: needed because the environment tells numbers. Sound because systemd has opened them
    // for this process alone (LISTEN_PID), each is open, as setting its flags has shown, and the
    // caller promises that nothing else in the process can own them.
    Ok(all.map(|(fd, name)| PassedSocket { name, fd: unsafe { OwnedFd::from_raw_fd(fd) } }).collect())
}

/// Lets systemd keep a socket over a restart (`FileDescriptorStoreMax`). The next daemon gets it
/// with the [passed sockets](passed_sockets), by this name. Without systemd nothing happens.
///
/// # Errors
/// systemd cannot be told.
pub fn keep(name: &str, socket: BorrowedFd<'_>) -> io::Result<()> {
    let Some(to) = std::env::var_os("NOTIFY_SOCKET") else { return Ok(()) };
    keep_at(&to, name, socket)
}

fn keep_at(to: &OsStr, name: &str, socket: BorrowedFd<'_>) -> io::Result<()> {
    let address = match to.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        _ => SocketAddr::from_pathname(to)?,
    };
    let notify = UnixDatagram::unbound()?;
    notify.connect_addr(&address)?;
    // systemd would close a socket with an error, such as one of an interface that is down.
    let text = format!("FDSTORE=1\nFDNAME={name}\nFDPOLL=0\n");
    let (sockets, mut space) = ([socket], [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))]);
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !control.push(SendAncillaryMessage::ScmRights(&sockets)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    sendmsg(notify.as_fd(), &[IoSlice::new(text.as_bytes())], &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// Lets systemd close the sockets that it keeps by this name.
pub fn keep_no_more(name: &str) {
    notify(&[NotifyState::Custom("FDSTOREREMOVE=1"), NotifyState::Custom(&format!("FDNAME={name}"))]);
}

/// Tells systemd that requests are served.
pub fn notify_ready() {
    notify(&[NotifyState::Ready]);
}

/// Tells systemd that the daemon is about to stop.
pub fn notify_stopping() {
    notify(&[NotifyState::Stopping]);
}

/// Tells systemd that the daemon reads its configuration again. [`notify_ready`] must follow.
pub fn notify_reloading() {
    match NotifyState::monotonic_usec_now() {
        Ok(now) => notify(&[NotifyState::Reloading, now]),
        // systemd 253 and later would take the one without the other for a failure.
        Err(error) => tracing::debug!("cannot read the clock for systemd: {error}"),
    }
}

/// systemd's watchdog (`WatchdogSec`): it restarts a daemon that no longer feeds it.
#[derive(Clone, Copy, Debug)]
pub struct Watchdog(Option<Duration>);

impl Watchdog {
    /// The watchdog of this process's unit, if it has one.
    #[must_use]
    pub fn of_unit() -> Self {
        Self(sd_notify::watchdog_enabled())
    }

    /// How often to feed it: `usual`, or twice in its time if that is shorter.
    #[must_use]
    pub fn interval(self, usual: Duration) -> Duration {
        self.0.map_or(usual, |limit| usual.min(limit / 2))
    }

    /// Feeds it.
    pub fn feed(self) {
        if self.0.is_some() {
            notify(&[NotifyState::Watchdog]);
        }
    }

    /// Feeds it until dropped, for as long as the daemon waits and nothing else can.
    pub async fn feeding(self) -> Infallible {
        loop {
            self.feed();
            tokio::time::sleep(self.interval(WAITING)).await;
        }
    }
}

/// The line that `systemctl status` shows.
pub fn notify_status(status: &str) {
    // The protocol consists of lines: a second one would be another message.
    notify(&[NotifyState::Status(&status.replace(['\n', '\r'], " "))]);
}

/// A listener's part of that line, or libvirt's.
#[derive(Clone, Debug)]
pub struct StatusPart {
    all: Arc<Mutex<Vec<String>>>,
    index: usize,
}

impl StatusPart {
    /// This many parts of a line.
    #[must_use]
    pub fn of(count: usize) -> Vec<Self> {
        let all = Arc::new(Mutex::new(vec![String::new(); count]));
        (0..count).map(|index| Self { all: Arc::clone(&all), index }).collect()
    }

    /// The whole line.
    #[must_use]
    pub fn only() -> Self {
        Self { all: Arc::new(Mutex::new(vec![String::new()])), index: 0 }
    }

    /// Another part of the same line, at its end.
    #[must_use]
    pub fn beside(&self) -> Self {
        let mut all = lock(&self.all);
        let index = all.len();
        all.push(String::new());
        Self { all: Arc::clone(&self.all), index }
    }

    /// Changes this part, and shows the whole line if that is news.
    pub fn show(&self, status: &str) {
        let mut all = lock(&self.all);
        match all.get_mut(self.index) {
            Some(part) if part == status => return,
            Some(part) => status.clone_into(part),
            None => {}
        }
        let known: Vec<&str> = all.iter().map(String::as_str).filter(|part| !part.is_empty()).collect();
        notify_status(&known.join("; "));
    }
}

fn notify(state: &[NotifyState<'_>]) {
    // Without systemd this does nothing. If systemd does not listen, nothing can be done.
    if let Err(error) = sd_notify::notify(state) {
        tracing::debug!("cannot notify systemd: {error}");
    }
}
