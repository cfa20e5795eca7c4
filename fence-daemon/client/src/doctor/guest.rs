//! Checks what `fence_xvm` needs in a guest.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, UdpSocket};
use std::path::Path;
use std::time::Duration;

use fence_common::hash::HashKind;
use fence_common::wire::{DEFAULT_GROUP_V4, DEFAULT_PORT};
use fence_config::{self as config, DEFAULT_KEY_FILE};
use fence_net::interface::{Interface, Wanted};
use nix::ifaddrs::getifaddrs;

use super::exchange::{self, Settings};
use super::finding::{Finding, State};
use super::firewall::{self, Traffic};
use super::interface::{self, InterfaceFacts};
use super::{Options, host, key, port, program, ways};

/// How long `fence_xvm -V` may take.
const VERSION: Duration = Duration::from_secs(10);

/// Runs all checks. Without an explicit `config` the defaults of `fence_xvm` apply.
#[must_use]
pub fn check(config: &Path, options: &Options) -> Vec<Finding> {
    let mut findings: Vec<Finding> = host::privileges().into_iter().collect();
    let (settings, told) = settings(config, options.key.as_deref());
    findings.extend(told);
    findings.push(fence_xvm());
    if settings.hash != HashKind::None || settings.auth != HashKind::None {
        findings.extend(key::check(KEY, &settings.key_file));
    }
    let (seen, told) = interfaces(settings.group);
    findings.push(told);
    findings.push(port::tcp(settings.port));
    let exchange = exchange::check(&settings);
    if exchange.iter().any(|finding| finding.check == exchange::CHECK && finding.state == State::Ok) {
        // An answered request proves that the firewall is open: its rules need no reading.
        findings.push(Finding::ok(firewall::CHECK, "lets requests and callbacks through: one was answered"));
    } else {
        for seen in &seen {
            findings.extend(firewall::guest(&Traffic { seen, group: settings.group, port: settings.port }));
        }
    }
    findings.push(host::clock());
    findings.extend(exchange);
    let others = ways::chosen(options, settings.port);
    let others = ways::check(&others, &settings, &mut findings);
    findings.extend(others);
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
    // A guest has no configuration. One in the usual place came with a package, and fence_xvm does
    // not read it.
    let named = (config != Path::new(config::DEFAULT_PATH)).then(|| config::load(config));
    let (mut settings, told) = match named {
        None => (defaults, None),
        Some(Ok((config, _))) => match config.multicast().cloned() {
            Some(config::Multicast { group, port, hash, auth, key_file, .. }) => {
                (Settings { group, port, hash, auth, key_file }, None)
            }
            None => {
                let seen = "the file has no multicast listener, by which fence_xvm asks";
                let remedy = "the checks use fence_xvm's defaults";
                (defaults, Some(Finding::warning("configuration", seen, remedy)))
            }
        },
        Some(Err(error)) => {
            let told =
                Finding::wrong("configuration", error.to_string(), "without -f the checks use fence_xvm's defaults");
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
        Ok(said) => Finding::wrong(CHECK, format!("it does not run: {}", said.first_line()), "install it again")
            .command("apt-get install --reinstall fence-virt"),
        Err(error) => Finding::wrong(
            CHECK,
            error.to_string(),
            "Pacemaker cannot fence by it from here: install it (Debian: fence-virt)",
        )
        .command("apt-get install fence-virt"),
    }
}

/// The interfaces that requests leave by. For IPv4 `fence_xvm` sends from each address of the
/// guest, regardless of routes. For IPv6 the route decides.
fn interfaces(group: IpAddr) -> (Vec<InterfaceFacts>, Finding) {
    let names: BTreeSet<String> = match group {
        IpAddr::V4(_) => Wanted::Suitable(group).there().into_iter().map(|present| present.interface.name).collect(),
        IpAddr::V6(_) => match routed(group) {
            Ok(from) => interface_of(from).into_iter().collect(),
            Err(error) => {
                let remedy =
                    "requests go nowhere: give multicast a way out of the interface that the hypervisor is behind";
                let finding = Finding::wrong(ROUTE, format!("no route to {group}: {error}"), remedy);
                return (Vec::new(), finding.command("ip -6 route add multicast ff00::/8 dev eth0 table local"));
            }
        },
    };
    let seen: Vec<_> = names.iter().filter_map(|name| interface::look(name, group.is_ipv4())).collect();
    let finding = judge_ways(group, &seen);
    (seen, finding)
}

/// The check's name.
pub(super) const ROUTE: &str = "route";
/// The name of the key's check.
pub(super) const KEY: &str = "key";

fn judge_ways(group: IpAddr, seen: &[InterfaceFacts]) -> Finding {
    if seen.iter().all(|seen| seen.name == "lo" || !seen.up || !seen.multicast || seen.networks.is_empty()) {
        let family = if group.is_ipv4() { "IPv4" } else { "IPv6" };
        let remedy = "requests do not leave this guest: switch its interface on and give it an address of the hypervisor's network, and \
                      `multicast on` if it lacks MULTICAST";
        return Finding::wrong(ROUTE, format!("no interface is up, can multicast and has an {family} address"), remedy)
            .command("ip address show");
    }
    let way = |seen: &InterfaceFacts| {
        let addresses: Vec<_> = seen.networks.iter().map(|network| network.addr().to_string()).collect();
        format!("{} ({})", seen.name, addresses.join(", "))
    };
    let ways: Vec<_> = seen.iter().map(way).collect();
    Finding::ok(ROUTE, format!("requests to {group} leave by {}", ways.join(", ")))
}

/// The source address of packets to the group, by the kernel's routes. Nothing is sent.
fn routed(group: IpAddr) -> std::io::Result<IpAddr> {
    let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0))?;
    socket.connect(SocketAddr::new(group, DEFAULT_PORT))?;
    socket.local_addr().map(|from| from.ip())
}

fn interface_of(address: IpAddr) -> Option<String> {
    let is_it = |own: &nix::ifaddrs::InterfaceAddress| {
        own.address.is_some_and(|own| match address {
            IpAddr::V4(address) => own.as_sockaddr_in().is_some_and(|own| own.ip() == address),
            IpAddr::V6(address) => own.as_sockaddr_in6().is_some_and(|own| own.ip() == address),
        })
    };
    let own = getifaddrs().into_iter().flatten().find(is_it)?;
    Interface::meant_by(&own.interface_name).map(|interface| interface.name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_needs_one_way_out() {
        let group = IpAddr::from([225, 0, 0, 12]);
        let networks = vec!["192.168.122.11/24".parse().unwrap()];
        let eth0 =
            InterfaceFacts { name: "eth0".to_owned(), up: true, running: true, multicast: true, networks, taker: None };
        let down = InterfaceFacts { up: false, ..eth0.clone() };
        assert_eq!(judge_ways(group, &[]).state, State::Wrong);
        assert_eq!(judge_ways(group, std::slice::from_ref(&down)).state, State::Wrong);
        let told = judge_ways(group, &[down, eth0]);
        assert!(told.state == State::Ok && told.seen.contains("eth0 (192.168.122.11)"), "{told:?}");
    }

    #[test]
    fn a_named_configuration_counts_and_the_usual_one_does_not() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("conf");
        let text = "fence_virtd { listener = \"multicast\"; backend = \"libvirt\"; } \
                    listeners { multicast { port = \"7\"; key_file = \"/k\"; hash = \"sha512\"; } }";
        std::fs::write(&file, text).unwrap();
        let (found, told) = settings(&file, None);
        assert_eq!((found.port, found.key_file.as_path(), told), (7, Path::new("/k"), None));
        assert_eq!(settings(&file, Some(Path::new("/other"))).0.key_file, Path::new("/other"));
        assert_eq!(settings(Path::new(config::DEFAULT_PATH), None).0.key_file, Path::new(DEFAULT_KEY_FILE));
        let (found, told) = settings(&dir.path().join("none"), None);
        assert_eq!((found.port, told.map(|told| told.state)), (1229, Some(State::Wrong)));
    }
}
