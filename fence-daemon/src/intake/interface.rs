//! The network interfaces that requests are expected on.

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::time::Duration;

use nix::ifaddrs::getifaddrs;
use nix::net::if_::{InterfaceFlags, if_nametoindex};

/// How often a missing interface is looked for again.
const LOOK_AGAIN: Duration = Duration::from_millis(200);

/// A network interface of this network namespace.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// The kernel's number for it.
    pub index: u32,
}

impl Interface {
    /// Whether it is still there. One of the same name that was made anew is another one.
    #[must_use]
    pub fn exists(&self) -> bool {
        named(&self.name).is_ok_and(|now| now == *self)
    }
}

/// Why there is no interface to listen on.
#[derive(Debug, thiserror::Error)]
pub enum InterfaceError {
    /// The configured one does not exist.
    #[error(
        "there is no interface {0}: start its network first (`virsh net-start default` makes virbr0), or name another \
         with `interface` in the multicast section, or start with -w to wait for it"
    )]
    Missing(String),
    /// None is configured and none would do.
    #[error("no interface is configured, and there is none here that is up and can multicast over {0}")]
    NoneSuitable(&'static str),
    /// The kernel does not tell.
    #[error("cannot list the network interfaces: {0}")]
    Kernel(#[from] io::Error),
}

/// The interface of that name.
///
/// # Errors
/// [`InterfaceError::Missing`] if there is none.
pub fn named(name: &str) -> Result<Interface, InterfaceError> {
    match if_nametoindex(name) {
        Ok(index) => Ok(Interface { name: name.to_owned(), index }),
        Err(_) => Err(InterfaceError::Missing(name.to_owned())),
    }
}

/// Waits until there is an interface of that name.
pub async fn wait_for(name: &str) -> Interface {
    wait_until(&format!("the interface {name} to appear"), || named(name)).await
}

/// Waits until there is an interface as [`all_for`] wants them.
pub async fn wait_for_any(group: IpAddr) -> Vec<Interface> {
    wait_until("an interface that is up, can multicast and has an address", || all_for(group)).await
}

/// Looks again and again until something is found; says once what for.
async fn wait_until<T>(what: &str, look: impl Fn() -> Result<T, InterfaceError>) -> T {
    if let Ok(found) = look() {
        return found;
    }
    tracing::warn!("waiting for {what}");
    loop {
        tokio::time::sleep(LOOK_AGAIN).await;
        if let Ok(found) = look() {
            return found;
        }
    }
}

/// Every interface that is up, can multicast and has an address of the group's family.
///
/// # Errors
/// If there is none.
pub fn all_for(group: IpAddr) -> Result<Vec<Interface>, InterfaceError> {
    let usable = InterfaceFlags::IFF_UP | InterfaceFlags::IFF_MULTICAST;
    let mut found = BTreeMap::new();
    for address in getifaddrs().map_err(io::Error::from)? {
        let fits = address.address.is_some_and(|own| match group {
            IpAddr::V4(_) => own.as_sockaddr_in().is_some(),
            IpAddr::V6(_) => own.as_sockaddr_in6().is_some(),
        });
        if fits
            && address.flags.contains(usable)
            && let Ok(interface) = named(&address.interface_name)
        {
            found.insert(interface.index, interface);
        }
    }
    if found.is_empty() {
        return Err(InterfaceError::NoneSuitable(if group.is_ipv4() { "IPv4" } else { "IPv6" }));
    }
    Ok(found.into_values().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loopback_is_there_and_nonsense_is_not() {
        assert_eq!(named("lo").unwrap().name, "lo");
        assert!(named("lo").unwrap().exists());
        assert!(!Interface { index: u32::MAX, ..named("lo").unwrap() }.exists(), "made anew");
        let error = named("no-such-if").unwrap_err();
        assert!(matches!(&error, InterfaceError::Missing(name) if name == "no-such-if"));
        assert!(error.to_string().contains("virsh net-start"));
        assert!(named(&"x".repeat(300)).is_err() && named("a\0b").is_err());
    }

    #[test]
    fn no_loopback_among_those_that_can_multicast() {
        // `lo` does not have IFF_MULTICAST; whether anything else is there depends on the machine.
        if let Ok(found) = all_for(IpAddr::from([225, 0, 0, 12])) {
            assert!(found.iter().all(|interface| interface.name != "lo"));
        }
    }
}
