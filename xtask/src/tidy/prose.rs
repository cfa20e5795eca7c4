//! The checkable part of plain English: short lines, short sentences, the glossary's words.

use super::markdown::Page;

/// The greatest width of a comment or a Markdown line, in characters.
const WIDEST: usize = 100;
/// The greatest mean length of a page's sentences, in words.
const MEAN: usize = 18;
/// The length, in words, beyond which a sentence is long.
const LONG: usize = 30;
/// The greatest share of long sentences on a page, in percent.
const LONG_SHARE: usize = 5;
/// Fewer words than this without a full stop are a label, not a sentence.
const LABEL: usize = 8;

/// Words that GLOSSARY.md replaces, with their replacements.
const WORDS: &[(&str, &str)] = &[
    ("asker", "client, requester"),
    ("askers", "clients, requesters"),
    ("book-keeping", "state"),
    ("call-back", "callback"),
    ("call-backs", "callbacks"),
    ("doom", "fence race"),
    ("doomed", "being fenced"),
    ("duel", "fence race"),
    ("duels", "fence races"),
    ("shield", "rate limit"),
    ("shoot each other", "fence each other"),
    ("stock's server", "fence_virtd"),
    ("stray", "orphan"),
    ("strays", "orphans"),
    ("turned away", "rejected"),
    ("who asks", "client, requester"),
];

/// The rules that a page violates, each with its line.
pub(crate) fn page(text: &str, page: &Page, is_glossary: bool) -> Vec<(usize, String)> {
    let mut broken = Vec::new();
    for (number, line) in text.lines().enumerate().map(|(at, line)| (at + 1, line)) {
        if !page.is_code(number) && !line.trim_start().starts_with('|') && width_in_markdown(line) > WIDEST {
            broken.push((number, format!("a line of more than {WIDEST} columns")));
        }
    }
    if !is_glossary {
        for block in &page.blocks {
            let words = spaced(&block.text);
            let found = WORDS.iter().filter(|(word, _)| words.contains(&format!(" {word} ")));
            broken.extend(found.map(|(word, say)| (block.line, format!("`{word}` is not the field's word: {say}"))));
        }
    }
    let lengths: Vec<(usize, usize)> = page
        .blocks
        .iter()
        .flat_map(|block| sentences(&block.text).into_iter().map(|length| (block.line, length)))
        .collect();
    let words: usize = lengths.iter().map(|(_, length)| length).sum();
    if words > MEAN * lengths.len() {
        let mean = words.div_ceil(lengths.len());
        broken.push((1, format!("sentences of {mean} words on average: at most {MEAN}")));
    }
    let long: Vec<_> = lengths.iter().filter(|(_, length)| *length > LONG).collect();
    if long.len() * 100 > LONG_SHARE * lengths.len() {
        broken.extend(long.iter().map(|(line, length)| (*line, format!("a sentence of {length} words"))));
    }
    broken
}

/// The comments of a source file that are too wide. `mark` starts a comment.
pub(crate) fn comments(text: &str, mark: &str) -> Vec<(usize, String)> {
    let mut broken = Vec::new();
    let mut in_code = false;
    for (number, line) in text.lines().enumerate().map(|(at, line)| (at + 1, line)) {
        let Some(comment) = line.trim_start().strip_prefix(mark) else {
            in_code = false;
            continue;
        };
        let comment = comment.trim_start_matches(['/', '!', '#']).trim_start();
        let is_fence = comment.starts_with("```");
        let is_table = comment.starts_with('|');
        if !in_code && !is_fence && !is_table && width(line) > WIDEST {
            broken.push((number, format!("a comment of more than {WIDEST} columns")));
        }
        in_code ^= is_fence;
    }
    broken
}

/// The length of each sentence of `text`, in words.
fn sentences(text: &str) -> Vec<usize> {
    let mut lengths = Vec::new();
    let mut length = 0;
    for word in text.split_whitespace() {
        // A dash between two words is no word, and neither is an ellipsis.
        if !word.contains(char::is_alphanumeric) {
            continue;
        }
        length += 1;
        let bare = word.trim_end_matches(['"', '\'', ')', '*', '”', '’']);
        if bare.ends_with(['.', '!', '?']) && !matches!(bare, "e.g." | "i.e." | "etc." | "vs.") {
            lengths.push(length);
            length = 0;
        }
    }
    if length >= LABEL {
        lengths.push(length);
    }
    lengths
}

/// `text` in lower case, with one space before, between and after its words.
fn spaced(text: &str) -> String {
    let kept = |c: char| if c.is_alphanumeric() || matches!(c, '-' | '\'' | '_') { c } else { ' ' };
    let words: Vec<String> = text.split_whitespace().map(|word| word.chars().map(kept).collect()).collect();
    format!(" {} ", words.join(" ").split_whitespace().collect::<Vec<_>>().join(" ")).to_lowercase()
}

/// The width without parts that cannot be wrapped: addresses.
fn width(line: &str) -> usize {
    let addresses = line.split_whitespace().filter(|word| word.contains("://"));
    line.chars().count() - addresses.map(|word| word.chars().count()).sum::<usize>()
}

/// Like [`width`], and without link targets.
fn width_in_markdown(line: &str) -> usize {
    let mut kept = String::new();
    let mut rest = line;
    while let Some((before, link)) = rest.split_once("](") {
        kept.push_str(before);
        rest = link.split_once(')').map_or("", |(_, after)| after);
    }
    kept.push_str(rest);
    width(&kept)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn broken(text: &str) -> Vec<(usize, String)> {
        page(text, &Page::parse(text), false)
    }

    #[test]
    fn wide_lines_are_found() {
        let wide = "x".repeat(WIDEST + 1);
        assert_eq!(broken(&format!("short\n{wide}\n")), [(2, "a line of more than 100 columns".to_owned())]);
        for fine in [
            format!("    {wide}\n"),
            format!("```text\n{wide}\n```\n"),
            format!("| {wide} | b |\n|---|---|\n| {wide} | b |\n"),
            format!("See [x]({wide}).\n"),
            format!("<https://{wide}>\n"),
            format!("{}\n", "x".repeat(WIDEST)),
        ] {
            assert!(broken(&fine).is_empty(), "{fine}");
        }
    }

    #[test]
    fn wide_comments_are_found() {
        let wide = "x ".repeat(WIDEST);
        let code = format!(
            "//! {wide}\nlet x = \"{wide}\"; // {wide}\n    /// ```\n    /// {wide}\n    /// ```\n/// | {wide}\n"
        );
        assert_eq!(comments(&code, "//"), [(1, "a comment of more than 100 columns".to_owned())]);
        assert_eq!(comments(&format!("a = 1\n# {wide}\n"), "#").len(), 1);
        assert!(comments(&format!("// https://{}\n", "x".repeat(WIDEST)), "//").is_empty());
    }

    #[test]
    fn a_sentence_ends_where_the_next_begins() {
        assert_eq!(sentences("One two. Three four five! \"Six.\" Seven?"), [2, 3, 1, 1]);
        assert_eq!(sentences("It takes 0.3 s, e.g. here – or there."), [8]);
        assert_eq!(sentences("Set `code`. `code` is set."), [2, 3]);
        // A label is no sentence; an introduction to a list is one.
        assert_eq!(sentences("the name"), [0; 0]);
        assert_eq!(sentences("What follows is shown by the next few lines:"), [9]);
    }

    #[test]
    fn long_sentences_are_found() {
        let words = |many: usize| format!("{}.\n\n", vec!["W"; many].join(" "));
        assert_eq!(broken(&words(MEAN + 1)), [(1, "sentences of 19 words on average: at most 18".to_owned())]);
        assert!(broken(&words(MEAN)).is_empty());
        // One long sentence in twenty is allowed, one in nineteen is not.
        assert!(broken(&(words(5).repeat(19) + &words(LONG + 1))).is_empty());
        assert_eq!(broken(&(words(5).repeat(18) + &words(LONG + 1))), [(37, "a sentence of 31 words".to_owned())]);
    }

    #[test]
    fn words_of_the_glossary_do_not_come_back() {
        let found = broken("The Call-back of\nan asker, `stray` and \"astray\".\n");
        let found: Vec<_> = found.iter().map(|(_, what)| what.split('`').nth(1).unwrap()).collect();
        assert_eq!(found, ["asker", "call-back"]);
        let glossary = "A duel.\n";
        assert!(page(glossary, &Page::parse(glossary), true).is_empty());
    }
}
