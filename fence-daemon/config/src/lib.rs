//! The configuration file `fence_virt.conf`, read as fence_virtd reads it, but strictly.
//!
//! Three layers, each a type:
//! - [`raw`] is the file as written, with the position of every word.
//! - [`Config`] is what the daemon works with, every value parsed.
//! - Between them, mistakes become a [`ConfigError`], with which the daemon does not start, and
//!   doubts become [`Warnings`].
//!
//! Mistakes and doubts show file, line, caret and remedy. One run reports every mistake of a file.
//!
//! Whatever could leave the daemon more open than the file's author meant is an error, never a
//! warning. Examples are an unknown digest, groups that permit nothing or stand where they restrict
//! nothing, and an invalid address.

#[cfg(any(test, feature = "cases"))]
pub mod cases;
mod change;
mod choices;
mod contents;
mod cpg;
mod demands;
pub mod document;
pub mod durable;
mod error;
mod groups;
pub mod key;
mod listener;
mod listeners;
mod metrics;
mod multicast;
mod permission;
mod plugin;
mod position;
mod rate_limit;
pub mod raw;
mod reading;
pub mod render;
mod resolved;
mod serial;
mod settings;
mod syntax;
mod tcp;
mod vsock;
mod warning;

#[cfg(test)]
mod tests;

use std::path::Path;

use fence_common::keys::{GroupKey, KeyPair};

pub use choices::{STATE_DIRECTORY as DEFAULT_STATE_DIRECTORY, in_seconds};
pub use cpg::{Backend, CpgMistake};
pub use error::{ConfigError, Mistake, Mistakes, UnusableKey};
pub use groups::{Group, Groups};
pub use key::{KeyFileError, Unusable};
pub use listeners::{KeyFiles, Listener, ListenerKind, ListenerMistake};
pub use metrics::{Metrics, MetricsMistake, PORT as METRICS_PORT};
pub use multicast::{Attach, KEY_FILE as DEFAULT_KEY_FILE, Multicast};
pub use permission::Unmatched;
pub use plugin::Plugin;
pub use position::{Position, Source};
pub use rate_limit::RateLimit;
pub use reading::read;
pub use resolved::{Config, URI as DEFAULT_URI};
pub use serial::{Serial, SerialMistake, SerialMode};
pub use settings::{Alone, Kill, Options, PAUSE_MAX, PAUSE_MAX_ANSWERED, Priority, RebootMethod, RebootReply, Stress};
pub use tcp::{AUTH as CONNECTED_AUTH, Tcp, TcpAddress, TcpMistake};
pub use vsock::Vsock;
pub use warning::{Doubt, Warning, Warnings};

/// The default path of the configuration file, as in fence_virtd.
pub const DEFAULT_PATH: &str = "/etc/fence_virt.conf";

/// The default path of the file with the daemon's process ID, as in fence_virtd.
pub const DEFAULT_PID_FILE: &str = "/var/run/fence_virtd.pid";

/// The largest file that is read, in bytes. Forty thousand guests in groups need half of it.
pub const MAX_SIZE: usize = 4 << 20;

/// Reads and resolves a configuration file.
///
/// # Errors
/// Whatever keeps the daemon from starting. [`ConfigError::render`] shows it to the administrator.
pub fn load(path: &Path) -> Result<(Config, Warnings), ConfigError> {
    let (bytes, warnings) = read(path)?;
    parse(&Source::new(path, &bytes), warnings)
}

/// Reads and resolves the file again, for a daemon that runs with `running`. That is what the file
/// said before, without the command line.
///
/// # Errors
/// As [`load`], and if the daemon cannot take a change without a restart.
pub fn load_again(path: &Path, running: &Config) -> Result<(Config, Warnings), ConfigError> {
    let (bytes, warnings) = read(path)?;
    let source = Source::new(path, &bytes);
    let (config, warnings) = parse(&source, warnings)?;
    let warnings = change::check(running, &config, &source, warnings)?;
    Ok((config, warnings))
}

/// The error of a listener that a daemon cannot begin to serve, at the place of this key in the
/// file, or of the listener's section.
#[must_use]
pub fn not_served(path: &Path, listener: &Listener, key: &'static str, why: String) -> ConfigError {
    match read(path) {
        Ok((bytes, _)) => change::not_served(&Source::new(path, &bytes), listener, key, why),
        Err(error) => error,
    }
}

/// The keys that a configuration names.
#[derive(Debug, Default)]
pub struct FoundKeys {
    /// Each listener's key and its second key, in the configuration's order; `None` if its requests
    /// are not signed.
    pub listeners: Vec<Option<KeyPair>>,
    /// The groups' own keys.
    pub groups: Vec<GroupKey>,
}

impl From<key::FoundAll> for FoundKeys {
    fn from(all: key::FoundAll) -> Self {
        let listeners = all.listeners.into_iter().map(|pair| pair.map(KeyPair::from)).collect();
        Self { listeners, groups: all.groups.into_iter().map(|found| found.key).collect() }
    }
}

/// Reads and resolves a configuration file, and reads its keys unless it needs none.
///
/// # Errors
/// As [`load`], and if a key cannot be used: the error then points at the `key_file` setting.
pub fn load_with_keys(path: &Path) -> Result<(Config, Warnings, FoundKeys), ConfigError> {
    let (bytes, warnings) = read(path)?;
    let source = Source::new(path, &bytes);
    let (config, mut warnings) = parse(&source, warnings)?;
    match key::load_all(&config.listeners, &config.groups, &mut warnings) {
        Ok(found) => Ok((config, warnings, found.into())),
        Err(error) => Err(unusable_key(&source, error, warnings)),
    }
}

/// Turns an error of [`key::load_all`] into one that points at the `key_file` setting. `warnings`
/// may explain it.
#[must_use]
pub fn unusable_key(source: &Source<'_>, error: Unusable, warnings: Warnings) -> ConfigError {
    let Unusable { setting, error } = error;
    let found = raw::parse(source.bytes()).map(|items| match setting {
        key::OF_A_GROUP => groups::key_file_span(&items, error.path()),
        _ => listeners::key_file_span(&items, setting, error.path()),
    });
    let (span, is_written) = found.unwrap_or((0..0, false));
    ConfigError::Key(Box::new(UnusableKey { place: source.place(&span), is_written, error, warnings }))
}

/// Resolves a configuration from memory, and adds to `warnings`.
///
/// # Errors
/// As [`load`], except those of reading.
pub fn parse(source: &Source<'_>, warnings: Warnings) -> Result<(Config, Warnings), ConfigError> {
    match raw::parse(source.bytes()) {
        Ok(items) => resolved::resolve(source, &items, warnings),
        Err(error) => {
            let list = vec![(source.place(&error.span), Mistake::Syntax(error.kind))];
            Err(ConfigError::Mistakes(Mistakes { list, warnings }))
        }
    }
}
