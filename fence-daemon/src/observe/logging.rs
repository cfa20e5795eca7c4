//! Chooses the log's destination and level: standard error in the foreground, the journal or syslog
//! in the background.
//!
//! Syslog is written through the C library. It reconnects after the syslog daemon's restart, and
//! needs no crate for time or host names. (The crate `syslog` panics if it cannot find out the
//! local time.)
//!
//! A failure to write a message never stops the daemon or causes another message. No thread waits
//! for the destination: see [`relay`](super::relay).

use std::env;
use std::ffi::{CStr, CString};
use std::io::{self, IsTerminal, Write};
use std::path::Path;

use nix::libc;
use tracing::Level;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Registry, fmt};

use super::journal::{self, Journal};
use super::relay::{Relay, Sink, Warning};

/// What log messages are marked with.
pub(super) const IDENTITY: &str = "fence-daemon";
const IDENTITY_C: &CStr = c"fence-daemon";
/// The environment variable that overrides the configured level: `info`, or
/// `warn,fence_daemon=trace`.
const VARIABLE: &str = "RUST_LOG";

/// Where to log to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Destination {
    /// Standard error. If it leads to the journal, the journal itself, so that fields stay fields.
    Foreground,
    /// The journal, or syslog where there is none.
    Background,
}

/// Where messages go in the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogTarget {
    /// Standard error, with or without colours.
    Stderr,
    /// systemd's journal.
    Journal,
    /// Syslog, facility `daemon`.
    Syslog,
}

/// Why logging could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum LoggingError {
    /// The machine has nothing left.
    #[error("no thread to write the log on: {0}")]
    Thread(#[from] io::Error),
    /// It was set up already.
    #[error("logging is set up already")]
    Twice,
}

/// Sets up logging for the rest of the process's life. In the background, call it after
/// [`crate::process::daemonise`].
///
/// `debug` 0 logs what an administrator wants to know, 1 and up what was ignored and why, 5 and up
/// everything. The environment variable `RUST_LOG` overrides it.
///
/// # Errors
/// [`LoggingError::Twice`] if called again.
pub fn init(debug: u32, destination: Destination) -> Result<LogTarget, LoggingError> {
    let (filter, wrong) = filter(debug, env::var(VARIABLE).ok().as_deref());
    let (layer, sink) = layer(debug, destination)?;
    tracing_subscriber::registry().with(layer.with_filter(filter)).try_init().map_err(|_| LoggingError::Twice)?;
    if let Some(error) = wrong {
        tracing::warn!("RUST_LOG is not used: {error}");
    }
    Ok(sink)
}

/// Whether standard error shows escape sequences as colours, and the user wants them.
#[must_use]
pub fn stderr_colours() -> bool {
    let wanted = |name: &str| env::var_os(name).is_none_or(|value| value.is_empty());
    wanted("NO_COLOR") && env::var_os("TERM").is_none_or(|term| term != "dumb") && io::stderr().is_terminal()
}

type AnyLayer = Box<dyn Layer<Registry> + Send + Sync>;

fn layer(debug: u32, destination: Destination) -> Result<(AnyLayer, LogTarget), LoggingError> {
    let journal = match destination {
        Destination::Foreground => stderr_is_journal(),
        Destination::Background => Path::new(journal::SOCKET).exists(),
    };
    if journal && let Ok(sink) = journal::sink() {
        let layer = Journal::new(relay(sink, journal::warning)?);
        return Ok((Box::new(layer), LogTarget::Journal));
    }
    if destination == Destination::Background {
        let relay = relay(open_syslog(), warning)?;
        // Time and level are syslog's to add.
        let layer = plain(debug).without_time().with_level(false).with_writer(relay);
        return Ok((Box::new(layer), LogTarget::Syslog));
    }
    let relay = relay(Box::new(|_, line| io::stderr().write_all(line).is_ok()), warning)?;
    Ok((Box::new(plain(debug).with_ansi(stderr_colours()).with_writer(relay)), LogTarget::Stderr))
}

fn warning(text: &str) -> Vec<u8> {
    format!("{text}\n").into_bytes()
}

fn relay(sink: Sink, warning: Warning) -> io::Result<Relay> {
    let relay = Relay::start(sink, warning)?;
    relay.keep();
    Ok(relay)
}

fn open_syslog() -> Sink {
    // SAFETY: needed because the standard library has no syslog. Sound because the name is static,
    // as the C library keeps the pointer.
    unsafe { libc::openlog(IDENTITY_C.as_ptr(), libc::LOG_PID, libc::LOG_DAEMON) };
    Box::new(|level, line| {
        let priority = match level {
            Level::ERROR => libc::LOG_ERR,
            Level::WARN => libc::LOG_WARNING,
            Level::INFO => libc::LOG_INFO,
            Level::DEBUG | Level::TRACE => libc::LOG_DEBUG,
        };
        // A NUL would end the line early. Names from outside are escaped already.
        let line: Vec<u8> = line.iter().copied().filter(|byte| *byte != 0 && *byte != b'\n').collect();
        let Ok(line) = CString::new(line) else { return false };
        // SAFETY: as above. The format takes one string, which is given, ends with a NUL, and lives
        // until the call returns.
        unsafe { libc::syslog(priority, c"%s".as_ptr(), line.as_ptr()) };
        true
    })
}

fn plain<S: tracing::Subscriber + for<'s> LookupSpan<'s>>(debug: u32) -> fmt::Layer<S> {
    // A failed write must not cause a message about it: `eprintln!` panics on a closed pipe.
    fmt::layer().with_ansi(false).with_target(debug > 0).log_internal_errors(false)
}

/// The filter, and what is wrong with `RUST_LOG` if it could not be used.
fn filter(debug: u32, rust_log: Option<&str>) -> (Targets, Option<String>) {
    // Other crates log only at the highest `debug`, and never at their finest level: keys pass
    // through them.
    let info = Targets::new().with_default(Level::INFO);
    let standard = match debug {
        0 => info,
        1..=4 => info.with_target("fence_daemon", Level::DEBUG),
        5.. => Targets::new().with_default(Level::DEBUG).with_target("fence_daemon", Level::TRACE),
    };
    match rust_log.filter(|text| !text.trim().is_empty()).map(str::parse::<Targets>) {
        Some(Ok(filter)) => (filter, None),
        Some(Err(error)) => (standard, Some(error.to_string())),
        None => (standard, None),
    }
}

/// Whether systemd connected standard error to the journal: `JOURNAL_STREAM` names the device and
/// inode of that connection.
fn stderr_is_journal() -> bool {
    let Ok(about) = rustix::fs::fstat(io::stderr()) else { return false };
    env::var("JOURNAL_STREAM").is_ok_and(|stream| stream == format!("{}:{}", about.st_dev, about.st_ino))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_follow_debug_and_rust_log() {
        for (debug, rust_log, expected) in [
            (0, None, "info"),
            (0, Some(" "), "info"),
            (1, None, "fence_daemon=debug,info"),
            (4, None, "fence_daemon=debug,info"),
            (99, None, "fence_daemon=trace,debug"),
            (99, Some("warn"), "warn"),
        ] {
            let (filter, wrong) = filter(debug, rust_log);
            assert_eq!((filter.to_string().as_str(), wrong), (expected, None), "{debug} {rust_log:?}");
        }
        let (fallen_back, wrong) = filter(0, Some("fence_daemon=loud"));
        assert_eq!(fallen_back.to_string(), "info");
        assert!(wrong.is_some());
    }
}
