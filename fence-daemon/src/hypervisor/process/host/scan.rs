//! One reading of `/proc`: which process belongs to which domain.
//!
//! `/proc/PID/cmdline` waits for the process's memory lock, which a thread that is stuck in the
//! kernel can hold for ever. `stat`, `status`, `cgroup` and `comm` do not take that lock. So:
//!
//! - Threads of their own read the processes. They wait for the next scan: to start one takes
//!   longer than to read a dozen processes.
//! - A process that cannot be read within [`STUCK`] is given up as *unreadable*, and another thread
//!   goes on with the next one.
//! - Later scans leave that process alone while its reader is stuck.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use fence_common::sync::{lock, unpoisoned};
use uuid::Uuid;

use super::super::driver::Driver;
use super::super::pidfd::{self, Process};
use super::super::proc::{self, CommandLine, Stat};
use super::Whom;
use super::command_lines::{CommandLineKind, CommandLines};
use super::dying::DyingMachines;
use super::scope::Scope;

/// How long one process may take to be read. Microseconds are the rule, but a loaded host may give
/// a thread no time for some milliseconds.
const STUCK: Duration = Duration::from_millis(300);
/// How long a whole scan may take.
const LIMIT: Duration = Duration::from_secs(3);
/// How often stuck threads are looked for.
const LOOK: Duration = Duration::from_millis(20);
/// From how many processes on more than one thread reads them. Until then one has read them before
/// a machine is dead, and the others would keep processors from its death.
const SHARED_FROM: usize = 512;
/// How many threads read at most, stuck ones not counted.
const THREADS_MAX: usize = 4;
/// How many threads may be stuck at a time, in all scans.
const STUCK_MAX: usize = 16;
/// The stack of a thread that reads.
const STACK: usize = 256 * 1024;

/// A process that a scan found.
#[derive(Debug)]
pub(crate) struct FoundProcess {
    /// Its number.
    pub(crate) pid: i32,
    /// What it is.
    pub(crate) kind: Kind,
    /// The process itself, where it was asked for.
    pub(crate) held: Option<Arc<Process>>,
}

/// What a process is to a domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// It has a machine's command line. `in_scope`: its control group is one of libvirt's for QEMU.
    Machine { line: CommandLine, in_scope: bool },
    /// It is the first process of a container of libvirt's, in this group. Its environment has the
    /// UUID and the name.
    Container { scope: Scope, uuid: Option<Uuid>, name: Option<String> },
    /// It could not be read, or says nothing of itself. `scope`: its control group, if that is
    /// libvirt's. `was`: the machine that it was in an earlier scan.
    Unreadable { scope: Option<Scope>, was: Option<Uuid>, why: &'static str },
}

/// What a scan saw.
#[derive(Debug, Default)]
pub(crate) struct Look {
    /// The domains whose processes it was to hold.
    pub(crate) wanted: Vec<Whom>,
    /// The processes that are domains', or may be.
    pub(crate) found: Vec<FoundProcess>,
    /// Why nothing is known, if the scan did not come to its end.
    pub(crate) failed: Option<String>,
}

/// What is remembered from scan to scan.
#[derive(Debug, Default)]
pub(super) struct ScanMemory {
    /// Processes that could not be read, by number, with their start. A thread is stuck with each.
    stuck: Mutex<HashMap<i32, Option<u64>>>,
    /// The machines that processes were, by number, with their start. An unreadable process may be
    /// what it was.
    machines: Mutex<HashMap<i32, (u64, Uuid)>>,
    lines: CommandLines,
    pub(super) dying: DyingMachines,
}

impl ScanMemory {
    /// The machine that a process was.
    fn was(&self, pid: i32, started: Option<u64>) -> Option<Uuid> {
        let known = lock(&self.machines).get(&pid).copied();
        known.filter(|(start, _)| Some(*start) == started).map(|(_, uuid)| uuid)
    }

    /// Notes what a process is. Reads its start only if that is news.
    fn note(&self, directory: &Path, pid: i32, uuid: Uuid) {
        if lock(&self.machines).get(&pid).is_some_and(|(_, known)| *known == uuid) {
            return;
        }
        if let Ok(Some(stat)) = Stat::read(directory) {
            lock(&self.machines).insert(pid, (stat.started, uuid));
        }
    }
}

/// The threads that read: their numbers, and how work comes to them. One that is given up ends when
/// its process can be read again, since nothing can come to it any more.
#[derive(Default)]
pub(super) struct Readers {
    threads: Vec<(usize, mpsc::Sender<Arc<Work>>)>,
    next: usize,
}

impl Readers {
    /// Has the thread in this place read. If there is none, or it has ended, it is started.
    fn read(&mut self, place: usize, work: &Arc<Work>) -> io::Result<()> {
        if self.threads.get(place).is_some_and(|(_, reader)| reader.send(Arc::clone(work)).is_ok()) {
            return Ok(());
        }
        self.threads.truncate(place);
        let number = self.next;
        self.next += 1;
        let (reader, works) = mpsc::channel::<Arc<Work>>();
        // Cannot fail: the other end is here.
        let _ = reader.send(Arc::clone(work));
        let read = move || works.into_iter().for_each(|work| work.read(number));
        thread::Builder::new().name("host-scan".to_owned()).stack_size(STACK).spawn(read)?;
        self.threads.push((number, reader));
        Ok(())
    }

    /// Gives a thread up. Another one goes on with its work.
    fn replace(&mut self, number: usize, work: &Arc<Work>) -> io::Result<()> {
        self.threads.retain(|(other, _)| *other != number);
        self.read(self.threads.len(), work)
    }
}

/// What the threads of a scan share.
struct Work {
    root: PathBuf,
    pids: Vec<i32>,
    next: AtomicUsize,
    wanted: Vec<Whom>,
    /// Whether all domains are asked for, and not only the wanted ones.
    of_all: bool,
    drivers: Vec<Driver>,
    memory: Arc<ScanMemory>,
    progress: Mutex<Progress>,
    changed: Condvar,
}

#[derive(Default)]
struct Progress {
    /// Processes that were read or given up.
    done: usize,
    found: Vec<FoundProcess>,
    /// What each thread reads, and since when.
    reading: HashMap<usize, (i32, Instant)>,
}

/// Reads all processes below `root`, for these drivers. The ones of `wanted` are held. Without
/// `of_all` little is found out about others.
pub(super) fn scan(
    root: &Path,
    drivers: &[Driver],
    wanted: Vec<Whom>,
    of_all: bool,
    memory: &Arc<ScanMemory>,
    readers: &mut Readers,
) -> Look {
    let pids = match numbers(root) {
        Ok(pids) => pids,
        Err(error) => return Look::failed(format!("cannot list {}: {error}", root.display())),
    };
    lock(&memory.machines).retain(|pid, _| pids.binary_search(pid).is_ok());
    memory.lines.retain(&pids);
    memory.dying.forget_dead();
    let total = pids.len();
    let work = Arc::new(Work {
        root: root.to_owned(),
        pids,
        next: AtomicUsize::new(0),
        wanted,
        of_all,
        drivers: drivers.to_vec(),
        memory: Arc::clone(memory),
        progress: Mutex::default(),
        changed: Condvar::new(),
    });
    let threads = if total < SHARED_FROM { 1 } else { thread::available_parallelism().map_or(1, usize::from) };
    for place in 0..threads.min(THREADS_MAX) {
        if let Err(error) = readers.read(place, &work) {
            return Look::failed(format!("cannot start a thread that reads {}: {error}", root.display()));
        }
    }
    let look = work.wait(total, readers);
    if look.failed.is_some() {
        // They may be at it for long. The next scan does not wait for them.
        readers.threads.clear();
    }
    look
}

impl Look {
    pub(super) fn failed(why: String) -> Self {
        Self { failed: Some(why), ..Self::default() }
    }
}

fn numbers(root: &Path) -> io::Result<Vec<i32>> {
    let mut pids = Vec::new();
    for entry in fs::read_dir(root)? {
        pids.extend(entry?.file_name().to_str().and_then(|name| name.parse::<i32>().ok()));
    }
    pids.sort_unstable();
    Ok(pids)
}

impl Work {
    /// Reads processes until none is left, or until this thread has been given up.
    fn read(&self, number: usize) {
        let mut buffer = Vec::new();
        while let Some(&pid) = self.pids.get(self.next.fetch_add(1, Ordering::Relaxed)) {
            if self.is_stuck(pid) {
                self.done(Some(self.unreadable(pid, "it could not be read before, and that reading has not ended")));
                continue;
            }
            lock(&self.progress).reading.insert(number, (pid, Instant::now()));
            let found = self.examine(pid, &mut buffer);
            if lock(&self.progress).reading.remove(&number).is_none() {
                // This thread was given up and replaced meanwhile. The process can be read again.
                lock(&self.memory.stuck).remove(&pid);
                return;
            }
            self.done(found);
        }
    }

    /// Counts a process off. The scan's owner is woken by the last one alone: a wake-up takes
    /// longer than the reading of a process.
    fn done(&self, found: Option<FoundProcess>) {
        let mut progress = lock(&self.progress);
        progress.done += 1;
        progress.found.extend(found);
        if progress.done == self.pids.len() {
            drop(progress);
            self.changed.notify_all();
        }
    }

    /// Waits until all processes are read or given up.
    fn wait(self: &Arc<Self>, total: usize, readers: &mut Readers) -> Look {
        let begun = Instant::now();
        let mut progress = lock(&self.progress);
        while progress.done < total {
            let now = Instant::now();
            if now.duration_since(begun) >= LIMIT {
                return Look::failed(format!("{} of {total} processes were read within {LIMIT:?}", progress.done));
            }
            let late = |(_, since): &(i32, Instant)| now.duration_since(*since) >= STUCK;
            let stuck: Vec<_> = progress
                .reading
                .iter()
                .filter(|(_, reading)| late(reading))
                .map(|(number, (pid, _))| (*number, *pid))
                .collect();
            for (number, pid) in stuck {
                progress.reading.remove(&number);
                drop(progress);
                if let Err(why) = self.give_up(pid) {
                    return Look::failed(why);
                }
                if let Err(error) = readers.replace(number, self) {
                    return Look::failed(format!("cannot start another thread: {error}"));
                }
                progress = lock(&self.progress);
            }
            progress = unpoisoned(self.changed.wait_timeout(progress, LOOK)).0;
        }
        Look { wanted: self.wanted.clone(), found: std::mem::take(&mut progress.found), failed: None }
    }

    /// A process is not read in time: it is unreadable.
    fn give_up(&self, pid: i32) -> Result<(), String> {
        let started = self.started(pid);
        let mut stuck = lock(&self.memory.stuck);
        stuck.insert(pid, started);
        let count = stuck.len();
        drop(stuck);
        tracing::warn!(
            process = pidfd::describe(pid),
            "this process cannot be read: it counts for each domain that it may belong to"
        );
        self.done(Some(self.unreadable(pid, "it cannot be read: its memory is locked")));
        if count > STUCK_MAX {
            return Err(format!("processes that cannot be read: {count}"));
        }
        Ok(())
    }

    /// Whether a thread of an earlier scan is stuck with this very process.
    fn is_stuck(&self, pid: i32) -> bool {
        let Some(known) = lock(&self.memory.stuck).get(&pid).copied() else { return false };
        // Another process of that number can be read.
        known.is_none() || self.started(pid) == known
    }

    fn started(&self, pid: i32) -> Option<u64> {
        Stat::read(&self.directory(pid)).ok().flatten().map(|stat| stat.started)
    }

    fn directory(&self, pid: i32) -> PathBuf {
        self.root.join(pid.to_string())
    }

    /// A process of which only that is known which needs no look into its memory.
    fn unreadable(&self, pid: i32, why: &'static str) -> FoundProcess {
        let (scope, was) = (Scope::read(&self.directory(pid)).ok().flatten(), self.memory.was(pid, self.started(pid)));
        FoundProcess { pid, kind: Kind::Unreadable { scope, was, why }, held: None }
    }

    /// Reads one process. `None`: it belongs to no domain, or has ended.
    fn examine(&self, pid: i32, buffer: &mut Vec<u8>) -> Option<FoundProcess> {
        let directory = self.directory(pid);
        let kind = match self.kind(pid, &directory, buffer) {
            Ok(kind) => kind?,
            Err(_) => return Some(self.unreadable(pid, "it may not be read")),
        };
        match kind {
            Kind::Unreadable { was: None, why, .. } => return Some(self.unreadable(pid, why)),
            Kind::Unreadable { was: Some(_), .. } => return Some(FoundProcess { pid, kind, held: None }),
            Kind::Machine { .. } | Kind::Container { .. } => {}
        }
        if let Kind::Machine { line, .. } = &kind {
            self.memory.note(&directory, pid, line.uuid);
        }
        if !self.wanted.iter().any(|whom| whom.may_be(&kind)) {
            return Some(FoundProcess { pid, kind, held: None });
        }
        let held = match Process::open(pid) {
            Ok(held) => held,
            Err(error) if proc::is_gone(&error) => return None,
            Err(_) => return Some(self.unreadable(pid, "it cannot be held")),
        };
        // It may have become another process before it was held.
        match self.kind(pid, &directory, buffer) {
            _ if held.is_dead() => None,
            Ok(Some(now)) if now == kind => Some(FoundProcess { pid, kind, held: Some(Arc::new(held)) }),
            Ok(None) => None,
            Ok(Some(_)) | Err(_) => Some(self.unreadable(pid, "it changes while it is looked at")),
        }
    }

    /// Whether a machine of this UUID is asked for.
    fn is_asked(&self, uuid: Uuid) -> bool {
        self.of_all || self.wanted.iter().any(|whom| whom.uuid == uuid)
    }

    fn kind(&self, pid: i32, directory: &Path, buffer: &mut Vec<u8>) -> io::Result<Option<Kind>> {
        let machines = self.drivers.contains(&Driver::Qemu);
        if machines {
            let Some(file) = self.memory.lines.read(pid, directory, buffer)? else { return Ok(None) };
            let line = match buffer.is_empty() {
                false => CommandLineKind::of(buffer),
                true if file.is_kernels() => CommandLineKind::Kernel,
                true => match self.memory.dying.machine(pid) {
                    Some(uuid) => {
                        return Ok(Some(Kind::Unreadable { scope: None, was: Some(uuid), why: "it is dying" }));
                    }
                    None => self.line_of_threads(pid, directory, buffer)?,
                },
            };
            match line {
                CommandLineKind::Machine(line) => {
                    let scope = if self.is_asked(line.uuid) { Scope::read(directory)? } else { None };
                    let in_scope = scope.is_some_and(|scope| scope.driver == Driver::Qemu);
                    return Ok(Some(Kind::Machine { line, in_scope }));
                }
                CommandLineKind::Nothing => {
                    return Ok(Some(Kind::Unreadable { scope: None, was: None, why: "it says nothing of itself" }));
                }
                CommandLineKind::Kernel => {
                    if !file.is_kernels() {
                        file.note_kernels();
                    }
                    return Ok(None);
                }
                CommandLineKind::Ended => return Ok(None),
                CommandLineKind::Other => {}
            }
        }
        if !self.drivers.contains(&Driver::Lxc) {
            return Ok(None);
        }
        let Some(scope) = Scope::read(directory)?.filter(|scope| scope.driver == Driver::Lxc) else {
            return Ok(None);
        };
        let status = proc::read_text(&directory.join("status"))?.unwrap_or_default();
        if !proc::is_first_of_container(&status) {
            return Ok(None);
        }
        proc::read(&directory.join("environ"), buffer)?;
        let variable = |name: &[u8]| buffer.split(|byte| *byte == 0).find_map(|variable| variable.strip_prefix(name));
        let uuid = variable(b"LIBVIRT_LXC_UUID=").and_then(|uuid| Uuid::try_parse_ascii(uuid).ok());
        let name = variable(b"LIBVIRT_LXC_NAME=").map(|name| String::from_utf8_lossy(name).into_owned());
        Ok(Some(Kind::Container { scope, uuid, name }))
    }

    /// The command line of a process whose first thread has none. Either that thread has ended, and
    /// others may be stuck, or it is the kernel's own.
    fn line_of_threads(&self, pid: i32, directory: &Path, buffer: &mut Vec<u8>) -> io::Result<CommandLineKind> {
        let Some(stat) = Stat::read(directory)? else { return Ok(CommandLineKind::Ended) };
        if stat.is_kernels() {
            return Ok(CommandLineKind::Kernel);
        }
        // Of a hundred machines that die at once each is one's own alone.
        if self.memory.was(pid, Some(stat.started)).is_some_and(|uuid| !self.is_asked(uuid)) {
            return Ok(CommandLineKind::Nothing);
        }
        let mut others = false;
        let Ok(threads) = fs::read_dir(directory.join("task")) else { return Ok(CommandLineKind::Ended) };
        for thread in threads.flatten() {
            let thread = thread.path();
            if matches!(Stat::read(&thread)?.map(|stat| stat.state), None | Some('Z' | 'X')) {
                continue;
            }
            others = true;
            if proc::read(&thread.join("cmdline"), buffer)?.is_some() && !buffer.is_empty() {
                return Ok(CommandLineKind::of(buffer));
            }
        }
        Ok(if others { CommandLineKind::Nothing } else { CommandLineKind::Ended })
    }
}
