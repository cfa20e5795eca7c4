//! Bytes through TCP from one place of a lab to another: the traffic of bystanders.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use nix::time::{ClockId, clock_gettime};

use crate::lab::Space;

/// How long a connection may say nothing before it counts as dead.
const SILENCE: Duration = Duration::from_secs(60);

/// How much is handed to the kernel at once.
const PIECE: usize = 256 * 1024;

/// A connection between two places: the end that sends, and the end that receives.
#[derive(Debug)]
struct Pipe {
    sender: TcpStream,
    receiver: TcpStream,
}

impl Pipe {
    /// `address` is one of the receiver's.
    fn lay(from: &Space, to: &Space, address: IpAddr) -> Result<Self> {
        let listener = to.in_network(|| TcpListener::bind((address, 0)).context("a place to receive at"))?;
        let at: SocketAddr = listener.local_addr()?;
        let connected = from.in_network(|| TcpStream::connect_timeout(&at, SILENCE).context("no connection"));
        let sender = connected.with_context(|| format!("to {at}"))?;
        let (receiver, _) = listener.accept()?;
        for end in [&sender, &receiver] {
            end.set_read_timeout(Some(SILENCE))?;
            end.set_write_timeout(Some(SILENCE))?;
        }
        Ok(Self { sender, receiver })
    }
}

/// The received bytes; 0 means the end. With a time limit, the kernel does not resume an
/// interrupted call by itself.
fn receive(receiver: &mut TcpStream, buffer: &mut [u8]) -> Result<usize> {
    loop {
        match receiver.read(buffer) {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            other => return other.context("receiving"),
        }
    }
}

/// Sends a file and compares what comes with what was sent, byte by byte.
pub fn transfer(from: &Space, to: &Space, address: IpAddr, file: &[u8]) -> Result<()> {
    let Pipe { mut sender, mut receiver } = Pipe::lay(from, to, address)?;
    std::thread::scope(|scope| {
        let sending = scope.spawn(move || sender.write_all(file).context("sending"));
        let mut buffer = vec![0; PIECE];
        let mut rest = file;
        loop {
            let len = receive(&mut receiver, &mut buffer)?;
            let Some((piece, after)) = rest.split_at_checked(len) else {
                return Err(anyhow!("more came than was sent"));
            };
            ensure!(
                buffer.get(..len) == Some(piece),
                "something else came than was sent, {} bytes before the end",
                rest.len()
            );
            rest = after;
            if len == 0 {
                break;
            }
        }
        sending.join().map_err(|_| anyhow!("the sender panicked"))??;
        ensure!(rest.is_empty(), "{} bytes did not come", rest.len());
        Ok(())
    })
}

/// How many bytes came.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Flow {
    /// For each second that went by.
    pub per_second: f64,
    /// Per second of this process's processor time. That covers sender, receiver, and the kernel on
    /// their time, which is the whole way between namespaces. Other load on the machine counts less
    /// here.
    pub per_cpu_second: f64,
}

/// Sends as much as there is room for, for as long.
pub fn throughput(from: &Space, to: &Space, address: IpAddr, long: Duration) -> Result<Flow> {
    let Pipe { mut sender, mut receiver } = Pipe::lay(from, to, address)?;
    std::thread::scope(|scope| {
        let sending = scope.spawn(move || -> Result<()> {
            let piece = vec![0x5a; PIECE];
            let end = Instant::now() + long;
            while Instant::now() < end {
                sender.write_all(&piece).context("sending")?;
            }
            Ok(())
        });
        let mut buffer = vec![0; PIECE];
        let (begin, cpu, mut received) = (Instant::now(), cpu_time()?, 0.0);
        loop {
            match receive(&mut receiver, &mut buffer)? {
                0 => break,
                #[allow(clippy::cast_precision_loss, reason = "at most 256 KiB")]
                len => received += len as f64,
            }
        }
        let took = begin.elapsed();
        sending.join().map_err(|_| anyhow!("the sender panicked"))??;
        let cpu = cpu_time()?.saturating_sub(cpu);
        Ok(Flow { per_second: received / took.as_secs_f64(), per_cpu_second: received / cpu.as_secs_f64() })
    })
}

/// The processor time that this process has had.
fn cpu_time() -> Result<Duration> {
    Ok(clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID)?.into())
}
