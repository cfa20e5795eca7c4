//! The serial listener: lines of the test driver's domains, at which the tests listen in QEMU's
//! place.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fence_common::wire::Op;
use fence_lab::line::{self, Line};
use fence_lab::server::{Config, Server};
use fence_lab::testdriver::{self, State, TestDomain, uuid};
use nix::sys::signal::Signal;

use crate::bench::Bench;

/// The directory of the lines.
const LINES: &str = "/run/fence";
/// How long is waited for what must not come.
const QUIET: Duration = Duration::from_secs(2);
/// On a loaded machine.
const LIMIT: Duration = Duration::from_secs(60);
const GROUPS: &str = "groups { group { from = \"asker\"; uuid = \"victim\"; uuid = \"asker\"; } group { from = \"other\"; uuid = \"other\"; } }";

/// Where domains of this name have their line.
fn at(name: &str) -> String {
    format!("{LINES}/{name}")
}

fn running(number: usize, name: &str) -> TestDomain {
    TestDomain::new(name, &uuid(number), State::Running)
}

/// A hypervisor with these domains, and the configuration with these keys of section `serial`.
fn lines(bench: &Bench, domains: &[TestDomain], keys: &[(&'static str, &str)], groups: &str) -> Result<Config> {
    let node = bench.hypervisor.write("node.xml", testdriver::node(domains).as_bytes())?;
    let keys = keys.iter().map(|(key, value)| (*key, (*value).to_owned())).collect();
    let more = groups.to_owned();
    Ok(Config { serial: Some(keys), uris: vec![format!("test://{node}")], more, ..bench.config("off") })
}

fn two() -> Vec<TestDomain> {
    // A domain's first port is its console.
    let asker = running(1, "asker").with_socket("serial", &at("console")).with_socket("serial", &at("asker"));
    vec![asker, running(2, "victim").with_socket("channel", &at("channel")), running(3, "other")]
}

/// The state of the serial listener.
fn state(server: &Server) -> Result<String> {
    let (_, report) = server.status()?;
    let listeners = report["listeners"].as_array().context("no listeners")?;
    let serial = listeners.iter().find(|one| one["kind"] == "serial").context("no serial listener")?;
    Ok(serial["status"].as_str().context("no state")?.to_owned())
}

#[test]
fn each_operation_is_answered_on_the_line_it_came_by() -> Result<()> {
    let bench = Bench::new()?;
    let mut asker = Line::listen(&bench.hypervisor, &at("asker"))?;
    let mut console = Line::listen(&bench.hypervisor, &at("console"))?;
    let server = bench.serve(&lines(&bench, &two(), &[("path", LINES)], GROUPS)?)?;
    asker.write(b"[    0.000000] Linux\r\nlogin: abba")?;
    let ops = [(Op::Status, 0), (Op::Off, 0), (Op::Status, 2), (Op::Off, 0), (Op::On, 0), (Op::Reboot, 0)];
    for (number, (op, reply)) in (1..).zip(ops) {
        let said = asker.reply(op, "victim", number)?;
        ensure!(said == reply, "{}: {said}: {}", op.name(), server.log());
    }
    ensure!(asker.reply(Op::Null, "", 10)? == 1 && asker.reply(Op::DevStatus, "", 11)? == 0, "{}", server.log());
    let list = asker.ask(Op::HostList, "", 12, LIMIT)?;
    // What the groups permit, and no more.
    ensure!(list.len() == 5 + 3 * 130 + 1 + 5, "{} bytes: {}", list.len(), server.log());
    ensure!(asker.reply(Op::Off, "other", 13)? == 3, "{}", server.log());
    ensure!(asker.reply(Op::Off, &uuid(2), 14)? == 3, "{}", server.log());
    ensure!(asker.reply(Op::Off, "nobody", 15)? == 3, "{}", server.log());
    ensure!(state(&server)?.starts_with("1 line; asker has sent 33 bytes"), "{}", state(&server)?);
    let log = server.log();
    ensure!(log.contains("source=asker (serial)") || log.contains("asker (serial)"), "{log}");
    ensure!(!console.is_heard(QUIET)?, "the console is somebody else's: {}", server.log());
    Ok(())
}

#[test]
fn each_key_of_the_serial_listener_has_its_effect() -> Result<()> {
    let bench = Bench::new()?;
    let node = format!("test://{}", bench.hypervisor.path("node.xml"));
    type Keys<'k> = &'k [(&'static str, &'k str)];
    let cases: [(Keys<'_>, &str, &str, bool); 7] = [
        (&[("path", LINES), ("key_file", "/nowhere")], GROUPS, "asker", true),
        (&[("path", "/run/elsewhere")], GROUPS, "asker", false),
        (&[("path", "/run")], GROUPS, "asker", false),
        (&[("path", LINES), ("mode", "serial")], GROUPS, "channel", false),
        (&[("path", LINES), ("mode", "vmchannel")], GROUPS, "channel", true),
        (&[("path", LINES), ("uri", &node)], GROUPS, "asker", true),
        (&[("path", LINES), ("uri", "test:///default")], GROUPS, "asker", false),
    ];
    for (keys, groups, socket, heard) in cases {
        let mut line = Line::listen(&bench.hypervisor, &at(socket))?;
        let mut config = lines(&bench, &two(), keys, groups)?;
        config.uris.push("test:///default".to_owned());
        let server = bench.serve(&config)?;
        let is_heard = line.is_heard(if heard { LIMIT } else { QUIET })?;
        ensure!(is_heard == heard, "{keys:?}: {}", server.log());
        // The victim may fence nobody, whatever it asks by.
        if heard {
            let expected = if socket == "asker" { 0 } else { 3 };
            ensure!(line.reply(Op::Status, "victim", 1)? == expected, "{keys:?}: {}", server.log());
        }
    }
    // Without groups nobody may ask, unless that is written down.
    let mut line = Line::listen(&bench.hypervisor, &at("asker"))?;
    let server = bench.serve(&lines(&bench, &two(), &[("path", LINES), ("permit", "everyone")], "")?)?;
    ensure!(line.reply(Op::Off, "other", 1)? == 0, "{}", server.log());
    Ok(())
}

#[test]
fn hostile_lines_cost_the_others_nothing() -> Result<()> {
    let bench = Bench::new()?;
    let names = ["garbage", "deaf", "loud", "asker"];
    let with_lines = names.iter().zip(10..).map(|(name, number)| {
        running(number, name).with_socket("serial", &at("console")).with_socket("serial", &at(name))
    });
    let mut domains: Vec<_> = with_lines.collect();
    // Consoles of one path would be contested; each is left alone anyhow.
    domains.push(running(2, "victim"));
    let groups = "groups { group { from = \"garbage\"; from = \"deaf\"; from = \"loud\"; from = \"asker\"; \
                  uuid = \"victim\"; } }";
    let mut sockets: Vec<_> =
        names.iter().map(|name| Line::listen(&bench.hypervisor, &at(name))).collect::<Result<_>>()?;
    let mut config = lines(&bench, &domains, &[("path", LINES)], groups)?;
    config.tcp = Some(vec![("address", "0.0.0.0".to_owned())]);
    // By IP as well, for the other ways in.
    config.more = groups.replace("uuid = \"victim\"", "ip = \"192.168.122.11\"; uuid = \"victim\"");
    let server = bench.serve(&config)?;
    for socket in &mut sockets {
        socket.connection()?;
    }
    let mut asker = sockets.pop().context("no asker")?;
    std::thread::scope(|scope| {
        let hostile: Vec<_> = sockets
            .iter_mut()
            .zip(names)
            .map(|(line, name)| {
                scope.spawn(move || -> Result<()> {
                    let line = line.connection()?;
                    line.set_write_timeout(Some(Duration::from_millis(100)))?;
                    let bytes = match name {
                        "garbage" => b"abba\x01\0abbabbabba".repeat(300),
                        "deaf" => line::request(Op::HostList, "", 1),
                        _ => (0..1000).flat_map(|seqno| line::request(Op::Status, "victim", seqno)).collect(),
                    };
                    for _ in 0..200 {
                        // The daemon may read slowly, and may hang up.
                        if std::io::Write::write_all(line, &bytes).is_err() {
                            std::thread::sleep(Duration::from_millis(10));
                        }
                    }
                    Ok(())
                })
            })
            .collect();
        let (by_tcp, by_multicast) = (|client: fence_lab::client::Client| client.tcp("192.168.122.1"), |client| client);
        for number in 0..10 {
            let said = asker.reply(Op::Status, "victim", number)?;
            ensure!(said == 0, "{said}: {}", server.log());
            bench.expect(&server, bench.guest.space(), &by_tcp(bench.client("status").domain("victim")), 0)?;
            bench.expect(&server, bench.guest.space(), &by_multicast(bench.client("status").domain("victim")), 0)?;
        }
        for hostile in hostile {
            hostile.join().map_err(|_| anyhow::anyhow!("a hostile line panicked"))??;
        }
        Ok(())
    })
}

#[test]
fn what_waited_while_the_daemon_stood_still_is_not_done() -> Result<()> {
    let bench = Bench::new()?;
    let mut asker = Line::listen(&bench.hypervisor, &at("asker"))?;
    let mut server = bench.serve(&lines(&bench, &two(), &[("path", LINES)], GROUPS)?)?;
    ensure!(asker.reply(Op::Status, "victim", 1)? == 0, "{}", server.log());
    server.process().signal(Signal::SIGSTOP)?;
    asker.write(&line::request(Op::Off, "victim", 2))?;
    std::thread::sleep(Duration::from_secs(8));
    server.process().signal(Signal::SIGCONT)?;
    let told = server.wait_log(0, LIMIT, |log| log.contains("the daemon stood still for").then_some(()));
    ensure!(told.is_some(), "{}", server.log());
    // Until news counts as news again.
    std::thread::sleep(Duration::from_secs(3));
    ensure!(asker.reply(Op::Status, "victim", 3)? == 0, "a stale request was carried out: {}", server.log());
    ensure!(asker.reply(Op::Off, "victim", 4)? == 0, "{}", server.log());
    Ok(())
}
