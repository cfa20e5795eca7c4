//! `fence-daemon status`: asks the daemon that runs how it is, and shows it.

pub mod bars;
pub mod page;
pub mod table;
pub mod words;

use std::env;
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use self::table::Screen;
use crate::cli::{EXIT_DEGRADED, EXIT_NOBODY, EXIT_UNKNOWN};
use crate::config;
use crate::control;
use crate::control::client::{self, ClientError};
use crate::control::view::Health;

/// Where the daemon with this configuration has its control socket. One that cannot be read (by somebody who is not root, say) is
/// no reason not to look in the usual place.
#[must_use]
pub fn socket(config: &Path) -> PathBuf {
    let configured = config::load(config).ok().and_then(|(config, _)| config.hypervisor.state);
    control::path(configured.as_deref().unwrap_or(Path::new(config::DEFAULT_STATE_DIRECTORY)))
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
        Ok((page::render(&report, screen()), exit_code(report.health)))
    });
    match shown {
        Ok((text, code)) => match io::stdout().lock().write_all(text.as_bytes()) {
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
                complain(&format_args!("cannot write the status: {error}"));
                EXIT_UNKNOWN
            }
            Ok(()) | Err(_) => code,
        },
        Err(error) => {
            complain(&error);
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

/// Tells what keeps the status from being shown.
pub(crate) fn complain(what: &dyn std::fmt::Display) {
    // Nothing is left to be done if even that cannot be written.
    let _ = writeln!(io::stderr(), "fence-daemon: {what}");
}

/// What standard output can show.
pub(crate) fn screen() -> Screen {
    let output = io::stdout();
    if !output.is_terminal() {
        return Screen { unicode: speaks_unicode(), ..Screen::PLAIN };
    }
    let width = rustix::termios::tcgetwinsize(output.as_fd()).ok().map(|size| usize::from(size.ws_col));
    Screen { colours: wants_colours(), width: width.filter(|width| *width > 0), unicode: speaks_unicode() }
}

/// Whether whoever looks at a terminal wants colours on it.
pub(crate) fn wants_colours() -> bool {
    let unset = env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    unset && env::var_os("TERM").is_none_or(|term| term != "dumb")
}

/// Whether the locale is one of UTF-8: the first of these variables that is set decides.
pub(crate) fn speaks_unicode() -> bool {
    let named =
        ["LC_ALL", "LC_CTYPE", "LANG"].iter().find_map(|name| env::var(name).ok().filter(|value| !value.is_empty()));
    named.is_some_and(|locale| {
        let locale = locale.to_ascii_lowercase();
        locale.ends_with("utf-8") || locale.ends_with("utf8")
    })
}
