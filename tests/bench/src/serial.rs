//! Requests over a serial line. The bench listens at the line's socket in QEMU's place, so that it
//! measures the servers and no emulated guest.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use fence_common::wire::Op;
use fence_lab::line::Line;
use fence_lab::qemu;
use fence_lab::server::{Config, Server};
use fence_lab::testdriver::{self, State, TestDomain, uuid};

use super::bed::{Bed, Victim};
use super::figures::{Contender, Figure, Part, Results, Target};
use super::stats::Unit;

const STATUS: &str = "serial.status";
/// The directory of the lines.
const LINES: &str = "/run/fence";
/// The domain that asks.
const ASKER: &str = "asker";
/// The pause between requests, which stock clients exceed: they lower DTR for 0.3 s first.
const PAUSE: Duration = Duration::from_millis(12);

pub(crate) fn figures() -> Vec<Figure> {
    let less = "a shorter way from the line to libvirt, or no daemon that looks at the whole line";
    vec![Figure {
        id: STATUS.to_owned(),
        part: Part::Serial,
        title: "status by a serial line, request to reply".to_owned(),
        unit: Unit::Time,
        targets: vec![(Target::OfStock(1.0), less)],
    }]
}

/// Asks for the status of a running QEMU guest, by the line of a domain of libvirt's test driver.
pub fn measure(bed: &Bed, contender: Contender, times: usize, results: &mut Results) -> Result<()> {
    bed.bring_up(Victim::Idle)?;
    // A domain's first port is its console.
    let line = format!("{LINES}/{ASKER}");
    let asker = TestDomain::new(ASKER, &uuid(1), State::Running);
    let asker = asker.with_socket("serial", "/run/console").with_socket("serial", &line);
    let node = bed.hypervisor.write("node.xml", testdriver::node(&[asker]).as_bytes())?;
    let node = format!("test://{node}");
    let mut line = Line::listen(&bed.hypervisor, &line)?;

    let serial = vec![("path", LINES.to_owned()), ("uri", node.clone()), ("key_file", bed.key.clone())];
    let mut config = Config { uris: vec![qemu::URI.to_owned()], serial: Some(serial), ..Config::new(&bed.key) };
    if contender == Contender::Ours {
        // fence_virtd's backend has no use for the domain that asks.
        config.uris.push(node);
    }
    let victim = Victim::Idle.name();
    let known = bed.libvirtd.virsh(qemu::URI, &["domuuid", victim])?.stdout;
    config.more =
        format!("groups {{ group {{ uuid = \"{}\"; uuid = \"{victim}\"; uuid = \"{}\"; }} }}\n", uuid(1), known.trim());
    // Nothing shows that fence_virtd is ready but that it connects.
    let server = Server::spawn(&bed.hypervisor, &bed.which(contender)?, &config, &[])?;
    line.connection().with_context(|| server.log())?;
    for number in (0..).take(5 * times) {
        let asked = Instant::now();
        let reply = line.reply(Op::Status, victim, number).with_context(|| server.log())?;
        // fence_virtd reads its lines from a second after its start on.
        if number > 0 {
            results.add(STATUS, contender, asked.elapsed().as_secs_f64());
        }
        ensure!(reply == 0, "status of a running machine: {reply}: {}", server.log());
        std::thread::sleep(PAUSE);
    }
    drop(server);
    bed.remove(Victim::Idle)
}
