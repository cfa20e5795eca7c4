//! The checks of a guest: what `fence_xvm` needs there.

use std::net::{IpAddr, Ipv6Addr, SocketAddr, UdpSocket};
use std::path::Path;
use std::time::Duration;

use nix::ifaddrs::getifaddrs;

use super::exchange::{self, Settings};
use super::finding::Finding;
use super::firewall::{self, Traffic};
use super::interface::{self, Seen};
use super::{host, key, port, program};
use crate::config::{self, DEFAULT_GROUP_V4, DEFAULT_KEY_FILE, DEFAULT_PORT};
use fence_common::hash::HashKind;

/// How long `fence_xvm -V` may take.
const VERSION: Duration = Duration::from_secs(10);

/// All of them. `config` counts where it was named; else all is as `fence_xvm` has it by default.
#[must_use]
pub fn check(config: &Path, key_file: Option<&Path>) -> Vec<Finding> {
    let mut findings: Vec<Finding> = host::privileges().into_iter().collect();
    let (settings, told) = settings(config, key_file);
    findings.extend(told);
    findings.push(fence_xvm());
    if settings.hash != HashKind::None || settings.auth != HashKind::None {
        findings.extend(key::check("key", &settings.key_file));
    }
    let (seen, route) = route(settings.group);
    findings.push(route);
    findings.push(port::tcp(settings.port));
    if let Some(seen) = &seen {
        findings.extend(firewall::guest(&Traffic { seen, group: settings.group, port: settings.port }));
    }
    findings.push(host::clock());
    findings.extend(exchange::check(&settings));
    findings
}

fn settings(config: &Path, key_file: Option<&Path>) -> (Settings, Option<Finding>) {
    let defaults = Settings {
        group: DEFAULT_GROUP_V4.into(),
        port: DEFAULT_PORT,
        hash: HashKind::Sha256,
        auth: HashKind::Sha256,
        key_file: DEFAULT_KEY_FILE.into(),
    };
    // A guest has none; one in the usual place came with a package, and fence_xvm does not read it.
    let named = (config != Path::new(config::DEFAULT_PATH)).then(|| config::load(config));
    let (mut settings, told) = match named {
        None => (defaults, None),
        Some(Ok((config, _))) => {
            let config::Multicast { group, port, hash, auth, key_file, .. } = config.multicast;
            (Settings { group, port, hash, auth, key_file }, None)
        }
        Some(Err(error)) => {
            let told =
                Finding::wrong("configuration", error.to_string(), "without -f all is as fence_xvm has it by default");
            (defaults, Some(told))
        }
    };
    if let Some(key_file) = key_file {
        settings.key_file = key_file.to_owned();
    }
    (settings, told)
}

fn fence_xvm() -> Finding {
    const CHECK: &str = "fence_xvm";
    match program::run("fence_xvm", &["-V"], VERSION) {
        Ok(said) if said.code == Some(0) => Finding::ok(CHECK, said.stdout.lines().collect::<Vec<_>>().join(", ")),
        Ok(said) => Finding::wrong(CHECK, format!("it does not run: {}", said.first_line()), "install it anew")
            .command("apt-get install --reinstall fence-virt"),
        Err(error) => Finding::wrong(
            CHECK,
            error.to_string(),
            "Pacemaker cannot fence by it from here: install it (Debian: fence-virt)",
        )
        .command("apt-get install fence-virt"),
    }
}

/// By which interface requests go: where the kernel would send them.
fn route(group: IpAddr) -> (Option<Seen>, Finding) {
    const CHECK: &str = "route";
    let v4 = group.is_ipv4();
    let any: IpAddr = if v4 { [0, 0, 0, 0].into() } else { Ipv6Addr::UNSPECIFIED.into() };
    // Nothing is sent: connecting a datagram socket only has the kernel look for the way.
    let from = UdpSocket::bind((any, 0)).and_then(|socket| {
        socket.connect(SocketAddr::new(group, DEFAULT_PORT))?;
        socket.local_addr()
    });
    let from = match from {
        Ok(from) => from.ip(),
        Err(error) => {
            let net = if v4 { "224.0.0.0/4" } else { "ff00::/8" };
            let remedy = "requests go nowhere: give multicast a way out of the interface that the hypervisor is behind";
            let finding = Finding::wrong(CHECK, format!("no route to {group}: {error}"), remedy);
            return (None, finding.command(format!("ip route add {net} dev eth0")));
        }
    };
    let seen = interface_of(from).and_then(|name| interface::look(&name, v4));
    let finding = match &seen {
        Some(seen) if seen.name == "lo" || !seen.multicast => {
            let remedy = "requests do not leave this guest: give multicast a way out of the interface that the hypervisor is behind";
            Finding::wrong(CHECK, format!("{group} goes to {}, which cannot multicast", seen.name), remedy)
                .command("ip route add 224.0.0.0/4 dev eth0")
        }
        Some(seen) => Finding::ok(CHECK, format!("requests to {group} leave by {} ({from})", seen.name)),
        None => Finding::unknown(
            CHECK,
            format!("requests to {group} leave from {from}"),
            "which interface that is cannot be told: `ip route get` knows",
        ),
    };
    (seen, finding)
}

fn interface_of(address: IpAddr) -> Option<String> {
    let is_it = |own: &nix::ifaddrs::InterfaceAddress| {
        own.address.is_some_and(|own| match address {
            IpAddr::V4(address) => own.as_sockaddr_in().is_some_and(|own| own.ip() == address),
            IpAddr::V6(address) => own.as_sockaddr_in6().is_some_and(|own| own.ip() == address),
        })
    };
    getifaddrs().into_iter().flatten().find(is_it).map(|own| own.interface_name)
}
