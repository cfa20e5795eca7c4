//! A picture of fences' phases as SVG: one lane a server, from the break to the fenced node's return.

use std::fmt::Write as _;

use crate::figures::Contender;
use fence_lab::cluster::timeline::Phase;

/// A line of the picture.
#[derive(Clone, Debug)]
pub(super) struct Lane {
    /// What is broken.
    pub(super) title: &'static str,
    /// Who fences.
    pub(super) contender: Contender,
    /// Each phase's time, in seconds.
    pub(super) times: [Option<f64>; 6],
}

/// Lengths, in pixels.
const WIDTH: f64 = 960.0;
const LEFT: f64 = 400.0;
/// What long titles need more.
const MARGIN: f64 = 40.0;
const RIGHT: f64 = 30.0;
const TOP: f64 = 60.0;
const HEIGHT: f64 = 15.0;
const GAP: f64 = 10.0;

/// What the colours stand for: parts of the way to a death, and what comes after it.
const PARTS: [(&str, &str); 3] =
    [("until it is asked for", "#cfd4da"), ("until it is dead", "#c8553d"), ("until the reply", "#e9b44c")];
const MARKS: [(Phase, &str); 2] = [(Phase::Started, "#2a6fbb"), (Phase::Back, "#2a7f62")];

/// The picture. Lanes of one scenario follow each other.
pub(super) fn picture(lanes: &[Lane]) -> String {
    let longest = lanes.iter().flat_map(|lane| lane.times).flatten().fold(1.0, f64::max).ceil();
    let at = |seconds: f64| LEFT + seconds / longest * (WIDTH - LEFT - RIGHT);
    let (mut body, mut y, mut last) = (String::new(), TOP, "");
    for lane in lanes {
        if lane.title != last {
            y += GAP;
            let title = escape(&lane.title.replace('`', ""));
            let _ = writeln!(
                body,
                "<text x=\"{:.0}\" y=\"{:.0}\" text-anchor=\"end\">{title}</text>",
                LEFT - 90.0,
                y + 11.0
            );
            last = lane.title;
        }
        let _ = writeln!(
            body,
            "<text x=\"{:.0}\" y=\"{:.0}\" text-anchor=\"end\" fill=\"#555\">{}</text>",
            LEFT - 8.0,
            y + 11.0,
            lane.contender.name()
        );
        let mut from = 0.0;
        for (phase, (_, colour)) in [Phase::Asked, Phase::Dead, Phase::Replied].into_iter().zip(PARTS) {
            let Some(to) = lane.times[phase as usize].filter(|to| *to >= from) else { continue };
            let _ = writeln!(
                body,
                "<rect x=\"{:.1}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"{:.1}\" fill=\"{colour}\"/>",
                at(from),
                (at(to) - at(from)).max(0.5),
                HEIGHT - 4.0
            );
            from = to;
        }
        for (phase, colour) in MARKS {
            let Some(time) = lane.times[phase as usize] else { continue };
            let _ = writeln!(
                body,
                "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"4.5\" fill=\"{colour}\"/>",
                at(time),
                y + (HEIGHT - 4.0) / 2.0
            );
        }
        y += HEIGHT;
    }
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"-{MARGIN} 0 {:.0} {:.0}\" font-family=\"sans-serif\" font-size=\"11\">\n\
         <rect x=\"-{MARGIN}\" width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n\
         <text x=\"20\" y=\"22\" font-size=\"15\">From the break of a node to a whole cluster (medians, seconds)</text>\n{}{}{body}</svg>\n",
        WIDTH + MARGIN,
        y + 28.0,
        legend(),
        axis(longest, y, at)
    )
}

fn legend() -> String {
    let mut text = String::new();
    let mut x = 20.0;
    let marks = MARKS.map(|(phase, colour)| (phase.title(), colour));
    for (number, (what, colour)) in PARTS.into_iter().chain(marks).enumerate() {
        let round = if number < PARTS.len() { 0 } else { 6 };
        let _ = writeln!(
            text,
            "<rect x=\"{x}\" y=\"36\" width=\"12\" height=\"12\" rx=\"{round}\" fill=\"{colour}\"/><text x=\"{}\" y=\"46\">{what}</text>",
            x + 17.0
        );
        x += 150.0;
    }
    text
}

fn axis(longest: f64, bottom: f64, at: impl Fn(f64) -> f64) -> String {
    let step = if longest > 20.0 { 5.0 } else { 1.0 };
    let (mut text, mut second) = (String::new(), 0.0);
    while second <= longest {
        let _ = writeln!(
            text,
            "<path d=\"M{0:.1} {TOP}V{bottom:.1}\" stroke=\"#ddd\"/><text x=\"{0:.1}\" y=\"{1:.1}\" text-anchor=\"middle\">{second:.0}</text>",
            at(second),
            bottom + 14.0
        );
        second += step;
    }
    text
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_longer_wait_is_a_longer_bar() {
        let lane = |contender, dead| Lane {
            title: "`a` & b",
            contender,
            times: [None, Some(2.0), Some(dead), Some(dead), Some(dead + 1.0), None],
        };
        let svg = picture(&[lane(Contender::Ours, 2.1), lane(Contender::Stock, 4.0)]);
        assert_eq!(svg.matches("a &amp; b").count(), 1, "{svg}");
        let red = format!("fill=\"{}\"/>", PARTS[1].1);
        let widths: Vec<f64> = svg
            .lines()
            .filter(|line| line.starts_with("<rect x=\"") && line.ends_with(&red))
            .filter_map(|line| line.split("width=\"").nth(1)?.split('"').next()?.parse().ok())
            .collect();
        assert!(widths.len() == 2 && widths[0] < widths[1], "{widths:?}");
        assert_eq!(svg.matches("<circle").count(), 2);
    }
}
