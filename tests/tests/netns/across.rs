//! All ways in of one daemon at once: a serial line, tcp, and two multicast listeners with one key.
//! A request acts once, whichever way it comes again, and no open challenge is answered.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fence_common::wire::{DEFAULT_PORT, Op, Request};
use fence_lab::client::Family;
use fence_lab::lab::{BRIDGE, HYPERVISOR_V4};
use fence_lab::line::{self, Line};
use fence_lab::peer::{CallBack, Peer};
use fence_lab::server::{Server, Which};
use fence_lab::testdriver::{self, State, TestDomain, uuid};
use zerocopy::IntoBytes;

use crate::bench::{Bench, key};

const HERE: SocketAddr = SocketAddr::new(IpAddr::V4(HYPERVISOR_V4), DEFAULT_PORT);
/// The port of the second multicast listener.
const OTHER_PORT: u16 = 1230;
const LINE: &str = "/run/fence/asker";
const VICTIM: &str = "victim";
/// How long an answer may take on a loaded machine.
const LIMIT: Duration = Duration::from_secs(60);
/// How long is waited for what must not come.
const QUIET: Duration = Duration::from_secs(1);

/// The daemon, and one client for each way in.
struct Ways {
    server: Server,
    line: Line,
    peer: Peer,
    /// A second client of the guest, with a callback port of its own.
    other: Peer,
    bench: Bench,
}

/// A way in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum EachWay {
    Serial,
    Tcp,
    Multicast,
    OtherMulticast,
}

impl EachWay {
    const ALL: [Self; 4] = [Self::Serial, Self::Tcp, Self::Multicast, Self::OtherMulticast];
}

impl Ways {
    /// The multicast listeners have the kernel program or not, as `attach` says.
    fn new(attach: &str) -> Result<Self> {
        let bench = Bench::new()?;
        let running = |number, name: &str| TestDomain::new(name, &uuid(number), State::Running);
        // A domain's first port is its console.
        let asker = running(1, "asker").with_socket("serial", "/run/console").with_socket("serial", LINE);
        let node = testdriver::node(&[asker, running(2, VICTIM)]);
        let node = bench.hypervisor.write("node.xml", node.as_bytes())?;
        let mut line = Line::listen(&bench.hypervisor, LINE)?;
        let keys = format!("interface = \"{BRIDGE}\"; key_file = \"{}\"; attach = \"{attach}\";", bench.key);
        let file = format!(
            "fence_virtd {{ listener = \"multicast,tcp,serial\"; backend = \"libvirt\"; }}\n\
             listeners {{\nmulticast {{ {keys} }}\nmulticast \"other\" {{ port = \"{OTHER_PORT}\"; {keys} }}\n\
             tcp {{ address = \"0.0.0.0\"; key_file = \"{}\"; }}\nserial {{ path = \"/run/fence\"; }}\n}}\n\
             backends {{ libvirt {{ uri = \"test://{node}\"; }} }}\n\
             groups {{ group {{ from = \"asker\"; ip = \"{}\"; uuid = \"{VICTIM}\"; }} }}\n",
            bench.key, bench.guest.v4
        );
        let file = bench.hypervisor.write("fence_virt.conf", file.as_bytes())?;
        let mut server = Server::spawn_with_file(&bench.hypervisor, &Which::ours()?, &file, DEFAULT_PORT, &[])?;
        server.wait_ready(LIMIT)?;
        line.connection().with_context(|| server.log())?;
        let peer = Peer::new(&bench.guest, &key(), Family::V4)?;
        let other = Peer::new(&bench.guest, &key(), Family::V4)?;
        Ok(Self { server, line, peer, other, bench })
    }

    fn port(way: EachWay) -> u16 {
        if way == EachWay::OtherMulticast { OTHER_PORT } else { DEFAULT_PORT }
    }

    /// A request that has this number, as a client of `peer` signs it for this way.
    fn signed(peer: &Peer, way: EachWay, op: Op, seqno: u32) -> Result<Request> {
        let request = match way {
            EachWay::Tcp => peer.stream_request(op, VICTIM)?,
            EachWay::Serial | EachWay::Multicast | EachWay::OtherMulticast => peer.request(op, VICTIM)?,
        };
        peer.sign(Request { seqno: seqno.into(), ..request })
    }

    fn connected(&self, request: &Request) -> Result<CallBack> {
        let mut connection = self.peer.connect(self.bench.guest.space(), HERE)?;
        connection.write(request.as_bytes())?;
        Ok(connection)
    }

    /// Asks by this way. Returns the reply, and the bytes that a network has seen.
    fn ask(&mut self, way: EachWay, op: Op, seqno: u32) -> Result<(u8, Option<Request>)> {
        if way == EachWay::Serial {
            return Ok((self.line.reply(op, VICTIM, seqno)?, None));
        }
        let request = Self::signed(&self.peer, way, op, seqno)?;
        let mut connection = match way {
            EachWay::Tcp => self.connected(&request)?,
            EachWay::Serial | EachWay::Multicast | EachWay::OtherMulticast => {
                self.peer.send_bytes_to_port(request.as_bytes(), Self::port(way))?;
                self.peer.called_back(LIMIT)?.context("no callback")?
            }
        };
        Ok((connection.converse()?, Some(request)))
    }

    /// Checks that this way answers no request with this number: neither one that was signed for
    /// it, nor these bytes.
    fn says_nothing(&mut self, way: EachWay, seqno: u32, bytes: Option<&Request>) -> Result<()> {
        if way == EachWay::Serial {
            self.line.write(&line::request(Op::Off, VICTIM, seqno))?;
            let said = self.line.read(QUIET, |said| !said.is_empty())?;
            ensure!(said.is_empty(), "the line said {said:02x?}");
            return Ok(());
        }
        let signed = Self::signed(&self.peer, way, Op::Off, seqno)?;
        for request in [Some(&signed), bytes].into_iter().flatten() {
            if way == EachWay::Tcp {
                let said = self.connected(request)?.rest()?;
                ensure!(said.is_empty(), "tcp said {said:02x?}");
            } else {
                self.peer.send_bytes_to_port(request.as_bytes(), Self::port(way))?;
            }
        }
        if way != EachWay::Tcp {
            ensure!(self.peer.called_back(QUIET)?.is_none(), "it was called back");
        }
        Ok(())
    }

    /// A client that has begun by this way.
    fn begun(&self, peer: &Peer, way: EachWay, seqno: u32) -> Result<CallBack> {
        let request = Self::signed(peer, way, Op::Off, seqno)?;
        if way == EachWay::Tcp {
            return self.connected(&request);
        }
        peer.send_bytes_to_port(request.as_bytes(), Self::port(way))?;
        peer.called_back(LIMIT)?.context("no callback")
    }

    fn is_on(&mut self, seqno: u32) -> Result<()> {
        let said = self.line.reply(Op::Status, VICTIM, seqno)?;
        ensure!(said == 0, "the victim's status is {said}");
        Ok(())
    }
}

/// Each way in answers a request, and then none answers it again, nor its bytes.
#[test]
fn a_request_acts_once_by_whichever_of_all_ways_it_comes_again() -> Result<()> {
    for attach in ["off", "auto"] {
        let mut ways = Ways::new(attach)?;
        let mut number = 1000;
        for first in EachWay::ALL {
            number += 10;
            let context = |again: &str, server: &Server| format!("{first:?}, then {again}: {}", server.log());
            let (reply, bytes) = ways.ask(first, Op::Off, number)?;
            ensure!(reply == 0, "{}", context("nothing", &ways.server));
            let (reply, _) = ways.ask(first, Op::On, number + 1)?;
            ensure!(reply == 0, "{}", context("on", &ways.server));
            for again in EachWay::ALL {
                let done = ways.says_nothing(again, number, bytes.as_ref());
                done.with_context(|| context(&format!("{again:?}"), &ways.server))?;
            }
            // It asked after all of them, so none of them is still to come.
            ways.is_on(number + 2).with_context(|| context("on again", &ways.server))?;
        }
    }
    Ok(())
}

/// The daemon challenges a client by one way. By no other way does it tell the answer.
#[test]
fn a_challenge_is_answered_by_none_of_all_listeners() -> Result<()> {
    let mut ways = Ways::new("off")?;
    let with_exam = [EachWay::Tcp, EachWay::Multicast, EachWay::OtherMulticast];
    let mut number = 1000;
    for asks in with_exam {
        for mirrors in with_exam {
            number += 10;
            // The attacker's own connection, and the one on which it has the daemon answer.
            let (mut asked, mut mirror) =
                (ways.begun(&ways.peer, asks, number)?, ways.begun(&ways.other, mirrors, number + 1)?);
            asked.challenge()?;
            mirror.write(&asked.read_block()?)?;
            let said = mirror.rest()?;
            ensure!(said.is_empty(), "{asks:?}, {mirrors:?}: it said {said:02x?}: {}", ways.server.log());
            drop(asked);
            ways.is_on(number + 2).with_context(|| format!("{asks:?}, {mirrors:?}: {}", ways.server.log()))?;
        }
    }
    Ok(())
}
