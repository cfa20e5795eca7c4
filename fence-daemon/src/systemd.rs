//! Notifies systemd of the daemon's states. Without systemd it does nothing.

use sd_notify::NotifyState;

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

fn notify(state: &[NotifyState<'_>]) {
    // Without systemd this does nothing. If systemd does not listen, nothing can be done.
    if let Err(error) = sd_notify::notify(state) {
        tracing::debug!("cannot notify systemd: {error}");
    }
}
