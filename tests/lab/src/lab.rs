//! A hypervisor and its guests in namespaces of their own.
//!
//! All processes of a lab live in one PID namespace. Its first process waits for the end of a pipe
//! that this process holds. However this process ends, the kernel then kills the lab's processes.
//! With the last one, the lab's network, mounts and files (on its own tmpfs) vanish. A guardian
//! outside removes the one thing that stays, the lab's cgroups. `/run` and libvirt's directories
//! are the lab's own: the host's libvirt is neither seen nor touched.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::SigSet;

use crate::process::{Finished, poll_until, run};
use crate::systemd::First;
use crate::tools;

/// The bridge that guests are on, in every lab.
pub const BRIDGE: &str = "virbr0";
/// The hypervisor's IPv4 address on the bridge.
pub const HYPERVISOR_V4: Ipv4Addr = Ipv4Addr::new(192, 168, 122, 1);
/// The hypervisor's IPv6 address on the bridge.
pub const HYPERVISOR_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x122, 0, 0, 0, 0, 0, 1);
/// How long a small command (`ip`, `bpftool`, `virsh list`) may take on a loaded machine.
pub const COMMAND_LIMIT: Duration = Duration::from_secs(60);

/// Where the lab's own files are, as its processes see them.
const FILES: &str = "/run/lab";
/// Makes labs of one process different in name.
static COUNTER: AtomicU32 = AtomicU32::new(0);

/// The lab's first process and its guardian. Dropping it ends the lab.
#[derive(Debug)]
struct Guardian {
    name: String,
    /// The lab's process 1, as the host numbers it.
    holder: u32,
    holder_fd: OwnedFd,
    guardian: Child,
    /// The pipe whose end is the lab's end.
    lifeline: Option<ChildStdin>,
}

impl Guardian {
    fn start() -> Result<Self> {
        tools::require(&["unshare", "tini", "ip"])?;
        let name = format!("fence-lab-{}-{}", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed));
        let mut guardian = Command::new("sh")
            .args(["-c", include_str!("assets/guardian.sh"), "guardian", &name])
            .env("INSIDE", include_str!("assets/inside.sh"))
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("starting the lab's guardian")?;
        let lifeline = guardian.stdin.take();
        let mut said = String::new();
        BufReader::new(guardian.stdout.take().context("no pipe")?).read_line(&mut said)?;
        let Some(holder) = said.trim().strip_prefix("ready ").and_then(|pid| pid.parse::<u32>().ok()) else {
            drop(lifeline);
            let output = guardian.wait_with_output()?;
            bail!("the lab's namespaces could not be made: {said}{}", String::from_utf8_lossy(&output.stderr));
        };
        let pid = rustix::process::Pid::from_raw(i32::try_from(holder)?).context("no process number")?;
        let holder_fd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty())?;
        Ok(Self { name, holder, holder_fd, guardian, lifeline })
    }
}

impl Drop for Guardian {
    fn drop(&mut self) {
        drop(self.lifeline.take());
        let ended = poll_until("the lab's end", Duration::from_secs(30), || Ok(self.guardian.try_wait()?));
        if let Err(error) = ended {
            let _ = writeln!(std::io::stderr(), "{}: {error:#}", self.name);
        }
    }
}

/// A place for a lab's programs: its mounts, processes and cgroups, and the network of the
/// hypervisor or of a guest.
#[derive(Clone, Debug)]
pub struct Space {
    guardian: Arc<Guardian>,
    /// A guest's network; the hypervisor's own where there is none.
    network: Option<Arc<OwnedFd>>,
    /// A container's first process: all of its namespaces, instead of the lab's.
    container: Option<Arc<OwnedFd>>,
    /// The first process of a PID namespace below the lab's, where programs run instead.
    first: Option<Arc<First>>,
}

impl Space {
    /// Inside of a container of this lab, by its first process. Its commands end with it.
    #[must_use]
    pub fn inside(&self, first: OwnedFd) -> Self {
        Self { guardian: Arc::clone(&self.guardian), network: None, container: Some(Arc::new(first)), first: None }
    }

    /// Whose namespaces these are.
    fn owner(&self) -> &OwnedFd {
        self.container.as_deref().unwrap_or(&self.guardian.holder_fd)
    }

    fn enter_network(&self) -> Result<()> {
        let network = self.network.as_deref().unwrap_or_else(|| self.owner());
        setns(network.as_fd(), CloneFlags::CLONE_NEWNET).context("entering the lab's network")
    }

    /// Starts a program in this place. The caller must wait for it, as [`crate::process::Process`]
    /// does.
    pub fn spawn(&self, command: &mut Command) -> Result<Child> {
        // Namespaces belong to a thread, and a child inherits those of its thread. A short-lived
        // thread leaves this process where it was.
        on_a_thread(|| {
            // Threads share working directory and root until one asks for its own, which `setns` of
            // mounts needs.
            unshare(CloneFlags::CLONE_FS)?;
            let lab = CloneFlags::CLONE_NEWNS
                | CloneFlags::CLONE_NEWPID
                | CloneFlags::CLONE_NEWCGROUP
                | CloneFlags::CLONE_NEWIPC
                | CloneFlags::CLONE_NEWUTS;
            setns(self.owner().as_fd(), lab).context("entering the lab, or one of its containers")?;
            if let Some(first) = &self.first {
                setns(first.as_fd(), CloneFlags::CLONE_NEWPID).context("entering the hypervisor's processes")?;
            }
            self.enter_network()?;
            // A child starts with what its thread blocks: `fence-lab` blocks what ends the daemon.
            SigSet::all().thread_unblock()?;
            command.spawn().with_context(|| match tools::find(&command.get_program().to_string_lossy()) {
                Ok(program) => format!("starting {}", program.display()),
                Err(missing) => missing.to_string(),
            })
        })
    }

    /// Runs a program in this place to its end, for preparations. An exit code other than 0 is an
    /// error.
    pub fn must(&self, program: &str, arguments: &[&str]) -> Result<Finished> {
        run(self, Command::new(program).args(arguments), COMMAND_LIMIT)
            .and_then(Finished::success)
            .with_context(|| format!("{program} {}", arguments.join(" ")))
    }

    /// Turns off duplicate address detection, which blocks IPv6 addresses for a second or two.
    fn use_addresses_at_once(&self, interface: &str) -> Result<()> {
        // /proc/sys/net belongs to the network of the process that opens it.
        self.must("sh", &["-c", &format!("echo 0 > /proc/sys/net/ipv6/conf/{interface}/accept_dad")]).map(drop)
    }

    /// Runs `code` with this place's mounts, on a thread of its own: what it mounts is the lab's.
    pub fn in_mounts<T: Send>(&self, code: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        on_a_thread(|| {
            unshare(CloneFlags::CLONE_FS)?;
            setns(self.owner().as_fd(), CloneFlags::CLONE_NEWNS).context("entering the lab's mounts")?;
            code()
        })
    }

    /// Runs `code` in this place's network only. Sockets that it makes stay in that network.
    pub fn in_network<T: Send>(&self, code: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        on_a_thread(|| {
            self.enter_network()?;
            code()
        })
    }
}

fn on_a_thread<T: Send>(code: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| scope.spawn(code).join()).map_err(|_| anyhow!("a thread of the lab panicked"))?
}

/// The hypervisor: bridge [`BRIDGE`] with [`HYPERVISOR_V4`] and [`HYPERVISOR_V6`], and room for
/// files.
#[derive(Clone, Debug)]
pub struct Hypervisor {
    space: Space,
    /// Its addresses on the bridge.
    v4: Ipv4Addr,
    v6: Ipv6Addr,
}

impl Hypervisor {
    /// Makes a lab with a hypervisor and nothing else.
    pub fn new() -> Result<Self> {
        Self::at(HYPERVISOR_V4, HYPERVISOR_V6)
    }

    /// Like [`Self::new`], with other bridge addresses. Hypervisors on one segment need different
    /// ones.
    pub fn at(v4: Ipv4Addr, v6: Ipv6Addr) -> Result<Self> {
        let space = Space { guardian: Arc::new(Guardian::start()?), network: None, container: None, first: None };
        let hypervisor = Self { space, v4, v6 };
        hypervisor.make_bridge(None)?;
        Ok(hypervisor)
    }

    /// The bridge's Ethernet address, unique among labs and fixed, as in libvirt's own networks.
    /// Without one, a bridge takes the lowest address of its ports. A container's start would
    /// change it, and guests would send to the old one for a while.
    fn bridge_address(&self) -> String {
        let [_, bytes @ ..] = self.holder().to_be_bytes();
        format!("52:54:00:{:02x}:{:02x}:{:02x}", bytes[0], bytes[1], bytes[2])
    }

    /// Makes the bridge, as libvirt does at a network's start, after [`Self::delete_bridge`].
    /// `number` is the kernel's number for it. [Plug](Self::plug) the guests in again afterwards.
    pub fn make_bridge(&self, number: Option<u32>) -> Result<()> {
        let number = number.map(|number| number.to_string());
        let mut arguments = vec!["link", "add", BRIDGE];
        arguments.extend(number.iter().flat_map(|number| ["index", number]));
        let address = self.bridge_address();
        arguments.extend(["address", &address, "type", "bridge", "forward_delay", "0"]);
        self.ip(&arguments)?;
        self.space.use_addresses_at_once(BRIDGE)?;
        self.ip(&["addr", "add", &format!("{}/24", self.v4), "dev", BRIDGE])?;
        self.ip(&["link", "set", BRIDGE, "up"])?;
        self.address_bridge()
    }

    /// Gives the bridge what it loses when it is down: its IPv6 address and its multicast route.
    pub fn address_bridge(&self) -> Result<()> {
        self.ip(&["addr", "add", &format!("{}/64", self.v6), "dev", BRIDGE, "nodad"])?;
        self.ip(&["route", "add", "224.0.0.0/4", "dev", BRIDGE])?;
        Ok(())
    }

    /// Deletes the bridge; the guests' cables stay.
    pub fn delete_bridge(&self) -> Result<()> {
        self.ip(&["link", "del", BRIDGE]).map(drop)
    }

    /// Puts a guest's cable into the bridge that there is now, and waits until frames pass.
    pub fn plug(&self, guest: &Guest) -> Result<()> {
        let port = guest.name.replace("guest", "vnet");
        self.ip(&["link", "set", &port, "master", BRIDGE, "up"])?;
        self.wait_connected(guest, &port)
    }

    /// Adds a guest: a network namespace with `eth0` on the bridge. Its addresses are
    /// 192.168.122.(10+`number`) and fd00:122::(10+`number`, as decimal digits). Its multicast
    /// leaves by `eth0`.
    pub fn guest(&self, number: u8) -> Result<Guest> {
        let name = format!("guest{number}");
        let port = format!("vnet{number}");
        self.ip(&["netns", "add", &name])?;
        self.ip(&["link", "add", &port, "type", "veth", "peer", "name", "eth0", "netns", &name])?;
        // Through the lab's mounts: the name is bound in the lab's own /run.
        let network = File::open(self.root().join("run/netns").join(&name)).context("a guest's network")?;
        let space = Space {
            guardian: Arc::clone(&self.space.guardian),
            network: Some(Arc::new(network.into())),
            container: None,
            first: self.space.first.clone(),
        };
        let v4 = Ipv4Addr::new(192, 168, 122, number.saturating_add(10));
        let v6: Ipv6Addr = format!("fd00:122::{}", number.saturating_add(10)).parse()?;
        let guest = Guest { space, name, v4, v6 };
        guest.space.must("ip", &["link", "set", "lo", "up"])?;
        guest.space.use_addresses_at_once("eth0")?;
        guest.space.must("ip", &["addr", "add", &format!("{v4}/24"), "dev", "eth0"])?;
        guest.space.must("ip", &["link", "set", "eth0", "up"])?;
        guest.space.must("ip", &["addr", "add", &format!("{v6}/64"), "dev", "eth0", "nodad"])?;
        guest.space.must("ip", &["route", "add", "224.0.0.0/4", "dev", "eth0"])?;
        guest.space.must("ip", &["route", "add", "default", "via", &self.v4.to_string()])?;
        self.plug(&guest)?;
        Ok(guest)
    }

    /// Waits until frames pass. The kernel notices a new cable late, and frames before that are
    /// lost.
    fn wait_connected(&self, guest: &Guest, port: &str) -> Result<()> {
        self.wait_forwarding(port)?;
        poll_until("the guest's link", COMMAND_LIMIT, || {
            let is_up = guest.space.must("ip", &["-o", "link", "show", "dev", "eth0"])?.stdout.contains("state UP");
            Ok(is_up.then_some(()))
        })
    }

    /// Waits until a port of the bridge lets frames pass.
    pub fn wait_forwarding(&self, port: &str) -> Result<()> {
        const FORWARDING: &str = "3";
        let state = self.outside(&format!("/sys/class/net/{port}/brport/state"));
        poll_until("the bridge's port", COMMAND_LIMIT, || {
            Ok((std::fs::read_to_string(&state)?.trim() == FORWARDING).then_some(()))
        })
    }

    /// Where the hypervisor's programs run.
    #[must_use]
    pub fn space(&self) -> &Space {
        &self.space
    }

    /// Its IPv4 address on the bridge.
    #[must_use]
    pub fn v4(&self) -> Ipv4Addr {
        self.v4
    }

    /// The lab's process 1 as the host numbers it: `nsenter --target PID --all` enters the lab.
    #[must_use]
    pub fn holder(&self) -> u32 {
        self.space.guardian.holder
    }

    /// The same hypervisor with its programs in the PID namespace of this process.
    pub(crate) fn below(&self, first: First) -> Self {
        let mut hypervisor = self.clone();
        hypervisor.space.first = Some(Arc::new(first));
        hypervisor
    }

    /// The first process of its PID namespace, as the host numbers it.
    pub(crate) fn first(&self) -> u32 {
        self.space.first.as_ref().map_or_else(|| self.holder(), |first| first.pid)
    }

    /// Kills the first process of its PID namespace, if that is below the lab's.
    pub(crate) fn kill_first(&self) -> Result<()> {
        self.space.first.as_ref().context("it has no PID namespace of its own")?.kill()
    }

    /// The lab's name: that of its cgroups, unique among all labs of the host.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.space.guardian.name
    }

    /// The lab's root directory as seen from outside.
    #[must_use]
    pub fn root(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root", self.holder()))
    }

    /// The path of a file of the lab's own, as the lab's programs see it.
    #[must_use]
    pub fn path(&self, file: &str) -> String {
        format!("{FILES}/{file}")
    }

    /// The same file for this process.
    #[must_use]
    pub fn outside(&self, inside: &str) -> PathBuf {
        self.root().join(inside.trim_start_matches('/'))
    }

    /// Writes a file of the lab's own (mode 0600, directories are made): its path inside the lab.
    pub fn write(&self, file: &str, content: &[u8]) -> Result<String> {
        self.write_mode(file, content, 0o600)
    }

    /// As [`Self::write`], with another mode.
    pub fn write_mode(&self, file: &str, content: &[u8], mode: u32) -> Result<String> {
        let inside = if file.starts_with('/') { file.to_owned() } else { self.path(file) };
        let outside = self.outside(&inside);
        let written = || -> std::io::Result<()> {
            std::fs::create_dir_all(outside.parent().unwrap_or(Path::new("/")))?;
            let mut options = File::options();
            options.write(true).create(true).truncate(true).mode(mode).open(&outside)?.write_all(content)
        };
        written().with_context(|| format!("writing {}", outside.display()))?;
        Ok(inside)
    }

    /// Runs `ip` with these arguments on the hypervisor.
    pub fn ip(&self, arguments: &[&str]) -> Result<Finished> {
        self.space.must("ip", arguments)
    }

    /// A table of the hypervisor's network from `/proc/net` (`udp`, `igmp`, ...).
    pub fn proc_net(&self, table: &str) -> Result<String> {
        let path = format!("/proc/{}/net/{table}", self.holder());
        std::fs::read_to_string(&path).with_context(|| format!("reading {path}"))
    }
}

/// A guest that is only a network. Stock clients and misbehaving ones run in it.
#[derive(Clone, Debug)]
pub struct Guest {
    space: Space,
    /// The name of its network in the lab (`ip netns exec NAME`).
    pub name: String,
    /// Its IPv4 address.
    pub v4: Ipv4Addr,
    /// Its IPv6 address.
    pub v6: Ipv6Addr,
}

impl Guest {
    /// Where the guest's programs run.
    #[must_use]
    pub fn space(&self) -> &Space {
        &self.space
    }
}
