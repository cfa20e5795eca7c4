//! `doctor --from-guest`: what is wrong in a guest, and how far a real request gets.

use std::process::Command;

use anyhow::{Result, ensure};
use fence_common::hash::HashKind;
use fence_lab::client::Family;
use fence_lab::lab::HYPERVISOR_V6;
use fence_lab::line::Port;
use fence_lab::process::Process;
use fence_lab::server::Config;
use fence_lab::testdriver::{self, State, TestDomain, uuid};
use fence_lab::tools;
use nix::sys::signal::Signal;

use super::{Told, ask, mend, says};
use crate::bench::Bench;

fn in_guest(bench: &Bench) -> Result<Told> {
    ask(bench.guest.space(), &["doctor", "--from-guest", "--key", &bench.key])
}

#[test]
fn a_healthy_guest_is_answered_and_listed() -> Result<()> {
    let bench = Bench::new()?;
    let _server = bench.serve(&bench.config("auto"))?;
    let told = in_guest(&bench)?;
    says(told.find("own name", "warning")?, &["no domain is called", "pcmk_host_map"])?;
    // The guest's own name, as its domain is called.
    bench.guest.space().must("hostname", &["test"])?;
    let told = in_guest(&bench)?;
    told.is_quiet()?;
    for check in ["fence_xvm", "key", "route", "port", "firewall", "exchange", "own name", "tcp", "ways"] {
        told.find(check, "ok")?;
    }
    says(told.find("route", "ok")?, &["eth0 (192.168.122.11)"])?;
    says(told.find("exchange", "ok")?, &["answered within", "1 domain"])?;
    says(told.find("fence_xvm", "ok")?, &["fence release"])
}

/// Multicast needs no route: `fence_xvm` names the interface itself.
#[test]
fn a_guest_without_a_way_out_is_reported() -> Result<()> {
    let bench = Bench::new()?;
    let _server = bench.serve(&bench.config("auto"))?;
    let space = bench.guest.space();
    space.must("ip", &["route", "del", "224.0.0.0/4"])?;
    space.must("ip", &["route", "del", "default"])?;
    let told = in_guest(&bench)?;
    told.find("route", "ok")?;
    told.find("exchange", "ok")?;
    for (breaking, mending) in [
        (["link", "set", "eth0", "multicast", "off"].as_slice(), ["link", "set", "eth0", "multicast", "on"].as_slice()),
        (&["addr", "del", "192.168.122.11/24", "dev", "eth0"], &["addr", "add", "192.168.122.11/24", "dev", "eth0"]),
    ] {
        space.must("ip", breaking)?;
        let told = in_guest(&bench)?;
        let finding = told.find("route", "wrong")?;
        says(finding, &["no interface is up, can multicast and has an IPv4 address", "do not leave this guest"])?;
        mend(space, finding)?;
        space.must("ip", mending)?;
        in_guest(&bench)?.find("route", "ok")?;
    }
    Ok(())
}

#[test]
fn a_key_that_is_missing_or_another_one_is_reported() -> Result<()> {
    let bench = Bench::new()?;
    let _server = bench.serve(&bench.config("auto"))?;
    let none = bench.hypervisor.path("none.key");
    let ask_with = |key: &str| ask(bench.guest.space(), &["doctor", "--from-guest", "--key", key]);
    let told = ask_with(&none)?;
    says(told.find("key", "wrong")?, &["does not exist"])?;
    mend(bench.guest.space(), told.find("key", "wrong")?)?;
    // Now a key exists, but not the hypervisor's.
    let told = ask_with(&none)?;
    told.find("key", "ok")?;
    says(told.find("exchange", "wrong")?, &["no callback", "compare fingerprints"])?;
    bench.guest.space().must("cp", &["-p", &bench.key, &none])?;
    ask_with(&none)?.find("exchange", "ok")?;
    bench.guest.space().must("chmod", &["640", &none])?;
    says(ask_with(&none)?.find("key", "warning")?, &["mode 0640"])
}

#[test]
fn another_owner_of_the_callback_port_is_named() -> Result<()> {
    let bench = Bench::new()?;
    let _server = bench.serve(&bench.config("auto"))?;
    let mut listen = Command::new(tools::find("busybox")?);
    listen.args(["nc", "-l", "-p", "1229"]);
    let listener = Process::start(bench.guest.space(), &mut listen)?;
    fence_lab::process::poll_until("the listener", super::LIMIT, || {
        let table = bench.guest.space().must("cat", &["/proc/net/tcp", "/proc/net/tcp6"])?.stdout;
        Ok(table.contains(":04CD ").then_some(()))
    })?;
    let told = in_guest(&bench)?;
    let finding = told.find("port", "wrong")?;
    says(finding, &["busybox (process ", "listens on TCP 1229", "cannot be called back"])?;
    told.find("exchange", "wrong")?;
    mend(bench.guest.space(), finding)?;
    listener.finish(super::LIMIT)?;
    let told = in_guest(&bench)?;
    told.find("port", "ok")?;
    told.find("exchange", "ok")?;
    Ok(())
}

#[test]
fn the_exchange_finding_says_how_far_a_request_came() -> Result<()> {
    let bench = Bench::new()?;
    let config = Config { auth: HashKind::Sha512, ..bench.config("auto") };
    let server = bench.serve(&config)?;
    says(in_guest(&bench)?.find("exchange", "wrong")?, &["called back, and the exchange failed", "-C"])?;
    // The same authentication as in the hypervisor's configuration.
    let file = bench.hypervisor.path("fence_virt.conf");
    ask(bench.guest.space(), &["-f", &file, "doctor", "--from-guest"])?.find("exchange", "ok")?;
    server.stop(Signal::SIGTERM)?;
    says(in_guest(&bench)?.find("exchange", "wrong")?, &["no callback", "the daemon does not run"])
}

#[test]
fn a_guest_that_may_fence_nobody_is_reported() -> Result<()> {
    let bench = Bench::new()?;
    let more = "groups { group { ip = \"192.168.122.99\"; uuid = \"test\"; } }".to_owned();
    let _server = bench.serve(&Config { more, ..bench.config("auto") })?;
    let told = in_guest(&bench)?;
    told.find("exchange", "ok")?;
    says(told.find("own name", "warning")?, &["the list is empty", "groups"])
}

#[test]
fn a_missing_client_is_reported() -> Result<()> {
    let bench = Bench::new()?;
    let client = tools::find("fence_xvm")?;
    bench.hypervisor.space().must("mount", &["--bind", "/dev/null", &client.to_string_lossy()])?;
    let told = in_guest(&bench)?;
    let finding = told.find("fence_xvm", "wrong")?;
    says(finding, &["there is no program `fence_xvm`"])?;
    ensure!(finding["commands"][0] == "apt-get install fence-virt", "{finding:#}");
    ensure!(told.find("exchange", "wrong").is_err(), "told once");
    Ok(())
}

#[test]
fn the_route_chooses_the_way_out_for_ipv6() -> Result<()> {
    let bench = Bench::new()?;
    let _server = bench.serve(&Config { family: Family::V6, ..bench.config("auto") })?;
    let file = bench.hypervisor.path("fence_virt.conf");
    let asked = || ask(bench.guest.space(), &["-f", &file, "doctor", "--from-guest"]);
    let told = asked()?;
    says(told.find("route", "ok")?, &["ff05::3:1", "eth0", "fd00:122::11"])?;
    told.find("exchange", "ok")?;
    super::on_hypervisor(&bench)?.is_quiet()?;
    bench.guest.space().must("sh", &["-c", "ip -6 route flush table all"])?;
    says(asked()?.find("route", "wrong")?, &["no route to ff05::3:1"])
}

/// The hypervisor is also the guest's gateway, so it is found.
#[test]
fn tcp_alone_is_enough_for_a_guest() -> Result<()> {
    let bench = Bench::new()?;
    let _server = bench.serve(&bench.with_tcp(&[("address", "0.0.0.0")]))?;
    bench.guest.space().must("hostname", &["test"])?;
    let both = in_guest(&bench)?;
    both.is_quiet()?;
    says(both.find("ways", "ok")?, &["answered: multicast; tcp at 192.168.122.1:1229"])?;
    // No callback comes through.
    let closed = "table inet t { chain c { type filter hook input priority 0; policy drop; \
                  ct state established,related accept; icmpv6 type { 133, 134, 135, 136 } accept; }; }";
    bench.guest.space().must("nft", &[closed])?;
    let told = in_guest(&bench)?;
    ensure!(told.code == Some(0) && told.checks("wrong").is_empty(), "{:#}", told.report);
    says(told.find("tcp", "ok")?, &["answered within", "1 domain"])?;
    says(told.find("exchange", "warning")?, &["no callback", "another way is answered"])?;
    says(told.find("ways", "ok")?, &["answered: tcp at 192.168.122.1:1229", "not answered: multicast"])?;
    told.find("own name", "ok")?;
    Ok(())
}

/// A guest whose only route out is IPv6. Its hypervisor's link-local address, which routers
/// announce, is of no use to `fence_virt`.
#[test]
fn the_ipv6_gateway_is_found_too() -> Result<()> {
    let bench = Bench::new()?;
    let _server = bench.serve(&bench.with_tcp(&[("address", "::")]))?;
    let route = |family: &str, rest: &str| {
        let arguments = format!("{family} route {rest}");
        bench.guest.space().must("ip", &arguments.split(' ').collect::<Vec<_>>())
    };
    route("-4", "del default via 192.168.122.1")?;
    let place = format!("tcp at [{HYPERVISOR_V6}]:1229, the gateway");
    route("-6", &format!("add default via {HYPERVISOR_V6} dev eth0 metric 50"))?;
    says(in_guest(&bench)?.find("tcp", "ok")?, &[&place, "answered within"])?;
    route("-6", "add default via fe80::1 dev eth0 metric 40")?;
    says(in_guest(&bench)?.find("tcp", "ok")?, &["[fe80::1]:1229", "no link-local address", "--tcp"])
}

#[test]
fn each_way_without_an_answer_has_its_remedy() -> Result<()> {
    let bench = Bench::new()?;
    let server = bench.serve(&bench.config("off"))?;
    let with = |options: &[&str]| {
        let common = ["doctor", "--from-guest", "--key", &bench.key];
        ask(bench.guest.space(), &[&common, options].concat())
    };
    // Nobody needs tcp where multicast is answered, unless it is asked for.
    says(with(&[])?.find("tcp", "ok")?, &["nobody listens", "multicast,tcp", "in section `tcp`"])?;
    says(with(&["--tcp", "192.168.122.1"])?.find("tcp", "wrong")?, &["nobody listens"])?;
    let route = |what| bench.guest.space().must("ip", &["route", what, "default", "via", "192.168.122.1"]);
    route("del")?;
    says(with(&["--tcp", "192.0.2.1:7"])?.find("tcp", "wrong")?, &["192.0.2.1:7", "ip route get 192.0.2.1"])?;
    route("add")?;
    server.stop(Signal::SIGTERM)?;
    let told = with(&[])?;
    told.find("tcp", "warning")?;
    says(told.find("ways", "wrong")?, &["nothing answers: multicast; tcp at", "cannot fence"])?;

    let port = "192.168.122.1:4464";
    let keys = [("address", "192.168.122.1"), ("port", "4464"), ("hash", "sha512")];
    let server = bench.serve(&bench.with_tcp(&keys))?;
    let told = with(&["--tcp", port, "--tcp", "192.168.122.1"])?;
    says(told.find("tcp", "wrong")?, &["closed without an answer", "a stronger digest than sha256"])?;
    ensure!(told.checks("wrong") == ["tcp", "tcp"], "{:#}", told.report);
    server.stop(Signal::SIGTERM)?;
    let _server = bench.serve(&bench.with_tcp(&keys[..2]))?;
    with(&["--tcp", port])?.find("tcp", "ok")?;
    let wall = "table inet w { chain c { type filter hook input priority 0; tcp dport 4464 drop; }; }";
    bench.hypervisor.space().must("nft", &[wall])?;
    says(with(&["--tcp", port])?.find("tcp", "wrong")?, &["no answer to a connection", "let TCP port 4464 in"])
}

/// The guest has neither a key nor a way to the hypervisor by its network.
#[test]
fn a_serial_line_alone_is_enough_for_a_guest() -> Result<()> {
    const LINE: &str = "/run/fence/test";
    let bench = Bench::new()?;
    let asker = TestDomain::new("test", &uuid(1), State::Running);
    let asker = asker.with_socket("serial", "/run/console").with_socket("serial", LINE);
    let node = bench.hypervisor.write("node.xml", testdriver::node(&[asker]).as_bytes())?;
    let port = Port::open(&bench.hypervisor, LINE)?;
    let serial = Some(vec![("path", "/run/fence".to_owned())]);
    let config = |groups: &str| Config {
        serial: serial.clone(),
        uris: vec![format!("test://{node}")],
        more: format!("groups {{ group {{ {groups} uuid = \"test\"; }} }}"),
        ..bench.config("off")
    };
    let space = bench.guest.space();
    space.must("hostname", &["test"])?;
    space.must("ip", &["link", "set", "eth0", "down"])?;
    let none = bench.hypervisor.path("none.key");
    let ask_by = |device: &str| ask(space, &["doctor", "--from-guest", "--key", &none, "--serial", device]);

    // Nobody hears the line yet.
    let told = ask_by(port.device())?;
    says(told.find("serial", "wrong")?, &["no answer", "does not hear this line", "fence_virt -o list -t 5 -D "])?;
    told.find("ways", "wrong")?;

    let server = bench.serve(&config("from = \"test\";"))?;
    let told = ask_by(port.device())?;
    ensure!(told.code == Some(0) && told.checks("wrong").is_empty(), "{:#}; {}", told.report, server.log());
    let by = format!("serial by {}", port.device());
    says(told.find("serial", "ok")?, &[&by, "answered within", "1 domain"])?;
    says(told.find("ways", "ok")?, &[&format!("answered: {by}"), "not answered: multicast"])?;
    says(told.find("key", "warning")?, &["needs none"])?;
    told.find("own name", "ok")?;

    // Another program reads the port as well.
    let mut reader = Command::new(tools::find("busybox")?);
    reader.args(["tail", "-f", port.device()]);
    let reader = Process::start(space, &mut reader)?;
    fence_lab::process::poll_until("the other reader", super::LIMIT, || {
        let told = ask_by(port.device())?;
        let named = |state| {
            told.findings().any(|one| {
                one["check"] == "serial"
                    && one["state"] == state
                    && one["seen"].as_str().is_some_and(|seen| seen.starts_with("busybox (process "))
            })
        };
        Ok((named("warning") || named("wrong")).then_some(()))
    })?;
    drop(reader);
    server.stop(Signal::SIGTERM)?;

    // What is no serial port, and a domain in no group.
    says(ask_by("/dev/null")?.find("serial", "wrong")?, &["no serial port of this machine"])?;
    says(ask_by("/dev/ttyS99")?.find("serial", "wrong")?, &["there is no /dev/ttyS99", "second serial port"])?;
    let _server = bench.serve(&config("ip = \"192.168.122.11\";"))?;
    let told = ask_by(port.device())?;
    told.find("serial", "ok")?;
    says(told.find("own name", "warning")?, &["the list is empty"])
}
