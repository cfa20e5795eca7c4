//! What requests came to: their results and times.

use serde::{Deserialize, Serialize};

/// How many requests ended in one way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResultCount {
    /// The kind of listener: `multicast`, `tcp`, `vsock` or `serial`.
    pub listener: String,
    /// The name of its section; `null` if it has none.
    pub name: Option<String>,
    /// The operation.
    pub op: String,
    /// How they ended.
    pub result: String,
    /// How many.
    pub count: u64,
}

/// How long one step of one operation takes, from the datagram's arrival.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Latency {
    /// The operation.
    pub op: String,
    /// `verified`, `called_back`, `dead` or `replied`.
    pub step: String,
    /// The number of requests.
    pub count: u64,
    /// Their times together.
    #[serde(default)]
    pub sum_us: u64,
    /// The median.
    pub p50_us: u64,
    /// The 99th percentile.
    pub p99_us: u64,
    /// The longest time.
    pub max_us: u64,
    /// The histogram. Each bucket counts what took longer than the bucket before allows.
    pub buckets: Vec<Bucket>,
}

/// A bucket of a histogram.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bucket {
    /// Its upper bound, inclusive.
    pub le_us: u64,
    /// The number of requests in it.
    pub count: u64,
}
