//! Honest clients: the stock one and ours, by each way in.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use fence_common::wire::{DEFAULT_PORT, Op};
use fence_lab::client::{Client, Family};
use fence_lab::lab::{Guest, HYPERVISOR_V4, Space};
use fence_lab::line::{Line, Port};
use fence_lab::observer::{CLIENT_LIMIT, alive, judge_now, judged};
use fence_lab::peer::Peer;
use fence_lab::process::Finished;
use fence_lab::witness::Witness;
use zerocopy::IntoBytes as _;

use super::judge::{Told, WayIn};
use super::site::Host;
use crate::caller::{self, PATIENCE};

/// Where the tcp listener is.
const TCP: (std::net::Ipv4Addr, u16) = (HYPERVISOR_V4, DEFAULT_PORT);
/// How long a stock client waits on a serial line, in seconds.
const LINE_TIMEOUT: u32 = 30;

/// A client, where it asks.
pub(super) enum Asker {
    /// `fence_xvm` in a guest.
    StockMulticast(Guest),
    /// Ours, with a port of its own for each request.
    OwnMulticast(Guest),
    /// The same, for probes.
    Probe(Guest),
    /// `fence_virt -T` and ours, by turns.
    Tcp(Guest, Turn),
    /// `fence_virt -D`.
    StockLine(Port, Space),
    /// Ours, with the number of its last request.
    OwnLine(Line, u32),
}

/// Whose turn it is.
#[derive(Clone, Copy)]
pub(super) enum Turn {
    Stock,
    Own,
}

/// An answer, and what a stock client printed.
pub(super) struct Said {
    pub(super) told: Told,
    pub(super) printed: String,
}

impl Asker {
    /// The way of the next request.
    pub(super) fn way(&self) -> WayIn {
        match self {
            Self::StockMulticast(_) => WayIn::StockMulticast,
            Self::OwnMulticast(_) => WayIn::OwnMulticast,
            Self::Probe(_) => WayIn::Probe,
            Self::Tcp(_, Turn::Stock) => WayIn::StockTcp,
            Self::Tcp(_, Turn::Own) => WayIn::OwnTcp,
            Self::StockLine(..) => WayIn::StockLine,
            Self::OwnLine(..) => WayIn::OwnLine,
        }
    }

    /// Asks to the end. At the moment of the answer the observer looks at the victims.
    ///
    /// # Errors
    /// `FalseSuccess`: it calls them dead, and one lives. Any other error is the lab's.
    pub(super) fn ask(&mut self, host: &Host, op: Op, domain: &str, victims: &[Witness]) -> Result<Said> {
        let (key, file) = host.signing();
        let named = |client: Client| if op.names_a_domain() { client.domain(domain) } else { client };
        let client = named(Client::new(op_name(op), &file));
        let what = format!("{} of {domain}, by {}", op.name(), self.way());
        match self {
            Self::StockMulticast(guest) => stock(&what, &client, guest.space(), op, victims),
            Self::Tcp(guest, turn @ Turn::Stock) => {
                *turn = Turn::Own;
                stock(&what, &client.tcp(&HYPERVISOR_V4.to_string()), guest.space(), op, victims)
            }
            Self::StockLine(port, space) => {
                let client = client.serial(port.device()).timeout(LINE_TIMEOUT);
                stock(&what, &client, space, op, victims)
            }
            Self::OwnMulticast(guest) | Self::Probe(guest) => {
                let peer = Peer::new(guest, &key, Family::V4)?;
                // A daemon that dies hangs up.
                let answer = caller::ask(&peer, op, domain, PATIENCE).ok().flatten();
                own(&what, op, answer.map(|answer| answer.code), victims)
            }
            Self::Tcp(guest, turn @ Turn::Own) => {
                *turn = Turn::Stock;
                let peer = Peer::new(guest, &key, Family::V4)?;
                let reply = by_tcp(&peer, guest, op, domain);
                own(&what, op, reply.ok(), victims)
            }
            Self::OwnLine(line, number) => {
                *number += 1;
                let reply = by_line(line, op, domain, *number);
                if reply.is_err() {
                    // The daemon of this connection may be gone.
                    line.hang_up();
                }
                own(&what, op, reply.ok(), victims)
            }
        }
    }
}

/// What `fence_xvm -o` calls an operation.
fn op_name(op: Op) -> &'static str {
    if op == Op::DevStatus { "monitor" } else { op.name() }
}

fn stock(what: &str, client: &Client, space: &Space, op: Op, victims: &[Witness]) -> Result<Said> {
    let process = client.start(space)?;
    process.ends_within(CLIENT_LIMIT)?;
    // Now, before anything else is done: a death that comes later is no excuse.
    let living = alive(victims)?;
    let ended = process.finish(Duration::ZERO).with_context(|| what.to_owned())?;
    let told = stock_told(&ended);
    judged(what, told.means_death(op), living)?;
    Ok(Said { told, printed: ended.stdout })
}

/// What a stock client was told. It ends with 0 after "Timed out" where it asked for a list, and
/// with 1 both after a failure and without an answer.
fn stock_told(ended: &Finished) -> Told {
    let printed = format!("{}{}", ended.stdout, ended.stderr);
    match ended.code {
        Some(0 | 1) if printed.contains("Timed out") => Told::Nothing,
        Some(0) => Told::Success,
        Some(1) if printed.contains("Operation failed") => Told::Failure,
        Some(2) => Told::Off,
        Some(3) => Told::Denied,
        _ => Told::Nothing,
    }
}

fn own(what: &str, op: Op, reply: Option<u8>, victims: &[Witness]) -> Result<Said> {
    let told = reply.map_or(Told::Nothing, Told::of_reply);
    judge_now(what, told.means_death(op), victims)?;
    Ok(Said { told, printed: String::new() })
}

fn by_tcp(peer: &Peer, guest: &Guest, op: Op, domain: &str) -> Result<u8> {
    let request = peer.sign(peer.stream_request(op, domain)?)?;
    let mut connection = peer.connect(guest.space(), SocketAddr::from(TCP))?;
    connection.write(request.as_bytes())?;
    connection.converse()
}

fn by_line(line: &mut Line, op: Op, domain: &str, number: u32) -> Result<u8> {
    let said = line.ask(op, domain, number, PATIENCE)?;
    match said.as_slice() {
        [b'a', b'b', b'b', b'a', reply] => Ok(*reply),
        other => anyhow::bail!("no reply: {other:02x?}"),
    }
}

/// How long a daemon takes to answer a probe, asked again and again. `None`: not within `limit`.
pub(super) fn probe(host: &Host, domain: &str, wanted: Told, limit: Duration) -> Result<Option<Duration>> {
    const AGAIN: Duration = Duration::from_millis(100);
    let begun = Instant::now();
    let guest = host.guests.last().context("no guest for probes")?;
    while begun.elapsed() < limit {
        let peer = Peer::new(guest, &host.signing().0, Family::V4)?;
        let answer = caller::ask_every(&peer, Op::Status, domain, limit.saturating_sub(begun.elapsed()), AGAIN);
        if let Ok(Some(answer)) = answer
            && Told::of_reply(answer.code) == wanted
        {
            return Ok(Some(begun.elapsed()));
        }
        std::thread::sleep(AGAIN / 2);
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stock_clients_exit_code_is_no_answer_by_itself() {
        let ended = |code, stdout: &str, stderr: &str| Finished {
            code: Some(code),
            stdout: stdout.to_owned(),
            stderr: stderr.to_owned(),
            elapsed: Duration::ZERO,
        };
        for (finished, told) in [
            (ended(0, "", ""), Told::Success),
            (ended(0, "Timed out!\n", ""), Told::Nothing),
            (ended(1, "Operation failed\n", ""), Told::Failure),
            (ended(1, "", "Operation failed\n"), Told::Failure),
            (ended(1, "", "Timed out waiting for response\n"), Told::Nothing),
            (ended(1, "", "connect: refused\n"), Told::Nothing),
            (ended(2, "", ""), Told::Off),
            (ended(3, "", ""), Told::Denied),
            (ended(255, "", ""), Told::Nothing),
        ] {
            assert_eq!(stock_told(&finished), told, "{finished:?}");
        }
    }
}
