//! The dashboard as a picture: its panels at their places, with what Prometheus answers to their
//! queries.
//!
//! A screenshot of Grafana would need Grafana and a browser, and nobody could see whether it is
//! current.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};
use fence_bench::svg;
use serde_json::Value;

/// A column and a row of Grafana's grid, in pixels.
const COLUMN: f64 = 50.0;
const ROW: f64 = 30.0;
/// Between panels, and around what is in one.
const GAP: f64 = 8.0;
const COLOURS: [&str; 8] = ["#2a7f62", "#c8553d", "#3d6fc8", "#c89b3d", "#7a3dc8", "#3db3c8", "#c83d8f", "#6b7280"];
/// How many lines a legend has room for.
const LEGEND: usize = 4;

/// What Prometheus says: labels and points for each line.
pub(super) struct Line {
    labels: BTreeMap<String, String>,
    points: Vec<(f64, f64)>,
}

/// Reads promtool's JSON, of an instant or of a range.
pub(super) fn lines(json: &str) -> Result<Vec<Line>> {
    let answer: Value = serde_json::from_str(json).with_context(|| json.to_owned())?;
    let point = |pair: &Value| -> Option<(f64, f64)> { Some((pair[0].as_f64()?, pair[1].as_str()?.parse().ok()?)) };
    let line = |one: &Value| -> Option<Line> {
        let labels = one["metric"].as_object()?;
        let labels = labels.iter().filter_map(|(name, value)| Some((name.clone(), value.as_str()?.to_owned())));
        let points = match one["values"].as_array() {
            Some(values) => values.iter().filter_map(point).filter(|(_, value)| value.is_finite()).collect(),
            None => vec![point(&one["value"])?],
        };
        Some(Line { labels: labels.collect(), points })
    };
    answer.as_array().context("no lines")?.iter().map(|one| line(one).with_context(|| one.to_string())).collect()
}

/// A panel with the lines of its queries, each with the query's legend.
pub(super) struct Panel<'a> {
    pub(super) json: &'a Value,
    pub(super) lines: Vec<(&'a str, Line)>,
}

impl Panel<'_> {
    fn draw(&self) -> Result<(String, f64)> {
        let place = |name: &str| self.json["gridPos"][name].as_f64().context("no place");
        let (x, y) = (place("x")? * COLUMN + GAP / 2.0, place("y")? * ROW + GAP / 2.0);
        let (width, height) = (place("w")? * COLUMN - GAP, place("h")? * ROW - GAP);
        let title = self.json["title"].as_str().context("no title")?;
        let mut drawn = svg::bar(x, y, width, height, "#f3f4f6");
        drawn += &svg::text(x + GAP, y + 16.0, "start", title);
        let inside = Inside { x: x + GAP, y: y + 24.0, width: width - 2.0 * GAP, height: height - 24.0 - GAP };
        drawn += &match self.json["type"].as_str() {
            Some("stat") => self.stat(&inside),
            Some("timeseries") => self.timeseries(&inside),
            Some("table") => self.table(&inside),
            other => anyhow::bail!("{title} is a panel of type {other:?}"),
        };
        Ok((drawn, y + height))
    }

    fn value(&self, value: f64) -> String {
        let unit = self.json["fieldConfig"]["defaults"]["unit"].as_str();
        match unit {
            Some("s") if value < 0.0005 => format!("{:.0} µs", value * 1e6),
            Some("s") if value < 1.0 => format!("{:.1} ms", value * 1e3),
            Some("s") => format!("{value:.1} s"),
            Some("reqps") => format!("{value:.1}/s"),
            _ if value.fract().abs() < 0.005 => format!("{value:.0}"),
            _ => format!("{value:.1}"),
        }
    }

    /// The last values, side by side, on the colour of their threshold.
    fn stat(&self, inside: &Inside) -> String {
        let defaults = &self.json["fieldConfig"]["defaults"];
        let colour = |value: f64| {
            let steps = defaults["thresholds"]["steps"].as_array().into_iter().flatten();
            let mut reached = steps.filter(|step| step["value"].as_f64().is_none_or(|from| value >= from));
            match reached.next_back().and_then(|step| step["color"].as_str()) {
                Some("red") => "#e8b4a8",
                Some("yellow" | "orange") => "#ecd9a0",
                Some("green") => "#a9d5c3",
                _ => "#d6dae1",
            }
        };
        let width = inside.width / self.lines.len().max(1) as f64;
        let one = |(at, (legend, line)): (usize, &(&str, Line))| -> Option<String> {
            let (_, value) = *line.points.last()?;
            let mapped = defaults["mappings"][0]["options"][format!("{value:.0}")]["text"].as_str();
            let shown = mapped.map_or_else(|| self.value(value), str::to_owned);
            let left = inside.x + at as f64 * width;
            let middle = left + width / 2.0;
            let mut drawn = svg::bar(left, inside.y, width - 2.0, inside.height, colour(value));
            drawn += &svg::title(middle - 4.0 * shown.chars().count() as f64, inside.y + 32.0, &shown);
            drawn += &svg::text(middle, inside.y + inside.height - 8.0, "middle", &named(legend, line, 16));
            Some(drawn)
        };
        self.lines.iter().enumerate().filter_map(one).collect()
    }

    /// The lines over time, and below them what they are.
    fn timeseries(&self, inside: &Inside) -> String {
        let points = || self.lines.iter().flat_map(|(_, line)| &line.points);
        let (begin, end) = points().fold((f64::MAX, f64::MIN), |(low, high), (at, _)| (low.min(*at), high.max(*at)));
        let most = points().map(|(_, value)| *value).fold(0.0, f64::max);
        let legend = self.lines.len().min(LEGEND) as f64 * 14.0;
        let (left, bottom) = (inside.x + 48.0, inside.y + inside.height - legend - 8.0);
        let (width, height) = (inside.x + inside.width - left, bottom - inside.y);
        let across = |at: f64| left + (at - begin) / (end - begin).max(1.0) * width;
        let up = |value: f64| bottom - value / if most > 0.0 { most } else { 1.0 } * height;
        // The legend names the highest ones.
        let most_of = |line: &Line| line.points.iter().map(|(_, value)| *value).fold(0.0, f64::max);
        let mut sorted: Vec<_> = self.lines.iter().collect();
        sorted.sort_by(|(_, one), (_, other)| most_of(other).total_cmp(&most_of(one)));
        let mut drawn = format!("<path d=\"M{left:.1} {bottom:.1}H{:.1}\" stroke=\"#bbb\"/>\n", left + width);
        drawn += &svg::text(left - 6.0, bottom, "end", &self.value(0.0));
        drawn += &svg::text(left - 6.0, inside.y + 8.0, "end", &self.value(most));
        for (number, (name, line)) in sorted.into_iter().enumerate() {
            let colour = COLOURS[number % COLOURS.len()];
            let path: Vec<_> =
                line.points.iter().map(|(at, value)| format!("{:.1},{:.1}", across(*at), up(*value))).collect();
            drawn += &format!(
                "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.5\"/>\n",
                path.join(" ")
            );
            if number < LEGEND {
                let y = bottom + 16.0 + number as f64 * 14.0;
                let more = self.lines.len() - LEGEND.min(self.lines.len());
                let is_last = number + 1 == LEGEND && more > 0;
                let more = if is_last { format!(" (and {more} more)") } else { String::new() };
                drawn += &svg::bar(left, y - 8.0, 8.0, 8.0, colour);
                drawn += &svg::text(left + 14.0, y, "start", &(named(name, line, 60) + &more));
            }
        }
        drawn
    }

    /// The labels, a line each.
    fn table(&self, inside: &Inside) -> String {
        let row = |(at, (_, line)): (usize, &(&str, Line))| {
            let hidden = ["__name__", "instance", "job"];
            let shown =
                line.labels.iter().filter(|(name, value)| !hidden.contains(&name.as_str()) && !value.is_empty());
            let words: Vec<_> = shown.map(|(name, value)| format!("{name}: {value}")).collect();
            svg::text(inside.x, inside.y + 14.0 + at as f64 * 16.0, "start", &words.join("   "))
        };
        let rows: String = self.lines.iter().enumerate().map(row).collect();
        if rows.is_empty() { svg::text(inside.x, inside.y + 14.0, "start", "no data") } else { rows }
    }
}

/// Where a panel's content goes.
struct Inside {
    x: f64,
    y: f64,
    width: f64,
    height: f64,
}

/// A query's legend with the labels of a line, cut to `most` characters.
fn named(legend: &str, line: &Line, most: usize) -> String {
    let mut text = legend.to_owned();
    for (name, value) in &line.labels {
        text = text.replace(&format!("{{{{{name}}}}}"), value);
    }
    // A label that is not there.
    while let Some((before, (_, after))) = text.split_once("{{").and_then(|(a, b)| Some((a, b.split_once("}}")?))) {
        text = format!("{before}{after}");
    }
    let text = text.trim();
    if text.chars().count() <= most { text.to_owned() } else { text.chars().take(most - 1).chain(['…']).collect() }
}

/// The whole dashboard.
pub(super) fn picture(panels: &[Panel<'_>]) -> Result<String> {
    let (mut body, mut bottom) = (String::new(), 0.0_f64);
    for panel in panels {
        let (drawn, end) = panel.draw()?;
        body += &drawn;
        bottom = bottom.max(end);
    }
    ensure!(!body.contains("NaN") && !body.contains("inf"), "a value is no number: {body}");
    Ok(svg::picture(0.0, 24.0 * COLUMN, bottom + GAP / 2.0, &body))
}
