//! Runs the commands of `docs/guide/firewall.md`, and shows the effect of each missing rule. Runs
//! those of `docs/guide/ways-in.md` on the same machines.

use std::net::Ipv4Addr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fence_lab::cluster::corosync::{KEY_PATH, Member, plain};
use fence_lab::cluster::lab::KEY;
use fence_lab::cluster::node::Node;
use fence_lab::guide::stage::{HYPERVISOR, Stage};
use fence_lab::guide::{Act, Guide};
use fence_lab::lab::Hypervisor;
use fence_lab::libvirtd::Libvirtd;
use fence_lab::process::poll_until;
use fence_lab::qemu::{self, Extras, LinuxGuest};
use fence_lab::server::{Config, Which};
use fence_lab::systemd::Booted;
use fence_lab::tools;

use super::bring_zone;

const PAGE: &str = "firewall.md";
/// The page that these machines are for as well.
pub(crate) const WAYS_IN: &str = "ways-in.md";
const GUEST: &str = "node1";
/// The node of a cluster on that page. Its commands are typed in [`crate::tcp`].
pub(crate) const CLUSTER_NODE: &str = "alpha";
/// A QEMU guest on that page, with a serial port of its own, and its victim.
const QEMU_GUEST: &str = "web1";
const QEMU_VICTIM: &str = "web2";
/// A QEMU guest with a vsock on that page, and its hypervisor. The set `kernels` has them.
const VSOCK_GUEST: &str = "web-one";
const VSOCK_HOST: &str = "host1";
/// A node of a cluster of QEMU guests with serial ports. Its commands are typed in
/// [`crate::serial`].
pub(crate) const LINE_NODE: &str = "gamma";
/// All machines of these pages.
pub(crate) const PLACES: [&str; 7] = [HYPERVISOR, GUEST, CLUSTER_NODE, QEMU_GUEST, VSOCK_GUEST, VSOCK_HOST, LINE_NODE];
/// How long an operation of seconds may take on a loaded machine.
const SOON: Duration = Duration::from_secs(60);
/// A part that all rules for fencing have, and no other rule.
const PORT: &str = "1229";

struct Walls {
    /// The node that runs the guest.
    libvirtd: Libvirtd,
    stage: Stage,
    guide: Guide,
    /// Whether the kernel program is attached, which gets requests before the hypervisor's
    /// firewall.
    is_attached: bool,
}

impl Walls {
    /// The daemon runs as a systemd unit, and the guest is a container.
    fn new(page: &str, attach: &'static str) -> Result<Self> {
        let booted = Booted::start(&Hypervisor::new()?, HYPERVISOR, &[])?;
        let hypervisor = booted.hypervisor().clone();
        let libvirtd = Libvirtd::start(&hypervisor)?;
        let mut stage = Stage::new(booted);
        bring_zone(&stage)?;
        let address = Ipv4Addr::new(192, 168, 122, 11);
        let me = Member { name: GUEST.to_owned(), address, domain: GUEST.to_owned() };
        let guest = Node::define(&libvirtd, &me, &plain(std::slice::from_ref(&me), &me, &KEY))?;
        guest.start(&libvirtd)?;
        guest.wait_up()?;
        stage.add_container(GUEST, &hypervisor, GUEST);

        let unit = std::fs::read(tools::workspace().join("dist/fence-daemon.service"))?;
        let config = Config { attach: Some(attach), ..Config::new(KEY_PATH) };
        for (place, content) in Which::ours()?.executables()? {
            stage.install(HYPERVISOR, place, &content)?;
        }
        stage.write(HYPERVISOR, "/etc/systemd/system/fence-daemon.service", &unit)?;
        stage.write(HYPERVISOR, KEY_PATH, &KEY)?;
        stage.write(HYPERVISOR, "/etc/fence_virt.conf", config.render().as_bytes())?;
        let guide = Guide::read(page, &PLACES)?;
        let walls = Self { libvirtd, stage, guide, is_attached: attach != "off" };
        walls.must(HYPERVISOR, "systemctl start fence-daemon")?;
        if walls.is_attached {
            walls.logged(0, "the kernel program is attached")?;
        }
        Ok(walls)
    }

    /// Checks whether the guest gets its list.
    fn expect(&self, is_heard: bool, when: &str) -> Result<()> {
        // A short time limit where no answer is expected.
        let line = if is_heard { "fence_xvm -o list" } else { "fence_xvm -o list -t 3" };
        let answer = self.stage.shell(GUEST, "root", line)?;
        let got = answer.code == Some(0) && answer.stdout.contains("test");
        ensure!(got == is_heard, "{when}: {answer:?}; the daemon: {:#?}", self.log());
        Ok(())
    }

    fn must(&self, place: &str, line: &str) -> Result<()> {
        self.stage.shell(place, "root", line)?.success().with_context(|| format!("{place}# {line}")).map(drop)
    }

    /// Loads the page's rules of a machine, with or without the rules for fencing.
    fn load(&self, place: &str, for_fencing: bool) -> Result<()> {
        const FILE: &str = "/etc/nftables.conf";
        let rules = self.guide.file(place, FILE).with_context(|| format!("no rules of {place} in {PAGE}"))?;
        let of_fencing = rules.lines().filter(|line| line.contains(PORT)).count();
        ensure!(of_fencing == 1, "{of_fencing} rules for fencing on {place}");
        let chosen: Vec<_> = rules.lines().filter(|line| for_fencing || !line.contains(PORT)).collect();
        self.stage.write(place, "/tmp/rules", format!("{}\n", chosen.join("\n")).as_bytes())?;
        self.must(place, "nft -f /tmp/rules")
    }

    fn nftables(&self) -> Result<()> {
        self.expect(true, "without firewalls")?;
        self.logged(0, "op=list")?;
        self.load(HYPERVISOR, false)?;
        self.load(GUEST, true)?;
        let position = self.log()?.len();
        self.expect(self.is_attached, "without the hypervisor's rule")?;
        let is_silent = self.log()?.len() == position;
        ensure!(self.is_attached || is_silent, "the page says that the daemon logs nothing: {:#?}", self.log());
        self.load(HYPERVISOR, true)?;
        self.load(GUEST, false)?;
        let position = self.log()?.len();
        self.expect(false, "without the guest's rule")?;
        // Otherwise the daemon still calls back, and the next client would take that answer for its
        // own.
        self.logged(position, "callback failed")
    }

    /// The daemon's lines in the journal.
    fn log(&self) -> Result<Vec<String>> {
        let log = self.stage.shell(HYPERVISOR, "root", "journalctl -u fence-daemon -o cat")?.success()?.stdout;
        Ok(log.lines().map(str::to_owned).collect())
    }

    fn logged(&self, position: usize, words: &str) -> Result<()> {
        let found = poll_until(words, SOON, || {
            Ok(self.log()?.iter().skip(position).any(|line| line.contains(words)).then_some(()))
        });
        found.with_context(|| format!("no `{words}` in the log: {:#?}", self.log()))
    }

    fn firewalld(&self) -> Result<()> {
        let port = |verb: &str| format!("firewall-cmd --zone=libvirt --{verb}-port={PORT}/udp");
        self.must(HYPERVISOR, &port("remove"))?;
        self.expect(self.is_attached, "without the hypervisor's port")?;
        // The rule of older guides.
        let direct = |verb: &str| {
            format!("firewall-cmd --direct --{verb}-rule ipv4 filter INPUT 0 -m pkttype --pkt-type multicast -j ACCEPT")
        };
        self.must(HYPERVISOR, &direct("add"))?;
        self.expect(self.is_attached, "with all of multicast opened by a direct rule")?;
        self.must(HYPERVISOR, &direct("remove"))?;
        self.must(HYPERVISOR, &port("add"))?;
        self.expect(true, "with both")?;
        // The reload drops rules that are not permanent.
        let rule = r#"rule family="ipv4" source address="192.168.122.1" port port="1229" protocol="tcp" accept"#;
        self.must(GUEST, &format!("firewall-cmd --remove-rich-rule='{rule}'"))?;
        self.expect(false, "without the guest's rule")?;
        self.must(GUEST, "firewall-cmd --reload")?;
        self.expect(true, "with both again")
    }
}

fn play(attach: &'static str) -> Result<()> {
    let walls = Walls::new(PAGE, attach)?;
    walls.nftables()?;
    for step in &walls.guide.steps {
        // firewalld runs, and permits nothing yet.
        if matches!(&step.act, Act::Type(typed) if typed.command.contains("add-service") && step.host == GUEST) {
            walls.expect(false, "behind firewalld as it comes")?;
        }
        walls.stage.step(step)?;
    }
    walls.firewalld()
}

#[test]
fn firewalls_with_the_kernel_program() -> Result<()> {
    play("auto")
}

#[test]
fn firewalls_without_the_kernel_program() -> Result<()> {
    play("off")
}

/// The devices that a page has people add to a domain by `virsh edit`.
fn devices(page: &str, begin: &str, end: &str) -> Result<String> {
    let text = std::fs::read_to_string(tools::workspace().join("docs/guide").join(page))?;
    let (_, from) = text.split_once(begin).with_context(|| format!("{page} has no {begin}"))?;
    let (inside, _) = from.split_once(end).with_context(|| format!("{begin} does not end"))?;
    Ok(format!("{begin}{inside}{end}"))
}

#[test]
fn ways_in() -> Result<()> {
    let mut walls = Walls::new(WAYS_IN, "auto")?;
    let elsewhere = [CLUSTER_NODE, VSOCK_GUEST, VSOCK_HOST, LINE_NODE];
    let steps: Vec<_> =
        walls.guide.steps.iter().filter(|step| !elsewhere.contains(&step.host.as_str())).cloned().collect();
    for step in steps {
        // The guest begins with the port that the page gives it, in the directory that it makes.
        let is_typed = matches!(&step.act, Act::Type(_));
        if step.host == QEMU_GUEST && is_typed && !walls.stage.has(QEMU_GUEST) {
            let hypervisor = walls.libvirtd.hypervisor().clone();
            let port = devices(WAYS_IN, "<serial type='unix'>", "</serial>")?;
            let extras = Extras { devices: &port, second_port: true, ..Extras::default() };
            qemu::start_idle(&walls.libvirtd, QEMU_VICTIM)?;
            let guest = LinuxGuest::boot_with(&walls.libvirtd, QEMU_GUEST, 1, &KEY, &extras)?;
            walls.stage.add_guest(QEMU_GUEST, &hypervisor, guest);
        }
        walls.stage.step(&step).with_context(|| format!("the daemon: {:#?}", walls.log()))?;
    }
    ensure!(walls.stage.has(QEMU_GUEST), "{WAYS_IN} has nothing for {QEMU_GUEST}");
    Ok(())
}
