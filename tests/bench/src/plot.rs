//! Plots as SVG: horizontal bars on a logarithmic time axis. The bar is the median, the whisker the
//! 99th percentile.

use super::figures::Contender;
use super::stats::{Sample, Unit};
use super::svg;

/// A contender's bar.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bar {
    /// Whose.
    pub contender: Contender,
    /// Its length.
    pub median: Sample,
    /// Its whisker's end.
    pub p99: Sample,
}

/// A figure with its bars.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// Its name.
    pub title: String,
    /// Its bars.
    pub bars: Vec<Bar>,
}

/// A plot. Values are in seconds.
#[derive(Clone, Debug, PartialEq)]
pub struct Plot {
    /// Its title.
    pub title: String,
    /// Its rows, from above.
    pub rows: Vec<Row>,
}

/// Lengths, in pixels.
const WIDTH: f64 = 900.0;
const LEFT: f64 = 300.0;
const RIGHT: f64 = 100.0;
const TOP: f64 = 64.0;
const BAR: f64 = 14.0;
const GAP: f64 = 12.0;

fn colour(contender: Contender) -> &'static str {
    match contender {
        Contender::Ours => "#2a7f62",
        Contender::Stock => "#c8553d",
        Contender::Bare => "#8d99ae",
    }
}

impl Plot {
    /// The powers of ten that the axis goes from and to.
    fn decades(&self) -> (i32, i32) {
        let mut ends = (f64::MAX, f64::MIN);
        for bar in self.rows.iter().flat_map(|row| &row.bars) {
            ends = (ends.0.min(bar.median.value), ends.1.max(bar.p99.value));
        }
        let (mut low, mut high) = (-6, 2);
        while low < 1 && 10_f64.powi(low + 1) < ends.0 {
            low += 1;
        }
        while high > low + 1 && 10_f64.powi(high - 1) > ends.1 {
            high -= 1;
        }
        (low, high)
    }

    /// The plot as a file.
    #[must_use]
    pub fn render(&self) -> String {
        let (low, high) = self.decades();
        let scale = (WIDTH - LEFT - RIGHT) / f64::from(high - low);
        let at = |value: f64| LEFT + (value.max(1e-9).log10() - f64::from(low)).max(0.0) * scale;
        let (mut body, mut y) = (String::new(), TOP);
        for row in &self.rows {
            let begin = y;
            for bar in &row.bars {
                let (end, whisker, middle) = (at(bar.median.value), at(bar.p99.value), y + BAR / 2.0);
                body += &svg::bar(LEFT, y, (end - LEFT).max(1.0), BAR - 2.0, colour(bar.contender));
                body +=
                    &format!("<path d=\"M{end:.1} {middle:.1}H{whisker:.1}m0 -4v8\" stroke=\"#333\" fill=\"none\"/>\n");
                body += &svg::text(whisker + 6.0, y + BAR - 3.0, "start", &Unit::Time.show_sample(Some(bar.median)));
                y += BAR;
            }
            body += &svg::text(LEFT - 8.0, f64::midpoint(begin, y) + 3.0, "end", &row.title);
            y += GAP;
        }
        let axis = (low..=high).map(|decade| svg::tick(at(10_f64.powi(decade)), TOP, y, &tick(decade)));
        let bars = || self.rows.iter().flat_map(|row| &row.bars);
        let all = [Contender::Ours, Contender::Stock, Contender::Bare];
        let shown = all.into_iter().filter(|one| bars().any(|bar| bar.contender == *one));
        let legend = svg::legend(LEFT, 38.0, shown.map(|one| (one.name(), colour(one), false)));
        let title = format!("{} (median, whisker: 99th percentile, logarithmic)", self.title);
        let content = [svg::title(LEFT, 24.0, &title), legend, axis.collect(), body].concat();
        svg::picture(0.0, WIDTH, y + 24.0, &content)
    }
}

fn tick(decade: i32) -> String {
    let (exponent, unit) = match decade {
        ..-3 => (decade + 6, "µs"),
        -3..0 => (decade + 3, "ms"),
        _ => (decade, "s"),
    };
    format!("{:.0} {unit}", 10_f64.powi(exponent))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bar(contender: Contender, median: f64, p99: f64) -> Bar {
        let sample = |value| Sample { value, at_least: false };
        Bar { contender, median: sample(median), p99: sample(p99) }
    }

    #[test]
    fn the_axis_holds_all_values() {
        let row = Row {
            title: "a & b".into(),
            bars: vec![bar(Contender::Ours, 0.0042, 0.0061), bar(Contender::Stock, 0.2, 1.4)],
        };
        let plot = Plot { title: "off".into(), rows: vec![row] };
        assert_eq!(plot.decades(), (-3, 1));
        let svg = plot.render();
        for part in ["1 ms", "10 s", "4.20 ms", "a &amp; b", "fence-daemon", "fence_virtd"] {
            assert!(svg.contains(part), "no {part}: {svg}");
        }
        assert!(!svg.contains("bare limit"));
        // A bar is longer the longer it took.
        let widths: Vec<f64> = svg
            .lines()
            .filter(|line| ["6", "7"].iter().any(|y| line.starts_with(&format!("<rect x=\"{LEFT:.1}\" y=\"{y}"))))
            .filter_map(|line| line.split("width=\"").nth(1)?.split('"').next()?.parse().ok())
            .collect();
        assert!(widths.len() == 2 && widths[0] < widths[1], "{widths:?}");
    }

    #[test]
    fn an_empty_plot_is_a_picture_too() {
        let svg = Plot { title: String::new(), rows: Vec::new() }.render();
        assert!(svg.starts_with("<svg") && svg.ends_with("</svg>\n"));
    }
}
