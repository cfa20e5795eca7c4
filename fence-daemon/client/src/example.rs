//! The documented report, for tests.

use fence_control::client;
use fence_control::report::Report;

/// As the documentation has it.
pub(crate) fn example() -> Report {
    client::parse(include_str!("../../../docs/reference/status.example.json")).unwrap()
}
