//! The messages between hosts, as bytes.
//!
//! All integers are little-endian.
//!
//! | offset | length | field |
//! |---|---|---|
//! | 0 | 8 | magic, `fxdphost` |
//! | 8 | 2 | [`VERSION`] |
//! | 10 | 1 | kind |
//! | 11 | 1 | 0 |
//! | 12 | 4 | length of the whole message |
//! | 16 | 4 | the sender's node ID |
//! | 20 | 4 | the sender's process ID |
//! | 24 | 16 | the sender's incarnation |
//! | 40 | 8 | counter, which grows with each message of an incarnation |
//! | 48 | | the body |
//! | -32 | 32 | signature of everything before |
//!
//! No message makes sense to another group of hosts: its key differs.

use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;

use uuid::Uuid;

use super::codec::{Reader, Writer, cut};
use super::sign::{self, SIGNATURE_LEN};
use super::{ActEnd, GuestAddress, HostDomain, Incarnation, Member, NodeId};
use crate::caller::Vouched;
use crate::key::Key;
use crate::keys::Keys;
use crate::ledger::{ID_LEN, RequestId};
use crate::target::Target;
use crate::wire::Op;

/// The version of the messages. Hosts with different versions do not understand each other.
pub const VERSION: u16 = 1;

/// The longest message in bytes: corosync carries no more.
pub const MESSAGE_MAX: usize = 1 << 20;

/// The state of a domain in an incomplete [`Message::Hello`] that is not defined any more.
pub(super) const GONE: u8 = 0xff;

/// What each message begins with.
pub const MAGIC: &[u8; 8] = b"fxdphost";

/// The length of a message before its body, in bytes.
pub const HEADER_LEN: usize = 48;

/// Which question, of which daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct QuestionId {
    /// The daemon that asks: the coordinator.
    pub incarnation: Incarnation,
    /// Its number there.
    pub number: u64,
}

/// What a host says of a question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Word {
    /// The domain is not known here.
    NotHere,
    /// It is defined here, and does not run here.
    DefinedHere,
    /// It runs here. This host acts, if the operation acts.
    RunsHere,
    /// This host does not know.
    CannotTell(String),
    /// Another daemon of the same host acts.
    SameHost,
    /// How the act ended.
    End(ActEnd),
    /// The act has ended as proven off, and nothing of the domain has appeared since.
    StillOff,
    /// All domains of this host.
    List(Vec<HostDomain>),
    /// libvirt is well here.
    Well,
}

/// A message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// The domains of a host: all of them, or those that have changed.
    Hello {
        /// Whether the sender wants everybody's.
        wants_all: bool,
        /// Whether domains that are not in it are unknown there.
        is_complete: bool,
        /// The domains.
        domains: Vec<HostDomain>,
    },
    /// The sender wants to call the client of this request back. The first one does.
    Claim {
        /// The request.
        request: RequestId,
        /// Whether the one that does has been silent for too long.
        takes_over: bool,
    },
    /// The sender has called back.
    Over {
        /// The request.
        request: RequestId,
        /// Whether the client was reached.
        reached: bool,
    },
    /// A question to the hosts in `audience`.
    Ask {
        /// The sender's number of the question.
        number: u64,
        /// The hosts are asked again, with a higher round each time.
        round: u32,
        /// The client's request.
        request: RequestId,
        /// The operation.
        op: Op,
        /// The domain. `None` for an operation without one.
        target: Option<Target>,
        /// How long the client still waits, in milliseconds.
        left_ms: u32,
        /// How long ago the client had asked, in milliseconds.
        age_ms: u32,
        /// The domain that the client runs in, if the sender knows it.
        client: Option<Vouched>,
        /// Those that shall answer. A daemon that is not among them does nothing.
        audience: Vec<Incarnation>,
    },
    /// An answer to a question.
    Say {
        /// The question.
        to: QuestionId,
        /// The round that it answers.
        round: u32,
        /// The answer.
        word: Word,
        /// How often the domain has appeared here.
        changes: u64,
        /// Its UUID, where it is known.
        uuid: Option<Uuid>,
        /// Its name, where it is known.
        name: Option<String>,
    },
    /// One host shall start the domain of the sender's question.
    Start {
        /// The sender's number of the question.
        number: u64,
        /// The round by which it ran nowhere.
        round: u32,
        /// The daemon that shall start it.
        starter: Incarnation,
        /// The domain's UUID.
        uuid: Uuid,
        /// The domain's name.
        name: String,
    },
    /// The Ethernet addresses of all machines that run on a host.
    Addresses {
        /// The addresses.
        guests: Vec<GuestAddress>,
    },
    /// The sender has answered the client of this request, whatever the answer.
    Answered {
        /// The request.
        request: RequestId,
    },
    /// The sender is about to start the domain of a question. It starts when it hears this itself.
    Ready {
        /// The question.
        to: QuestionId,
    },
}

/// Why bytes are no message of this group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, thiserror::Error)]
pub enum NoMessage {
    /// Another program uses the group.
    #[error("its messages are not fence-xdp's")]
    Alien,
    /// Another version of fence-xdp.
    #[error("its messages have version {0}, ours {VERSION}")]
    Version(u16),
    /// The signature is not by one of our keys.
    #[error("its key differs from ours")]
    Key,
    /// The header names another sender than corosync.
    #[error("its messages name another sender than corosync does")]
    Sender,
    /// It is signed, and makes no sense.
    #[error("its messages make no sense")]
    Malformed,
}

/// A message with what its header says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Envelope {
    /// The sender.
    pub from: Member,
    /// The sender's incarnation.
    pub incarnation: Incarnation,
    /// Its number in that incarnation.
    pub counter: u64,
    /// The message.
    pub message: Message,
}

impl Envelope {
    /// The message as bytes, signed.
    #[must_use]
    pub fn seal(&self, key: &Key) -> Vec<u8> {
        let mut body = Writer::default();
        let kind = write(&self.message, &mut body);
        let length = HEADER_LEN + body.0.len() + SIGNATURE_LEN;
        let mut all = Writer(Vec::with_capacity(length));
        all.bytes(MAGIC).bytes(&VERSION.to_le_bytes()).byte(kind).byte(0).count(length);
        all.u32(self.from.node.0).u32(self.from.pid).bytes(&self.incarnation.0).u64(self.counter).bytes(&body.0);
        let signature = sign::signature(key, &all.0);
        all.bytes(&signature);
        all.0
    }

    /// The message in bytes that corosync has delivered from `from`.
    ///
    /// # Errors
    /// [`NoMessage`] says what is wrong with the sender.
    pub fn open(bytes: &[u8], from: Member, keys: &Keys) -> Result<Self, NoMessage> {
        let mut header = Reader(bytes);
        let magic = header.array::<8>();
        let version = header.array().map(u16::from_le_bytes);
        match (magic, version) {
            (Some(magic), Some(VERSION)) if &magic == MAGIC => {}
            (Some(magic), Some(other)) if &magic == MAGIC => return Err(NoMessage::Version(other)),
            _ => return Err(NoMessage::Alien),
        }
        let (signed, signature) = bytes.split_last_chunk::<SIGNATURE_LEN>().ok_or(NoMessage::Alien)?;
        let is_ours = |key: &&Arc<Key>| sign::is_signed(key, signed, signature);
        keys.iter().find(is_ours).ok_or(NoMessage::Key)?;
        let header = signed.get(MAGIC.len() + size_of::<u16>()..).ok_or(NoMessage::Malformed)?;
        let envelope = read(header, bytes.len()).ok_or(NoMessage::Malformed)?;
        if envelope.from == from { Ok(envelope) } else { Err(NoMessage::Sender) }
    }
}

/// Writes a body. Returns its kind.
fn write(message: &Message, to: &mut Writer) -> u8 {
    match message {
        Message::Hello { wants_all, is_complete, domains } => {
            to.flag(*wants_all).flag(*is_complete);
            write_domains(domains, to);
            0
        }
        Message::Claim { request, takes_over } => {
            to.bytes(&request.to_bytes()).flag(*takes_over);
            1
        }
        Message::Over { request, reached } => {
            to.bytes(&request.to_bytes()).flag(*reached);
            2
        }
        Message::Ask { number, round, request, op, target, left_ms, age_ms, client, audience } => {
            to.u64(*number).u32(*round).bytes(&request.to_bytes()).byte(op.to_wire());
            to.maybe(target.as_ref(), |to, target| match target {
                Target::Uuid(uuid) => to.byte(0).uuid(uuid),
                Target::Name(name) => to.byte(1).text(name),
            });
            to.u32(*left_ms).u32(*age_ms);
            to.maybe(client.as_ref(), |to, client| to.uuid(&client.uuid).text(&client.name));
            to.count(audience.len());
            for one in audience {
                to.bytes(&one.0);
            }
            3
        }
        Message::Say { to: question, round, word, changes, uuid, name } => {
            write_question(*question, to);
            to.u32(*round).u64(*changes);
            to.maybe(uuid.as_ref(), Writer::uuid);
            to.maybe(name.as_ref(), |to, name| to.text(name));
            write_word(word, to);
            4
        }
        Message::Start { number, round, starter, uuid, name } => {
            to.u64(*number).u32(*round).bytes(&starter.0).uuid(uuid).text(name);
            5
        }
        Message::Ready { to: question } => {
            write_question(*question, to);
            6
        }
        Message::Addresses { guests } => {
            to.count(guests.len());
            for GuestAddress { mac, guest } in guests {
                to.bytes(mac).uuid(&guest.uuid).text(&guest.name);
            }
            7
        }
        Message::Answered { request } => {
            to.bytes(&request.to_bytes());
            8
        }
    }
}

fn write_question(question: QuestionId, to: &mut Writer) {
    to.bytes(&question.incarnation.0).u64(question.number);
}

fn write_domains(domains: &[HostDomain], to: &mut Writer) {
    to.count(domains.len());
    for domain in domains {
        to.uuid(&domain.uuid).byte(domain.state).text(&domain.name);
    }
}

fn write_word(word: &Word, to: &mut Writer) {
    let (number, reason) = match word {
        Word::NotHere => (0, None),
        Word::DefinedHere => (1, None),
        Word::RunsHere => (2, None),
        Word::CannotTell(reason) => (3, Some(reason)),
        Word::SameHost => (4, None),
        Word::End(ActEnd::ProvenOff) => (5, None),
        Word::End(ActEnd::Done) => (6, None),
        Word::End(ActEnd::Failed(reason)) => (7, Some(reason)),
        Word::StillOff => (8, None),
        Word::List(_) => (9, None),
        Word::Well => (10, None),
        Word::End(ActEnd::Gone) => (11, None),
        Word::End(ActEnd::Unproven(reason)) => (12, Some(reason)),
    };
    to.byte(number);
    if let Some(reason) = reason {
        to.text(reason);
    }
    if let Word::List(domains) = word {
        write_domains(domains, to);
    }
}

/// Reads what follows magic and version, without the signature. `length` is the whole message's.
fn read(rest: &[u8], length: usize) -> Option<Envelope> {
    let mut from = Reader(rest);
    let [kind, reserved] = from.array()?;
    let said = usize::try_from(from.u32()?).ok()?;
    if reserved != 0 || said != length || length > MESSAGE_MAX {
        return None;
    }
    let member = Member { node: NodeId(from.u32()?), pid: from.u32()? };
    let (incarnation, counter) = (Incarnation(from.array()?), from.u64()?);
    let message = match kind {
        0 => Message::Hello { wants_all: from.flag()?, is_complete: from.flag()?, domains: from.entries(read_domain)? },
        1 => Message::Claim { request: read_request(&mut from)?, takes_over: from.flag()? },
        2 => Message::Over { request: read_request(&mut from)?, reached: from.flag()? },
        3 => Message::Ask {
            number: from.u64()?,
            round: from.u32()?,
            request: read_request(&mut from)?,
            op: Op::from_wire(from.byte()?)?,
            target: from.maybe(read_target)?,
            left_ms: from.u32()?,
            age_ms: from.u32()?,
            client: from.maybe(read_guest)?,
            audience: from.entries(|from| from.array().map(Incarnation))?,
        },
        4 => {
            let (to, round, changes) = (read_question(&mut from)?, from.u32()?, from.u64()?);
            let (uuid, name) = (from.maybe(Reader::uuid)?, from.maybe(Reader::text)?);
            Message::Say { to, round, word: read_word(&mut from)?, changes, uuid, name }
        }
        5 => Message::Start {
            number: from.u64()?,
            round: from.u32()?,
            starter: Incarnation(from.array()?),
            uuid: from.uuid()?,
            name: from.text()?,
        },
        6 => Message::Ready { to: read_question(&mut from)? },
        7 => Message::Addresses {
            guests: from.entries(|from| Some(GuestAddress { mac: from.array()?, guest: read_guest(from)? }))?,
        },
        8 => Message::Answered { request: read_request(&mut from)? },
        _ => return None,
    };
    from.end()?;
    Some(Envelope { from: member, incarnation, counter, message })
}

fn read_request(from: &mut Reader<'_>) -> Option<RequestId> {
    from.array::<ID_LEN>().map(|bytes| RequestId::from_bytes(&bytes))
}

fn read_question(from: &mut Reader<'_>) -> Option<QuestionId> {
    Some(QuestionId { incarnation: Incarnation(from.array()?), number: from.u64()? })
}

fn read_target(from: &mut Reader<'_>) -> Option<Target> {
    match from.byte()? {
        0 => from.uuid().map(Target::Uuid),
        1 => from.text().filter(|name| !name.is_empty()).map(Target::Name),
        _ => None,
    }
}

fn read_guest(from: &mut Reader<'_>) -> Option<Vouched> {
    Some(Vouched { uuid: from.uuid()?, name: from.text()? })
}

fn read_domain(from: &mut Reader<'_>) -> Option<HostDomain> {
    Some(HostDomain { uuid: from.uuid()?, state: from.byte()?, name: from.text()? })
}

fn read_word(from: &mut Reader<'_>) -> Option<Word> {
    Some(match from.byte()? {
        0 => Word::NotHere,
        1 => Word::DefinedHere,
        2 => Word::RunsHere,
        3 => Word::CannotTell(from.text()?),
        4 => Word::SameHost,
        5 => Word::End(ActEnd::ProvenOff),
        6 => Word::End(ActEnd::Done),
        7 => Word::End(ActEnd::Failed(from.text()?)),
        8 => Word::StillOff,
        9 => Word::List(from.entries(read_domain)?),
        10 => Word::Well,
        11 => Word::End(ActEnd::Gone),
        12 => Word::End(ActEnd::Unproven(from.text()?)),
        _ => return None,
    })
}

/// A reason for people, as long as a message may carry.
pub(super) fn reason(text: &str) -> String {
    cut(text).into()
}
