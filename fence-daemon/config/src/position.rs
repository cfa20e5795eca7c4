//! A position in a file, and how a message shows it: file, line, column, and the line with a caret.

use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};

use annotate_snippets::renderer::DecorStyle;
use annotate_snippets::{AnnotationKind, Level, Origin, Renderer, Snippet};

use super::raw::{BYTE_ORDER_MARK, Span};

/// Lines longer than this many bytes are shown in part.
const LONG_LINE: usize = 2000;
/// How many bytes of a long line are shown on either side of the mark, and of the mark itself.
const AROUND: usize = 40;

/// A configuration file's name and bytes.
#[derive(Debug)]
pub struct Source<'s> {
    path: &'s Path,
    bytes: &'s [u8],
}

/// A position in a file, with its line: a message needs nothing else from the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Position {
    path: PathBuf,
    line: usize,
    column: usize,
    excerpt: String,
    mark: Range<usize>,
    cut: bool,
}

impl<'s> Source<'s> {
    /// A file with this name and these bytes.
    #[must_use]
    pub fn new(path: &'s Path, bytes: &'s [u8]) -> Self {
        Self { path, bytes }
    }

    /// The file's bytes.
    #[must_use]
    pub fn bytes(&self) -> &'s [u8] {
        self.bytes
    }

    /// The position of a span. The mark ends with the line on which the span begins.
    #[must_use]
    pub fn place(&self, span: &Span) -> Position {
        // A byte order mark is no column: editors hide it too.
        let begin = if self.bytes.starts_with(BYTE_ORDER_MARK) { BYTE_ORDER_MARK.len() } else { 0 };
        let (before, after) = self.bytes.split_at(span.start.clamp(begin, self.bytes.len()));
        let head = before.rsplit(|byte| *byte == b'\n').next().unwrap_or_default();
        let is_first = head.len() == before.len();
        let head = head.get(if is_first { begin } else { 0 }..).unwrap_or_default();
        let line = before.iter().filter(|byte| **byte == b'\n').count().saturating_add(1);
        // Continuation bytes of UTF-8 are no characters of their own.
        let column = head.iter().filter(|byte| !matches!(byte, 0x80..=0xbf)).count().saturating_add(1);

        // The end of a line that is too long to be shown is not looked for.
        let (after, _) = after.split_at(after.len().min(LONG_LINE.saturating_add(1)));
        let line_len = after.iter().position(|byte| *byte == b'\n').unwrap_or(after.len());
        let tail = after[..line_len].trim_ascii_end();
        let (marked, tail) = tail.split_at(span.len().min(tail.len()));

        // Invalid bytes become U+FFFD and control characters become visible: a file must not
        // control the terminal. The mark moves along.
        let long = head.len().saturating_add(line_len) > LONG_LINE;
        let around = |bytes: usize| if long { bytes.min(AROUND) } else { bytes };
        let dots = |cut: bool| if cut { "..." } else { "" };
        let head_from = head.len().saturating_sub(around(head.len()));
        let mut excerpt = String::from(dots(head_from > 0));
        excerpt.push_str(&visible(&head[head_from..]));
        let mark_start = excerpt.len();
        excerpt.push_str(&visible(&marked[..around(marked.len())]));
        let mark_end = excerpt.len();
        if around(marked.len()) == marked.len() {
            excerpt.push_str(&visible(&tail[..around(tail.len())]));
        }
        excerpt.push_str(dots(around(marked.len()) < marked.len() || around(tail.len()) < tail.len()));

        Position { path: self.path.to_owned(), line, column, excerpt, mark: mark_start..mark_end, cut: long }
    }
}

/// Bytes as text that cannot control a terminal. Tabs stay.
fn visible(bytes: &[u8]) -> String {
    let harmless = |c: char| if c.is_control() && c != '\t' { char::REPLACEMENT_CHARACTER } else { c };
    String::from_utf8_lossy(bytes).chars().map(harmless).collect()
}

impl Position {
    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The line, counted from 1.
    #[must_use]
    pub fn line(&self) -> usize {
        self.line
    }

    /// The column in characters, counted from 1.
    #[must_use]
    pub fn column(&self) -> usize {
        self.column
    }

    /// The file's order. What concerns the whole file comes before what concerns its first word.
    pub(super) fn order(&self) -> (usize, usize, usize) {
        (self.line, self.column, self.mark.len())
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.path.display(), self.line, self.column)
    }
}

/// A message to the administrator.
pub(super) struct Message<'m> {
    pub(super) level: Level<'m>,
    pub(super) title: String,
    /// The position, and the text beside the caret.
    pub(super) place: Option<(&'m Position, String)>,
    /// The remedy.
    pub(super) help: String,
}

impl Message<'_> {
    /// The message on several lines, the last one without a line end. Escape sequences only if
    /// `colours`.
    pub(super) fn render(self, colours: bool) -> String {
        let renderer = if colours { Renderer::styled() } else { Renderer::plain() };
        let mut group = self.level.primary_title(self.title).elements(std::iter::empty::<Origin<'_>>());
        if let Some((place, label)) = self.place {
            let mark = AnnotationKind::Primary.span(place.mark.clone()).label(label);
            let snippet = Snippet::source(place.excerpt.as_str()).line_start(place.line).annotation(mark);
            let path = place.path.to_string_lossy();
            group = if place.cut {
                // The snippet's own column would count from where the line was cut.
                group.element(Origin::path(path).line(place.line).char_column(place.column)).element(snippet)
            } else {
                group.element(snippet.path(path))
            };
        }
        group = group.element(Level::HELP.message(self.help));
        renderer.decor_style(DecorStyle::Ascii).render(&[group])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(bytes: &[u8], span: Span) -> Position {
        Source::new(Path::new("f"), bytes).place(&span)
    }

    #[test]
    fn lines_and_columns_count_from_one_in_characters() {
        let file = "a\r\n  é = 1\nb".as_bytes();
        let found = place(file, 8..9);
        assert_eq!((found.line(), found.column(), found.excerpt.as_str()), (2, 5, "  é = 1"));
        assert_eq!(found.to_string(), "f:2:5");
        assert_eq!(&found.excerpt[found.mark], "=");
        let end = place(file, file.len()..file.len());
        assert_eq!((end.line(), end.column()), (3, 2));
        assert_eq!((place(b"", 0..0).line(), place(b"", 5..9).column()), (1, 1));
    }

    #[test]
    fn a_byte_order_mark_takes_no_column() {
        let found = place(b"\xef\xbb\xbfa = 1", 7..8);
        assert_eq!((found.line(), found.column(), found.excerpt.as_str()), (1, 5, "a = 1"));
        assert_eq!(place(b"\xef\xbb\xbf", 0..0).excerpt, "");
        assert_eq!(place(b"\xef\xbb\xbf\nb", 4..5).to_string(), "f:2:1");
    }

    #[test]
    fn bytes_that_are_no_text_are_shown_escaped() {
        let found = place(b"\xff\x1b[31m x\tz", 7..8);
        assert_eq!(found.excerpt, "\u{fffd}\u{fffd}[31m x\tz");
        assert_eq!(&found.excerpt[found.mark], "x");
    }

    #[test]
    fn long_lines_are_shown_in_part() {
        let file = [vec![b'a'; 5000], b"MARK".to_vec(), vec![b'b'; 5000]].concat();
        let found = place(&file, 5000..5004);
        assert_eq!(found.column(), 5001);
        assert_eq!(found.excerpt, format!("...{}MARK{}...", "a".repeat(40), "b".repeat(40)));
        assert_eq!(&found.excerpt[found.mark], "MARK");
        let whole = place(&file, 0..file.len());
        assert_eq!(whole.excerpt, format!("{}...", "a".repeat(40)));
    }
}
