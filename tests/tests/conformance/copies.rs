//! Duplicates of a request: identical or changed, several at once, from several addresses.

use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use fence_common::hash::HashKind;
use fence_common::wire::{Op, Request};
use fence_lab::client::Client;
use fence_lab::peer::{Peer, set_address};
use fence_lab::testdriver::{State, TestDomain, uuid};
use zerocopy::IntoBytes;

use crate::scene::{Case, Expected, Scene, Stage};
use crate::talk::{self, SILENCE, perhaps, sent};

const AUTH: HashKind = HashKind::Sha256;
/// The second address of guest 1.
const SECOND: Ipv4Addr = Ipv4Addr::new(192, 168, 122, 111);

/// Sends a duplicate as a stock client does: the same request with new random bytes.
fn again(stage: &Stage, peer: &Peer, request: Request, change: impl Fn(&mut Request)) -> Result<String> {
    let mut request = request;
    change(&mut request);
    peer.send(request)?;
    perhaps(stage, peer)
}

type Change = fn(&mut Request);

/// A first request, and a second one that differs only by `change`.
fn second(name: &str, first: &'static str, changed: &'static str, change: Change) -> Case {
    let domain = name.to_owned();
    Case::new(name, Expected::both(format!("{first} / {changed}, then off")), move |stage, watched| {
        let peer = stage.peer(1)?;
        let request = peer.request(Op::Off, &domain)?;
        let first = sent(&peer, request, AUTH)?;
        let text = format!("{first} / {}", again(stage, &peer, request, change)?);
        watched.push(peer);
        Ok(text)
    })
}

fn put(request: &mut Request, domain: &str) {
    request.domain.fill(0);
    request.domain[..domain.len()].copy_from_slice(domain.as_bytes());
}

fn repeated() -> Vec<Case> {
    let cases = [
        second("the same again", "reply 0", SILENCE, |_| ()),
        second("another seqno", "reply 0", "reply 0", |request| request.seqno = (request.seqno.get() + 500_000).into()),
        second("another operation", "reply 0", "reply 2", |request| request.op = Op::Status.to_wire()),
        second("another domain", "reply 0", "reply 1", |request| put(request, "nobody-2")),
        second("the name in other letters", "reply 0", SILENCE, |request| request.domain.make_ascii_uppercase()),
        second("other flags", "reply 0", SILENCE, |request| request.flags = 1),
        second("junk behind the name", "reply 0", SILENCE, |request| request.domain[40] = b'x'),
    ];
    cases
        .map(|case| {
            let name = case.name.clone();
            case.and_state_of(name)
        })
        .into_iter()
        .collect()
}

/// A case with a first callback that comes to nothing, by `spoil`.
fn spoilt(name: &str, spoil: fn(&Peer, Request) -> Result<()>) -> Case {
    let domain = name.to_owned();
    let case = Case::new(name, Expected::both("reply 0 / no callback, then off"), move |stage, watched| {
        let peer = stage.peer(1)?;
        let request = peer.request(Op::Off, &domain)?;
        spoil(&peer, request)?;
        // A stock client repeats its request after two seconds, long after the server has noticed.
        std::thread::sleep(Duration::from_millis(500));
        let mut answers = Vec::new();
        for _ in 0..2 {
            answers.push(again(stage, &peer, request, |_| ())?);
        }
        watched.push(peer);
        Ok(answers.join(" / "))
    });
    case.and_state_of(name)
}

fn first_call(peer: &Peer, request: Request) -> Result<fence_lab::peer::CallBack> {
    peer.send(request)?;
    peer.called_back(Duration::from_secs(10))?.context("no first callback")
}

fn spoilt_call_backs() -> Vec<Case> {
    vec![
        spoilt("after a callback that was hung up on", |peer, request| {
            drop(first_call(peer, request)?);
            Ok(())
        }),
        spoilt("after a callback hung up on in the middle", |peer, request| first_call(peer, request)?.challenge()),
        spoilt("after a wrong response", |peer, request| {
            let mut call = first_call(peer, request)?;
            call.challenge()?;
            call.read_block()?;
            call.write(&[7; 64])?;
            let _ = call.rest()?;
            Ok(())
        }),
        spoilt("after half a challenge", |peer, request| {
            let mut call = first_call(peer, request)?;
            call.write(&[7; 32])
        }),
    ]
}

/// Duplicates that are in work at the same time.
fn burst() -> Case {
    let name = "five copies at once";
    Case::new(name, Expected::both("reply 0, then off"), move |stage, watched| {
        let peer = stage.peer(1)?;
        let request = peer.request(Op::Off, name)?;
        for _ in 0..5 {
            peer.send(request)?;
        }
        let text = perhaps(stage, &peer)?;
        watched.push(peer);
        Ok(text)
    })
    .and_state_of(name)
}

/// The identical datagram again. The stock client never sends one, as each of its datagrams has new
/// random bytes.
fn replayed() -> Case {
    let name = "the very same datagram after a failed callback";
    let expected = Expected::differ("replays", "reply 0, then off", format!("{SILENCE}, then running"));
    Case::new(name, expected, move |stage, watched| {
        let peer = stage.peer(1)?;
        let datagram = peer.sign(peer.request(Op::Off, name)?)?;
        peer.send_bytes(datagram.as_bytes())?;
        drop(peer.called_back(Duration::from_secs(10))?.context("no first callback")?);
        std::thread::sleep(Duration::from_millis(200));
        peer.send_bytes(datagram.as_bytes())?;
        let text = perhaps(stage, &peer)?;
        watched.push(peer);
        Ok(text)
    })
    .and_state_of(name)
}

fn second_address(stage: &Stage) -> Result<Peer> {
    Peer::at(stage.guest(1)?.space(), SECOND.into(), &talk::key())
}

/// The same request with another callback address and port.
fn at(request: Request, address: IpAddr, port: u16) -> Request {
    let mut request = request;
    set_address(&mut request, address);
    request.port = port.into();
    request
}

fn multi_homed() -> Vec<Case> {
    let dead = "two addresses, the first one dead";
    let first_dead = Case::new(dead, Expected::both("reply 0, then off"), move |stage, watched| {
        let (first, second) = (stage.peer(1)?, second_address(stage)?);
        let request = first.request(Op::Off, dead)?;
        let copy = at(request, second.address(), second.port()?);
        // No client listens there any more.
        let closed = stage.peer(1)?.port()?;
        first.send(at(request, first.address(), closed))?;
        second.send(copy)?;
        let text = perhaps(stage, &second)?;
        watched.extend([first, second]);
        Ok(text)
    });
    let both = "two addresses, both live";
    let expected =
        Expected::differ("addresses-at-once", format!("reply 0 / {SILENCE}, then off"), "reply 0 / no reply, then off");
    let both_live = Case::new(both, expected, move |stage, watched| {
        let (first, second) = (stage.peer(1)?, second_address(stage)?);
        let request = first.request(Op::Off, both)?;
        let copy = at(request, second.address(), second.port()?);
        first.send(request)?;
        second.send(copy)?;
        let text = format!("{} / {}", perhaps(stage, &first)?, perhaps(stage, &second)?);
        watched.extend([first, second]);
        Ok(text)
    });
    vec![first_dead.and_state_of(dead), both_live.and_state_of(both)]
}

/// A client is called back and stays silent; then a newer request comes from the same address and
/// port.
fn overtaken() -> Case {
    let name = "a newer request from the same place";
    let expected = Expected::differ("superseded", "reply 0 / reply 1", "no reply / reply 1");
    Case::new(name, expected, |stage, watched| {
        let peer = stage.peer(1)?;
        let mut older = first_call(&peer, peer.request(Op::DevStatus, "")?)?;
        peer.send(peer.request(Op::Null, "")?)?;
        let newer = |watched: &Peer| perhaps(stage, watched);
        let text = if stage.is_stock() {
            // fence_virtd serves one request after the other.
            let older = talk::described(&talk::conversation(&mut older, AUTH)?);
            format!("{older} / {}", newer(&peer)?)
        } else {
            let newer = newer(&peer)?;
            format!("{} / {newer}", talk::described(&talk::conversation(&mut older, AUTH)?))
        };
        watched.push(peer);
        Ok(text)
    })
}

/// The stock client sends a request from each of its two addresses.
fn stock_client() -> Vec<Case> {
    let cases = [
        ("status", "exit 0: Status: ON, then running"),
        ("off", "exit 0, then off"),
        ("reboot", "exit 0, then running"),
    ];
    let case = |(op, expected): (&'static str, &str)| {
        let name = format!("two addresses, the stock client asks for {op}");
        let domain = name.clone();
        let case = Case::new(name.clone(), Expected::both(expected), move |stage, _| {
            talk::ran(stage, 1, &Client::new(op, &stage.config.key_file).domain(&domain))
        });
        case.and_state_of(name)
    };
    cases.into_iter().map(case).collect()
}

/// On a segment with several hypervisors all of them hear a request, and the client takes the first
/// callback that it gets.
fn deferred() -> Case {
    let expected = Expected::differ("unknown-defers", "the unknown domain first", "the unknown domain last");
    Case::new("an unknown domain, and then something else", expected, |stage, watched| {
        let (unknown, other) = (stage.peer(1)?, stage.peer(1)?);
        unknown.send(unknown.request(Op::Off, "nobody-3")?)?;
        other.send(other.request(Op::Null, "")?)?;
        let deadline = Instant::now() + Duration::from_secs(10);
        let mut order = Vec::new();
        while order.len() < 2 && Instant::now() < deadline {
            for (peer, words) in [(&unknown, "the unknown domain"), (&other, "another")] {
                if let Some(mut call) = peer.called_back(Duration::ZERO)? {
                    talk::conversation(&mut call, AUTH)?;
                    order.push(words);
                }
            }
        }
        watched.extend([unknown, other]);
        Ok(match order.as_slice() {
            [first, "another"] => format!("{first} first"),
            ["another", last] => format!("{last} last"),
            _ => format!("called back: {}", order.join(", ")),
        })
    })
}

pub(crate) fn scenes() -> Vec<Scene> {
    let mut cases = repeated();
    cases.extend(spoilt_call_backs());
    cases.extend([burst(), replayed(), overtaken(), deferred()]);
    cases.extend(stock_client());
    cases.extend(multi_homed());
    let names = cases.iter().filter_map(|case| case.domain.clone()).enumerate();
    let domains = names.map(|(index, name)| TestDomain::new(&name, &uuid(index + 1), State::Running)).collect();
    let scene = Scene::new("copies", domains, cases);
    vec![scene.prepared(|_, guests| {
        let first = guests.first().context("no guest")?;
        first.space().must("ip", &["addr", "add", &format!("{SECOND}/24"), "dev", "eth0"])?;
        Ok(())
    })]
}
