//! Effects of section `fence_virtd` on the daemon's process, read from the kernel. The daemon's
//! children inherit none of them.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use fence_lab::process::poll_until;
use fence_lab::server::{Config, Server, Which};

use crate::bench::Bench;

/// How long libvirt's client may take to start its transport to a remote host, on a loaded machine.
const LIMIT: Duration = Duration::from_secs(60);

/// Scheduling policies as `sched_setscheduler(2)` numbers them: the default, and real-time round
/// robin.
const OTHER: i64 = 0;
const ROUND_ROBIN: i64 = 2;

/// A thread's scheduling policy and priority.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Competes {
    policy: i64,
    realtime: i64,
    nice: i64,
}

const NORMAL: Competes = Competes { policy: OTHER, realtime: 0, nice: 0 };
const HIGH: Competes = Competes { policy: OTHER, realtime: 0, nice: -20 };
const REALTIME: Competes = Competes { policy: ROUND_ROBIN, realtime: 1, nice: 0 };

impl Competes {
    /// Reads a `stat` file in `/proc`.
    fn read(path: &str) -> Result<Self> {
        let text = fs::read_to_string(path).with_context(|| path.to_owned())?;
        let stat = text.lines().next().unwrap_or_default();
        // The second field is the name, in parentheses.
        let (_, rest) = stat.rsplit_once(") ").with_context(|| text.clone())?;
        let fields: Vec<&str> = rest.split_whitespace().collect();
        let field = |number: usize| -> Result<i64> { Ok(fields.get(number - 3).context("a short stat")?.parse()?) };
        Ok(Self { policy: field(41)?, realtime: field(40)?, nice: field(19)? })
    }
}

/// A line of `/proc/PID/status` in kB.
fn kilobytes(pid: u32, name: &str) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix(name)).with_context(|| status.clone())?;
    Ok(line.trim_start_matches(':').trim().trim_end_matches(" kB").parse()?)
}

fn oom_score(pid: u32) -> Result<i64> {
    Ok(fs::read_to_string(format!("/proc/{pid}/oom_score_adj"))?.trim().parse()?)
}

/// The scheduling of each of the daemon's threads, the log writer's excepted.
fn threads(pid: u32) -> Result<Vec<(String, Competes)>> {
    let mut found = Vec::new();
    for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
        let thread = thread?.path().display().to_string();
        // A thread may end meanwhile.
        let Ok(name) = fs::read_to_string(format!("{thread}/comm")) else { continue };
        if let (true, Ok(competes)) = (name.trim() != "fence-log", Competes::read(&format!("{thread}/stat"))) {
            found.push((name.trim().to_owned(), competes));
        }
    }
    Ok(found)
}

/// Whether root may protect a process here. Containers and test machines often forbid it.
fn may_protect() -> Result<bool> {
    const SYS_RESOURCE: u32 = 24;
    let status = fs::read_to_string("/proc/self/status")?;
    let rights = status.lines().find_map(|line| line.strip_prefix("CapEff:\t")).with_context(|| status.clone())?;
    Ok(u64::from_str_radix(rights.trim(), 16)? >> SYS_RESOURCE & 1 == 1)
}

/// A program that libvirt's client library starts in place of ssh. It writes down what it sees of
/// itself.
const CHILD: &str = "#!/bin/sh\ncat /proc/self/stat > /run/lab/child.new\ncat /proc/self/oom_score_adj >> /run/lab/child.new\n\
                     grep VmLck /proc/self/status >> /run/lab/child.new\nmv /run/lab/child.new /run/lab/child\nexec sleep 600\n";

/// Serves with these keys in section `fence_virtd` and inspects the daemon.
fn with(bench: &Bench, keys: &[(&'static str, &'static str)], look: impl Fn(&Server, u32) -> Result<()>) -> Result<()> {
    let mut config = bench.config("auto");
    config.daemon = keys.to_vec();
    look_at(bench, &Which::ours()?, &config, look)
}

fn look_at(bench: &Bench, which: &Which, config: &Config, look: impl Fn(&Server, u32) -> Result<()>) -> Result<()> {
    let keys = &config.daemon;
    let mut server = Server::start(&bench.hypervisor, which, config)?;
    let pid = server.process().id();
    look(&server, pid).with_context(|| format!("{keys:?}; its log: {}", server.log()))
}

#[test]
fn priority_sets_the_threads_scheduling() -> Result<()> {
    let bench = Bench::new()?;
    for (value, expected) in [("normal", NORMAL), ("high", HIGH), ("realtime", REALTIME)] {
        with(&bench, &[("priority", value), ("lock_memory", "no"), ("oom_protect", "no")], |_, pid| {
            let threads = threads(pid)?;
            ensure!(threads.len() > 2, "{threads:?}");
            ensure!(threads.iter().all(|(_, competes)| *competes == expected), "{value}: {threads:?}");
            ensure!(
                (kilobytes(pid, "VmLck")?, oom_score(pid)?) == (0, 0),
                "{value}: more than the priority was changed"
            );
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn lock_memory_locks_memory_or_does_not() -> Result<()> {
    let bench = Bench::new()?;
    for (value, locked) in [("yes", true), ("no", false), ("1", true), ("0", false)] {
        with(&bench, &[("lock_memory", value), ("priority", "normal"), ("oom_protect", "no")], |server, pid| {
            // Memory is locked only after the kernel program is loaded.
            server.wait_settled(LIMIT)?;
            if locked {
                poll_until("locked memory", LIMIT, || Ok((kilobytes(pid, "VmLck")? > 0).then_some(())))?;
            }
            ensure!((kilobytes(pid, "VmLck")? > 0) == locked, "{value}");
            ensure!(threads(pid)?.iter().all(|(_, competes)| *competes == NORMAL) && oom_score(pid)? == 0, "{value}");
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn oom_protect_protects_or_does_not() -> Result<()> {
    let bench = Bench::new()?;
    for (value, score) in [("yes", -900), ("no", 0), ("on", -900), ("false", 0)] {
        with(&bench, &[("oom_protect", value), ("priority", "normal"), ("lock_memory", "no")], |server, pid| {
            let (wanted, refused) = (score != 0, server.log().contains("cannot be spared when memory runs out"));
            if may_protect()? || !wanted {
                ensure!(oom_score(pid)? == score && !refused, "{value}: {}", oom_score(pid)?);
            } else {
                ensure!(oom_score(pid)? == 0 && refused, "{value}: {}", oom_score(pid)?);
            }
            ensure!(threads(pid)?.iter().all(|(_, competes)| *competes == NORMAL), "{value}");
            ensure!(kilobytes(pid, "VmLck")? == 0, "{value}");
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn the_daemons_children_have_ordinary_priority() -> Result<()> {
    let bench = Bench::new()?;
    bench.hypervisor.write_mode("ssh", CHILD.as_bytes(), 0o755)?;
    let child = bench.hypervisor.outside("/run/lab/child");
    // The score differs from a child's also where root may not protect a process.
    let Which::Ours(program) = Which::ours()? else { bail!("ours is not ours") };
    let script = format!("#!/bin/sh\necho 500 > /proc/self/oom_score_adj\nexec '{}' \"$@\"\n", program.display());
    let which = Which::Ours(bench.hypervisor.write_mode("daemon", script.as_bytes(), 0o755)?.into());
    for priority in ["normal", "high", "realtime"] {
        let _ = fs::remove_file(&child);
        let mut config = bench.config("auto");
        config.daemon = vec![("priority", priority)];
        config.uris.push("qemu+ssh://root@elsewhere/system?command=/run/lab/ssh".to_owned());
        look_at(&bench, &which, &config, |_, pid| {
            ensure!(oom_score(pid)? != 0, "the daemon's own score is a child's");
            let told = poll_until("a child of libvirt's client", LIMIT, || Ok(fs::read_to_string(&child).ok()))?;
            let competes = Competes::read(&child.display().to_string())?;
            ensure!(competes == NORMAL, "{priority}: {competes:?}");
            let rest: Vec<&str> = told.lines().skip(1).map(str::trim).collect();
            ensure!(rest.len() == 2 && rest[0] == "0" && rest[1].ends_with(" 0 kB"), "{priority}: {rest:?}");
            Ok(())
        })?;
    }
    Ok(())
}
