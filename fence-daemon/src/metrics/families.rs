//! Writes metric families in the OpenMetrics text format.

use std::fmt;

use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Unit;

/// A sample's labels.
pub(super) type Labels = Vec<(&'static str, String)>;

/// What a histogram has counted.
pub(super) struct Durations {
    /// The sum, in seconds.
    pub(super) sum: f64,
    /// How many.
    pub(super) count: u64,
    /// Each bucket's upper bound in seconds, and what it counts beyond the bucket before. The last
    /// bound is infinite.
    pub(super) buckets: Vec<(f64, u64)>,
}

/// Writes one family after the other.
pub(super) struct Families<'e>(pub(super) DescriptorEncoder<'e>);

impl Families<'_> {
    fn family<V>(
        &mut self,
        (name, help): (&str, &str),
        unit: Option<&Unit>,
        kind: MetricType,
        samples: impl IntoIterator<Item = (Labels, V)>,
        write: impl Fn(&mut MetricEncoder<'_>, V) -> fmt::Result,
    ) -> fmt::Result {
        let mut family = self.0.encode_descriptor(name, help, unit, kind)?;
        for (labels, value) in samples {
            if labels.is_empty() {
                write(&mut family, value)?;
                continue;
            }
            write(&mut family.encode_family(&labels)?, value)?;
        }
        Ok(())
    }

    /// A figure that goes up and down.
    pub(super) fn gauge(
        &mut self,
        about: (&str, &str),
        unit: Option<&Unit>,
        samples: impl IntoIterator<Item = (Labels, f64)>,
    ) -> fmt::Result {
        self.family(about, unit, MetricType::Gauge, samples, |sample, value| sample.encode_gauge(&value))
    }

    /// A figure that only goes up. Its name ends in `_total`, which is added.
    pub(super) fn counter(
        &mut self,
        about: (&str, &str),
        samples: impl IntoIterator<Item = (Labels, u64)>,
    ) -> fmt::Result {
        self.family(about, None, MetricType::Counter, samples, |sample, value| {
            sample.encode_counter::<NoLabelSet, u64, f64>(&value, None)
        })
    }

    /// Text in labels. Its name ends in `_info`, which is added.
    pub(super) fn info(&mut self, about: (&str, &str), labels: Labels) -> fmt::Result {
        self.family(about, None, MetricType::Info, [(Vec::new(), labels)], |sample, labels| sample.encode_info(&labels))
    }

    /// Durations in seconds.
    pub(super) fn histogram(
        &mut self,
        about: (&str, &str),
        samples: impl IntoIterator<Item = (Labels, Durations)>,
    ) -> fmt::Result {
        self.family(about, Some(&Unit::Seconds), MetricType::Histogram, samples, |sample, counts| {
            sample.encode_histogram::<NoLabelSet>(counts.sum, counts.count, &counts.buckets, None)
        })
    }
}
