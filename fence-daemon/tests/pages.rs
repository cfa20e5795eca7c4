//! The program accepts each of our commands that a page of docs names.

use std::io;
use std::path::Path;

use clap::error::ErrorKind;
use fence_client::cli::Cli;

/// The pages, and their names.
fn pages() -> io::Result<Vec<(String, String)>> {
    let top = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut docs = Vec::new();
    for room in ["", "guide", "reference", "design", "measured"] {
        for entry in std::fs::read_dir(top.join("docs").join(room))? {
            docs.push(entry?.path());
        }
    }
    let pages = docs.into_iter().filter(|path| path.extension().is_some_and(|end| end == "md"));
    let text = |path: std::path::PathBuf| Ok((path.display().to_string(), std::fs::read_to_string(&path)?));
    pages.chain(["README.md", "SECURITY.md", "CHANGELOG.md"].map(|page| top.join(page))).map(text).collect()
}

/// The code in a line of Markdown: the whole of an indented or prompted line, else the text between
/// backticks.
fn code(line: &str) -> Vec<&str> {
    let typed = line
        .strip_prefix("    ")
        .or_else(|| line.strip_prefix("root@").and_then(|rest| Some(rest.split_once("# ")?.1)));
    typed.map_or_else(|| line.split('`').skip(1).step_by(2).collect(), |typed| vec![typed])
}

/// The command's arguments, if it is ours, without prefixes, comments and pipes.
fn arguments(code: &str) -> Option<Vec<&str>> {
    let code = code.strip_prefix("# ").unwrap_or(code);
    let code = code.strip_prefix("sudo ").unwrap_or(code);
    let code = code.strip_prefix("target/release/").unwrap_or(code);
    let words = code.strip_prefix("fence-daemon ")?.split_whitespace();
    Some(words.take_while(|word| !matches!(*word, "#" | "|")).collect())
}

#[test]
fn every_command_in_the_pages_is_one_that_there_is() {
    let mut found = 0;
    for (page, text) in pages().unwrap() {
        for line in text.lines() {
            for arguments in code(line).into_iter().filter_map(arguments) {
                found += 1;
                if let Err(error) = Cli::read(std::iter::once("fence-daemon").chain(arguments)) {
                    let prints = matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion);
                    assert!(prints, "{page}: {line}: {error}");
                }
            }
        }
    }
    assert!(found > 30, "only {found} commands: the test misreads the pages");
}

/// The reference explains each counter that the program and the socket have.
#[test]
fn every_counter_is_explained() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/reference/inspect.md");
    let page = std::fs::read_to_string(path).unwrap();
    let (_, after) = page.split_once("### Counters\n").unwrap();
    let (table, _) = after.split_once("\n## ").unwrap();
    let explained: Vec<_> = table.lines().filter_map(|line| line.split('|').nth(1)).collect();
    for name in fence_common::verdict::Counters::NAMES {
        let cell = format!("`{name}`");
        assert_eq!(explained.iter().filter(|cells| cells.contains(&cell)).count(), 1, "{name}");
    }
}
