//! The network interfaces that receive requests.

use std::collections::BTreeMap;
use std::net::IpAddr;

use nix::ifaddrs::getifaddrs;
use nix::net::if_::{InterfaceFlags, if_indextoname, if_nametoindex};

use crate::link;

/// A network interface of this network namespace.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// The kernel's index of it.
    pub index: u32,
}

impl Interface {
    /// The interface that has this name now.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        if_nametoindex(name).ok().map(|index| Self { name: name.to_owned(), index })
    }

    /// The interface with this name, alternative name or address label (`virbr0:1`), under its own
    /// name. `getifaddrs` reports labels in place of names.
    #[must_use]
    pub fn meant_by(name: &str) -> Option<Self> {
        let Self { name, index } = Self::named(name)?;
        let own = if_indextoname(index).ok().and_then(|own| own.into_string().ok());
        Some(Self { name: own.unwrap_or(name), index })
    }
}

/// An interface that exists now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Present {
    /// The interface.
    pub interface: Interface,
    /// Whether it is up.
    pub up: bool,
}

/// The interfaces that requests are expected on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// The configured interface.
    Named(String),
    /// No interface is configured. Every one counts that is up, can multicast and has an address of
    /// the group's family.
    Suitable(IpAddr),
}

impl Wanted {
    /// The wanted interfaces that exist now.
    #[must_use]
    pub fn there(&self) -> Vec<Present> {
        match self {
            Self::Named(name) => Interface::named(name).into_iter().map(present).collect(),
            Self::Suitable(group) => suitable(*group),
        }
    }
}

fn present(interface: Interface) -> Present {
    // If the kernel does not answer, the interface counts as up. If it has just gone, the next step
    // finds out.
    let up = link::one(interface.index).map_or(true, |link| link.up);
    Present { interface, up }
}

/// Every interface that is up, can multicast and has an address of the group's family.
fn suitable(group: IpAddr) -> Vec<Present> {
    let usable = InterfaceFlags::IFF_UP | InterfaceFlags::IFF_MULTICAST;
    let mut found = BTreeMap::new();
    // On an error the list is empty: the caller asks again later.
    for address in getifaddrs().into_iter().flatten() {
        let fits = address.address.is_some_and(|own| match group {
            IpAddr::V4(_) => own.as_sockaddr_in().is_some(),
            IpAddr::V6(_) => own.as_sockaddr_in6().is_some(),
        });
        if fits
            && address.flags.contains(usable)
            && let Some(interface) = Interface::meant_by(&address.interface_name)
        {
            found.insert(interface.index, Present { interface, up: true });
        }
    }
    found.into_values().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(name: &str) -> Vec<Present> {
        Wanted::Named(name.to_owned()).there()
    }

    #[test]
    fn the_loopback_is_there_and_nonsense_is_not() {
        let lo = named("lo");
        assert_eq!(
            lo.iter().map(|lo| (lo.interface.name.as_str(), lo.interface.index)).collect::<Vec<_>>(),
            [("lo", 1)]
        );
        for name in ["no-such-if", &"x".repeat(300), "a\0b", ""] {
            assert_eq!(named(name), [], "{name:?}");
        }
    }

    #[test]
    fn the_loopback_is_no_multicast_interface() {
        // `lo` does not have IFF_MULTICAST. The other interfaces depend on the machine.
        let found = Wanted::Suitable(IpAddr::from([225, 0, 0, 12])).there();
        assert!(found.iter().all(|found| found.interface.name != "lo" && found.up));
    }
}
