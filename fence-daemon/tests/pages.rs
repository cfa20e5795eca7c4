//! The docs and the program agree on commands and names.

use std::collections::BTreeSet;
use std::io;
use std::path::Path;

use clap::error::ErrorKind;
use fence_client::cli::Cli;
use fence_common::boundary::name;
use fence_common::ending::Ending;
use fence_common::verdict::Counters;
use fence_common::wire::Op;
use fence_daemon::observe::requests::{OPS, STEPS};

/// The endings that are answers: the text before the table of results has them.
const ANSWERS: [&str; 4] = ["success", "failure", "off", "permission denied"];

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

/// The command's arguments, if it is ours, without prefixes, comments, redirections and pipes.
fn arguments(code: &str) -> Option<Vec<&str>> {
    let code = code.strip_prefix("# ").unwrap_or(code);
    let code = code.strip_prefix("sudo ").unwrap_or(code);
    let code = code.strip_prefix("target/release/").unwrap_or(code);
    let words = code.strip_prefix("fence-daemon ")?.split_whitespace();
    Some(words.take_while(|word| !matches!(*word, "#" | "|" | "2>/dev/null")).collect())
}

#[test]
fn every_command_in_the_pages_exists() {
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

/// The names in the first column of the first table of a section of inspect.md.
fn table(page: &str, section: &str) -> BTreeSet<String> {
    // A section that is missing has no names, which the comparison shows.
    let (_, after) = page.split_once(&format!("\n{section}\n")).unwrap_or_default();
    let rows = after.lines().skip_while(|line| !line.starts_with('|')).take_while(|line| line.starts_with('|'));
    let cells = rows.skip(2).filter_map(|row| row.split('|').nth(1));
    cells.flat_map(code).map(str::to_owned).collect()
}

fn set<'n>(names: impl IntoIterator<Item = &'n str>) -> BTreeSet<String> {
    names.into_iter().map(str::to_owned).collect()
}

/// The reference and the schema have each name that the report has, and no other.
#[test]
fn the_reference_names_what_the_report_has() {
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/reference");
    let page = std::fs::read_to_string(docs.join("inspect.md")).unwrap();
    let schema: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(docs.join("status.schema.json")).unwrap()).unwrap();
    let listed = |pointer: &str| -> BTreeSet<String> {
        let names = schema.pointer(&format!("/$defs/{pointer}/enum")).and_then(|names| names.as_array());
        names
            .unwrap_or_else(|| panic!("no list {pointer}"))
            .iter()
            .filter_map(|name| name.as_str())
            .map(str::to_owned)
            .collect()
    };
    let counters = set(Counters::NAMES);
    assert_eq!(table(&page, "### Counters"), counters);
    assert_eq!(listed("counters/propertyNames"), counters);

    let endings = set(Ending::ALL.iter().map(|ending| ending.name()));
    let while_served = set(["calling back", "in progress"]);
    assert_eq!(table(&page, "### Results of requests"), &(&endings - &set(ANSWERS)) | &while_served);
    assert_eq!(listed("request/properties/result"), endings);

    let ops = set(OPS.map(Op::name));
    assert_eq!(listed("request/properties/op"), ops);
    assert_eq!(listed("latency/properties/op"), ops);
    assert_eq!(listed("latency/properties/step"), set(STEPS));

    assert_eq!(table(&page, "## By bpftool alone"), set(name::MAPS));
}
