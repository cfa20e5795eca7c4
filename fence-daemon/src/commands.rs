//! What the program does besides being the daemon: each command says what is to be said, and returns its exit code.

use std::fmt::Display;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use nix::sys::signal::{SigSet, Signal};

use crate::check_config;
use crate::cli::{EXIT_START, EXIT_USAGE, Given};
use crate::config::{self, ConfigError, Source};
use crate::configure::{self, ConfigureError, Dialogue, StandardInput};
use crate::keygen::{self, Options};
use crate::observe::logging;
use crate::plugins;

/// `-l`.
#[must_use]
pub fn list() -> u8 {
    finished(plugins::list(&mut io::stdout().lock()))
}

/// `-c`.
#[must_use]
pub fn configure(file: &Path, given: &Given) -> u8 {
    let done = fail_instead_of_dying().and_then(|()| StandardInput::new()).map_err(ConfigureError::from);
    let done = done.and_then(|mut answers| {
        configure::run(file, given, &mut Dialogue::new(&mut answers, &mut io::stdout().lock()))
    });
    match done {
        Ok(()) => 0,
        Err(error) => {
            complain(error.render(logging::stderr_colours()));
            error.exit_code()
        }
    }
}

/// `check-config`.
#[must_use]
pub fn check_config(file: &Path) -> u8 {
    let colours = logging::stderr_colours();
    let checked = config::read(file).and_then(|(bytes, warnings)| {
        let (config, warnings) = config::parse(&Source::new(file, &bytes), warnings)?;
        Ok((bytes, config, warnings))
    });
    let (bytes, config, mut warnings) = match checked {
        Ok(checked) => checked,
        Err(error) => {
            complain(error.render(colours));
            return EXIT_USAGE;
        }
    };
    check_config::look_at_interface(&config, &mut warnings);
    check_config::look_at_domains(&config, &mut warnings);
    let mut text = check_config::render(&config, &bytes);
    let keys = config::key::load_all(&config.multicast, &mut warnings).and_then(|found| {
        config::key::load_groups(&config.multicast, &config.groups, found.as_ref(), &mut warnings)?;
        Ok(found)
    });
    if let Ok(Some(keys)) = &keys {
        text.push_str(&check_config::key_note(&config.multicast, keys));
    }
    let written = io::stdout().lock().write_all(text.as_bytes());
    match keys {
        Ok(_) => {
            if !warnings.is_empty() {
                complain(warnings.render(colours));
            }
            finished(written)
        }
        Err(error) => {
            complain(config::unusable_key(&Source::new(file, &bytes), error, warnings).render(colours));
            complain(format_args!(
                "fence-daemon: the daemon would not start without the key (exit status {EXIT_USAGE})"
            ));
            EXIT_USAGE
        }
    }
}

/// `keygen`.
#[must_use]
pub fn keygen(path: Option<&Path>, config: &Path, options: Options) -> u8 {
    let path = match path.map_or_else(|| configured_key_file(config), |path| Ok(path.to_owned())) {
        Ok(path) => path,
        Err(error) => {
            complain(error.render(logging::stderr_colours()));
            complain("fence-daemon: no key was made: name its file, or mend the configuration");
            return EXIT_USAGE;
        }
    };
    let made = fail_instead_of_dying().map_err(|error| error.to_string());
    match made.and_then(|()| keygen::generate(&path, options).map_err(|error| error.to_string())) {
        Ok(()) => finished(keygen::tell(&path, &mut io::stdout().lock())),
        Err(error) => {
            complain(format_args!("fence-daemon: {error}"));
            EXIT_START
        }
    }
}

/// The key file that the configuration names; upstream's where there is no configuration yet.
fn configured_key_file(config: &Path) -> Result<PathBuf, ConfigError> {
    match config::load(config) {
        Ok((config, _)) => Ok(config.multicast.key_file),
        Err(ConfigError::Unreadable { error, .. })
            if error.kind() == io::ErrorKind::NotFound && config == Path::new(config::DEFAULT_PATH) =>
        {
            Ok(config::DEFAULT_KEY_FILE.into())
        }
        Err(error) => Err(error),
    }
}

/// A file that grows beyond a limit is an error to be told, and no reason to die halfway and leave a half behind.
fn fail_instead_of_dying() -> io::Result<()> {
    [Signal::SIGXFSZ].into_iter().collect::<SigSet>().thread_block().map_err(io::Error::from)
}

fn complain(what: impl Display) {
    // Nothing is left to be done if even that cannot be written.
    let _ = writeln!(io::stderr(), "{what}");
}

/// Whoever reads a part of the output and goes (`head`) has what they wanted; another failure is one.
fn finished(written: io::Result<()>) -> u8 {
    match written.and_then(|()| io::stdout().flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            complain(format_args!("fence-daemon: cannot write the output: {error}"));
            EXIT_START
        }
        Ok(()) | Err(_) => 0,
    }
}
