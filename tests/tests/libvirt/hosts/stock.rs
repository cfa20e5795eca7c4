//! What fence_virtd's backend `cpg` does where `fence-daemon` is right: it calls running machines
//! off, hangs, or is deaf.
//!
//! A fence_virtd is sometimes deaf to its group from its start on. So each one is asked first about
//! a machine of its own host, and another one is started if it does not answer.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use fence_lab::client::Client;
use fence_lab::machine::Machine;
use fence_lab::process::{Finished, Process, poll_until};
use fence_lab::qemu;
use fence_lab::server::{Server, Which};
use fence_lab::witness::Witness;
use nix::sys::signal::Signal;

use super::super::group::Speaker;
use super::super::site::SOON;
use super::{Hosts, UUID};

/// The client's own limit in seconds. fence_virtd answers what it answers in a second.
const PATIENCE: u32 = 6;
/// How many of ten fence_virtd may be deaf.
const STARTS: usize = 10;
/// More messages of 1 MB than corosync keeps.
const QUEUE: usize = 8;
/// Where the second daemon of a host listens.
const SECOND_PORT: u16 = 1230;
/// The name of the group, and its name in releases before 2021.
const GROUPS: [&[u8]; 2] = [b"fence-agents\0", b"fence-virt\0\0\0"];
/// Where the modules of such a release are.
const OLD_MODULES: &str = "/run/old-release";
/// Where distributions have fence_virtd's modules.
const MODULES: [&str; 3] =
    ["/usr/lib/x86_64-linux-gnu/fence-virt", "/usr/lib/aarch64-linux-gnu/fence-virt", "/usr/lib64/fence-virt"];

impl Hosts {
    /// Hosts with fence_virtd, each of which hears the group and has a machine of its own.
    fn of_stock(count: u8) -> Result<Self> {
        let mut hosts = Self::with(&Which::Stock, count)?;
        for host in 0..usize::from(count) {
            Machine::new(&ear(host)).start(&hosts.sites[host].libvirtd)?;
            if !hosts.hears(host)? {
                hosts.next_stock(host)?;
            }
        }
        Ok(hosts)
    }

    fn hears(&self, host: usize) -> Result<bool> {
        Ok(self.run(host, "status", &ear(host))?.code == Some(0))
    }

    /// The next fence_virtd of a host, which hears the group. It has had one question.
    fn next_stock(&mut self, host: usize) -> Result<()> {
        for start in 0..STARTS {
            if self.sites[host].server.is_running()? {
                self.sites[host].server.crash()?;
            }
            self.next_daemon(host, &Which::Stock)?;
            if self.hears(host)? {
                return Ok(());
            }
            eprintln!("start {start}: this fence_virtd is deaf");
        }
        bail!("fence_virtd does not hear its group")
    }

    fn client(&self, host: usize, op: &str, domain: &str) -> Client {
        Client::new(op, &self.sites[host].key()).domain(domain).timeout(PATIENCE)
    }

    /// Asks on a host, and judges nothing.
    fn run(&self, host: usize, op: &str, domain: &str) -> Result<Finished> {
        self.client(host, op, domain).run(self.guest(&self.sites[host]))
    }

    /// Begins to ask on a host.
    fn begin(&self, host: usize, op: &str, domain: &str) -> Result<Process> {
        Client::new(op, &self.sites[host].key()).domain(domain).start(self.guest(&self.sites[host]))
    }

    /// fence_virtd says "off" of a machine that runs.
    fn lies(&self, target: &str, machine: &Witness, what: &str) -> Result<()> {
        // Its thread misses a wake-up now and then. Its client has no answer then, and asks again.
        let answered = poll_until("an answer", SOON, || {
            let answer = self.run(0, "off", target)?;
            Ok((answer.elapsed < Duration::from_secs(PATIENCE.into())).then_some(answer))
        });
        let answer = answered.with_context(|| what.to_owned())?;
        ensure!(answer.code == Some(0) && !machine.is_dead()?, "{what}: off of {target}: {answer:?}");
        Ok(())
    }
}

/// Whether fence_virtd does what a test shows. Each of them has some starts: fence_virtd misses a
/// wake-up of its own now and then, says nothing from then on, and shows nothing.
fn shown(by: fn() -> Result<()>) -> Result<()> {
    for start in 0..2 {
        match by() {
            Ok(()) => return Ok(()),
            Err(error) => eprintln!("start {start}: {error:?}"),
        }
    }
    by()
}

/// The machine of each host.
fn ear(host: usize) -> String {
    format!("ear{host}")
}

#[test]
fn stock_calls_running_machines_off() -> Result<()> {
    shown(calls_running_machines_off)
}

fn calls_running_machines_off() -> Result<()> {
    let mut hosts = Hosts::of_stock(2)?;
    Machine::new("vm-b").uuid(UUID).start(&hosts.sites[1].libvirtd)?;
    let machine = hosts.sites[1].machine("vm-b")?;
    for op in ["off", "reboot"] {
        let answer = hosts.run(0, op, "nobody")?;
        ensure!(answer.code == Some(0), "{op} of a name that nobody has: {answer:?}");
    }
    hosts.lies(UUID, &machine, "a UUID, without name_mode")?;
    let list = Client::new("list", &hosts.sites[0].key()).run(hosts.guest(&hosts.sites[0]))?;
    ensure!(list.code == Some(0) && !list.stdout.contains("vm-b"), "the list has another host's machine: {list:?}");

    hosts.ring.partition(&[1])?;
    hosts.ring.wait_members(&[0])?;
    hosts.lies("vm-b", &machine, "a cut network")?;
    hosts.ring.heal()?;
    hosts.ring.wait_members(&[0, 1])?;

    // A rolling upgrade: the other host still has a release of before 2021.
    let old = old_modules()?;
    for (file, content) in old {
        hosts.sites[1].hypervisor.write_mode(&format!("{OLD_MODULES}/{file}"), &content, 0o755)?;
    }
    hosts.sites[1].server.crash()?;
    hosts.sites[1].config.daemon.push(("module_path", OLD_MODULES));
    hosts.next_stock(1)?;
    hosts.lies("vm-b", &machine, "two releases")?;
    hosts.sites[1].config.daemon.clear();

    hosts.sites[1].server.crash()?;
    hosts.lies("vm-b", &machine, "a daemon that is gone")?;
    hosts.next_stock(1)?;

    // Defined on two hosts, as after a migration that left the definition.
    Machine::new("twin").define(&hosts.sites[0].libvirtd)?;
    Machine::new("twin").start(&hosts.sites[1].libvirtd)?;
    let twin = hosts.sites[1].machine("twin")?;
    // The owner is slow, so that the other host's answer comes first, each time.
    hosts.sites[1].libvirtd.signal(Signal::SIGSTOP)?;
    hosts.lies("twin", &twin, "a definition on two hosts")?;
    hosts.sites[1].libvirtd.signal(Signal::SIGCONT)
}

/// The modules of a release that has the group's old name.
fn old_modules() -> Result<Vec<(String, Vec<u8>)>> {
    let folder =
        MODULES.into_iter().find(|folder| PathBuf::from(folder).is_dir()).context("no modules of fence_virtd")?;
    let mut files = Vec::new();
    for file in std::fs::read_dir(folder)? {
        let file = file?;
        let name = file.file_name().into_string().ok().context("a module's name")?;
        let mut content = std::fs::read(file.path())?;
        if name == "cpg.so" {
            let [new, old] = GROUPS;
            let at =
                content.windows(new.len()).position(|window| window == new).context("no group's name in cpg.so")?;
            content[at..at + old.len()].copy_from_slice(old);
        }
        files.push((name, content));
    }
    Ok(files)
}

/// fence_virtd takes the first reply with the number of its question, whosever it is.
#[test]
fn stock_takes_others_replies_for_its_own() -> Result<()> {
    shown(takes_others_replies_for_its_own)
}

fn takes_others_replies_for_its_own() -> Result<()> {
    let mut hosts = Hosts::of_stock(3)?;
    for name in ["vm-b", "vm-c"] {
        Machine::new(name).start(&hosts.sites[1].libvirtd)?;
    }
    let [first, second] = ["vm-b", "vm-c"].map(|name| hosts.sites[1].machine(name));
    // All hear where they run: of an unknown name, the last host says "off" at once.
    for name in ["vm-b", "vm-c"] {
        poll_until(&format!("{name} to be known"), SOON, || {
            Ok((hosts.run(2, "status", name)?.code == Some(0)).then_some(()))
        })?;
    }
    // The owner's word is late in any case.
    hosts.sites[1].libvirtd.signal(Signal::SIGSTOP)?;

    // A daemon asks, dies, and its next life asks its own question of that number.
    hosts.next_stock(0)?;
    hosts.sites[2].server.process().signal(Signal::SIGSTOP)?;
    let former = hosts.begin(0, "off", "nobody")?;
    wait_called_back(&hosts, 0)?;
    hosts.sites[0].server.crash()?;
    former.finish(SOON)?;
    hosts.next_stock(0)?;
    let victim = first?;
    let client = hosts.begin(0, "off", "vm-b")?;
    wait_called_back(&hosts, 0)?;
    hosts.sites[2].server.process().signal(Signal::SIGCONT)?;
    let answer = client.finish(SOON)?;
    ensure!(answer.code == Some(0) && !victim.is_dead()?, "a late reply: {answer:?}");

    // Two daemons of one host count alike.
    let victim = second?;
    for _ in 0..STARTS {
        hosts.next_stock(0)?;
        let Some(other) = second_stock(&hosts, 0)? else { continue };
        let client = hosts.begin(0, "off", "vm-c")?;
        wait_called_back(&hosts, 0)?;
        let nobody = hosts.client(0, "off", "nobody").port(SECOND_PORT).run(hosts.guest(&hosts.sites[0]))?;
        ensure!(nobody.code == Some(0), "off of nobody at the second daemon: {nobody:?}");
        if client.ends_within(SOON)? {
            let answer = client.finish(SOON)?;
            ensure!(answer.code == Some(0) && !victim.is_dead()?, "another daemon's reply: {answer:?}");
            drop(other);
            return Ok(());
        }
    }
    bail!("no daemon has taken another's reply")
}

/// The second fence_virtd of a host, if it hears the group. It has had one question.
fn second_stock(hosts: &Hosts, host: usize) -> Result<Option<Server>> {
    let site = &hosts.sites[host];
    let mut config = site.config.clone();
    config.port = Some(SECOND_PORT);
    let file = site.hypervisor.write("second.conf", config.render().as_bytes())?;
    let pid_file = ["-p", "/run/second.pid"];
    let mut server = Server::spawn_with_file(&site.hypervisor, &Which::Stock, &file, SECOND_PORT, &pid_file)?;
    server.wait_ready(SOON)?;
    let status = hosts.client(host, "status", &ear(host)).port(SECOND_PORT).run(hosts.guest(site))?;
    Ok((status.code == Some(0)).then_some(server))
}

/// Waits until the client on a host has its callback, and its server has put the question.
fn wait_called_back(hosts: &Hosts, host: usize) -> Result<()> {
    let guest = hosts.sites[host].observer.guest();
    poll_until("the callback", SOON, || {
        let sockets = guest.space().must("cat", &["/proc/net/tcp"])?.stdout;
        // Column 4 is the state: 01 is an established connection.
        let is_open = |line: &str| line.split_whitespace().nth(3) == Some("01");
        Ok(sockets.lines().any(is_open).then_some(()))
    })
    .with_context(|| format!("no client waits on host {}", host + 1))?;
    // The exam takes a millisecond; nothing shows that the question is out.
    std::thread::sleep(Duration::from_millis(700));
    Ok(())
}

/// A ring stands still for a second, and corosync's queue is full (`CS_ERR_TRY_AGAIN`). fence_virtd
/// says at once that its own machine cannot be fenced, and does not try.
#[test]
fn stock_gives_up_when_corosync_takes_no_message_for_a_moment() -> Result<()> {
    shown(gives_up_when_corosync_takes_no_message)
}

fn gives_up_when_corosync_takes_no_message() -> Result<()> {
    let mut hosts = Hosts::of_stock(2)?;
    let machine = hosts.sites[0].machine(&ear(0))?;
    let speaker = Speaker::start(&hosts.ring.hosts[0])?;
    speaker.says(0, "members ")?;
    for _ in 0..STARTS {
        hosts.ring.signal(1, Signal::SIGSTOP)?;
        for _ in 0..QUEUE {
            speaker.order("big 1000000")?;
        }
        std::thread::sleep(Duration::from_millis(100));
        let answer = hosts.run(0, "off", &ear(0))?;
        hosts.ring.signal(1, Signal::SIGCONT)?;
        hosts.ring.wait_members(&[0, 1])?;
        eprintln!("off while corosync takes nothing: {answer:?}");
        // A ring that has formed anew meanwhile has taken the question.
        if machine.is_dead()? {
            bail!("the ring has not stood still for long enough");
        }
        if answer.code == Some(1) && answer.elapsed < Duration::from_secs(1) {
            return Ok(());
        }
    }
    bail!("fence_virtd has not given up at once")
}

#[test]
fn stock_hangs_and_stays_deaf() -> Result<()> {
    shown(hangs_and_stays_deaf)
}

fn hangs_and_stays_deaf() -> Result<()> {
    let mut hosts = Hosts::of_stock(2)?;
    Machine::new("vm-b").start(&hosts.sites[1].libvirtd)?;
    // Another host does not answer: this one answers nothing any more, and does not end.
    hosts.sites[1].server.process().signal(Signal::SIGSTOP)?;
    for (op, domain) in [("off", "vm-b"), ("status", "ear0")] {
        let answer = hosts.run(0, op, domain)?;
        ensure!(answer.code != Some(0), "{op} of {domain} beside a host that does not answer: {answer:?}");
    }
    let server = hosts.sites[0].server.process();
    server.signal(Signal::SIGTERM)?;
    ensure!(!server.ends_within(Duration::from_secs(3))?, "it has ended on SIGTERM");
    hosts.sites[1].server.process().signal(Signal::SIGCONT)?;
    hosts.next_stock(0)?;

    // Without a libvirtd of its own it does not hear what others say.
    hosts.sites[0].libvirtd.kill()?;
    let before = hosts.sites[0].server.process().processor_time()?;
    let answer = hosts.run(0, "status", "ear1")?;
    let spent = hosts.sites[0].server.process().processor_time()? - before;
    eprintln!("without libvirtd: {answer:?}, and {spent:?} of processor time");
    ensure!(answer.code != Some(0), "without libvirtd: {answer:?}");
    hosts.sites[0].libvirtd.go_on(qemu::URI)?;
    hosts.next_stock(0)?;

    // corosync restarts: it is never joined again, and monitor says that all is well.
    hosts.ring.kill(0)?;
    hosts.ring.start(0)?;
    hosts.ring.wait_members(&[0, 1])?;
    let status = hosts.run(0, "status", "ear0")?;
    ensure!(status.code == Some(1), "after a restart of corosync: {status:?}");
    let monitor = Client::new("monitor", &hosts.sites[0].key()).run(hosts.guest(&hosts.sites[0]))?;
    ensure!(monitor.code == Some(0), "monitor without a group: {monitor:?}");
    Ok(())
}
