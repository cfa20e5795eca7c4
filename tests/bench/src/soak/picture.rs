//! The daemons' memory, descriptors and threads over time, as SVG.

use std::fmt::Write as _;

use super::watch::{Look, Quantity, median};
use crate::svg;

/// Lengths, in pixels.
const WIDTH: f64 = 900.0;
const LEFT: f64 = 60.0;
const RIGHT: f64 = 20.0;
const TOP: f64 = 60.0;
const PANEL: f64 = 130.0;
const GAP: f64 = 46.0;
/// How many points a line has at most: more cannot be told apart.
const POINTS: usize = 400;

/// The daemon that is killed, and the one that lives on.
const LINES: [(&str, &str); 2] = [("killed and stopped", "#8d99ae"), ("lives on", "#2a7f62")];

/// The picture.
pub(super) fn picture(seen: &[Vec<Look>; 2]) -> String {
    let end = seen.iter().flatten().map(|sample| sample.at).fold(1.0, f64::max);
    let across = |at: f64| LEFT + at / end * (WIDTH - LEFT - RIGHT);
    let (mut body, mut top) = (String::new(), TOP);
    for quantity in Quantity::ALL {
        let value = |sample: &Look| sample.is[quantity as usize];
        let highest = seen.iter().flatten().map(value).fold(1.0, f64::max);
        let up = |value: f64| top + PANEL * (1.0 - value / highest);
        body += &svg::text(LEFT, top - 8.0, "start", quantity.title());
        for share in [0.0, 0.5, 1.0] {
            let (y, shown) = (up(highest * share), format!("{:.0}", highest * share));
            body += &svg::text(LEFT - 6.0, y + 4.0, "end", &shown);
            // Writing to a string does not fail.
            let _ = writeln!(body, "<path d=\"M{LEFT} {y:.1}H{:.1}\" stroke=\"#ddd\"/>", WIDTH - RIGHT);
        }
        for (samples, (_, colour)) in seen.iter().zip(LINES) {
            let points = thinned(samples).map(|piece| {
                let middle = piece.get(piece.len() / 2).map_or(0.0, |sample| sample.at);
                format!("{:.1},{:.1}", across(middle), up(median(piece.iter().map(value).collect())))
            });
            let points = points.collect::<Vec<_>>().join(" ");
            let _ = writeln!(body, "<polyline points=\"{points}\" fill=\"none\" stroke=\"{colour}\"/>");
        }
        top += PANEL + GAP;
    }
    let bottom = top - GAP;
    for tenth in 0..=10 {
        let at = end * f64::from(tenth) / 10.0;
        body += &svg::text(across(at), bottom + 16.0, "middle", &format!("{:.1}", at / 60.0));
    }
    let legend = svg::legend(LEFT + 300.0, 28.0, LINES.map(|(what, colour)| (what, colour, false)).into_iter());
    let title = svg::title(LEFT, 24.0, "The daemons in the soak (minutes)");
    svg::picture(0.0, WIDTH, bottom + 28.0, &[title, legend, body].concat())
}

/// Pieces of the samples, each for one point.
fn thinned(samples: &[Look]) -> impl Iterator<Item = &[Look]> {
    samples.chunks(samples.len().div_ceil(POINTS).max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_quantity_has_two_lines_and_an_hour_has_few_points() {
        let hour: Vec<_> = (0..3600).map(f64::from).map(|at| Look { at, is: [20.0, 50.0, 9.0] }).collect();
        let svg = picture(&[hour.clone(), hour]);
        assert_eq!(svg.matches("<polyline").count(), 6);
        assert!(svg.len() < 60_000, "{} bytes", svg.len());
        assert!(svg.contains("60.0") && svg.contains("open descriptors"));
        assert!(picture(&[Vec::new(), Vec::new()]).ends_with("</svg>\n"));
    }
}
