//! `external/fence-xdp` of dist under cluster-glue's own `stonith`. The node has only the stock
//! client and the key. The victims are containers, and the kernel says whether they are dead.

mod bad_input;
mod beside;
mod in_a_cluster;
mod ways;

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fence_lab::cluster::corosync::{Item, Member, plain};
use fence_lab::cluster::image::Image;
use fence_lab::cluster::lab::KEY;
use fence_lab::cluster::node::Node;
use fence_lab::cluster::shell::Shell as _;
use fence_lab::container::{self, URI};
use fence_lab::lab::{HYPERVISOR_V4, Hypervisor};
use fence_lab::libvirtd::Libvirtd;
use fence_lab::process::{Finished, poll_until};
use fence_lab::server::{Config, Server, Which};
use fence_lab::tools;
use fence_lab::witness::Witness;

/// The directory where Debian's `stonith` looks for plugins.
pub(crate) const PLUGIN: &str = "/usr/lib/stonith/plugins/external/fence-xdp";
/// How long a command of one second may take on a loaded machine.
const LIMIT: Duration = Duration::from_secs(120);
/// The victims, and the node's names for them.
const VICTIMS: [&str; 2] = ["web-one", "Web_Two"];
const HOSTLIST: &str = "hostlist='one:web-one, Two:Web_Two'";

/// The plugin as it is installed.
pub(crate) fn plugin() -> Result<Item> {
    let path = tools::workspace().join("dist/stonith/external/fence-xdp");
    let content = std::fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
    Ok(Item { path: PLUGIN, mode: 0o755, content })
}

struct PluginScene {
    server: Server,
    config: Config,
    libvirtd: Libvirtd,
    node: Node,
    hypervisor: Hypervisor,
}

impl PluginScene {
    /// A node with the plugin, two running victims, and a daemon that fences them.
    fn new() -> Result<Self> {
        Self::with_libvirtd("", &[])
    }

    /// Like [`Self::new`], with additions to libvirtd.conf and libvirtd's arguments.
    fn with_libvirtd(conf: &str, arguments: &[&str]) -> Result<Self> {
        Image::get()?;
        let hypervisor = Hypervisor::new()?;
        let libvirtd = Libvirtd::start_with(&hypervisor, conf, arguments)?;
        let me = Member { name: "asker".into(), address: [192, 168, 122, 40].into(), domain: "asker".into() };
        let mut files = plain(std::slice::from_ref(&me), &me, &KEY);
        files.push(plugin()?);
        let node = Node::define(&libvirtd, &me, &files)?;
        node.start(&libvirtd)?;
        for victim in VICTIMS {
            container::start(&libvirtd, victim)?;
        }
        let mut config = Config::new(&hypervisor.write("fence.key", &KEY)?);
        config.uris = vec![URI.to_owned()];
        config.tcp = Some(vec![("address", HYPERVISOR_V4.to_string())]);
        let server = Server::start(&hypervisor, &Which::ours()?, &config)?;
        node.wait_up()?;
        Ok(Self { server, config, libvirtd, node, hypervisor })
    }

    fn run(&self, script: &str) -> Result<Finished> {
        self.node.run(script, LIMIT)
    }

    /// Runs `stonith` with our plugin, these parameters and these arguments.
    fn stonith(&self, parameters: &str, arguments: &str) -> Result<Finished> {
        self.run(&format!("stonith -t external/fence-xdp {parameters} {arguments}"))
    }

    fn succeeds(&self, arguments: &str) -> Result<Finished> {
        let done = self.stonith(HOSTLIST, arguments)?;
        ensure!(done.code == Some(0), "{arguments}: {done:?}; the server: {}", self.server.log());
        Ok(done)
    }

    fn witness(&self, victim: &str) -> Result<Witness> {
        Witness::of_container(&self.hypervisor, victim)
    }

    /// Runs `script` and returns its result. After a success, every process under the victim's name
    /// must be dead.
    fn fence(&self, victim: &str, script: &str) -> Result<Finished> {
        let victims = Witness::of_all(&self.hypervisor, victim)?;
        let done = self.run(script)?;
        if done.code == Some(0) {
            for one in &victims {
                ensure!(one.is_dead()?, "FALSE SUCCESS: {script}: {done:?}, and there lives {}", one.describe());
            }
        }
        Ok(done)
    }

    fn must_fence(&self, victim: &str, arguments: &str) -> Result<()> {
        let done = self.fence(victim, &format!("stonith -t external/fence-xdp {HOSTLIST} {arguments}"))?;
        ensure!(done.code == Some(0), "{arguments}: {done:?}; the server: {}", self.server.log());
        Ok(())
    }

    fn state(&self, victim: &str) -> Result<String> {
        self.libvirtd.state(URI, victim)
    }
}

#[test]
fn the_plugin_fences_as_stonith_asks_it_to() -> Result<()> {
    let scene = PluginScene::new()?;
    let (one, two) = (VICTIMS[0], VICTIMS[1]);
    let bystander = scene.witness(two)?;
    let asker = scene.node.witness()?;

    let listed = scene.succeeds("-l")?;
    ensure!(listed.stdout == "one\nTwo\n", "{listed:?}");
    let status = scene.succeeds("-S")?;
    ensure!(!status.stderr.contains("does not list"), "{status:?}");
    // A misspelt name is reported before it is needed.
    let doubtful = scene.stonith("hostlist='one:web-one three:wbe' hypervisor_uri=lxc+tcp://192.168.122.1/", "-S")?;
    ensure!(doubtful.code == Some(0), "{doubtful:?}");
    for words in ["does not list: wbe (", "hypervisor_uri is not needed"] {
        ensure!(doubtful.stderr.contains(words), "{words}: {doubtful:?}");
    }

    scene.must_fence(one, "-T off one")?;
    scene.libvirtd.wait_state(URI, one, "shut off")?;
    scene.succeeds("-T off one")?;
    scene.succeeds("-T on one")?;
    scene.libvirtd.wait_state(URI, one, "running")?;
    let running = scene.witness(one)?;
    scene.succeeds("-T on one")?;
    ensure!(!running.is_dead()?, "on of what runs leaves it alone");

    scene.must_fence(one, "-T reset one")?;
    ensure!(running.is_dead()?);
    running.wait_next(scene.libvirtd.hypervisor(), one)?;
    scene.libvirtd.wait_state(URI, one, "running")?;
    ensure!(!bystander.is_dead()? && !asker.is_dead()?, "an uninvolved machine was killed");
    scene.must_fence(one, "-T off one")?;
    // As external/libvirt does: a reset starts a host that was off.
    scene.succeeds("-T reset one")?;
    ensure!(scene.state(one)? == "running", "a reset starts what was off");

    // `stonith` lowers the name's case; the domain keeps libvirt's spelling.
    scene.must_fence(two, "-T reset TWO")?;
    ensure!(bystander.is_dead()?);
    bystander.wait_next(scene.libvirtd.hypervisor(), two)?;
    scene.libvirtd.wait_state(URI, two, "running")
}

#[test]
fn the_plugin_describes_itself() -> Result<()> {
    let scene = PluginScene::new()?;
    let names = scene.stonith("", "-n")?;
    ensure!(names.code == Some(0) && names.stdout.split_whitespace().eq(["hostlist"]), "{names:?}");
    let read = "import sys, xml.dom.minidom as m; \
                [print(p.getAttribute('name'), p.getAttribute('required')) for p in \
                m.parseString(sys.stdin.read()).getElementsByTagName('parameter')]";
    let parameters = scene.run(&format!("stonith -t external/fence-xdp -m | python3 -c \"{read}\""))?;
    let required: Vec<_> = parameters.stdout.lines().collect();
    ensure!(parameters.code == Some(0) && required.first() == Some(&"hostlist 1"), "{parameters:?}");
    let optional = ["key_file", "timeout", "ip_family", "multicast_address", "ipaddr", "vsock", "serial_device"];
    for optional in optional.into_iter().chain(["ipport", "hash", "auth", "hypervisor_uri"]) {
        ensure!(required.contains(&format!("{optional} 0").as_str()), "no {optional}: {parameters:?}");
    }
    let page = std::fs::read_to_string(tools::workspace().join("docs/guide/installation.md"))?;
    for name in required.iter().filter_map(|line| line.split_whitespace().next()) {
        ensure!(page.contains(&format!("`{name}`")), "the page does not mention {name}");
    }
    for info in ["devid", "devname", "devdescr", "devurl", "xml"] {
        let told = scene.run(&format!("{PLUGIN} getinfo-{info}"))?;
        ensure!(told.code == Some(0) && !told.stdout.is_empty() && told.stderr.is_empty(), "{info}: {told:?}");
    }
    // A whole line on standard output would cost each fence one second of sleep in `stonith`.
    for action in ["off one", "status", "off nobody"] {
        let done = scene.run(&format!("{HOSTLIST} {PLUGIN} {action}"))?;
        ensure!(!done.stdout.trim().is_empty(), "{action}: {done:?}");
        let ends = scene.run(&format!("[ \"$({HOSTLIST} {PLUGIN} {action} 2> /dev/null | wc -l)\" -eq 0 ]"))?;
        ensure!(ends.code == Some(0), "{action} prints a whole line");
    }
    Ok(())
}

#[test]
fn two_nodes_are_asked_about_at_once() -> Result<()> {
    let scene = PluginScene::new()?;
    let before = VICTIMS.map(|victim| scene.witness(victim));
    // The stock client needs the port for itself, so the second client finds it taken.
    let script = format!(
        "stonith -t external/fence-xdp {HOSTLIST} -T off one & first=$!
         stonith -t external/fence-xdp {HOSTLIST} -S & second=$!
         stonith -t external/fence-xdp {HOSTLIST} -T off two; third=$?
         wait $first && wait $second && [ $third -eq 0 ]"
    );
    let done = scene.run(&script)?;
    ensure!(done.code == Some(0), "{done:?}");
    for victim in before {
        ensure!(victim?.is_dead()?);
    }
    // A client does not wait for one whose answer takes long.
    let slow = format!(
        "(exec 9>> /run/fence-xdp.1229.turn; flock 9; exec sleep 60) & slow=$!; sleep 0.3; \
         stonith -t external/fence-xdp {HOSTLIST} timeout=3 -T off one; code=$?; kill $slow; exit $code"
    );
    let beside = scene.run(&slow)?;
    ensure!(beside.code == Some(0), "{beside:?}");
    // Another program keeps the port for longer than the client waits.
    let taken = format!(
        "nc -l 1229 & sleep 0.3; stonith -t external/fence-xdp {HOSTLIST} timeout=3 -T on one; code=$?; kill $!; exit $code"
    );
    let taken = scene.run(&taken)?;
    ensure!(taken.code != Some(0) && taken.stderr.contains("already in use"), "{taken:?}");
    poll_until("both to be off", LIMIT, || {
        let off = VICTIMS.iter().all(|victim| scene.state(victim).is_ok_and(|state| state == "shut off"));
        Ok(off.then_some(()))
    })
}
