//! The sources of requests, as the kernel program counts them.

use std::net::IpAddr;

use fence_common::caller::Address;
use fence_common::rejected::Rejected;
use fence_common::verdict::Verdict;

use crate::clock::Moment;

/// A source, and what is left of its rate limit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceView {
    /// Its address.
    pub address: IpAddr,
    /// Its hardware address, where that is known.
    pub mac: Option<[u8; 6]>,
    /// Whether the source is trusted, so that floods from other addresses do not affect it.
    pub trusted: bool,
    /// Digests of its that were wrong.
    pub failures: u64,
    /// Requests of its that went to the daemon.
    pub delivered: u64,
    /// How many of its datagrams the rate limit dropped.
    pub limited: u64,
    /// When something came from it last.
    pub last_seen: Option<Moment>,
}

/// Reads the kernel program's sources.
pub type Provider = Box<dyn Fn() -> Vec<SourceView> + Send + Sync>;

/// A source whose requests were rejected for their content, before any check of the digest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RejectedView {
    /// Its address.
    pub address: Address,
    /// Its hardware address, where that is known.
    pub mac: Option<[u8; 6]>,
    /// For what.
    pub verdict: Verdict,
    /// How often, as far as that is remembered.
    pub count: u64,
    /// When last.
    pub last_seen: Moment,
}

/// Reads an account of such sources.
pub type RejectedProvider = Box<dyn Fn() -> Vec<RejectedView> + Send + Sync>;

impl RejectedView {
    /// Reads a place; `None` if nobody has it.
    #[must_use]
    pub fn of(place: &Rejected) -> Option<Self> {
        let sender = place.sender();
        Some(Self {
            verdict: place.verdict()?,
            address: Address::of(&sender),
            mac: Some(sender.mac).filter(|mac| *mac != [0; 6]),
            count: place.count,
            last_seen: Moment::from_ktime(place.last_ns),
        })
    }

    /// Adds up what several CPUs, or kernel program and socket, have counted. The latest source is
    /// the first.
    #[must_use]
    pub fn together(all: impl IntoIterator<Item = Self>) -> Vec<Self> {
        let mut sums: Vec<Self> = Vec::new();
        for one in all {
            let is_it = |sum: &&mut Self| (sum.address, sum.mac, sum.verdict) == (one.address, one.mac, one.verdict);
            match sums.iter_mut().find(is_it) {
                Some(sum) => {
                    sum.count = sum.count.saturating_add(one.count);
                    sum.last_seen = sum.last_seen.max(one.last_seen);
                }
                None => sums.push(one),
            }
        }
        sums.sort_by_key(|sum| std::cmp::Reverse(sum.last_seen));
        sums
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_several_cpus_make_one_line() {
        let one = RejectedView {
            address: IpAddr::from([192, 168, 122, 11]).into(),
            mac: Some([2; 6]),
            verdict: Verdict::Unsigned,
            count: 2,
            last_seen: Moment::from_ktime(5),
        };
        let other = RejectedView { count: 3, last_seen: Moment::from_ktime(9), ..one.clone() };
        let weak = RejectedView { verdict: Verdict::HashWeak, last_seen: Moment::from_ktime(7), ..one.clone() };
        let sum = RejectedView { count: 5, ..other.clone() };
        assert_eq!(RejectedView::together([one, weak.clone(), other]), [sum, weak]);
        assert_eq!(RejectedView::of(&Rejected::default()), None);
    }
}
