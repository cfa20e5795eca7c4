//! What the control socket says: one JSON object, of a form that has a version.
//! `docs/reference/status.schema.json` describes it, and a test compares.
//!
//! Times are in microseconds (`_us`) or milliseconds (`_ms`); those that end in `_unix_ms` count
//! from 1970. What may be missing is `null`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// The form's version. New fields do not change it; a field that is gone, or means something else,
/// does.
pub const SCHEMA: u32 = 1;

/// How the daemon is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Health {
    /// Not ready yet.
    Starting,
    /// All is as configured.
    Serving,
    /// Something is missing: `problems` says what. What still works is served.
    Degraded,
    /// About to end.
    Stopping,
}

impl Health {
    /// In a word.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Serving => "serving",
            Self::Degraded => "degraded",
            Self::Stopping => "stopping",
        }
    }
}

/// The answer to `status`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// [`SCHEMA`].
    pub schema: u32,
    /// How it is, in a word.
    pub health: Health,
    /// What is wrong, each with what to do.
    pub problems: Vec<String>,
    /// The process.
    pub daemon: Daemon,
    /// What is listened to.
    pub listener: Listener,
    /// The kernel program; `null` where there is none.
    pub kernel: Option<Kernel>,
    /// Datagrams that the socket has judged, by what became of them.
    pub socket: BTreeMap<String, u64>,
    /// Requests.
    pub requests: Requests,
    /// Where datagrams come from.
    pub sources: Vec<Source>,
    /// Whose requests were refused for what stands in them, before anybody looked at a digest. The
    /// last one first.
    #[serde(default)]
    pub refused: Vec<Refused>,
    /// libvirt connections and their domains.
    pub uris: Vec<Uri>,
    /// Domains that were rebooted and are still to be started again.
    pub restarts: Vec<Restart>,
    /// How long the steps of requests took since the daemon's start.
    pub latency: Vec<Latency>,
}

/// The process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Daemon {
    /// Its version.
    pub version: String,
    /// Its process number.
    pub pid: u32,
    /// How long it runs.
    pub uptime_ms: u64,
    /// When this was said.
    pub now_unix_ms: u64,
}

/// What is listened to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listener {
    /// The multicast group.
    pub group: String,
    /// The UDP port.
    pub port: u16,
    /// The weakest digest that is taken.
    pub hash: String,
    /// The call-back's digest.
    pub auth: String,
    /// `attach` as configured.
    pub attach: String,
    /// Whether requests are heard.
    pub hears: bool,
    /// How it is, in a line.
    pub status: String,
    /// The interfaces.
    pub interfaces: Vec<Interface>,
}

/// An interface that is listened on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// How the kernel program is attached to it (`native`, `generic`, ...); `null` where it is not.
    pub program: Option<String>,
    /// That program's number in the kernel.
    pub program_id: Option<u32>,
}

/// The kernel program.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kernel {
    /// Its counters by name, all CPUs together; `null` where they could not be read.
    pub counters: Option<BTreeMap<String, u64>>,
}

/// Requests: how many, and those of late.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Requests {
    /// Being served.
    pub in_progress: u64,
    /// Answered, whatever the answer.
    pub answered: u64,
    /// Begun, and not answered.
    pub unanswered: u64,
    /// Not begun: too late, or too many at once.
    pub turned_away: u64,
    /// Copies of others: of other addresses of the client, or sent again.
    pub copies: u64,
    /// Datagrams that had come before, bit for bit.
    pub replays: u64,
    /// Those of late, the newest first.
    pub recent: Vec<Request>,
}

/// A request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// Its number since the daemon's start.
    pub number: u64,
    /// When its datagram arrived.
    pub arrived_unix_ms: u64,
    /// `off`, `reboot`, `on`, `status`, `list`, `monitor`, `null`.
    pub op: String,
    /// The domain as the request spells it; `null` where it names none.
    pub domain: Option<String>,
    /// Where it was to be called back.
    pub client: String,
    /// The client's number for it.
    pub seqno: u32,
    /// `kernel` (the program there) or `socket`.
    pub via: String,
    /// What came of it; `null` while it is served.
    pub result: Option<String>,
    /// That in more words, as in the log.
    pub detail: Option<String>,
    /// Its steps.
    pub steps: Steps,
}

/// When a request's steps were taken, after the arrival of its datagram; `null` where they were not
/// (yet).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Steps {
    /// Known to be right.
    pub verified_us: u64,
    /// Called back, and its client has shown that it has the key.
    pub called_back_us: Option<u64>,
    /// The domain proven dead.
    pub dead_us: Option<u64>,
    /// The answer handed to the kernel.
    pub replied_us: Option<u64>,
    /// Over, answered or not.
    pub ended_us: Option<u64>,
}

/// A source of datagrams.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Source {
    /// Its address.
    pub address: String,
    /// Its hardware address, where that is known.
    pub mac: Option<String>,
    /// Whether requests of its were right of late.
    pub trusted: bool,
    /// Wrong digests.
    pub failures: u64,
    /// Requests that went to the daemon.
    pub delivered: u64,
    /// Datagrams that were dropped because there were too many.
    pub limited: u64,
    /// How long ago something came from it last.
    pub last_seen_ms: Option<u64>,
}

/// A source whose requests were refused before anybody looked at a digest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refused {
    /// Its address.
    pub address: String,
    /// Its hardware address, where that is known.
    pub mac: Option<String>,
    /// The counter of the reason, such as `drop_unsigned`.
    pub counter: String,
    /// How often, as far as that is remembered.
    pub count: u64,
    /// How long ago the last one came.
    pub last_seen_ms: u64,
}

/// A libvirt connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Uri {
    /// The URI.
    pub uri: String,
    /// Whether it is connected.
    pub connected: bool,
    /// Connected, but the last question was not answered in time.
    pub silent: bool,
    /// For how long it is, or is not, connected; `null` before the first connection.
    pub for_ms: Option<u64>,
    /// What went wrong last, even if all is well now.
    pub last_error: Option<String>,
    /// How long ago that was.
    pub last_error_ms: Option<u64>,
    /// Whether its domains are processes of this host, which are killed directly.
    pub local: bool,
    /// Its domains, as far as they are known.
    pub domains: Vec<Domain>,
}

/// A domain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Domain {
    /// Its name.
    pub name: String,
    /// Its UUID.
    pub uuid: String,
    /// libvirt's state, `shut off`, `moved away`, `dying`, `dead` or `lost`.
    pub state: String,
    /// Its process, where that is at hand: what a fence kills.
    pub pid: Option<i32>,
    /// Whether it has a definition that outlives it.
    pub persistent: bool,
    /// Whether this was observed over the present connection.
    pub fresh: bool,
    /// Processes of it that libvirt does not speak of any more.
    pub strays: Vec<i32>,
    /// Its disks whose writes cannot be seen from this host. Their servers carry out what the
    /// domain has sent, after its death as well.
    #[serde(default)]
    pub unseen: Vec<String>,
}

/// A domain that is still to be started again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Restart {
    /// Its URI.
    pub uri: String,
    /// Its name.
    pub name: String,
    /// Its UUID.
    pub uuid: String,
    /// For how long it waits.
    pub waiting_ms: u64,
    /// How much of that is its pause, in which it stays off in any case.
    pub pause_ms: u64,
    /// Whether an earlier daemon has left it.
    pub inherited: bool,
    /// Whether it is not carried out unasked, because it is too old or its XML could not be had:
    /// `off` ends it, and so does its start.
    pub held: bool,
    /// How often it was tried in vain.
    pub attempts: u32,
    /// Why the last attempt failed; `null` before that.
    pub reason: Option<String>,
}

/// How long one step of one operation took, since the arrival of the datagram.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Latency {
    /// The operation.
    pub op: String,
    /// `verified`, `called_back`, `dead` or `replied`.
    pub step: String,
    /// How many there were.
    pub count: u64,
    /// Half of them were not longer.
    pub p50_us: u64,
    /// 99 of 100 were not longer.
    pub p99_us: u64,
    /// The longest.
    pub max_us: u64,
    /// The histogram: how many took at most so long, and longer than the one before.
    pub buckets: Vec<Bucket>,
}

/// A part of a histogram.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bucket {
    /// At most so long.
    pub le_us: u64,
    /// How many.
    pub count: u64,
}
