//! The group of hosts alone, on a real corosync: joins, order, losses, and what stands still.

use std::fs::File;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fence_lab::corosync::{HostRing, RingHost};
use fence_lab::lab::Hypervisor;
use fence_lab::process::{Process, poll_until};
use fence_lab::server::{Config, Server, Which};
use nix::sys::signal::Signal;

use super::KEY;
use super::site::SOON;

/// The daemon's part that speaks to the group, without the daemon.
pub(super) struct Speaker {
    process: Process,
    fifo: PathBuf,
}

impl Speaker {
    pub(super) fn start(host: &RingHost) -> Result<Self> {
        Self::on(&host.hypervisor)
    }

    fn on(hypervisor: &Hypervisor) -> Result<Self> {
        let Which::Ours(daemon) = Which::ours()? else { anyhow::bail!("no daemon of ours") };
        let program = daemon.with_file_name("fence-daemon-group");
        ensure!(program.is_file(), "no {}: run `cargo xtask test libvirt`", program.display());
        let fifo = hypervisor.path("commands");
        let outside = hypervisor.outside(&fifo);
        if !outside.exists() {
            hypervisor.space().must("mkfifo", &[&fifo])?;
        }
        let process = Process::start(hypervisor.space(), Command::new(program).arg(&fifo))?;
        Ok(Self { process, fifo: outside })
    }

    /// Starts one on each host, and waits until all hear of each other.
    fn on_all(ring: &HostRing) -> Result<Vec<Self>> {
        let speakers = ring.hosts.iter().map(Self::start).collect::<Result<Vec<_>>>()?;
        for speaker in &speakers {
            speaker.waits_for(0, &members_of(speakers.len()))?;
        }
        Ok(speakers)
    }

    pub(super) fn order(&self, command: &str) -> Result<()> {
        let mut fifo = File::options().write(true).open(&self.fifo).context("the FIFO")?;
        Ok(fifo.write_all(format!("{command}\n").as_bytes())?)
    }

    fn position(&self) -> usize {
        self.process.stdout().lines().len()
    }

    /// Waits for a line from `position` on that `wanted` makes something of.
    fn wait<T>(&self, position: usize, what: &str, wanted: impl Fn(&str) -> Option<T>) -> Result<T> {
        self.process.stdout().wait_for(position, SOON, wanted).with_context(|| {
            format!(
                "no {what}; it said: {}, and logged: {}",
                self.process.stdout().text(),
                self.process.stderr().text()
            )
        })
    }

    /// Waits for a line of this form: the line.
    fn waits_for(&self, position: usize, form: &dyn Fn(&str) -> bool) -> Result<String> {
        self.wait(position, "such line", |line| form(line).then(|| line.to_owned()))
    }

    /// Waits for a line that begins so: its rest.
    pub(super) fn says(&self, position: usize, begin: &str) -> Result<String> {
        self.wait(position, begin, |line| line.strip_prefix(begin).map(str::to_owned))
    }

    /// Sends a message, and waits until it has come back.
    pub(super) fn send(&self, text: &str) -> Result<()> {
        let position = self.position();
        self.order(&format!("send {text}"))?;
        self.waits_for(position, &|line| line.starts_with("message") && line.ends_with(text)).map(drop)
    }

    /// The messages so far, with their senders and without their ages.
    fn messages(&self) -> Vec<String> {
        let message = |line: &String| {
            let (sender, rest) = line.strip_prefix("message ")?.split_once(" age ")?;
            Some(format!("{sender}: {}", rest.split_once(": ")?.1))
        };
        self.process.stdout().lines().iter().filter_map(message).collect()
    }

    /// The bound of a message's age in milliseconds; `None` if it is unknown.
    fn age(&self, position: usize, text: &str) -> Result<Option<u64>> {
        let line = self.waits_for(position, &|line| line.starts_with("message") && line.ends_with(text))?;
        let age = line.split_once(" age ").and_then(|(_, rest)| rest.split_once(':')).context("no age")?.0;
        Ok(age.parse().ok())
    }
}

/// Whether a line says that there are so many members.
fn members_of(count: usize) -> impl Fn(&str) -> bool {
    move |line: &str| {
        let all = line.strip_prefix("members ").map(|rest| rest.split(';').next().unwrap_or_default());
        all.is_some_and(|all| all.split_whitespace().count() == count)
    }
}

#[test]
fn all_hosts_hear_all_messages_in_one_order() -> Result<()> {
    let ring = HostRing::new(3)?;
    let mut speakers = Speaker::on_all(&ring)?;
    for speaker in &speakers {
        ensure!(speaker.says(0, "configured ")? == "1=host1 2=host2 3=host3");
        ensure!(speaker.says(0, "quorum ")? == "true");
    }
    for number in 0..40 {
        for speaker in &speakers {
            speaker.order(&format!("send word{number}"))?;
        }
    }
    poll_until("all messages", SOON, || {
        Ok(speakers.iter().all(|speaker| speaker.messages().len() == 120).then_some(()))
    })?;
    let heard: Vec<_> = speakers.iter().map(Speaker::messages).collect();
    ensure!(heard[0] == heard[1] && heard[1] == heard[2], "the order differs: {heard:?}");

    // A list of many domains is one message.
    let positions: Vec<_> = speakers.iter().map(Speaker::position).collect();
    speakers[0].order("big 512000")?;
    for (speaker, position) in speakers.iter().zip(&positions) {
        speaker.waits_for(*position, &|line| line.ends_with(": 512000 bytes"))?;
    }
    speakers[1].order("big 1000000")?;
    speakers[1].order("big 1000001")?;
    speakers[1].says(positions[1], "not sent after ")?;
    for (speaker, position) in speakers.iter().zip(&positions) {
        speaker.waits_for(*position, &|line| line.ends_with(": 1000000 bytes"))?;
    }
    // Beats bound the age of a message, by about a second each.
    speakers[2].send("young")?;
    let age = speakers[0].age(0, "young")?.context("its age is not known")?;
    ensure!(age < 10_000, "{age} ms");

    // A daemon dies; its host lives.
    let positions: Vec<_> = speakers.iter().map(Speaker::position).collect();
    let mut dead = speakers.remove(1);
    dead.process.signal(Signal::SIGKILL)?;
    for (speaker, position) in speakers.iter().zip([positions[0], positions[2]]) {
        let line = speaker.waits_for(position, &members_of(2))?;
        ensure!(line.ends_with("left: its process or connection ended"), "{line}");
    }
    let next = Speaker::start(&ring.hosts[1])?;
    next.waits_for(0, &members_of(3))?;
    next.send("back")?;
    speakers[0].waits_for(positions[0], &|line| line.ends_with(": back")).map(drop)
}

#[test]
fn a_host_that_is_cut_off_loses_quorum_and_comes_back() -> Result<()> {
    let ring = HostRing::new(3)?;
    let speakers = Speaker::on_all(&ring)?;
    let positions: Vec<_> = speakers.iter().map(Speaker::position).collect();
    ring.partition(&[2])?;
    // While the ring forms again, corosync takes no message at times (CS_ERR_TRY_AGAIN).
    let mut count = 0;
    poll_until("a ring of two", SOON, || {
        speakers[0].order(&format!("send {count} meanwhile"))?;
        count += 1;
        Ok(speakers[0].process.stdout().lines()[positions[0]..].iter().any(|line| members_of(2)(line)).then_some(()))
    })?;
    for speaker in &speakers[..2] {
        speaker.waits_for(0, &|line| line.ends_with(&format!(": {} meanwhile", count - 1)))?;
        let heard = speaker.messages().into_iter().filter(|message| message.ends_with("meanwhile"));
        let heard: Vec<_> =
            heard.filter_map(|message| message.split_once(": ").map(|(_, text)| text.to_owned())).collect();
        let sent: Vec<_> = (0..count).map(|number| format!("{number} meanwhile")).collect();
        ensure!(heard == sent, "of {count} messages these came: {heard:?}");
    }
    speakers[2].waits_for(positions[2], &members_of(1))?;
    ensure!(speakers[2].says(positions[2], "quorum ")? == "false");
    let line = speakers[0].waits_for(positions[0], &members_of(2))?;
    ensure!(line.ends_with("left: its host is lost or cut off"), "{line}");
    speakers[0].send("here")?;
    speakers[2].send("there")?;
    ensure!(!speakers[0].messages().iter().any(|message| message.ends_with("there")));

    let positions: Vec<_> = speakers.iter().map(Speaker::position).collect();
    ring.heal()?;
    for (speaker, position) in speakers.iter().zip(&positions) {
        speaker.waits_for(*position, &members_of(3))?;
    }
    ensure!(speakers[2].says(positions[2], "quorum ")? == "true");
    // Nothing of the other side's messages comes after all.
    speakers[2].send("again")?;
    speakers[0].waits_for(positions[0], &|line| line.ends_with(": again"))?;
    ensure!(!speakers[0].messages().iter().any(|message| message.ends_with("there")));
    ensure!(!speakers[2].messages().iter().any(|message| message.ends_with(": here")));
    poll_until("a message of known age", SOON, || {
        let position = speakers[0].position();
        speakers[2].send("timed")?;
        Ok(speakers[0].age(position, "timed")?.map(drop))
    })
}

#[test]
fn corosync_comes_late_and_restarts() -> Result<()> {
    let mut ring = HostRing::silent(2)?;
    let early = Speaker::start(&ring.hosts[0])?;
    let why = early.says(0, "lost: ")?;
    ensure!(why.contains("corosync does not run"), "{why}");
    early.order("send nobody")?;
    let why = early.says(0, "not sent after ")?;
    ensure!(why.contains("not connected"), "{why}");
    ring.start(0)?;
    ring.start(1)?;
    early.says(0, "joined ")?;
    ensure!(early.says(0, "quorum ")? == "true");
    let other = Speaker::start(&ring.hosts[1])?;
    other.waits_for(0, &members_of(2))?;

    for _ in 0..2 {
        let positions = [early.position(), other.position()];
        ring.kill(0)?;
        early.says(positions[0], "lost: ")?;
        other.waits_for(positions[1], &members_of(1))?;
        let positions = [early.position(), other.position()];
        ring.start(0)?;
        early.says(positions[0], "joined ")?;
        early.waits_for(positions[0], &members_of(2))?;
        other.waits_for(positions[1], &members_of(2))?;
        early.send("hello again")?;
    }
    // Once for the beginning, and once for each outage.
    let said = early.process.stdout().text();
    ensure!(said.matches("lost: ").count() == 3, "{said}");
    let logged = early.process.stderr().text();
    ensure!(logged.matches("the other hosts cannot be asked").count() <= 4, "{logged}");
    Ok(())
}

#[test]
fn what_stood_still_is_known_to_be_old() -> Result<()> {
    let mut ring = HostRing::new(2)?;
    let mut speakers = Speaker::on_all(&ring)?;
    speakers[1].send("first")?;
    // The daemon is stopped, as by swapping: a message waits for it.
    let position = speakers[0].position();
    speakers[0].process.signal(Signal::SIGSTOP)?;
    speakers[1].send("waits")?;
    std::thread::sleep(Duration::from_secs(4));
    speakers[0].process.signal(Signal::SIGCONT)?;
    let age = speakers[0].age(position, "waits")?;
    ensure!(age.is_none_or(|age| age >= 3900), "a message that waited for 4 s is called {age:?} ms old");
    let took = speakers[0].says(position, "stalled ")?;
    ensure!(took.trim_end_matches(" ms").parse::<u64>()? > 2000, "{took}");

    // corosync is stopped: calls hang, and nobody waits for them.
    let position = speakers[0].position();
    ring.signal(0, Signal::SIGSTOP)?;
    // corosync takes it when it goes on.
    speakers[0].order("send hung")?;
    let why = speakers[0].says(position, "lost: ")?;
    ensure!(why.contains("did not answer"), "{why}");
    let position = speakers[0].position();
    ring.signal(0, Signal::SIGCONT)?;
    speakers[0].says(position, "joined ")?;
    speakers[0].waits_for(position, &members_of(2))?;
    // The event of the loss came once, although the thread came back.
    ensure!(!speakers[0].process.stdout().lines()[position..].iter().any(|line| line.starts_with("lost: ")));
    speakers[0].send("well")?;
    speakers[1].waits_for(0, &|line| line.ends_with(": well"))?;
    // Each host that hears the message that hung knows that it is old.
    for speaker in &speakers {
        if speaker.process.stdout().lines().iter().any(|line| line.ends_with(": hung")) {
            let age = speaker.age(0, "hung")?;
            ensure!(age.is_none_or(|age| age >= 4900), "a message that hung for 5 s is called {age:?} ms old");
        }
    }
    Ok(())
}

/// The configuration of stock's server with its backend cpg.
pub(super) fn stock_conf(key: &str, uri: &str, name_mode: &str) -> String {
    format!(
        "fence_virtd {{\n\tlistener = \"multicast\";\n\tbackend = \"cpg\";\n}}\n\
         listeners {{\n\tmulticast {{\n\t\tinterface = \"virbr0\";\n\t\tkey_file = \"{key}\";\n\t}}\n}}\n\
         backends {{\n\tcpg {{\n\t\turi = \"{uri}\";\n{name_mode}\t}}\n}}\n"
    )
}

#[test]
fn stocks_members_are_seen_and_not_joined() -> Result<()> {
    let ring = HostRing::new(2)?;
    let speakers = Speaker::on_all(&ring)?;
    let host = &ring.hosts[1].hypervisor;
    let key = host.write("fence.key", &KEY)?;
    let file = host.write("stock.conf", stock_conf(&key, "test:///default", "").as_bytes())?;
    let port = Config::new(&key).port.unwrap_or(1229);
    let mut stock = Server::spawn_with_file(host, &Which::Stock, &file, port, &[])?;
    for speaker in &speakers {
        let members = speaker.says(0, "stock ")?;
        ensure!(members.starts_with("2:") && !members.contains(' '), "{members}");
        let says = "fence_virtd runs with backend cpg";
        poll_until("the log's line", SOON, || Ok(speaker.process.stderr().text().contains(says).then_some(())))?;
        let logged = speaker.process.stderr().text();
        ensure!(logged.matches(says).count() == 1, "{logged}");
    }
    let positions: Vec<_> = speakers.iter().map(Speaker::position).collect();
    stock.crash()?;
    for (speaker, position) in speakers.iter().zip(positions) {
        ensure!(speaker.says(position, "stock")?.trim().is_empty());
    }
    Ok(())
}

#[test]
fn a_host_without_corosyncs_libraries_says_so() -> Result<()> {
    let ring = HostRing::new(2)?;
    let space = ring.hosts[0].hypervisor.space();
    let hide =
        "for file in $(ldconfig -p | sed -n 's/.*libcmap.so.4 .*=> //p'); do mount --bind /dev/null \"$file\"; done";
    space.must("sh", &["-c", hide])?;
    let speaker = Speaker::start(&ring.hosts[0])?;
    let why = speaker.says(0, "lost: ")?;
    ensure!(why.contains("libraries cannot be loaded") && why.contains("libcmap"), "{why}");
    let show = "for file in $(ldconfig -p | sed -n 's/.*libcmap.so.4 .*=> //p'); do umount \"$file\"; done";
    space.must("sh", &["-c", show])?;
    speaker.says(0, "joined ").map(drop)
}

#[test]
fn the_configured_hosts_and_the_votes_are_corosyncs() -> Result<()> {
    let mut ring = HostRing::new(2)?;
    let speaker = Speaker::start(&ring.hosts[0])?;
    ensure!(speaker.says(0, "configured ")? == "1=host1 2=host2");
    let more = "    node {\n        nodeid: 7\n        name: host7\n        ring0_addr: 10.88.0.7\n    }\n}\nsystem {";
    let conf = ring.conf();
    ring.configure(&conf.replace("}\nsystem {", more))?;
    let position = speaker.position();
    ring.reload(0)?;
    ensure!(speaker.says(position, "configured ")? == "1=host1 2=host2 7=host7");

    // Nobody counts votes: corosync calls that quorate.
    ring.configure(&conf.replace("provider: corosync_votequorum", ""))?;
    let position = speaker.position();
    ring.kill(0)?;
    ring.kill(1)?;
    ring.start(0)?;
    speaker.says(position, "joined ")?;
    ensure!(speaker.says(position, "quorum ")? == "false");
    // The log comes by a pipe of its own.
    let logs = || speaker.process.stderr().text().contains("has no quorum provider").then_some(());
    poll_until("the reason in the log", SOON, || Ok(logs()))
}
