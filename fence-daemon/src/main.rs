//! The `fence-daemon` binary: the daemon, and the way to the commands. The daemon reads
//! configuration and key first, then goes into the background, then serves.
//!
//! People start all commands by this program. It becomes `fence-daemon-commands` for them.

use std::env;
use std::fmt::Display;
use std::io::{self, Write as _};
use std::panic::resume_unwind;
use std::process::ExitCode;

use fence_common::exit::{EXIT_START, EXIT_USAGE};
use fence_config::{self as config, Config, FoundKeys, Warnings};
use fence_daemon::commands;
use fence_daemon::daemon::{self, ConfigFile, DaemonError, Patience};
use fence_daemon::observe::logging::{self, Destination};
use fence_daemon::options::DaemonOptions;
use fence_daemon::pipeline::SERVING_MAX;
use fence_daemon::process::{self, Loader, Readiness};
use fence_daemon::state;
use fence_daemon::state::pid_file::PidFile;
use fence_daemon::systemd::{self, PassedSocket};

/// How many files may be open: one connection for each request at once, and as many for everything
/// else.
const OPEN_FILES: u64 = 2 * SERVING_MAX as u64;

pub(crate) fn main() -> ExitCode {
    let Some(options) = DaemonOptions::read(env::args_os().skip(1)) else {
        return ExitCode::from(say(EXIT_START)(commands::become_them()));
    };
    // Before any key is read, so that none ends up in a core dump.
    if let Err(error) = process::harden(OPEN_FILES) {
        return ExitCode::from(say(EXIT_START)(error));
    }
    process::leave(start(&options).map_or_else(|code| code, |()| 0))
}

/// Starts the daemon and returns at its end. Every error is already logged or printed; the returned
/// error is the exit code.
fn start(options: &DaemonOptions) -> Result<(), u8> {
    // SAFETY: needed to take what systemd has opened. Sound because this is the only call, and
    // nothing before it has opened a file that is still open: reading the command line opens none,
    // and `harden` only changes limits and signals.
    let sockets = unsafe { systemd::passed_sockets() };
    let (mut config, warnings, keys) = read(options)?;
    let running = ConfigFile { path: options.config.clone(), config: config.clone() };
    options.apply_to(&mut config);

    if let Some(directory) = &config.hypervisor.state {
        // A directory that cannot be opened prevents no fencing. One that others can write to stops
        // the daemon.
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
    let _pid_file = PidFile::take(&options.pid_file).map_err(say(EXIT_START))?;
    // Before the log's thread.
    let room = process::make_room_for_files();
    let loader = Loader::start().map_err(say(EXIT_START))?;
    logging::init(config.debug, destination).map_err(say(EXIT_START))?;
    if let Err(error) = room {
        tracing::warn!("{error}");
    }
    for line in warnings.lines() {
        tracing::warn!("{line}");
    }
    // Before any thread serves: threads inherit it from this one.
    for refused in process::withstand(config.stress) {
        tracing::warn!("{refused}");
    }
    // Likewise, and after what else the start alone needs.
    if let Err(error) = process::give_up(&config) {
        tracing::warn!("{error}");
    }
    let sockets = sockets.unwrap_or_else(|error| {
        tracing::error!("the sockets that systemd passes are not used: {error}");
        Vec::new()
    });
    ended(serve(config, keys, readiness, sockets, loader, running), destination)
}

/// Logs why the daemon has ended, if nobody stopped it. Such an end is never a success: systemd
/// must restart the daemon.
fn ended(outcome: Result<(), DaemonError>, destination: Destination) -> Result<(), u8> {
    outcome.map_err(|error| {
        tracing::error!("{error}");
        match destination {
            Destination::Foreground => EXIT_START,
            // The log is elsewhere; its starter still reads standard error.
            Destination::Background => say(EXIT_START)(error),
        }
    })
}

/// Reads configuration and keys. An administrator's mistake is printed on standard error, with its
/// place.
fn read(options: &DaemonOptions) -> Result<(Config, Warnings, FoundKeys), u8> {
    config::load_with_keys(&options.config).map_err(|error| {
        complain(error.render(logging::stderr_colours()));
        EXIT_USAGE
    })
}

fn serve(
    config: Config,
    keys: FoundKeys,
    readiness: Readiness,
    sockets: Vec<PassedSocket>,
    loader: Loader,
    running: ConfigFile,
) -> Result<(), DaemonError> {
    let patience = if config.wait_for_init { Patience::Wait } else { Patience::Start };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().thread_name("fence").build();
    let runtime = runtime.map_err(|error| DaemonError::Runtime("start the runtime", error))?;
    // On a worker, and not on this thread: the thread that the kernel wakes then serves as well.
    let running = runtime.spawn(daemon::run(config, keys, patience, readiness, sockets, loader, running));
    let ended = runtime.block_on(running).unwrap_or_else(|failed| resume_unwind(failed.into_panic()));
    // A call into a hung libvirt must not keep the process.
    runtime.shutdown_background();
    ended
}

/// Prints an error on standard error, which in the background leads to the terminal until the
/// daemon is ready.
fn say<E: Display>(code: u8) -> impl Fn(E) -> u8 {
    move |error| {
        complain(format_args!("fence-daemon: {error}"));
        code
    }
}

fn complain(what: impl Display) {
    // If even this fails, nothing is left to do.
    let _ = writeln!(io::stderr(), "{what}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_after_the_start_is_no_success() {
        for destination in [Destination::Foreground, Destination::Background] {
            let broken = DaemonError::Runtime("read the ring buffer", io::ErrorKind::BrokenPipe.into());
            assert_eq!(ended(Err(broken), destination), Err(EXIT_START));
            assert_eq!(ended(Ok(()), destination), Ok(()));
        }
    }
}
