//! The systemd unit of dist: systemd accepts it and runs the daemon, and its rights suffice for all
//! that fencing needs.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use fence_lab::cluster::corosync::{KEY_PATH, Member, plain};
use fence_lab::cluster::image::Image;
use fence_lab::cluster::lab::KEY;
use fence_lab::cluster::node::Node;
use fence_lab::cluster::shell::Shell as _;
use fence_lab::lab::Hypervisor;
use fence_lab::libvirtd::Libvirtd;
use fence_lab::machine::{Machine, writing_disk};
use fence_lab::observer::Observer;
use fence_lab::process::{Finished, Process, poll_until, run};
use fence_lab::qemu;
use fence_lab::server::{Config, Server, Which};
use fence_lab::timings::Fence;
use fence_lab::tools;
use fence_lab::witness::Witness;
use nix::sys::signal::Signal;

/// How long an operation of one second may take on a loaded machine.
const LIMIT: Duration = Duration::from_secs(90);
const UNIT: &str = include_str!("../../../dist/fence-daemon.service");
const UNIT_PATH: &str = "/etc/systemd/system/fence-daemon.service";

/// The user of a machine, unknown to this system.
const USER: u32 = 12_345;

/// The daemon as it is installed.
fn daemon() -> Result<Vec<u8>> {
    let Which::Ours(path) = Which::ours()? else { bail!("ours is not ours") };
    std::fs::read(&path).with_context(|| path.display().to_string())
}

/// The capabilities that the unit leaves, as setpriv names them.
fn capabilities() -> Result<Vec<String>> {
    let lines = UNIT.lines().filter_map(|line| line.strip_prefix("CapabilityBoundingSet="));
    let names: Vec<_> = lines.flat_map(str::split_whitespace).collect();
    ensure!(!names.is_empty(), "the unit bounds no capabilities");
    Ok(names.into_iter().map(|name| name.trim_start_matches("CAP_").to_ascii_lowercase()).collect())
}

/// A log without two expected lines. One is about a right that systemd alone needs, the other about
/// the lab's key, which is easy to guess.
fn but_for_oom(log: &str) -> String {
    let is_expected = |line: &&str| line.contains("CAP_SYS_RESOURCE") || line.contains("is not random");
    log.lines().filter(|line| !is_expected(line)).map(|line| format!("{line}\n")).collect()
}

/// A node whose own systemd runs the daemon.
struct Host {
    node: Node,
    /// Runs the node, and is dropped after it.
    _libvirtd: Libvirtd,
}

/// The path of the lab's libvirt sockets in a node.
const SOCKETS: &str = "/mnt/libvirt";

impl Host {
    fn new() -> Result<Self> {
        let hypervisor = Hypervisor::new()?;
        let libvirtd = Libvirtd::start(&hypervisor)?;
        let host = Self::with(libvirtd, "eth0", &["test:///default"])?;
        host.node.wait_up()?;
        Ok(host)
    }

    /// Starts a node that listens on this interface and uses these URIs. The daemon is enabled
    /// where the node does not have `interface`.
    fn with(libvirtd: Libvirtd, interface: &str, uris: &[&str]) -> Result<Self> {
        Image::get()?;
        let me = Member { name: "host".into(), address: [192, 168, 122, 41].into(), domain: "host".into() };
        let files = plain(std::slice::from_ref(&me), &me, &KEY);
        let node = Node::define_with(&libvirtd, &me, &files, &[("/run/libvirt", SOCKETS)])?;
        let mut config = Config::new(KEY_PATH);
        config.interface = interface.to_owned();
        config.uris = uris.iter().map(|&uri| uri.to_owned()).collect();
        node.write("/usr/sbin/fence-daemon", &daemon()?, 0o755)?;
        node.write("/etc/fence_virt.conf", config.render().as_bytes(), 0o600)?;
        node.write(UNIT_PATH, UNIT.as_bytes(), 0o644)?;
        // In place of stock's unit, which is not in the image.
        node.write("/etc/systemd/system/fence_virtd.service", b"[Service]\nExecStart=/bin/sleep infinity\n", 0o644)?;
        // The path where libvirt's client looks for the socket.
        node.write("/etc/tmpfiles.d/libvirt.conf", format!("L /run/libvirt - - - - {SOCKETS}\n").as_bytes(), 0o644)?;
        for unit in if interface == "eth0" { [].as_slice() } else { &["fence-daemon", "libvirt-guests"] } {
            let link = node.outside(&format!("/etc/systemd/system/multi-user.target.wants/{unit}.service"));
            std::fs::create_dir_all(link.parent().context("no directory")?)?;
            std::os::unix::fs::symlink(format!("../{unit}.service"), link)?;
        }
        node.start(&libvirtd)?;
        Ok(Self { node, _libvirtd: libvirtd })
    }

    fn run(&self, script: &str) -> Result<Finished> {
        self.node.run(script, LIMIT)
    }

    fn must(&self, script: &str) -> Result<String> {
        self.node.must(script).with_context(|| self.log())
    }

    /// A property of the unit.
    fn property(&self, name: &str) -> Result<String> {
        Ok(self.node.must(&format!("systemctl show --value --property={name} fence-daemon"))?.trim().to_owned())
    }

    fn log(&self) -> String {
        self.node.must("journalctl --no-pager --unit=fence-daemon").unwrap_or_default()
    }

    fn wait_log(&self, words: &str, times: usize) -> Result<()> {
        poll_until(words, LIMIT, || Ok((self.log().matches(words).count() >= times).then_some(())))
            .with_context(|| self.log())
    }

    /// The serving daemon's process, if it differs from `but`.
    fn wait_serving(&self, but: &str) -> Result<String> {
        let waited = poll_until("the daemon", LIMIT, || {
            let now = self.property("MainPID")?;
            let serves = now != "0" && now != but && self.property("ActiveState")? == "active";
            Ok((serves && self.run("fence-daemon status")?.code == Some(0)).then_some(now))
        });
        waited.with_context(|| self.log())
    }

    /// The doctor's findings about libvirt that are `wrong`.
    fn doctor_about_libvirt(&self) -> Result<Vec<serde_json::Value>> {
        let doctor = self.run("fence-daemon doctor --json")?;
        let report: serde_json::Value = serde_json::from_str(&doctor.stdout).with_context(|| format!("{doctor:?}"))?;
        let findings = report["findings"].as_array().context("no findings")?.iter();
        let is_it = |finding: &&serde_json::Value| finding["check"] == "libvirt" && finding["state"] == "wrong";
        Ok(findings.filter(is_it).cloned().collect())
    }

    /// A file's inode, which a new file of that name does not share.
    fn identity(&self, file: &str) -> Result<String> {
        self.must(&format!("stat --format=%i:%a {file}"))
    }
}

#[test]
fn systemd_runs_the_daemon_by_the_unit() -> Result<()> {
    let host = Host::new()?;
    let verified = host.run(&format!("systemd-analyze verify {UNIT_PATH}"))?;
    // systemd also reads the files that the unit names, and reports errors in others' units.
    let about_us = verified.stderr.lines().any(|line| line.contains("fence-daemon"));
    ensure!(verified.code == Some(0) && !about_us, "{verified:?}");

    host.must("systemctl enable --now fence-daemon")?;
    let first = host.wait_serving("0")?;
    host.wait_log("the kernel program is attached", 1)?;
    ensure!(!but_for_oom(&host.log()).contains("cannot"), "the daemon lacks a right: {}", host.log());
    let process = host.must(&format!("cat /proc/{first}/status /proc/{first}/oom_score_adj /proc/{first}/limits"))?;
    let wanted = host
        .must(&format!("setpriv --bounding-set=-all,+{} grep CapBnd /proc/self/status", capabilities()?.join(",+")))?;
    ensure!(process.contains(wanted.trim()) && process.contains("NoNewPrivs:\t1"), "{wanted} {process}");
    // systemd needs the right for this.
    let may =
        host.must("setpriv --dump")?.lines().any(|line| line.contains("bounding set") && line.contains("sys_resource"));
    ensure!(!may || process.lines().any(|line| line == "-900"), "{process}");
    for (op, code) in [("status", 0), ("off", 0), ("status", 2), ("on", 0)] {
        let asked = host.run(&format!("fence_xvm -o {op} -H test"))?;
        ensure!(asked.code == Some(code), "{op}: {asked:?}; {}", host.log());
    }
    journalctl_shows_all_of_it(&host)?;

    host.must("systemctl reload fence-daemon")?;
    host.wait_log("the keys were read again", 1)?;
    let memory = host.identity("/run/fence-xdp/seen")?;
    ensure!(host.identity("/run/fence-xdp")?.ends_with(":700\n"));
    host.must(&format!("kill -KILL {first}"))?;
    let second = host.wait_serving(&first)?;
    ensure!(host.identity("/run/fence-xdp/seen")? == memory, "the replay cache is lost after a crash");
    host.must("systemctl stop fence-daemon")?;
    ensure!(host.property("Result")? == "success", "{}", host.log());
    ensure!(host.identity("/run/fence-xdp/seen")? == memory, "the replay cache is lost after a stop");
    host.must("systemctl start fence-daemon")?;
    host.wait_serving(&second)?;

    // Only one of the two may run.
    host.must("systemctl start fence_virtd")?;
    poll_until("its end", LIMIT, || Ok((host.property("ActiveState")? == "inactive").then_some(())))?;
    host.must("systemctl start fence-daemon")?;
    ensure!(host.run("systemctl is-active fence_virtd")?.stdout.trim() == "inactive");

    // The next start would fail the same way.
    host.must("systemctl stop fence-daemon && rm /etc/cluster/fence_xvm.key")?;
    let started = host.run("systemctl start fence-daemon")?;
    ensure!(started.code != Some(0) && host.property("ActiveState")? == "failed", "{started:?}");
    ensure!(host.property("ExecMainStatus")? == "255" && host.property("NRestarts")? == "0", "{}", host.log());
    Ok(())
}

/// The journal's lines for people, and its fields for programs.
fn journalctl_shows_all_of_it(host: &Host) -> Result<()> {
    let log = host.must("journalctl --no-pager --unit=fence-daemon --output=cat")?;
    for words in [
        &["ready", "group=225.0.0.12", "interface=eth0", "libvirt=1/1"][..],
        &["connected to libvirt", "uri=test:///default"],
        &["op=off", "domain=test", "source=192.168.122.41", "reply=success", "dead=", "replied="],
    ] {
        let shown = log.lines().any(|line| words.iter().all(|word| line.contains(word)));
        ensure!(shown, "no line with {words:?}: {log}");
    }
    // With the time, as an administrator reads it.
    let dated = host.must("journalctl --no-pager --unit=fence-daemon --output=short-iso")?;
    let line = dated.lines().find(|line| line.contains("op=off")).context("no line about off")?;
    ensure!(line.contains("T") && line.contains(" host fence-daemon["), "{line}");
    let fields = host.must(
        "journalctl --no-pager --unit=fence-daemon --output=json FENCE_OP=off FENCE_DOMAIN=test FENCE_REPLY=success",
    )?;
    let entry: serde_json::Value = serde_json::from_str(fields.lines().next().context("nothing has these fields")?)?;
    ensure!(entry["PRIORITY"] == "6" && entry["FENCE_SOURCE"] == "192.168.122.41", "{entry:#}");
    Ok(())
}

/// An interface that never comes delays neither the boot nor the guests.
#[test]
fn a_boot_with_a_misspelt_interface_goes_on_and_is_told() -> Result<()> {
    let hypervisor = Hypervisor::new()?;
    let host = Host::with(Libvirtd::start(&hypervisor)?, "virbrO", &["test:///default"])?;
    host.node.wait_up().with_context(|| host.log())?;
    let guests = host.must("systemctl show --value --property=ActiveState,Result libvirt-guests")?;
    ensure!(guests.contains("active") && guests.contains("success"), "{guests}");
    ensure!(host.property("ActiveState")? == "active", "{}", host.log());
    let status = host.property("StatusText")?;
    ensure!(status == "interface virbrO is not there: waiting for it", "{status}");
    let log = host.must("journalctl --no-pager --unit=fence-daemon --output=cat")?;
    ensure!(log.contains("nothing is served yet (interface virbrO is not there: waiting for it)"), "{log}");
    let asked = host.run("fence-daemon status")?;
    ensure!(asked.code == Some(1) && asked.stdout.contains("virbrO"), "{asked:?}");
    // The interface comes after all.
    host.must("ip link add virbrO type bridge && ip addr add 192.168.123.1/24 dev virbrO && ip link set virbrO up")?;
    host.wait_serving("0")?;
    Ok(())
}

/// A user's own libvirtd, and its socket's path in a node.
fn session(hypervisor: &Hypervisor) -> Result<(Process, String)> {
    let directory = hypervisor.path("shared/user");
    hypervisor.space().must("sh", &["-c", &format!("install -d -m 700 -o {USER} -g {USER} {directory}")])?;
    let mut command = Command::new("setpriv");
    command.args(["--reuid", &USER.to_string(), "--regid", &USER.to_string(), "--clear-groups", "libvirtd"]);
    command.env("HOME", &directory).env("XDG_RUNTIME_DIR", &directory);
    let mut process = Process::start(hypervisor.space(), &mut command)?;
    let socket = hypervisor.outside(&format!("{directory}/libvirt/libvirt-sock"));
    poll_until("a user's libvirtd", LIMIT, || {
        ensure!(process.is_running()?, "the user's libvirtd has ended");
        Ok(socket.exists().then_some(()))
    })
    .with_context(|| process.stderr().text())?;
    Ok((process, format!("/run/user/{USER}/libvirt/libvirt-sock")))
}

#[test]
fn each_form_of_uri_connects_under_the_unit() -> Result<()> {
    let hypervisor = Hypervisor::new()?;
    let libvirtd = Libvirtd::start(&hypervisor)?;
    std::fs::create_dir_all(hypervisor.outside(&hypervisor.path("shared")))?;
    let (_user, socket) = session(&hypervisor)?;
    let session = format!("qemu:///session?socket={socket}");
    let uris = [
        "qemu:///system",
        "lxc:///",
        "qemu+unix:///system",
        "qemu+ssh://root@host/system",
        "qemu+ssh://root@host/system?keyfile=/etc/ssh/fence",
        &session,
        "test:///default",
    ];
    let host = Host::with(libvirtd, "eth0", &uris)?;
    host.node.wait_up()?;
    // As systemd mounts it for a logged-in user; and root may reach the host by ssh.
    host.must(&format!(
        "mkdir -p /run/user/{USER} && mount --bind /shared/user /run/user/{USER} && \
         ssh-keygen -q -t ed25519 -N '' -f ~/.ssh/id_ed25519 && cp ~/.ssh/id_ed25519 /etc/ssh/fence && \
         cp ~/.ssh/id_ed25519.pub ~/.ssh/authorized_keys && systemctl start ssh && \
         ssh-keyscan -t ed25519 host > ~/.ssh/known_hosts 2> /dev/null && ssh -o BatchMode=yes root@host true"
    ))?;
    host.must("systemctl start fence-daemon")?;
    let report = || -> Result<serde_json::Value> {
        let asked = host.run("fence-daemon status --json")?;
        serde_json::from_str(&asked.stdout).with_context(|| format!("{asked:?}"))
    };
    let connected = poll_until("each URI to be connected", LIMIT, || {
        let report = report()?;
        let all = report["uris"].as_array().context("no URIs")?;
        Ok((all.len() == uris.len() && all.iter().all(|uri| uri["connected"] == true)).then_some(()))
    });
    connected.with_context(|| host.log())?;
    // A program that libvirt's client has started is an ordinary process.
    let children = host.must("for pid in $(pgrep -x ssh); do cat /proc/$pid/oom_score_adj /proc/$pid/stat; done")?;
    let scores: Vec<&str> = children.lines().step_by(2).collect();
    ensure!(!scores.is_empty() && scores.iter().all(|score| *score == "0"), "{children}");
    let nice = |stat: &str| stat.rsplit(") ").next().and_then(|rest| rest.split(' ').nth(16).map(|nice| nice == "0"));
    ensure!(children.lines().skip(1).step_by(2).all(|stat| nice(stat) == Some(true)), "{children}");
    // The doctor sees the URIs as the daemon does, also where the doctor has more rights.
    let wrong = host.doctor_about_libvirt()?;
    ensure!(wrong.is_empty(), "{wrong:#?}");
    // In a container with cgroup v1, systemd does not always notice that an ssh has ended, and
    // waits for it.
    let less = b"[Service]\nCapabilityBoundingSet=~CAP_SETPCAP\nTimeoutStopSec=5\n";
    host.node.write(&format!("{UNIT_PATH}.d/less.conf"), less, 0o644)?;
    host.must("systemctl daemon-reload && systemctl restart fence-daemon")?;
    let wrong = poll_until("the doctor to report the failing URI", LIMIT, || {
        let wrong = host.doctor_about_libvirt()?;
        Ok((wrong.len() == 2).then_some(wrong))
    })
    .with_context(|| host.log())?;
    for finding in wrong {
        let text = finding.to_string();
        ensure!(text.contains("qemu+ssh://") && text.contains("answers here, but not to the daemon"), "{text}");
        // With the daemon's rights the doctor fails like the daemon.
        let command = finding["commands"][0].as_str().with_context(|| text.clone())?;
        let tried = host.run(command)?;
        // The error message varies: libvirt's client sees either the ssh die or its pipe break.
        ensure!(tried.code != Some(0) && command.contains("nsenter"), "{command}: {tried:?}");
    }
    Ok(())
}

#[test]
fn the_rights_of_the_unit_are_enough_to_kill_a_machine_of_another_user() -> Result<()> {
    tools::require(&["setpriv"])?;
    let hypervisor = Hypervisor::new()?;
    let libvirtd = Libvirtd::start(&hypervisor)?;
    let Which::Ours(program) = Which::ours()? else { bail!("ours is not ours") };
    let rights = capabilities()?.join(",+");
    let script = format!(
        "#!/bin/sh\nexec setpriv --no-new-privs --bounding-set=-all,+{rights} '{}' \"$@\"\n",
        program.display()
    );
    let script = hypervisor.write_mode("confined", script.as_bytes(), 0o700)?;
    let mut config = Config::new(&hypervisor.write("fence.key", &KEY)?);
    config.uris = vec![qemu::URI.to_owned()];
    let server = Server::start(&hypervisor, &Which::Ours(script.into()), &config)?;

    // The machine's disk uses io_uring, so the daemon inspects its open files too.
    let disk = hypervisor.write("disk.img", &writing_disk())?;
    std::os::unix::fs::chown(hypervisor.outside(&disk), Some(USER), Some(USER))?;
    let xml = Machine::new("vm").disk(&disk, "io_uring").xml()?;
    let label =
        format!("<seclabel type='static' model='dac' relabel='no'><label>+{USER}:+{USER}</label></seclabel></domain>");
    libvirtd.define(qemu::URI, "vm", &xml.replace("</domain>", &label))?;
    libvirtd.start_domain(qemu::URI, "vm")?;
    let machine = Witness::of_qemu(&hypervisor, "vm")?;
    let status = std::fs::read_to_string(format!("/proc/{}/status", machine.pid))?;
    ensure!(
        status.lines().any(|line| line.starts_with(&format!("Uid:\t{USER}\t"))),
        "the machine runs as root: {status}"
    );

    // Killed by its process, not by libvirt, which needs none of these rights and takes a hundred
    // times as long.
    let mut asked = Command::new(&program);
    asked.args(["-f", &hypervisor.path("fence_virt.conf"), "status", "--json"]);
    poll_until("the daemon to hold the machine's process", LIMIT, || {
        let report = run(hypervisor.space(), &mut asked, LIMIT)?.stdout;
        let report: serde_json::Value = serde_json::from_str(&report).context(report)?;
        Ok(report["uris"][0]["domains"][0]["pid"].is_i64().then_some(()))
    })?;
    libvirtd.signal(Signal::SIGSTOP)?;

    let observer = Observer::new(&hypervisor, hypervisor.guest(90)?, &config.key_file);
    let position = server.log_position();
    observer.expect("off", "vm", 0).with_context(|| server.log())?;
    let fence: Fence = server.next_fence(position)?;
    ensure!(fence.get("via") == Some("kernel") && fence.step("dead").is_some(), "{fence:?}: {}", server.log());
    ensure!(!but_for_oom(&server.log()).contains("WARN"), "{}", server.log());
    Ok(())
}
