//! The `fence-daemon` binary: a command, or else the daemon: configuration and key first, then the background, then serving.

use std::fmt::Display;
use std::io::Write as _;
use std::process::ExitCode;

use fence_daemon::cli::{self, Action, Cli, EXIT_START, EXIT_USAGE};
use fence_daemon::commands;
use fence_daemon::config::{self, Config, FoundKeys, Warnings};
use fence_daemon::daemon::{self, DaemonError, Patience};
use fence_daemon::doctor;
use fence_daemon::keygen;
use fence_daemon::observe::logging::{self, Destination};
use fence_daemon::process::{self, PidFile, Readiness};
use fence_daemon::{state, status, top};

pub(crate) fn main() -> ExitCode {
    let cli = match Cli::read(std::env::args_os()) {
        Ok(cli) => cli,
        Err(message) => {
            // Nothing is left to be done if even that cannot be written.
            let _ = message.print();
            return ExitCode::from(cli::exit_code(&message));
        }
    };
    // Before any key is read or made: from here on it cannot end up in a core dump.
    if let Err(error) = process::harden() {
        return ExitCode::from(say(EXIT_START)(error));
    }
    ExitCode::from(match &cli.command {
        Some(Action::CheckConfig) => commands::check_config(&cli.config),
        Some(Action::Keygen { path, force, parents }) => {
            let options = keygen::Options { force: *force, parents: *parents };
            commands::keygen(path.as_deref(), &cli.config, options)
        }
        Some(Action::Status { json }) => status::run(&cli.config, *json),
        // At once: a libvirt that hangs still has threads of it.
        Some(Action::Doctor { from_guest, key, json }) => {
            let options = doctor::Options { from_guest: *from_guest, key: key.clone(), json: *json };
            process::leave(doctor::run(&cli.config, &options))
        }
        Some(Action::Top) => top::run(&cli.config),
        None if cli.list => commands::list(),
        None if cli.configure => commands::configure(&cli.config, &cli.given),
        None => process::leave(start(&cli).map_or_else(|code| code, |()| 0)),
    })
}

/// Everything up to the end of the daemon. What went wrong has been said when it returns; the error is the exit code.
fn start(cli: &Cli) -> Result<(), u8> {
    let (mut config, warnings, keys) = read(cli)?;
    cli.apply_to(&mut config);

    if let Some(directory) = &config.hypervisor.state {
        // One that cannot be had keeps nobody from being fenced; one that others rule does.
        match state::look(directory) {
            Err(error) if error.is_unsafe() => return Err(say(EXIT_USAGE)(error)),
            Ok(()) | Err(_) => {}
        }
    }
    let (readiness, destination) = if config.foreground {
        (Readiness::foreground(), Destination::Foreground)
    } else {
        (process::daemonise().map_err(say(EXIT_START))?, Destination::Background)
    };
    let _pid_file = PidFile::take(&cli.pid_file).map_err(say(EXIT_START))?;
    logging::init(config.debug, destination).map_err(say(EXIT_START))?;
    warnings.log();
    // Before there are other threads that serve, which will have it from this one.
    for refused in config.stress.apply() {
        tracing::warn!("{refused}");
    }
    ended(serve(config, keys, readiness), destination)
}

/// Tells why the daemon has ended, if it was not told to. Whenever that is, it is no success: who supervises it must start it again.
fn ended(outcome: Result<(), DaemonError>, destination: Destination) -> Result<(), u8> {
    outcome.map_err(|error| {
        tracing::error!("{error}");
        match destination {
            Destination::Foreground => EXIT_START,
            // The log is elsewhere; whoever started it still listens to standard error.
            Destination::Background => say(EXIT_START)(error),
        }
    })
}

/// Reads configuration and keys. An administrator's mistake in either is told on standard error, with its place.
fn read(cli: &Cli) -> Result<(Config, Warnings, FoundKeys), u8> {
    config::load_with_keys(&cli.config).map_err(|error| {
        let _ = writeln!(std::io::stderr(), "{}", error.render(logging::stderr_colours()));
        EXIT_USAGE
    })
}

fn serve(config: Config, keys: FoundKeys, readiness: Readiness) -> Result<(), DaemonError> {
    let patience = if config.wait_for_init { Patience::Wait } else { Patience::Start };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().thread_name("fence").build();
    let runtime = runtime.map_err(|error| DaemonError::Runtime("start the runtime", error))?;
    let ended = runtime.block_on(daemon::run(config, keys, patience, readiness));
    // A call into a hung libvirt must not keep the process.
    runtime.shutdown_background();
    ended
}

/// Tells an error on standard error, which in the background leads to the terminal until the daemon is ready.
fn say<E: Display>(code: u8) -> impl Fn(E) -> u8 {
    move |error| {
        let _ = writeln!(std::io::stderr(), "fence-daemon: {error}");
        code
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_after_the_start_is_no_success() {
        for destination in [Destination::Foreground, Destination::Background] {
            let broken = DaemonError::Runtime("read the ring buffer", std::io::ErrorKind::BrokenPipe.into());
            assert_eq!(ended(Err(broken), destination), Err(EXIT_START));
            assert_eq!(ended(Ok(()), destination), Ok(()));
        }
    }
}
