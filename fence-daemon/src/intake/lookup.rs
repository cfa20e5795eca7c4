//! Looks up the addresses of a host name, by the resolver of the C library. Such a call can take
//! half a minute and cannot be stopped, so each has a thread of its own.

use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::thread;

use tokio::sync::oneshot;

/// How many addresses of a name count. Each costs a socket.
const ADDRESSES_MAX: usize = 16;

/// The stack of the thread: it is locked in memory, and the resolver's buffers fit.
const STACK: usize = 256 * 1024;

/// Why a name has no addresses.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum NoAddresses {
    /// The resolver said so, or did not answer.
    #[error("{name} cannot be looked up: {why}")]
    Unknown { name: String, why: String },
    /// It has addresses of the other family only.
    #[error("{name} has no {family} address")]
    OtherFamily { name: String, family: &'static str },
}

/// A look-up under way.
pub(super) type Lookup = oneshot::Receiver<Result<Vec<SocketAddr>, NoAddresses>>;

/// Begins to look up a name. `is_v4` is the family that counts, if one does.
pub(super) fn begin(name: &str, port: u16, is_v4: Option<bool>) -> Lookup {
    let (found, lookup) = oneshot::channel();
    let name = name.to_owned();
    let begun = thread::Builder::new().name("lookup".to_owned()).stack_size(STACK).spawn(move || {
        // Nobody waits for it while the daemon stops.
        let _ = found.send(look_up(&name, port, is_v4));
    });
    if let Err(error) = begun {
        // The receiver notices that there is no sender any more.
        tracing::debug!("no thread for a look-up: {error}");
    }
    lookup
}

/// The result of a look-up.
pub(super) async fn found(lookup: &mut Lookup, name: &str) -> Result<Vec<SocketAddr>, NoAddresses> {
    let no_thread = || NoAddresses::Unknown { name: name.to_owned(), why: "no thread could be started".to_owned() };
    lookup.await.unwrap_or_else(|_| Err(no_thread()))
}

fn look_up(name: &str, port: u16, is_v4: Option<bool>) -> Result<Vec<SocketAddr>, NoAddresses> {
    let all = (name, port).to_socket_addrs().map_err(|error| {
        let text = error.to_string();
        let why = text.strip_prefix("failed to lookup address information: ").unwrap_or(&text).to_owned();
        NoAddresses::Unknown { name: name.to_owned(), why }
    })?;
    of_family(name, all, is_v4)
}

/// Those of the family, each once.
fn of_family(
    name: &str,
    all: impl Iterator<Item = SocketAddr>,
    is_v4: Option<bool>,
) -> Result<Vec<SocketAddr>, NoAddresses> {
    let mut found: Vec<SocketAddr> = Vec::new();
    for address in all.filter(|address| is_v4.is_none_or(|v4| v4 == address.is_ipv4())) {
        if found.len() < ADDRESSES_MAX && !found.contains(&address) {
            found.push(address);
        }
    }
    let family = match is_v4 {
        Some(true) => "IPv4",
        Some(false) => "IPv6",
        None => "IP",
    };
    if found.is_empty() { Err(NoAddresses::OtherFamily { name: name.to_owned(), family }) } else { Ok(found) }
}

/// Whether only this host itself can connect to any of them.
pub(super) fn are_of_this_host_only(addresses: &[SocketAddr]) -> bool {
    addresses.iter().map(SocketAddr::ip).all(|ip: IpAddr| ip.to_canonical().is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addresses(texts: &[&str]) -> Vec<SocketAddr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn each_address_of_the_family_counts_once() {
        let all = || addresses(&["192.0.2.1:7", "192.0.2.1:7", "[fd00::1]:7", "192.0.2.2:7"]).into_iter();
        let of = |is_v4| of_family("host", all(), is_v4).unwrap();
        assert_eq!(of(None), addresses(&["192.0.2.1:7", "[fd00::1]:7", "192.0.2.2:7"]));
        assert_eq!(of(Some(true)), addresses(&["192.0.2.1:7", "192.0.2.2:7"]));
        assert_eq!(of(Some(false)), addresses(&["[fd00::1]:7"]));
        let lacking = of_family("host", addresses(&["192.0.2.1:7"]).into_iter(), Some(false)).unwrap_err();
        assert_eq!(lacking.to_string(), "host has no IPv6 address");
        let many = (0..=u8::MAX).map(|last| SocketAddr::from(([192, 0, 2, last], 7)));
        assert_eq!(of_family("host", many, None).unwrap().len(), ADDRESSES_MAX);
    }

    #[tokio::test]
    async fn a_name_without_an_answer_says_why() {
        let found_here = found(&mut begin("localhost", 7, Some(true)), "localhost").await.unwrap();
        assert!(found_here == addresses(&["127.0.0.1:7"]) && are_of_this_host_only(&found_here));
        assert!(!are_of_this_host_only(&addresses(&["127.0.0.1:7", "192.0.2.1:7"])));
        // RFC 2606 reserves the domain.
        let unknown = found(&mut begin("no-such-host.invalid", 7, None), "no-such-host.invalid").await.unwrap_err();
        assert!(unknown.to_string().starts_with("no-such-host.invalid cannot be looked up: "), "{unknown}");
        let (sender, mut lookup) = oneshot::channel();
        drop(sender);
        assert!(found(&mut lookup, "host").await.unwrap_err().to_string().contains("no thread"));
    }
}
