//! Notifies systemd of the daemon's states, and takes the sockets that it has opened. Without
//! systemd it does nothing.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::{Arc, Mutex};

use fence_common::sync::lock;
use sd_notify::NotifyState;

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

/// Tells systemd that requests are served.
pub fn notify_ready() {
    notify(&[NotifyState::Ready]);
}

/// Tells systemd that the daemon is about to stop.
pub fn notify_stopping() {
    notify(&[NotifyState::Stopping]);
}

/// Tells systemd that the daemon reads its keys again. [`notify_ready`] must follow.
pub fn notify_reloading() {
    match NotifyState::monotonic_usec_now() {
        Ok(now) => notify(&[NotifyState::Reloading, now]),
        // systemd 253 and later would take the one without the other for a failure.
        Err(error) => tracing::debug!("cannot read the clock for systemd: {error}"),
    }
}

/// The line that `systemctl status` shows.
pub fn notify_status(status: &str) {
    // The protocol consists of lines: a second one would be another message.
    notify(&[NotifyState::Status(&status.replace(['\n', '\r'], " "))]);
}

/// One listener's part of that line.
#[derive(Clone, Debug)]
pub struct StatusPart {
    all: Arc<Mutex<Vec<String>>>,
    index: usize,
}

impl StatusPart {
    /// The parts of a line for so many listeners.
    #[must_use]
    pub fn of(listeners: usize) -> Vec<Self> {
        let all = Arc::new(Mutex::new(vec![String::new(); listeners]));
        (0..listeners).map(|index| Self { all: Arc::clone(&all), index }).collect()
    }

    /// The whole line.
    #[must_use]
    pub fn only() -> Self {
        Self { all: Arc::new(Mutex::new(vec![String::new()])), index: 0 }
    }

    /// Changes this part, and shows the whole line.
    pub fn show(&self, status: &str) {
        let mut all = lock(&self.all);
        if let Some(part) = all.get_mut(self.index) {
            status.clone_into(part);
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
