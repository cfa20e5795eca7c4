//! `fence-daemon -c`: asks for the configuration, shows it, and writes it after consent.
//!
//! The questions have fence_virtd's order, one answer a line, so that a script for fence_virtd
//! works here. Options set what fence_virtd does not ask about (digests, family). The old file's
//! other settings stay. Its comments go, but the backup keeps them. A question that fence_virtd
//! lacks (whether to make the key) comes last, when the file is written.

mod dialogue;
mod listeners;
mod questions;
mod values;

use std::io;
use std::path::{Path, PathBuf};

pub use dialogue::{Answers, Dialogue, Interruption, StandardInput};
use fence_common::exit::{EXIT_START, EXIT_USAGE};
use fence_config::document::Document;
use fence_config::durable::{self, Destination, FileError};
use fence_config::{self as config, Config, ConfigError, Listener, Source, Warnings};
use questions::Questions;

use crate::cli::Given;
use crate::keygen::{self, KeygenError};
use crate::screen::{complain, stderr_colours};

/// The most backups of one file.
const MAX_BACKUPS: u32 = 1000;

/// Why there is no new configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigureError {
    /// There is no usable answer.
    #[error("{0}: nothing was written")]
    Interrupted(#[from] Interruption),
    /// The user declined.
    #[error("nothing was written")]
    Declined,
    /// An option has an invalid value.
    #[error("--{option}: {why}")]
    Option {
        /// The option's name.
        option: &'static str,
        /// What is wrong, and what to write instead.
        why: String,
    },
    /// The old file is invalid, and nobody can be asked whether to replace it.
    #[error("the existing file has mistakes, so nothing was written: correct it, or move it away")]
    Broken(ConfigError),
    /// The new file would be invalid, because of an old setting that no question covers.
    #[error("the daemon would not start with this, so nothing was written: mend this part of the old file first")]
    Unusable(ConfigError),
    /// Another process has changed the file meanwhile.
    #[error("{} has changed meanwhile, so nothing was written: start again", .0.display())]
    Changed(PathBuf),
    /// The file cannot be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// There are too many backups.
    #[error("{} has {MAX_BACKUPS} backups: nothing was written, remove some", .0.display())]
    Backups(PathBuf),
    /// The configuration is written, the key is not.
    #[error("the configuration is written, but its key is not: {0}")]
    Key(#[from] KeygenError),
}

impl From<io::Error> for ConfigureError {
    fn from(error: io::Error) -> Self {
        Self::Interrupted(error.into())
    }
}

impl ConfigureError {
    /// The error for a terminal; escape sequences only if `colours`.
    #[must_use]
    pub fn render(&self, colours: bool) -> String {
        if let Self::Broken(error) | Self::Unusable(error) = self {
            return format!("fence-daemon: {self}\n\n{}", error.render(colours));
        }
        format!("fence-daemon: {self}")
    }

    /// The exit code.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        let is_usage = matches!(self, Self::Option { .. } | Self::Broken(_) | Self::Unusable(_));
        if is_usage { EXIT_USAGE } else { EXIT_START }
    }
}

/// Asks at the terminal, writes `file`, and returns the exit code.
#[must_use]
pub fn run(file: &Path, given: &Given) -> u8 {
    let ready = durable::fail_instead_of_dying().and_then(|()| StandardInput::new()).map_err(ConfigureError::from);
    let done =
        ready.and_then(|mut answers| ask(file, given, &mut Dialogue::new(&mut answers, &mut io::stdout().lock())));
    match done {
        Ok(()) => 0,
        Err(error) => {
            complain(error.render(stderr_colours()));
            error.exit_code()
        }
    }
}

/// Asks what `given` leaves open, and writes `file`.
///
/// # Errors
/// Nothing was written, unless the error says so.
pub fn ask(file: &Path, given: &Given, dialogue: &mut Dialogue<'_>) -> Result<(), ConfigureError> {
    if given.yes {
        dialogue.need_not_be_heard();
    }
    let place = Destination::find(file)?;
    let old = place.read(config::MAX_SIZE)?;
    let document = begin_with(file, old.as_deref(), given, dialogue)?;
    let document = Questions::new(document, given, dialogue).ask()?;

    let text = document.to_string();
    let (config, warnings) = match config::parse(&Source::new(file, text.as_bytes()), Warnings::default()) {
        Ok(parsed) => parsed,
        Err(error) => return Err(ConfigureError::Unusable(error)),
    };
    dialogue.say(&format!("\n=== Begin Configuration ===\n{text}=== End Configuration ===\n"))?;
    if !warnings.is_empty() {
        dialogue.say(&format!("{}\n", warnings.render(false)))?;
    }
    if place.is_linked() {
        dialogue.say(&format!(
            "{} is a symbolic link: {} is what will change.",
            file.display(),
            place.file.display()
        ))?;
    }
    if !given.yes && !dialogue.consent(&format!("Replace {} with the above", file.display()))? {
        return Err(ConfigureError::Declined);
    }
    write(&place, old.as_deref(), &text, dialogue)?;
    provide_key(&config, given, dialogue)
}

/// The old file, or an empty one. fence_virtd asks about an empty file too, so its scripts have an
/// answer ready.
fn begin_with(
    file: &Path,
    old: Option<&[u8]>,
    given: &Given,
    dialogue: &mut Dialogue<'_>,
) -> Result<Document, ConfigureError> {
    let parsed = match old {
        Some(old) if old.len() > config::MAX_SIZE => {
            let end = config::MAX_SIZE..config::MAX_SIZE;
            Err(ConfigError::TooLarge { place: Source::new(file, old).place(&end) })
        }
        Some(old) => match Document::parse(old) {
            Ok(document) => return Ok(document),
            // Parsed again for the error with its position.
            Err(_) => config::parse(&Source::new(file, old), Warnings::default()).map(drop),
        },
        None => Ok(()),
    };
    match parsed {
        Err(error @ ConfigError::TooLarge { .. }) => return Err(ConfigureError::Broken(error)),
        Err(error) if given.yes => return Err(ConfigureError::Broken(error)),
        Err(error) => dialogue.say(&format!("{}\n", error.render(false)))?,
        Ok(()) if given.yes => return Ok(Document::default()),
        Ok(()) => dialogue.say(&format!("There is no file {} yet.", file.display()))?,
    }
    if dialogue.consent("Start from scratch")? { Ok(Document::default()) } else { Err(ConfigureError::Declined) }
}

fn write(
    place: &Destination,
    old: Option<&[u8]>,
    text: &str,
    dialogue: &mut Dialogue<'_>,
) -> Result<(), ConfigureError> {
    let named = place.named.display();
    if place.read(config::MAX_SIZE)?.as_deref() != old {
        return Err(ConfigureError::Changed(place.named.clone()));
    }
    // A failed output after the write must not look like a failed write.
    dialogue.need_not_be_heard();
    let Some(old) = old else {
        durable::create(&place.file, text.as_bytes())?;
        return Ok(dialogue.say(&format!("{named} is written; it counts from the daemon's next start."))?);
    };
    if old == text.as_bytes() {
        return Ok(dialogue.say(&format!("{named} has this content already."))?);
    }
    let backup = back_up(&place.file, old)?;
    if let Err(error) = place.replace(text.as_bytes()) {
        if !matches!(error, FileError::Unsynced { .. }) {
            // A backup of an unchanged file would only confuse.
            let _ = std::fs::remove_file(&backup);
        }
        return Err(error.into());
    }
    let said = format!(
        "{named} is written; it counts from the daemon's next start. The old one, comments and all: {}",
        backup.display()
    );
    Ok(dialogue.say(&said)?)
}

/// Keeps the old file as FILE.bak, FILE.bak.1 and so on. Only an older backup may still have the
/// comments.
fn back_up(file: &Path, old: &[u8]) -> Result<PathBuf, ConfigureError> {
    for number in 0..MAX_BACKUPS {
        let mut name = file.as_os_str().to_owned();
        name.push(".bak");
        if number > 0 {
            name.push(format!(".{number}"));
        }
        let backup = PathBuf::from(name);
        match durable::create(&backup, old) {
            Ok(()) => return Ok(backup),
            Err(FileError::Exists(_)) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Err(ConfigureError::Backups(file.to_owned()))
}

/// Makes each key that is missing and wanted. The configuration is already written: no answer means
/// no.
fn provide_key(config: &Config, given: &Given, dialogue: &mut Dialogue<'_>) -> Result<(), ConfigureError> {
    let mut missing: Vec<_> = config.listeners.iter().filter_map(Listener::key_files).map(|keys| keys.first).collect();
    missing.retain(|path| path.metadata().is_err());
    missing.dedup();
    if missing.is_empty() && given.create_key {
        dialogue.say("No key was created: it exists already, or none is needed.")?;
    }
    for path in &missing {
        let wanted = given.create_key
            || (!given.yes && {
                dialogue.say(&format!("The key file {} does not exist.", path.display()))?;
                dialogue.consent("Make one of 4096 random bytes").unwrap_or(false)
            });
        if wanted {
            keygen::generate(path, keygen::KeygenOptions { parents: true, force: false })?;
            dialogue.say(keygen::told(path).trim_end())?;
        } else {
            dialogue.say(&format!(
                "The daemon does not start without {}: copy the guests' key there, or `fence-daemon keygen`.",
                path.display()
            ))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::dialogue::tests::Script;
    use super::*;
    use tempfile::tempdir;

    /// Somebody who goes away right after the question whether to write.
    struct Goes(bool);

    impl io::Write for Goes {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            if self.0 && !bytes.starts_with(b"y") && !bytes.starts_with(b"\n") {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            self.0 |= String::from_utf8_lossy(bytes).contains("[y/N]? ");
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn an_error_after_the_write_says_that_the_file_is_written() {
        let dir = tempdir().unwrap();
        let (conf, key) = (dir.path().join("conf"), dir.path().join("key"));
        std::fs::write(&conf, "fence_virtd { listener = \"multicast\"; backend = \"libvirt\"; }").unwrap();
        let mut answers = Script::new(&format!("\n\n\n7\n\n{}\n\n\ny\ny\n", key.display()));
        let mut out = Goes(false);
        ask(&conf, &Given::default(), &mut Dialogue::new(&mut answers, &mut out)).unwrap();
        assert!(std::fs::read_to_string(&conf).unwrap().contains("port = \"7\";"));
        assert!(!key.exists(), "nobody has seen that question");
    }

    #[test]
    fn a_question_that_nobody_hears_is_not_answered() {
        let dir = tempdir().unwrap();
        let mut answers = Script::new("y\n\n\n\n\n\n\n\n\ny\n");
        let error =
            ask(&dir.path().join("conf"), &Given::default(), &mut Dialogue::new(&mut answers, &mut Goes(false)));
        assert!(matches!(error, Err(ConfigureError::Interrupted(Interruption::Io(_)))), "{error:?}");
        assert!(!dir.path().join("conf").exists());
    }
}
