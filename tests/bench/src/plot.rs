//! Plots as SVG: horizontal bars on a logarithmic axis of time, the median as the bar and the 99th percentile as a whisker.
//!
//! So little is drawn that writing it out is less than what a plotting library brings along.

use std::fmt::Write as _;

use super::figures::Contender;
use super::stats::{Sample, Unit};

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
                let colour = colour(bar.contender);
                let _ = writeln!(
                    body,
                    "<rect x=\"{LEFT}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"{:.1}\" fill=\"{colour}\"/>\n\
                     <path d=\"M{end:.1} {middle:.1}H{whisker:.1}m0 -4v8\" stroke=\"#333\" fill=\"none\"/>\n\
                     <text x=\"{:.1}\" y=\"{:.1}\">{}</text>",
                    (end - LEFT).max(1.0),
                    BAR - 2.0,
                    whisker + 6.0,
                    y + BAR - 3.0,
                    escape(&Unit::Time.show_sample(Some(bar.median))),
                );
                y += BAR;
            }
            let middle = f64::midpoint(begin, y) + 3.0;
            let _ = writeln!(
                body,
                "<text x=\"{:.1}\" y=\"{middle:.1}\" text-anchor=\"end\">{}</text>",
                LEFT - 8.0,
                escape(&row.title)
            );
            y += GAP;
        }
        let mut axis = String::new();
        for decade in low..=high {
            let value = 10_f64.powi(decade);
            let _ = writeln!(
                axis,
                "<path d=\"M{0:.1} {TOP}V{y:.1}\" stroke=\"#ddd\"/>\n<text x=\"{0:.1}\" y=\"{1:.1}\" text-anchor=\"middle\">{2}</text>",
                at(value),
                y + 12.0,
                tick(decade)
            );
        }
        let mut legend = String::new();
        let all = [Contender::Ours, Contender::Stock, Contender::Bare];
        let shown =
            all.into_iter().filter(|one| self.rows.iter().flat_map(|row| &row.bars).any(|bar| bar.contender == *one));
        for (place, contender) in (0_u8..).zip(shown) {
            let x = LEFT + f64::from(place) * 130.0;
            let _ = writeln!(
                legend,
                "<rect x=\"{x}\" y=\"38\" width=\"12\" height=\"12\" fill=\"{}\"/><text x=\"{}\" y=\"48\">{}</text>",
                colour(contender),
                x + 17.0,
                contender.name()
            );
        }
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height:.0}\" font-family=\"sans-serif\" font-size=\"11\">\n\
             <rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n\
             <text x=\"{LEFT}\" y=\"24\" font-size=\"15\">{title} (median, whisker: 99th percentile, logarithmic)</text>\n\
             {legend}{axis}{body}</svg>\n",
            height = y + 24.0,
            title = escape(&self.title),
        )
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

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
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
        assert!(!svg.contains("bare SIGKILL"));
        // A bar is longer the longer it took.
        let widths: Vec<f64> = svg
            .lines()
            .filter(|line| {
                line.starts_with(&format!("<rect x=\"{LEFT}\" y=\"6"))
                    || line.starts_with(&format!("<rect x=\"{LEFT}\" y=\"7"))
            })
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
