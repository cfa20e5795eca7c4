//! Samples and their statistics.

/// One measurement, in the figure's unit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sample {
    /// What was measured.
    pub value: f64,
    /// It was not over when the bench gave up: the true value is larger.
    pub at_least: bool,
}

/// The measurements of one figure and one contender.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Samples(Vec<Sample>);

impl Samples {
    /// Adds one.
    pub fn push(&mut self, sample: Sample) {
        // Sorted by value, finished ones first: so quantiles say "at least" as late as possible.
        let after =
            |other: &Sample| sample.value.total_cmp(&other.value).then(sample.at_least.cmp(&other.at_least)).is_lt();
        let at = self.0.iter().position(after).unwrap_or(self.0.len());
        self.0.insert(at, sample);
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The sample that `percent` of all do not exceed (nearest rank); `None` where there are none.
    #[must_use]
    pub fn percentile(&self, percent: usize) -> Option<Sample> {
        let rank = (self.0.len() * percent).div_ceil(100).max(1);
        self.0.get(rank - 1).copied()
    }

    /// The sample in the middle (the lower one of two).
    #[must_use]
    pub fn median(&self) -> Option<Sample> {
        self.percentile(50)
    }

    /// The true median lies between these two with a probability of 95 %, whatever the distribution
    /// (ranks by the binomial distribution's normal approximation). `None` for fewer than eight.
    #[must_use]
    #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "ranks")]
    pub fn interval(&self) -> Option<[f64; 2]> {
        let len = self.0.len() as f64;
        let rank = (len.mul_add(0.5, -0.98 * len.sqrt())).max(0.0) as usize;
        let at = |index: usize| self.0.get(index).map(|sample| sample.value);
        Some([at(rank.checked_sub(1)?)?, at(self.0.len() - rank)?])
    }

    /// The sample that 99 of 100 do not exceed. It is the largest if there are fewer than a
    /// hundred.
    #[must_use]
    pub fn p99(&self) -> Option<Sample> {
        self.percentile(99)
    }
}

/// What a figure counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Seconds.
    Time,
    /// Bytes.
    Memory,
    /// Events per second.
    Rate,
}

impl Unit {
    /// A value with its unit, to three figures.
    #[must_use]
    pub fn show(self, value: f64) -> String {
        let (scaled, unit) = match self {
            Self::Time if value < 1e-3 => (value * 1e6, " µs"),
            Self::Time if value < 1.0 => (value * 1e3, " ms"),
            Self::Time => (value, " s"),
            Self::Memory if value < 1e5 => (value / 1e3, " kB"),
            Self::Memory => (value / 1e6, " MB"),
            Self::Rate => (value, " /s"),
        };
        format!("{}{unit}", three(scaled))
    }

    /// A sample with its unit.
    #[must_use]
    pub fn show_sample(self, sample: Option<Sample>) -> String {
        match sample {
            None => "–".to_owned(),
            Some(Sample { value, at_least }) => format!("{}{}", if at_least { "> " } else { "" }, self.show(value)),
        }
    }
}

/// A number to three figures.
#[must_use]
pub fn three(value: f64) -> String {
    let decimals = match value.abs() {
        small if small < 9.995 => 2,
        middle if middle < 99.95 => 1,
        _ => 0,
    };
    format!("{value:.decimals$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(values: &[f64]) -> Samples {
        let mut samples = Samples::default();
        values.iter().for_each(|&value| samples.push(Sample { value, at_least: false }));
        samples
    }

    #[test]
    fn quantiles_are_nearest_ranks_whatever_the_order() {
        let value = |sample: Option<Sample>| sample.map(|sample| sample.value);
        assert_eq!(value(samples(&[3.0, 1.0, 2.0]).median()), Some(2.0));
        assert_eq!(value(samples(&[4.0, 1.0, 3.0, 2.0]).median()), Some(2.0));
        assert_eq!(value(samples(&[7.0]).p99()), Some(7.0));
        let hundred: Vec<_> = (1..=200).rev().map(f64::from).collect();
        assert_eq!(value(samples(&hundred).p99()), Some(198.0));
        assert_eq!(samples(&[]).median(), None);
    }

    #[test]
    fn the_interval_of_a_median_is_made_of_ranks_and_needs_eight_samples() {
        let to = |last: u32| samples(&(1..=last).map(f64::from).collect::<Vec<_>>()).interval();
        assert_eq!((to(7), to(8)), (None, Some([1.0, 8.0])));
        assert_eq!(to(100), Some([40.0, 61.0]));
        assert_eq!(to(400), Some([180.0, 221.0]));
    }

    #[test]
    fn an_aborted_measurement_is_a_lower_bound() {
        let mut samples = samples(&[10.0]);
        for _ in 0..2 {
            samples.push(Sample { value: 30.0, at_least: true });
        }
        assert_eq!(Unit::Time.show_sample(samples.median()), "> 30.0 s");
        assert_eq!(Unit::Time.show_sample(samples.percentile(1)), "10.0 s");
    }

    #[test]
    fn values_have_three_figures_and_a_unit() {
        for (unit, value, shown) in [
            (Unit::Time, 0.000_123_4, "123 µs"),
            (Unit::Time, 0.004_567, "4.57 ms"),
            (Unit::Time, 1.4749, "1.47 s"),
            (Unit::Time, 21.04, "21.0 s"),
            (Unit::Memory, 25_900_000.0, "25.9 MB"),
            (Unit::Rate, 0.4, "0.40 /s"),
        ] {
            assert_eq!(unit.show(value), shown);
        }
    }
}
