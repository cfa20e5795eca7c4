//! The table in docs/measured/kernels.md: the work of each kernel's verifier.

use std::fmt;
use std::fs::File;
use std::path::Path;

use anyhow::{Context, Result};
use fence_lab::debian::Series;

use crate::verifier::LINE;

/// Has the table written to the document, when it is set.
const WRITE: &str = "FENCE_WRITE_DOCS";
const DOCUMENT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/measured/kernels.md");

/// A program on a kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Row {
    kernel: String,
    program: String,
    /// Instructions that the verifier processed, bytes translated, bytes of machine code.
    numbers: [u32; 3],
}

impl Row {
    /// Parses a line of the test in [`crate::verifier`].
    pub(crate) fn parse(kernel: &str, line: &str) -> Option<Self> {
        let mut words = line.split_once(LINE)?.1.split_whitespace();
        let program = words.next()?.to_owned();
        let mut number = || words.next()?.parse().ok();
        Some(Self { kernel: kernel.to_owned(), program, numbers: [number()?, number()?, number()?] })
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [verified, translated, machine] = self.numbers;
        write!(f, "| {} | `{}` | {verified} | {translated} | {machine} |", self.kernel, self.program)
    }
}

/// Replaces a series' rows in the document.
pub(crate) fn write(series: Series, rows: &[Row]) -> Result<()> {
    if std::env::var_os(WRITE).is_none() {
        return Ok(());
    }
    // Kernels boot side by side.
    let lock = File::open(env!("CARGO_MANIFEST_DIR"))?;
    lock.lock().context("locking the tests' folder")?;
    let text = std::fs::read_to_string(DOCUMENT).with_context(|| DOCUMENT.to_owned())?;
    std::fs::write(Path::new(DOCUMENT), replaced(&text, series, rows)).context(DOCUMENT)
}

fn replaced(text: &str, series: Series, rows: &[Row]) -> String {
    let begins = format!("| {}.", series.name());
    let ours = |line: &&str| line.starts_with(&begins);
    let new = rows.iter().map(|row| format!("{row}\n"));
    let before = text.lines().take_while(|line| !ours(line));
    let after = text.lines().skip_while(|line| !ours(line)).filter(|line| !ours(line));
    let lines = |lines: Vec<&str>| lines.into_iter().map(|line| format!("{line}\n")).collect::<String>();
    lines(before.collect()) + &new.collect::<String>() + &lines(after.collect())
}

#[test]
fn a_series_rows_are_replaced_where_they_stand() {
    let row =
        |kernel: &str, number| Row { kernel: kernel.to_owned(), program: "p".to_owned(), numbers: [number, 2, 3] };
    let text = "# a\n| 6.1.0-1 | `p` | 7 | 2 | 3 |\n| 6.12.1 | `p` | 8 | 2 | 3 |\nend\n";
    let new = replaced(text, Series::Linux6_1, &[row("6.1.0-2", 9)]);
    assert_eq!(new, "# a\n| 6.1.0-2 | `p` | 9 | 2 | 3 |\n| 6.12.1 | `p` | 8 | 2 | 3 |\nend\n");
    assert_eq!(Row::parse("6.1.0-2", "test a ... @verifier p 9 2 3"), Some(row("6.1.0-2", 9)));
    assert_eq!(Row::parse("6.1.0-2", "test verifier ... ok"), None);
}
