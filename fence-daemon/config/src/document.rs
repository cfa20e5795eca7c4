//! A configuration file that can be changed. `-c` keeps what it does not ask about, but for
//! comments.
//!
//! Changes go where fence_virtd and the daemon look: into the last section of a name, in any case
//! of its letters.

use std::fmt;

use crate::raw::{self, Item, SyntaxError};

/// A file, or a part of one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Document {
    nodes: Vec<Node>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Node {
    Value { key: String, value: String },
    Section { name: String, value: Option<String>, inner: Document },
}

impl Node {
    fn is_value(&self, wanted: &str) -> bool {
        matches!(self, Self::Value { key, .. } if key.eq_ignore_ascii_case(wanted))
    }

    fn is_section(&self, wanted: &str) -> bool {
        matches!(self, Self::Section { name, .. } if name.eq_ignore_ascii_case(wanted))
    }
}

impl From<&Item<'_>> for Node {
    fn from(item: &Item<'_>) -> Self {
        match item {
            Item::Value(item) => Self::Value { key: item.key.value.to_owned(), value: item.value.value.to_owned() },
            Item::Section(section) => Self::Section {
                name: section.name.value.to_owned(),
                value: section.value.as_ref().map(|value| value.value.to_owned()),
                inner: Document { nodes: section.items.iter().map(Self::from).collect() },
            },
        }
    }
}

impl Document {
    /// Parses a file.
    ///
    /// # Errors
    /// The file does not follow the grammar.
    pub fn parse(bytes: &[u8]) -> Result<Self, SyntaxError> {
        Ok(Self { nodes: raw::parse(bytes)?.iter().map(Node::from).collect() })
    }

    /// The last section at this path of names; `None` if one is missing.
    fn section(&self, path: &[&str]) -> Option<&Self> {
        let Some((first, rest)) = path.split_first() else { return Some(self) };
        match self.nodes.get(self.last_section(first)?)? {
            Node::Section { inner, .. } => inner.section(rest),
            Node::Value { .. } => None,
        }
    }

    /// The last section that has this kind and name in the section at this path; `None` if it is
    /// missing.
    pub fn named(&self, path: &[&str], kind: &str, wanted: Option<&str>) -> Option<&Self> {
        self.section(path)?.nodes.iter().rev().find_map(|node| match node {
            Node::Section { name, value, inner }
                if name.eq_ignore_ascii_case(kind)
                    && value.as_ref().map(|value| value.to_ascii_lowercase())
                        == wanted.map(str::to_ascii_lowercase) =>
            {
                Some(inner)
            }
            Node::Section { .. } | Node::Value { .. } => None,
        })
    }

    /// Where the section of this name is that counts: the last one without a value, or else the
    /// last one.
    fn last_section(&self, name: &str) -> Option<usize> {
        let is_plain = |node: &Node| matches!(node, Node::Section { value: None, .. });
        let plain = self.nodes.iter().rposition(|node| node.is_section(name) && is_plain(node));
        plain.or_else(|| self.nodes.iter().rposition(|node| node.is_section(name)))
    }

    /// As [`Self::section`], to be changed. Missing sections are added.
    fn section_mut(&mut self, path: &[&str]) -> &mut Self {
        let Some((first, rest)) = path.split_first() else { return self };
        let at = self.last_section(first).unwrap_or_else(|| {
            let name = (*first).to_owned();
            self.nodes.push(Node::Section { name, value: None, inner: Self::default() });
            self.nodes.len().saturating_sub(1)
        });
        match self.nodes.get_mut(at) {
            Some(Node::Section { inner, .. }) => inner.section_mut(rest),
            Some(Node::Value { .. }) | None => unreachable!("a section was just found here"),
        }
    }

    /// The effective value of a key.
    pub fn get(&self, path: &[&str], key: &str) -> Option<&str> {
        match self.section(path)?.nodes.iter().rfind(|node| node.is_value(key))? {
            Node::Value { value, .. } => Some(value),
            Node::Section { .. } => None,
        }
    }

    /// The keys of a section with their values, in the file's order.
    pub fn values(&self, path: &[&str]) -> impl Iterator<Item = (&str, &str)> {
        let nodes = self.section(path).map_or(&[][..], |section| &section.nodes);
        nodes.iter().filter_map(|node| match node {
            Node::Value { key, value } => Some((key.as_str(), value.as_str())),
            Node::Section { .. } => None,
        })
    }

    /// Sets a key. Of several occurrences only the last one stays: the others have no effect.
    pub fn set(&mut self, path: &[&str], key: &str, value: &str) {
        let nodes = &mut self.section_mut(path).nodes;
        let new = |key: &str| Node::Value { key: key.to_owned(), value: value.to_owned() };
        match nodes.iter().rposition(|node| node.is_value(key)) {
            None => nodes.push(new(key)),
            Some(last) => {
                if let Some(Node::Value { value: old, .. }) = nodes.get_mut(last) {
                    value.clone_into(old);
                }
                let mut index = 0_usize;
                nodes.retain(|node| {
                    let keep = index >= last || !node.is_value(key);
                    index = index.saturating_add(1);
                    keep
                });
            }
        }
    }

    /// Removes the keys of a section that `unwanted` selects.
    pub fn remove(&mut self, path: &[&str], unwanted: impl Fn(&str) -> bool) {
        if self.section(path).is_some() {
            let nodes = &mut self.section_mut(path).nodes;
            nodes.retain(|node| !matches!(node, Node::Value { key, .. } if unwanted(key)));
        }
    }

    fn write(&self, depth: usize, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let indent = "\t".repeat(depth);
        for (index, node) in self.nodes.iter().enumerate() {
            match node {
                Node::Value { key, value } => writeln!(f, "{indent}{key} = \"{value}\";")?,
                Node::Section { name, value, inner } => {
                    if index > 0 {
                        writeln!(f)?;
                    }
                    let value = value.as_ref().map(|value| format!(" = \"{value}\"")).unwrap_or_default();
                    writeln!(f, "{indent}{name}{value} {{")?;
                    inner.write(depth.saturating_add(1), f)?;
                    writeln!(f, "{indent}}}")?;
                }
            }
        }
        Ok(())
    }
}

/// The file's text.
impl fmt::Display for Document {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.write(0, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = "a = \"1\";\n\nListeners {\n\tmulticast {\n\t\tport = \"1\";\n\t}\n}\n\nlisteners {\n\ttcp {\n\t\tport = \"9\";\n\t}\n\n\
        \tMulticast {\n\t\tPort = \"2\";\n\t\tzork = \"x # y\";\n\t\tport = \"3\";\n\t}\n}\n\ngroup = \"b\" {\n\tip = \"1.2.3.4\";\n\tip = \"1.2.3.5\";\n}\n";
    const MULTICAST: &[&str] = &["listeners", "multicast"];

    fn document() -> Document {
        Document::parse(FILE.as_bytes()).unwrap()
    }

    #[test]
    fn an_unchanged_document_says_the_same() {
        assert_eq!(document().to_string(), FILE);
        let empty = Document::parse(b"a { } # gone\n b { }").unwrap();
        assert_eq!(empty.to_string(), "a {\n}\n\nb {\n}\n");
    }

    #[test]
    fn the_value_that_counts_is_found_and_changed() {
        let mut document = document();
        assert_eq!(document.get(MULTICAST, "PORT"), Some("3"));
        assert_eq!((document.get(MULTICAST, "hash"), document.get(&["backends"], "uri")), (None, None));
        document.set(MULTICAST, "port", "4");
        document.set(MULTICAST, "hash", "sha1");
        let expected =
            FILE.replace("\t\tPort = \"2\";\n", "").replace("port = \"3\";\n", "port = \"4\";\n\t\thash = \"sha1\";\n");
        assert_eq!(document.to_string(), expected);
    }

    #[test]
    fn missing_sections_are_made() {
        let mut document = Document::default();
        document.set(&["backends", "libvirt"], "uri", "x:");
        assert_eq!(document.to_string(), "backends {\n\tlibvirt {\n\t\turi = \"x:\";\n\t}\n}\n");
    }

    #[test]
    fn only_what_is_unwanted_is_removed() {
        let mut document = document();
        document.remove(MULTICAST, |key| key.eq_ignore_ascii_case("port"));
        document.remove(&["no", "such"], |_| true);
        let expected = FILE.replace("\t\tPort = \"2\";\n", "").replace("\t\tport = \"3\";\n", "");
        assert_eq!(document.to_string(), expected);
        let left: Vec<_> = document.values(MULTICAST).collect();
        assert_eq!(left, [("zork", "x # y")]);
    }

    proptest::proptest! {
        #[test]
        fn what_is_written_reads_back(tokens in proptest::collection::vec(
            "[a-c \n\t{}=;\"#é]{1,3}|a = \"b\";|a#b = \" # \";|a \\{|\\}|c=\"d\"\\{", 0..48,
        )) {
            if let Ok(document) = Document::parse(tokens.concat().as_bytes()) {
                let again = Document::parse(document.to_string().as_bytes());
                proptest::prop_assert_eq!(again.as_ref(), Ok(&document), "{}", document);
            }
        }
    }
}
