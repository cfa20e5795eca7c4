//! Markdown as `docs/reference` uses it, as roff for `man`: headings, paragraphs, lists, code,
//! tables.

use clap_mangen::roff::{Inline, Roff, bold, italic, roman};
use pulldown_cmark::{Event, HeadingLevel, Options, Parser, Tag, TagEnd};

/// A section: its heading in the first line, without its marks, then its text.
pub(super) fn section(roff: &mut Roff, part: &str) {
    let (heading, text) = part.split_once('\n').unwrap_or((part, ""));
    let heading = heading.replace('`', "");
    // A keyword of the configuration keeps its case.
    roff.control("SH", [if heading.contains('{') { heading } else { heading.to_uppercase() }.as_str()]);
    body(roff, text);
}

/// Text without a heading.
pub(super) fn body(roff: &mut Roff, text: &str) {
    let mut writer = Writer {
        roff,
        line: Vec::new(),
        lists: Vec::new(),
        is_paragraph_due: false,
        is_after_heading: true,
        style: Style::Roman,
    };
    let mut parser = Parser::new_ext(text, Options::ENABLE_TABLES);
    while let Some(event) = parser.next() {
        if let Event::Start(Tag::Table(_)) = event {
            writer.table(&mut parser);
        } else if let Event::Start(Tag::CodeBlock(_)) = event {
            writer.code(&mut parser);
        } else {
            writer.event(event);
        }
    }
    writer.flush();
}

/// How the next words look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Style {
    Roman,
    Bold,
    Italic,
}

impl Style {
    fn of(self, words: &str) -> Inline {
        match self {
            Self::Roman => roman(words),
            Self::Bold => bold(words),
            Self::Italic => italic(words),
        }
    }
}

struct Writer<'r> {
    roff: &'r mut Roff,
    /// The words of the open paragraph.
    line: Vec<Inline>,
    /// The open lists: the next number of each, if it has numbers.
    lists: Vec<Option<u64>>,
    /// Whether the next words begin a paragraph.
    is_paragraph_due: bool,
    /// Whether nothing stands below the last heading yet. A heading begins a paragraph itself.
    is_after_heading: bool,
    style: Style,
}

impl Writer<'_> {
    fn event(&mut self, event: Event<'_>) {
        match event {
            Event::Text(words) => self.line.push(self.style.of(&words)),
            Event::Code(words) => self.line.push(bold(words.to_string())),
            Event::SoftBreak | Event::HardBreak => self.line.push(roman(" ")),
            Event::Start(Tag::Strong) => self.style = Style::Bold,
            Event::Start(Tag::Emphasis) => self.style = Style::Italic,
            Event::End(TagEnd::Strong | TagEnd::Emphasis) => self.style = Style::Roman,
            Event::Start(Tag::Paragraph) => self.is_paragraph_due = self.lists.is_empty(),
            Event::End(TagEnd::Paragraph) => self.flush(),
            Event::Start(Tag::Heading { .. }) => self.flush(),
            Event::End(TagEnd::Heading(level)) => self.heading(level),
            Event::Start(Tag::List(first)) => {
                self.flush();
                self.lists.push(first);
            }
            Event::End(TagEnd::List(_)) => {
                self.flush();
                self.lists.pop();
            }
            Event::Start(Tag::Item) => self.item(),
            Event::End(TagEnd::Item) => self.flush(),
            // Links: their words are enough, the other pages are beside each other.
            Event::Start(_)
            | Event::End(_)
            | Event::Html(_)
            | Event::InlineHtml(_)
            | Event::InlineMath(_)
            | Event::DisplayMath(_)
            | Event::FootnoteReference(_)
            | Event::Rule
            | Event::TaskListMarker(_) => {}
        }
    }

    /// A heading of the third or fourth level.
    fn heading(&mut self, _: HeadingLevel) {
        let words: String = self.line.drain(..).map(plain).collect();
        self.roff.control("SS", [words.as_str()]);
        self.is_after_heading = true;
    }

    fn item(&mut self) {
        let mark = match self.lists.last_mut() {
            Some(Some(number)) => {
                *number += 1;
                format!("{}.", *number - 1)
            }
            _ => "\u{2022}".to_owned(),
        };
        self.roff.control("IP", [mark.as_str(), "3"]);
        self.is_after_heading = false;
    }

    /// Ends the open paragraph.
    fn flush(&mut self) {
        if self.line.is_empty() {
            return;
        }
        if std::mem::take(&mut self.is_paragraph_due) {
            self.paragraph();
        }
        self.roff.text(std::mem::take(&mut self.line));
    }

    fn paragraph(&mut self) {
        if !std::mem::take(&mut self.is_after_heading) {
            self.roff.control("PP", []);
        }
    }

    /// A block of code, as it stands.
    fn code<'a>(&mut self, events: &mut impl Iterator<Item = Event<'a>>) {
        self.flush();
        self.paragraph();
        self.roff.control("RS", ["4"]).control("nf", []);
        for event in events {
            if let Event::Text(text) = event {
                for line in text.lines() {
                    self.roff.text([roman(line)]);
                }
            } else if let Event::End(TagEnd::CodeBlock) = event {
                break;
            }
        }
        self.roff.control("fi", []).control("RE", []);
    }

    /// A table, for `tbl`. Each cell is a block of text that wraps.
    fn table<'a>(&mut self, events: &mut impl Iterator<Item = Event<'a>>) {
        self.flush();
        let (mut rows, mut row) = (Vec::new(), Vec::new());
        for event in events {
            if let Event::End(TagEnd::TableCell) = event {
                row.push(std::mem::take(&mut self.line));
            } else if let Event::End(TagEnd::TableHead | TagEnd::TableRow) = event {
                rows.push(std::mem::take(&mut row));
            } else if let Event::End(TagEnd::Table) = event {
                break;
            } else {
                self.event(event);
            }
        }
        let columns = rows.first().map_or(0, Vec::len);
        let format = |cell: &str, last: &str| {
            let cells = std::iter::repeat_n(cell, columns.saturating_sub(1)).chain([last]);
            cells.collect::<Vec<_>>().join(" ")
        };
        self.paragraph();
        self.roff.control("TS", []);
        self.roff.text([roman(format("lb", "lb"))]).text([roman(format!("{}.", format("l", "lx")))]);
        for row in rows {
            for (number, cell) in row.into_iter().enumerate() {
                self.roff.text([roman(if number == 0 { "T{" } else { "T}\tT{" })]);
                self.roff.control("ad", ["l"]);
                self.roff.text(if cell.is_empty() { vec![roman(" ")] } else { cell });
            }
            self.roff.text([roman("T}")]);
        }
        self.roff.control("TE", []);
    }
}

fn plain(inline: Inline) -> String {
    match inline {
        Inline::Roman(text) | Inline::Italic(text) | Inline::Bold(text) => text,
        Inline::LineBreak => " ".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn roff(text: &str) -> String {
        let mut roff = Roff::new();
        section(&mut roff, text);
        roff.to_roff()
    }

    #[test]
    fn lists_code_and_tables_are_what_man_reads() {
        let text = roff(
            "Some `words`\n\nA *b* `c`.\n\n- one\n  more\n- two\n\nSo:\n\n    .code -x\n\n| a | b |\n|---|---|\n| `1` | 2 |\n",
        );
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[0], ".SH \"SOME WORDS\"");
        assert!(text.contains(".IP \u{2022} 3\none more\n"), "{text}");
        assert!(text.contains(".nf\n\\&.code \\-x\n.fi\n"), "{text}");
        assert!(text.contains(".TS\nlb lb\nl lx.\nT{\n.ad l\na\nT}\tT{\n.ad l\nb\nT}\nT{\n"), "{text}");
    }

    #[test]
    fn a_key_is_a_heading_of_its_own() {
        assert!(roff("`fence_virtd { }`\n\n#### `debug`\n\nHow much.\n").contains("\n.SS debug\nHow much.\n"));
    }
}
