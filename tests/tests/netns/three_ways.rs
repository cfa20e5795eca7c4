//! The same request through the kernel program, to the socket, and by tcp: one verdict and one
//! outcome.
//!
//! A request by tcp has no callback address, so the rules for that address are not compared.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fence_common::hash::HashKind;
use fence_common::key::Key;
use fence_common::verdict::Counters;
use fence_common::wire::{DEFAULT_PORT, DOMAIN_LEN, HOST_LIST, Op, Request};
use fence_lab::client::Family;
use fence_lab::lab::HYPERVISOR_V4;
use fence_lab::peer::Peer;
use fence_lab::process::poll_until;
use fence_lab::server::{Config, Server};
use serde_json::Value;
use zerocopy::IntoBytes;

use crate::bench::{Bench, DOMAIN, key};

/// The UUID of libvirt's test domain.
const UUID: &str = "6695eb01-f6a4-8304-79aa-97f2502e193f";

/// On a loaded machine.
const LIMIT: Duration = Duration::from_secs(60);

/// How long is waited for a callback that must not come.
const NONE_COMES: Duration = Duration::from_millis(500);

const HERE: SocketAddr = SocketAddr::new(IpAddr::V4(HYPERVISOR_V4), DEFAULT_PORT);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum WayIn {
    Kernel,
    Socket,
    Tcp,
}

/// How a request is signed.
#[derive(Clone, Copy)]
enum Signed {
    With(HashKind),
    WithAnotherKey,
    /// With SHA-256, and then this byte is changed.
    Spoilt(usize),
    /// The bytes of the request before.
    AsBefore,
}

/// A request, and what must become of it: its counter, and its answer if it gets one.
struct Row {
    what: &'static str,
    op: u8,
    domain: Vec<u8>,
    change: fn(&mut Request),
    signed: Signed,
    counter: &'static str,
    answer: Option<u8>,
}

fn row(what: &'static str, op: Op, domain: impl AsRef<[u8]>, answer: u8) -> Row {
    let domain = domain.as_ref().to_vec();
    let (signed, counter) = (Signed::With(HashKind::Sha256), "delivered");
    Row { what, op: op.to_wire(), domain, change: |_| {}, signed, counter, answer: Some(answer) }
}

/// A request to switch the domain off that is rejected.
fn bad(what: &'static str, counter: &'static str, change: fn(&mut Request)) -> Row {
    Row { change, counter, answer: None, ..row(what, Op::Off, DOMAIN, 0) }
}

/// The table. Its order counts: the domain is off after an "off".
fn rows() -> Vec<Row> {
    let signed = |what, signed, counter| Row { signed, ..bad(what, counter, |_| {}) };
    let changed = |what, change, answer| Row { change, ..row(what, Op::Status, DOMAIN, answer) };
    vec![
        row("null", Op::Null, DOMAIN, 1),
        row("monitor", Op::DevStatus, DOMAIN, 0),
        row("a list", Op::HostList, "", HOST_LIST),
        row("a list of a domain", Op::HostList, DOMAIN, HOST_LIST),
        row("status", Op::Status, DOMAIN, 0),
        row("status by UUID", Op::Status, UUID, 0),
        row("status by UUID, in capitals", Op::Status, UUID.to_uppercase(), 0),
        row("status in capitals", Op::Status, "TEST", 2),
        row("status of nobody", Op::Status, "nobody", 2),
        row("status of an unknown UUID", Op::Status, "00000000-0000-0000-0000-000000000001", 2),
        row("status without a name", Op::Status, "", 1),
        row("a name with a blank", Op::Status, "test ", 2),
        row("a name of 63 bytes", Op::Status, [b'x'; 63], 2),
        row("a name that is no UTF-8", Op::Status, b"test\xff\xfe", 1),
        row("a name with a line end", Op::Status, "test\n", 2),
        row("a name with an escape", Op::Status, "\x1b[2Jtest", 2),
        row("a path as a name", Op::Status, "../test", 2),
        row("off of nobody", Op::Off, "nobody", 1),
        row("on of nobody", Op::On, "nobody", 1),
        row("reboot of nobody", Op::Reboot, "nobody", 1),
        row("off without a name", Op::Off, "", 1),
        bad("metadata", "drop_operation", |request| request.op = 7),
        bad("validate-all", "drop_operation", |request| request.op = 8),
        bad("an unknown operation", "drop_operation", |request| request.op = 255),
        bad("a name without an end", "drop_domain", |request| request.domain = [b'x'; DOMAIN_LEN]),
        signed("SHA-1", Signed::With(HashKind::Sha1), "drop_hash_weak"),
        signed("no digest", Signed::With(HashKind::None), "drop_unsigned"),
        signed("an unknown digest", Signed::Spoilt(1), "drop_hash_unknown"),
        signed("another key", Signed::WithAnotherKey, "drop_digest"),
        signed("another operation than signed", Signed::Spoilt(0), "drop_digest"),
        signed("another flag than signed", Signed::Spoilt(3), "drop_digest"),
        signed("another name than signed", Signed::Spoilt(4), "drop_digest"),
        signed("other bytes behind the name", Signed::Spoilt(40), "drop_digest"),
        signed("other random bytes", Signed::Spoilt(98), "drop_digest"),
        signed("another seqno", Signed::Spoilt(104), "drop_digest"),
        signed("another digest", Signed::Spoilt(112), "drop_digest"),
        signed("a digest that ends otherwise", Signed::Spoilt(143), "drop_digest"),
        signed("something behind the digest", Signed::Spoilt(175), "drop_digest"),
        row("nothing of that was done", Op::Status, DOMAIN, 0),
        Row { signed: Signed::With(HashKind::Sha512), ..row("SHA-512", Op::Status, DOMAIN, 0) },
        changed("seqno 0", |request| request.seqno = 0.into(), 0),
        changed("the last seqno", |request| request.seqno = u32::MAX.into(), 0),
        changed("a flag for a UUID, and a name", |request| request.flags = 1, 0),
        changed("unknown flags", |request| request.flags = 0xfe, 0),
        changed("another length of the address", |request| request.addr_len = 99, 0),
        changed("bytes behind the name's end", |request| request.domain[9] = b'y', 0),
        row("off", Op::Off, DOMAIN, 0),
        Row { answer: None, ..signed("the same bytes again", Signed::AsBefore, "drop_replay") },
        row("status of a domain that is off", Op::Status, DOMAIN, 2),
        row("off of a domain that is off", Op::Off, DOMAIN, 0),
        row("reboot of a domain that is off", Op::Reboot, DOMAIN, 0),
        row("status, still off", Op::Status, DOMAIN, 2),
        row("on", Op::On, DOMAIN, 0),
        row("on of a domain that runs", Op::On, UUID, 0),
        row("reboot", Op::Reboot, DOMAIN, 0),
        row("status after a reboot", Op::Status, DOMAIN, 0),
        row("off by UUID", Op::Off, UUID, 0),
        row("status by UUID of a domain that is off", Op::Status, UUID, 2),
    ]
}

/// The counters of every listener, kernel program and socket in a report, by name.
fn counters(report: &Value) -> BTreeMap<String, u64> {
    let mut found = BTreeMap::new();
    let mut left = vec![report];
    while let Some(value) = left.pop() {
        for (name, value) in value.as_object().into_iter().flatten() {
            match value.as_u64() {
                Some(count) if Counters::NAMES.contains(&name.as_str()) => {
                    *found.entry(name.clone()).or_default() += count;
                }
                _ => left.push(value),
            }
        }
        left.extend(value.as_array().into_iter().flatten());
    }
    found
}

/// A daemon with one way in, and a client that uses it.
struct Asked<'b> {
    bench: &'b Bench,
    server: Server,
    peer: Peer,
    way: WayIn,
    /// The request before this one.
    before: Request,
    /// The counters after it.
    counted: BTreeMap<String, u64>,
}

impl<'b> Asked<'b> {
    fn new(bench: &'b Bench, way: WayIn) -> Result<Self> {
        let attach = if way == WayIn::Kernel { "auto" } else { "off" };
        let server = bench.serve(&Config { attach: Some(attach), ..bench.with_tcp(&[("address", "0.0.0.0")]) })?;
        let peer = Peer::new(&bench.guest, &key(), Family::V4)?;
        let before = peer.request(Op::Null, "")?;
        let counted = counters(&server.status()?.1);
        Ok(Self { bench, server, peer, way, before, counted })
    }

    fn request(&self, row: &Row) -> Result<Request> {
        if let Signed::AsBefore = row.signed {
            return Ok(self.before);
        }
        let mut request = match self.way {
            WayIn::Kernel | WayIn::Socket => self.peer.request(Op::Null, "")?,
            WayIn::Tcp => self.peer.stream_request(Op::Null, "")?,
        };
        request.op = row.op;
        request.domain[..row.domain.len()].copy_from_slice(&row.domain);
        (row.change)(&mut request);
        let mut request = self.peer.sign(request)?;
        match row.signed {
            Signed::With(kind) => self.peer.key().sign(kind, &mut request),
            Signed::WithAnotherKey => Key::new(b"another key")?.sign(HashKind::Sha256, &mut request),
            Signed::Spoilt(at) => request.as_mut_bytes()[at] ^= if at == 1 { 8 } else { 3 },
            Signed::AsBefore => {}
        }
        Ok(request)
    }

    /// Sends it. Returns the counter that has risen, and the answer.
    fn ask(&mut self, row: &Row) -> Result<(String, Option<u8>)> {
        let request = self.request(row)?;
        let answer = match self.way {
            WayIn::Tcp => {
                let mut connection = self.peer.connect(self.bench.guest.space(), HERE)?;
                connection.write(request.as_bytes())?;
                // A connection that is closed without a word is no answer.
                if row.answer.is_some() { Some(connection.converse()?) } else { connection.rest()?.first().copied() }
            }
            WayIn::Kernel | WayIn::Socket => {
                self.peer.send_bytes(request.as_bytes())?;
                let limit = if row.answer.is_some() { LIMIT } else { NONE_COMES };
                self.peer.called_back(limit)?.map(|mut call| call.converse()).transpose()?
            }
        };
        self.before = request;
        let (risen, counted) = poll_until(row.what, LIMIT, || {
            let now = counters(&self.server.status()?.1);
            let risen = now.iter().find(|(name, count)| self.counted.get(*name) != Some(*count));
            Ok(risen.map(|(name, _)| name.clone()).map(|name| (name, now)))
        })?;
        self.counted = counted;
        Ok((risen, answer))
    }
}

#[test]
fn a_request_has_the_same_verdict_and_outcome_by_each_way() -> Result<()> {
    let bench = Bench::new()?;
    let mut wrong = Vec::new();
    for way in [WayIn::Kernel, WayIn::Socket, WayIn::Tcp] {
        let mut asked = Asked::new(&bench, way)?;
        for row in rows() {
            let came = asked.ask(&row).with_context(|| format!("{way:?}: {}: {}", row.what, asked.server.log()))?;
            if (came.0.as_str(), came.1) != (row.counter, row.answer) {
                wrong.push(format!("{way:?}: {}: {came:?} instead of {:?}", row.what, (row.counter, row.answer)));
            }
        }
    }
    ensure!(wrong.is_empty(), "{wrong:#?}");
    Ok(())
}
