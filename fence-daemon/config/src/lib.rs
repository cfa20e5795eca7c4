//! The configuration file of fence_virtd, read the way stock servers read it but with nothing left
//! to luck.
//!
//! Three layers, each a type: [`raw`] is the file as written, with the place of every word;
//! [`Config`] is what the daemon works with, every value parsed; in between, what is wrong becomes
//! a [`ConfigError`] (the daemon doesn't start) and what is merely doubtful a [`Warnings`], both
//! shown with file, line, caret and what to write instead. Every mistake of a file is reported at
//! once, not one per attempt.
//!
//! What could leave the daemon wider open than the file's author meant is an error, never a
//! warning: an unknown digest, groups that permit nothing or stand where they restrict nothing, an
//! address that is none.

#[cfg(any(test, feature = "cases"))]
pub mod cases;
mod choices;
pub mod document;
pub mod durable;
mod error;
mod groups;
pub mod key;
mod permission;
mod position;
mod rate_limit;
pub mod raw;
mod reading;
pub mod render;
mod resolved;
mod settings;
mod survey;
mod syntax;
mod warning;

#[cfg(test)]
mod effects;
#[cfg(test)]
mod messages;
#[cfg(test)]
mod reference;

use std::path::Path;

use fence_common::keys::{GroupKey, KeyPair};

pub use choices::{STATE_DIRECTORY as DEFAULT_STATE_DIRECTORY, in_seconds};
pub use error::{ConfigError, Mistake, Mistakes, Plugin, UnusableKey};
pub use groups::{Group, GroupKeyFiles, Groups};
pub use key::{KeyFileError, Unusable};
pub use permission::Unmatched;
pub use position::{Position, Source};
pub use rate_limit::RateLimit;
pub use reading::read;
pub use resolved::{Attach, Config, Multicast};
pub use resolved::{KEY_FILE as DEFAULT_KEY_FILE, URI as DEFAULT_URI};
pub use settings::{Kill, Options, PAUSE_MAX, PAUSE_MAX_ANSWERED, Priority, RebootMethod, RebootReply, Stress};
pub use warning::{Doubt, Warning, Warnings};

/// Where stock servers look for their configuration.
pub const DEFAULT_PATH: &str = "/etc/fence_virt.conf";

/// The largest file that is read, in bytes: forty thousand guests in groups need half of it.
pub const MAX_SIZE: usize = 4 << 20;

/// Reads and resolves a configuration file.
///
/// # Errors
/// Whatever keeps the daemon from starting; [`ConfigError::render`] is how an administrator wants
/// to see it.
pub fn load(path: &Path) -> Result<(Config, Warnings), ConfigError> {
    let (bytes, warnings) = read(path)?;
    parse(&Source::new(path, &bytes), warnings)
}

/// The keys that a configuration names.
#[derive(Debug, Default)]
pub struct FoundKeys {
    /// The key of the listener, and its second one; none where nothing is signed.
    pub everybodys: Option<KeyPair>,
    /// The groups' own keys.
    pub groups: Vec<GroupKey>,
}

/// Reads and resolves a configuration file, and the keys that it names unless it needs none.
///
/// # Errors
/// As [`load`], and where there is no usable key: the error points at the `key_file` that says
/// where it is looked for.
pub fn load_with_keys(path: &Path) -> Result<(Config, Warnings, FoundKeys), ConfigError> {
    let (bytes, warnings) = read(path)?;
    let source = Source::new(path, &bytes);
    let (config, mut warnings) = parse(&source, warnings)?;
    let found = key::load_all(&config.multicast, &mut warnings);
    let found = found.and_then(|all| {
        let groups = key::load_groups(&config.multicast, &config.groups, all.as_ref(), &mut warnings)?;
        Ok((groups, all))
    });
    match found {
        Ok((groups, all)) => {
            let groups = groups.into_iter().map(|found| found.key).collect();
            Ok((config, warnings, FoundKeys { everybodys: all.map(KeyPair::from), groups }))
        }
        Err(error) => Err(unusable_key(&source, error, warnings)),
    }
}

/// An error of [`key::load_all`] as one of the configuration: it points at the `key_file` that says
/// where the key is looked for. `warnings` may explain it.
#[must_use]
pub fn unusable_key(source: &Source<'_>, error: Unusable, warnings: Warnings) -> ConfigError {
    let Unusable { setting, error } = error;
    let found = raw::parse(source.bytes()).map(|items| resolved::key_file_span(&items, setting, error.path()));
    let (span, is_written) = found.unwrap_or((0..0, false));
    ConfigError::Key(Box::new(UnusableKey { place: source.place(&span), is_written, error, warnings }))
}

/// Resolves a configuration that is in memory already, adding to `warnings`.
///
/// # Errors
/// As [`load`], but for those of reading.
pub fn parse(source: &Source<'_>, warnings: Warnings) -> Result<(Config, Warnings), ConfigError> {
    match raw::parse(source.bytes()) {
        Ok(items) => resolved::resolve(source, &items, warnings),
        Err(error) => {
            let list = vec![(source.place(&error.span), Mistake::Syntax(error.kind))];
            Err(ConfigError::Mistakes(Mistakes { list, warnings }))
        }
    }
}
