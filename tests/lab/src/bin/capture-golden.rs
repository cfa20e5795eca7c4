//! Captures the requests of the stock `fence_xvm` as fixtures in `fence-common/fixtures`.
//!
//! The client runs in a guest of a lab, with each combination of options. The first datagram of
//! each run becomes a fixture, with the key that signed it. Each capture has other random bytes,
//! sequence numbers and digests.

use std::io::{ErrorKind, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Parser;
use fence_common::hash::HashKind;
use fence_common::wire::{DEFAULT_GROUP_V4, DEFAULT_GROUP_V6, DEFAULT_PORT, REQUEST_LEN};
use fence_lab::client::{Client, Family};
use fence_lab::lab::{BRIDGE, Guest, HYPERVISOR_V4, Hypervisor};
use fence_lab::tools;

/// Captures the stock client's datagrams as fixtures.
#[derive(Parser)]
struct Arguments {
    /// The directory to write to.
    #[arg(long, default_value_os_t = tools::workspace().join("fence-common/fixtures"))]
    into: PathBuf,
}

/// A domain as its UUID is written.
const UUID: &str = "6695eb01-f6a4-8304-79aa-97f2502e193f";
/// The key lengths: one byte, a line of text, a short read of /dev/random, what automation and
/// Debian's package make, and more than the client reads.
const KEY_LENGTHS: [usize; 6] = [1, 12, 115, 512, 4096, 5000];

/// One run of the client.
struct Case {
    key: usize,
    hash: HashKind,
    family: Family,
    op: &'static str,
    domain: Option<&'static str>,
    uuid: bool,
    port: u16,
}

fn cases() -> Vec<Case> {
    let usual = || Case {
        key: 4096,
        hash: HashKind::Sha256,
        family: Family::V4,
        op: "off",
        domain: Some("vm1"),
        uuid: false,
        port: DEFAULT_PORT,
    };
    let mut cases = Vec::new();
    for hash in HashKind::ALL {
        for family in [Family::V4, Family::V6] {
            for (domain, uuid) in [("vm1", false), (UUID, true)] {
                cases.push(Case { hash, family, domain: Some(domain), uuid, ..usual() });
            }
            if hash != HashKind::None {
                for key in KEY_LENGTHS.into_iter().filter(|&key| key != 4096) {
                    cases.push(Case { hash, family, key, ..usual() });
                }
            }
        }
    }
    for (op, domain) in [
        ("null", Some("vm1")),
        ("on", Some("vm1")),
        ("reboot", Some("vm1")),
        ("status", Some("vm1")),
        ("monitor", None),
        ("list", None),
    ] {
        cases.push(Case { op, domain, ..usual() });
    }
    // The longest name that fits, a UUID without the flag, and another port.
    cases.push(Case { domain: Some("a-name-of-63-bytes-0123456789-0123456789-0123456789-0123456789-"), ..usual() });
    cases.push(Case { domain: Some(UUID), ..usual() });
    cases.push(Case { port: 4321, ..usual() });
    cases
}

impl Case {
    fn file(&self) -> String {
        let mut name = format!("{}-{}-{}-key{}", self.hash.name(), self.family.name(), self.op, self.key);
        match (self.domain, self.uuid) {
            (_, true) => name.push_str("-uuid"),
            (Some(UUID), false) => name.push_str("-uuid-unflagged"),
            (Some(long), false) if long.len() == 63 => name.push_str("-63"),
            (Some(_) | None, false) => {}
        }
        if self.port != DEFAULT_PORT {
            name.push_str(&format!("-port{}", self.port));
        }
        name + ".bin"
    }

    fn client(&self, key: &str) -> Client {
        let mut client = Client::new(self.op, key).hash(self.hash).family(self.family);
        if let Some(domain) = self.domain {
            client = client.domain(domain);
        }
        if self.uuid {
            client = client.uuid();
        }
        if self.port != DEFAULT_PORT {
            client = client.port(self.port);
        }
        client
    }
}

/// A socket joined to the group as a server's is.
fn listen(hypervisor: &Hypervisor, family: Family, port: u16) -> Result<UdpSocket> {
    hypervisor.space().in_network(|| {
        let index = nix::net::if_::if_nametoindex(BRIDGE)?;
        let socket = match family {
            Family::V4 => {
                let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port))?;
                socket.join_multicast_v4(&DEFAULT_GROUP_V4.into(), &HYPERVISOR_V4)?;
                socket
            }
            Family::V6 => {
                let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, port))?;
                socket.join_multicast_v6(&DEFAULT_GROUP_V6.into(), index)?;
                socket
            }
        };
        socket.set_read_timeout(Some(Duration::from_millis(100)))?;
        Ok(socket)
    })
}

/// The first datagram of one run, and who sent it.
fn capture(hypervisor: &Hypervisor, guest: &Guest, case: &Case, key: &str) -> Result<(Vec<u8>, SocketAddr)> {
    let socket = listen(hypervisor, case.family, case.port)?;
    let client = case.client(key).retransmit(5).start(guest.space())?;
    let deadline = Instant::now() + Duration::from_secs(10);
    let mut buffer = [0; 2048];
    while Instant::now() < deadline {
        match socket.recv_from(&mut buffer) {
            Ok((length, from)) => return Ok((buffer[..length].to_vec(), from)),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(error) => return Err(error.into()),
        }
    }
    bail!("no datagram; the client printed: {}", client.stderr().text())
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    tools::require(&["fence_xvm"])?;
    let keys = arguments.into.join("keys");
    let datagrams = arguments.into.join("datagrams");
    std::fs::create_dir_all(&keys)?;
    std::fs::create_dir_all(&datagrams)?;
    let hypervisor = Hypervisor::new()?;
    let guest = hypervisor.guest(1)?;
    let mut index = String::from("# file\tkey\top\thash\tflags\tdomain\taddress\tport\tcommand\n");
    for length in KEY_LENGTHS {
        let path = keys.join(format!("{length}.key"));
        if !path.exists() {
            std::fs::write(&path, make_key(length)?)?;
        }
        hypervisor.write(&format!("{length}.key"), &std::fs::read(&path)?)?;
    }
    let mut out = std::io::stdout().lock();
    for case in cases() {
        let key = format!("{}.key", case.key);
        let (datagram, from) = capture(&hypervisor, &guest, &case, &hypervisor.path(&key))
            .with_context(|| format!("capturing {}", case.file()))?;
        if datagram.len() != REQUEST_LEN {
            bail!("{}: a datagram of {} bytes", case.file(), datagram.len());
        }
        std::fs::write(datagrams.join(case.file()), &datagram)?;
        let command = case.client(&format!("keys/{key}")).arguments().join(" ");
        index.push_str(&format!(
            "{}\t{key}\t{}\t{}\t{}\t{}\t{}\t{}\tfence_xvm {command}\n",
            case.file(),
            case.op,
            case.hash.name(),
            u8::from(case.uuid),
            case.domain.unwrap_or("-"),
            from.ip(),
            case.port,
        ));
        writeln!(out, "{} from {from}", case.file())?;
    }
    std::fs::write(arguments.into.join("datagrams.tsv"), index)?;
    Ok(())
}

/// Fresh random bytes; for 12, a line of text with its newline, and for 1 a letter.
fn make_key(length: usize) -> Result<Vec<u8>> {
    match length {
        1 => Ok(b"k".to_vec()),
        12 => Ok(b"open sesame\n".to_vec()),
        _ => tools::random_bytes(length),
    }
}
