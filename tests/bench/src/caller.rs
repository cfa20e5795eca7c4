//! Timed requests, from the first datagram to the reply byte, and clients that keep a server
//! waiting.
//!
//! The client is [`fence_lab::peer`]. It needs no process of its own, so it costs little, and the
//! same for both servers.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Barrier;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use fence_common::wire::Op;

use fence_lab::lab::Guest;
use fence_lab::peer::{Peer, set_address};

/// A stock client gives up after this time, and so does the bench.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// The interval at which a stock client repeats its request.
const AGAIN: Duration = Duration::from_secs(2);

/// An answered request.
#[derive(Clone, Copy, Debug)]
pub struct Answer {
    /// Right before the first datagram.
    pub sent: Instant,
    /// Right after the reply byte.
    pub replied: Instant,
    /// The reply byte.
    pub code: u8,
}

impl Answer {
    /// From datagram to reply.
    #[must_use]
    pub fn took(&self) -> Duration {
        self.replied - self.sent
    }
}

/// Asks like a stock client, which repeats its request every 2 s until a server calls back. `None`
/// means that no server did within `limit`.
pub fn ask(peer: &Peer, op: Op, domain: &str, limit: Duration) -> Result<Option<Answer>> {
    ask_every(peer, op, domain, limit, AGAIN)
}

/// As [`ask`], sent again more often: for a server that is not there yet.
pub fn ask_every(peer: &Peer, op: Op, domain: &str, limit: Duration, again: Duration) -> Result<Option<Answer>> {
    let request = peer.request(op, domain)?;
    let sent = Instant::now();
    while sent.elapsed() < limit {
        peer.send(request)?;
        if let Some(mut call) = peer.called_back(again)? {
            let code = call.converse().with_context(|| format!("{op:?} of {domain}"))?;
            return Ok(Some(Answer { sent, replied: Instant::now(), code }));
        }
    }
    Ok(None)
}

/// A client at one of a guest's addresses.
pub fn peer_at(guest: &Guest, key: &[u8], address: Ipv4Addr) -> Result<Peer> {
    Peer::at(guest.space(), address.into(), key)
}

/// `off` of all `domains` at once, each from its own client and address. Answers come in the order
/// of the domains; `None` means no answer within `limit`.
pub fn storm(
    guest: &Guest,
    key: &[u8],
    addresses: &[Ipv4Addr],
    domains: &[String],
    limit: Duration,
) -> Result<Vec<Option<Answer>>> {
    if addresses.len() < domains.len() {
        bail!("{} domains and {} clients", domains.len(), addresses.len());
    }
    let peers = addresses.iter().take(domains.len()).map(|&at| peer_at(guest, key, at)).collect::<Result<Vec<_>>>()?;
    let begin = Barrier::new(peers.len());
    std::thread::scope(|scope| {
        let asking: Vec<_> = peers
            .iter()
            .zip(domains)
            .map(|(peer, domain)| {
                let begin = &begin;
                scope.spawn(move || {
                    begin.wait();
                    ask(peer, Op::Off, domain, limit)
                })
            })
            .collect();
        asking.into_iter().map(|thread| thread.join().map_err(|_| anyhow!("a client panicked"))?).collect()
    })
}

/// Clients that accept the callback and stay silent, for as long as this value lives.
#[derive(Debug)]
pub struct Silent {
    _peers: Vec<Peer>,
}

impl Silent {
    /// Sends a good request about `domain` from each address.
    pub fn call(guest: &Guest, key: &[u8], addresses: &[Ipv4Addr], domain: &str) -> Result<Self> {
        let peers = addresses.iter().map(|&at| peer_at(guest, key, at)).collect::<Result<Vec<_>>>()?;
        for peer in &peers {
            peer.send(peer.request(Op::Status, domain)?)?;
        }
        Ok(Self { _peers: peers })
    }
}

/// Sends a good request about `domain` from each address. None of the addresses may answer, so the
/// callback's connection takes as long as the kernel tries.
pub fn call_dead(guest: &Guest, key: &[u8], addresses: &[Ipv4Addr], domain: &str) -> Result<()> {
    for &address in addresses {
        let peer = peer_at(guest, key, address)?;
        let mut request = peer.request(Op::Status, domain)?;
        set_address(&mut request, IpAddr::V4(address));
        peer.send(request)?;
    }
    Ok(())
}
