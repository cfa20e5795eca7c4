//! `fence-daemon status`: asks the daemon that runs how it is, and shows it.

pub mod page;

use std::path::{Path, PathBuf};

use fence_common::exit::{EXIT_DEGRADED, EXIT_NOBODY, EXIT_UNKNOWN};
use fence_config as config;
use fence_control::client::{self, ClientError};
use fence_control::report::Health;

use crate::screen;

/// Where the daemon with this configuration has its control socket. One that cannot be read (by
/// somebody who is not root, say) is no reason not to look in the usual place.
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
            // As the daemon said it, whatever its version.
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

/// What a daemon's health is for scripts.
fn exit_code(health: Health) -> u8 {
    match health {
        Health::Serving => 0,
        Health::Starting | Health::Degraded | Health::Stopping => EXIT_DEGRADED,
    }
}
