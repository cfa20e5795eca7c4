//! Reads what the kernel program knows of senders, for the report.

use aya::maps::{HashMap, MapData, PerCpuArray};
use fence_common::boundary::name;
use fence_common::rate_limit::{Failed, Sender, Trusted};
use fence_common::rejected::Rejected;

use super::{Error, KernelProgram, handle, map_error};
use crate::clock::Moment;
use crate::observe::sources::{Provider, RejectedProvider, RejectedView, SourceView};

type Key = [u8; size_of::<Sender>()];
type TrustedWords = [u64; size_of::<Trusted>() / 8];
type FailedWords = [u64; size_of::<Failed>() / 8];
type RefusedWords = [u64; size_of::<Rejected>() / 8];

/// How many senders of each kind are reported, the latest ones. A flood from ten thousand addresses
/// does not deserve ten thousand lines.
const TOLD_MAX: usize = 64;

impl KernelProgram {
    /// Reads the program's senders. It works as long as anybody holds the maps.
    ///
    /// # Errors
    /// [`Error::Map`].
    pub fn senders(&self) -> Result<Provider, Error> {
        let trusted = handle(&self.forms, name::TRUSTED)?;
        let trusted = HashMap::<MapData, Key, TrustedWords>::try_from(trusted).map_err(map_error(name::TRUSTED))?;
        let failed = handle(&self.forms, name::FAILED)?;
        let failed = HashMap::<MapData, Key, FailedWords>::try_from(failed).map_err(map_error(name::FAILED))?;
        Ok(Box::new(move || {
            // What goes while it is read is left out.
            let trusted = trusted.iter().flatten().map(|(key, words)| known(&zerocopy::transmute!(key), words));
            let failed = failed.iter().flatten().map(|(key, words)| stranger(&zerocopy::transmute!(key), words));
            let mut told = latest(trusted.collect());
            told.extend(latest(failed.collect()));
            told
        }))
    }
}

impl KernelProgram {
    /// Reads whom the program refused before any digest. It works as long as anybody holds the map.
    ///
    /// # Errors
    /// [`Error::Map`].
    pub fn rejected(&self) -> Result<RejectedProvider, Error> {
        let map = handle(&self.forms, name::REJECTED)?;
        let map = PerCpuArray::<MapData, RefusedWords>::try_from(map).map_err(map_error(name::REJECTED))?;
        Ok(Box::new(move || {
            let places = (0..map.len()).filter_map(|place| map.get(&place, 0).ok());
            let views = places.flat_map(|cpus| cpus.iter().copied().collect::<Vec<_>>());
            views.filter_map(|words| RejectedView::of(&zerocopy::transmute!(words))).collect()
        }))
    }
}

fn latest(mut senders: Vec<SourceView>) -> Vec<SourceView> {
    senders.sort_by_key(|sender| std::cmp::Reverse(sender.last_seen));
    senders.truncate(TOLD_MAX);
    senders
}

fn known(sender: &Sender, words: TrustedWords) -> SourceView {
    let trusted: Trusted = zerocopy::transmute!(words);
    let last_seen = Some(Moment::from_ktime(trusted.last_right_ns));
    let (failures, delivered, limited) = (trusted.failures, trusted.deliveries, trusted.over_limit);
    SourceView { trusted: true, failures, delivered, limited, last_seen, ..view(sender) }
}

fn stranger(sender: &Sender, words: FailedWords) -> SourceView {
    let failed: Failed = zerocopy::transmute!(words);
    let last_seen = Some(Moment::from_ktime(failed.last_failure_ns));
    SourceView { failures: failed.failures, limited: failed.over_limit, last_seen, ..view(sender) }
}

fn view(sender: &Sender) -> SourceView {
    let mac = Some(sender.mac).filter(|mac| *mac != [0; 6]);
    SourceView {
        address: sender.source().into(),
        mac,
        trusted: false,
        failures: 0,
        delivered: 0,
        limited: 0,
        last_seen: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fence_common::admit::Source;

    #[test]
    fn records_are_reported_unchanged() {
        let sender = Sender::new(&Source::V4([192, 168, 122, 11]), [2, 0, 0, 0, 0, 11]);
        let trusted = Trusted { failures: 1, deliveries: 2, over_limit: 3, last_right_ns: 4, ..Trusted::default() };
        let seen = known(&sender, zerocopy::transmute!(trusted));
        assert_eq!((seen.address.to_string().as_str(), seen.mac), ("192.168.122.11", Some([2, 0, 0, 0, 0, 11])));
        assert_eq!((seen.trusted, seen.failures, seen.delivered, seen.limited), (true, 1, 2, 3));
        assert_eq!(seen.last_seen, Some(Moment::from_ktime(4)));
        let unknown = stranger(&Sender::new(&Source::V6([0xfe; 16]), [0; 6]), [9, 5, 6, 7]);
        assert_eq!((unknown.trusted, unknown.failures, unknown.limited, unknown.mac), (false, 5, 6, None));
        assert!(unknown.address.is_ipv6());
    }

    #[test]
    fn only_the_latest_senders_are_reported() {
        let at = |ns| {
            let sender = Sender::new(&Source::V4([10, 0, 0, 1]), [0; 6]);
            stranger(&sender, [0, 0, 0, ns])
        };
        let told = latest((0..200).map(at).collect());
        assert_eq!(told.len(), TOLD_MAX);
        assert_eq!(told[0].last_seen, Some(Moment::from_ktime(199)));
    }
}
