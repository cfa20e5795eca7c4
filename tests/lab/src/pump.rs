//! Bytes through TCP from one place of a lab to another: the traffic of bystanders.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::Pid;

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

/// Sends so many pieces of 64 KiB. The sender is on the first of these processors, the receiver on
/// the second.
pub fn throughput(
    from: &Space,
    to: &Space,
    address: IpAddr,
    pieces: usize,
    [of_sender, of_receiver]: [usize; 2],
) -> Result<Flow> {
    let Pipe { mut sender, receiver } = Pipe::lay(from, to, address)?;
    let (begin, cpu) = (Instant::now(), cpu_time()?);
    std::thread::scope(|scope| {
        let receiving = scope.spawn(move || {
            stay_on(of_receiver)?;
            receive_all(receiver)
        });
        let sending = scope.spawn(move || -> Result<()> {
            stay_on(of_sender)?;
            let piece = [0x5a; 64 * 1024];
            (0..pieces).try_for_each(|_| sender.write_all(&piece).context("sending"))
        });
        let panicked = |_| anyhow!("an end panicked");
        let (sent, received) = (sending.join().map_err(panicked)?, receiving.join().map_err(panicked)?);
        let took = begin.elapsed();
        let cpu = cpu_time()?.saturating_sub(cpu);
        sent?;
        let received = received?;
        Ok(Flow { per_second: received / took.as_secs_f64(), per_cpu_second: received / cpu.as_secs_f64() })
    })
}

/// How many bytes come until the end.
fn receive_all(mut receiver: TcpStream) -> Result<f64> {
    let (mut buffer, mut received) = (vec![0; PIECE], 0.0);
    loop {
        match receive(&mut receiver, &mut buffer)? {
            0 => return Ok(received),
            #[allow(clippy::cast_precision_loss, reason = "at most 256 KiB")]
            len => received += len as f64,
        }
    }
}

/// Keeps this thread on a processor.
fn stay_on(processor: usize) -> Result<()> {
    let mut one = CpuSet::new();
    one.set(processor)?;
    sched_setaffinity(Pid::from_raw(0), &one).with_context(|| format!("running on processor {processor}"))
}

/// The processor time that this process and the kernel's threads for packets have had. Under load
/// the kernel leaves a part of the way to those threads.
fn cpu_time() -> Result<Duration> {
    /// Each thread's run time in nanoseconds is the first number in its file.
    static THREADS: LazyLock<Vec<PathBuf>> = LazyLock::new(|| {
        let all = std::fs::read_dir("/proc").into_iter().flatten().flatten().map(|entry| entry.path());
        let is_one = |path: &PathBuf| {
            std::fs::read_to_string(path.join("comm")).is_ok_and(|name| name.starts_with("ksoftirqd/"))
        };
        all.filter(is_one).map(|path| path.join("schedstat")).collect()
    });
    let mut time: Duration = clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID)?.into();
    for thread in THREADS.iter() {
        let text = std::fs::read_to_string(thread)?;
        time += Duration::from_nanos(text.split(' ').next().unwrap_or_default().parse()?);
    }
    Ok(time)
}
