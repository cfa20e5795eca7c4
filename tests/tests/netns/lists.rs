//! Host lists that are longer than what one write to a socket takes.

use anyhow::{Result, ensure};
use fence_lab::server::Config;
use fence_lab::testdriver::{State, TestDomain, node, uuid};

use crate::bench::Bench;

/// As many domains as make a list of more than 64 KiB, the length of the first reply.
const MANY: usize = 1500;

#[test]
fn a_list_of_more_than_64_kib_is_complete() -> Result<()> {
    let bench = Bench::new()?;
    let name = |number: usize| format!("a-domain-with-a-name-of-some-length-{number:04}");
    let state = |number: usize| if number.is_multiple_of(5) { State::Running } else { State::ShutOff };
    let domains: Vec<_> =
        (0..MANY).map(|number| TestDomain::new(&name(number), &uuid(number), state(number))).collect();
    let file = bench.hypervisor.write("node.xml", node(&domains).as_bytes())?;
    let server = bench.serve(&Config { uris: vec![format!("test://{file}")], ..bench.config("auto") })?;
    let list = bench.expect(&server, bench.guest.space(), &bench.client("list"), 0)?;
    ensure!(list.stdout.len() > 64 << 10, "only {} bytes", list.stdout.len());
    let mut listed: Vec<_> = list.stdout.lines().map(|line| line.split_whitespace().collect::<Vec<_>>()).collect();
    listed.sort_unstable();
    let expected =
        |number: usize| [name(number), uuid(number), if number.is_multiple_of(5) { "on" } else { "off" }.to_owned()];
    ensure!(listed.len() == MANY, "{} of {MANY} domains", listed.len());
    for (number, line) in listed.iter().enumerate() {
        ensure!(*line == expected(number), "{line:?} is not {:?}", expected(number));
    }
    Ok(())
}
