//! What clients do in cases: ask, take the callback, and put what came of it into words.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use fence_common::hash::HashKind;
use fence_common::wire::{HASH_LEN, HOST_LIST, HostRecord, Op, Reply, Request};
use fence_lab::client::Client;
use fence_lab::peer::{CallBack, Peer};
use zerocopy::{FromBytes, IntoBytes};

use crate::scene::Stage;

/// What is said where nobody called back.
pub(crate) const SILENCE: &str = "no callback";
/// What is said where the callback ended before the reply.
pub(crate) const NO_REPLY: &str = "no reply";
/// How long is waited for a callback before the request is sent again, as stock clients do.
const AGAIN: Duration = Duration::from_secs(2);
/// How long is waited for a callback that one server makes and the other does not.
pub(crate) const PERHAPS: Duration = Duration::from_millis(2500);

/// A key with every byte value in it, NUL included, of the length that Debian's package makes.
pub(crate) fn key() -> Vec<u8> {
    (0..4096_u32).map(|index| (index % 251) as u8).collect()
}

/// A reply as text.
pub(crate) fn reply(byte: u8) -> String {
    format!("reply {byte}")
}

/// Sends a request as a stock client does, until it is called back, and describes the result.
pub(crate) fn asked(stage: &Stage, guest: usize, watched: &mut Vec<Peer>, op: Op, domain: &str) -> Result<String> {
    let said = answer(stage, guest, watched, op, domain)?;
    Ok(described(&said))
}

/// Like [`asked`], but returns all received bytes.
pub(crate) fn answer(stage: &Stage, guest: usize, watched: &mut Vec<Peer>, op: Op, domain: &str) -> Result<Vec<u8>> {
    let peer = stage.peer(guest)?;
    let mut call = stage.call(&peer, guest, op, domain)?;
    let said = conversation(&mut call, stage.config.auth);
    watched.push(peer);
    said
}

/// Sends a request until it is called back, four times at most, and describes the result.
pub(crate) fn sent(peer: &Peer, request: Request, auth: HashKind) -> Result<String> {
    for _ in 0..4 {
        peer.send(request)?;
        if let Some(mut call) = peer.called_back(AGAIN)? {
            return Ok(described(&conversation(&mut call, auth)?));
        }
    }
    bail!("{SILENCE} in {} s", 4 * AGAIN.as_secs())
}

/// Waits for a callback that may not come, and tells what came of it.
pub(crate) fn perhaps(stage: &Stage, peer: &Peer) -> Result<String> {
    let auth = stage.config.auth;
    if !stage.is_stock() {
        let call = peer.called_back(PERHAPS)?;
        return call.map_or_else(|| Ok(SILENCE.to_owned()), |mut call| Ok(described(&conversation(&mut call, auth)?)));
    }
    // fence_virtd serves one request after the other: once it has answered the next one, it has
    // judged this one.
    let next = stage.peer(1)?;
    next.send(next.request(Op::Null, "")?)?;
    let deadline = Instant::now() + 4 * AGAIN;
    while Instant::now() < deadline {
        if let Some(mut call) = peer.called_back(Duration::from_millis(5))? {
            return Ok(described(&conversation(&mut call, auth)?));
        }
        if let Some(mut call) = next.called_back(Duration::ZERO)? {
            conversation(&mut call, auth)?;
            return Ok(SILENCE.to_owned());
        }
    }
    bail!("the next request was not answered either")
}

/// Performs the whole exchange of a callback as a client with this `auth`, and returns what the
/// server sends after it.
pub(crate) fn conversation(call: &mut CallBack, auth: HashKind) -> Result<Vec<u8>> {
    // A server that hangs up in the middle is a result, not an error of the test.
    if auth == HashKind::None {
        call.stop_writing()?;
    } else if call.challenge().is_err() || call.respond().is_err() {
        return Ok(Vec::new());
    }
    call.rest()
}

/// Describes a server's bytes after the exchange.
pub(crate) fn described(said: &[u8]) -> String {
    match said {
        [] => NO_REPLY.to_owned(),
        [byte] => reply(*byte),
        _ => match HostList::parse(said, false) {
            Some(list) => list.described(),
            None => format!("{} bytes that are no host list: {said:02x?}", said.len()),
        },
    }
}

/// A host list in its wire form.
#[derive(Clone, Debug)]
pub(crate) struct HostList {
    pub(crate) records: Vec<Record>,
}

/// A record of the list.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Record {
    pub(crate) name: String,
    pub(crate) uuid: String,
    pub(crate) state: u8,
}

impl HostList {
    /// Parses a list. The order of its records is libvirt's, and varies between processes. With
    /// `strict`, unused bytes must be zero: fence_virtd leaves old memory in some of them.
    pub(crate) fn parse(said: &[u8], strict: bool) -> Option<Self> {
        let (&last, records) = said.strip_prefix(&[HOST_LIST])?.split_last()?;
        if last != Reply::Success.to_wire() {
            return None;
        }
        let records = <[HostRecord]>::ref_from_bytes(records).ok()?;
        let (end, records) = records.split_last()?;
        if end.as_bytes() != HostRecord::END.as_bytes() {
            return None;
        }
        let mut records: Vec<_> = records.iter().map(|record| Record::parse(record, strict)).collect::<Option<_>>()?;
        records.sort_unstable();
        Some(Self { records })
    }

    pub(crate) fn described(&self) -> String {
        let records: Vec<_> = self.records.iter().map(|r| format!("{} {} {}", r.name, r.uuid, r.state)).collect();
        format!("a list of {}: {}", records.len(), records.join("; "))
    }
}

impl Record {
    fn parse(record: &HostRecord, strict: bool) -> Option<Self> {
        let text = |field: &[u8; 64]| {
            let (last, text) = field.split_last()?;
            let end = text.iter().position(|byte| *byte == 0).unwrap_or(text.len());
            let clean = text[end..].iter().all(|byte| *byte == 0) && (*last == 0 || !strict);
            clean.then(|| String::from_utf8_lossy(&text[..end]).into_owned())
        };
        let (name, uuid) = (text(&record.name)?, text(&record.uuid)?);
        (record.pad == 0 || !strict).then_some(Self { name, uuid, state: record.state })
    }
}

/// Runs the stock client in a guest and returns its exit code and its output line by line. The
/// order of a list is libvirt's, and varies between processes.
pub(crate) fn ran(stage: &Stage, guest: usize, client: &Client) -> Result<String> {
    let _turn = stage.client_of(guest)?;
    let finished = client.run(stage.guest(guest)?.space())?;
    let code = finished.code.map_or_else(|| "a signal".to_owned(), |code| code.to_string());
    let mut lines: Vec<_> = finished.stdout.lines().map(without_digests).collect();
    lines.sort_unstable();
    Ok(if lines.is_empty() { format!("exit {code}") } else { format!("exit {code}: {}", lines.join(" / ")) })
}

/// A line without the parts that vary: the client prints challenges and responses that do not
/// match.
fn without_digests(line: &str) -> String {
    let is_digest = |word: &str| word.len() == 2 * HASH_LEN && word.bytes().all(|byte| byte.is_ascii_hexdigit());
    let words = line.split(' ').map(|word| if is_digest(word) { "(64 bytes)" } else { word });
    words.collect::<Vec<_>>().join(" ")
}
