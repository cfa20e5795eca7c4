//! The commands of `fence-daemon`: it becomes this program for all that is not the daemon itself
//! (the library's `commands`).

use std::env;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use fence_client::cli::{self, Action, Cli, OneRecord};
use fence_client::history::{self, Query};
use fence_client::probe::{Domain, NoRing, Obstacle, Probe, Ring, RingNode, Unanswered, Unsafe};
use fence_client::{check_config, configure, doctor, drop_in, keygen, screen, status, top};
use fence_common::exit::{EXIT_START, EXIT_USAGE};
use fence_daemon::hosts::corosync::look::{self, NoLook};
use fence_daemon::hypervisor::{self, CallError};
use fence_daemon::intake::kernel::{KernelProgram, Occupant};
use fence_daemon::process;
use fence_daemon::state::{self, StateError};
use fence_net::interface::Interface;

/// How many files must be able to be open: the usual limit is enough.
const OPEN_FILES: u64 = 0;

fn main() -> ExitCode {
    let cli = match Cli::read(env::args_os()) {
        Ok(cli) => cli,
        Err(message) => {
            // If even that cannot be written, nothing else can be done.
            let _ = message.print();
            return ExitCode::from(cli::exit_code(&message));
        }
    };
    // Before any key is read or created, so that none ends up in a core dump.
    if let Err(error) = process::harden(OPEN_FILES) {
        screen::complain(format_args!("fence-daemon: {error}"));
        return ExitCode::from(EXIT_START);
    }
    ExitCode::from(match &cli.command {
        Some(Action::CheckConfig) => check_config::run(&cli.config, &ThisHost),
        Some(Action::DropIn) => drop_in::run(&cli.config),
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
        Some(Action::History { one: Some(OneRecord::Show { id, json }), .. }) => history::show(&cli.config, *id, *json),
        Some(Action::History { since, domain, source, failed, json, one: None }) => {
            let (domain, source) = (domain.clone(), source.clone());
            history::run(&cli.config, &Query { since: *since, domain, source, failed: *failed }, *json)
        }
        Some(Action::Top) => top::run(&cli.config),
        None if cli.list => u8::from(!screen::print(&cli::list())) * EXIT_START,
        None if cli.configure => configure::run(&cli.config, &cli.given),
        None => {
            screen::complain("fence-daemon: these are options of the daemon: start it by `fence-daemon`");
            EXIT_USAGE
        }
    })
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

    fn ring(&self, within: Duration) -> Result<Ring, NoRing> {
        let looked = look::look(within).map_err(|error| match error {
            NoLook::NoLibrary(why) => NoRing::NoLibrary(why),
            NoLook::Failed(why) => NoRing::Failed(why),
            NoLook::Overdue => NoRing::Overdue,
        })?;
        let look::CorosyncLook { ours, has_provider, quorate, hosts, seen } = looked;
        let nodes = hosts.into_iter().map(|host| RingNode { id: host.node, name: host.name }).collect();
        Ok(Ring { ours, has_provider, quorate, nodes, seen })
    }
}
