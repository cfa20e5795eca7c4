//! Runs the commands of pages without places in their prompts, under the real unit: the reference
//! pages and the rotation of keys.

use anyhow::{Context, Result};
use fence_lab::tools;

mod doctor;
mod inspect;
mod rotation;

/// A page of docs.
fn page(path: &str) -> Result<String> {
    let path = tools::workspace().join("docs").join(path);
    std::fs::read_to_string(&path).with_context(|| path.display().to_string())
}

/// The commands of a reference page, each after a `# ` in an indented block.
fn commands(page: &str) -> Vec<&str> {
    page.lines().filter_map(|line| line.strip_prefix("    # ")).collect()
}
