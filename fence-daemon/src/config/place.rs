//! Where in the file something is, and how it is shown: file, line, column, the line itself with a caret under it.

use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};

use annotate_snippets::renderer::DecorStyle;
use annotate_snippets::{AnnotationKind, Level, Origin, Renderer, Snippet};

use super::raw::Span;

/// Lines longer than this many bytes are shown in part.
const LONG_LINE: usize = 2000;
/// How much of a long line is shown on either side of the mark, and of the mark itself, in bytes.
const AROUND: usize = 40;

/// A configuration file's name and bytes.
#[derive(Debug)]
pub struct Source<'s> {
    path: &'s Path,
    bytes: &'s [u8],
}

/// A place in a file, with the line that it is on: all that is needed to show it when the file is gone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    path: PathBuf,
    line: usize,
    column: usize,
    excerpt: String,
    mark: Range<usize>,
    cut: bool,
}

impl<'s> Source<'s> {
    /// The file of this name with these bytes.
    #[must_use]
    pub fn new(path: &'s Path, bytes: &'s [u8]) -> Self {
        Self { path, bytes }
    }

    /// Its bytes.
    #[must_use]
    pub fn bytes(&self) -> &'s [u8] {
        self.bytes
    }

    /// The place of a span; what lies beyond the line on which the span begins is not marked.
    #[must_use]
    pub fn place(&self, span: &Span) -> Place {
        let start = span.start.min(self.bytes.len());
        let (before, after) = self.bytes.split_at(start);
        let line_start = before.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at.saturating_add(1));
        let line_len = after.iter().position(|byte| *byte == b'\n').unwrap_or(after.len());
        let (head, tail) = (&before[line_start..], after[..line_len].trim_ascii_end());
        let (marked, tail) = tail.split_at(span.len().min(tail.len()));

        // A byte that is no text becomes U+FFFD and control characters become visible: what is in a file must not steer a
        // terminal. The mark moves along.
        let long = head.len().saturating_add(marked.len()).saturating_add(tail.len()) > LONG_LINE;
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

        Place {
            path: self.path.to_owned(),
            line: before.iter().filter(|byte| **byte == b'\n').count().saturating_add(1),
            column: String::from_utf8_lossy(head).chars().count().saturating_add(1),
            excerpt,
            mark: mark_start..mark_end,
            cut: long,
        }
    }
}

/// Bytes as text that does nothing to a terminal; tabs stay.
fn visible(bytes: &[u8]) -> String {
    let harmless = |c: char| if c.is_control() && c != '\t' { char::REPLACEMENT_CHARACTER } else { c };
    String::from_utf8_lossy(bytes).chars().map(harmless).collect()
}

impl Place {
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
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.path.display(), self.line, self.column)
    }
}

/// One thing to tell the administrator.
pub(super) struct Message<'m> {
    pub(super) level: Level<'m>,
    pub(super) title: String,
    /// Where, and what to write beside the caret.
    pub(super) place: Option<(&'m Place, String)>,
    /// What to write or do instead.
    pub(super) help: String,
}

impl Message<'_> {
    /// The message as a few lines without an end of line at their end; escape sequences only if `colours`.
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

    fn place(bytes: &[u8], span: Span) -> Place {
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
    fn what_is_no_text_is_made_visible_and_the_mark_follows() {
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
