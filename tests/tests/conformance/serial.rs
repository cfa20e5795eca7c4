//! The serial listener: each operation, asked over a line at which the test listens in QEMU's
//! place.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use fence_common::wire::Op;
use fence_lab::lab::Hypervisor;
use fence_lab::line::Line;
use fence_lab::server::{Config, Server, Which};
use fence_lab::testdriver::{self, State, TestDomain, uuid};

use crate::report::{self, Compared};
use crate::scene::Expected;
use crate::talk::{self, described};

const LINES: &str = "/run/fence";
/// How long an answer may take on a loaded machine. fence_virtd begins a second after its start.
const LIMIT: Duration = Duration::from_secs(20);
/// How long is waited for an answer that does not come.
const QUIET: Duration = Duration::from_secs(3);

/// What is asked by the domain `asker`, and what both say. The numbers are the requests' own.
fn cases() -> Vec<(&'static str, Op, String, Expected)> {
    let both = |text: &str| Expected::both(text);
    let case = |name, op, target: &str, expected| (name, op, target.to_owned(), expected);
    vec![
        case("null", Op::Null, "", both("reply 1")),
        case("monitor", Op::DevStatus, "", both("reply 0")),
        case("status of one that runs", Op::Status, "victim", both("reply 0")),
        case("status by UUID", Op::Status, &uuid(2), both("reply 0")),
        case("off", Op::Off, "victim", both("reply 0")),
        case("status of one that is off", Op::Status, "victim", both("reply 2")),
        case("off again", Op::Off, "victim", both("reply 0")),
        case("on", Op::On, "victim", both("reply 0")),
        case("reboot", Op::Reboot, &uuid(2), both("reply 0")),
        case("list", Op::HostList, "", Expected::Same),
        case("off of one in another group", Op::Off, "stranger", both("reply 3")),
        case("off by a name where the group has the UUID", Op::Off, "asker", both("reply 3")),
        case("off of nobody", Op::Off, "nobody", both("reply 3")),
    ]
}

/// The domains, of which two have lines.
fn domains() -> Vec<TestDomain> {
    let with_line = |domain: TestDomain, name: &str| {
        domain.with_socket("serial", "/run/consoles/none").with_socket("serial", &format!("{LINES}/{name}"))
    };
    let running = |number, name: &str| TestDomain::new(name, &uuid(number), State::Running);
    let asker = with_line(running(1, "asker"), "asker");
    vec![asker, running(2, "victim"), with_line(running(3, "stranger"), "stranger")]
}

/// An answer without what comes before the magics.
fn said(answer: &[u8]) -> Result<Vec<u8>> {
    let Some(body) = answer.strip_prefix(b"abba") else {
        return Ok(if answer.is_empty() { Vec::new() } else { bail!("no magic: {answer:02x?}") });
    };
    let Some((records, [b'a', b'b', b'b', b'a', result])) = body.split_last_chunk::<5>() else {
        return Ok(body.to_vec());
    };
    // fence_virtd sends 1 for a list where others say 0, and nobody reads it.
    let _ = result;
    let whole = (records.len() - 1) / 130 * 130 + 1;
    Ok([records.get(..whole).context("no records")?, &[0]].concat())
}

/// The results of all cases with one server, and its log.
fn results(which: &Which) -> Result<(Vec<String>, String)> {
    let hypervisor = Hypervisor::new()?;
    let key = hypervisor.write("fence.key", &talk::key())?;
    let node = format!("test://{}", hypervisor.write("node.xml", testdriver::node(&domains()).as_bytes())?);
    let keys = [("uri", node.clone()), ("path", LINES.to_owned()), ("key_file", key.clone())];
    let mut config = Config { uris: vec![node], serial: Some(keys.to_vec()), ..Config::new(&key) };
    config.more = format!(
        "groups {{ group {{ uuid = \"{}\"; uuid = \"victim\"; uuid = \"{}\"; }} group {{ uuid = \"{}\"; uuid = \"stranger\"; }} }}\n",
        uuid(1),
        uuid(2),
        uuid(3),
    );
    let mut line = Line::listen(&hypervisor, &format!("{LINES}/asker"))?;
    let mut other = Line::listen(&hypervisor, &format!("{LINES}/stranger"))?;
    let server = Server::spawn(&hypervisor, which, &config, &[])?;
    line.connection().with_context(|| server.log())?;
    other.connection().with_context(|| server.log())?;
    let mut results = Vec::new();
    for ((_, op, target, _), seqno) in cases().into_iter().zip(1..) {
        results.push(described(&said(&line.ask(op, &target, seqno, LIMIT)?)?));
    }
    // A group is needed for who asks as well.
    results.push(described(&said(&other.ask(Op::Off, "victim", 100, LIMIT)?)?));
    // 74 bytes without the magic.
    let mut bytes = fence_lab::line::request(Op::Status, "victim", 101);
    bytes.splice(..4, *b"\xde\xad\xbe\xef");
    line.write(&bytes)?;
    let answer = line.read(QUIET, |said| said.ends_with(b"abba\0"))?;
    results.push(if answer.is_empty() { "silence".to_owned() } else { "an answer".to_owned() });
    // Stray bytes before a request.
    line.write(b"login: a")?;
    results.push(described(&said(&line.ask(Op::Status, "victim", 102, QUIET)?)?));
    Ok((results, server.log()))
}

pub(crate) fn play() -> Result<Vec<Compared>> {
    let (stock, stock_log) = results(&Which::Stock)?;
    let (ours, our_log) = results(&Which::ours()?)?;
    let named = cases().into_iter().map(|(name, .., expected)| (name, expected));
    let more = [
        ("a line of another group", Expected::both("reply 3")),
        ("no magic", Expected::differ("serial-frames", "an answer", "silence")),
        ("stray bytes before a request", Expected::differ("serial-frames", "reply 1", "reply 0")),
    ];
    let compared = named.chain(more).zip(stock.iter().zip(&ours)).map(|((name, expected), results)| {
        let logs = [("fence_virtd", stock_log.as_str()), ("fence-daemon", our_log.as_str())];
        report::compare_one(&format!("serial: {name}"), &expected, results, logs, None)
    });
    Ok(compared.collect())
}
