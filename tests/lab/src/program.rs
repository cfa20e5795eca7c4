//! What the programs of the lab and the bench have in common: how they speak, and how they end.

use std::io::Write as _;
use std::process::ExitCode;

use anyhow::Result;

/// Prints a line on standard output. A reader that has gone is no reason to stop.
pub fn say(line: &str) {
    let _ = writeln!(std::io::stdout(), "{line}");
}

/// Prints a line about progress on standard error. A reader that has gone is no reason to stop.
pub fn progress(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// The exit status of the program `name`: failure if `result` is an error, which is printed, or
/// `false`.
#[must_use]
pub fn exit(name: &str, result: Result<bool>) -> ExitCode {
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            progress(&format!("{name}: {error:#}"));
            ExitCode::FAILURE
        }
    }
}
