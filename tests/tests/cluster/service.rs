//! The systemd unit of dist: systemd accepts it and runs the daemon, and its rights suffice for all
//! that fencing needs.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use fence_common::wire::Op;
use fence_lab::client::{Client, Family};
use fence_lab::cluster::corosync::KEY_PATH;
use fence_lab::cluster::image::Image;
use fence_lab::cluster::lab::KEY;
use fence_lab::lab::{HYPERVISOR_V4, Hypervisor};
use fence_lab::peer::Peer;
use fence_lab::process::poll_until;
use fence_lab::server::Config;
use fence_lab::systemd::Booted;

use crate::host::{Host, LIMIT, NAME, SOCKET_UNIT_PATH, UNIT, UNIT_PATH, file, files};

/// How often the daemon is restarted under load, unless `FENCE_RESTARTS` says otherwise.
const RESTARTS: u32 = 10;
/// The pause between two requests, unless `FENCE_BETWEEN` says otherwise, in milliseconds.
const BETWEEN: u32 = 50;

/// How long a request may wait over a restart, on a loaded machine. It is below 1 s on a quiet one.
const DEAF: Duration = Duration::from_secs(2);

/// A number from the environment.
fn given(name: &str, otherwise: u32) -> Result<u32> {
    std::env::var(name).map_or(Ok(otherwise), |text| text.parse().with_context(|| format!("{name}={text}")))
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
pub(crate) fn but_for_oom(log: &str) -> String {
    let is_expected = |line: &&str| line.contains("CAP_SYS_RESOURCE") || line.contains("is not random");
    log.lines().filter(|line| !is_expected(line)).map(|line| format!("{line}\n")).collect()
}

/// A file's inode, which a new file of that name does not share.
fn identity(host: &Host, file: &str) -> Result<String> {
    host.must(&format!("stat --format=%i:%a {file}"))
}

#[test]
fn systemd_runs_the_daemon_by_the_unit() -> Result<()> {
    let host = Host::new(&Config::new(KEY_PATH))?;
    let guest = host.hypervisor().guest(1)?;
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
        host.expect(&guest, op, "test", code)?;
    }
    journalctl_shows_all_of_it(&host)?;

    host.must("systemctl reload fence-daemon")?;
    host.wait_log("the keys were read again", 1)?;
    let memory = identity(&host, "/run/fence-xdp/replays")?;
    ensure!(identity(&host, "/run/fence-xdp")?.ends_with(":700\n"));
    host.must(&format!("kill -KILL {first}"))?;
    let second = host.wait_serving(&first)?;
    ensure!(identity(&host, "/run/fence-xdp/replays")? == memory, "the replay cache is lost after a crash");
    host.must("systemctl stop fence-daemon")?;
    ensure!(host.property("Result")? == "success", "{}", host.log());
    ensure!(identity(&host, "/run/fence-xdp/replays")? == memory, "the replay cache is lost after a stop");
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
        &["ready", "group=225.0.0.12", "interface=virbr0", "libvirt=1/1"][..],
        &["connected to libvirt", "uri=test:///default"],
        &["op=off", "domain=test", "source=192.168.122.11", "reply=success", "dead=", "replied="],
    ] {
        let shown = log.lines().any(|line| words.iter().all(|word| line.contains(word)));
        ensure!(shown, "no line with {words:?}: {log}");
    }
    // With the time, as an administrator reads it.
    let dated = host.must("journalctl --no-pager --unit=fence-daemon --output=short-iso")?;
    let line = dated.lines().find(|line| line.contains("op=off")).context("no line about off")?;
    ensure!(line.contains("T") && line.contains(&format!(" {NAME} fence-daemon[")), "{line}");
    let fields = host.must(
        "journalctl --no-pager --unit=fence-daemon --output=json FENCE_OP=off FENCE_DOMAIN=test FENCE_REPLY=success",
    )?;
    let entry: serde_json::Value = serde_json::from_str(fields.lines().next().context("nothing has these fields")?)?;
    ensure!(entry["MESSAGE_ID"] == "4dcaa6fa25f442b1a53d0d2ebcfdb69e", "{entry:#}");
    ensure!(entry["PRIORITY"] == "6" && entry["FENCE_SOURCE"] == "192.168.122.11", "{entry:#}");
    Ok(())
}

/// `fence_virt` connects once. It fails if nobody listens, also for the time of a restart.
#[test]
fn systemd_keeps_the_port_open_over_a_restart() -> Result<()> {
    let config = Config { tcp: Some(vec![("socket", "systemd".to_owned())]), ..Config::new(KEY_PATH) };
    let host = Host::new(&config)?;
    let guest = host.hypervisor().guest(1)?;
    let key = host.hypervisor().write("fence.key", &KEY)?;
    let address = HYPERVISOR_V4.to_string();
    let asks = |when: &str| {
        let asked = Client::new("status", &key).domain("test").tcp(&address).run(guest.space())?;
        ensure!(asked.code == Some(0), "{when}: {asked:?}; {}", host.log());
        Ok(())
    };
    let verified = host.run(&format!("systemd-analyze verify {SOCKET_UNIT_PATH}"))?;
    ensure!(verified.code == Some(0) && !verified.stderr.contains("fence-daemon.socket"), "{verified:?}");

    host.must("systemctl enable --now fence-daemon.socket")?;
    ensure!(host.property("ActiveState")? == "inactive", "{}", host.log());
    asks("a connection starts the daemon")?;
    let first = host.wait_serving("0")?;
    let report = host.report()?;
    let tcp = &report["listeners"][1];
    ensure!(tcp["address"] == "::" && tcp["port"] == 1229 && tcp["hears"] == true, "{tcp:#}");
    std::thread::scope(|threads| {
        let restart = threads.spawn(|| host.must("systemctl restart fence-daemon"));
        let mut asked = 0;
        while !restart.is_finished() {
            asks("beside a restart")?;
            asked += 1;
        }
        ensure!(asked > 0, "nobody has asked");
        restart.join().unwrap_or_else(|_| bail!("the restart panicked")).map(drop)
    })?;
    let second = host.wait_serving(&first)?;
    asks("after a restart")?;

    // A socket of another name is nobody's, and keeps no other listener from serving.
    host.must(&format!("sed -i s/^FileDescriptorName=.*/FileDescriptorName=other/ {SOCKET_UNIT_PATH}"))?;
    host.must("systemctl daemon-reload && systemctl stop fence-daemon.socket fence-daemon")?;
    host.must("systemctl start fence-daemon.socket && systemctl start fence-daemon")?;
    host.wait_log("systemd passes no socket called tcp", 1)?;
    host.wait_log("systemd passes a socket called \"other\"", 1)?;
    host.expect(&guest, "status", "test", 0)?;
    ensure!(host.property("MainPID")? != second);
    let asked = host.run("fence-daemon status")?;
    ensure!(asked.code == Some(1) && asked.stdout.contains("FileDescriptorName=tcp"), "{asked:?}");
    Ok(())
}

/// Each request is sent once, at any time of a restart. It waits for the next daemon.
#[test]
fn no_request_is_lost_over_restarts() -> Result<()> {
    let (restarts, between) = (given("FENCE_RESTARTS", RESTARTS)?, given("FENCE_BETWEEN", BETWEEN)?);
    let host = Host::serving(&Config::new(KEY_PATH))?;
    let guest = host.hypervisor().guest(1)?;
    let peer = Peer::new(&guest, &KEY, Family::V4)?;
    let mut times = Vec::new();
    std::thread::scope(|threads| {
        let restarting = threads.spawn(|| -> Result<()> {
            let mut daemon = host.property("MainPID")?;
            for _ in 0..restarts {
                host.must("systemctl restart fence-daemon")?;
                daemon = host.wait_serving(&daemon)?;
            }
            Ok(())
        });
        while !restarting.is_finished() {
            let sent = Instant::now();
            peer.send(peer.request(Op::Status, "test")?)?;
            let lost = || format!("request {} is lost: {}", times.len(), host.log());
            let reply = peer.called_back(LIMIT)?.with_context(lost)?.converse().with_context(lost)?;
            ensure!(reply == 0, "request {}: {reply}; {}", times.len(), host.log());
            times.push(sent.elapsed());
            std::thread::sleep(Duration::from_millis(between.into()));
        }
        restarting.join().unwrap_or_else(|_| bail!("the restarts panicked"))
    })?;
    times.sort_unstable();
    let at = |share: usize| times.get(times.len().saturating_sub(1) * share / 1000).copied().unwrap_or_default();
    eprintln!(
        "{} requests over {restarts} restarts: half within {:?}, 99 % within {:?}, all within {:?}",
        times.len(),
        at(500),
        at(990),
        at(1000)
    );
    ensure!(times.len() > usize::try_from(restarts)? / 2, "only {} requests", times.len());
    ensure!(at(1000) < DEAF, "deaf for {:?}: {}", at(1000), host.log());
    Ok(())
}

/// Who asks again, as stock clients do, is answered after a crash. Only a connection ends with its
/// daemon.
#[test]
fn a_crash_costs_at_most_the_connections_of_its_moment() -> Result<()> {
    const CRASHES: u32 = 5;
    let host = Host::serving(&Config::new(KEY_PATH))?;
    let guest = host.hypervisor().guest(1)?;
    let peer = Peer::new(&guest, &KEY, Family::V4)?;
    let (mut answered, mut cut) = (0_u32, 0_u32);
    std::thread::scope(|threads| {
        let crashing = threads.spawn(|| -> Result<()> {
            let mut daemon = host.property("MainPID")?;
            for _ in 0..CRASHES {
                host.must(&format!("kill -KILL {daemon}"))?;
                daemon = host.wait_serving(&daemon)?;
            }
            Ok(())
        });
        while !crashing.is_finished() {
            let mut call = peer.ask(Op::Status, "test").with_context(|| host.log())?;
            match call.converse() {
                Ok(reply) => {
                    ensure!(reply == 0, "{reply}: {}", host.log());
                    answered += 1;
                }
                Err(_) => cut += 1,
            }
        }
        crashing.join().unwrap_or_else(|_| bail!("the crashes panicked"))
    })?;
    eprintln!("{answered} requests over {CRASHES} crashes, which have cut {cut} connections");
    ensure!(cut <= CRASHES && answered > CRASHES, "{answered} answered, {cut} cut: {}", host.log());
    Ok(())
}

/// Two networks have one group. systemd keeps the socket of each.
#[test]
fn no_request_is_lost_over_restarts_of_two_networks() -> Result<()> {
    let host = Host::serving(&Config::new(KEY_PATH))?;
    let guest = host.hypervisor().guest(1)?;
    host.must("ip link add virbr1 type bridge && ip addr add 192.168.123.1/24 dev virbr1 && ip link set virbr1 up")?;
    let section =
        format!("listeners {{ multicast \\\"b\\\" {{ interface = \\\"virbr1\\\"; key_file = \\\"{KEY_PATH}\\\"; }}");
    host.must(&format!("sed -i \"s|^listeners {{|{section}|\" /etc/fence_virt.conf && systemctl reload fence-daemon"))?;
    host.wait_log("multicast \"b\": served from now on", 1)?;
    let peer = Peer::new(&guest, &KEY, Family::V4)?;
    let mut daemon = host.property("MainPID")?;
    for turn in 0..3 {
        let kept = host.property("NFileDescriptorStore")?;
        ensure!(kept == "2", "turn {turn}: systemd keeps {kept} sockets: {}", host.log());
        std::thread::scope(|threads| {
            let restarting = threads.spawn(|| host.must("systemctl restart fence-daemon"));
            while !restarting.is_finished() {
                peer.send(peer.request(Op::Status, "test")?)?;
                let lost = || format!("a request is lost: {}", host.log());
                let reply = peer.called_back(LIMIT)?.with_context(lost)?.converse().with_context(lost)?;
                ensure!(reply == 0, "{reply}; {}", host.log());
            }
            restarting.join().unwrap_or_else(|_| bail!("the restart panicked"))
        })?;
        daemon = host.wait_serving(&daemon)?;
    }
    Ok(())
}

/// An interface that never comes delays neither the boot nor the guests.
#[test]
fn a_boot_with_a_misspelt_interface_goes_on_and_is_reported() -> Result<()> {
    let config = Config { interface: "virbrO".to_owned(), ..Config::new(KEY_PATH) };
    let host = Host::booting(&config, "fence-daemon.service libvirt-guests.service")?;
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

/// Nor does a hypervisor that never comes.
#[test]
fn a_boot_without_libvirt_goes_on_and_is_reported() -> Result<()> {
    let config = Config { uris: vec!["qemu:///system?socket=/run/libvirt/none".to_owned()], ..Config::new(KEY_PATH) };
    let host = Host::booting(&config, "fence-daemon.service libvirt-guests.service")?;
    let guests = host.must("systemctl show --value --property=ActiveState,Result libvirt-guests")?;
    ensure!(guests.contains("active") && guests.contains("success"), "{guests}");
    ensure!(host.property("ActiveState")? == "active", "{}", host.log());
    let status = host.property("StatusText")?;
    ensure!(status.contains("not connected to qemu:///system?socket=/run/libvirt/none"), "{status}");
    Ok(())
}

/// Of libvirt's modular daemons, the one that makes the interface begins when somebody asks its
/// socket. At boot nobody does.
#[test]
fn a_boot_of_debian_13_waits_for_no_interface_that_nobody_makes() -> Result<()> {
    const SOCKET: &[u8] = b"[Socket]\nListenStream=/run/libvirt/virtnetworkd-sock\n";
    const SERVICE: &[u8] = b"[Service]\nType=oneshot\nRemainAfterExit=yes\n\
        ExecStart=/bin/sh -c 'ip link add virbr9 type bridge && ip addr add 192.168.123.1/24 dev virbr9 && ip link set virbr9 up'\n";
    let config = Config { interface: "virbr9".to_owned(), ..Config::new(KEY_PATH) };
    let mut files = files(&config, "fence-daemon.service libvirt-guests.service virtnetworkd.socket")?;
    files.push(file("/etc/systemd/system/virtnetworkd.socket", 0o644, SOCKET));
    files.push(file("/etc/systemd/system/virtnetworkd.service", 0o644, SERVICE));
    let booted = Booted::of(&Image::lab("trixie")?, &Hypervisor::new()?, NAME, &files)?;
    let property = |unit: &str, name: &str| -> Result<String> {
        Ok(booted.must(&format!("systemctl show --value --property={name} {unit}"))?.trim().to_owned())
    };
    for (unit, state) in [("libvirt-guests", "active"), ("virtnetworkd.socket", "active"), ("virtnetworkd", "inactive")]
    {
        ensure!(property(unit, "ActiveState")? == state, "{unit}: {}", booted.must("systemctl --no-pager list-units")?);
    }
    let version = booted.must("cat /etc/debian_version")?;
    ensure!(version.starts_with("13."), "{version}");
    let status = property("fence-daemon", "StatusText")?;
    ensure!(status == "interface virbr9 is not there: waiting for it", "{status}");
    booted.must("systemctl start virtnetworkd")?;
    poll_until("the daemon", LIMIT, || Ok(booted.must("fence-daemon status").ok()))
        .with_context(|| booted.must("journalctl --no-pager --unit=fence-daemon").unwrap_or_default())
        .map(drop)
}
