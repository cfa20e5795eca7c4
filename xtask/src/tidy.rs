//! Rules of this tree that no compiler checks. Files are short and begin with their purpose,
//! nothing is left open, no path of one person's machine occurs. Words are plain, a type's name has
//! one meaning in its crate, and links resolve.

mod homonyms;
mod links;
mod markdown;
mod prose;
mod rooms;

use std::collections::HashMap;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context as _;

use homonyms::Homonyms;
use markdown::Page;
use rooms::Rooms;

/// The longest file in lines, without its tests: what one can read in one sitting.
const LONGEST: usize = 450;

/// One violation of a rule.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Finding {
    file: PathBuf,
    line: usize,
    what: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.file.display(), self.line, self.what)
    }
}

/// Checks every text file of the tree at `root`. Returns the violations, and the imports between
/// rooms of the daemon.
///
/// # Errors
/// A file cannot be read.
pub(crate) fn check(root: &Path) -> anyhow::Result<(Vec<Finding>, String)> {
    let mut findings = Vec::new();
    let mut pages = HashMap::new();
    let (mut rooms, mut homonyms) = (Rooms::default(), Homonyms::default());
    for file in files(root)? {
        let bytes = fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?;
        // Captured packets and the like have no lines.
        let Ok(text) = String::from_utf8(bytes) else { continue };
        let name = file.strip_prefix(root).unwrap_or(&file).to_owned();
        let extension = file.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
        let at = |(line, what)| Finding { file: name.clone(), line, what };
        let broken = rules(&text, extension == "rs").into_iter().map(|(line, what)| (line, what.to_owned()));
        findings.extend(broken.map(at));
        match extension {
            "md" => {
                let page = Page::parse(&text);
                let is_glossary = name == Path::new("GLOSSARY.md");
                findings.extend(prose::page(&text, &page, is_glossary).into_iter().map(at));
                // A template becomes a page elsewhere, where its links are checked.
                if !name.starts_with("tests/bench/src/pages") {
                    pages.insert(name, page);
                }
            }
            "rs" => {
                findings.extend(prose::comments(&text, "//").into_iter().map(at));
                findings.extend(homonyms.look(&name, &text).into_iter().map(at));
                findings.extend(rooms.look(&name.to_string_lossy(), &text).into_iter().map(at));
            }
            _ if matches!(extension, "toml" | "service" | "sh") || text.starts_with("#!") => {
                findings.extend(prose::comments(&text, "#").into_iter().map(at));
            }
            _ => {}
        }
    }
    let links = links::check(&pages, |path| root.join(path).exists());
    findings.extend(links.into_iter().map(|(file, line, what)| Finding { file, line, what }));
    if root.join(rooms::FOLDER).exists() {
        let idle = rooms.unused().into_iter();
        findings.extend(idle.map(|what| Finding { file: "xtask/src/tidy/rooms.rs".into(), line: 1, what }));
    }
    findings.sort_unstable();
    Ok((findings, rooms.graph()))
}

/// The files of the tree, sorted, without the directories of cargo and git.
///
/// # Errors
/// A directory cannot be listed.
pub(crate) fn files(root: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut folders = vec![root.to_owned()];
    let mut files = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).with_context(|| format!("cannot list {}", folder.display()))? {
            let entry = entry.with_context(|| format!("cannot list {}", folder.display()))?;
            let kind = entry.file_type().with_context(|| format!("cannot look at {}", entry.path().display()))?;
            if kind.is_dir() && entry.file_name() != "target" && entry.file_name() != ".git" {
                folders.push(entry.path());
            } else if kind.is_file() {
                files.push(entry.path());
            }
        }
    }
    files.sort_unstable();
    Ok(files)
}

/// The rules that `text` violates, each with its line number.
fn rules(text: &str, is_rust: bool) -> Vec<(usize, &'static str)> {
    let mut broken = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let mut found = |what| broken.push((number + 1, what));
        if is_rust && (line.contains(concat!("todo", "!(")) || line.contains(concat!("unimplemented", "!("))) {
            found("left open: finish it, or leave it out");
        }
        if is_rust && line.trim() == concat!("#[", "ignore]") {
            found("an ignored test without a reason");
        }
        if names_a_home(line) {
            found("a path of somebody's machine");
        }
    }
    if is_rust {
        // Attributes of the whole crate may precede its description.
        let mut lines = text.lines().enumerate().skip_while(|(_, line)| line.is_empty() || line.starts_with("#!["));
        match lines.next() {
            Some((_, line)) if line.starts_with("//!") => {}
            Some((number, _)) => broken.push((number + 1, "starts without `//!`: what lives here, and why?")),
            None => broken.push((1, "an empty file")),
        }
        if text.lines().take_while(|line| !line.starts_with("#[cfg(test)]")).count() > LONGEST {
            broken.push((LONGEST + 1, "too long for one sitting: would a newcomer split it?"));
        }
    }
    broken
}

/// Whether `line` has a path below a home directory.
fn names_a_home(line: &str) -> bool {
    let below = |home: &str| {
        let mut places = line.match_indices(home);
        places.any(|(at, _)| {
            // In the middle of a path (below `target`, say) it is no home directory.
            let absolute =
                !line[..at].ends_with(|c: char| c.is_alphanumeric() || matches!(c, '.' | '_' | '-' | '}' | ')'));
            absolute && line[at + home.len()..].starts_with(|c: char| c.is_ascii_alphanumeric() || c == '.')
        })
    };
    below(concat!("/ho", "me/")) || below(concat!("/ro", "ot/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn broken(text: &str) -> Vec<usize> {
        rules(text, true).into_iter().map(|(line, _)| line).collect()
    }

    #[test]
    fn a_module_says_what_it_is() {
        assert!(broken("//! Keys.\nfn x() {}\n").is_empty());
        assert!(broken("#![no_std]\n\n//! Keys.\n").is_empty());
        assert_eq!(broken("use x;\n//! Late.\n"), [1]);
        assert_eq!(broken("#![no_std]\nuse x;\n"), [2]);
        assert_eq!(broken(""), [1]);
    }

    #[test]
    fn lines_of_tests_do_not_count() {
        let code = format!("//! Long.\n{}", "fn x() {}\n".repeat(LONGEST - 1));
        assert!(broken(&code).is_empty());
        assert!(broken(&format!("{code}#[cfg(test)]\n{}", "fn x() {}\n".repeat(500))).is_empty());
        assert_eq!(broken(&format!("{code}fn x() {{}}\n")), [LONGEST + 1]);
    }

    #[test]
    fn nothing_is_left_open_or_silently_skipped() {
        for open in [concat!("todo", "!()"), concat!("unimplemented", "!(\"x\")")] {
            assert_eq!(broken(&format!("//! X.\n    {open};\n")), [2]);
        }
        assert_eq!(broken(concat!("//! X.\n    #[", "ignore]\n")), [2]);
        assert!(broken(concat!("//! X.\n    #[", "ignore = \"needs two hosts\"]\n")).is_empty());
    }

    #[test]
    fn a_path_of_a_home_directory_is_a_finding() {
        for path in [concat!("/ho", "me/ada/key"), concat!("\"/ro", "ot/.cargo\""), concat!("x=/ro", "ot/a")] {
            assert_eq!(rules(path, false).len(), 1, "{path}");
        }
        for path in [
            "/homes/x",
            concat!("target/ro", "ot/x"),
            "root@guest:/etc/x",
            concat!("scp k root@GUEST:/ro", "ot/"),
            "chroot/x",
        ] {
            assert_eq!(rules(path, false).len(), 0, "{path}");
        }
    }

    #[test]
    fn directories_of_cargo_and_git_are_left_out() {
        let temporary = tempfile::tempdir().unwrap();
        let root = temporary.path();
        for file in ["src/a.rs", "target/debug/b.rs", ".git/c.rs", "xtask/target/d.rs"] {
            fs::create_dir_all(root.join(file).parent().unwrap()).unwrap();
            fs::write(root.join(file), "fn x() {}\n").unwrap();
        }
        let found: Vec<_> = check(root).unwrap().0.iter().map(ToString::to_string).collect();
        assert_eq!(found, ["src/a.rs:1: starts without `//!`: what lives here, and why?"]);
    }
}
