//! One round of each part of the bench.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use fence_common::wire::Op;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use super::bed::{Bed, KEY, Rebirth, Serving, Victim, storm_names};
use super::caller::{self, Answer, PATIENCE, Silent};
use super::figures::{CROWDS, Contender, Results, behind};
use fence_lab::client::Client;
use fence_lab::process::{Process, poll_until};
use fence_lab::qemu;
use fence_lab::server::Server;
use fence_lab::witness::Witness;

/// How long any machine may take to die.
const DEATH_LIMIT: Duration = Duration::from_secs(60);
/// The time limit of a storm. fence_virtd takes 0.2 s for each domain.
const STORM_LIMIT: Duration = Duration::from_secs(120);
/// How long a daemon with a thousand domains may take to lock its memory.
const LOCK_LIMIT: Duration = Duration::from_secs(30);
/// How long wake-ups are counted.
const IDLE: Duration = Duration::from_secs(60);
/// How long callers in the way have to get in the way.
const GET_IN_THE_WAY: Duration = Duration::from_millis(300);

/// What a server took for a machine's death, and its next life.
struct Killed {
    answer: Answer,
    dead: Instant,
    running: Option<Instant>,
}

/// Has a machine killed, and watches it with handles of the bench's own.
fn kill(bed: &Bed, op: Op, victim: Victim, witness: &Witness) -> Result<Killed> {
    let peer = bed.peer()?;
    let rebirth = if op == Op::Reboot { Some(bed.expect_rebirth(victim)?) } else { None };
    let (answer, dead, running) = std::thread::scope(|scope| {
        let death = scope.spawn(|| -> Result<Instant> {
            ensure!(witness.dies_within(DEATH_LIMIT)?, "{} does not die", victim.name());
            Ok(Instant::now())
        });
        let running = rebirth.as_ref().map(|rebirth| scope.spawn(|| Rebirth::wait(rebirth)));
        let answer = caller::ask(&peer, op, victim.name(), PATIENCE);
        // Asked before the watchers are waited for: this is what the reply is held to.
        let was_dead = witness.is_dead();
        let answer = answer?.context("no callback")?;
        ensure!(answer.code == 0, "{op:?} of {}: the reply is {}", victim.name(), answer.code);
        ensure!(was_dead?, "FALSE SUCCESS: {op:?} of {} was answered while it lived", victim.name());
        let panicked = |_| anyhow!("a watcher panicked");
        let dead = death.join().map_err(panicked)??;
        let running = running.map(|thread| thread.join().map_err(panicked)?).transpose()?;
        anyhow::Ok((answer, dead, running))
    })?;
    Ok(Killed { answer, dead, running })
}

/// `off` and `reboot` of a machine, `times` each. Without a server: SIGKILL, and libvirt's own
/// start. A false success is an error.
pub fn kills(
    bed: &Bed,
    contender: Contender,
    victim: Victim,
    times: usize,
    server: Option<&Server>,
    results: &mut Results,
) -> Result<()> {
    let name = |what: &str| format!("{}.{what}", victim.name());
    let note = |op: &str, killed: &Killed, results: &mut Results| {
        let times = [("dead", Some(killed.dead)), ("reply", Some(killed.answer.replied)), ("running", killed.running)];
        for (what, at) in times.into_iter().filter_map(|(what, at)| Some((what, at?))) {
            results.add(&name(&format!("{op}.{what}")), contender, (at - killed.answer.sent).as_secs_f64());
        }
    };
    for _ in 0..times {
        let witness = bed.bring_up(victim)?;
        let Some(server) = server else {
            let begin = Instant::now();
            witness.kill()?;
            ensure!(witness.dies_within(DEATH_LIMIT)?, "{} does not die", victim.name());
            let took = begin.elapsed().as_secs_f64();
            ["off.dead", "off.reply"].iter().for_each(|what| results.add(&name(what), contender, took));
            bed.wait_off(victim)?;
            results.add(&name("reboot.running"), contender, bed.create(victim)?.as_secs_f64());
            continue;
        };
        let log = || format!("{}'s log: {}", contender.name(), server.log());
        let killed = kill(bed, Op::Off, victim, &witness).with_context(log)?;
        note("off", &killed, results);

        bed.wait_off(victim)?;
        let witness = bed.bring_up(victim)?;
        note("reboot", &kill(bed, Op::Reboot, victim, &witness).with_context(log)?, results);
    }
    // Not in the way of what comes next.
    bed.remove(victim)
}

/// Many `off`s at once. A false success is an error.
pub fn storm(bed: &Bed, contender: Contender, count: usize, results: &mut Results) -> Result<()> {
    let witnesses = bed.bring_up_storm(count)?;
    let names = storm_names(count);
    let begin = Instant::now();
    let answers = caller::storm(&bed.crowd, &KEY, &bed.crowd_addresses(), &names, STORM_LIMIT)?;
    for (name, (witness, answer)) in names.iter().zip(witnesses.iter().zip(&answers)) {
        if let Some(answer) = answer {
            ensure!(answer.code == 0, "off of {name}: the reply is {}", answer.code);
            ensure!(witness.is_dead()?, "FALSE SUCCESS: off of {name} was answered while it lived");
        }
        let took = answer.map(|answer| answer.took());
        results.add_time(&format!("storm.{count}.each"), contender, took, STORM_LIMIT);
    }
    // All clients begin at once, and their threads were made before.
    let first = answers.iter().flatten().map(|answer| answer.sent).min().unwrap_or(begin);
    let last = answers.iter().flatten().map(|answer| answer.replied).max().unwrap_or(begin);
    let all = answers.iter().all(Option::is_some).then(|| last - first);
    results.add_time(&format!("storm.{count}"), contender, all, STORM_LIMIT);
    for (name, witness) in names.iter().zip(&witnesses) {
        if !witness.is_dead()? {
            bed.libvirtd.virsh(qemu::URI, &["destroy", name])?;
        }
    }
    Ok(())
}

/// `off` on a host with many other processes, all of which are looked at. A false success is an
/// error.
pub fn beside(bed: &Bed, contender: Contender, times: usize, server: &Server, results: &mut Results) -> Result<()> {
    let start = "for at in $(seq 1000); do sleep 3600 & done; echo started; wait";
    let crowd = Process::start(bed.hypervisor.space(), Command::new("sh").args(["-c", start]))?;
    let started = crowd.stdout().wait_for(0, DEATH_LIMIT, |line| (line == "started").then_some(()));
    ensure!(started.is_some(), "a thousand processes do not start: {}", crowd.stderr().text());
    for _ in 0..times {
        let witness = bed.bring_up(Victim::Idle)?;
        let killed = kill(bed, Op::Off, Victim::Idle, &witness)
            .with_context(|| format!("{}'s log: {}", contender.name(), server.log()))?;
        results.add("beside.off.reply", contender, killed.answer.took().as_secs_f64());
        bed.wait_off(Victim::Idle)?;
    }
    killpg(Pid::from_raw(i32::try_from(crowd.id())?), Signal::SIGKILL).context("ending a thousand processes")
}

/// As many machines killed in one loop, with no server between. The last one's death counts.
pub fn bare_storm(bed: &Bed, count: usize, results: &mut Results) -> Result<()> {
    let witnesses = bed.bring_up_storm(count)?;
    let begin = Instant::now();
    for witness in &witnesses {
        witness.kill()?;
    }
    for witness in &witnesses {
        ensure!(witness.dies_within(DEATH_LIMIT)?, "a machine does not die");
    }
    results.add(&format!("storm.{count}"), Contender::Bare, begin.elapsed().as_secs_f64());
    Ok(())
}

/// An honest request behind silent or dead clients. Each round starts a new server, which has none
/// of the last round's clients.
pub fn callers(bed: &Bed, contender: Contender, times: usize, results: &mut Results) -> Result<()> {
    bed.bring_up(Victim::Idle)?;
    let domain = Victim::Idle.name();
    for kind in ["silent", "dead"] {
        for count in CROWDS {
            let Serving { server, .. } = bed.serve(contender, qemu::URI)?;
            let peer = bed.peer()?;
            for _ in 0..times {
                let alone = bed.status(&peer, domain)?;
                results.add_time(&behind("silent", 0), contender, alone, PATIENCE);
            }
            let addresses = if kind == "silent" { bed.crowd_addresses() } else { bed.dead_addresses() };
            let addresses = addresses.get(..count).context("too few addresses")?;
            let silent = if kind == "silent" {
                Some(Silent::call(&bed.crowd, &KEY, addresses, domain)?)
            } else {
                caller::call_dead(&bed.dead, &KEY, addresses, domain)?;
                None
            };
            std::thread::sleep(GET_IN_THE_WAY);
            for _ in 0..times {
                let took = bed.status(&peer, domain)?;
                results.add_time(&behind(kind, count), contender, took, PATIENCE);
                // Who has waited once has seen it, and when it is over the others are gone.
                if took.is_none_or(|took| took > Duration::from_secs(1)) {
                    break;
                }
            }
            drop(silent);
            drop(server);
        }
    }
    bed.remove(Victim::Idle)
}

/// Round trips of a status.
pub fn status(bed: &Bed, contender: Contender, times: usize, results: &mut Results) -> Result<()> {
    bed.bring_up(Victim::Idle)?;
    let domain = Victim::Idle.name();
    let peer = bed.peer()?;
    for _ in 0..5 * times {
        let answer = caller::ask(&peer, Op::Status, domain, PATIENCE)?.context("no callback")?;
        ensure!(answer.code == 0, "status of a running machine: {}", answer.code);
        results.add("status.raw", contender, answer.took().as_secs_f64());
    }
    for _ in 0..times {
        let answer = Client::new("status", &bed.key).domain(domain).run(bed.asker.space())?;
        ensure!(answer.code == Some(0), "fence_xvm -o status: {:?} {}", answer.code, answer.stderr);
        results.add("status.client", contender, answer.elapsed.as_secs_f64());
    }
    bed.remove(Victim::Idle)
}

/// Answers about a domain that is off. The bridge of the bed leads nowhere, so nobody waits for
/// other hosts.
pub fn off(bed: &Bed, contender: Contender, times: usize, results: &mut Results) -> Result<()> {
    bed.wait_off(Victim::Idle)?;
    let peer = bed.peer()?;
    let mut ask = |op: Op, code: u8, figure: &str| -> Result<()> {
        let answer = caller::ask(&peer, op, Victim::Idle.name(), PATIENCE)?.context("no callback")?;
        ensure!(answer.code == code, "{op:?} of a machine that is off: {}", answer.code);
        results.add(figure, contender, answer.took().as_secs_f64());
        Ok(())
    };
    for _ in 0..5 * times {
        ask(Op::Status, 2, "off.status")?;
        ask(Op::Off, 0, "off.off")?;
    }
    for _ in 0..times.div_ceil(10) {
        ask(Op::On, 0, "off.on")?;
        bed.remove(Victim::Idle)?;
    }
    Ok(())
}

/// What a server takes to start, and what it holds.
pub fn own(contender: Contender, serving: &mut Serving, results: &mut Results) -> Result<()> {
    results.add("own.ready", contender, serving.ready.as_secs_f64());
    results.add("own.answer", contender, serving.answered.as_secs_f64());
    results.add("own.memory", contender, resident(serving.server.process().id())?);
    Ok(())
}

/// What a server does while it is idle.
pub fn asleep(contender: Contender, serving: &mut Serving, results: &mut Results) -> Result<()> {
    let pid = serving.server.process().id();
    let before = voluntary_switches(pid)?;
    let begin = Instant::now();
    std::thread::sleep(IDLE);
    let switches = between(&before, &voluntary_switches(pid)?);
    let switches = f64::from(u32::try_from(switches).unwrap_or(u32::MAX));
    results.add("own.wakeups", contender, switches / begin.elapsed().as_secs_f64());
    Ok(())
}

/// A number of a process or thread from its `status` file.
pub(crate) fn status_number(file: &str, field: &str) -> Result<u64> {
    let text = fs::read_to_string(file).with_context(|| format!("reading {file}"))?;
    let line = text.lines().find_map(|line| line.strip_prefix(field));
    let number = line.and_then(|line| line.split_whitespace().next()).and_then(|number| number.parse().ok());
    number.with_context(|| format!("no {field} in {file}"))
}

/// How often each thread of a process has gone to sleep: as often as it was woken.
fn voluntary_switches(pid: u32) -> Result<BTreeMap<PathBuf, u64>> {
    let mut switches = BTreeMap::new();
    for thread in fs::read_dir(format!("/proc/{pid}/task")).context("the server is gone")? {
        let thread = thread?.path();
        // A thread may end meanwhile.
        if let Ok(count) = status_number(&thread.join("status").to_string_lossy(), "voluntary_ctxt_switches:") {
            switches.insert(thread, count);
        }
    }
    ensure!(!switches.is_empty(), "process {pid} has no threads");
    Ok(switches)
}

/// The wake-ups between two counts. A thread that has ended takes its count with it, and must not
/// be subtracted from the others'.
fn between(before: &BTreeMap<PathBuf, u64>, after: &BTreeMap<PathBuf, u64>) -> u64 {
    after.iter().map(|(thread, count)| count - before.get(thread).unwrap_or(&0).min(count)).sum()
}

/// Waits until a process has locked its memory. Ours first gives back what only its start needed.
pub fn wait_locked(pid: u32) -> Result<()> {
    poll_until("the daemon to lock its memory", LOCK_LIMIT, || {
        Ok((status_number(&format!("/proc/{pid}/status"), "VmLck:")? > 0).then_some(()))
    })
}

/// Resident memory of a process, in bytes.
pub fn resident(pid: u32) -> Result<f64> {
    let kibibytes = status_number(&format!("/proc/{pid}/status"), "VmRSS:")?;
    Ok(f64::from(u32::try_from(kibibytes)?) * 1024.0)
}

#[cfg(test)]
mod tests {
    #[test]
    fn this_process_has_memory_and_has_slept() {
        let pid = std::process::id();
        assert!(super::resident(pid).unwrap() > 100_000.0);
        std::thread::sleep(std::time::Duration::from_millis(2));
        assert!(super::voluntary_switches(pid).unwrap().values().sum::<u64>() > 0);
        assert!(super::status_number("/proc/self/status", "NoSuchField:").is_err());
    }

    #[test]
    fn a_thread_that_has_ended_takes_no_wake_up_from_the_others() {
        let count = |all: &[(&str, u64)]| all.iter().map(|(thread, count)| (thread.into(), *count)).collect();
        let before = count(&[("1", 10), ("2", 5000)]);
        assert_eq!(super::between(&before, &count(&[("1", 40), ("3", 7)])), 37);
    }
}
