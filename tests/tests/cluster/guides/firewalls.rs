//! `docs/guide/firewall.md`, typed, and what happens without each of its rules.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fence_lab::cluster::image::Image;
use fence_lab::guide::stage::{HYPERVISOR, Stage};
use fence_lab::guide::{Act, Guide};
use fence_lab::lab::Hypervisor;
use fence_lab::server::{Config, Server, Which};

use super::bring_zone;

const PAGE: &str = "firewall.md";
const GUEST: &str = "node1";
/// How long what takes seconds may take on a loaded machine.
const SOON: Duration = Duration::from_secs(60);
/// What the rules for fencing have in common, and no other rule has.
const PORT: &str = "1229";

struct Walls {
    stage: Stage,
    server: Server,
    guide: Guide,
    /// Whether the kernel program is before the hypervisor's firewall.
    is_attached: bool,
}

impl Walls {
    fn new(attach: &'static str) -> Result<Self> {
        let image = Image::get()?;
        let hypervisor = Hypervisor::new()?;
        let guest = hypervisor.guest(1)?;
        let mut stage = Stage::new(&hypervisor, image.root())?;
        stage.add_guest(GUEST, &hypervisor, guest.space(), image.root())?;
        bring_zone(&stage)?;
        let key = [7; 64];
        stage.write(GUEST, "/etc/cluster/fence_xvm.key", &key)?;
        let config = Config { attach: Some(attach), ..Config::new(&hypervisor.write("key", &key)?) };
        let server = Server::start(&hypervisor, &Which::ours()?, &config)?;
        let guide = Guide::read(PAGE, &[HYPERVISOR, GUEST])?;
        Ok(Self { stage, server, guide, is_attached: attach != "off" })
    }

    /// Whether the guest gets its list.
    fn expect(&self, is_heard: bool, when: &str) -> Result<()> {
        // Nobody waits for long for what is not to come.
        let line = if is_heard { "fence_xvm -o list" } else { "fence_xvm -o list -t 3" };
        let answer = self.stage.shell(GUEST, "root", line)?;
        let got = answer.code == Some(0) && answer.stdout.contains("test");
        ensure!(got == is_heard, "{when}: {answer:?}; the server: {}", self.server.log());
        Ok(())
    }

    fn must(&self, place: &str, line: &str) -> Result<()> {
        self.stage.shell(place, "root", line)?.success().with_context(|| format!("{place}# {line}")).map(drop)
    }

    /// Loads the page's rules of a machine, with or without those for fencing.
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
        let position = self.server.log_position();
        self.expect(self.is_attached, "without the hypervisor's rule")?;
        let is_silent = self.server.log_position() == position;
        ensure!(self.is_attached || is_silent, "the page says that the daemon knows nothing: {}", self.server.log());
        self.load(HYPERVISOR, true)?;
        self.load(GUEST, false)?;
        let position = self.server.log_position();
        self.expect(false, "without the guest's rule")?;
        // Else the daemon calls back for some seconds yet, and whoever listens there next takes the answer for its own.
        self.logged(position, "call-back failed")
    }

    fn logged(&self, position: usize, words: &str) -> Result<()> {
        let found = self.server.wait_log(position, SOON, |line| line.contains(words).then_some(()));
        found.with_context(|| format!("no `{words}` in the log: {}", self.server.log()))
    }

    fn firewalld(&self) -> Result<()> {
        let port = |verb: &str| format!("firewall-cmd --zone=libvirt --{verb}-port={PORT}/udp");
        self.must(HYPERVISOR, &port("remove"))?;
        self.expect(self.is_attached, "without the hypervisor's port")?;
        // As older guides have it.
        let direct = |verb: &str| {
            format!("firewall-cmd --direct --{verb}-rule ipv4 filter INPUT 0 -m pkttype --pkt-type multicast -j ACCEPT")
        };
        self.must(HYPERVISOR, &direct("add"))?;
        self.expect(self.is_attached, "with all of multicast opened by a direct rule")?;
        self.must(HYPERVISOR, &direct("remove"))?;
        self.must(HYPERVISOR, &port("add"))?;
        self.expect(true, "with both")?;
        // What is not permanent, the reload takes back.
        let rule = r#"rule family="ipv4" source address="192.168.122.1" port port="1229" protocol="tcp" accept"#;
        self.must(GUEST, &format!("firewall-cmd --remove-rich-rule='{rule}'"))?;
        self.expect(false, "without the guest's rule")?;
        self.must(GUEST, "firewall-cmd --reload")?;
        self.expect(true, "with both again")
    }
}

fn play(attach: &'static str) -> Result<()> {
    let walls = Walls::new(attach)?;
    walls.nftables()?;
    for step in &walls.guide.steps {
        // firewalld runs then, and nothing is permitted yet.
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
