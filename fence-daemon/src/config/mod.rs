//! The configuration file of fence_virtd, read the way stock servers read it but with nothing left to luck.
//!
//! Three layers, each a type: [`raw`] is the file as written, with the place of every word; [`Config`] is what the daemon works
//! with, every value parsed; in between, what is wrong becomes a [`ConfigError`] (the daemon doesn't start) and what is merely
//! doubtful a [`Warnings`], both shown with file, line, caret and what to write instead. Every mistake of a file is reported at
//! once, not one per attempt.
//!
//! What could leave the daemon wider open than the file's author meant is an error, never a warning: an unknown digest, groups
//! that permit nothing or stand where they restrict nothing, an address that is none.

mod error;
pub mod key;
mod place;
pub mod raw;
mod resolved;
mod survey;
mod warning;

#[cfg(test)]
mod messages;

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

pub use error::{ConfigError, KeyFileError, Mistake, Mistakes, Plugin};
pub use place::{Place, Source};
pub use resolved::{Attach, Config, Group, Groups, Multicast};
pub use resolved::{
    GROUP_V4 as DEFAULT_GROUP_V4, GROUP_V6 as DEFAULT_GROUP_V6, KEY_FILE as DEFAULT_KEY_FILE, PORT as DEFAULT_PORT,
    URI as DEFAULT_URI,
};
pub use warning::{Doubt, Warning, Warnings};

/// Where stock servers look for their configuration.
pub const DEFAULT_PATH: &str = "/etc/fence_virt.conf";

/// The largest file that is read, in bytes: forty thousand guests in groups need half of it.
pub const MAX_SIZE: usize = 4 << 20;

/// Reads and resolves a configuration file.
///
/// # Errors
/// Whatever keeps the daemon from starting; [`ConfigError::render`] is how an administrator wants to see it.
pub fn load(path: &Path) -> Result<(Config, Warnings), ConfigError> {
    let (bytes, warnings) = read(path)?;
    parse(&Source::new(path, &bytes), warnings)
}

/// Reads a configuration file and does not look at what it says; the warnings are about the file.
///
/// # Errors
/// It cannot be read, or is no configuration file by its size.
pub fn read(path: &Path) -> Result<(Vec<u8>, Warnings), ConfigError> {
    let unreadable = |error| ConfigError::Unreadable { path: path.to_owned(), error };
    let file = File::open(path).map_err(unreadable)?;
    let about = file.metadata().map_err(unreadable)?;
    if about.is_dir() {
        return Err(unreadable(io::Error::from(io::ErrorKind::IsADirectory)));
    }
    let mut bytes = Vec::new();
    // One byte more than is allowed tells a file that is too large, or endless, from one that just fits.
    let limit = u64::try_from(MAX_SIZE).unwrap_or(u64::MAX).saturating_add(1);
    file.take(limit).read_to_end(&mut bytes).map_err(unreadable)?;
    if bytes.len() > MAX_SIZE {
        return Err(ConfigError::TooLarge { path: path.to_owned() });
    }
    let mut warnings = Warnings::default();
    if about.is_file() && about.mode() & 0o022 != 0 {
        warnings.push(None, Doubt::ConfigWritable { path: path.to_owned(), mode: about.mode() & 0o7777 });
    }
    Ok((bytes, warnings))
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
