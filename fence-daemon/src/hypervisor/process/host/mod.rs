//! What this host itself says of a domain: which of its processes live, and what outlives them.
//! libvirt is not asked.
//!
//! libvirt can be wrong about a domain. It loses one that runs on, it takes a launcher for the
//! emulator, it is not there. So the host is asked before any "off" of a domain with a local driver
//! and before any start. [`Host::clear`] kills what is left and waits for it. [`Host::remains`]
//! asks only. The word "off" passes only if the host has none of these:
//!
//! 1. a living process of the domain: this file, by the rules below;
//! 2. a living helper of it (virtiofsd, swtpm, ...): `outliving`, with `helpers`;
//! 3. a write of it under way: `outliving`, with `belongings` and `locks`.
//!
//! Containers have no helpers to wait for, and nothing shows their writes: see
//! `docs/design/storage-and-helpers.md`.
//!
//! # What belongs to a domain
//!
//! - **QEMU**: each process with `-uuid UUID` in its command line, whatever its program is called:
//!   an emulator under another name, a script or a launcher around it, `strace`. It is *sure* to be
//!   the machine, and is killed, if its command line also has `-name guest=`, which libvirt writes
//!   and nobody types, or if its control group is one of libvirt's. Else (`grep -- -uuid ...`) it
//!   is a doubt: it is not killed, and the domain does not count as off while it lives.
//! - **LXC**: the first process of a PID namespace right below ours, in a control group of
//!   libvirt's for a container of that name. When it dies, everything in its namespace dies. The
//!   controller (`libvirt_lxc`) is no part of the container. libvirt shortens names there. So the
//!   process is *sure* only if the group has an instance number that was this domain's, or if the
//!   environment that libvirt started it with has the UUID. (A guest can write that. It can make
//!   itself a doubt, and nobody else anything.)
//! - A process that cannot be read (see `scan`) is a doubt for the domains that it may belong to:
//!   by its control group, by what it was in an earlier scan, or by the domain's PID file. An
//!   unreadable process without such a hint keeps nobody from being fenced.

mod belongings;
mod command_lines;
mod disks;
mod dying;
mod helpers;
mod left_behind;
mod locks;
mod outliving;
mod scan;
mod scanner;
mod scope;
#[cfg(test)]
mod tests;

use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::{Instant, sleep, timeout_at};
use uuid::Uuid;

pub(crate) use self::belongings::{Belongings, Running};
pub(crate) use self::disks::Disks;

use self::belongings::WhichWrites;
pub(crate) use self::scan::Look;
use self::scan::{FoundProcess, Kind};
use self::scanner::Scanner;
use super::driver::Driver;
use super::pidfd::{self, Process};
use super::victim::Victim;
use crate::clock::Moment;
use crate::hypervisor::deadline::Deadline;

/// How long a doubt may last before it counts: somebody's short command may have the domain's UUID
/// in its arguments.
const DOUBT_LIMIT: Duration = Duration::from_secs(1);
/// How long after a doubt the host is looked at again.
const DOUBT_PAUSE: Duration = Duration::from_millis(50);
/// How often in a row new processes of a domain may appear while it is killed.
const ROUNDS: u32 = 20;

/// A domain whose processes are looked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Whom {
    /// The driver that runs it.
    pub(crate) driver: Driver,
    pub(crate) uuid: Uuid,
    /// Its name, where that is known. Containers are found by it.
    pub(crate) name: String,
    /// The known libvirt numbers of instances that were this domain's.
    pub(crate) ids: Vec<u32>,
    /// Whether its last instance was proven dead here, with its writes, and nothing was heard of
    /// the domain since. A write of an unknown dead emulator is not its.
    pub(crate) proven_dead: bool,
}

impl Whom {
    /// Whether a process that may be one of this domain's certainly is.
    fn is_sure(&self, kind: &Kind) -> bool {
        match kind {
            Kind::Machine { line, in_scope } => *in_scope || line.name.is_some(),
            Kind::Container { scope, uuid, .. } => *uuid == Some(self.uuid) || self.ids.contains(&scope.id),
            Kind::Unreadable { .. } => false,
        }
    }

    /// Whether a process is one of this domain's, or may be.
    fn may_be(&self, kind: &Kind) -> bool {
        match kind {
            Kind::Machine { line, .. } => self.driver == Driver::Qemu && line.uuid == self.uuid,
            Kind::Container { scope, .. } => scope.is_of(self.driver, &self.name),
            Kind::Unreadable { scope: Some(scope), .. } => scope.is_of(self.driver, &self.name),
            Kind::Unreadable { scope: None, was, .. } => *was == Some(self.uuid),
        }
    }
}

/// What is left of a domain on this host: of its processes, or of its helpers and writes as well.
#[derive(Debug)]
pub(crate) enum Remains {
    /// Nothing of what was asked for: of its processes, or of its helpers and writes as well. Of
    /// the processes a scan says so that was to hold this domain's, and that began after the
    /// question or was given with it.
    Nothing,
    /// These processes live.
    Living(Vec<Arc<Process>>),
    /// It is not known: why, for people.
    Doubt(String),
}

/// Why a domain is not cleared away.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Left {
    /// These processes live. They do not die in time, or were found after the deadline.
    Undead(Vec<i32>),
    /// These helpers of it live, for people.
    Helpers(String),
    /// What it has written may not be done yet: what is known of that, for people.
    Writes(String),
    /// It is not known whether something of it lives: why, for people.
    Doubt(String),
}

impl fmt::Display for Left {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Undead(pids) => write!(f, "processes of it live: {pids:?}"),
            Self::Helpers(which) => write!(f, "its process is dead, but helpers of it live: {which}"),
            Self::Writes(what) => write!(f, "its process is dead, but {what}"),
            Self::Doubt(why) => write!(f, "whether something of it lives is unknown: {why}"),
        }
    }
}

/// A domain of which nothing lives on this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Cleared {
    /// Since when that is known.
    pub(crate) at: Moment,
    /// The processes that were found and killed for it.
    pub(crate) killed: Vec<i32>,
}

/// The host. Clones are the same one.
#[derive(Clone, Debug)]
pub(crate) struct Host {
    shared: Arc<SharedHost>,
}

#[derive(Debug)]
struct SharedHost {
    scanner: Scanner,
    /// What QEMU's domains have beside their emulators, as each of the URIs knows it.
    belongings: Vec<Arc<Belongings>>,
}

impl Host {
    /// This host, with the drivers whose domains are its processes.
    pub(crate) fn new(drivers: impl Iterator<Item = Driver>, belongings: Vec<Arc<Belongings>>) -> Self {
        Self::below(Path::new("/proc"), drivers, belongings)
    }

    fn below(root: &Path, drivers: impl Iterator<Item = Driver>, belongings: Vec<Arc<Belongings>>) -> Self {
        let mut all: Vec<_> = Vec::new();
        for driver in drivers {
            if !all.contains(&driver) {
                all.push(driver);
            }
        }
        let shared = SharedHost { scanner: Scanner::new(root, all), belongings };
        Self { shared: Arc::new(shared) }
    }

    /// A scan that begins after this call. It holds the processes of these domains. Without any it
    /// is a scan of all domains.
    pub(crate) async fn look(&self, wanted: Vec<Whom>) -> Arc<Look> {
        let (answer, answered) = oneshot::channel();
        self.shared.scanner.ask(wanted, answer);
        // The question is dropped where no thread could be started, and by a scan that panics.
        let failed =
            || Look::failed("cannot look at the processes: no thread, or none that came to its end".to_owned());
        answered.await.unwrap_or_else(|_| Arc::new(failed()))
    }

    /// What is left of a domain: its processes, its helpers, its writes. A doubt counts only if it
    /// lasts for a second.
    pub(crate) async fn remains(&self, whom: &Whom) -> Remains {
        self.remains_by(None, whom).await
    }

    /// The same. A `look` that was to hold this domain's processes and found none spares another
    /// scan.
    pub(crate) async fn remains_by(&self, look: Option<&Look>, whom: &Whom) -> Remains {
        if !look.is_some_and(|look| look.found_none_of(whom)) {
            match self.processes_of(whom).await {
                Remains::Nothing => {}
                remains @ (Remains::Living(_) | Remains::Doubt(_)) => return remains,
            }
        }
        match self.nothing_outlives(whom, DOUBT_LIMIT).await {
            Ok(()) => Remains::Nothing,
            Err(left) => Remains::Doubt(left.to_string()),
        }
    }

    /// The same of its own processes alone: helpers and writes are not asked for.
    async fn processes_of(&self, whom: &Whom) -> Remains {
        let until = Instant::now() + DOUBT_LIMIT;
        loop {
            match self.remains_now(whom).await {
                Remains::Doubt(_) if Instant::now() < until => sleep(DOUBT_PAUSE).await,
                remains @ (Remains::Nothing | Remains::Living(_) | Remains::Doubt(_)) => return remains,
            }
        }
    }

    /// Which of a domain's own processes are left, at once: helpers and writes are not asked for.
    pub(crate) async fn remains_now(&self, whom: &Whom) -> Remains {
        self.look(vec![whom.clone()]).await.remains(whom)
    }

    /// Before a start: a second copy of what runs must not come up, whatever libvirt knows.
    ///
    /// # Errors
    /// Something of it lives here, or may live: what, for people.
    pub(crate) async fn is_clear_of(&self, whom: &Whom) -> Result<(), String> {
        match self.remains(whom).await {
            Remains::Nothing => Ok(()),
            Remains::Living(found) => {
                let found: Vec<_> = found.iter().map(|process| process.describe()).collect();
                Err(format!("process {}", found.join(", ")))
            }
            Remains::Doubt(why) => Err(why),
        }
    }

    /// Kills the processes of a domain that live now. Nothing is proven by that: a look that fails,
    /// or a doubt, leaves them alone.
    pub(crate) async fn kill_living(&self, whom: &Whom) {
        let Remains::Living(found) = self.remains_now(whom).await else { return };
        for process in found {
            let (name, shown) = (whom.name.escape_debug(), process.describe());
            match process.kill() {
                Ok(()) => tracing::warn!(domain = %name, uuid = %whom.uuid, process = shown, "killed"),
                Err(error) => {
                    tracing::error!(domain = %name, uuid = %whom.uuid, process = shown, %error, "it cannot be killed");
                }
            }
        }
    }

    /// Kills what is left of a domain, and waits until all of it is over: its processes, its
    /// helpers, its writes. `victim` has been killed before. If nothing was, a `look` that has
    /// found no process of the domain spares another one.
    ///
    /// # Errors
    /// It is not over at `by`; or it is not known; or nothing was killed before the deadline.
    pub(crate) async fn clear(
        &self,
        whom: &Whom,
        victim: Option<&Arc<Victim>>,
        look: Option<&Look>,
        deadline: &Deadline,
        by: Instant,
    ) -> Result<Cleared, Left> {
        if let Some(victim) = victim {
            // At once: they die beside it.
            self.kill_helpers(whom);
            self.shared.scanner.note_dying(whom, victim);
        }
        let victim = victim.map(Arc::as_ref);
        let killed = match look {
            Some(look) if victim.is_none() && look.found_none_of(whom) => Vec::new(),
            Some(_) | None => self.clear_processes(whom, victim, deadline, by).await?,
        };
        // The search for helpers reads dozens of files: it runs while the machine dies.
        self.clear_helpers(whom, victim.is_some() || !killed.is_empty(), deadline, by).await?;
        // A living machine carries its locks itself. Only a dead one shows which writes are left.
        wait_dead(victim, by).await?;
        // A victim that was looked at right before its kill has no images but the known ones.
        let is_known = whom.proven_dead || victim.is_some();
        let search = if is_known && killed.is_empty() { WhichWrites::Known } else { WhichWrites::All };
        self.writes_over(whom, search, by).await?;
        Ok(Cleared { at: Moment::now(), killed })
    }

    /// Kills the processes of a domain until a scan that began after the last kill finds no others.
    ///
    /// `victim` has been killed before, and the caller waits for its death: a scan that finds it is
    /// no news. (A process that was sent SIGKILL starts no more processes. So a scan that begins
    /// after that sees all of them, and need not wait for the death.)
    ///
    /// # Errors
    /// As [`Self::clear`].
    async fn clear_processes(
        &self,
        whom: &Whom,
        victim: Option<&Victim>,
        deadline: &Deadline,
        by: Instant,
    ) -> Result<Vec<i32>, Left> {
        let mut killed: Vec<Arc<Process>> = Vec::new();
        let is_known = |killed: &[Arc<Process>], pid| {
            victim.is_some_and(|victim| victim.pid() == pid && !victim.is_dead())
                || killed.iter().any(|process| process.pid() == pid && !process.is_dead())
        };
        for _ in 0..ROUNDS {
            // Before the look: after a death during it there is one more look.
            let is_dying = victim.is_some_and(|victim| !victim.is_dead()) || killed.iter().any(|it| !it.is_dead());
            let look = self.look(vec![whom.clone()]).await;
            let remains = match look.remains_beside(whom, |pid| is_known(&killed, pid)) {
                // A dying process says nothing of itself any more. The release of its memory and
                // its last I/O may take long.
                Remains::Doubt(_) => {
                    if is_dying {
                        wait_dead(victim, by).await?;
                        wait_all_dead(&killed, by).await?;
                    }
                    self.processes_of(whom).await
                }
                remains @ (Remains::Nothing | Remains::Living(_)) => remains,
            };
            let found = match remains {
                Remains::Nothing => Vec::new(),
                Remains::Doubt(why) => return Err(Left::Doubt(why)),
                Remains::Living(found) => found,
            };
            // The dead are left out. A number that has gone to another process is not known.
            let news: Vec<_> = found.into_iter().filter(|it| !it.is_dead() && !is_known(&killed, it.pid())).collect();
            if news.is_empty() {
                wait_all_dead(&killed, by).await?;
                return Ok(killed.iter().map(|process| process.pid()).collect());
            }
            if victim.is_none() && killed.is_empty() && deadline.check().is_err() {
                return Err(Left::Undead(news.iter().map(|process| process.pid()).collect()));
            }
            for process in news {
                let (name, shown) = (whom.name.escape_debug(), process.describe());
                tracing::warn!(domain = %name, uuid = %whom.uuid, process = shown, "a process of the domain lives: killed");
                if let Err(error) = process.kill() {
                    return Err(Left::Doubt(format!("process {} cannot be killed: {error}", process.describe())));
                }
                killed.push(process);
            }
        }
        Err(Left::Doubt("new processes of it appear again and again".to_owned()))
    }
}

/// Waits for the death of a victim, if there is one.
async fn wait_dead(victim: Option<&Victim>, by: Instant) -> Result<(), Left> {
    match victim {
        Some(victim) if !matches!(timeout_at(by, victim.death()).await, Ok(Ok(()))) => {
            Err(Left::Undead(vec![victim.pid()]))
        }
        Some(_) | None => Ok(()),
    }
}

/// Waits for the death of all that was killed.
async fn wait_all_dead(killed: &[Arc<Process>], by: Instant) -> Result<(), Left> {
    for process in killed {
        if !matches!(timeout_at(by, process.death()).await, Ok(Ok(()))) {
            return Err(Left::Undead(killed.iter().filter(|it| !it.is_dead()).map(|it| it.pid()).collect()));
        }
    }
    Ok(())
}

impl Look {
    /// Whether this scan was to hold the processes of this very domain, and found none.
    pub(crate) fn found_none_of(&self, whom: &Whom) -> bool {
        self.wanted.contains(whom) && matches!(self.remains(whom), Remains::Nothing)
    }

    /// What is left of a domain whose processes this scan was to hold.
    pub(crate) fn remains(&self, whom: &Whom) -> Remains {
        self.remains_beside(whom, |_| false)
    }

    /// The same beside processes that are known to have been killed. The kernel takes a process's
    /// command line away long before its death, so that nothing tells any more what it is.
    fn remains_beside(&self, whom: &Whom, is_known: impl Fn(i32) -> bool) -> Remains {
        if let Some(why) = &self.failed {
            return Remains::Doubt(why.clone());
        }
        let mut living = Vec::new();
        for FoundProcess { pid, kind, held } in &self.found {
            let is_it = whom.may_be(kind) || is_named_by_pid_file(whom, *pid, kind);
            if !is_it || held.as_ref().is_some_and(|held| held.is_dead()) {
                continue;
            }
            let doubt = |what: &str| Remains::Doubt(format!("process {} {what}", pidfd::describe(*pid)));
            match (kind, held) {
                (Kind::Unreadable { .. }, _) if is_known(*pid) => {}
                (Kind::Unreadable { why, .. }, _) => return doubt(&format!("may be its: {why}")),
                (Kind::Machine { .. } | Kind::Container { .. }, _) if !whom.is_sure(kind) => {
                    return doubt("may be its or not: it is left alone");
                }
                (Kind::Machine { .. } | Kind::Container { .. }, Some(held)) => living.push(Arc::clone(held)),
                (Kind::Machine { .. } | Kind::Container { .. }, None) => return doubt("was not held"),
            }
        }
        if living.is_empty() { Remains::Nothing } else { Remains::Living(living) }
    }

    /// The domains that processes say they are: driver, UUID, and name if they tell it.
    pub(crate) fn domains(&self) -> impl Iterator<Item = (Driver, Uuid, Option<&str>)> {
        self.found.iter().filter_map(|found| match &found.kind {
            Kind::Machine { line, .. } => Some((Driver::Qemu, line.uuid, line.name.as_deref())),
            Kind::Container { uuid, name, .. } => Some((Driver::Lxc, (*uuid)?, name.as_deref())),
            Kind::Unreadable { .. } => None,
        })
    }
}

/// Whether the domain's own PID file names a process that says nothing of itself.
fn is_named_by_pid_file(whom: &Whom, pid: i32, kind: &Kind) -> bool {
    matches!(kind, Kind::Unreadable { scope: None, .. }) && whom.driver.pid_in_file(&whom.name) == Some(pid)
}
