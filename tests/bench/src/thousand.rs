//! A thousand domains: QEMU guests that run, and the rest in libvirt's test driver, both behind one
//! libvirtd.

use std::io::Write as _;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use fence_common::wire::Op;
use fence_lab::client::Client;
use fence_lab::lab::COMMAND_LIMIT;
use fence_lab::machine::Machine;
use fence_lab::process::{poll_until, run};
use fence_lab::qemu;
use fence_lab::server::{Config, START_LIMIT, Server, Which};
use fence_lab::testdriver::uuid;
use fence_lab::witness::Witness;

use super::bed::Bed;
use super::caller::{self, PATIENCE};
use super::figures::{Contender, Figure, Part, Results, Target};
use super::measure::{resident, wait_locked};
use super::stats::{Sample, Samples, Unit};

/// The test driver of libvirtd. Its domains are the same for all clients.
const OTHERS: &str = "test+unix:///default?socket=/run/libvirt/libvirt-sock";
/// How many of the domains in the test driver start and stop a second, together.
const CHANGES: u32 = 50;
/// How often a request is repeated to a server that is not there yet.
const AGAIN: Duration = Duration::from_millis(5);
/// How long the start of all guests may take.
const UP_LIMIT: Duration = Duration::from_secs(600);

pub(crate) fn figures() -> Vec<Figure> {
    let own = |id: &str| id.to_owned();
    let rows = [
        ("one.first", "one domain: start to the first fence", Unit::Time, None),
        (
            "thousand.first",
            "1,000 domains: start to the first fence",
            Unit::Time,
            Some((Target::OfOwn(2.0, own("one.first")), "fewer questions to libvirt before the first fence")),
        ),
        (
            "thousand.list",
            "1,000 domains: list, all of fence_xvm",
            Unit::Time,
            Some((Target::OfStock(1.0), "a table that is written faster")),
        ),
        (
            "thousand.memory",
            "1,000 domains: resident memory of each",
            Unit::Memory,
            Some((Target::AtMost(2048.0), "fewer strings for each domain")),
        ),
        ("thousand.off", "1,000 domains: off, p99", Unit::Time, None),
        (
            "thousand.off.beside",
            "1,000 domains, 50 starts and stops/s: off, p99",
            Unit::Time,
            Some((Target::OfOwn(1.5, own("thousand.off")), "events that take less of the daemon's time")),
        ),
    ];
    let figure = |(id, title, unit, target): (&str, &str, Unit, Option<(Target, &'static str)>)| Figure {
        id: id.to_owned(),
        part: Part::Thousand,
        title: title.to_owned(),
        unit,
        targets: target.into_iter().collect(),
    };
    rows.map(figure).into()
}

/// How many domains there are.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    /// QEMU guests, which run.
    pub running: usize,
    /// Domains in the test driver.
    pub others: usize,
}

impl Size {
    /// A thousand domains, of which a fifth runs.
    pub const FULL: Self = Self { running: 200, others: 800 };
    /// As few as show that the bench works.
    pub const QUICK: Self = Self { running: 6, others: 60 };
}

/// A lab with that many domains.
struct Crowd {
    bed: Bed,
    running: Vec<String>,
    /// With the test driver's own.
    count: usize,
}

fn config(bed: &Bed) -> Config {
    Config { uris: vec![qemu::URI.to_owned(), OTHERS.to_owned()], ..Config::new(&bed.key) }
}

/// Long enough that the list is longer than 64 KiB.
fn name(kind: &str, number: usize) -> String {
    format!("{kind}-domain-with-a-name-of-some-length-{number:04}")
}

impl Crowd {
    fn new(daemon: &Which, size: Size) -> Result<(Self, Others)> {
        let bed = Bed::new(daemon.clone())?;
        let running: Vec<_> = (0..size.running).map(|number| name("qemu", number)).collect();
        let others: Vec<_> = (0..size.others).map(|number| name("test", number)).collect();
        let mut lines = Vec::new();
        for name in &running {
            let file = bed.hypervisor.write(&format!("{name}.xml"), Machine::new(name).xml()?.as_bytes())?;
            lines.push(format!("define {file}"));
        }
        virsh(&bed, qemu::URI, &lines)?;
        let mut test = Others::start(&bed)?;
        for (number, name) in others.iter().enumerate() {
            let xml = format!(
                "<domain type='test'><name>{name}</name><uuid>{}</uuid><memory>8192</memory>\
                 <os><type>hvm</type></os></domain>",
                uuid(number)
            );
            test.type_in(&format!("define {}", bed.hypervisor.write(&format!("{name}.xml"), xml.as_bytes())?))?;
        }
        poll_until("all others to be defined", UP_LIMIT, || {
            let listed = bed.libvirtd.virsh(OTHERS, &["list", "--all", "--name"])?.stdout;
            Ok((listed.split_whitespace().count() == others.len() + 1).then_some(()))
        })?;
        let count = running.len() + others.len() + 1;
        Ok((Self { bed, running, count }, test))
    }

    /// Has all guests run.
    fn bring_up(&self) -> Result<()> {
        let running = || -> Result<String> {
            Ok(self.bed.libvirtd.virsh(qemu::URI, &["list", "--name", "--state-running"])?.stdout)
        };
        let is_on = running()?;
        let off: Vec<_> = self.running.iter().filter(|name| !is_on.contains(name.as_str())).collect();
        virsh(&self.bed, qemu::URI, &off.iter().map(|name| format!("start {name}")).collect::<Vec<_>>())?;
        poll_until("all guests to run", UP_LIMIT, || {
            Ok((running()?.lines().filter(|line| !line.trim().is_empty()).count() == self.running.len()).then_some(()))
        })
    }

    /// Starts a server and has it fence a domain as soon as it can.
    fn serve(&self, which: &Which, victim: &str) -> Result<(Server, Duration)> {
        let witness = Witness::of_qemu(&self.bed.hypervisor, victim)?;
        let peer = self.bed.peer()?;
        let begin = Instant::now();
        let mut server = Server::spawn(&self.bed.hypervisor, which, &config(&self.bed), &[])?;
        let answer = caller::ask_every(&peer, Op::Off, victim, START_LIMIT, AGAIN)?;
        let answer = answer.with_context(|| format!("no answer: {}", server.log()))?;
        ensure!(answer.code == 0 && witness.is_dead()?, "off of {victim}: {}: {}", answer.code, server.log());
        // Else it would seem to run already when all are to be brought up again.
        self.bed.libvirtd.wait_state(qemu::URI, victim, "shut off")?;
        server.wait_settled(START_LIMIT)?;
        wait_locked(server.process().id())?;
        Ok((server, answer.replied - begin))
    }

    /// The p99 of an `off` of each of these. A false success is an error.
    fn offs(&self, names: &[String]) -> Result<f64> {
        let mut samples = Samples::default();
        for name in names {
            let (witness, peer) = (Witness::of_qemu(&self.bed.hypervisor, name)?, self.bed.peer()?);
            let answer = caller::ask(&peer, Op::Off, name, PATIENCE)?.context("no callback")?;
            ensure!(answer.code == 0, "off of {name}: the reply is {}", answer.code);
            ensure!(witness.is_dead()?, "FALSE SUCCESS: off of {name} was answered while it lived");
            self.bed.libvirtd.wait_state(qemu::URI, name, "shut off")?;
            samples.push(Sample { value: answer.took().as_secs_f64(), at_least: false });
        }
        Ok(samples.p99().context("nothing to fence")?.value)
    }

    /// All of the stock client's list. A list that lacks a domain of ours is an error.
    fn list(&self, contender: Contender, results: &mut Results) -> Result<()> {
        let answer = Client::new("list", &self.bed.key).run(self.bed.asker.space())?;
        let listed = answer.stdout.lines().count();
        let is_whole = answer.code == Some(0) && listed == self.count;
        ensure!(is_whole || contender == Contender::Stock, "{listed} of {} domains: {:?}", self.count, answer.code);
        results.add("thousand.list", contender, answer.elapsed.as_secs_f64());
        Ok(())
    }
}

/// Has one virsh do all this.
fn virsh(bed: &Bed, uri: &str, lines: &[String]) -> Result<()> {
    // The kernel bounds the length of an argument.
    for some in lines.chunks(100) {
        let mut command = Command::new("virsh");
        command.args(["-q", "-c", uri, &some.join("; ")]);
        run(bed.hypervisor.space(), &mut command, 3 * COMMAND_LIMIT)?.success()?;
    }
    Ok(())
}

/// A virsh at the test driver, which loses its domains with its last client.
struct Others {
    virsh: Child,
    types: Option<ChildStdin>,
}

impl Others {
    fn start(bed: &Bed) -> Result<Self> {
        let mut command = Command::new("virsh");
        command.args(["-q", "-c", OTHERS]).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut virsh = bed.hypervisor.space().spawn(&mut command)?;
        let types = virsh.stdin.take();
        Ok(Self { virsh, types })
    }

    fn type_in(&mut self, line: &str) -> Result<()> {
        writeln!(self.types.as_mut().context("no pipe")?, "{line}").context("virsh has ended")
    }

    /// Starts and stops the first `count` domains.
    fn change(&mut self, over: &AtomicBool, count: usize) -> Result<()> {
        for number in (0..count).cycle() {
            for verb in ["start", "destroy"] {
                if over.load(Ordering::Relaxed) {
                    return Ok(());
                }
                self.type_in(&format!("{verb} {}", name("test", number)))?;
                std::thread::sleep(Duration::from_secs(1) / CHANGES);
            }
        }
        Ok(())
    }
}

impl Drop for Others {
    fn drop(&mut self) {
        // The end of its input ends it.
        drop(self.types.take());
        let _ = self.virsh.wait();
    }
}

/// Measures both servers. The first one is another lab's, with one domain.
pub fn run_round(daemon: &Which, size: Size, times: usize, results: &mut Results) -> Result<()> {
    let (one, others) = Crowd::new(daemon, Size { running: 1, others: 0 })?;
    let mut alone = 0.0;
    for _ in 0..times {
        one.bring_up()?;
        let (mut server, first) = one.serve(daemon, &one.running[0])?;
        results.add("one.first", Contender::Ours, first.as_secs_f64());
        alone = resident(server.process().id())?;
    }
    drop((others, one));
    let (crowd, mut others) = Crowd::new(daemon, size)?;
    for _ in 0..times {
        crowd.bring_up()?;
        let (mut server, first) = crowd.serve(daemon, &crowd.running[0])?;
        results.add("thousand.first", Contender::Ours, first.as_secs_f64());
        let each = (resident(server.process().id())? - alone) / f64::from(u32::try_from(crowd.count)?);
        results.add("thousand.memory", Contender::Ours, each.max(0.0));
        for _ in 0..5 {
            crowd.list(Contender::Ours, results)?;
        }
    }
    crowd.bring_up()?;
    let server = Server::start(&crowd.bed.hypervisor, daemon, &config(&crowd.bed))?;
    let (quiet, beside) = crowd.running.split_at(crowd.running.len() / 2);
    results.add("thousand.off", Contender::Ours, crowd.offs(quiet)?);
    let over = AtomicBool::new(false);
    let took = std::thread::scope(|scope| {
        let churning = scope.spawn(|| others.change(&over, size.others));
        let took = crowd.offs(beside);
        over.store(true, Ordering::Relaxed);
        let churned = churning.join().map_err(|_| anyhow::anyhow!("a thread panicked"))?;
        churned.and(took)
    });
    results.add("thousand.off.beside", Contender::Ours, took.with_context(|| server.log())?);
    drop(server);
    let _stock = Server::start(&crowd.bed.hypervisor, &Which::Stock, &config(&crowd.bed))?;
    for _ in 0..5 * times {
        crowd.list(Contender::Stock, results)?;
    }
    Ok(())
}
