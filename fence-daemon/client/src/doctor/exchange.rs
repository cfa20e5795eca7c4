//! Sends a real request from a guest by its own `fence_xvm`, and finds out how far it comes.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use fence_common::hash::HashKind;
use fence_common::words::counted;

use super::finding::Finding;
use super::program::{self, Said, Silence};
use super::sight;

/// The check's name.
pub const CHECK: &str = "exchange";

/// How long to wait for an answer, in seconds. It takes milliseconds, or on a busy host a second or
/// two.
const WAIT: u64 = 5;
/// How much longer `fence_xvm` may take to end.
const MORE: Duration = Duration::from_secs(20);

/// How a guest sends requests.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The multicast group.
    pub group: IpAddr,
    /// The port.
    pub port: u16,
    /// The datagram's digest.
    pub hash: HashKind,
    /// The callback's digest.
    pub auth: HashKind,
    /// The key's file.
    pub key_file: PathBuf,
}

impl Settings {
    /// The same settings as a command.
    #[must_use]
    pub fn command(&self) -> String {
        let mut words = vec!["fence_xvm".to_owned()];
        words.extend(self.arguments());
        words.join(" ")
    }

    /// A request that needs no key. It fences nobody.
    pub(super) fn list() -> Vec<String> {
        ["-o", "list", "-t"].map(str::to_owned).into_iter().chain([WAIT.to_string()]).collect()
    }

    /// What each way with a key needs.
    pub(super) fn common(&self) -> Vec<String> {
        let Self { hash, auth, key_file, .. } = self;
        let pairs = [
            ("-k", key_file.to_string_lossy().into_owned()),
            ("-c", hash.name().to_owned()),
            ("-C", auth.name().to_owned()),
        ];
        let pairs = pairs.into_iter().flat_map(|(option, value)| [option.to_owned(), value]);
        Self::list().into_iter().chain(pairs).collect()
    }

    fn arguments(&self) -> Vec<String> {
        let family = if self.group.is_ipv4() { "ipv4" } else { "ipv6" };
        let mut all = self.common();
        let pairs = [("-a", self.group.to_string()), ("-p", self.port.to_string()), ("-i", family.to_owned())];
        all.extend(pairs.into_iter().flat_map(|(option, value)| [option.to_owned(), value]));
        all
    }
}

/// A domain of the host list.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Row {
    name: String,
    uuid: String,
}

/// The identity of this guest.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Identity {
    host: String,
    /// UUIDs that may be the domain's: the machine's own, or the one that libvirt gives a
    /// container.
    uuids: Vec<String>,
}

/// Asks for a host list.
#[must_use]
pub fn check(settings: &Settings) -> Vec<Finding> {
    let mut arguments = settings.arguments();
    // The messages of fence_xvm tell how far it came.
    arguments.push("-ddd".to_owned());
    let begun = Instant::now();
    match program::run("fence_xvm", &arguments, Duration::from_secs(WAIT) + MORE) {
        Ok(said) => judge(&said, begun.elapsed(), &identity(), settings),
        // An earlier check reports that it is missing.
        Err(Silence::Missing(_)) => Vec::new(),
        Err(error) => vec![
            Finding::wrong(CHECK, error.to_string(), "fence_xvm waits longer than its limit: ask again by hand")
                .command(settings.command()),
        ],
    }
}

fn identity() -> Identity {
    let host = nix::unistd::gethostname().unwrap_or_default().to_string_lossy().into_owned();
    let environment = std::fs::read("/proc/1/environ").unwrap_or_default();
    let of_container = environment.split(|byte| *byte == 0).find_map(|entry| entry.strip_prefix(b"LIBVIRT_LXC_UUID="));
    let of_container = of_container.map(|uuid| String::from_utf8_lossy(uuid).into_owned());
    // In a container that file is the host's.
    let of_machine = || sight::text("/sys/class/dmi/id/product_uuid");
    Identity { host, uuids: of_container.or_else(of_machine).into_iter().collect() }
}

fn judge(said: &Said, took: Duration, identity: &Identity, settings: &Settings) -> Vec<Finding> {
    let words = format!("{}{}", said.stdout, said.stderr);
    if said.code == Some(0) {
        let rows = rows(&said.stdout);
        let millis = took.as_millis();
        let seen = format!("answered within {millis} ms, with a list of {}", counted(rows.len(), "domain"));
        return vec![Finding::ok(CHECK, seen), own(&rows, identity)];
    }
    if words.contains("hallenge") {
        let remedy = "the callback came and the authentication failed: fence_xvm's `-C` (`auth` in Pacemaker) differs from `auth` in the host's \
                      fence_virt.conf, or the host has answered with another key: compare fingerprints with `fence-daemon doctor` there";
        return vec![
            Finding::wrong(CHECK, "called back, and the exchange failed", remedy).command(settings.command() + " -ddd"),
        ];
    }
    let remedy = format!(
        "nobody called back within {WAIT} s. If nothing above is wrong it is one of these, and `fence-daemon doctor` on the hypervisor says which: \
         the daemon does not run; it listens on another interface; its key is another one (compare fingerprints); it demands a stronger digest than \
         {}; its firewall drops requests or callbacks; `strict_source` and a NAT between the two",
        settings.hash.name()
    );
    vec![Finding::wrong(CHECK, "no callback", remedy).command("fence-daemon doctor")]
}

/// How many domains a list has.
#[must_use]
pub(super) fn domains(list: &str) -> usize {
    rows(list).len()
}

/// Looks for this guest in a list.
#[must_use]
pub(super) fn own_name(list: &str) -> Finding {
    own(&rows(list), &identity())
}

/// Parses the list: each line has a domain's name, UUID and state.
fn rows(list: &str) -> Vec<Row> {
    let row = |line: &str| {
        let mut words = line.split_whitespace().rev();
        let (state, uuid) = (words.next()?, words.next()?);
        let uuid = uuid::Uuid::try_parse(uuid).ok()?.to_string();
        let is_row = matches!(state, "on" | "off");
        // A name may contain blanks.
        let name = line.split(&uuid).next()?.trim().to_owned();
        is_row.then_some(Row { name, uuid })
    };
    list.lines().filter_map(row).collect()
}

fn own(rows: &[Row], identity: &Identity) -> Finding {
    const CHECK: &str = "own name";
    let Identity { host, uuids } = identity;
    if rows.is_empty() {
        let remedy = "this guest may fence nobody: with `groups` in the host's fence_virt.conf its address must be an `ip` of a group; without, \
                      libvirt there has no domains";
        return Finding::warning(CHECK, "the list is empty", remedy);
    }
    let short = host.split('.').next().unwrap_or_default();
    let by_uuid = rows.iter().find(|row| uuids.iter().any(|uuid| uuid.eq_ignore_ascii_case(&row.uuid)));
    let by_name = rows.iter().find(|row| row.name == *host || row.name == short);
    match (by_name, by_uuid) {
        (Some(row), Some(same)) if row == same => {
            Finding::ok(CHECK, format!("this guest is the domain {}, as its host name says", row.name))
        }
        (Some(row), Some(other)) => {
            let seen = format!(
                "this host is called {host}, and the domain {} is another one: this guest is {}",
                row.name, other.name
            );
            let remedy = "a fence by its host name kills the other one: map it in Pacemaker";
            Finding::wrong(CHECK, seen, remedy).command(map(host, &other.name))
        }
        (Some(row), None) => Finding::ok(CHECK, format!("there is a domain of this host's name: {}", row.name)),
        (None, Some(row)) => {
            let remedy = "if the cluster's node has the host's name, map the node to its domain in Pacemaker";
            Finding::warning(CHECK, format!("this guest ({host}) is the domain {}", row.name), remedy)
                .command(map(host, &row.name))
        }
        (None, None) => {
            let names: Vec<_> = rows.iter().map(|row| row.name.as_str()).take(8).collect();
            let remedy = format!(
                "its domain has another name (which? there are {}), is on another hypervisor, or is in no group with this address: where names \
                 differ Pacemaker needs `pcmk_host_map=\"NODE:DOMAIN\"`",
                names.join(", ")
            );
            Finding::warning(CHECK, format!("no domain is called {host}"), remedy)
        }
    }
}

fn map(host: &str, domain: &str) -> String {
    format!("pcs stonith update DEVICE pcmk_host_map=\"{host}:{domain}\"")
}

#[cfg(test)]
mod tests {
    use super::super::finding::State;
    use super::*;

    const LIST: &str = "node1                            4417ce60-1b43-4d3a-8f0e-95d6c2f0e0b1 on\n\
        my node                          5517ce60-1b43-4d3a-8f0e-95d6c2f0e0b1 off\n";

    fn settings() -> Settings {
        let auth = HashKind::Sha256;
        Settings { group: IpAddr::from([225, 0, 0, 12]), port: 1229, hash: auth, auth, key_file: "/k".into() }
    }

    fn state(code: i32, stdout: &str, stderr: &str) -> State {
        let said = Said { code: Some(code), stdout: stdout.to_owned(), stderr: stderr.to_owned() };
        judge(&said, Duration::from_millis(7), &Identity::default(), &settings())[0].state
    }

    #[test]
    fn each_outcome_of_an_exchange_has_its_own_finding() {
        assert_eq!(state(0, LIST, ""), State::Ok);
        assert_eq!(
            state(1, "Waiting for connection from XVM host daemon.\n", "Timed out waiting for response\n"),
            State::Wrong
        );
        assert_eq!(state(1, "Issuing TCP challenge\n", ""), State::Wrong);
        let came = Said { code: Some(1), stdout: "Issuing TCP challenge\n".to_owned(), stderr: String::new() };
        let came = judge(&came, Duration::ZERO, &Identity::default(), &settings());
        assert!(came[0].seen.contains("called back"), "{came:?}");
        assert!(came[0].commands[0].starts_with("fence_xvm -o list -t 5 -k /k "), "{came:?}");
    }

    #[test]
    fn the_guest_is_found_in_the_list_by_uuid_or_name() {
        let rows = rows(LIST);
        assert_eq!(rows.iter().map(|row| row.name.as_str()).collect::<Vec<_>>(), ["node1", "my node"]);
        let who = |host: &str, uuid: Option<&str>| {
            let uuids = uuid.map(|start| format!("{start}17CE60-1b43-4d3a-8f0e-95d6c2f0e0b1")).into_iter().collect();
            let finding = own(&rows, &Identity { host: host.to_owned(), uuids });
            (finding.state, finding.commands)
        };
        assert_eq!(who("node1.example.com", Some("44")).0, State::Ok);
        assert_eq!(who("node1", None).0, State::Ok);
        assert_eq!(who("node1", Some("99")).0, State::Ok);
        assert_eq!(who("other", None).0, State::Warning);
        let mapped = vec!["pcs stonith update DEVICE pcmk_host_map=\"other:my node\"".to_owned()];
        assert_eq!(who("other", Some("55")), (State::Warning, mapped));
        assert_eq!(who("node1", Some("55")).0, State::Wrong, "it would kill another");
        assert_eq!(own(&[], &Identity::default()).state, State::Warning);
    }
}
