//! Who asks: a client's end of the conversation, and what its requests have in common.

use alloc::string::String;
use core::fmt;
use core::net::{IpAddr, SocketAddr};

use uuid::Uuid;

use crate::rate_limit::Sender;

/// The family of a [`Sender`] that is a domain: `AF_UNIX`'s number, which no other sender has. A
/// client by a UNIX socket would need another number. No kernel program sees it, nor the next one.
const FAMILY_DOMAIN: u16 = 1;
/// The family of a [`Sender`] that is a vsock context ID: `AF_VSOCK`'s number.
const FAMILY_VSOCK: u16 = 40;

/// A client's end of the conversation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Caller {
    /// The callback's address and port; by tcp the client's own.
    Ip(SocketAddr),
    /// A vsock address: the number that the hypervisor has given to the machine, and a port.
    Vsock {
        /// The context ID.
        cid: u32,
        /// The client's port.
        port: u32,
    },
    /// A serial line of a domain.
    Line {
        /// The domain's UUID.
        domain: Uuid,
        /// Which of its lines, by the daemon's own numbers.
        line: u32,
    },
}

/// The machine behind a caller. All its clients share one budget.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Address {
    /// An IP address; an IPv4 address in its own form.
    Ip(IpAddr),
    /// A vsock context ID.
    Cid(u32),
    /// A domain's UUID.
    Domain(Uuid),
}

/// The domain that a client runs in. The hypervisor vouches for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vouched {
    /// Its name.
    pub name: String,
    /// Its UUID.
    pub uuid: Uuid,
}

/// A client as groups and the log know it.
#[derive(Clone, Copy, Debug)]
pub struct Who<'a> {
    /// Its machine.
    pub address: Address,
    /// Its domain, where the hypervisor vouches for it.
    pub domain: Option<&'a Vouched>,
    /// The number of the listener that it came to, in the configuration.
    pub listener: usize,
}

impl Caller {
    /// The machine that it belongs to.
    #[must_use]
    pub fn address(&self) -> Address {
        match self {
            Self::Ip(address) => Address::from(address.ip()),
            Self::Vsock { cid, .. } => Address::Cid(*cid),
            Self::Line { domain, .. } => Address::Domain(*domain),
        }
    }
}

impl Address {
    /// The sender that stands for it in the rate limit.
    #[must_use]
    pub fn sender(&self) -> Sender {
        match *self {
            Self::Ip(ip) => Sender::new(&ip.into(), [0; 6]),
            Self::Cid(cid) => {
                let mut ip = [0; 16];
                ip[..4].copy_from_slice(&cid.to_be_bytes());
                Sender { ip, mac: [0; 6], family: FAMILY_VSOCK }
            }
            Self::Domain(uuid) => Sender { ip: uuid.into_bytes(), mac: [0; 6], family: FAMILY_DOMAIN },
        }
    }

    /// The address of such a sender.
    #[must_use]
    pub fn of(sender: &Sender) -> Self {
        let [a, b, c, d, ..] = sender.ip;
        match sender.family {
            FAMILY_VSOCK => Self::Cid(u32::from_be_bytes([a, b, c, d])),
            FAMILY_DOMAIN => Self::Domain(Uuid::from_bytes(sender.ip)),
            _ => Self::Ip(sender.source().into()),
        }
    }
}

impl From<SocketAddr> for Caller {
    fn from(address: SocketAddr) -> Self {
        Self::Ip(address)
    }
}

impl From<IpAddr> for Address {
    fn from(ip: IpAddr) -> Self {
        Self::Ip(ip.to_canonical())
    }
}

impl Who<'_> {
    /// A client of this listener, for whose domain nobody vouches.
    #[must_use]
    pub fn of(address: Address, listener: usize) -> Self {
        Self { address, domain: None, listener }
    }
}

impl fmt::Display for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ip(address) => write!(f, "{address}"),
            Self::Vsock { .. } | Self::Line { .. } => write!(f, "{}", self.address()),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ip(ip) => write!(f, "{ip}"),
            Self::Cid(cid) => write!(f, "CID {cid}"),
            Self::Domain(uuid) => write!(f, "{uuid}"),
        }
    }
}

impl fmt::Display for Who<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.domain, self.address) {
            // Names come from outside: quotes and control characters must not shape a log line.
            (Some(domain), Address::Domain(_)) => write!(f, "{} (serial)", domain.name.escape_debug()),
            (Some(domain), address) => write!(f, "{} ({address})", domain.name.escape_debug()),
            (None, address) => write!(f, "{address}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::string::ToString as _;

    use super::*;

    #[test]
    fn a_machine_keeps_its_identity_as_a_sender() {
        let all = [
            Address::from(IpAddr::from([192, 168, 122, 11])),
            Address::from("::ffff:192.168.122.11".parse::<IpAddr>().unwrap()),
            Address::from("fd00::11".parse::<IpAddr>().unwrap()),
            Address::Cid(0xc0a8_7a0b),
            Address::Cid(3),
            Address::Domain(Uuid::from_u128(0xc0a8_7a0b << 96)),
        ];
        for address in all {
            assert_eq!(Address::of(&address.sender()), address);
        }
        // The first two are one machine; the fourth and the last have the same bytes as they.
        let senders: std::collections::BTreeSet<_> = all.iter().map(Address::sender).collect();
        assert_eq!(senders.len(), all.len() - 1);
    }

    #[test]
    fn the_log_names_the_domain_and_how_it_is_known() {
        let domain = Vouched { name: "node\n1".into(), uuid: Uuid::nil() };
        let who = |address| Who { address, domain: Some(&domain), listener: 0 }.to_string();
        assert_eq!(who(Address::Cid(7)), "node\\n1 (CID 7)");
        assert_eq!(who(Address::Domain(Uuid::nil())), "node\\n1 (serial)");
        assert_eq!(Who::of(Address::Cid(7), 0).to_string(), "CID 7");
        assert_eq!(Who::of(Address::from(IpAddr::from([192, 0, 2, 1])), 0).to_string(), "192.0.2.1");
        assert_eq!(Caller::Vsock { cid: 7, port: 1025 }.to_string(), "CID 7");
    }
}
