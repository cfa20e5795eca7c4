//! The `fence-daemon` binary: runs a command, or the daemon. The daemon reads configuration and key
//! first, then goes into the background, then serves.

use std::fmt::Display;
use std::panic::resume_unwind;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use fence_client::cli::{self, Action, Cli};
use fence_client::probe::{Domain, Obstacle, Probe, Unanswered, Unsafe};
use fence_client::{check_config, configure, doctor, keygen, screen, status, top};
use fence_common::exit::{EXIT_START, EXIT_USAGE};
use fence_config::{self as config, Config, FoundKeys, Warnings};
use fence_daemon::daemon::{self, DaemonError, Patience};
use fence_daemon::hypervisor::{self, CallError};
use fence_daemon::intake::kernel::{KernelProgram, Occupant};
use fence_daemon::observe::logging::{self, Destination};
use fence_daemon::pipeline::SERVING_MAX;
use fence_daemon::process::{self, Readiness};
use fence_daemon::state::pid_file::PidFile;
use fence_daemon::state::{self, StateError};
use fence_daemon::systemd::{self, PassedSocket};
use fence_net::interface::Interface;

/// How many files may be open: one connection for each request at once, and as many for everything
/// else.
const OPEN_FILES: u64 = 2 * SERVING_MAX as u64;

pub(crate) fn main() -> ExitCode {
    let cli = match Cli::read(std::env::args_os()) {
        Ok(cli) => cli,
        Err(message) => {
            // If even that cannot be written, nothing else can be done.
            let _ = message.print();
            return ExitCode::from(cli::exit_code(&message));
        }
    };
    // Before any key is read or created, so that none ends up in a core dump.
    if let Err(error) = process::harden(OPEN_FILES) {
        return ExitCode::from(say(EXIT_START)(error));
    }
    ExitCode::from(match &cli.command {
        Some(Action::CheckConfig) => check_config::run(&cli.config, &ThisHost),
        Some(Action::Keygen { path, force, parents }) => {
            let options = keygen::KeygenOptions { force: *force, parents: *parents };
            keygen::run(path.as_deref(), &cli.config, options)
        }
        Some(Action::Status { json }) => status::run(&cli.config, *json),
        // Leave at once: a libvirt that hangs still has threads.
        Some(Action::Doctor { from_guest, key, tcp, vsock, serial, json }) => {
            let (from_guest, vsock, json) = (*from_guest, *vsock, *json);
            let (key, tcp, serial) = (key.clone(), tcp.clone(), serial.clone());
            let options = doctor::Options { from_guest, key, tcp, vsock, serial, json };
            process::leave(doctor::run(&cli.config, &options, &ThisHost))
        }
        Some(Action::Top) => top::run(&cli.config),
        None if cli.list => u8::from(!screen::print(&cli::list())) * EXIT_START,
        None if cli.configure => configure::run(&cli.config, &cli.given),
        None => process::leave(start(&cli).map_or_else(|code| code, |()| 0)),
    })
}

/// Starts the daemon and returns at its end. Every error is already logged or printed; the returned
/// error is the exit code.
fn start(cli: &Cli) -> Result<(), u8> {
    // SAFETY: needed to take what systemd has opened. Sound because this is the only call, and
    // nothing before it has opened a file that is still open: reading the command line opens none,
    // and `harden` only changes limits and signals.
    let sockets = unsafe { systemd::passed_sockets() };
    let (mut config, warnings, keys) = read(cli)?;
    cli.apply_to(&mut config);

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
    let _pid_file = PidFile::take(&cli.pid_file).map_err(say(EXIT_START))?;
    // Before the log's thread.
    let room = process::make_room_for_files();
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
    let sockets = sockets.unwrap_or_else(|error| {
        tracing::error!("the sockets that systemd passes are not used: {error}");
        Vec::new()
    });
    ended(serve(config, keys, readiness, sockets), destination)
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
fn read(cli: &Cli) -> Result<(Config, Warnings, FoundKeys), u8> {
    config::load_with_keys(&cli.config).map_err(|error| {
        screen::complain(error.render(screen::stderr_colours()));
        EXIT_USAGE
    })
}

fn serve(config: Config, keys: FoundKeys, readiness: Readiness, sockets: Vec<PassedSocket>) -> Result<(), DaemonError> {
    let patience = if config.wait_for_init { Patience::Wait } else { Patience::Start };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().thread_name("fence").build();
    let runtime = runtime.map_err(|error| DaemonError::Runtime("start the runtime", error))?;
    // On a worker, and not on this thread: the thread that the kernel wakes then serves as well.
    let running = runtime.spawn(daemon::run(config, keys, patience, readiness, sockets));
    let ended = runtime.block_on(running).unwrap_or_else(|failed| resume_unwind(failed.into_panic()));
    // A call into a hung libvirt must not keep the process.
    runtime.shutdown_background();
    ended
}

/// Prints an error on standard error, which in the background leads to the terminal until the
/// daemon is ready.
fn say<E: Display>(code: u8) -> impl Fn(E) -> u8 {
    move |error| {
        screen::complain(format_args!("fence-daemon: {error}"));
        code
    }
}

/// The daemon's part of what the commands need to know about this host.
struct ThisHost;

impl Probe for ThisHost {
    fn domains(&self, uris: &[String], within: Duration) -> Vec<(String, Result<Vec<Domain>, Unanswered>)> {
        let domain = |listed: hypervisor::Listed| Domain {
            name: listed.name,
            uuid: listed.uuid,
            state: listed.state,
            uri: listed.uri.to_string(),
        };
        let answered = |answer: Result<Vec<hypervisor::Listed>, CallError>| match answer {
            Ok(listed) => Ok(listed.into_iter().map(domain).collect()),
            Err(CallError::Overdue) => Err(Unanswered::Overdue),
            Err(error) => Err(Unanswered::Failed(error.to_string())),
        };
        let probed = hypervisor::probe(uris, within);
        probed.into_iter().map(|(uri, answer)| (uri, answered(answer))).collect()
    }

    fn obstacle(&self, interface: &str) -> Option<Obstacle> {
        if let Some(occupant) = Occupant::on(interface) {
            return Some(Obstacle::Occupant(occupant.to_string()));
        }
        let sharer = KernelProgram::sharer(&Interface::named(interface)?).ok().flatten()?;
        Some(Obstacle::Sharer(sharer.to_string()))
    }

    fn state_directory(&self, path: &Path) -> Option<Unsafe> {
        match state::look(path) {
            Err(error @ StateError::Unsafe { .. }) => {
                let remedy =
                    if let StateError::Unsafe { remedy, .. } = &error { remedy.clone() } else { String::new() };
                Some(Unsafe { error: error.to_string(), remedy })
            }
            Err(StateError::Kernel { .. }) | Ok(()) => None,
        }
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
