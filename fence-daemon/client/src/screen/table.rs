//! Tables as wide as their contents, or as the terminal.

use unicode_width::{UnicodeWidthChar, UnicodeWidthStr};

use super::words::harmless;

/// How a text looks on a terminal that has colours.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Look {
    /// Normal.
    #[default]
    Plain,
    /// All is well.
    Good,
    /// Could be better.
    Warn,
    /// Something is wrong.
    Bad,
    /// Less important.
    Dim,
    /// A heading.
    Heading,
}

impl Look {
    fn code(self) -> Option<&'static str> {
        match self {
            Self::Plain => None,
            Self::Good => Some("32"),
            Self::Warn => Some("33"),
            Self::Bad => Some("1;31"),
            Self::Dim => Some("2"),
            Self::Heading => Some("1"),
        }
    }
}

/// What the output can show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Screen {
    /// Whether to use colours.
    pub colours: bool,
    /// The number of columns; `None` for no limit.
    pub width: Option<usize>,
    /// Whether the output can show more than ASCII.
    pub unicode: bool,
}

impl Screen {
    /// For files and pipes.
    pub const PLAIN: Self = Self { colours: false, width: None, unicode: false };

    /// A text in its look.
    #[must_use]
    pub fn paint(self, look: Look, text: &str) -> String {
        match look.code().filter(|_| self.colours && !text.is_empty()) {
            Some(code) => format!("\x1b[{code}m{text}\x1b[0m"),
            None => text.to_owned(),
        }
    }

    /// A text on one line, cut at the terminal's width.
    #[must_use]
    pub fn line(self, look: Look, text: &str) -> String {
        let text = harmless(text);
        let text = self.width.map_or(text.clone(), |width| self.cut(&text, width));
        format!("{}\n", self.paint(look, &text))
    }

    /// The beginning of a text that fits, with a mark if it is cut.
    #[must_use]
    pub fn cut(self, text: &str, width: usize) -> String {
        if text.width() <= width {
            return text.to_owned();
        }
        let mark = if self.unicode { "…" } else { "~" };
        let mut room = width.saturating_sub(1);
        let fits = |character: &char| match room.checked_sub(character.width().unwrap_or(0)) {
            Some(left) => {
                room = left;
                true
            }
            None => false,
        };
        let mut short: String = text.chars().take_while(fits).collect();
        if width > 0 {
            short.push_str(mark);
        }
        short
    }
}

/// A column.
#[derive(Clone, Copy, Debug)]
pub struct Column {
    name: &'static str,
    right: bool,
    /// Its least width if the terminal is too narrow.
    least: Option<usize>,
}

/// A column of text, aligned left.
#[must_use]
pub const fn text(name: &'static str) -> Column {
    Column { name, right: false, least: None }
}

/// A column of text that may be cut to this width.
#[must_use]
pub const fn flexible(name: &'static str, least: usize) -> Column {
    Column { name, right: false, least: Some(least) }
}

/// A column of numbers, aligned right.
#[must_use]
pub const fn number(name: &'static str) -> Column {
    Column { name, right: true, least: None }
}

/// A table.
#[derive(Clone, Debug)]
pub struct Table {
    columns: Vec<Column>,
    rows: Vec<Vec<(Look, String)>>,
}

/// Blanks between columns.
const GAP: usize = 2;

impl Table {
    /// A table without rows.
    #[must_use]
    pub fn new(columns: impl Into<Vec<Column>>) -> Self {
        Self { columns: columns.into(), rows: Vec::new() }
    }

    /// Whether it has no rows.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Adds a row with a cell for each column.
    pub fn row(&mut self, cells: impl IntoIterator<Item = (Look, String)>) {
        self.rows.push(cells.into_iter().map(|(look, text)| (look, harmless(&text))).collect());
    }

    /// The widths of the columns: natural, or reduced to fit.
    fn widths(&self, room: Option<usize>) -> Vec<usize> {
        let widest =
            |index: usize| self.rows.iter().filter_map(|row| row.get(index)).map(|(_, text)| text.width()).max();
        let natural = self.columns.iter().enumerate();
        let mut widths: Vec<_> =
            natural.map(|(index, column)| widest(index).unwrap_or(0).max(column.name.width())).collect();
        let Some(room) = room else { return widths };
        let gaps = GAP * self.columns.len().saturating_sub(1);
        let mut over = (widths.iter().sum::<usize>() + gaps).saturating_sub(room);
        // The widest flexible column gives way, one after the other.
        while over > 0 {
            let mut candidates: Vec<_> = (0..widths.len())
                .filter_map(|index| {
                    let least = self.columns.get(index)?.least?;
                    let width = *widths.get(index)?;
                    (width > least).then_some((width, index))
                })
                .collect();
            candidates.sort_unstable();
            let Some(width) = candidates.last().and_then(|(_, index)| widths.get_mut(*index)) else { break };
            *width -= 1;
            over -= 1;
        }
        widths
    }

    /// The lines of texts, each with its look. No line ends with blanks.
    #[must_use]
    pub fn lines(&self, screen: Screen) -> Vec<Vec<(Look, String)>> {
        let widths = self.widths(screen.width);
        let head = self.columns.iter().map(|column| (Look::Dim, column.name.to_owned())).collect::<Vec<_>>();
        std::iter::once(&head).chain(&self.rows).map(|row| self.line(&widths, row, screen)).collect()
    }

    fn line(&self, widths: &[usize], row: &[(Look, String)], screen: Screen) -> Vec<(Look, String)> {
        let mut room = screen.width.unwrap_or(usize::MAX);
        let mut line = Vec::new();
        // The blanks before the next text.
        let mut blanks = 0;
        for ((column, width), (look, cell)) in self.columns.iter().zip(widths).zip(row) {
            let cell = screen.cut(cell, *width);
            let pad = width.saturating_sub(cell.width());
            let (before, after) = if column.right { (pad, 0) } else { (0, pad) };
            blanks += before;
            if !cell.is_empty() {
                // The rest of the line does not fit, although all columns have given way.
                let Some(left) = room.checked_sub(blanks).filter(|left| *left > 0) else { break };
                let cell = screen.cut(&cell, left);
                line.push((Look::Plain, " ".repeat(blanks)));
                room = left.saturating_sub(cell.width());
                line.push((*look, cell));
                blanks = 0;
            }
            blanks += after + GAP;
        }
        line
    }

    /// As text.
    #[must_use]
    pub fn render(&self, screen: Screen) -> String {
        let paint = |line: Vec<(Look, String)>| {
            line.iter().map(|(look, text)| screen.paint(*look, text)).chain(["\n".to_owned()]).collect::<String>()
        };
        self.lines(screen).into_iter().map(paint).collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn plain(text: &str) -> (Look, String) {
        (Look::Plain, text.to_owned())
    }

    fn table() -> Table {
        let mut table = Table::new([flexible("NAME", 6), number("N"), text("STATE")]);
        table.row([plain("a-long-name"), plain("7"), (Look::Bad, "off".to_owned())]);
        table.row([plain("b"), plain("12345"), plain("")]);
        table
    }

    #[test]
    fn columns_are_aligned_and_nothing_trails() {
        let wanted = "NAME             N  STATE\na-long-name      7  off\nb            12345\n";
        assert_eq!(table().render(Screen::PLAIN), wanted);
    }

    #[test]
    fn flexible_columns_are_cut_and_marked() {
        let screen = Screen { width: Some(20), unicode: true, ..Screen::PLAIN };
        assert_eq!(table().render(screen), "NAME        N  STATE\na-lon…      7  off\nb       12345\n");
        // Too narrow for all of it: the line ends where the terminal does.
        let narrow = Screen { width: Some(10), ..Screen::PLAIN };
        assert_eq!(table().render(narrow), "NAME\na-lon~\nb       1~\n");
    }

    #[test]
    fn colours_are_only_for_those_who_want_them() {
        let coloured = table().render(Screen { colours: true, ..Screen::PLAIN });
        assert!(coloured.contains("\x1b[1;31moff\x1b[0m") && coloured.contains("\x1b[2mNAME\x1b[0m"), "{coloured}");
        assert!(!table().render(Screen::PLAIN).contains('\x1b'));
    }

    #[test]
    fn wide_characters_count_as_they_are_shown() {
        let screen = Screen { unicode: true, ..Screen::PLAIN };
        assert_eq!(screen.cut("日本語", 5), "日本…");
        assert_eq!(screen.cut("日本語", 4), "日…");
        assert_eq!((screen.cut("abc", 0), screen.cut("abc", 3)), (String::new(), "abc".to_owned()));
    }

    proptest! {
        #[test]
        fn no_line_is_wider_than_the_terminal(cells in prop::collection::vec(".{0,30}", 3), width in 0_usize..60) {
            let mut table = table();
            table.row([plain(&cells[0]), plain(&cells[1]), plain(&cells[2])]);
            let text = table.render(Screen { width: Some(width), unicode: true, ..Screen::PLAIN });
            for line in text.lines() {
                prop_assert!(line.width() <= width, "{line:?}");
            }
            prop_assert_eq!(text.lines().count(), 4);
        }
    }
}
