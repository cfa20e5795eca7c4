//! The host's end of a guest's serial port, in QEMU's place: a UNIX socket that a server connects
//! to.

mod port;

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use fence_common::serial::MAGIC;
use fence_common::wire::{DOMAIN_LEN, Op};

use crate::lab::Hypervisor;
use crate::process::poll_until;

pub use port::Port;

/// How long a server may take to connect or to answer, on a loaded machine.
const LIMIT: Duration = Duration::from_secs(30);

/// A line at which a server is to listen.
#[derive(Debug)]
pub struct Line {
    socket: UnixListener,
    connected: Option<UnixStream>,
}

/// The bytes of a request.
#[must_use]
pub fn request(op: Op, domain: &str, seqno: u32) -> Vec<u8> {
    let mut bytes = [&MAGIC[..], &[op.to_wire(), 0]].concat();
    bytes.extend(domain.bytes().take(DOMAIN_LEN - 1));
    bytes.resize(MAGIC.len() + 2 + DOMAIN_LEN, 0);
    bytes.extend(seqno.to_le_bytes());
    bytes
}

/// A socket at this path inside the lab, in place of one that was there.
fn bind(hypervisor: &Hypervisor, path: &str) -> Result<UnixListener> {
    let outside = hypervisor.outside(path);
    if let Some(folder) = outside.parent() {
        std::fs::create_dir_all(folder)?;
    }
    let _ = std::fs::remove_file(&outside);
    let socket = UnixListener::bind(&outside).with_context(|| format!("listening at {}", outside.display()))?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

impl Line {
    /// Listens at this path inside the lab.
    pub fn listen(hypervisor: &Hypervisor, path: &str) -> Result<Self> {
        Ok(Self { socket: bind(hypervisor, path)?, connected: None })
    }

    /// Whether a server connects within this time.
    pub fn is_heard(&mut self, limit: Duration) -> Result<bool> {
        let deadline = Instant::now() + limit;
        while self.connected.is_none() && Instant::now() < deadline {
            match self.socket.accept() {
                Ok((stream, _)) => {
                    stream.set_nonblocking(false)?;
                    self.connected = Some(stream);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => std::thread::sleep(Duration::from_millis(10)),
                Err(error) => return Err(error).context("accepting a server"),
            }
        }
        Ok(self.connected.is_some())
    }

    /// The connection, once a server has made it.
    pub fn connection(&mut self) -> Result<&mut UnixStream> {
        ensure!(self.is_heard(LIMIT)?, "no server connects to the line");
        self.connected.as_mut().context("no connection")
    }

    /// Ends the connection, as a QEMU that ends.
    pub fn hang_up(&mut self) {
        self.connected = None;
    }

    /// Writes what a guest may write.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.connection()?.write_all(bytes).context("writing to the line")
    }

    /// What comes within this time, until `enough` of it is there.
    pub fn read(&mut self, limit: Duration, enough: impl Fn(&[u8]) -> bool) -> Result<Vec<u8>> {
        let deadline = Instant::now() + limit;
        let mut said = Vec::new();
        while !enough(&said) {
            let Some(left) = deadline.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) else {
                break;
            };
            let connection = self.connection()?;
            connection.set_read_timeout(Some(left))?;
            let mut buffer = [0; 4096];
            match connection.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => said.extend(buffer.iter().take(count)),
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => break,
                // With a time limit, the kernel does not resume an interrupted call by itself.
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error).context("reading from the line"),
            }
        }
        Ok(said)
    }

    /// Asks, and returns the answer's bytes without the magics and what stands before them, as a
    /// stock client reads it. Empty: no answer came in time.
    pub fn ask(&mut self, op: Op, domain: &str, seqno: u32, limit: Duration) -> Result<Vec<u8>> {
        self.write(&request(op, domain, seqno))?;
        let magics = if op == Op::HostList { 2 } else { 1 };
        let is_whole = |said: &[u8]| {
            said.windows(MAGIC.len()).filter(|window| *window == MAGIC).count() == magics
                && said[said.len() - 4..] != MAGIC
        };
        let said = self.read(limit, is_whole)?;
        let Some(first) = said.windows(MAGIC.len()).position(|window| window == MAGIC) else { return Ok(Vec::new()) };
        Ok(said[first..].to_vec())
    }

    /// Asks until there is an answer: a server may not hear the line yet. Returns the reply byte.
    pub fn reply(&mut self, op: Op, domain: &str, seqno: u32) -> Result<u8> {
        let said = self.ask(op, domain, seqno, LIMIT)?;
        match said.as_slice() {
            [b'a', b'b', b'b', b'a', reply] => Ok(*reply),
            other => bail!("no reply: {other:02x?}"),
        }
    }

    /// Waits until a server that has ended closes the connection.
    pub fn wait_closed(&mut self) -> Result<()> {
        poll_until("the line to be closed", LIMIT, || {
            let connection = self.connected.as_mut().context("no connection")?;
            connection.set_read_timeout(Some(Duration::from_millis(100)))?;
            Ok(matches!(connection.read(&mut [0; 4096]), Ok(0)).then_some(()))
        })?;
        self.connected = None;
        Ok(())
    }
}
