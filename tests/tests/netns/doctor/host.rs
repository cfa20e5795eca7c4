//! Faults of files, processes, libvirt and the host itself.

use std::os::unix::net::UnixListener;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use fence_lab::process::{poll_until, run};
use fence_lab::server::{Config, START_LIMIT, Server, Which};
use fence_lab::testdriver::{self, State, TestDomain};
use nix::sys::signal::Signal;

use super::{LIMIT, ask, mend, on_hypervisor, program, says};
use crate::bench::Bench;

/// A configuration without a running daemon.
fn configured(text: impl Fn(&Bench) -> String) -> Result<Bench> {
    let bench = Bench::new()?;
    bench.hypervisor.write("fence_virt.conf", text(&bench).as_bytes())?;
    Ok(bench)
}

#[test]
fn a_configuration_that_the_daemon_refuses_is_shown_and_what_is_doubtful_told() -> Result<()> {
    let bench = configured(|bench| bench.config("auto").render().replace("sha256", "md5"))?;
    let told = on_hypervisor(&bench)?;
    says(told.find("configuration", "wrong")?, &["md5", "fence_virt.conf:", "the daemon does not start with it"])?;
    told.find("kernel", "ok").context("what needs no configuration is looked at")?;
    bench.hypervisor.write_mode(
        "fence_virt.conf",
        (bench.config("auto").render() + "zork = \"1\";").as_bytes(),
        0o600,
    )?;
    let file = bench.hypervisor.path("fence_virt.conf");
    bench.hypervisor.space().must("chmod", &["666", &file])?;
    let told = on_hypervisor(&bench)?;
    let loud: Vec<_> = told.findings().filter(|finding| finding["check"] == "configuration").collect();
    ensure!(loud.len() == 3, "{loud:?}");
    says(told.find("configuration", "warning")?, &["0666"])?;
    mend(bench.hypervisor.space(), told.find("configuration", "warning")?)?;
    says(on_hypervisor(&bench)?.find("configuration", "warning")?, &["zork"])?;
    bench.hypervisor.space().must("rm", &[&file])?;
    says(on_hypervisor(&bench)?.find("configuration", "wrong")?, &["cannot read", "make one"])
}

#[test]
fn a_key_is_told_by_a_fingerprint_that_is_the_same_everywhere() -> Result<()> {
    let bench = Bench::new()?;
    let _server = bench.serve(&Config { key_file2: Some("/run/lab/second".to_owned()), ..bench.config("auto") })?;
    let told = on_hypervisor(&bench)?;
    says(told.find("key2", "ok")?, &["/run/lab/second does not exist"])?;
    let here = told.find("key", "ok")?["seen"].clone();
    let there = ask(bench.guest.space(), &["doctor", "--from-guest", "--key", &bench.key])?;
    ensure!(there.find("key", "ok")?["seen"] == here);
    let digits = here.as_str().unwrap_or_default().rsplit("fingerprint ").next().unwrap_or_default();

    // The same key twice adds nothing; another key has another fingerprint.
    bench.hypervisor.write("second", &crate::bench::key())?;
    says(on_hypervisor(&bench)?.find("key2", "warning")?, &["the same key"])?;
    bench.hypervisor.write("second", &[7; 512])?;
    let told = on_hypervisor(&bench)?;
    let second = told.find("key2", "ok")?["seen"].as_str().unwrap_or_default();
    ensure!(second.contains("512 bytes") && !second.contains(&digits[..4]), "{second}");
    Ok(())
}

#[test]
fn a_key_that_is_no_good_is_reported_and_made_good() -> Result<()> {
    let bench = configured(|bench| bench.config("auto").render())?;
    let space = bench.hypervisor.space();
    for (state, breaking, words) in [
        ("warning", "chmod 644 KEY", "mode 0644"),
        ("warning", "chown 1234 KEY", "user with ID 1234"),
        ("wrong", ": > KEY", "is empty"),
        ("wrong", "rm KEY", "does not exist"),
        ("warning", "echo short > KEY", "6 bytes"),
    ] {
        on_hypervisor(&bench)?.find("key", "ok")?;
        space.must("sh", &["-c", &breaking.replace("KEY", &bench.key)])?;
        let told = on_hypervisor(&bench)?;
        let finding = told.find("key", state).with_context(|| breaking)?;
        says(finding, &[words])?;
        mend(space, finding)?;
        let told = on_hypervisor(&bench)?;
        ensure!(told.find("key", state).is_err(), "{breaking}: {:#}", told.report);
    }
    Ok(())
}

#[test]
fn a_daemon_that_does_not_run_or_hangs_is_reported() -> Result<()> {
    let bench = Bench::new()?;
    let mut server = bench.serve(&bench.config("auto"))?;
    let pid = server.process().id();
    on_hypervisor(&bench)?.is_quiet()?;
    server.process().signal(Signal::SIGSTOP)?;
    says(on_hypervisor(&bench)?.find("daemon", "wrong")?, &["does not answer", "start it again"])?;
    server.process().signal(Signal::SIGCONT)?;
    ensure!(server.stop(Signal::SIGTERM)?.code == Some(0), "{pid}");
    let told = on_hypervisor(&bench)?;
    says(told.find("daemon", "wrong")?, &["no daemon answers", "start the daemon"])?;
    says(told.find("membership", "unknown")?, &["not joined"])?;
    told.find("port", "ok")?;
    Ok(())
}

#[test]
fn another_owner_of_the_udp_port_is_named() -> Result<()> {
    let bench = Bench::new()?;
    let stock = Server::start(&bench.hypervisor, &Which::Stock, &bench.config("auto"))?;
    let told = on_hypervisor(&bench)?;
    let finding = told.find("port", "wrong")?;
    says(finding, &["fence_virtd (process ", "has UDP port 1229"])?;
    ensure!(finding["commands"][0] == "systemctl disable --now fence_virtd", "{finding:#}");
    drop(stock);

    // Our own daemon, but with another configuration than the doctor's.
    let other =
        bench.config("auto").render().replacen("fence_virtd {", "fence_virtd { state_directory = \"/run/other\";", 1);
    let other = bench.hypervisor.write("other.conf", other.as_bytes())?;
    let mut server = Server::spawn_with_file(&bench.hypervisor, &Which::ours()?, &other, 1229, &[])?;
    server.wait_ready(START_LIMIT)?;
    let told = on_hypervisor(&bench)?;
    let finding = told.find("port", "wrong")?;
    says(finding, &["fence-daemon (process ", "not the daemon of this configuration", "-f"])?;
    ask(bench.hypervisor.space(), &["-f", &other, "doctor"])?.is_quiet()?;
    mend(bench.hypervisor.space(), finding)?;
    server.finish(LIMIT)?;
    on_hypervisor(&bench)?.find("port", "ok")?;
    Ok(())
}

#[test]
fn a_directory_that_cannot_be_written_to_is_reported() -> Result<()> {
    let bench = configured(|bench| bench.config("auto").render())?;
    let space = bench.hypervisor.space();
    says(on_hypervisor(&bench)?.find("state", "ok")?, &["can be made"])?;
    space.must("mkdir", &["/run/fence-xdp"])?;
    space.must("mount", &["-t", "tmpfs", "-o", "ro,mode=700", "none", "/run/fence-xdp"])?;
    let told = on_hypervisor(&bench)?;
    let finding = told.find("state", "wrong")?;
    says(finding, &["/run/fence-xdp", "Read-only", "nobody is fenced twice"])?;
    mend(space, finding)?;
    on_hypervisor(&bench)?.find("state", "ok")?;
    space.must("umount", &["/run/fence-xdp"])?;
    space.must("mount", &["-t", "tmpfs", "-o", "size=4k,mode=700", "none", "/run/fence-xdp"])?;
    space.must("sh", &["-c", "head -c 4096 /dev/zero > /run/fence-xdp/full"])?;
    says(on_hypervisor(&bench)?.find("state", "wrong")?, &["no space is left"])?;
    Ok(())
}

#[test]
fn a_uri_that_is_dead_or_hangs_is_reported_and_delays_by_its_limit_only() -> Result<()> {
    let bench = configured(|bench| {
        let uris = ["dead", "hung"].map(|name| format!("qemu+unix:///system?socket=/run/lab/{name}"));
        Config { uris: [uris.as_slice(), &["test:///default".to_owned()]].concat(), ..bench.config("auto") }.render()
    })?;
    // The socket accepts connections and never answers.
    let _hung = UnixListener::bind(bench.hypervisor.outside("/run/lab/hung"))?;
    let told = on_hypervisor(&bench)?;
    let wrong: Vec<_> =
        told.findings().filter(|finding| finding["check"] == "libvirt" && finding["state"] == "wrong").collect();
    let [dead, hung] = wrong.as_slice() else { anyhow::bail!("{:#}", told.report) };
    says(dead, &["/run/lab/dead", "cannot be fenced"])?;
    says(hung, &["/run/lab/hung", "does not answer within 5 s", "hangs"])?;
    ensure!(dead["commands"][0].as_str().is_some_and(|line| line.starts_with("virsh -c 'qemu+unix:")), "{dead:#}");
    says(told.find("libvirt", "ok")?, &["test:///default"])?;
    Ok(())
}

#[test]
fn names_that_a_cluster_cannot_use_are_reported() -> Result<()> {
    let long = "x".repeat(64);
    let names = ["node1", "on", "my node", "a:b", &long, "4417ce60-1b43-4d3a-8f0e-95d6c2f0e0b1"];
    let domains: Vec<_> = (0..)
        .zip(names)
        .map(|(number, name)| TestDomain::new(name, &testdriver::uuid(number), State::Running))
        .collect();
    let bench = Bench::new()?;
    let node = bench.hypervisor.write("node.xml", testdriver::node(&domains).as_bytes())?;
    let other = testdriver::node(&[TestDomain::new("node1", &testdriver::uuid(99), State::ShutOff)]);
    let other = bench.hypervisor.write("other.xml", other.as_bytes())?;
    let uris = vec![format!("test://{node}"), format!("test://{other}")];
    let config = Config { uris, ..bench.config("auto") };
    let _server = bench.serve(&config)?;
    let told = on_hypervisor(&bench)?;
    let seen: Vec<_> = told
        .findings()
        .filter(|finding| finding["check"] == "domains" && finding["state"] == "warning")
        .filter_map(|finding| finding["seen"].as_str())
        .collect();
    ensure!(seen.len() == 6 && told.code == Some(0), "{:#}", told.report);
    for words in ["as a state", "my node", "a:b", "longer than", "looks like a UUID", "node1 exists 2 times"] {
        ensure!(seen.iter().any(|seen| seen.contains(words)), "no {words} in {seen:?}");
    }
    Ok(())
}

#[test]
fn entries_of_groups_that_no_domain_has_are_reported() -> Result<()> {
    // libvirt's test driver has one domain, `test`.
    let groups = "groups { group = \"web\" { ip = \"192.168.122.11\"; uuid = \"TEST\"; uuid = \"tset\"; } }\n";
    let with = |uris: &[&str]| {
        configured(|bench| {
            let uris = uris.iter().map(|&uri| uri.to_owned()).collect();
            Config { uris, more: groups.to_owned(), ..bench.config("auto") }.render()
        })
    };
    let told = on_hypervisor(&with(&["test:///default"])?)?;
    says(told.find("domains", "warning")?, &["no domain is called `tset`, which the group `web`", "virsh list"])?;
    ensure!(told.checks("warning").iter().filter(|check| **check == "domains").count() == 1, "{:#}", told.report);
    // A domain may be at a URI that does not answer.
    let told = on_hypervisor(&with(&["test:///default", "qemu+unix:///system?socket=/run/lab/dead"])?)?;
    ensure!(!told.checks("warning").contains(&"domains"), "{:#}", told.report);
    Ok(())
}

/// A preloaded library shows the doctor another time and another state of the kernel's clock.
#[test]
fn a_clock_that_is_off_is_reported() -> Result<()> {
    const SOURCE: &str = "#include <sys/timex.h>\n#include <time.h>\n#include <stdlib.h>\n#include <string.h>\n\
        int adjtimex(struct timex *t) { memset(t, 0, sizeof *t); return getenv(\"UNKEPT\") ? TIME_ERROR : TIME_OK; }\n\
        int clock_gettime(clockid_t c, struct timespec *t) { t->tv_sec = atol(getenv(\"NOW\")); t->tv_nsec = 0; return 0; }\n";
    let bench = configured(|bench| bench.config("auto").render())?;
    let space = bench.hypervisor.space();
    let (source, library) = (bench.hypervisor.write("clock.c", SOURCE.as_bytes())?, bench.hypervisor.path("clock.so"));
    space.must("cc", &["-shared", "-fPIC", "-o", &library, &source])?;
    let asked = |now: &str, unkept: bool| -> Result<serde_json::Value> {
        let mut command = Command::new(program()?);
        command.args(["-f", &bench.hypervisor.path("fence_virt.conf"), "doctor", "--json"]);
        command.env("LD_PRELOAD", &library).env("NOW", now);
        if unkept {
            command.env("UNKEPT", "1");
        }
        let said = run(space, &mut command, LIMIT)?;
        let report: serde_json::Value = serde_json::from_str(&said.stdout).with_context(|| said.stderr)?;
        let clock = report["findings"].as_array().into_iter().flatten().find(|finding| finding["check"] == "clock");
        clock.cloned().with_context(|| format!("{report:#}"))
    };
    let now = "1795379647";
    ensure!(asked(now, false)?["state"] == "ok");
    let unkept = asked(now, true)?;
    // The first part fails where no service keeps the clock.
    let keeps = unkept["commands"][0].as_str().is_some_and(|command| {
        command.starts_with("timedatectl set-ntp true || ") && command.contains("install systemd-timesyncd")
    });
    ensure!(unkept["state"] == "warning" && keeps, "{unkept:#}");
    let old = asked("100", false)?;
    ensure!(old["state"] == "wrong", "{old:#}");
    says(&old, &["year is 1970", "no log of this host can be compared"])
}

#[test]
fn the_boot_finding_needs_systemd() -> Result<()> {
    let bench = Bench::new()?;
    let _server = bench.serve(&bench.config("auto"))?;
    ensure!(on_hypervisor(&bench)?.find("boot", "unknown").is_err(), "systemd does not run here");
    let unit = |name: &str| {
        let text = "[Service]\nExecStart=/bin/true\n[Install]\nWantedBy=multi-user.target\n";
        bench.hypervisor.write_mode(&format!("/run/systemd/system/{name}.service"), text.as_bytes(), 0o644)
    };
    // Depends on what this machine starts at boot.
    bench.hypervisor.space().must("mount", &["-t", "tmpfs", "none", "/etc/systemd/system"])?;
    for name in ["fence-daemon", "fence_virtd"] {
        unit(name)?;
        let wants = "/run/systemd/system/multi-user.target.wants";
        bench.hypervisor.space().must("mkdir", &["-p", wants])?;
        bench.hypervisor.space().must("ln", &["-s", &format!("../{name}.service"), wants])?;
        let told = on_hypervisor(&bench)?;
        told.find("boot", "ok")?;
        ensure!(told.find("boot", "warning").is_ok() == (name == "fence_virtd"), "{:#}", told.report);
    }
    says(on_hypervisor(&bench)?.find("boot", "warning")?, &["fence_virtd starts at boot", "only one of them"])?;
    bench.hypervisor.space().must("sh", &["-c", "rm /run/systemd/system/multi-user.target.wants/*"])?;
    let told = on_hypervisor(&bench)?;
    says(told.find("boot", "warning")?, &["fence-daemon does not start at boot"])?;
    ensure!(told.find("boot", "warning")?["commands"][0] == "systemctl enable fence-daemon");
    Ok(())
}

#[test]
fn a_missing_right_to_load_the_program_is_named() -> Result<()> {
    let bench = Bench::new()?;
    let script = format!("#!/bin/sh\nexec setpriv --bounding-set=-bpf,-sys_admin,-perfmon {} \"$@\"\n", program()?);
    let wrapper = bench.hypervisor.write_mode("daemon", script.as_bytes(), 0o700)?;
    let _server = Server::start(&bench.hypervisor, &Which::Ours(wrapper.into()), &bench.config("auto"))?;
    let told = on_hypervisor(&bench)?;
    says(told.find("kernel", "warning")?, &["lacks CAP_PERFMON, CAP_BPF", "CapabilityBoundingSet"])?;
    says(told.find("program", "warning")?, &["log says why"])?;
    says(told.find("daemon", "wrong")?, &["degraded", "kernel program is not attached"])?;
    Ok(())
}

#[test]
fn missing_root_is_the_first_finding() -> Result<()> {
    let bench = Bench::new()?;
    let _server = bench.serve(&bench.config("auto"))?;
    let copy = bench.copied_program()?;
    let conf = bench.hypervisor.path("fence_virt.conf");
    let mut command = Command::new("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups", &copy, "-f", &conf, "doctor"]);
    let said = run(bench.hypervisor.space(), &mut command, LIMIT)?;
    ensure!(said.code == Some(1) && said.stdout.starts_with("WRONG   privileges    this is not root\n"), "{said:?}");
    Ok(())
}

#[test]
fn a_guest_with_another_key_and_one_that_cannot_be_called_back_are_named() -> Result<()> {
    let bench = Bench::new()?;
    let _server = bench.serve(&bench.config("auto"))?;
    let wrong = bench.hypervisor.write("wrong.key", &[9; 512])?;
    let space = bench.guest.space();
    fence_lab::client::Client::new("status", &wrong).domain("test").timeout(3).run(space)?;
    let told = on_hypervisor(&bench)?;
    says(told.find("requests", "warning")?, &["192.168.122.11", "none that was right", "another key"])?;
    // The right key, but a port that nobody listens on.
    let other = bench.hypervisor.guest(2)?;
    other.space().must("iptables", &["-A", "INPUT", "-p", "tcp", "--dport", "1229", "-j", "REJECT"])?;
    bench.client("status").domain("test").timeout(3).run(other.space())?;
    poll_until("the callback to fail", LIMIT, || {
        let told = on_hypervisor(&bench)?;
        let named = |finding: &&serde_json::Value| {
            finding["check"] == "requests"
                && says(finding, &["192.168.122.12", "could not be called back", "firewall"]).is_ok()
        };
        Ok(told.findings().find(named).map(|_| ()))
    })?;
    // A client that works again is not reported.
    other.space().must("iptables", &["-F"])?;
    ensure!(bench.client("status").domain("test").run(other.space())?.code == Some(0));
    let told = on_hypervisor(&bench)?;
    ensure!(
        !told.findings().any(|finding| says(finding, &["192.168.122.12", "could not be"]).is_ok()),
        "{:#}",
        told.report
    );
    Ok(())
}

/// Without its default key file, `fence_xvm` sends unsigned requests, prints no warning and waits
/// for an answer.
#[test]
fn a_guest_whose_key_file_is_missing_is_named_by_all_that_can_be_asked() -> Result<()> {
    for attach in ["auto", "off"] {
        let bench = Bench::new()?;
        let server = bench.serve(&bench.config(attach))?;
        let space = bench.guest.space();
        ensure!(
            space.must("sh", &["-c", "! test -e /etc/cluster/fence_xvm.key"]).is_ok(),
            "this machine has a default key, which the test must not find"
        );
        let mut command = Command::new("fence_xvm");
        let asked = run(space, command.args(["-o", "status", "-H", "test", "-t", "4"]), LIMIT)?;
        ensure!(asked.code != Some(0), "{asked:?}");

        let mut status = Command::new(program()?);
        status.args(["-f", &bench.hypervisor.path("fence_virt.conf"), "status"]);
        let page = run(bench.hypervisor.space(), &mut status, LIMIT)?.stdout;
        let row = page.lines().find(|line| line.starts_with("192.168.122.11 ") && line.contains("key file is missing"));
        ensure!(row.is_some(), "attach={attach}: {page}");
        ensure!(page.lines().any(|line| line.starts_with("drop_unsigned ")), "attach={attach}: {page}");
        let told = on_hypervisor(&bench)?;
        says(told.find("requests", "warning")?, &["192.168.122.11", "drop_unsigned", "fence_xvm.key is missing"])?;
        let line = poll_until("a line in the log", LIMIT, || {
            Ok(server.log().lines().find(|line| line.contains("they have no digest")).map(str::to_owned))
        })?;
        ensure!(line.contains("of 192.168.122.11"), "{line}");

        // A client that signs its requests again is not reported any more.
        ensure!(bench.client("status").domain("test").run(space)?.code == Some(0));
        on_hypervisor(&bench)?.is_quiet()?;
        ensure!(server.log().matches("they have no digest").count() == 1, "{}", server.log());
    }
    Ok(())
}

/// Debian's unit of `fence_virtd` takes its flags from this file; ours does not.
#[test]
fn flags_of_the_stock_service_that_would_be_lost_are_reported() -> Result<()> {
    let bench = configured(|bench| bench.config("auto").render())?;
    let space = bench.hypervisor.space();
    // Only in the lab.
    space.must("mount", &["-t", "tmpfs", "none", "/etc/default"])?;
    let set = |flags: &str| {
        space.must("sh", &["-c", &format!("echo 'FENCE_VIRTD_ARGS=\"{flags}\"' > /etc/default/fence_virtd")])
    };
    set("-w")?;
    let told = on_hypervisor(&bench)?;
    ensure!(told.find("configuration", "warning").is_err(), "{:#}", told.report);
    set("-w -f /etc/cluster/other.conf")?;
    let told = on_hypervisor(&bench)?;
    says(
        told.find("configuration", "warning")?,
        &["/etc/default/fence_virtd", "-f /etc/cluster/other.conf", "does not read"],
    )
}
