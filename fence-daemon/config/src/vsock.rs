//! Section `listeners { vsock { } }`: where virtual machines connect to without a network.

use fence_common::hash::HashKind;

use super::contents::{Contents, Findings, Scope};
use super::listener::{digest, port};
use super::listeners::KeyFiles;
use super::resolved::NOTHING;
use super::tcp::{exam, key_files, socket};

pub(super) const VSOCK: Scope<'static> =
    Scope { keys: &["key_file", "key_file2", "port", "socket", "hash", "auth"], ..NOTHING };

/// Section `listeners { vsock { } }`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vsock {
    /// The name of the section; `None` for the one that fence_virtd knows.
    pub name: Option<String>,
    /// The port, never 0.
    pub port: u16,
    /// Whether systemd opens the socket, at whichever port.
    pub by_systemd: bool,
    /// The weakest digest that a request may carry.
    pub hash: HashKind,
    /// The files of its key.
    pub keys: KeyFiles,
}

/// Reads the section of this name. `plain` has the key files of the multicast section without a
/// name, which count if this section names none.
pub(super) fn vsock(
    name: Option<String>,
    section: &Contents<'_>,
    plain: Option<&KeyFiles>,
    findings: &mut Findings<'_>,
) -> Vsock {
    exam(section, findings);
    Vsock {
        name,
        by_systemd: socket(section, &["port"], findings),
        port: port(section, findings),
        hash: digest("hash", section, findings),
        keys: key_files(section, plain, findings),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use crate::{Attach, Config, ConfigError, Groups, KeyFiles, Listener, Mistake, Source, Warnings, parse};

    use super::*;

    fn read(listener: &str, rest: &str) -> Result<(Config, Warnings), Vec<Mistake>> {
        let text = format!("fence_virtd {{ listener = \"{listener}\"; backend = \"libvirt\"; }}\n{rest}");
        match parse(&Source::new(Path::new("f"), text.as_bytes()), Warnings::default()) {
            Err(ConfigError::Mistakes(mistakes)) => Err(mistakes.iter().map(|(_, mistake)| mistake.clone()).collect()),
            other => Ok(other.unwrap()),
        }
    }

    #[test]
    fn it_serves_alone_and_beside_others_with_defaults_and_with_each_key() {
        let default = KeyFiles { first: "/etc/cluster/fence_xvm.key".into(), second: None };
        let plain = Vsock { name: None, port: 1229, by_systemd: false, hash: HashKind::Sha256, keys: default };
        let (config, warnings) = read("VSOCK", "").unwrap();
        assert!(warnings.is_empty() && config.listeners == [Listener::Vsock(plain.clone())]);
        let all = "listeners { multicast { key_file = \"/m\"; } vsock { port = \"9\"; hash = \"sha512\"; auth = \"sha256\"; \
                   key_file = \"/k\"; key_file2 = \"/k2\"; } vsock = \"b\" { } }";
        let (config, _) = read("multicast,vsock", all).unwrap();
        let keys = KeyFiles { first: "/k".into(), second: Some("/k2".into()) };
        let named =
            Vsock { name: Some("b".into()), keys: KeyFiles { first: "/m".into(), second: None }, ..plain.clone() };
        let own = Vsock { name: None, port: 9, by_systemd: false, hash: HashKind::Sha512, keys };
        assert_eq!(config.listeners[1..], [Listener::Vsock(own), Listener::Vsock(named)]);
        assert!(read("vsock", "listeners { vsock { } vsock = \"b\" { } }").is_err(), "one port for two");
        let opened = "listeners { vsock { socket = \"systemd\"; } vsock \"b\" { socket = \"systemd\"; } }";
        let (config, _) = read("vsock", opened).unwrap();
        assert!(config.listeners.iter().all(|one| matches!(one, Listener::Vsock(vsock) if vsock.by_systemd)));
        assert!(read("vsock", "listeners { vsock { socket = \"systemd\"; port = \"9\"; } }").is_err());
        assert!(read("vsock", "listeners { vsock { auth = \"sha1\"; } }").is_err());
        assert!(read("vsock", "listeners { vsock { port = \"70000\"; } }").is_err());
    }

    #[test]
    fn a_number_is_a_guest_where_vsock_is_chosen_and_a_mistake_elsewhere() {
        let groups =
            "groups { group { ip = \"7\"; ip = \"192.0.2.1\"; from = \"node1\"; uuid = \"a\"; key_file = \"/g\"; } }";
        let (config, warnings) = read("multicast,vsock", groups).unwrap();
        assert!(warnings.is_empty(), "{}", warnings.render(false));
        assert_eq!(config.multicast().unwrap().attach, Attach::Off);
        let Groups::Only(groups) = config.groups else { panic!("no groups") };
        assert_eq!((groups[0].cids.as_slice(), groups[0].ips.len(), groups[0].from.len()), (&[7][..], 1, 1));
        for (listener, ip) in
            [("multicast", "7"), ("tcp", "7"), ("vsock", "-1"), ("vsock", "4294967296"), ("vsock", "x")]
        {
            let groups = format!("groups {{ group {{ ip = \"{ip}\"; uuid = \"a\"; }} }}");
            assert_eq!(read(listener, &groups).unwrap_err(), [Mistake::MemberAddress(ip.into())], "{listener}");
        }
    }
}
