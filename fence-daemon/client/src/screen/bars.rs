//! A histogram as a line of bars, one for each power of two.

use fence_control::report::Bucket;

use super::words::micros;

const UNICODE: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
const ASCII: [char; 8] = ['.', ':', '-', '=', '+', '*', '#', '@'];

/// The powers of two that several histograms share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Axis {
    first: u32,
    last: u32,
}

/// The power of two that a bucket belongs to.
fn power(bucket: &Bucket) -> u32 {
    bucket.le_us.checked_ilog2().unwrap_or(0)
}

impl Axis {
    /// The axis from the shortest to the longest time.
    #[must_use]
    pub fn of<'b>(buckets: impl Iterator<Item = &'b Bucket>) -> Self {
        let nothing = Self { first: u32::MAX, last: 0 };
        buckets
            .map(power)
            .fold(nothing, |axis, power| Self { first: axis.first.min(power), last: axis.last.max(power) })
    }

    /// Its range.
    #[must_use]
    pub fn name(self) -> String {
        let end = 1_u64.checked_shl(self.last + 1).unwrap_or(u64::MAX);
        format!("{} to {}", micros(1_u64.checked_shl(self.first).unwrap_or(0)), micros(end))
    }

    /// The bars of one histogram. The most frequent time has the highest bar, and any that occurred
    /// has the lowest.
    #[must_use]
    pub fn bars(self, buckets: &[Bucket], unicode: bool) -> String {
        let counts: Vec<u64> = (self.first..=self.last)
            .map(|octave| buckets.iter().filter(|bucket| power(bucket) == octave).map(|bucket| bucket.count).sum())
            .collect();
        row(counts.into_iter(), unicode)
    }
}

/// Bars for counts: the highest for the largest count, the lowest for any other than zero.
#[must_use]
pub fn row(counts: impl Iterator<Item = u64> + Clone, unicode: bool) -> String {
    let most = counts.clone().max().unwrap_or(0).max(1);
    let levels = if unicode { UNICODE } else { ASCII };
    let bar = |count: u64| match usize::try_from(u128::from(count) * 7 / u128::from(most)) {
        Ok(level) if count > 0 => levels.get(level).copied().unwrap_or(' '),
        Ok(_) | Err(_) => ' ',
    };
    counts.map(bar).collect::<String>().trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bucket(le_us: u64, count: u64) -> Bucket {
        Bucket { le_us, count }
    }

    #[test]
    fn the_commonest_bucket_has_the_highest_bar() {
        let buckets = [bucket(71, 3), bucket(103, 700), bucket(511, 1), bucket(1023, 350)];
        let axis = Axis::of(buckets.iter().chain(&[bucket(40_000, 1)]));
        assert_eq!(axis.bars(&buckets, true), "█ ▁▄");
        assert_eq!(axis.bars(&buckets, false), "@ .=");
        assert_eq!(axis.bars(&[bucket(40_000, 1)], false), "         @");
        assert_eq!(axis.name(), "64 us to 65.5 ms");
    }

    #[test]
    fn empty_and_longest_values_have_bars() {
        assert_eq!(Axis::of([].iter()).bars(&[], true), "");
        let longest = [bucket(0, 1), bucket(u64::MAX, 1)];
        assert_eq!(Axis::of(longest.iter()).bars(&longest, false).len(), 64);
        assert!(!Axis::of(longest.iter()).name().is_empty());
    }
}
