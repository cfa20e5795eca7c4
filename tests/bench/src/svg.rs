//! The few elements of SVG that the bench's pictures need. A plotting library would bring more code
//! than these take.

/// A picture with its left edge at `left`, on white; lengths are in pixels.
#[must_use]
pub fn picture(left: f64, width: f64, height: f64, body: &str) -> String {
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"{left} 0 {width:.0} {height:.0}\" font-family=\"sans-serif\" \
         font-size=\"11\">\n<rect x=\"{left}\" width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n{body}</svg>\n"
    )
}

/// The picture's title.
#[must_use]
pub fn title(x: f64, y: f64, title: &str) -> String {
    format!("<text x=\"{x}\" y=\"{y}\" font-size=\"15\">{}</text>\n", escape(title))
}

/// A line of text; `anchor` says what of it is at `x`: `start`, `middle` or `end`.
#[must_use]
pub fn text(x: f64, y: f64, anchor: &str, text: &str) -> String {
    format!("<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{}</text>\n", escape(text))
}

/// A bar.
#[must_use]
pub fn bar(x: f64, y: f64, width: f64, height: f64, colour: &str) -> String {
    format!("<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" fill=\"{colour}\"/>\n")
}

/// A line of the axis from `top` to `bottom`, with its value below.
#[must_use]
pub fn tick(x: f64, top: f64, bottom: f64, value: &str) -> String {
    format!("<path d=\"M{x:.1} {top}V{bottom:.1}\" stroke=\"#ddd\"/>\n{}", text(x, bottom + 13.0, "middle", value))
}

/// What colours stand for, side by side. A colour of points is shown as one.
#[must_use]
pub fn legend<'a>(left: f64, y: f64, entries: impl Iterator<Item = (&'a str, &'a str, bool)>) -> String {
    let (mut shown, mut x) = (String::new(), left);
    for (what, colour, is_point) in entries {
        let round = if is_point { 6 } else { 0 };
        shown += &format!("<rect x=\"{x}\" y=\"{y}\" width=\"12\" height=\"12\" fill=\"{colour}\" rx=\"{round}\"/>");
        shown += &text(x + 17.0, y + 10.0, "start", what);
        x += 150.0;
    }
    shown
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
