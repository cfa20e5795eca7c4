//! No type name means two things in one crate.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// The types by crate and name, each with its first place.
#[derive(Default)]
pub(super) struct Homonyms(BTreeMap<(PathBuf, String), (PathBuf, usize)>);

impl Homonyms {
    /// Takes in a file of Rust. Returns the types whose names another file of its crate has, with
    /// their lines.
    pub(super) fn look(&mut self, file: &Path, text: &str) -> Vec<(usize, String)> {
        let mut found = Vec::new();
        for (number, line) in (1..).zip(text.lines()) {
            let Some(name) = defined(line) else { continue };
            let key = (crate_of(file), name.to_owned());
            match self.0.get(&key) {
                Some((there, at)) if (there.as_path(), *at) != (file, number) => {
                    found.push((number, format!("`{name}` has another meaning in {}:{at}", there.display())));
                }
                _ => drop(self.0.insert(key, (file.to_owned(), number))),
            }
        }
        found
    }
}

/// The type that a line defines. An indented `type` belongs to a trait or a function.
fn defined(line: &str) -> Option<&str> {
    let indented = line.starts_with(' ');
    let mut words = line.trim_start().split(' ');
    let mut kind = words.next()?;
    if kind == "pub" || kind.starts_with("pub(") {
        kind = words.next()?;
    }
    let is_type = matches!(kind, "struct" | "enum" | "trait" | "union") || (kind == "type" && !indented);
    let name = words.next().filter(|_| is_type)?;
    let end = name.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(name.len());
    name.get(..end).filter(|name| name.starts_with(char::is_uppercase))
}

/// The target of cargo that a file belongs to, as the path that all its files share.
fn crate_of(file: &Path) -> PathBuf {
    let parts: Vec<_> = file.iter().collect();
    let at = parts.iter().rposition(|part| *part == "src" || *part == "tests").unwrap_or_default();
    // Below `src/bin` and `tests`, each file or folder is a target of its own.
    let own = match (parts.get(at), parts.get(at + 1)) {
        (Some(folder), Some(next)) if *folder == "src" && *next == "bin" => 2,
        (Some(folder), Some(_)) if *folder == "tests" => 1,
        _ => 0,
    };
    let shared: PathBuf = parts.iter().take(at + 1 + own).collect();
    shared.with_extension("")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_has_one_meaning_in_a_crate_and_others_elsewhere() {
        let mut homonyms = Homonyms::default();
        let mut look = |file: &str, text: &str| homonyms.look(Path::new(file), text);
        assert!(look("a/src/one.rs", "pub struct Seen(u8);\n    type Error = u8;\nstruct\n").is_empty());
        assert!(look("a/src/two.rs", "    type Error = u8;\n// struct Seen\nlet Seen = 1;\n").is_empty());
        let found = look("a/src/two/three.rs", "\n    pub(super) enum Seen<'a> {\n");
        assert_eq!(found, [(2, "`Seen` has another meaning in a/src/one.rs:1".to_owned())]);
        for elsewhere in ["b/src/lib.rs", "a/src/bin/b.rs", "a/src/bin/c.rs", "a/tests/d.rs", "a/tests/e/main.rs"] {
            assert!(look(elsewhere, "struct Seen;\n").is_empty(), "{elsewhere}");
        }
        assert_eq!(look("a/tests/e/more.rs", "type Seen = u8;\n").len(), 1);
    }
}
