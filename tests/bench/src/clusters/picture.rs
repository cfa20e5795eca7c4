//! A picture of the phases of fences as SVG. Each server has a lane, from the break to the fenced
//! node's return.

use crate::figures::Contender;
use crate::svg;
use fence_lab::cluster::timeline::Phase;

/// A line of the picture.
#[derive(Clone, Debug)]
pub(super) struct Lane {
    /// The break.
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
            body += &svg::text(LEFT - 90.0, y + 11.0, "end", &lane.title.replace('`', ""));
            last = lane.title;
        }
        body += &svg::text(LEFT - 8.0, y + 11.0, "end", lane.contender.name());
        let mut from = 0.0;
        for (phase, (_, colour)) in [Phase::Asked, Phase::Dead, Phase::Replied].into_iter().zip(PARTS) {
            let Some(to) = lane.times[phase as usize].filter(|to| *to >= from) else { continue };
            body += &svg::bar(at(from), y, (at(to) - at(from)).max(0.5), HEIGHT - 4.0, colour);
            from = to;
        }
        for (phase, colour) in MARKS {
            let Some(time) = lane.times[phase as usize] else { continue };
            let (x, y) = (at(time), y + (HEIGHT - 4.0) / 2.0);
            body += &format!("<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4.5\" fill=\"{colour}\"/>\n");
        }
        y += HEIGHT;
    }
    let parts = PARTS.map(|(what, colour)| (what, colour, false));
    let legend =
        svg::legend(20.0, 36.0, parts.into_iter().chain(MARKS.map(|(phase, colour)| (phase.title(), colour, true))));
    let step = if longest > 20.0 { 5.0 } else { 1.0 };
    let seconds =
        std::iter::successors(Some(0.0), |second| Some(second + step)).take_while(|second| *second <= longest);
    let axis = seconds.map(|second: f64| svg::tick(at(second), TOP, y, &format!("{second:.0}")));
    let title = svg::title(20.0, 22.0, "From the break of a node to a whole cluster (medians, seconds)");
    svg::picture(-MARGIN, WIDTH + MARGIN, y + 28.0, &[title, legend, axis.collect(), body].concat())
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
