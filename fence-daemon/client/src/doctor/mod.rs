//! `fence-daemon doctor`: checks everything that a fence needs, and prints the command against each
//! problem.
//!
//! Each check separates looking from judging. Looking reads `/proc`, `/sys` and the control socket,
//! or runs a program with a time limit. Judging is plain code over the result. The doctor changes
//! nothing. What it cannot find out is unknown, never ok.

pub mod bridge;
pub mod cluster;
pub mod daemon;
pub mod defaults;
pub mod exchange;
pub mod finding;
pub mod firewall;
pub mod guest;
pub mod host;
pub mod interface;
pub mod key;
pub mod libvirt;
mod line;
pub mod page;
pub mod port;
pub mod program;
pub mod sight;
pub mod ways;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use fence_common::wire::DEFAULT_PORT;
use fence_config::{
    self as config, Backend, Config, ConfigError, DEFAULT_STATE_DIRECTORY, Doubt, Listener, Multicast, TcpAddress,
};
use fence_control::client;
use fence_control::report::Report;

use self::finding::{Diagnosis, Finding, Side, State};
use self::firewall::Traffic;
use crate::probe::Probe;
use crate::screen;

/// The exit code if something is wrong.
pub const EXIT_WRONG: u8 = 1;

/// The doctor's options.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Whether it runs in a guest.
    pub from_guest: bool,
    /// A guest's key, if not in its usual place.
    pub key: Option<PathBuf>,
    /// Where a guest asks by tcp, if not at its gateway.
    pub tcp: Vec<(IpAddr, Option<u16>)>,
    /// The host that a guest asks by vsock, if it does.
    pub vsock: Option<u32>,
    /// The device of the serial line that a guest asks by, if it does.
    pub serial: Option<PathBuf>,
    /// Whether the output is JSON.
    pub json: bool,
}

/// Runs all checks, prints the findings, and returns the exit code.
#[must_use]
pub fn run(config: &Path, options: &Options, probe: &dyn Probe) -> u8 {
    let diagnosis = if options.from_guest {
        Diagnosis::new(Side::Guest, guest::check(config, options))
    } else {
        Diagnosis::new(Side::Hypervisor, hypervisor(config, probe))
    };
    let text = match serde_json::to_string(&diagnosis) {
        Ok(json) if options.json => format!("{json}\n"),
        _ => page::render(&diagnosis, screen::screen()),
    };
    let is_right = screen::print(&text) && diagnosis.verdict != State::Wrong;
    if is_right { 0 } else { EXIT_WRONG }
}

/// The checks of a hypervisor, in the order of a request's way.
fn hypervisor(path: &Path, probe: &dyn Probe) -> Vec<Finding> {
    let mut findings: Vec<Finding> = host::privileges().into_iter().collect();
    let (config, told) = configuration(path);
    findings.extend(told);
    findings.extend(defaults::check());
    let state = config.as_ref().and_then(|config| config.hypervisor.state.clone());
    let state = state.unwrap_or_else(|| PathBuf::from(DEFAULT_STATE_DIRECTORY));
    let answer = client::ask(&fence_control::path(&state)).and_then(|answer| client::parse(&answer));
    let pid = answer.as_ref().ok().map(|report| report.daemon.pid);
    let has_systemd = Path::new("/run/systemd/system").exists();

    if let Some(config) = &config {
        findings.extend(key::check_all(config));
    }
    findings.extend(daemon::check(&answer, has_systemd));
    findings.push(host::state_directory(&state, probe));
    let ports: BTreeSet<u16> = match &config {
        Some(config) => config.multicasts().map(|multicast| multicast.port).collect(),
        None => [DEFAULT_PORT].into(),
    };
    findings.extend(ports.into_iter().flat_map(|port| port::udp(port, pid)));
    let Some(config) = config else {
        findings.push(host::clock());
        findings.extend(host::kernel(pid));
        findings.extend(host::autostart());
        return findings;
    };

    for multicast in config.multicasts() {
        findings.extend(heard(multicast, answer.as_ref().ok(), probe));
    }
    let ask = || client::ask(&fence_control::path(&state)).and_then(|answer| client::parse(&answer)).ok();
    findings.extend(libvirt::check(&config.uris, &config.groups, probe, ask));
    if config.backend == Backend::Cpg {
        findings.extend(cluster::check(&config, answer.as_ref().ok(), probe));
    }
    if let Ok(report) = &answer {
        findings.extend(daemon::requests(report));
    }
    findings.push(host::clock());
    findings.extend(host::kernel(pid));
    findings.extend(host::autostart());
    findings
}

/// The checks of what one multicast listener hears. `report` is the running daemon's.
fn heard(multicast: &Multicast, report: Option<&Report>, probe: &dyn Probe) -> Vec<Finding> {
    let (seen, mut findings) = interface::check(multicast);
    findings.extend(interface::membership(multicast.group, &seen, report.is_some()));
    for seen in &seen {
        findings.extend(bridge::check(&seen.name));
        if multicast.group.is_ipv4() {
            findings.push(interface::rp_filter(&seen.name));
        }
    }
    let listener = report.and_then(|report| {
        report.listeners.iter().find(|listener| listener.is_multicast() && listener.name == multicast.name)
    });
    if let Some(listener) = listener {
        findings.extend(daemon::program(multicast.attach, listener, |interface| probe.obstacle(interface)));
    }
    for seen in &seen {
        let there = listener.and_then(|one| one.interfaces.iter().find(|there| seen.is_named(&there.name)));
        let attached = there.is_some_and(|there| there.program.is_some());
        findings
            .extend(firewall::hypervisor(&Traffic { seen, group: multicast.group, port: multicast.port }, attached));
    }
    findings
}

/// The configuration, if it is valid, and the findings about it. The key has its own check.
fn configuration(path: &Path) -> (Option<Config>, Vec<Finding>) {
    const CHECK: &str = "configuration";
    let (config, warnings) = match config::load(path) {
        Ok(loaded) => loaded,
        Err(error) => {
            let (remedy, command) = match &error {
                ConfigError::Unreadable { .. } => ("make one, or name another file with -f", "fence-daemon -c"),
                ConfigError::TooLarge { .. } | ConfigError::Key(_) | ConfigError::Mistakes(_) => (
                    "the daemon does not start with it: this shows the places, and what to write instead",
                    "fence-daemon check-config",
                ),
            };
            let command = format!("{command} -f {}", path.display());
            return (None, vec![Finding::wrong(CHECK, error.to_string(), remedy).command(command)]);
        }
    };
    let heard = |listener: &Listener| match listener {
        Listener::Multicast(multicast) => {
            let interface = multicast.interface.as_deref().unwrap_or("every interface");
            format!("{interface}, {} port {}", multicast.group, multicast.port)
        }
        Listener::Vsock(vsock) if vsock.by_systemd => "vsock at systemd's socket".to_owned(),
        Listener::Vsock(vsock) => format!("vsock port {}", vsock.port),
        Listener::Tcp(tcp) if tcp.address == TcpAddress::Systemd => format!("tcp at {}", tcp.address),
        Listener::Tcp(tcp) => format!("tcp at {} port {}", tcp.address, tcp.port),
        Listener::Serial(serial) => format!("serial lines in {}", serial.path.display()),
    };
    let heard: Vec<_> = config.listeners.iter().map(heard).collect();
    let mut findings = vec![Finding::ok(CHECK, format!("{}: {}", path.display(), heard.join("; ")))];
    for warning in &warnings {
        let place = warning.place().map(|place| format!("{place}: ")).unwrap_or_default();
        let (seen, help) = (format!("{place}{}", warning.doubt()), warning.doubt().help());
        findings.push(if matches!(warning.doubt(), Doubt::ConfigWritable { .. }) {
            Finding::warning(CHECK, seen, "who can change it can fence every guest").command(help)
        } else {
            Finding::warning(CHECK, seen, help)
        });
    }
    (Some(config), findings)
}
