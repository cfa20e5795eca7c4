//! `fence-daemon` of the package for cluster nodes. A guest has neither the daemon nor libvirt, so
//! it can check itself, and nothing else.

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use fence_client::cli::{self, Action, Cli};
use fence_client::probe::{Domain, NoRing, Obstacle, Probe, Ring, Unanswered, Unsafe};
use fence_client::{doctor, screen};
use fence_common::exit::EXIT_USAGE;

const NOT_HERE: &str = "fence-daemon: this is the package for cluster nodes, which has `fence-daemon doctor --from-guest` \
    alone. The daemon and its other commands are in the package fence-xdp, for hypervisors";

fn main() -> ExitCode {
    let cli = match Cli::read(std::env::args_os()) {
        Ok(cli) => cli,
        Err(message) => {
            // If even that cannot be written, nothing else can be done.
            let _ = message.print();
            return ExitCode::from(cli::exit_code(&message));
        }
    };
    let Some(Action::Doctor { from_guest: true, key, tcp, vsock, serial, json }) = cli.command else {
        screen::complain(NOT_HERE);
        return ExitCode::from(EXIT_USAGE);
    };
    let options = doctor::Options { from_guest: true, key, tcp, vsock, serial, json };
    ExitCode::from(doctor::run(&cli.config, &options, &NoHypervisor))
}

/// A guest's answers about a hypervisor: none.
struct NoHypervisor;

impl Probe for NoHypervisor {
    fn domains(&self, _: &[String], _: Duration) -> Vec<(String, Result<Vec<Domain>, Unanswered>)> {
        Vec::new()
    }

    fn obstacle(&self, _: &str) -> Option<Obstacle> {
        None
    }

    fn state_directory(&self, _: &Path) -> Option<Unsafe> {
        None
    }

    fn ring(&self, _: Duration) -> Result<Ring, NoRing> {
        Err(NoRing::Failed("a guest is no host of a cluster of hypervisors".to_owned()))
    }
}
