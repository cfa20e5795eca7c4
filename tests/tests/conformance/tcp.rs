//! The tcp listener: the matrix of operations once more, over connections of the clients, and what
//! only connections have.

use fence_common::hash::HashKind;
use fence_common::wire::{Op, Request};
use fence_lab::client::Client;
use fence_lab::lab::HYPERVISOR_V4;
use fence_lab::server::Config;
use fence_lab::testdriver::{State, TestDomain, uuid};
use zerocopy::IntoBytes;

use crate::matrix;
use crate::scene::{Case, Expected, Scene};
use crate::talk::{self, NO_REPLY, described};

/// Makes the server listen at tcp.
fn by_tcp(config: &mut Config) {
    config.tcp = Some(vec![("address", HYPERVISOR_V4.to_string()), ("key_file", config.key_file.clone())]);
}

/// A request like this is sent, and what comes of it.
fn sent(name: &str, expected: Expected, change: fn(Request) -> Request) -> Case {
    let domain = name.replace(' ', "-");
    let own = domain.clone();
    let case = Case::new(name, expected, move |stage, watched| {
        let peer = stage.peer(1)?;
        let request = peer.sign(change(peer.stream_request(Op::Off, &domain)?))?;
        let said = talk::conversation(&mut stage.connected(&peer, 1, request.as_bytes())?, stage.config.auth)?;
        watched.push(peer);
        Ok(described(&said))
    });
    case.and_state_of(own)
}

fn forms() -> Scene {
    let off = || Expected::both("reply 0, then off");
    let closed = || Expected::both(format!("{NO_REPLY}, then running"));
    let only_stock = |id| Expected::differ(id, "reply 0, then off", format!("{NO_REPLY}, then running"));
    let mut cases = vec![
        sent("as a client does", off(), |request| request),
        sent("with flags", off(), |request| Request { flags: 0xff, addr_len: 16, ..request }),
        sent("with an address", only_stock("tcp-addresses"), |request| Request { address: [1; 28], ..request }),
        sent("with a port", only_stock("tcp-addresses"), |request| Request { port: 1229.into(), ..request }),
        sent("with a family", only_stock("tcp-addresses"), |request| Request { family: 2.into(), ..request }),
    ];
    let again =
        Case::new("again after the answer", Expected::both(format!("reply 0, {NO_REPLY}, then off")), |stage, _| {
            let peer = stage.peer(1)?;
            let request = peer.sign(peer.stream_request(Op::Off, "again-after-the-answer")?)?;
            let ask = || talk::conversation(&mut stage.connected(&peer, 1, request.as_bytes())?, stage.config.auth);
            let (first, second) = (ask()?, ask()?);
            Ok(format!("{}, {}", described(&first), described(&second)))
        });
    cases.push(again.and_state_of("again-after-the-answer"));
    for hash in HashKind::ALL {
        let domain = format!("hash-{}", hash.name());
        let (name, own) = (domain.clone(), domain.clone());
        let expected = if hash.to_wire() < HashKind::Sha256.to_wire() { closed() } else { off() };
        let case = Case::new(name, expected, move |stage, _| {
            let peer = stage.peer(1)?.with_digests(hash, HashKind::Sha256);
            let request = peer.sign(peer.stream_request(Op::Off, &domain)?)?;
            let mut connection = stage.connected(&peer, 1, request.as_bytes())?;
            Ok(described(&talk::conversation(&mut connection, stage.config.auth)?))
        });
        cases.push(case.and_state_of(own));
    }
    for auth in [HashKind::Sha1, HashKind::Sha512] {
        let domain = format!("auth-{}", auth.name());
        let (name, own) = (domain.clone(), domain.clone());
        let case = Case::new(name, closed(), move |stage, _| {
            let client = Client::new("off", &stage.config.key_file).domain(&domain).auth(auth);
            let text = talk::ran(stage, 1, &client.tcp(&HYPERVISOR_V4.to_string()))?;
            Ok(if text.starts_with("exit 0") { text } else { NO_REPLY.to_owned() })
        });
        cases.push(case.and_state_of(own));
    }
    for op in Op::ALL {
        let domain = format!("client-{}", op.name());
        let own = domain.clone();
        let case = Case::new(domain.clone(), Expected::Same, move |stage, _| {
            let client = Client::new(op.name(), &stage.config.key_file).tcp(&HYPERVISOR_V4.to_string());
            let client = if op.names_a_domain() { client.domain(&domain) } else { client };
            let text = talk::ran(stage, 1, &client)?;
            // The states of the other domains change meanwhile.
            Ok(if op == Op::HostList { text.replace(" off", " on") } else { text })
        });
        cases.push(case.and_state_of(own));
    }
    let names = cases.iter().filter_map(|case| case.domain.clone()).enumerate();
    let domains = names.map(|(number, name)| TestDomain::new(&name, &uuid(8000 + number), State::Running)).collect();
    Scene::new("tcp-forms", domains, cases).configured(|config, _| by_tcp(config))
}

pub(crate) fn scenes() -> Vec<Scene> {
    let matrices = matrix::scenes().into_iter().map(|scene| {
        let (name, configure) = (format!("tcp-{}", scene.name), scene.configure);
        Scene { name, configure: Box::new(|_, _| ()), ..scene }.configured(move |config, guests| {
            configure(config, guests);
            by_tcp(config);
        })
    });
    matrices.chain([forms()]).collect()
}
