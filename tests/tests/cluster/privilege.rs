//! The service with little privilege: what systemd's sandbox leaves, what the daemon gives up
//! itself, and what becomes of a fence where a right is missing.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fence_lab::client::Client;
use fence_lab::cluster::corosync::KEY_PATH;
use fence_lab::cluster::lab::KEY;
use fence_lab::container;
use fence_lab::libvirtd::Libvirtd;
use fence_lab::machine::{Machine, writing_disk};
use fence_lab::observer::Observer;
use fence_lab::process::poll_until;
use fence_lab::qemu;
use fence_lab::server::{Config, faults};
use fence_lab::timings::Fence;
use fence_lab::witness::Witness;
use nix::sys::signal::Signal;

use crate::host::{Host, LIMIT, UNIT, UNIT_PATH};
use crate::service::but_for_oom;

/// The user of a machine, unknown to this system.
const USER: u32 = 12_345;
/// The most that `systemd-analyze security` may say, in tenths. docs/guide/installation.md has the
/// reasons for the rest.
const EXPOSURE: u32 = 27;
/// What the daemon keeps: CAP_DAC_OVERRIDE (1), CAP_KILL (5), CAP_NET_ADMIN (12) and CAP_SYS_PTRACE
/// (19).
const KEPT: u64 = 1 << 1 | 1 << 5 | 1 << 12 | 1 << 19;
/// CAP_IPC_LOCK.
const IPC_LOCK: u64 = 1 << 14;

/// The page that has the drop-ins.
const PAGE: &str = include_str!("../../../docs/guide/installation.md");
/// The page's drop-ins by their words, and what `systemd-analyze security` may say with each and
/// those before it, in tenths.
const STEPS: [(&str, u32); 3] = [("ProtectHome=yes", 24), ("User=fence-xdp", 21), ("CapabilityBoundingSet=~", 19)];

/// The lines of the page's drop-in that has these words.
fn drop_in_of_page(words: &str) -> Result<&'static str> {
    let mut blocks = PAGE.split("[Service]\n").filter_map(|block| Some(block.split_once("```")?.0));
    blocks.find(|block| block.lines().any(|line| line.starts_with(words))).with_context(|| format!("no {words}"))
}

#[test]
fn the_sandbox_stays_as_tight_as_it_is() -> Result<()> {
    const TRIED: &str = "/etc/systemd/system/tried.service";
    let host = Host::new(&Config::new(KEY_PATH))?;
    let limited = |path: &str, limit: u32| {
        host.must(&format!("systemd-analyze security --offline=true --threshold={limit} {path}")).map(drop)
    };
    limited(UNIT_PATH, EXPOSURE)?;
    let mut tried = UNIT.split_once("[Install]").context("no part [Install]")?.0.to_owned();
    for (words, limit) in STEPS {
        tried.push_str(drop_in_of_page(words)?);
        host.hypervisor().write_mode(&format!("{}{TRIED}", host.booted.root()), tried.as_bytes(), 0o644)?;
        limited(TRIED, limit).with_context(|| words.to_owned())?;
        ensure!(PAGE.contains(&format!("| {}.{} |\n", limit / 10, limit % 10)), "{limit} is not on the page");
    }
    Ok(())
}

/// The capabilities of the daemon's threads, by the threads' names.
fn capabilities(host: &Host, pid: &str) -> Result<Vec<(String, u64)>> {
    let text = host.must(&format!("cat /proc/{pid}/task/*/status"))?;
    let fields = |name: &'static str| text.lines().filter_map(move |line| line.strip_prefix(name)).map(str::trim);
    let effective = fields("CapEff:").zip(fields("CapPrm:"));
    fields("Name:")
        .zip(effective)
        .map(|(name, (effective, permitted))| {
            ensure!(effective == permitted, "{name}: {effective} of {permitted}");
            Ok((name.to_owned(), u64::from_str_radix(permitted, 16)?))
        })
        .collect()
}

/// Loading the program takes rights that no thread has afterwards. It is attached again without.
#[test]
fn the_daemon_gives_up_what_only_its_start_needs() -> Result<()> {
    let host = Host::serving(&Config::new(KEY_PATH))?;
    let pid = host.wait_serving("0")?;
    host.wait_log("the kernel program is attached", 1)?;
    let all = capabilities(&host, &pid)?;
    // systemd in a container may not be allowed to lift the limit.
    let limits = host.must(&format!("grep 'Max locked memory' /proc/{pid}/limits"))?;
    let kept = if limits.contains("unlimited") { KEPT } else { KEPT | IPC_LOCK };
    ensure!(all.len() > 5 && all.iter().all(|(_, held)| held & !kept == 0), "{all:x?}");
    ensure!(all.iter().filter(|(name, _)| name == "fence").all(|(_, held)| *held == kept), "{all:x?}");
    let log = all.iter().find(|(name, _)| name == "fence-log").context("no thread that logs")?;
    ensure!(log.1 == 0, "{log:x?}");

    let guest = host.hypervisor().guest(1)?;
    let attached = || Ok::<_, anyhow::Error>(host.report()?["listeners"][0]["interfaces"][0]["program"].clone());
    let first = attached()?;
    // The program must not take frames that are for others too.
    for (change, is_attached) in [("add link virbr0 name shared type macvlan", false), ("del shared", true)] {
        host.must(&format!("ip link {change}"))?;
        poll_until(change, LIMIT, || Ok((attached()?.is_string() == is_attached).then_some(())))
            .with_context(|| format!("{first:#}; {:#}; {}", attached().unwrap_or_default(), host.log()))?;
        host.expect(&guest, "status", "test", 0)?;
    }
    Ok(())
}

/// Starts a machine of another user than root, whose disk uses io_uring: the daemon inspects its
/// open files too.
fn machine_of_another_user(host: &Host, libvirtd: &Libvirtd) -> Result<Witness> {
    let hypervisor = host.hypervisor();
    let disk = hypervisor.write("disk.img", &writing_disk())?;
    std::os::unix::fs::chown(hypervisor.outside(&disk), Some(USER), Some(USER))?;
    let xml = Machine::new("vm").disk(&disk, "io_uring").xml()?;
    let label =
        format!("<seclabel type='static' model='dac' relabel='no'><label>+{USER}:+{USER}</label></seclabel></domain>");
    libvirtd.define(qemu::URI, "vm", &xml.replace("</domain>", &label))?;
    libvirtd.start_domain(qemu::URI, "vm")?;
    let machine = Witness::of_qemu(hypervisor, "vm")?;
    let status = std::fs::read_to_string(format!("/proc/{}/status", machine.pid))?;
    ensure!(
        status.lines().any(|line| line.starts_with(&format!("Uid:\t{USER}\t"))),
        "the machine runs as root: {status}"
    );
    Ok(machine)
}

/// Waits until the daemon holds the process of the domain of each of its URIs.
fn wait_held(host: &Host, uris: usize) -> Result<()> {
    poll_until("the daemon to hold each domain's process", LIMIT, || {
        let report = host.report()?;
        Ok((0..uris).all(|index| report["uris"][index]["domains"][0]["pid"].is_i64()).then_some(()))
    })
    .with_context(|| host.log())
}

#[test]
fn the_rights_of_the_unit_are_enough_to_kill_a_machine_of_another_user_and_a_container() -> Result<()> {
    let uris = [qemu::URI, container::URI].map(str::to_owned);
    let host = Host::new(&Config { uris: uris.to_vec(), ..Config::new(KEY_PATH) })?;
    let (hypervisor, libvirtd) = (host.hypervisor(), &host.libvirtd);
    machine_of_another_user(&host, libvirtd)?;
    container::start(libvirtd, "ct")?;
    let inside = Witness::of_container(hypervisor, "ct")?;
    host.must("systemctl start fence-daemon")?;

    // Killed by its process, not by libvirt, which needs none of these rights and takes a hundred
    // times as long.
    wait_held(&host, uris.len())?;
    host.wait_serving("0")?;
    poll_until("the kernel program", LIMIT, || {
        Ok(host.log().contains("the kernel program is attached now").then_some(()))
    })?;
    libvirtd.signal(Signal::SIGSTOP)?;

    let observer = Observer::new(hypervisor, hypervisor.guest(90)?, &hypervisor.write("fence.key", &KEY)?);
    observer.expect("off", "vm", 0).with_context(|| host.log())?;
    observer.expect("off", "ct", 0).with_context(|| host.log())?;
    ensure!(inside.is_dead()?, "{}", host.log());
    let fences = poll_until("the log lines", LIMIT, || {
        let fences: Vec<_> = host.log().lines().filter_map(Fence::parse).collect();
        Ok((fences.len() == 2).then_some(fences))
    })?;
    for fence in fences {
        ensure!(fence.get("via") == Some("kernel") && fence.step("dead").is_some(), "{fence:?}: {}", host.log());
    }
    let warnings = host.must("journalctl --no-pager --unit=fence-daemon --priority=warning --output=cat")?;
    ensure!(but_for_oom(&warnings).is_empty(), "{warnings}");
    Ok(())
}

/// A missing right costs time, and never makes a wrong answer.
#[test]
fn without_a_right_libvirt_fences_a_machine_of_another_user() -> Result<()> {
    let host = Host::new(&Config { uris: vec![qemu::URI.to_owned()], ..Config::new(KEY_PATH) })?;
    let (hypervisor, libvirtd) = (host.hypervisor(), &host.libvirtd);
    let observer = Observer::new(hypervisor, hypervisor.guest(90)?, &hypervisor.write("fence.key", &KEY)?);
    let mut daemon = "0".to_owned();
    for missing in ["CAP_KILL", "CAP_SYS_PTRACE", "CAP_DAC_OVERRIDE"] {
        let machine = machine_of_another_user(&host, libvirtd)?;
        host.drop_in("less", &format!("[Service]\nCapabilityBoundingSet=~{missing}\n"))?;
        host.must("systemctl restart fence-daemon")?;
        daemon = host.wait_serving(&daemon)?;
        host.wait_connected(1)?;
        observer.expect("off", "vm", 0).with_context(|| format!("{missing}: {}", host.log()))?;
        ensure!(machine.is_dead()?, "{missing}: {}", host.log());
        libvirtd.wait_state(qemu::URI, "vm", "shut off")?;
        libvirtd.virsh(qemu::URI, &["undefine", "vm"])?;
    }
    Ok(())
}

/// A port below 1024 takes a right that the unit does not have. systemd asks the daemon's command,
/// and takes the right back once the configuration does without.
#[test]
fn the_unit_gets_what_the_configuration_takes_and_no_more() -> Result<()> {
    const RIGHT: &str = "cap_net_bind_service";
    let host = Host::serving(&Config { tcp: Some(vec![("port", "999".to_owned())]), ..Config::new(KEY_PATH) })?;
    ensure!(host.property("CapabilityBoundingSet")?.contains(RIGHT), "{}", host.log());
    let tcp = host.report()?["listeners"][1].clone();
    ensure!(tcp["port"] == 999 && tcp["hears"] == true, "{tcp:#}");
    let nice = || host.must(&format!("ps -o ni= -p {}", host.property("MainPID")?));
    ensure!(nice()?.trim() == "-20", "{}", host.log());

    host.must("sed -i 's/999/1999/; s/^fence_virtd {/&\\n\\tpriority = \"normal\";/' /etc/fence_virt.conf")?;
    let before = host.property("MainPID")?;
    host.must("systemctl daemon-reload && systemctl restart fence-daemon")?;
    host.wait_serving(&before)?;
    ensure!(!host.property("CapabilityBoundingSet")?.contains(RIGHT), "{}", host.log());
    ensure!(nice()?.trim() == "0", "{}", host.must("systemctl cat fence-daemon")?);
    let refused = host.log();
    ensure!(!but_for_oom(&refused).contains("cannot"), "{refused}");
    Ok(())
}

/// The loop that serves requests stands still, and with it nothing else of the daemon.
#[test]
fn systemd_restarts_a_daemon_that_hangs_and_none_that_waits() -> Result<()> {
    const MORTAL: &str = "/usr/sbin/fence-daemon-faults";
    let host = Host::new(&Config::new(KEY_PATH))?;
    let guest = host.hypervisor().guest(1)?;
    let faults = std::fs::read(faults()?)?;
    host.hypervisor().write_mode(&format!("{}{MORTAL}", host.booted.root()), &faults, 0o755)?;
    let watched = "WatchdogSec=10\nTimeoutAbortSec=1\n";
    let hanging =
        format!("[Service]\n{watched}ExecStart=\nExecStart={MORTAL} -F\nEnvironment=FENCE_FAULT=in-the-loop\n");
    host.drop_in("hang", &hanging)?;
    host.must("systemctl start fence-daemon")?;
    let first = host.wait_serving("0")?;
    let (key, restarts) = (host.hypervisor().write("fence.key", &KEY)?, host.property("NRestarts")?);
    let mut asked = Client::new("off", &key).domain("test").start(guest.space())?;
    // The next daemon does not hang.
    host.drop_in("hang", &format!("[Service]\n{watched}"))?;
    // It lives, and does nothing.
    ensure!(host.property("MainPID")? == first && asked.is_running()?, "{}", host.log());
    host.wait_log("Watchdog timeout", 1)?;
    host.wait_serving(&first)?;
    // The client has asked again, and again.
    let answer = asked.finish(LIMIT)?;
    ensure!(answer.code == Some(0), "{answer:?}; {}", host.log());
    host.expect(&guest, "status", "test", 2)?;
    ensure!(host.property("NRestarts")? != restarts, "{}", host.log());
    // One that only waits is not restarted.
    host.must("sed -i s/virbr0/virbrO/ /etc/fence_virt.conf && systemctl restart fence-daemon")?;
    let waiting = host.property("MainPID")?;
    let restarts = host.property("NRestarts")?;
    std::thread::sleep(Duration::from_secs(10));
    ensure!(host.property("MainPID")? == waiting && host.property("NRestarts")? == restarts, "{}", host.log());
    Ok(())
}

/// systemd reads the key, also one that is encrypted, and shows it to the daemon alone.
#[test]
fn systemd_may_pass_the_key() -> Result<()> {
    let host = Host::new(&Config::new("/run/credentials/fence-daemon.service/fence_xvm.key"))?;
    let guest = host.hypervisor().guest(1)?;
    host.must(&format!("install -D -m 600 {KEY_PATH} /srv/keys/the.key && rm {KEY_PATH}"))?;
    host.drop_in("key", "[Service]\nLoadCredential=fence_xvm.key:/srv/keys/the.key\n")?;
    host.must("systemctl start fence-daemon")?;
    host.wait_serving("0")?;
    host.expect(&guest, "off", "test", 0)?;
    host.expect(&guest, "status", "test", 2)
}

/// The daemon need not be root, where libvirt lets its user in. The lab's libvirt lets in everybody
/// whom its own system knows.
#[test]
fn another_user_with_these_capabilities_kills_as_well() -> Result<()> {
    let uris = [qemu::URI, container::URI].map(str::to_owned);
    let host = Host::new(&Config { uris: uris.to_vec(), ..Config::new(KEY_PATH) })?;
    let (hypervisor, libvirtd) = (host.hypervisor(), &host.libvirtd);
    let machine = machine_of_another_user(&host, libvirtd)?;
    container::start(libvirtd, "ct")?;
    let inside = Witness::of_container(hypervisor, "ct")?;
    let page = drop_in_of_page("User=fence-xdp")?.replace("=fence-xdp", "=daemon").replace("=libvirt", "=daemon");
    host.drop_in("user", &format!("[Service]\n{page}"))?;
    host.must("systemctl start fence-daemon")?;
    let pid = host.wait_serving("0")?;
    host.wait_connected(uris.len())?;
    wait_held(&host, uris.len())?;
    ensure!(host.must(&format!("ps -o user= -p {pid}"))?.trim() == "daemon");
    host.wait_log("the kernel program is attached", 1)?;
    let observer = Observer::new(hypervisor, hypervisor.guest(90)?, &hypervisor.write("fence.key", &KEY)?);
    for (domain, witness) in [("vm", &machine), ("ct", &inside)] {
        observer.expect("off", domain, 0).with_context(|| host.log())?;
        ensure!(witness.is_dead()?, "{domain}: {}", host.log());
    }
    let by_libvirt = host.log().lines().filter_map(Fence::parse).any(|fence| fence.step("dead").is_none());
    ensure!(!by_libvirt, "not killed by its process: {}", host.log());
    Ok(())
}
