//! A histogram of durations, of fixed size.
//!
//! It is log-linear, as HDR histograms are, with eight buckets for each power of two. So a reading
//! is at most an eighth too high, from a microsecond to a minute, in 800 bytes. It is our own code
//! because it needs no allocation, no floating point and no dependency.

/// The bits that select a bucket within one power of two.
const LINEAR_BITS: u32 = 3;
const LINEAR: usize = 1 << LINEAR_BITS;
/// The largest power of two with buckets of its own. What takes 2^26 µs (67 s) or longer is counted
/// in the last one.
const EXPONENT_MAX: u32 = 25;
const BUCKETS: usize = (EXPONENT_MAX - LINEAR_BITS + 2) as usize * LINEAR;

/// Times in microseconds, counted.
#[derive(Clone, Debug)]
pub struct Histogram {
    buckets: [u32; BUCKETS],
    count: u64,
    sum: u64,
    max: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { buckets: [0; BUCKETS], count: 0, sum: 0, max: 0 }
    }
}

/// The bucket that a time is counted in.
fn bucket(micros: u64) -> usize {
    let Some(exponent) = micros.checked_ilog2().filter(|exponent| *exponent >= LINEAR_BITS) else {
        return usize::try_from(micros).unwrap_or(0);
    };
    if exponent > EXPONENT_MAX {
        return BUCKETS - 1;
    }
    let linear = usize::try_from(micros >> (exponent - LINEAR_BITS)).unwrap_or(0) % LINEAR;
    (exponent - LINEAR_BITS + 1) as usize * LINEAR + linear
}

/// The longest time that a bucket counts, except for the last bucket.
fn upper(bucket: usize) -> u64 {
    let (power, linear) = ((bucket / LINEAR) as u64, (bucket % LINEAR) as u64);
    if power == 0 { linear } else { ((LINEAR as u64 + linear + 1) << (power - 1)) - 1 }
}

impl Histogram {
    /// Counts one time.
    pub fn record(&mut self, micros: u64) {
        if let Some(bucket) = self.buckets.get_mut(bucket(micros)) {
            *bucket = bucket.saturating_add(1);
        }
        self.count = self.count.saturating_add(1);
        self.sum = self.sum.saturating_add(micros);
        self.max = self.max.max(micros);
    }

    /// How many times were counted.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count
    }

    /// All times together, in microseconds.
    #[must_use]
    pub fn sum(&self) -> u64 {
        self.sum
    }

    /// The longest one, exactly.
    #[must_use]
    pub fn max(&self) -> u64 {
        self.max
    }

    /// The time that this many of a thousand did not exceed, at most an eighth too high. Zero if
    /// nothing was counted.
    #[must_use]
    pub fn quantile(&self, permille: u64) -> u64 {
        let rank = self.count.saturating_mul(permille).div_ceil(1000).max(1);
        let mut seen = 0_u64;
        let found = self.buckets.iter().position(|count| {
            seen += u64::from(*count);
            seen >= rank
        });
        found.map_or(self.max, |bucket| upper(bucket).min(self.max))
    }

    /// The buckets that are not empty: each one's longest time (for the last one the longest of
    /// all), and its count.
    pub fn buckets(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let some = self.buckets.iter().enumerate().filter(|(_, count)| **count > 0);
        some.map(|(bucket, count)| {
            let upper = if bucket == BUCKETS - 1 { self.max } else { upper(bucket) };
            (upper, u64::from(*count))
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn buckets_follow_each_other_without_gap() {
        for index in 0..BUCKETS - 1 {
            assert_eq!((bucket(upper(index)), bucket(upper(index) + 1)), (index, index + 1));
        }
        assert_eq!((bucket(0), bucket(u64::MAX)), (0, BUCKETS - 1));
        assert_eq!(upper(BUCKETS - 1), (1 << (EXPONENT_MAX + 1)) - 1);
    }

    #[test]
    fn an_empty_histogram_reports_zero() {
        let empty = Histogram::default();
        assert_eq!((empty.count(), empty.max(), empty.quantile(500), empty.buckets().count()), (0, 0, 0, 0));
    }

    #[test]
    fn an_outlier_does_not_move_the_median() {
        let mut histogram = Histogram::default();
        (0..99).for_each(|_| histogram.record(100));
        histogram.record(u64::MAX);
        assert_eq!(histogram.quantile(500), 103);
        assert_eq!(histogram.quantile(990), 103);
        assert_eq!((histogram.quantile(1000), histogram.max()), (upper(BUCKETS - 1), u64::MAX));
        assert_eq!(histogram.buckets().collect::<Vec<_>>(), [(103, 99), (u64::MAX, 1)]);
    }

    proptest! {
        #[test]
        fn a_quantile_is_at_most_an_eighth_above_the_exact_one(
            mut times in prop::collection::vec(0_u64..1 << 26, 1..200),
            permille in 1_u64..=1000,
        ) {
            let mut histogram = Histogram::default();
            times.iter().for_each(|time| histogram.record(*time));
            times.sort_unstable();
            let rank = (times.len() as u64 * permille).div_ceil(1000);
            let exact = times[usize::try_from(rank).unwrap() - 1];
            let told = histogram.quantile(permille);
            prop_assert_eq!(histogram.sum(), times.iter().sum::<u64>());
            prop_assert!(exact <= told && told <= exact + exact / 8, "{exact} {told}");
            prop_assert_eq!(histogram.buckets().map(|(_, count)| count).sum::<u64>(), times.len() as u64);
        }
    }
}
