//! A scene: one configuration, some domains, and cases that run against fence_virtd and then
//! against our daemon.
//!
//! The result of a case is text, and compared verbatim. It has everything that a client sees:
//! each reply to the byte, exit codes, printed lines, missing and unexpected callbacks. It ends
//! with the final state of the case's domain, from the server's own host list.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use fence_common::sync::{lock, unpoisoned};
use fence_common::wire::{DEFAULT_PORT, Op};
use fence_lab::lab::{Guest, HYPERVISOR_V4, Hypervisor};
use fence_lab::libvirtd::Libvirtd;
use fence_lab::peer::{CallBack, Peer};
use fence_lab::qemu;
use fence_lab::server::{Config, Server, Which};
use fence_lab::testdriver::{self, State, TestDomain};
use zerocopy::IntoBytes;

use crate::report::{self, Compared};
use crate::talk;

/// The time without an answer that counts as silence.
const QUIET: Duration = Duration::from_millis(400);
/// How long a domain may take to reach its state after the reply: our daemon answers a reboot once
/// the domain is off.
const SETTLED_WITHIN: Duration = Duration::from_secs(15);

/// The expected result of a case.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Expected {
    /// The same from both servers, whatever fence_virtd answers.
    Same,
    /// This text from both servers.
    Both(String),
    /// A deliberate difference, with each server's exact result.
    Differ {
        /// The row in docs/reference/compatibility.md.
        id: &'static str,
        stock: String,
        ours: String,
    },
}

impl Expected {
    pub(crate) fn both(text: impl Into<String>) -> Self {
        Self::Both(text.into())
    }

    pub(crate) fn differ(id: &'static str, stock: impl Into<String>, ours: impl Into<String>) -> Self {
        Self::Differ { id, stock: stock.into(), ours: ours.into() }
    }
}

/// The script of a case. Clients that it puts into the list are watched until the scene ends: a
/// late callback to them becomes part of the result.
type Script = Box<dyn Fn(&Stage, &mut Vec<Peer>) -> Result<String> + Send + Sync>;

/// One scripted request, or a few related ones.
pub(crate) struct Case {
    pub(crate) name: String,
    pub(crate) expected: Expected,
    /// The domain whose final state is part of the result.
    pub(crate) domain: Option<String>,
    script: Script,
}

impl Case {
    pub(crate) fn new(
        name: impl Into<String>,
        expected: Expected,
        script: impl Fn(&Stage, &mut Vec<Peer>) -> Result<String> + Send + Sync + 'static,
    ) -> Self {
        Self { name: name.into(), expected, domain: None, script: Box::new(script) }
    }

    /// Adds the final state of this domain to the result.
    pub(crate) fn and_state_of(self, domain: impl Into<String>) -> Self {
        Self { domain: Some(domain.into()), ..self }
    }
}

/// The lab in which cases run.
pub(crate) struct Stage {
    pub(crate) hypervisor: Hypervisor,
    /// Guest number 1 is the first. The last one belongs to the scene and requests the final list.
    pub(crate) guests: Vec<Guest>,
    pub(crate) config: Config,
    pub(crate) server: Server,
    /// One stock client at a time in a guest, as it listens on one port.
    clients: Vec<Mutex<()>>,
    /// The libvirtd of a scene with real machines.
    libvirtd: Option<Libvirtd>,
}

impl Stage {
    /// Kills libvirtd. Its machines run on.
    pub(crate) fn kill_libvirtd(&self) -> Result<()> {
        let kill = "kill -KILL $(cat /run/libvirtd.pid)";
        self.hypervisor.space().must("sh", &["-c", kill]).map(drop)
    }

    /// A client with this lab's key and the configuration's digests and family, in guest `number`
    /// (1 is the first).
    pub(crate) fn peer(&self, number: usize) -> Result<Peer> {
        let guest = self.guest(number)?;
        let peer = Peer::new(guest, &talk::key(), self.config.family)?;
        Ok(peer.with_digests(self.config.hash, self.config.auth))
    }

    /// The conversation that this client's request leads to: its callback, or over a connection of
    /// its own if the server listens at tcp.
    pub(crate) fn call(&self, peer: &Peer, number: usize, op: Op, domain: &str) -> Result<CallBack> {
        if self.config.tcp.is_none() {
            return peer.ask(op, domain);
        }
        let request = peer.sign(peer.stream_request(op, domain)?)?;
        self.connected(peer, number, request.as_bytes())
    }

    /// A connection by tcp from guest `number`, over which these bytes were sent.
    pub(crate) fn connected(&self, peer: &Peer, number: usize, bytes: &[u8]) -> Result<CallBack> {
        let host = SocketAddr::from((HYPERVISOR_V4, DEFAULT_PORT));
        let mut connection = peer.connect(self.guest(number)?.space(), host)?;
        connection.write(bytes)?;
        Ok(connection)
    }

    /// Whether fence_virtd is under test.
    pub(crate) fn is_stock(&self) -> bool {
        *self.server.which() == Which::Stock
    }

    pub(crate) fn guest(&self, number: usize) -> Result<&Guest> {
        self.guests.get(number.wrapping_sub(1)).with_context(|| format!("no guest {number}"))
    }

    /// Exclusive use of the stock client in guest `number`.
    pub(crate) fn client_of(&self, number: usize) -> Result<MutexGuard<'_, ()>> {
        let mutex = self.clients.get(number.wrapping_sub(1)).with_context(|| format!("no guest {number}"))?;
        Ok(lock(mutex))
    }

    /// The states of all domains, from virsh where there is a libvirtd, else from the server's host
    /// list.
    fn states(&self) -> Result<BTreeMap<String, String>> {
        if let Some(libvirtd) = &self.libvirtd {
            let listed = libvirtd.virsh(qemu::URI, &["list", "--all"])?.stdout;
            let rows = listed.lines().filter_map(|line| {
                let mut words = line.split_whitespace().skip(1);
                let name = words.next()?.to_owned();
                Some((name, words.collect::<Vec<_>>().join(" ").replace("shut off", State::ShutOff.name())))
            });
            return Ok(rows.collect());
        }
        let peer = self.peer(self.guests.len())?;
        let mut call = self.call(&peer, self.guests.len(), Op::HostList, "")?;
        let said = talk::conversation(&mut call, self.config.auth)?;
        let list = talk::HostList::parse(&said, !self.is_stock())
            .with_context(|| format!("no host list: {}", talk::described(&said)))?;
        let named =
            |number: u8| State::from_number(number).map_or_else(|| number.to_string(), |state| state.name().to_owned());
        Ok(list.records.into_iter().map(|record| (record.name, named(record.state))).collect())
    }
}

type Configure = Box<dyn Fn(&mut Config, &[Guest]) + Send + Sync>;
type Prepare = Box<dyn Fn(&Hypervisor, &[Guest]) -> Result<()> + Send + Sync>;

/// Cases that share a configuration.
pub(crate) struct Scene {
    pub(crate) name: String,
    pub(crate) cases: Vec<Case>,
    pub(crate) domains: Vec<TestDomain>,
    /// The number of guests, the scene's own included.
    pub(crate) guests: u8,
    /// The number of cases that run at the same time. For fence_virtd it is one: it serves one
    /// request at a time. A request that waits there for ten seconds leaves its replay cache, and
    /// is carried out again.
    pub(crate) at_once: usize,
    /// Changes the usual configuration, whose `uri` is the file with the domains.
    pub(crate) configure: Configure,
    /// Real machines under a real libvirtd, instead of domains of the test driver.
    pub(crate) machines: Vec<(String, State)>,
    /// Prepares the lab before the server starts.
    pub(crate) prepare: Prepare,
}

impl Scene {
    /// A scene with two guests and the usual configuration.
    pub(crate) fn new(name: impl Into<String>, domains: Vec<TestDomain>, cases: Vec<Case>) -> Self {
        let (configure, prepare) = (Box::new(|_: &mut Config, _: &[Guest]| ()), Box::new(|_: &_, _: &_| Ok(())));
        Self { name: name.into(), cases, domains, guests: 2, at_once: 16, configure, machines: Vec::new(), prepare }
    }

    pub(crate) fn configured(self, configure: impl Fn(&mut Config, &[Guest]) + Send + Sync + 'static) -> Self {
        Self { configure: Box::new(configure), ..self }
    }

    pub(crate) fn prepared(
        self,
        prepare: impl Fn(&Hypervisor, &[Guest]) -> Result<()> + Send + Sync + 'static,
    ) -> Self {
        Self { prepare: Box::new(prepare), ..self }
    }

    /// Runs all cases against both servers and compares the results.
    ///
    /// # Errors
    /// The lab or a server could not be started. Differences are no error here: they are in the
    /// result.
    pub(crate) fn play(&self) -> Result<Vec<Compared>> {
        let names: BTreeMap<_, _> = self.cases.iter().map(|case| (&case.name, ())).collect();
        ensure!(names.len() == self.cases.len(), "two cases of {} have one name", self.name);
        let stock = self.play_to(&Which::Stock, None)?;
        let wanted: Vec<_> = self.cases.iter().zip(&stock.results).map(|(case, stock)| wanted(case, stock)).collect();
        let ours = self.play_to(&Which::ours()?, Some(&wanted))?;
        Ok(report::compare(&self.name, &self.cases, &stock, &ours))
    }

    /// Runs all cases against one server. At the end it waits some seconds at most for `wanted`.
    fn play_to(&self, which: &Which, wanted: Option<&[String]>) -> Result<Played> {
        let hypervisor = Hypervisor::new()?;
        let guests: Vec<_> = (1..=self.guests).map(|number| hypervisor.guest(number)).collect::<Result<_>>()?;
        let key = hypervisor.write("fence.key", &talk::key())?;
        let node = hypervisor.write("node.xml", testdriver::node(&self.domains).as_bytes())?;
        (self.prepare)(&hypervisor, &guests)?;
        let mut config = Config { uris: vec![format!("test://{node}")], ..Config::new(&key) };
        let libvirtd = if self.machines.is_empty() {
            None
        } else {
            config.uris = vec![qemu::URI.to_owned()];
            Some(machines(&hypervisor, &self.machines)?)
        };
        (self.configure)(&mut config, &guests);
        let server = Server::start(&hypervisor, which, &config)?;
        let clients = guests.iter().map(|_| Mutex::new(())).collect();
        let mut stage = Stage { hypervisor, guests, config, server, clients, libvirtd };
        // fence_virtd listens a moment before it joins the group. Cases that send only once must
        // not lose their request.
        let last = stage.guests.len();
        let mut call = stage.call(&stage.peer(last)?, last, Op::Null, "")?;
        talk::conversation(&mut call, stage.config.auth)?;
        let results = self.results(&stage, wanted)?;
        let log = stage.server.log();
        ensure!(stage.server.is_running()?, "{}: {} has ended: {log}", self.name, which.name());
        Ok(Played { results, log })
    }

    fn results(&self, stage: &Stage, wanted: Option<&[String]>) -> Result<Vec<String>> {
        let mut seen = self.run(stage);
        std::thread::sleep(QUIET);
        for (text, watched) in &mut seen {
            let more: usize = watched.iter().map(|peer| unasked(peer, stage)).sum();
            if more > 0 {
                text.push_str(&format!("; {more} more callbacks"));
            }
        }
        let deadline = Instant::now() + SETTLED_WITHIN;
        loop {
            let states = if self.cases.iter().any(|case| case.domain.is_some()) { Some(stage.states()?) } else { None };
            let finish = |((text, _), case): (&(String, Vec<Peer>), &Case)| match (&case.domain, &states) {
                (Some(domain), Some(states)) => {
                    format!("{text}, then {}", states.get(domain).map_or("unknown", String::as_str))
                }
                _ => text.clone(),
            };
            let results: Vec<_> = seen.iter().zip(&self.cases).map(finish).collect();
            let settled = wanted.is_none_or(|wanted| results.iter().zip(wanted).all(|(is, should)| is == should));
            if settled || Instant::now() > deadline {
                return Ok(results);
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// Runs the scripts, some of them at once.
    fn run(&self, stage: &Stage) -> Vec<(String, Vec<Peer>)> {
        let next = AtomicUsize::new(0);
        let done: Mutex<BTreeMap<usize, (String, Vec<Peer>)>> = Mutex::default();
        let work = || {
            while let Some((index, case)) = self.cases.iter().enumerate().nth(next.fetch_add(1, Ordering::Relaxed)) {
                let mut watched = Vec::new();
                let played = catch_unwind(AssertUnwindSafe(|| (case.script)(stage, &mut watched)))
                    .unwrap_or_else(|_| Err(anyhow!("the case panicked")));
                let text = played.unwrap_or_else(|error| format!("{error:#}"));
                lock(&done).insert(index, (text, watched));
            }
        };
        let at_once = if stage.is_stock() { 1 } else { self.at_once.min(self.cases.len()) };
        std::thread::scope(|scope| {
            for _ in 0..at_once {
                scope.spawn(work);
            }
        });
        unpoisoned(done.into_inner()).into_values().collect()
    }
}

/// One server's results of all cases of a scene.
pub(crate) struct Played {
    pub(crate) results: Vec<String>,
    pub(crate) log: String,
}

/// The expected result of our daemon.
fn wanted(case: &Case, stock: &str) -> String {
    match &case.expected {
        Expected::Same => stock.to_owned(),
        Expected::Both(text) => text.clone(),
        Expected::Differ { ours, .. } => ours.clone(),
    }
}

/// A libvirtd with these machines.
fn machines(hypervisor: &Hypervisor, machines: &[(String, State)]) -> Result<Libvirtd> {
    let libvirtd = Libvirtd::start(hypervisor)?;
    for (name, state) in machines {
        qemu::define_idle(&libvirtd, name)?;
        if *state != State::ShutOff {
            libvirtd.start_domain(qemu::URI, name)?;
        }
        if *state == State::Paused {
            libvirtd.virsh(qemu::URI, &["suspend", name])?;
        }
    }
    Ok(libvirtd)
}

/// How many callbacks wait at a client that did not ask for any more. Each is talked to, or a
/// stock server would wait.
fn unasked(peer: &Peer, stage: &Stage) -> usize {
    let mut count = 0;
    while let Ok(Some(mut call)) = peer.called_back(Duration::ZERO) {
        // An unexpected callback's contents do not count either.
        let _ = talk::conversation(&mut call, stage.config.auth);
        count += 1;
    }
    count
}
