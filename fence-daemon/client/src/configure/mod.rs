//! `fence-daemon -c`: asks for the configuration, shows it, and writes it when told to.
//!
//! The questions come in the order in which stock servers ask theirs, one answer a line, so that
//! answers that were piped into those can be piped into this; what stock servers do not ask
//! (digests, family) is not asked but has an option. What the old file says besides stays, only
//! comments go: they are in the backup. A question that stock servers do not have (shall the key be
//! made?) comes last, when the file is written already.

mod dialogue;
mod questions;
mod values;

use std::io;
use std::path::{Path, PathBuf};

pub use dialogue::{Answers, Dialogue, Interruption, StandardInput};
use fence_common::exit::{EXIT_START, EXIT_USAGE};
use fence_config::document::Document;
use fence_config::durable::{self, FileError, Place};
use fence_config::{self as config, Config, ConfigError, Source, Warnings};
use questions::Questions;

use crate::cli::Given;
use crate::keygen::{self, KeygenError};
use crate::screen::{complain, stderr_colours};

/// How many backups of one file are kept at most.
const MAX_BACKUPS: u32 = 1000;

/// Why there is no new configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigureError {
    /// No (usable) answer.
    #[error("{0}: nothing was written")]
    Interrupted(#[from] Interruption),
    /// The answer was no.
    #[error("nothing was written")]
    Declined,
    /// An option's value would not do.
    #[error("--{option}: {why}")]
    Option {
        /// The option's name.
        option: &'static str,
        /// What is wrong and what to write instead.
        why: String,
    },
    /// The old file cannot be understood and nobody can be asked whether it should go.
    #[error("the file that is there is not understood, so nothing was written: mend it, or move it away\n{0}")]
    Broken(ConfigError),
    /// The daemon would not start with the new file, because of something that was not asked.
    #[error("the daemon would not start with this, so nothing was written: mend the old file first\n{0}")]
    Unusable(ConfigError),
    /// Somebody else has written the file in the meantime.
    #[error("{} was changed by somebody else meanwhile: nothing was written, begin again", .0.display())]
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
    /// The error as it belongs on a terminal; escape sequences only if `colours`.
    #[must_use]
    pub fn render(&self, colours: bool) -> String {
        let with = |what: &str, error: &ConfigError| format!("fence-daemon: {what}\n\n{}", error.render(colours));
        match self {
            Self::Broken(error) => with(
                "the file that is there is not understood, so nothing was written: mend it, or move it away",
                error,
            ),
            Self::Unusable(error) => with(
                "the daemon would not start with this, so nothing was written: mend this part of the old file first",
                error,
            ),
            Self::Interrupted(_)
            | Self::Declined
            | Self::Option { .. }
            | Self::Changed(_)
            | Self::File(_)
            | Self::Backups(_)
            | Self::Key(_) => format!("fence-daemon: {self}"),
        }
    }

    /// What to exit with.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Option { .. } | Self::Broken(_) | Self::Unusable(_) => EXIT_USAGE,
            Self::Interrupted(_)
            | Self::Declined
            | Self::Changed(_)
            | Self::File(_)
            | Self::Backups(_)
            | Self::Key(_) => EXIT_START,
        }
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

/// Asks what `given` leaves open and writes `file`.
///
/// # Errors
/// Nothing was written, unless the error says so.
pub fn ask(file: &Path, given: &Given, dialogue: &mut Dialogue<'_>) -> Result<(), ConfigureError> {
    if given.yes {
        dialogue.need_not_be_heard();
    }
    let place = Place::find(file)?;
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

/// The old file, or an empty one: stock servers ask about the latter too, so their scripts have an
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
            // Once more, for the error with its place.
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

fn write(place: &Place, old: Option<&[u8]>, text: &str, dialogue: &mut Dialogue<'_>) -> Result<(), ConfigureError> {
    let named = place.named.display();
    if place.read(config::MAX_SIZE)?.as_deref() != old {
        return Err(ConfigureError::Changed(place.named.clone()));
    }
    // What cannot be told after the file is written must not look as if it were not.
    dialogue.need_not_be_heard();
    let Some(old) = old else {
        durable::create(&place.file, text.as_bytes())?;
        return Ok(dialogue.say(&format!("{named} is written; it counts from the daemon's next start."))?);
    };
    if old == text.as_bytes() {
        return Ok(dialogue.say(&format!("{named} says exactly this already."))?);
    }
    let backup = back_up(&place.file, old)?;
    if let Err(error) = place.replace(text.as_bytes()) {
        if !matches!(error, FileError::Unsynced { .. }) {
            // A copy of what is still there would only puzzle.
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

/// Keeps the old file as FILE.bak, or FILE.bak.1 and so on: an older backup may be the only one
/// that still has the comments.
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

/// Makes the key if it is missing and wanted. The configuration is written by now: no answer is no.
fn provide_key(config: &Config, given: &Given, dialogue: &mut Dialogue<'_>) -> Result<(), ConfigureError> {
    let path = &config.multicast.key_file;
    let is_missing = path.metadata().is_err();
    if !config.multicast.needs_key() || !is_missing {
        if given.create_key {
            dialogue.say(&format!("No key is made: {} is there already, or none is needed.", path.display()))?;
        }
        return Ok(());
    }
    let wanted = given.create_key
        || (!given.yes && {
            dialogue.say(&format!("The key file {} does not exist.", path.display()))?;
            dialogue.consent("Make one of 4096 random bytes").unwrap_or(false)
        });
    if !wanted {
        let said = format!(
            "The daemon does not start without {}: copy the guests' key there, or `fence-daemon keygen`.",
            path.display()
        );
        return Ok(dialogue.say(&said)?);
    }
    keygen::generate(path, keygen::Options { parents: true, force: false })?;
    Ok(dialogue.say(keygen::told(path).trim_end())?)
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
    fn nobody_is_told_that_nothing_was_written_when_it_was() {
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
