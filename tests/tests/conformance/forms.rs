//! Unusual requests that no stock client sends, and unusual names that no administrator chooses.

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use anyhow::Result;
use fence_common::hash::HashKind;
use fence_common::key::Key;
use fence_common::wire::{FAMILY_V6, Op, Request};
use fence_lab::client::Client;
use fence_lab::lab::HYPERVISOR_V4;
use fence_lab::peer::{Peer, set_address};
use fence_lab::testdriver::{State, TestDomain, uuid};
use zerocopy::IntoBytes;

use crate::scene::{Case, Expected, Scene, Stage};
use crate::talk::{self, SILENCE, perhaps};

const AUTH: HashKind = HashKind::Sha256;

/// A request that would switch its domain off, changed before it is signed.
fn changed(name: &'static str, expected: Expected, change: fn(&mut Request)) -> Case {
    payload(name, expected, move |peer, mut request| {
        change(&mut request);
        Ok(peer.sign(request)?.as_bytes().to_vec())
    })
}

/// A request that would switch its domain off, as the bytes from `make`.
fn payload(
    name: &'static str,
    expected: Expected,
    make: impl Fn(&Peer, Request) -> Result<Vec<u8>> + Send + Sync + 'static,
) -> Case {
    let case = Case::new(name, expected, move |stage, watched| {
        let peer = stage.peer(1)?;
        let request = peer.request(Op::Off, name)?;
        peer.send_bytes(&make(&peer, request)?)?;
        let text = perhaps(stage, &peer)?;
        watched.push(peer);
        Ok(text)
    });
    case.and_state_of(name)
}

/// The result of a request that both servers reject.
fn nothing() -> Expected {
    Expected::both(format!("{SILENCE}, then running"))
}

/// The result of a request that both servers serve.
fn served() -> Expected {
    Expected::both("reply 0, then off")
}

/// The result of a request that only fence_virtd serves.
fn only_stock(id: &'static str) -> Expected {
    Expected::differ(id, "reply 0, then off", format!("{SILENCE}, then running"))
}

/// The result of a request that fence_virtd answers with failure and ours does not answer.
fn refused(id: &'static str) -> Expected {
    Expected::differ(id, "reply 1, then running", format!("{SILENCE}, then running"))
}

fn datagrams() -> Vec<Case> {
    vec![
        changed("as it should be", served(), |_| ()),
        changed("another length of address", served(), |request| request.addr_len = 99),
        changed("flagged as a UUID", served(), |request| request.flags = 1),
        changed("all flags", served(), |request| request.flags = 0xff),
        changed("the highest seqno", served(), |request| request.seqno = u32::MAX.into()),
        changed("junk behind the address", served(), |request| request.address[27] = 1),
        changed("junk behind the name", served(), |request| request.domain[63 - 8] = b'x'),
        changed("operation 7", refused("unknown-operations"), |request| request.op = 7),
        changed("operation 255", refused("unknown-operations"), |request| request.op = 255),
        changed("a name without end", refused("endless-names"), |request| {
            let end = request.domain.iter().position(|byte| *byte == 0).unwrap_or(0);
            request.domain[end..].fill(b'x');
        }),
        changed("callback port 0", nothing(), |request| request.port = 0.into()),
        changed("an IPv6 family", nothing(), |request| request.family = FAMILY_V6.into()),
        changed("a family that is none", nothing(), |request| request.family = 77.into()),
        changed("callback to 0.0.0.0", nothing(), |request| set_address(request, Ipv4Addr::UNSPECIFIED.into())),
        payload("a byte too short", only_stock("other-lengths"), |peer, request| {
            Ok(peer.sign(request)?.as_bytes()[..175].to_vec())
        }),
        payload("empty", nothing(), |_, _| Ok(Vec::new())),
        payload("a byte too long", only_stock("other-lengths"), |peer, request| {
            Ok([peer.sign(request)?.as_bytes(), &[0]].concat())
        }),
        payload("1400 bytes", only_stock("other-lengths"), |peer, request| {
            Ok([peer.sign(request)?.as_bytes(), &[0; 1400 - 176]].concat())
        }),
        payload("a bit of the domain flipped", nothing(), flipped(4)),
        payload("a bit of the digest flipped", nothing(), flipped(112)),
        payload("a bit behind the digest flipped", nothing(), flipped(175)),
        payload("a kind of digest that is none", nothing(), |peer, mut request| {
            request = peer.sign(request)?;
            request.hash_kind = 4;
            Ok(request.as_bytes().to_vec())
        }),
        payload("signed with another key", nothing(), |_, mut request| {
            Key::new(b"another key")?.sign(HashKind::Sha256, &mut request);
            Ok(request.as_bytes().to_vec())
        }),
    ]
}

fn flipped(byte: usize) -> impl Fn(&Peer, Request) -> Result<Vec<u8>> + Send + Sync {
    move |peer, request| {
        let mut bytes = peer.sign(request)?.as_bytes().to_vec();
        bytes[byte] ^= 1;
        Ok(bytes)
    }
}

/// The paths that requests can arrive by.
fn ways() -> Vec<Case> {
    let unicast = "sent to the host instead of the group";
    let to_host = Case::new(unicast, only_stock("unicast"), move |stage, watched| {
        let peer = stage.peer(1)?;
        let request = peer.sign(peer.request(Op::Off, unicast)?)?;
        peer.send_bytes_to(request.as_bytes(), IpAddr::V4(HYPERVISOR_V4))?;
        let text = perhaps(stage, &peer)?;
        watched.push(peer);
        Ok(text)
    });
    let nat = "a callback address that is not the source";
    let not_source = Case::new(nat, only_stock("strict-source"), move |stage, watched| {
        let (front, peer) = (stage.peer(2)?, stage.peer(1)?);
        front.send(peer.request(Op::Off, nat)?)?;
        let text = perhaps(stage, &peer)?;
        watched.push(peer);
        Ok(text)
    });
    vec![to_host.and_state_of(unicast), not_source.and_state_of(nat)]
}

/// The stock client with settings that differ from the server's. It gives up after two seconds
/// here, not thirty.
fn clients() -> Vec<Case> {
    type Set = fn(Client, &Stage) -> Client;
    let cases: [(&str, Set); 5] = [
        ("a weaker hash", |client, _| client.hash(HashKind::Sha1)),
        ("no hash", |client, _| client.hash(HashKind::None)),
        ("another auth", |client, _| client.auth(HashKind::Sha512)),
        ("another port", |client, _| client.port(1230)),
        ("another group", |client, _| client.group("225.0.0.13")),
    ];
    let case = |(number, (what, set)): (usize, (&str, Set))| {
        let name = format!("the stock client with {what}");
        let domain = name.clone();
        let case = Case::new(name.clone(), Expected::Same, move |stage, _| {
            let client = Client::new("off", &stage.config.key_file).domain(&domain).timeout(2);
            talk::ran(stage, 1 + number % 2, &set(client, stage))
        });
        case.and_state_of(name)
    };
    cases.into_iter().enumerate().map(case).collect()
}

/// Rejections whose reason an administrator needs.
fn refusals() -> Vec<Case> {
    /// Whether the log has a line with all of `words` within some seconds.
    fn told(stage: &Stage, words: &[&str]) -> &'static str {
        let line = |line: &str| words.iter().all(|word| line.contains(word)).then_some(());
        let limit = Duration::from_secs(if stage.is_stock() { 1 } else { 10 });
        if stage.server.wait_log(0, limit, line).is_some() { "told" } else { "not told" }
    }
    let differ = |said: &str| Expected::differ("told-refusals", format!("{said}, not told"), format!("{said}, told"));
    vec![
        Case::new("a domain that is in no group", differ("reply 3"), |stage: &Stage, watched| {
            let said = talk::asked(stage, 1, watched, Op::Off, "not-in-a-group")?;
            Ok(format!("{said}, {}", told(stage, &["not-in-a-group", &stage.guest(1)?.v4.to_string(), "group"])))
        }),
        Case::new("a domain that nobody has", differ("reply 1"), |stage: &Stage, watched| {
            let said = talk::asked(stage, 1, watched, Op::Off, "node-unknown")?;
            Ok(format!("{said}, {}", told(stage, &["node-unknown", &stage.guest(1)?.v4.to_string()])))
        }),
        Case::new("a client with another auth", differ("no reply"), |stage: &Stage, watched| {
            let peer = stage.peer(1)?.with_digests(HashKind::Sha256, HashKind::Sha512);
            let said = talk::sent(&peer, peer.request(Op::Off, "node-auth")?, HashKind::Sha512)?;
            watched.push(peer);
            Ok(format!("{said}, {}", told(stage, &["node-auth", &stage.guest(1)?.v4.to_string(), "callback failed"])))
        }),
    ]
}

/// A name of the greatest length.
const LONGEST: &str = "a-name-of-sixty-three-bytes-the-longest-that-requests-can-carry";

/// Domains with names of all kinds.
const NAMES: [&str; 9] = [
    LONGEST,
    "two words",
    "ümläut-名前",
    "dots.and_under-scores",
    "UPPER",
    "fe0ce000000040008000000000000777",
    "{fe0ce000-0000-4000-8000-000000000777}",
    "fe0ce000-0000-4000-8000-00000000077g",
    "'quote\"",
];

/// Names in requests that no domain has in that spelling.
const NOBODY: [&str; 7] = [
    "upper",
    "UPPER ",
    "fe0ce000-0000-4000-8000-000000000999",
    "fe0ce000-0000-4000-8000-00000000099",
    "node*",
    "../UPPER",
    "%s%n",
];

fn names() -> Vec<Case> {
    let mut cases = Vec::new();
    for name in NAMES {
        let expected = "exit 0: Status: ON / exit 0: Status: ON / reply 0, then off";
        let case = Case::new(format!("a domain called {name}"), Expected::both(expected), move |stage, watched| {
            let client = Client::new("status", &stage.config.key_file).domain(name);
            let (plain, flagged) = (talk::ran(stage, 1, &client)?, talk::ran(stage, 1, &client.uuid())?);
            Ok(format!("{plain} / {flagged} / {}", talk::asked(stage, 1, watched, Op::Off, name)?))
        });
        cases.push(case.and_state_of(name));
    }
    for name in NOBODY {
        for (op, reply) in [(Op::Off, 1), (Op::On, 1), (Op::Reboot, 1), (Op::Status, 2)] {
            let expected = Expected::both(talk::reply(reply));
            cases.push(Case::new(
                format!("{} of {name}, which nobody has", op.name()),
                expected,
                move |stage, watched| talk::asked(stage, 1, watched, op, name),
            ));
        }
    }
    for op in Op::ALL {
        for (what, bytes) in [("no name", &b""[..]), ("a name that is no UTF-8", b"\xff\xfe")] {
            let expected = match op {
                Op::Status => Expected::differ("nameless-status", "reply 2", "reply 1"),
                Op::DevStatus => Expected::both("reply 0"),
                Op::HostList => Expected::both(format!("a list of {}", NAMES.len())),
                Op::Null | Op::Off | Op::On | Op::Reboot => Expected::both("reply 1"),
            };
            cases.push(Case::new(format!("{} of {what}", op.name()), expected, move |stage, watched| {
                let peer = stage.peer(1)?;
                let mut request = peer.request(op, "")?;
                request.domain[..bytes.len()].copy_from_slice(bytes);
                let text = talk::sent(&peer, request, AUTH)?;
                watched.push(peer);
                Ok(if op == Op::HostList { text.split(':').next().unwrap_or_default().to_owned() } else { text })
            }));
        }
    }
    cases
}

pub(crate) fn scenes() -> Vec<Scene> {
    let scene = |name, first: usize, cases: Vec<Case>| {
        let names = cases.iter().filter_map(|case| case.domain.clone()).enumerate();
        let domains = names.map(|(index, name)| TestDomain::new(&name, &uuid(first + index), State::Running)).collect();
        Scene { guests: 3, ..Scene::new(name, domains, cases) }
    };
    let mut cases = datagrams();
    cases.extend(ways());
    cases.extend(clients());
    let refusals = scene("refusals", 1, refusals()).configured(|config, guests| {
        let ips: String = guests.iter().map(|guest| format!("ip = \"{}\"; ", guest.v4)).collect();
        config.more = format!("groups {{ group {{ {ips}uuid = \"node-unknown\"; uuid = \"node-auth\"; }} }}\n");
    });
    vec![scene("forms", 1, cases), scene("names", 100, names()), refusals]
}
