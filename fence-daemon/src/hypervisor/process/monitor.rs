//! QEMU's monitor, kept open beyond QEMU's death, so that libvirt notices the death at once.
//!
//! libvirt notices a death when the monitor's connection ends, and sends the process a signal. If
//! the process is still there, libvirt looks again 0.2 s later (`virProcessKillPainfully`, 9.0;
//! `strace -f` of libvirtd shows it). A dying process closes its files a moment before its parent
//! has waited for it. So libvirt often came too early, and the next start waited for 0.2 s.
//!
//! This daemon holds a copy of the connection, reads nothing from it, and closes it when the
//! process is gone.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustix::net::{SocketAddrUnix, getsockname};
use tokio::time::{Instant, sleep};

use super::{Driver, Victim};

/// How libvirt calls the monitor's socket, in the instance's own directory.
const NAME: &[u8] = b"/monitor.sock";
/// How long a parent may take to wait for a dead child. After that libvirt may come too early.
const WAITED_WITHIN: Duration = Duration::from_millis(100);
/// How often it is looked whether it has.
const LOOK: Duration = Duration::from_millis(1);

/// The copies of a machine's monitor.
#[derive(Debug)]
pub(crate) struct Monitor {
    _sockets: Vec<OwnedFd>,
    victim: Arc<Victim>,
}

impl Monitor {
    /// Copies the monitor of a QEMU that is about to be killed. `None`: it is no QEMU, or the
    /// kernel does not permit it. Then libvirt notices the death all the same.
    pub(crate) fn of(victim: &Arc<Victim>) -> Option<Self> {
        if victim.driver() != Driver::Qemu {
            return None;
        }
        let open = fs::read_dir(format!("/proc/{}/fd", victim.pid())).ok()?.flatten();
        let is_socket =
            |path: &Path| fs::read_link(path).is_ok_and(|to| to.as_os_str().as_encoded_bytes().starts_with(b"socket:"));
        let sockets = open.filter(|entry| is_socket(&entry.path()));
        let numbers = sockets.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        let copies = numbers.filter_map(|number| victim.copy(number).ok());
        let sockets: Vec<_> = copies.filter(is_monitor).collect();
        (!sockets.is_empty()).then(|| Self { _sockets: sockets, victim: Arc::clone(victim) })
    }

    /// Closes the monitor once the machine is dead and its parent has waited for it.
    pub(crate) async fn close_after_death(self) {
        // If it cannot be watched, libvirt notices at once.
        if self.victim.death().await.is_ok() {
            let by = Instant::now() + WAITED_WITHIN;
            while !self.victim.is_gone() && Instant::now() < by {
                sleep(LOOK).await;
            }
        }
    }
}

fn is_monitor(socket: &OwnedFd) -> bool {
    let address = getsockname(socket).ok().and_then(|address| SocketAddrUnix::try_from(address).ok());
    address.as_ref().and_then(SocketAddrUnix::path_bytes).is_some_and(|path| path.ends_with(NAME))
}

#[cfg(test)]
mod tests {
    use std::io::{ErrorKind, Read};
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::process::{Command, Stdio};

    use super::*;

    #[tokio::test]
    async fn the_monitor_ends_when_the_machine_is_gone_and_not_earlier() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("monitor.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let mut libvirt = UnixStream::connect(&path).unwrap();
        libvirt.set_nonblocking(true).unwrap();
        let monitor = OwnedFd::from(listener.accept().unwrap().0);
        let mut machine = Command::new("sleep").arg("600").stdin(Stdio::from(monitor)).spawn().unwrap();
        let victim = Arc::new(Victim::dangerous_for_test(Driver::Qemu, "vm", &machine));
        let monitor = Monitor::of(&victim).unwrap();
        let container = Arc::new(Victim::dangerous_for_test(Driver::Lxc, "ct", &machine));
        assert!(Monitor::of(&container).is_none());

        victim.kill().unwrap();
        machine.wait().unwrap();
        assert_eq!(libvirt.read(&mut [0]).unwrap_err().kind(), ErrorKind::WouldBlock);
        monitor.close_after_death().await;
        assert_eq!(libvirt.read(&mut [0]).unwrap(), 0);
        assert!(Monitor::of(&victim).is_none());
    }
}
