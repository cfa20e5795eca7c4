//! A guest's serial port without a guest: a pseudo-terminal, behind which a thread does what QEMU
//! does.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::pty::openpty;
use nix::unistd::ttyname;

use super::bind;
use crate::lab::Hypervisor;

/// How long the thread rests when nothing has come.
const REST: Duration = Duration::from_millis(2);

/// The device for a client, and the socket for a server.
#[derive(Debug)]
pub struct Port {
    device: String,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Port {
    /// Makes a port whose socket is at this path inside the lab.
    pub fn open(hypervisor: &Hypervisor, path: &str) -> Result<Self> {
        let socket = bind(hypervisor, path)?;
        let pair = openpty(None, None).context("a pseudo-terminal")?;
        let device = ttyname(&pair.slave)?.to_string_lossy().into_owned();
        // Nobody but a client has it open.
        drop(pair.slave);
        fcntl(&pair.master, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        let stop = Arc::new(AtomicBool::new(false));
        let (master, told) = (File::from(pair.master), Arc::clone(&stop));
        let thread = std::thread::spawn(move || carry(&socket, master, &told));
        Ok(Self { device, stop, thread: Some(thread) })
    }

    /// The client's end.
    #[must_use]
    pub fn device(&self) -> &str {
        &self.device
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// Carries bytes in both directions. What nobody reads is lost, as on a line.
fn carry(socket: &UnixListener, mut master: File, stop: &AtomicBool) {
    let mut server: Option<UnixStream> = None;
    while !stop.load(Ordering::Relaxed) {
        if server.is_none() {
            server = socket.accept().ok().map(|(stream, _)| stream);
            let _ = server.as_ref().map(|stream| stream.set_nonblocking(true));
        }
        // Without a client the terminal gives an error.
        let asked = some(&mut master).unwrap_or_default();
        let mut answered = Vec::new();
        if let Some(stream) = &mut server {
            let _ = stream.write_all(&asked);
            match some(stream) {
                Some(bytes) => answered = bytes,
                None => server = None,
            }
        }
        let _ = master.write_all(&answered);
        if asked.is_empty() && answered.is_empty() {
            std::thread::sleep(REST);
        }
    }
}

/// What can be read now; `None` at the end.
fn some(from: &mut impl Read) -> Option<Vec<u8>> {
    let mut buffer = [0; 4096];
    match from.read(&mut buffer) {
        Ok(0) => None,
        Ok(count) => buffer.get(..count).map(<[u8]>::to_vec),
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Some(Vec::new()),
        Err(_) => None,
    }
}
