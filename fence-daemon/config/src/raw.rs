//! The grammar of fence_virt.conf, and the file as a tree with positions.
//!
//! This module knows no key: `resolved` gives the meaning. It accepts what fence_virtd accepts:
//! names of any characters but space and punctuation, `#` comments between any two tokens, no
//! escapes inside quotes. It also accepts carriage returns and a byte order mark, which fence_virtd
//! rejects.
//!
//! It also accepts `name "value" { ... }`, without the equals sign.
//!
//! It rejects three things that fence_virtd accepts:
//! - a value that runs over the end of its line, which is always a forgotten quote
//! - control characters
//! - more than [`MAX_DEPTH`] nested sections
//!
//! Comments may hold any bytes, as old files in other character sets do. Names and values must be
//! UTF-8.

use std::ops::Range;

use winnow::combinator::{alt, opt, peek, repeat};
use winnow::error::ParserError;
use winnow::stream::{LocatingSlice, Location};
use winnow::token::{any, take_till, take_while};
use winnow::{Parser, Result};

/// How many sections may be nested. fence_virtd's files need three. Each level costs a stack frame,
/// so there is a bound.
pub const MAX_DEPTH: usize = 16;

/// Some Windows editors begin a file with this.
pub(super) const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// Byte offsets into the file.
pub type Span = Range<usize>;

/// A value and its span in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spanned<T> {
    /// The value.
    pub value: T,
    /// The span. It includes the quotes of a quoted value.
    pub span: Span,
}

/// One `key = "value";` or one section, in the file's order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Item<'s> {
    /// `key = "value";`
    Value(Assignment<'s>),
    /// `name { ... }`, `name = "value" { ... }` or `name "value" { ... }`
    Section(Section<'s>),
}

/// `key = "value";`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Assignment<'s> {
    /// The key as spelled.
    pub key: Spanned<&'s str>,
    /// The text between the quotes.
    pub value: Spanned<&'s str>,
}

/// `name { ... }`, `name = "value" { ... }` or `name "value" { ... }`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Section<'s> {
    /// The name as spelled.
    pub name: Spanned<&'s str>,
    /// The value between name and brace, if any.
    pub value: Option<Spanned<&'s str>>,
    /// The contents between the braces.
    pub items: Vec<Item<'s>>,
}

/// Where and why a file does not follow the grammar.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{kind}")]
pub struct SyntaxError {
    /// The position.
    pub span: Span,
    /// The reason.
    pub kind: SyntaxKind,
}

/// Why a file does not follow the grammar.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SyntaxKind {
    /// The file has nothing but space and comments.
    #[error("the file configures nothing")]
    Empty,
    /// A byte that begins neither a key nor a section.
    #[error("expected a key or a section, found {0}")]
    Unexpected(FoundByte),
    /// `key "value"`, `key;`, or the file ends after a name.
    #[error("`{0}` is followed by neither `=` nor `{{`")]
    LoneName(String),
    /// `key = ;`
    #[error("`{0}` has no value")]
    MissingValue(String),
    /// `key = value;`
    #[error("the value of `{0}` is not in double quotes")]
    Unquoted(String),
    /// `key = "";`
    #[error("the value of `{0}` is empty")]
    EmptyValue(String),
    /// `key = "value` and the line ends.
    #[error("the value of `{0}` has no closing quote on its line")]
    Unterminated(String),
    /// Something other than `;` follows `key = "value"`.
    #[error("there is no `;` after the value of `{0}`")]
    MissingSemicolon(String),
    /// A superfluous `;`, usually after a closing brace.
    #[error("this `;` ends nothing")]
    SuperfluousSemicolon,
    /// A superfluous `}`.
    #[error("this `}}` closes nothing")]
    SuperfluousBrace,
    /// The file ends inside a section.
    #[error("the section `{0}` is never closed")]
    Unclosed(String),
    /// Sections nested beyond [`MAX_DEPTH`].
    #[error("sections are nested more than {MAX_DEPTH} deep")]
    TooDeep,
    /// A name or value that is not UTF-8.
    #[error("this is not UTF-8 text")]
    NotUtf8,
    /// A control character inside a name or value.
    #[error("this is a control character")]
    ControlCharacter,
}

/// A byte in the wrong place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FoundByte(pub u8);

impl std::fmt::Display for FoundByte {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            byte @ b'!'..=b'~' => write!(f, "`{}`", char::from(byte)),
            byte => write!(f, "the byte 0x{byte:02x}"),
        }
    }
}

type Input<'s> = LocatingSlice<&'s [u8]>;

impl<'s> ParserError<Input<'s>> for SyntaxError {
    type Inner = Self;

    fn from_input(input: &Input<'s>) -> Self {
        let at = input.current_token_start();
        let found = input.first().copied().unwrap_or_default();
        Self { span: at..at.saturating_add(1), kind: SyntaxKind::Unexpected(FoundByte(found)) }
    }

    fn into_inner(self) -> std::result::Result<Self::Inner, Self> {
        Ok(self)
    }
}

fn is_space(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t' | b'\r' | b'\n')
}

/// Whether a byte may be part of a name. A `#` inside belongs to the name, as in fence_virtd. One
/// before it begins a comment.
fn is_name(byte: u8) -> bool {
    !is_space(byte) && !byte.is_ascii_control() && !matches!(byte, b'{' | b'}' | b'=' | b';' | b'"')
}

/// Parses a file into a tree. Time is linear in the file's length, and the stack is bounded.
///
/// # Errors
/// The first place that does not follow the grammar.
pub fn parse(file: &[u8]) -> Result<Vec<Item<'_>>, SyntaxError> {
    let mut input = LocatingSlice::new(file);
    opt(BYTE_ORDER_MARK).void().parse_next(&mut input)?;
    let items = items(&mut input, None, 0)?;
    if items.is_empty() {
        return Err(SyntaxError { span: 0..0, kind: SyntaxKind::Empty });
    }
    Ok(items)
}

/// Skips space and comments.
fn blank(input: &mut Input<'_>) -> Result<(), SyntaxError> {
    let space = take_while(1.., is_space).void();
    let comment = (b'#', take_till(0.., b'\n')).void();
    repeat(0.., alt((space, comment))).parse_next(input)
}

/// The next byte that is neither space nor comment, not consumed; `None` at the end of the file.
fn next_token(input: &mut Input<'_>) -> Result<Option<u8>, SyntaxError> {
    blank(input)?;
    peek(opt(any)).parse_next(input)
}

/// Parses items up to and including the brace that closes `section`, or up to the end of the file.
fn items<'s>(
    input: &mut Input<'s>,
    section: Option<&Spanned<&str>>,
    depth: usize,
) -> Result<Vec<Item<'s>>, SyntaxError> {
    let mut items = Vec::new();
    loop {
        let token = next_token(input)?;
        let at = input.current_token_start();
        let superfluous = |kind| Err(SyntaxError { span: at..at.saturating_add(1), kind });
        match (token, section) {
            (None, None) => return Ok(items),
            (None, Some(name)) => {
                let kind = SyntaxKind::Unclosed(clip(name.value));
                return Err(SyntaxError { span: name.span.clone(), kind });
            }
            (Some(b'}'), Some(_)) => {
                any.void().parse_next(input)?;
                return Ok(items);
            }
            (Some(b'}'), None) => return superfluous(SyntaxKind::SuperfluousBrace),
            (Some(b';'), _) => return superfluous(SyntaxKind::SuperfluousSemicolon),
            (Some(byte), _) if !is_name(byte) => return superfluous(SyntaxKind::Unexpected(FoundByte(byte))),
            (Some(_), _) => items.push(item(input, depth)?),
        }
    }
}

/// Parses one assignment or section.
fn item<'s>(input: &mut Input<'s>, depth: usize) -> Result<Item<'s>, SyntaxError> {
    let (bytes, span) = take_while(1.., is_name).with_span().parse_next(input)?;
    let name = Spanned { value: text(bytes, span.start)?, span };
    let owned = || clip(name.value);
    match next_token(input)? {
        Some(b'{') => section(input, name, None, depth),
        Some(b'=') => {
            any.void().parse_next(input)?;
            let value = value(input, &name)?;
            match next_token(input)? {
                Some(b'{') => section(input, name, Some(value), depth),
                Some(b';') => {
                    any.void().parse_next(input)?;
                    Ok(Item::Value(Assignment { key: name, value }))
                }
                _ => {
                    let end = value.span.end;
                    Err(SyntaxError { span: end..end, kind: SyntaxKind::MissingSemicolon(owned()) })
                }
            }
        }
        Some(b'"') => {
            let lone = SyntaxError { kind: SyntaxKind::LoneName(owned()), span: name.span.clone() };
            let value = value(input, &name).map_err(|_| lone.clone())?;
            match next_token(input)? {
                Some(b'{') => section(input, name, Some(value), depth),
                _ => Err(lone),
            }
        }
        _ => Err(SyntaxError { kind: SyntaxKind::LoneName(owned()), span: name.span }),
    }
}

/// Parses what follows a section's name and value: the braces and their contents.
fn section<'s>(
    input: &mut Input<'s>,
    name: Spanned<&'s str>,
    value: Option<Spanned<&'s str>>,
    depth: usize,
) -> Result<Item<'s>, SyntaxError> {
    if depth >= MAX_DEPTH {
        return Err(SyntaxError { span: name.span, kind: SyntaxKind::TooDeep });
    }
    any.void().parse_next(input)?;
    let items = items(input, Some(&name), depth.saturating_add(1))?;
    Ok(Item::Section(Section { name, value, items }))
}

/// Parses a quoted value and the blanks before it.
fn value<'s>(input: &mut Input<'s>, key: &Spanned<&str>) -> Result<Spanned<&'s str>, SyntaxError> {
    let owned = || clip(key.value);
    match next_token(input)? {
        Some(b'"') => {}
        Some(byte) if is_name(byte) => {
            let unquoted = take_till(1.., |byte| matches!(byte, b'\r' | b'\n' | b';' | b'{' | b'}' | b'#'));
            let (bytes, span) = unquoted.with_span().parse_next(input)?;
            let end = span.start.saturating_add(bytes.trim_ascii_end().len());
            return Err(SyntaxError { span: span.start..end, kind: SyntaxKind::Unquoted(owned()) });
        }
        _ => return Err(SyntaxError { span: key.span.clone(), kind: SyntaxKind::MissingValue(owned()) }),
    }
    let quoted = (any, take_till(0.., |byte| matches!(byte, b'"' | b'\n')), opt(b'"'));
    let ((_, bytes, close), span) = quoted.with_span().parse_next(input)?;
    let start = span.start.saturating_add(1);
    if close.is_none() {
        return Err(SyntaxError { span: span.start..start, kind: SyntaxKind::Unterminated(owned()) });
    }
    if bytes.is_empty() {
        return Err(SyntaxError { span, kind: SyntaxKind::EmptyValue(owned()) });
    }
    Ok(Spanned { value: text(bytes, start)?, span })
}

/// A name or value for a message, cut if it is very long.
pub(super) fn clip(text: &str) -> String {
    const SHOWN: usize = 80;
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.to_owned(),
    }
}

/// Bytes that begin at `start` as printable text, since names and values occur in log lines.
fn text(bytes: &[u8], start: usize) -> Result<&str, SyntaxError> {
    let wrong = |offset, kind| {
        let at = start.saturating_add(offset);
        SyntaxError { span: at..at.saturating_add(1), kind }
    };
    let text = std::str::from_utf8(bytes).map_err(|error| wrong(error.valid_up_to(), SyntaxKind::NotUtf8))?;
    match text.char_indices().find(|(_, c)| c.is_control() && *c != '\t') {
        Some((offset, _)) => Err(wrong(offset, SyntaxKind::ControlCharacter)),
        None => Ok(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn kind_of(file: &[u8]) -> SyntaxKind {
        parse(file).unwrap_err().kind
    }

    fn value<'s>(item: &Item<'s>) -> (&'s str, &'s str) {
        match item {
            Item::Value(value) => (value.key.value, value.value.value),
            Item::Section(section) => panic!("{section:?}"),
        }
    }

    #[test]
    fn sections_values_and_comments_anywhere() {
        let file = b"a=\"1\";\n# }\nb { c # x\n = # y\n \"2\" # \xff\n ; g = \"v\" { } }# end";
        let tree = parse(file).unwrap();
        assert_eq!(value(&tree[0]), ("a", "1"));
        let Item::Section(b) = &tree[1] else { panic!("{tree:?}") };
        assert_eq!(value(&b.items[0]), ("c", "2"));
        let Item::Section(g) = &b.items[1] else { panic!("{tree:?}") };
        let written = g.value.clone().unwrap();
        assert_eq!((written.value, &file[written.span]), ("v", &b"\"v\""[..]));
        assert!(g.items.is_empty());
    }

    #[test]
    fn a_sections_name_may_stand_without_an_equals_sign() {
        for file in ["m = \"n\" { }", "m \"n\" { }", "m\"n\"{}", "m # x\n \"n\"\n{ }"] {
            let tree = parse(file.as_bytes()).unwrap();
            let Item::Section(section) = &tree[0] else { panic!("{tree:?}") };
            assert_eq!((section.name.value, section.value.as_ref().map(|name| name.value)), ("m", Some("n")), "{file}");
        }
    }

    #[test]
    fn values_that_fence_virtd_accepts_are_accepted() {
        let file = b"a-b { 1a = \"5\"; x/y.z:w@_ = \"\xc3\xa9 # ' \\ {;}\"; i#j = \"k\"; }";
        let tree = parse(file).unwrap();
        let Item::Section(section) = &tree[0] else { panic!("{tree:?}") };
        assert_eq!(value(&section.items[0]), ("1a", "5"));
        assert_eq!(value(&section.items[1]), ("x/y.z:w@_", "é # ' \\ {;}"));
        assert_eq!(value(&section.items[2]), ("i#j", "k"));
    }

    #[test]
    fn windows_line_ends_and_a_byte_order_mark_do_no_harm() {
        let tree = parse(b"\xef\xbb\xbfa {\r\n\tx = \"1\";\r\n}\r\n").unwrap();
        assert!(matches!(&tree[0], Item::Section(section) if section.name.value == "a" && section.name.span == (3..4)));
    }

    #[test]
    fn mistakes_are_told_apart() {
        for (file, expected) in [
            (&b""[..], SyntaxKind::Empty),
            (b" # nothing\n", SyntaxKind::Empty),
            (b"\xef\xbb\xbf", SyntaxKind::Empty),
            (b"{ }", SyntaxKind::Unexpected(FoundByte(b'{'))),
            (b"= \"x\";", SyntaxKind::Unexpected(FoundByte(b'='))),
            (b"\"x\";", SyntaxKind::Unexpected(FoundByte(b'"'))),
            (b"a { \0 }", SyntaxKind::Unexpected(FoundByte(0))),
            (b"a {\x0c x = \"1\"; }", SyntaxKind::Unexpected(FoundByte(0x0c))),
            (b"x", SyntaxKind::LoneName("x".into())),
            (b"x \"1\";", SyntaxKind::LoneName("x".into())),
            (b"x \"1\" y { }", SyntaxKind::LoneName("x".into())),
            (b"x \"\" { }", SyntaxKind::LoneName("x".into())),
            (b"x \"1 { }", SyntaxKind::LoneName("x".into())),
            (b"x y = \"1\";", SyntaxKind::LoneName("x".into())),
            (b"x = ;", SyntaxKind::MissingValue("x".into())),
            (b"x =", SyntaxKind::MissingValue("x".into())),
            (b"x = { }", SyntaxKind::MissingValue("x".into())),
            (b"x = 1;", SyntaxKind::Unquoted("x".into())),
            (b"x = '1';", SyntaxKind::Unquoted("x".into())),
            (b"x = \"\";", SyntaxKind::EmptyValue("x".into())),
            (b"x = \"1;\ny = \"2\";", SyntaxKind::Unterminated("x".into())),
            (b"x = \"", SyntaxKind::Unterminated("x".into())),
            (b"x = \"1\"", SyntaxKind::MissingSemicolon("x".into())),
            (b"x = \"1\" y = \"2\";", SyntaxKind::MissingSemicolon("x".into())),
            (b"x = \"a\\\"b\";", SyntaxKind::MissingSemicolon("x".into())),
            (b"a { };", SyntaxKind::SuperfluousSemicolon),
            (b"x = \"1\";;", SyntaxKind::SuperfluousSemicolon),
            (b"a { } }", SyntaxKind::SuperfluousBrace),
            (b"a { b { }", SyntaxKind::Unclosed("a".into())),
            (b"x = \"\xff\";", SyntaxKind::NotUtf8),
            (b"x\xff = \"1\";", SyntaxKind::NotUtf8),
            (b"x = \"1\0\";", SyntaxKind::ControlCharacter),
            (b"x = \"\x1b[31m\";", SyntaxKind::ControlCharacter),
            (b"x = \"\xc2\x9b\";", SyntaxKind::ControlCharacter),
            (b"x\xc2\x9b = \"1\";", SyntaxKind::ControlCharacter),
        ] {
            assert_eq!(kind_of(file), expected, "{:?}", file.escape_ascii().to_string());
        }
    }

    #[test]
    fn long_names_are_shown_in_part() {
        let SyntaxKind::LoneName(name) = kind_of("é".repeat(1_000_000).as_bytes()) else { panic!("no name") };
        assert_eq!(name, format!("{}...", "é".repeat(80)));
    }

    #[test]
    fn nesting_is_bounded() {
        let nested = |depth: usize| [b"a{".repeat(depth), b"}".repeat(depth)].concat();
        assert!(parse(&nested(MAX_DEPTH)).is_ok());
        assert_eq!(kind_of(&nested(MAX_DEPTH + 1)), SyntaxKind::TooDeep);
        assert_eq!(kind_of(&b"a{".repeat(1_000_000)), SyntaxKind::TooDeep);
        assert_eq!(kind_of(&b"a=\"1\"{".repeat(1_000_000)), SyntaxKind::TooDeep);
    }

    #[test]
    fn megabytes_of_garbage_are_an_error() {
        const MEGABYTE: usize = 1 << 20;
        for (pattern, size) in [
            (&b"x"[..], 10 * MEGABYTE),
            (b"\0", 10 * MEGABYTE),
            (b"\xff\x00\x1b\xfe", 10 * MEGABYTE),
            (b"\"", 10 * MEGABYTE),
            (b"{", 10 * MEGABYTE),
            (b"x=\"", 10 * MEGABYTE),
            (b"a{", 10 * MEGABYTE),
            // Valid except for the last byte: all of it is parsed, slowly in a debug build.
            (b"#", 10 * MEGABYTE),
            (b" ", MEGABYTE),
            (b"# #\n", MEGABYTE),
            (b"a{}", MEGABYTE),
            (b"x = \"1\"; ", MEGABYTE),
        ] {
            let mut file = pattern.repeat(size / pattern.len());
            file.extend_from_slice(b"\n}");
            assert!(parse(&file).is_err(), "{}", pattern.escape_ascii());
        }
    }

    /// A tree to be written and parsed again.
    #[derive(Clone, Debug)]
    enum Tree {
        Value(String, String),
        Section(String, Option<String>, Vec<Tree>),
    }

    fn node() -> impl Strategy<Value = Tree> {
        let (name, text) = ("[a-zA-Z0-9_./:-][a-zA-Z0-9_.#-]{0,8}", "[^\"\\p{Cc}]{1,12}");
        let leaf = (name, text).prop_map(|(key, value)| Tree::Value(key, value));
        leaf.prop_recursive(6, 48, 6, move |inner| {
            (name, proptest::option::of(text), proptest::collection::vec(inner, 0..6))
                .prop_map(|(name, value, items)| Tree::Section(name, value, items))
        })
    }

    fn write(nodes: &[Tree], blanks: &mut dyn Iterator<Item = &'static str>, out: &mut String) {
        let mut tokens = Vec::new();
        flatten(nodes, &mut tokens);
        for token in tokens {
            out.push_str(&token);
            out.push_str(blanks.next().unwrap());
        }
    }

    fn flatten(nodes: &[Tree], tokens: &mut Vec<String>) {
        for node in nodes {
            match node {
                // The space ends the name: a `#` right after it would belong to it.
                Tree::Value(key, value) => {
                    tokens.extend([format!("{key} "), "=".into(), format!("\"{value}\""), ";".into()]);
                }
                Tree::Section(name, value, items) => {
                    tokens.push(format!("{name} "));
                    tokens.extend(value.iter().flat_map(|value| ["=".into(), format!("\"{value}\"")]));
                    tokens.push("{".into());
                    flatten(items, tokens);
                    tokens.push("}".into());
                }
            }
        }
    }

    fn same(nodes: &[Tree], items: &[Item<'_>]) -> bool {
        nodes.len() == items.len()
            && nodes.iter().zip(items).all(|pair| match pair {
                (Tree::Value(key, value), Item::Value(read)) => key == read.key.value && value == read.value.value,
                (Tree::Section(name, value, inner), Item::Section(read)) => {
                    name == read.name.value
                        && value.as_deref() == read.value.as_ref().map(|value| value.value)
                        && same(inner, &read.items)
                }
                _ => false,
            })
    }

    /// Whether every span lies inside the file and cuts out the word that it stands for.
    fn spans_hold(file: &[u8], items: &[Item<'_>]) -> bool {
        items.iter().all(|item| match item {
            Item::Value(read) => {
                &file[read.key.span.clone()] == read.key.value.as_bytes()
                    && file[read.value.span.clone()] == *format!("\"{}\"", read.value.value).as_bytes()
            }
            Item::Section(read) => {
                &file[read.name.span.clone()] == read.name.value.as_bytes() && spans_hold(file, &read.items)
            }
        })
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(file in proptest::collection::vec(proptest::num::u8::ANY, 0..512)) {
            if let Err(error) = parse(&file) {
                prop_assert!(error.span.start <= error.span.end && error.span.end <= file.len());
            }
        }

        #[test]
        fn arbitrary_tokens_never_panic(tokens in proptest::collection::vec("[a-c \n\t{}=;\"#\\x00é]{1,3}|\"a\"|a = \"b\";|a \\{", 0..64)) {
            let file = tokens.concat();
            match parse(file.as_bytes()) {
                Ok(items) => prop_assert!(spans_hold(file.as_bytes(), &items)),
                Err(error) => prop_assert!(error.span.start <= error.span.end && error.span.end <= file.len()),
            }
        }

        #[test]
        fn a_written_tree_reads_back(
            nodes in proptest::collection::vec(node(), 1..6),
            blanks in proptest::collection::vec(proptest::sample::select(&["", " ", "\n", "\t", "\r\n", "# c }\"\n"][..]), 1..16),
        ) {
            let mut file = String::new();
            write(&nodes, &mut blanks.iter().copied().cycle(), &mut file);
            let items = parse(file.as_bytes()).map_err(|error| TestCaseError::fail(format!("{error}: {file:?}")))?;
            prop_assert!(same(&nodes, &items), "{file:?}");
            prop_assert!(spans_hold(file.as_bytes(), &items));
        }
    }
}
