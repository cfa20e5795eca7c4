//! A scene: one configuration, some domains, and cases that are played to the stock server and then
//! to ours.
//!
//! What a case brings out is text, and compared verbatim. It has everything that a client can see
//! (each reply to the byte, an exit code, printed lines, that nobody called back), call-backs that
//! nobody asked for, and the state that the server's own host list gives for the case's domain when
//! all is over.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use fence_common::sync::{lock, unpoisoned};
use fence_common::wire::Op;
use fence_lab::lab::{Guest, Hypervisor};
use fence_lab::libvirtd::Libvirtd;
use fence_lab::peer::Peer;
use fence_lab::qemu;
use fence_lab::server::{Config, Server, Which};
use fence_lab::testdriver::{self, State, TestDomain};

use crate::report::{self, Compared};
use crate::talk;

/// How long nothing may come after the last answer before it is called silence.
const QUIET: Duration = Duration::from_millis(400);
/// How long a domain may take to get into its state after the reply: ours answers a reboot when off
/// is proven.
const SETTLED_WITHIN: Duration = Duration::from_secs(15);

/// What is to come out of a case.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Expected {
    /// The same from both servers, as the stock one has it.
    Same,
    /// This from both.
    Both(String),
    /// A difference on purpose, with what exactly comes out of each.
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

/// What a case does. Clients that it leaves in the list are watched until the scene ends: who calls
/// them back then is told.
type Script = Box<dyn Fn(&Stage, &mut Vec<Peer>) -> Result<String> + Send + Sync>;

/// One scripted request, or a few that belong together.
pub(crate) struct Case {
    pub(crate) name: String,
    pub(crate) expected: Expected,
    /// The domain whose state afterwards counts.
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

    /// Looks at this domain's state when all is over.
    pub(crate) fn and_state_of(self, domain: impl Into<String>) -> Self {
        Self { domain: Some(domain.into()), ..self }
    }
}

/// Where cases are played.
pub(crate) struct Stage {
    pub(crate) hypervisor: Hypervisor,
    /// Guest number 1 is the first. The last one belongs to the scene: it asks for the list at the
    /// end.
    pub(crate) guests: Vec<Guest>,
    pub(crate) config: Config,
    pub(crate) server: Server,
    /// The stock client listens on one port: one at a time in a guest.
    clients: Vec<Mutex<()>>,
    /// Where there are real machines.
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

    /// Whether this is the stock server's turn.
    pub(crate) fn is_stock(&self) -> bool {
        *self.server.which() == Which::Stock
    }

    pub(crate) fn guest(&self, number: usize) -> Result<&Guest> {
        self.guests.get(number.wrapping_sub(1)).with_context(|| format!("no guest {number}"))
    }

    /// The right to run a stock client in guest `number`.
    pub(crate) fn client_of(&self, number: usize) -> Result<MutexGuard<'_, ()>> {
        let mutex = self.clients.get(number.wrapping_sub(1)).with_context(|| format!("no guest {number}"))?;
        Ok(lock(mutex))
    }

    /// The states of all domains: by virsh where a libvirtd knows them, else by the server's own
    /// host list.
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
        let mut call = peer.ask(Op::HostList, "")?;
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
    /// How many guests there are, the scene's own included.
    pub(crate) guests: u8,
    /// How many cases are played at the same time. To the stock server one: it does one thing at a
    /// time, and what waits there for ten seconds is not known as a copy any more and is done
    /// again.
    pub(crate) at_once: usize,
    /// Changes the usual configuration, whose `uri` is the file with the domains.
    pub(crate) configure: Configure,
    /// Real machines, under a real libvirtd, instead of domains of the test driver.
    pub(crate) machines: Vec<(String, State)>,
    /// Prepares the lab, before the server is started.
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

    /// Plays all cases to both servers and compares.
    ///
    /// # Errors
    /// The lab or a server could not be had. What differs is no error here: it is in what comes
    /// back.
    pub(crate) fn play(&self) -> Result<Vec<Compared>> {
        let names: BTreeMap<_, _> = self.cases.iter().map(|case| (&case.name, ())).collect();
        ensure!(names.len() == self.cases.len(), "two cases of {} have one name", self.name);
        let stock = self.play_to(&Which::Stock, None)?;
        let wanted: Vec<_> = self.cases.iter().zip(&stock.results).map(|(case, stock)| wanted(case, stock)).collect();
        let ours = self.play_to(&Which::ours()?, Some(&wanted))?;
        Ok(report::compare(&self.name, &self.cases, &stock, &ours))
    }

    /// Plays all cases to one server. `wanted` is what is waited for in the end, some seconds at
    /// most.
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
        // A stock server is seen to listen a moment before it is a member of the group: what cases
        // send once must not be lost.
        talk::conversation(&mut stage.peer(stage.guests.len())?.ask(Op::Null, "")?, stage.config.auth)?;
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
                text.push_str(&format!("; {more} more call-backs"));
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

    /// Runs the scripts, some at once.
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

/// What came out of all cases of a scene with one server.
pub(crate) struct Played {
    pub(crate) results: Vec<String>,
    pub(crate) log: String,
}

/// What ours is to bring out.
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

/// How many call-backs wait at a client that did not ask for any more. Each is talked to, or a
/// stock server would wait.
fn unasked(peer: &Peer, stage: &Stage) -> usize {
    let mut count = 0;
    while let Ok(Some(mut call)) = peer.called_back(Duration::ZERO) {
        // What is said there is not asked for either.
        let _ = talk::conversation(&mut call, stage.config.auth);
        count += 1;
    }
    count
}
