//! The tables of `docs/reference/compatibility.md`: where fence-daemon differs from fence_virtd on
//! purpose. People read them, and the conformance suite accepts only these differences.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

/// Where the tables are, below the workspace's root.
pub const DOCUMENT: &str = "docs/reference/compatibility.md";
/// What a row says that the conformance suite itself has to see.
const SUITE: &str = "conformance";
/// What the columns are called.
const COLUMNS: [&str; 6] = ["id", "situation", "stock fence_virtd 4.12.1", "fence-daemon", "why", "test"];

/// A row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KnownDifference {
    /// What cases call it.
    pub id: String,
    /// Whether the conformance suite must see it.
    pub seen_by_suite: bool,
    /// Other tests that show it.
    pub tests: Vec<NamedTest>,
}

/// A test of this tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedTest {
    /// Its file, below the workspace's root.
    pub file: String,
    /// Its function.
    pub function: String,
}

impl NamedTest {
    /// Whether there is such a test.
    pub fn find(&self, root: &Path) -> Result<()> {
        let path = root.join(&self.file);
        let text = std::fs::read_to_string(&path).with_context(|| format!("{DOCUMENT} names {}", self.file))?;
        let head = format!("fn {}(", self.function);
        let at = text.find(&head).with_context(|| format!("{DOCUMENT}: {} has no `{head})`", self.file))?;
        let attributes = text[..at].rsplit("\n\n").next().unwrap_or_default();
        ensure!(attributes.contains("#[test]") || attributes.contains("::test"), "{}: `{head})` is no test", self.file);
        Ok(())
    }
}

/// Reads the workspace's own tables.
pub fn read(root: &Path) -> Result<Vec<KnownDifference>> {
    let path = root.join(DOCUMENT);
    let text = std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    parse(&text).with_context(|| DOCUMENT.to_owned())
}

/// Reads a document's tables: those that begin with the columns `id` to `test`.
pub fn parse(text: &str) -> Result<Vec<KnownDifference>> {
    let mut rows = BTreeMap::new();
    let mut differences = Vec::new();
    let mut tables = 0;
    let mut lines = text.lines().enumerate();
    while lines.any(|(_, line)| cells(line).as_deref() == Some(&COLUMNS)) {
        tables += 1;
        // The line of dashes comes first.
        for (index, line) in lines.by_ref().skip(1) {
            let Some(cells) = cells(line) else { break };
            let difference = row(&cells).with_context(|| format!("line {}", index + 1))?;
            if let Some(before) = rows.insert(difference.id.clone(), index + 1) {
                bail!("line {}: `{}` stands in line {before} already", index + 1, difference.id);
            }
            differences.push(difference);
        }
    }
    ensure!(tables > 0, "no table with the columns {}", COLUMNS.join(", "));
    ensure!(!differences.is_empty(), "the tables have no rows");
    Ok(differences)
}

/// The cells of a table's line.
fn cells(line: &str) -> Option<Vec<&str>> {
    let inner = line.trim().strip_prefix('|')?.strip_suffix('|')?;
    Some(inner.split('|').map(str::trim).collect())
}

fn row(cells: &[&str]) -> Result<KnownDifference> {
    let [id, situation, stock, ours, why, tests] = cells else {
        bail!("{} cells instead of {}", cells.len(), COLUMNS.len());
    };
    let id = code(id)?;
    ensure!(id.chars().all(|c| c.is_ascii_lowercase() || c == '-'), "`{id}` is no id: small letters and hyphens");
    for (cell, column) in [(situation, COLUMNS[1]), (stock, COLUMNS[2]), (ours, COLUMNS[3]), (why, COLUMNS[4])] {
        ensure!(!cell.is_empty(), "`{id}` says nothing under `{column}`");
    }
    let mut difference = KnownDifference { id: id.to_owned(), seen_by_suite: false, tests: Vec::new() };
    for test in tests.split(", ") {
        let test = code(test)?;
        match test.split_once(": ") {
            Some((file, function)) => {
                difference.tests.push(NamedTest { file: file.to_owned(), function: function.to_owned() });
            }
            None if test == SUITE => difference.seen_by_suite = true,
            None => bail!("`{test}` is neither `{SUITE}` nor `FILE: FUNCTION`"),
        }
    }
    Ok(difference)
}

/// The text between two backticks.
fn code(cell: &str) -> Result<&str> {
    let inner = cell.strip_prefix('`').and_then(|rest| rest.strip_suffix('`'));
    inner.filter(|text| !text.is_empty()).with_context(|| format!("`{cell}` is to stand in backticks"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str = "# Text\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n\
                        | id | situation | stock fence_virtd 4.12.1 | fence-daemon | why | test |\n|---|---|---|---|---|---|\n";

    #[test]
    fn a_row_names_its_tests() {
        let text = format!("{HEAD}| `x-y` | s | o | u | w | `conformance`, `a/b.rs: c` |\n\nmore | text\n");
        let named = NamedTest { file: "a/b.rs".to_owned(), function: "c".to_owned() };
        assert_eq!(
            parse(&text).unwrap(),
            [KnownDifference { id: "x-y".to_owned(), seen_by_suite: true, tests: vec![named] }]
        );
    }

    #[test]
    fn a_page_without_a_table_is_an_error() {
        for (rows, says) in [
            ("", "no rows"),
            (
                "| `x` | s | o | u | w | `conformance` |\n\n## Text\n\n\
                 | id | situation | stock fence_virtd 4.12.1 | fence-daemon | why | test |\n|---|\n\
                 | `x` | s | o | u | w | `conformance` |",
                "line 15: `x` stands in line 9 already",
            ),
            ("| `x` | s | o | u | `conformance` |", "5 cells"),
            ("| x | s | o | u | w | `conformance` |", "backticks"),
            ("| `x` | s | o | u | | `conformance` |", "under `why`"),
            ("| `x` | s | o | u | w | `suite` |", "neither"),
            ("| `x` | s | o | u | w | `conformance` |\n| `x` | s | o | u | w | `conformance` |", "already"),
        ] {
            let error = format!("{:#}", parse(&format!("{HEAD}{rows}\n")).unwrap_err());
            assert!(error.contains(says), "{error}");
        }
        assert!(parse("# Text\n").is_err());
    }

    /// A row whose test is gone promises what no test checks.
    #[test]
    fn every_test_that_the_document_names_exists() {
        let root = crate::tools::workspace();
        for difference in read(&root).unwrap() {
            assert!(difference.seen_by_suite || !difference.tests.is_empty());
            for test in &difference.tests {
                test.find(&root).unwrap();
            }
        }
        let missing = NamedTest { file: "tests/lab/src/differences.rs".to_owned(), function: "nobody".to_owned() };
        assert!(missing.find(&root).is_err());
        let no_test = NamedTest { function: "code".to_owned(), ..missing };
        assert!(no_test.find(&root).is_err());
    }
}
