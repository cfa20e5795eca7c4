//! Helper processes of a machine (virtiofsd, swtpm, nbdkit, qemu-storage-daemon). An "off" says
//! that all of them are dead.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use fence_common::wire::Op;
use fence_lab::machine::{Machine, writing_disk};
use fence_lab::process::{Process, poll_until};
use fence_lab::qemu;
use fence_lab::witness::Witness;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::KEY;
use super::fuse::Disk;
use super::site::{SOON, Site};

/// A TPM device, whose state swtpm keeps.
pub(crate) const TPM: &str = "<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>";

/// A directory of the host in the guest. `binary` replaces libvirt's choice of virtiofsd.
pub(crate) fn shared_directory(site: &Site, target: &str, binary: Option<&str>) -> Result<String> {
    let source = site.hypervisor.path(&format!("{target}.shared"));
    std::fs::create_dir_all(site.hypervisor.outside(&source))?;
    let binary = binary.map(|path| format!("<binary path='{path}'/>")).unwrap_or_default();
    Ok(format!(
        "<filesystem type='mount'><driver type='virtiofs'/>{binary}<source dir='{source}'/><target dir='{target}'/></filesystem>"
    ))
}

/// The path of the real virtiofsd.
fn virtiofsd() -> Result<&'static str> {
    let places = ["/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd"];
    places
        .into_iter()
        .find(|path| std::path::Path::new(path).exists())
        .context("no virtiofsd: cargo xtask setup --for test")
}

/// Sends a signal to these processes, which must be alive.
pub(crate) fn signal(helpers: &[Witness], signal: Signal) -> Result<()> {
    for helper in helpers {
        kill(Pid::from_raw(i32::try_from(helper.pid)?), signal)?;
    }
    Ok(())
}

/// libvirt starts nbdkit from 9.7 on, where it serves a disk. Debian 12's is older, so these tests
/// start the server, and put it where libvirt puts its own: into the machine's control groups.
const JOIN: &str = r#"
while IFS=: read -r _ controllers path; do
    case "$controllers:$path" in
    name=*) ;;
    *qemu-*) echo "$2" > "/sys/fs/cgroup/$controllers$path/cgroup.procs" ;;
    esac
done < "/proc/$1/cgroup""#;
/// Or libvirt names it by a file in the instance's own directory.
const NAME: &str = r#"echo "$2" > "$(echo /var/lib/libvirt/qemu/domain-*-"$3")/nbdkit-disk0.pid""#;

/// The flags of a listening socket in `/proc/net/unix`.
const LISTENS: &str = " 00010000 ";

/// A disk's server, and the device.
fn server(site: &Site, program: &str, name: &str, image: &str) -> Result<(Process, String)> {
    let [socket, number] = ["sock", "server"].map(|kind| site.hypervisor.path(&format!("{name}.{kind}")));
    let (start, device) = match program {
        "nbdkit" => (
            format!("nbdkit --foreground --pidfile {number} --unix {socket} file {image}"),
            format!(
                "<disk type='network' device='disk'><driver name='qemu' type='raw'/><source protocol='nbd'>\
                 <host transport='unix' socket='{socket}'/></source><target dev='hda' bus='ide'/></disk>"
            ),
        ),
        _ => (
            format!(
                "qemu-storage-daemon --pidfile {number} --blockdev driver=file,node-name=image,filename={image},cache.direct=on \
                 --export type=vhost-user-blk,id=e,node-name=image,writable=on,addr.type=unix,addr.path={socket}"
            ),
            format!(
                "<disk type='vhostuser' device='disk'><driver name='qemu' type='raw'/>\
                 <source type='unix' path='{socket}'/><target dev='vda' bus='virtio'/></disk>"
            ),
        ),
    };
    let mut words = start.split_whitespace();
    let mut command = Command::new(words.next().unwrap_or_default());
    let process = Process::start(site.hypervisor.space(), command.args(words))?;
    let number = site.hypervisor.outside(&number);
    let serves = || {
        let has_number = std::fs::read_to_string(&number).is_ok_and(|number| number.ends_with('\n'));
        let listens = |line: &str| line.contains(LISTENS) && line.ends_with(&socket);
        Ok((has_number && site.hypervisor.proc_net("unix")?.lines().any(listens)).then_some(()))
    };
    poll_until("the disk's server", SOON, serves).with_context(|| process.stderr().text())?;
    Ok((process, device))
}

impl Site {
    /// Starts a machine with this server's disk, and makes the server the machine's as `how` says.
    fn with_server(&self, program: &str, how: &str, name: &str, image: &str) -> Result<(Process, Witness)> {
        let (server, device) = server(self, program, name, image)?;
        Machine::new(name).shared_memory().device(&device).start(&self.libvirtd)?;
        self.wait_status(name, 0)?;
        let numbers = [format!("/run/libvirt/qemu/{name}.pid"), self.hypervisor.path(&format!("{name}.server"))];
        let script = format!("set -- \"$(cat \"$1\")\" \"$(cat \"$2\")\" \"$3\"\n{how}");
        self.hypervisor.space().must("sh", &["-ec", &script, "sh", &numbers[0], &numbers[1], name])?;
        let witness = Witness::of_pid(server.id())?;
        Ok((server, witness))
    }

    /// Starts a machine with helpers, and returns the helpers.
    pub(crate) fn with_helpers(&self, name: &str, devices: &[&str], at_least: usize) -> Result<Vec<Witness>> {
        let machine = Machine::new(name).shared_memory();
        devices.iter().fold(machine, |machine, device| machine.device(device)).start(&self.libvirtd)?;
        self.wait_status(name, 0)?;
        self.helpers(name, at_least)
    }

    /// The processes in the machine's control group, the machine itself excepted.
    fn helpers(&self, name: &str, at_least: usize) -> Result<Vec<Witness>> {
        let machine = self.machine(name)?;
        let helpers = poll_until("the helpers", SOON, || {
            let helpers = machine.beside()?;
            Ok((helpers.len() >= at_least).then_some(helpers))
        })?;
        ensure!(helpers.iter().all(|helper| helper.pid != machine.pid));
        Ok(helpers)
    }

    /// An `off` that must succeed, with the machine and all helpers dead.
    pub(crate) fn off_with_helpers(&self, name: &str, helpers: Vec<Witness>) -> Result<()> {
        let mut victims = Witness::of_all(&self.hypervisor, name)?;
        ensure!(!victims.is_empty() && !helpers.is_empty(), "{name} does not run");
        victims.extend(helpers);
        let reply = self.observer.ask_about(&KEY, Op::Off, name, &victims);
        let reply = reply.with_context(|| format!("the server: {}", self.server.log()))?;
        ensure!(reply == 0, "off answered {reply}: {}", self.server.log());
        Ok(())
    }
}

#[test]
fn helpers_that_stand_still_are_dead_with_their_machine() -> Result<()> {
    let site = Site::new(&[qemu::URI], &[])?;
    let directory = shared_directory(&site, "data", None)?;
    // virtiofsd is two processes.
    for libvirtd_hangs in [false, true] {
        let name = if libvirtd_hangs { "hung" } else { "well" };
        let helpers = site.with_helpers(name, &[&directory, TPM], 3)?;
        signal(&helpers, Signal::SIGSTOP)?;
        if libvirtd_hangs {
            site.libvirtd.signal(Signal::SIGSTOP)?;
        }
        site.off_with_helpers(name, helpers)?;
    }
    Ok(())
}

#[test]
fn a_helper_that_came_later_is_dead_with_its_machine() -> Result<()> {
    let site = Site::new(&[qemu::URI], &[])?;
    Machine::new("plugged").shared_memory().start(&site.libvirtd)?;
    site.wait_status("plugged", 0)?;
    let device = shared_directory(&site, "later", None)?;
    let file = site.hypervisor.write("later.xml", device.as_bytes())?;
    site.libvirtd.virsh(qemu::URI, &["attach-device", "plugged", &file])?;
    let helpers = site.helpers("plugged", 2)?;
    signal(&helpers, Signal::SIGSTOP)?;
    site.libvirtd.signal(Signal::SIGSTOP)?;
    site.off_with_helpers("plugged", helpers)
}

#[test]
fn a_disks_server_that_stands_still_is_dead_with_its_machine() -> Result<()> {
    let mut site = Site::new(&[qemu::URI], &[])?;
    for (program, how, name) in
        [("nbdkit", JOIN, "joined"), ("nbdkit", NAME, "named"), ("qemu-storage-daemon", JOIN, "vhost")]
    {
        let image = site.hypervisor.write(&format!("{name}.img"), &writing_disk())?;
        let (_server, witness) = site.with_server(program, how, name, &image)?;
        // libvirt writes its PID file before the machine's start. The next daemon finds it so.
        if how == NAME {
            site.replace_daemon()?;
        }
        signal(std::slice::from_ref(&witness), Signal::SIGSTOP)?;
        site.off_with_helpers(name, vec![witness]).with_context(|| format!("{program}, {name}"))?;
    }
    Ok(())
}

#[test]
fn a_disks_server_whose_storage_stalls_is_no_success() -> Result<()> {
    let mut site = Site::new(&[qemu::URI], &[])?;
    let disk = Disk::serve(&site.hypervisor, "stalled", writing_disk())?;
    let (server, witness) = site.with_server("qemu-storage-daemon", JOIN, "stalled", &disk.path())?;
    // The disk is dropped first: only then can the server die.
    let (disk, server) = &(disk, server);
    disk.wait_written()?;
    disk.hold_writes_in_flight(server.id())?;
    let position = site.server.log_position();
    let reply = site.observer.ask(&KEY, Op::Off, "stalled")?;
    ensure!(reply == 1, "off answered {reply} while the server may write: {}", site.server.log());
    ensure!(!witness.is_dead()?, "the test does not keep the server alive");
    site.logs(position, "(qemu-storage-d")?;
    ensure!(site.observer.fence("status", "stalled")?.code != Some(2), "the server lives, and status says off");
    site.replace_daemon()?;
    let reply = site.observer.ask(&KEY, Op::Off, "stalled")?;
    ensure!(reply == 1, "the next daemon's off answered {reply}: {}", site.server.log());
    disk.release();
    ensure!(witness.dies_within(SOON)?, "the server was not killed");
    site.expect("off", "stalled", 0)?;
    site.wait_status("stalled", 2)
}

#[test]
fn a_helper_that_cannot_die_is_no_success() -> Result<()> {
    let mut site = Site::new(&[qemu::URI], &[])?;
    let disk = Disk::serve(&site.hypervisor, "stuck", vec![0; 4096])?;
    // virtiofsd itself, with a child that writes to hung storage. libvirt (11.3) first asks for its
    // capabilities, and waits until nobody has that output open.
    let script = format!(
        "#!/bin/sh\n[ \"$1\" = --print-capabilities ] || while :; do \
         /bin/busybox dd if=/dev/zero of={} bs=512 count=1 conv=notrunc 2>/dev/null; sleep 0.1; done &\n\
         exec {} \"$@\"\n",
        disk.path(),
        virtiofsd()?
    );
    let binary = site.hypervisor.write_mode("virtiofsd", script.as_bytes(), 0o755)?;
    let directory = shared_directory(&site, "data", Some(&binary))?;
    site.with_helpers("stuck", &[&directory], 3)?;
    disk.wait_written()?;
    disk.hold()?;
    let helpers = site.helpers("stuck", 3)?;
    let position = site.server.log_position();
    let reply = site.observer.ask(&KEY, Op::Off, "stuck")?;
    ensure!(reply == 1, "off answered {reply} while a helper lives: {}", site.server.log());
    let mut alive = false;
    for helper in &helpers {
        alive |= !helper.is_dead()?;
    }
    ensure!(alive, "the test does not keep the helper alive");
    site.logs(position, "(busybox)")?;
    ensure!(site.observer.fence("status", "stuck")?.code != Some(2), "a helper lives, and status calls the domain off");

    site.replace_daemon()?;
    ensure!(
        site.observer.fence("status", "stuck")?.code != Some(2),
        "a helper lives, and status calls the domain off: {}",
        site.server.log()
    );
    let reply = site.observer.ask(&KEY, Op::Off, "stuck")?;
    ensure!(reply == 1, "off answered {reply} while a helper lives: {}", site.server.log());
    disk.release();
    for helper in &helpers {
        ensure!(helper.dies_within(SOON)?);
    }
    site.expect("off", "stuck", 0)?;
    site.wait_status("stuck", 2)
}
