//! A Markdown page, parsed for the tidy rules: its prose, links, anchors and code.

use std::collections::{HashMap, HashSet};
use std::ops::Range;

use pulldown_cmark::{Event, Options, Parser, Tag, TagEnd};

/// A unit of prose: a paragraph, a list item, or a table cell.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Block {
    /// The line where it starts, from 1.
    pub(crate) line: usize,
    /// Its text. A code span counts as one word.
    pub(crate) text: String,
}

/// A parsed page.
#[derive(Debug, Default)]
pub(crate) struct Page {
    /// All prose except the headings.
    pub(crate) blocks: Vec<Block>,
    /// The link targets, with their lines.
    pub(crate) links: Vec<(usize, String)>,
    /// The code spans, with their lines.
    pub(crate) spans: Vec<(usize, String)>,
    /// The anchors of its headings.
    pub(crate) anchors: HashSet<String>,
    /// The lines of code blocks, from 1.
    code: Vec<Range<usize>>,
}

impl Page {
    /// Parses `text`.
    pub(crate) fn parse(text: &str) -> Self {
        let mut page = Self::default();
        let mut headings = HashMap::new();
        let mut open = String::new();
        let mut heading = None;
        // Line numbers are needed often, so the starts of all lines are looked up, not counted.
        let starts: Vec<usize> = std::iter::once(0).chain(text.match_indices('\n').map(|(at, _)| at + 1)).collect();
        let line = |at: usize| starts.partition_point(|start| *start <= at);
        let mut begun = 1;
        for (event, range) in Parser::new_ext(text, Options::ENABLE_TABLES).into_offset_iter() {
            let words: &str = match &event {
                Event::Text(words) => words,
                Event::Code(code) => {
                    page.spans.push((line(range.start), code.to_string()));
                    // In an anchor the words of a code span count one by one; in a sentence the
                    // span is one word.
                    if heading.is_some() { code } else { "`code`" }
                }
                Event::SoftBreak | Event::HardBreak => " ",
                Event::Start(Tag::CodeBlock(_)) => {
                    page.code.push(line(range.start)..line(range.end.saturating_sub(1)) + 1);
                    page.close(&mut open, begun);
                    heading = Some(String::new());
                    continue;
                }
                Event::End(TagEnd::CodeBlock) => {
                    heading = None;
                    continue;
                }
                Event::Start(Tag::Heading { .. }) => {
                    page.close(&mut open, begun);
                    heading = Some(String::new());
                    continue;
                }
                Event::End(TagEnd::Heading(_)) => {
                    let slug = slug(&heading.take().unwrap_or_default());
                    let count = headings.entry(slug.clone()).or_insert(0_usize);
                    page.anchors.insert(if *count == 0 { slug } else { format!("{slug}-{count}") });
                    *count += 1;
                    continue;
                }
                Event::Start(Tag::Link { dest_url, .. } | Tag::Image { dest_url, .. }) => {
                    page.links.push((line(range.start), dest_url.to_string()));
                    continue;
                }
                Event::Start(Tag::Paragraph | Tag::Item | Tag::TableCell)
                | Event::End(TagEnd::Paragraph | TagEnd::Item | TagEnd::TableCell) => {
                    page.close(&mut open, begun);
                    begun = line(range.start);
                    continue;
                }
                Event::Start(_)
                | Event::End(_)
                | Event::Html(_)
                | Event::InlineHtml(_)
                | Event::InlineMath(_)
                | Event::DisplayMath(_)
                | Event::FootnoteReference(_)
                | Event::Rule
                | Event::TaskListMarker(_) => continue,
            };
            heading.as_mut().unwrap_or(&mut open).push_str(words);
        }
        page.close(&mut open, begun);
        page
    }

    /// Whether line `number`, from 1, is part of a code block.
    pub(crate) fn is_code(&self, number: usize) -> bool {
        self.code.iter().any(|lines| lines.contains(&number))
    }

    fn close(&mut self, open: &mut String, line: usize) {
        let text = std::mem::take(open);
        if !text.trim().is_empty() {
            self.blocks.push(Block { line, text });
        }
    }
}

/// The anchor that GitHub gives a heading.
fn slug(heading: &str) -> String {
    let kept = heading.trim().chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
    kept.flat_map(char::to_lowercase).map(|c| if c == ' ' { '-' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blocks(text: &str) -> Vec<(usize, String)> {
        Page::parse(text).blocks.into_iter().map(|block| (block.line, block.text)).collect()
    }

    #[test]
    fn prose_is_what_is_neither_heading_nor_code() {
        let page = "# Title\n\nOne\ntwo `a b`.\n\n    $ code\n\n- first\n- second\n\n| a | b |\n|---|---|\n| c | d |\n";
        let found = blocks(page);
        let found: Vec<_> = found.iter().map(|(line, text)| (*line, text.as_str())).collect();
        assert_eq!(
            found,
            [(3, "One two `code`."), (8, "first"), (9, "second"), (11, "a"), (11, "b"), (13, "c"), (13, "d")]
        );
    }

    #[test]
    fn code_blocks_know_their_lines() {
        let page = Page::parse("Text\n\n    indented\n\nText\n\n```sh\nfenced\n```\n\nText\n");
        let code: Vec<_> = (1..=11).filter(|line| page.is_code(*line)).collect();
        assert_eq!(code, [3, 7, 8, 9]);
    }

    #[test]
    fn anchors_are_those_of_github() {
        let page = Page::parse("# What's `key_file2` for?\n\n## Again\n\n## Again\n");
        let mut anchors: Vec<_> = page.anchors.iter().map(String::as_str).collect();
        anchors.sort_unstable();
        assert_eq!(anchors, ["again", "again-1", "whats-key_file2-for"]);
    }

    #[test]
    fn links_and_code_spans_have_their_lines() {
        let page = Page::parse("See [x](a.md#b)\nand `c/d.rs`, ![p](q.svg).\n");
        assert_eq!(page.links, [(1, "a.md#b".to_owned()), (2, "q.svg".to_owned())]);
        assert_eq!(page.spans, [(2, "c/d.rs".to_owned())]);
    }
}
