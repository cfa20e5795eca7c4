//! `fence-daemon status`: asks the running daemon for its report, and shows it.

pub mod hosts;
pub mod page;
mod sources;

use std::path::{Path, PathBuf};

use fence_common::exit::{EXIT_DEGRADED, EXIT_NOBODY, EXIT_UNKNOWN};
use fence_config as config;
use fence_control::client::{self, ClientError};
use fence_control::report::Health;

use crate::screen;

/// The control socket of the daemon with this configuration. If the configuration is unreadable (to
/// another user than root, say), the default place.
#[must_use]
pub fn socket(config: &Path) -> PathBuf {
    let configured = config::load(config).ok().and_then(|(config, _)| config.hypervisor.state);
    fence_control::path(configured.as_deref().unwrap_or(Path::new(config::DEFAULT_STATE_DIRECTORY)))
}

/// Shows the status, and returns the exit code.
#[must_use]
pub fn run(config: &Path, json: bool) -> u8 {
    let answer = client::ask(&socket(config));
    let shown = answer.and_then(|answer| {
        let report = client::parse(&answer);
        if json && !matches!(report, Err(ClientError::Refused(_) | ClientError::Strange(_))) {
            // Printed as sent, whatever its version.
            return Ok((answer, report.map_or(EXIT_UNKNOWN, |report| exit_code(report.health))));
        }
        let report = report?;
        Ok((page::render(&report, screen::screen()), exit_code(report.health)))
    });
    match shown {
        Ok((text, code)) => {
            if screen::print(&text) {
                code
            } else {
                EXIT_UNKNOWN
            }
        }
        Err(error) => {
            screen::complain(format_args!("fence-daemon: {error}"));
            if error.is_nobody() { EXIT_NOBODY } else { EXIT_UNKNOWN }
        }
    }
}

/// The exit code of a daemon's health.
fn exit_code(health: Health) -> u8 {
    match health {
        Health::Serving => 0,
        Health::Starting | Health::Degraded | Health::Stopping => EXIT_DEGRADED,
    }
}
