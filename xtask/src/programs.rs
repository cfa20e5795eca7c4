//! The test programs that run in guests with other kernels: builds them and finds their paths.

use std::path::Path;

use anyhow::{Context as _, bail};
use serde_json::Value;

use crate::progress::{self, Errors, say};
use crate::workspace::Workspace;

/// Names the programs for the tests that boot guests: `NAME=PATH`, separated by `:`.
pub(crate) const VARIABLE: &str = "FENCE_TEST_PROGRAMS";

const PROGRAMS: [&str; 3] = ["prog_run", "netns", "kernel_program"];

/// Builds the programs and returns the value of [`VARIABLE`].
///
/// # Errors
/// The programs do not compile, or a path has a colon.
pub(crate) fn of_guests(workspace: &Workspace, object: &Path) -> anyhow::Result<String> {
    say("building the test programs that run in guests");
    let mut listed = Vec::new();
    for program in PROGRAMS {
        let mut cargo = workspace.cargo(object);
        cargo.args(["test", "--no-run", "--message-format", "json-render-diagnostics"]);
        cargo.args(["--test", program]);
        let mut found = None;
        let status =
            progress::follow(cargo, Errors::Inherited, |line| found = executable(line, program).or(found.take()))?;
        if !status.success() {
            bail!("building the test program {program} failed: see above");
        }
        let path = found.with_context(|| format!("cargo printed no path of the test program {program}"))?;
        if path.contains(':') {
            bail!("{path}: the path has a colon, which separates paths: move the workspace, or set CARGO_TARGET_DIR");
        }
        listed.push(format!("{program}={path}"));
    }
    Ok(listed.join(":"))
}

/// The path of a test program, if this message of cargo is about it.
fn executable(message: &[u8], program: &str) -> Option<String> {
    let message: Value = serde_json::from_slice(message).ok()?;
    let is_it =
        message.pointer("/target/name")?.as_str()? == program && message.pointer("/target/kind/0")?.as_str()? == "test";
    if is_it { Some(message.get("executable")?.as_str()?.to_owned()) } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_message_about_the_program_names_it() {
        let message =
            br#"{"reason":"compiler-artifact","target":{"kind":["test"],"name":"netns"},"executable":"/t/netns-1"}"#;
        assert_eq!(executable(message, "netns").as_deref(), Some("/t/netns-1"));
        assert_eq!(executable(message, "prog_run"), None);
        let library = br#"{"reason":"compiler-artifact","target":{"kind":["lib"],"name":"netns"},"executable":null}"#;
        assert_eq!(executable(library, "netns"), None);
        assert_eq!(executable(b"running 3 tests", "netns"), None);
    }
}
