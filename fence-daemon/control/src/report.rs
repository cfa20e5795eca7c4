//! The report that the control socket sends: one JSON object with a version. A test compares it
//! with `docs/reference/status.schema.json`. Durations are in microseconds (`_us`) or milliseconds
//! (`_ms`). Fields that end in `_unix_ms` are milliseconds since 1970. A missing value is `null`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

mod results;

pub use self::results::{Bucket, Latency, ResultCount};

/// The report's version. New fields keep it. Removing a field or changing its meaning raises it.
pub const SCHEMA: u32 = 3;

/// The daemon's health.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Health {
    /// The daemon is not ready yet.
    Starting,
    /// Everything works as configured.
    Serving,
    /// Something is missing, which `problems` names. The daemon serves what still works.
    Degraded,
    /// The daemon is about to end.
    Stopping,
}

impl Health {
    /// The name, as in the report.
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
    /// The daemon's health.
    pub health: Health,
    /// What is wrong, each with its remedy.
    pub problems: Vec<String>,
    /// The daemon's process.
    pub daemon: Daemon,
    /// What the daemon listens on, in the configuration's order.
    pub listeners: Vec<Listener>,
    /// The kernel program, of all listeners together; `null` where there is none.
    pub kernel: Option<Kernel>,
    /// Datagrams that the sockets have judged, by verdict.
    pub socket: BTreeMap<String, u64>,
    /// Requests: their numbers, and recent ones.
    pub requests: Requests,
    /// Sources of datagrams.
    pub sources: Vec<Source>,
    /// Sources whose requests were rejected before their digest was checked. The latest comes
    /// first.
    pub rejected_sources: Vec<RejectedSource>,
    /// libvirt connections and their domains.
    pub uris: Vec<Uri>,
    /// Rebooted domains that still have to be started.
    pub restarts: Vec<Restart>,
    /// The cluster whose hosts answer together; `null` with `backend = "libvirt"`.
    #[serde(default)]
    pub cluster: Option<Cluster>,
    /// How long the steps of requests took since the daemon's start.
    pub latency: Vec<Latency>,
}

impl Report {
    /// The state of the listeners, in a line: of multicast, and of what hears nothing. Without
    /// multicast it is that of all.
    #[must_use]
    pub fn status(&self) -> String {
        let (multicasts, others): (Vec<_>, Vec<_>) = self.listeners.iter().partition(|one| one.is_multicast());
        let shown: Vec<_> = if multicasts.is_empty() {
            others
        } else {
            let deaf = others.into_iter().filter(|one| !one.hears);
            multicasts.into_iter().chain(deaf).collect()
        };
        match shown.as_slice() {
            [only] => only.status.clone(),
            all => {
                let each = all.iter().map(|one| format!("{}: {}", one.label(), one.status));
                each.collect::<Vec<_>>().join("; ")
            }
        }
    }
}

/// The daemon's process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Daemon {
    /// Its version.
    pub version: String,
    /// Its process ID.
    pub pid: u32,
    /// How long it has run.
    pub uptime_ms: u64,
    /// When this report was made.
    pub now_unix_ms: u64,
}

/// One way in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listener {
    /// What it is: `multicast`, `tcp`, `vsock` or `serial`.
    pub kind: String,
    /// The name of its section; `null` if it has none.
    pub name: Option<String>,
    /// The multicast group, the local address that clients connect to, or the directory of sockets.
    /// Of vsock `any`.
    pub address: String,
    /// The port; 0 of serial.
    pub port: u16,
    /// The configured interface; `null` for all.
    pub interface: Option<String>,
    /// The weakest digest that is accepted.
    pub hash: String,
    /// The digest by which both sides prove that they have the key.
    pub auth: String,
    /// Of multicast the `attach` setting; `null` otherwise.
    pub attach: Option<String>,
    /// Of multicast the `alone` setting; `null` otherwise.
    pub alone: Option<String>,
    /// Whether requests reach the daemon.
    pub hears: bool,
    /// The listener's state, in a line.
    pub status: String,
    /// Of multicast the interfaces; empty otherwise.
    pub interfaces: Vec<Interface>,
    /// What the daemon has judged, by verdict: datagrams at the socket,
    /// connections, or requests on lines.
    pub counters: BTreeMap<String, u64>,
}

impl Listener {
    /// Its kind and its name, as in `multicast "dmz"`.
    #[must_use]
    pub fn label(&self) -> String {
        self.name.as_ref().map_or_else(|| self.kind.clone(), |name| format!("{} \"{name}\"", self.kind))
    }

    /// Whether it is a multicast listener.
    #[must_use]
    pub fn is_multicast(&self) -> bool {
        self.kind == "multicast"
    }
}

/// A network interface that the daemon listens on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// How the kernel program is attached (`native`, `generic`, ...). `null` if it is not attached.
    pub program: Option<String>,
    /// The program's ID in the kernel.
    pub program_id: Option<u32>,
    /// Why the program is not attached, or not in the best way.
    #[serde(default)]
    pub reason: Option<String>,
    /// Whether no other hypervisor hears the requests that come by it.
    #[serde(default)]
    pub alone: bool,
    /// A port or device by which it leads beyond the guests of this host. `null` if it leads
    /// nowhere.
    #[serde(default)]
    pub way_out: Option<String>,
}

/// The kernel program.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kernel {
    /// Its counters by name, summed over all CPUs. `null` if they could not be read.
    pub counters: Option<BTreeMap<String, u64>>,
}

/// Requests: their numbers, and recent ones.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Requests {
    /// Requests in progress.
    pub in_progress: u64,
    /// Answered requests, whatever the answer.
    pub answered: u64,
    /// Requests that began and were not answered.
    pub unanswered: u64,
    /// Rejected requests: too late, or too many at once.
    pub rejected: u64,
    /// Duplicates: from other addresses of the client, or sent again.
    pub duplicates: u64,
    /// Datagrams that arrived before, bit for bit.
    pub replays: u64,
    /// Requests that were signed with a key that is no longer accepted.
    pub retired_key: u64,
    /// Requests that have ended, by listener, operation and result.
    #[serde(default)]
    pub results: Vec<ResultCount>,
    /// When each operation succeeded last. An operation that never did is missing.
    #[serde(default)]
    pub last_success_unix_ms: BTreeMap<String, u64>,
    /// Recent requests, the newest first.
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
    /// The domain as the request spells it. `null` if it names none.
    pub domain: Option<String>,
    /// The callback's address and port; by tcp the client's own. By vsock the domain and its CID.
    pub client: String,
    /// The client's sequence number.
    pub seqno: u32,
    /// `kernel` (from the kernel program) or `socket`.
    pub via: String,
    /// The name of the listener's section. `null` if it has none.
    #[serde(default)]
    pub listener: Option<String>,
    /// How it ended. `null` while the request is in progress.
    pub result: Option<String>,
    /// The outcome in more words, as in the log.
    pub detail: Option<String>,
    /// Its steps.
    pub steps: Steps,
}

/// When a request reached each step, in microseconds after its datagram arrived. `null` if it has
/// not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Steps {
    /// The request was verified.
    pub verified_us: u64,
    /// The callback is done: the client has shown that it has the key.
    pub called_back_us: Option<u64>,
    /// The domain is proven dead.
    pub dead_us: Option<u64>,
    /// The answer was handed to the kernel.
    pub replied_us: Option<u64>,
    /// The request ended, answered or not.
    pub ended_us: Option<u64>,
}

/// A source of datagrams.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Source {
    /// Its address.
    pub address: String,
    /// Its hardware address, if known.
    pub mac: Option<String>,
    /// Whether recent requests from it were correct.
    pub trusted: bool,
    /// The number of wrong digests.
    pub failures: u64,
    /// The number of requests that reached the daemon.
    pub delivered: u64,
    /// The number of datagrams dropped by a rate limit.
    pub limited: u64,
    /// The time since the last datagram.
    pub last_seen_ms: Option<u64>,
}

/// A source whose requests were rejected before their digest was checked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RejectedSource {
    /// Its address.
    pub address: String,
    /// Its hardware address, if known.
    pub mac: Option<String>,
    /// The counter of the reason, for example `drop_unsigned`.
    pub counter: String,
    /// How often, as far as the daemon remembers.
    pub count: u64,
    /// The time since the last one.
    pub last_seen_ms: u64,
}

/// A libvirt connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Uri {
    /// The URI.
    pub uri: String,
    /// Whether libvirt is connected.
    pub connected: bool,
    /// Whether libvirt is connected and did not answer the last question in time.
    pub silent: bool,
    /// How long it has been connected, or not connected. `null` before the first connection.
    pub for_ms: Option<u64>,
    /// The last error, even if all is well now.
    pub last_error: Option<String>,
    /// The time since that error.
    pub last_error_ms: Option<u64>,
    /// Whether its domains are processes of this host, which the daemon kills directly.
    pub local: bool,
    /// The domains that the daemon knows.
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
    /// Its process, if known: a fence kills it.
    pub pid: Option<i32>,
    /// Whether libvirt keeps its definition when it is off.
    pub persistent: bool,
    /// Whether the present connection has confirmed the state.
    pub fresh: bool,
    /// Orphaned processes of the domain: libvirt has lost track of them.
    pub orphans: Vec<i32>,
    /// Disks whose writes this host cannot see. Their servers may carry out writes even after the
    /// domain's death.
    pub unseen: Vec<String>,
}

/// A rebooted domain that still has to be started.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Restart {
    /// Its URI.
    pub uri: String,
    /// Its name.
    pub name: String,
    /// Its UUID.
    pub uuid: String,
    /// How long it has waited.
    pub waiting_ms: u64,
    /// The length of the pause in which the domain stays off.
    pub pause_ms: u64,
    /// Whether an earlier daemon left this restart.
    pub inherited: bool,
    /// Whether the daemon does not start the domain by itself. The restart is too old, or the
    /// domain's XML was not available. An `off` or a start of the domain ends it.
    pub held: bool,
    /// The number of failed attempts.
    pub attempts: u32,
    /// Why the last attempt failed. `null` before the first failure.
    pub reason: Option<String>,
}

/// The cluster whose hosts answer together (`backend = "cpg"`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cluster {
    /// Whether this host is in the group of corosync.
    pub joined: bool,
    /// Whether corosync has quorum here.
    pub quorate: bool,
    /// The state, in a line.
    pub status: String,
    /// The configured hosts, by node ID.
    pub hosts: Vec<ClusterHost>,
    /// Daemons of fence_virtd in the cluster, as node ID and process ID.
    pub stock: Vec<String>,
}

/// A host of the cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterHost {
    /// Its node ID in corosync.
    pub node: u32,
    /// Its name in corosync; `null` if it has none there.
    pub name: Option<String>,
    /// Whether this is the host that reports.
    pub ours: bool,
    /// Whether its daemon is in the group.
    pub present: bool,
    /// The time since its daemon was last heard; `null` if it never was.
    pub last_heard_ms: Option<u64>,
    /// The version of its messages; `null` if none was heard.
    pub version: Option<u32>,
    /// Whether its messages are signed with a key that is accepted here; `null` if none was heard.
    pub key_agrees: Option<bool>,
    /// How many domains it has told of.
    pub domains: u64,
    /// These domains, by name.
    #[serde(default)]
    pub domain_list: Vec<ClusterDomain>,
    /// The version of its daemon; `null` if that is not there.
    #[serde(default)]
    pub software: Option<String>,
    /// How far its clock is ahead of this host's at least; negative if it is behind. 0 if no
    /// difference can be told. `null` if it is not known.
    #[serde(default)]
    pub clock_ahead_ms: Option<i64>,
    /// The time since Pacemaker has fenced it; `null` if no fencing is known.
    #[serde(default)]
    pub fenced_ms: Option<u64>,
}

/// A domain as a host of the cluster has told of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterDomain {
    /// Its name.
    pub name: String,
    /// Its UUID.
    pub uuid: String,
    /// libvirt's state.
    pub state: String,
    /// Whether it has a process there, or may have one.
    pub runs: bool,
}
