//! Checks that links between pages resolve, and that files named on a page exist.

use std::collections::HashMap;
use std::path::{Component, Path, PathBuf};

use super::markdown::Page;

/// The directories, from the root of the tree, that a path in a page's code may be relative to.
const STARTS: [&str; 2] = ["", "fence-daemon/src"];

/// Pages whose code spans with a slash are paths of the tree.
fn names_paths(page: &Path) -> bool {
    page == Path::new("ARCHITECTURE.md") || page.starts_with("docs/design")
}

/// The broken links and paths of `pages`, each with page and line. `exists` says whether the tree
/// has a path.
pub(crate) fn check(pages: &HashMap<PathBuf, Page>, exists: impl Fn(&Path) -> bool) -> Vec<(PathBuf, usize, String)> {
    let mut broken = Vec::new();
    for (name, page) in pages {
        for (line, link) in &page.links {
            if let Some(what) = broken_link(name, page, link, pages, &exists) {
                broken.push((name.clone(), *line, what));
            }
        }
        if !names_paths(name) {
            continue;
        }
        for (line, span) in page.spans.iter().filter(|(_, span)| is_path(span)) {
            if !STARTS.iter().any(|start| exists(&Path::new(start).join(span))) {
                broken.push((name.clone(), *line, format!("no such file: {span}")));
            }
        }
    }
    broken
}

fn broken_link(
    name: &Path,
    page: &Page,
    link: &str,
    pages: &HashMap<PathBuf, Page>,
    exists: impl Fn(&Path) -> bool,
) -> Option<String> {
    if link.contains("://") || link.starts_with("mailto:") {
        return None;
    }
    let (file, anchor) = link.split_once('#').map_or((link, None), |(file, anchor)| (file, Some(anchor)));
    let (target, path) = if file.is_empty() {
        (Some(page), name.to_owned())
    } else {
        let path = plain(&name.parent().unwrap_or(Path::new("")).join(file));
        (pages.get(&path), path)
    };
    if !exists(&path) {
        return Some(format!("a link leads nowhere: {link}"));
    }
    let anchor = anchor?;
    let found = target.is_some_and(|target| target.anchors.contains(anchor));
    (!found).then(|| format!("a link to a heading that is not there: {link}"))
}

/// `path` with `..` resolved.
fn plain(path: &Path) -> PathBuf {
    let mut plain = PathBuf::new();
    for part in path.components() {
        match part {
            Component::ParentDir => {
                plain.pop();
            }
            Component::CurDir => {}
            Component::Normal(_) | Component::RootDir | Component::Prefix(_) => plain.push(part),
        }
    }
    plain
}

/// Whether a code span is a path of this tree, not a host's path, a URI or a command.
fn is_path(span: &str) -> bool {
    let plain = span.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '/' | '.' | '-' | '_'));
    let relative = span.starts_with(|c: char| c.is_ascii_alphabetic()) || span.starts_with(".ci/");
    plain && relative && (span.contains('/') || span.ends_with(".rs") || span.ends_with(".md"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn broken(pages: &[(&str, &str)], files: &[&str]) -> Vec<String> {
        let parsed = pages.iter().map(|(name, text)| (PathBuf::from(name), Page::parse(text))).collect();
        let exists = |path: &Path| {
            let path = path.to_string_lossy();
            pages.iter().map(|(name, _)| name).chain(files).any(|file| *file == path)
        };
        let mut found: Vec<_> =
            check(&parsed, exists).into_iter().map(|(page, _, what)| format!("{}: {what}", page.display())).collect();
        found.sort_unstable();
        found
    }

    #[test]
    fn links_lead_to_files_and_headings() {
        let readme = "# Top\n[a](docs/a.md) [b](docs/a.md#one-two) [c](#top) [d](https://example.org/x#y)\n";
        let page = "# One two\n[up](../README.md#top) [beside](b.svg)\n";
        assert!(broken(&[("README.md", readme), ("docs/a.md", page)], &["docs/b.svg"]).is_empty());
    }

    #[test]
    fn broken_links_are_named() {
        let readme = "[a](docs/z.md) [b](docs/a.md#three) [c](#nowhere)\n";
        let found = broken(&[("README.md", readme), ("docs/a.md", "# One\n")], &[]);
        assert_eq!(
            found,
            [
                "README.md: a link leads nowhere: docs/z.md",
                "README.md: a link to a heading that is not there: #nowhere",
                "README.md: a link to a heading that is not there: docs/a.md#three",
            ]
        );
    }

    #[test]
    fn a_design_page_names_files_that_exist() {
        let text =
            "`intake/ring.rs` `fence-common/src` `lost.rs` `/run/x` `10.0.0.0/8` `qemu:///system` `a b/c` `config/`\n";
        let files = ["fence-daemon/src/intake/ring.rs", "fence-common/src", "fence-daemon/src/config/"];
        let design = broken(&[("docs/design/a.md", text)], &files);
        assert_eq!(design, ["docs/design/a.md: no such file: lost.rs"]);
        assert!(broken(&[("docs/guide/a.md", text)], &files).is_empty());
    }
}
